"""Waiting for servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ClusterFailed, ServerProcess, wait_until


def test_a_wait_that_ends_in_vain_shows_the_logs(tmp_path: Path) -> None:
    server = ServerProcess(["sh", "-c", "echo the reason; exec sleep 60"], tmp_path / "log")
    try:
        wait_until(lambda: "reason" in server.log_tail(), [server], timeout_s=10, what="a line")
        with pytest.raises(ClusterFailed, match=r"(?s)it serves: not within.*the reason"):
            wait_until(lambda: False, [server], timeout_s=0, what="it serves")
    finally:
        server.kill()
