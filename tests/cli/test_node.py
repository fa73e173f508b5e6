"""elastickv.cli.node: flags become settings text; refusals exit 2 before anything is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from elastickv import config, hygiene
from elastickv.cli.main import run
from elastickv.cli.node import node
from elastickv.config import NodeSettings
from elastickv.errors import ExitCode


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[NodeSettings]:
    """Settings that reach `run_node`, which is recorded and not run."""
    import elastickv.node

    seen: list[NodeSettings] = []

    def record(settings: NodeSettings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(elastickv.node, "run_node", record)
    # What the command does to its own process, which here is that of all tests.
    monkeypatch.setattr(hygiene, "disable_core_dumps", lambda: "")
    monkeypatch.setenv("GRPC_EXPERIMENTS", "")
    return seen


def test_go_spelling_and_kebab_case_are_the_same(started: list[NodeSettings]) -> None:
    assert run(["node", "--raftId", "n1", "--raftDataDir", "d", "--kekFile", "k", "--insecure",
                "--raftAddress", "127.0.0.1:7", "--raftBootstrapMembers", "n1=127.0.0.1:7"]) == 0
    assert run(["node", "--raft-id", "n1", "--raft-data-dir=d", "--kek-file=k", "--insecure=true",
                "--raft-address", "127.0.0.1:7", "--raft-bootstrap-members=n1=127.0.0.1:7"]) == 0
    assert started[0] == started[1]
    assert started[0].kek_file == Path("k")


@pytest.mark.parametrize(("flags", "enabled"), [
    ([], False), (["--encryption-enabled"], True), (["--encryption-enabled=true"], True),
    (["--encryption-enabled=false"], False),
    (["--encryption-enabled", "--log-level", "debug"], True),
])
def test_booleans_take_an_optional_value(started: list[NodeSettings], flags: list[str],
                                         enabled: bool) -> None:
    assert run(["node", "--raftId", "n1", "--insecure", *flags]) == 0
    assert started[0].encryption_enabled is enabled


def test_sources_are_merged(started: list[NodeSettings], monkeypatch: pytest.MonkeyPatch,
                            tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("raft-id = 'file'\nlog-level = 'debug'\naccept-loops = 2\ninsecure = true\n")
    monkeypatch.setenv("ELASTICKV_CONFIG", str(path))
    monkeypatch.setenv("ELASTICKV_LOG_LEVEL", "warning")
    assert run(["node", "--raftId", "flag"]) == 0
    assert (started[0].raft_id, started[0].log_level, started[0].accept_loops) == (
        "flag", "warning", 2)


@pytest.mark.parametrize("flags", [
    [], ["--insecure", "--address", "192.0.2.1:1"], ["--accept-loops", "zero"],
    ["--config", "/no/such/file"]])
def test_refusals(started: list[NodeSettings], flags: list[str],
                  capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--raftId", "n1", *flags]) == ExitCode.USAGE
    assert started == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "Remedy:" in lines[0]


def test_help_names_every_flag_and_variable() -> None:
    text = CliRunner().invoke(node, ["--help"], terminal_width=300).output
    for setting in config.SETTINGS:
        assert all(flag in text for flag in setting.flags)
        assert setting.variable in text


# Runs `elastickv` and prints what the variable holds at the first import of grpc.
PRINT_AT_IMPORT_OF_GRPC = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_EXPERIMENTS"), flush=True)
sys.meta_path.insert(0, Finder())
from elastickv.cli.main import main
main()
"""


@pytest.mark.parametrize(("given", "found"), [(None, "-event_engine_listener"), ("", ""),
                                              ("other", "other")])
def test_grpc_is_told_before_its_import_which_listener_to_use(
        tmp_path: Path, given: str | None, found: str) -> None:
    (tmp_path / "file").touch()
    environment = {name: text for name, text in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    if given is not None:
        environment["GRPC_EXPERIMENTS"] = given
    done = subprocess.run(
        [sys.executable, "-c", PRINT_AT_IMPORT_OF_GRPC, "node", "--raftId", "n1", "--insecure",
         "--raftBootstrap", "--raftDataDir", str(tmp_path / "file")],
        capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode != 0
    assert done.stdout.split("\n") == [found, ""]
