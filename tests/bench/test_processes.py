"""Waiting for servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ClusterFailed, ServerProcess, wait_until


def test_servers_have_no_settings_from_the_shell(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `. client.env` of a local cluster."""
    monkeypatch.setenv("ELASTICKV_TLS_CERT", "/of/a/client.crt")
    monkeypatch.setenv("KEPT", "kept")
    server = ServerProcess(["sh", "-c", "env; exec sleep 60"], tmp_path / "log")
    try:
        wait_until(lambda: "KEPT=kept" in server.log.read_text(), [server], timeout_s=10,
                   what="the variables")
        assert "ELASTICKV_" not in server.log.read_text()
    finally:
        server.kill()


def test_a_wait_that_ends_in_vain_shows_the_logs(tmp_path: Path) -> None:
    server = ServerProcess(["sh", "-c", "echo the reason; exec sleep 60"], tmp_path / "log")
    try:
        wait_until(lambda: "reason" in server.log_tail(), [server], timeout_s=10, what="a line")
        with pytest.raises(ClusterFailed, match=r"(?s)it serves: not within.*the reason"):
            wait_until(lambda: False, [server], timeout_s=0, what="it serves")
    finally:
        server.kill()
