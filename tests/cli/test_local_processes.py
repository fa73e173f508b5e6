"""elastickv.cli.local_processes: what is made, what is reused, what is refused."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastickv import config
from elastickv.cli import local_cluster, local_processes
from elastickv.cli.local_processes import Layout, LocalNode, NodeProcess, Shape, prepare
from elastickv.cli.node import node as node_command_line
from elastickv.errors import BindFailed, ConfigError, ElasticKVError, StartupRefused

THREE = Shape(3, 21051, 21151)


def settings_of(layout: Layout, node: LocalNode) -> config.NodeSettings:
    """The settings that a node would run with, through the real command line and parser."""
    arguments = local_processes.node_command(layout, node)[4:]
    options = node_command_line.make_context("node", arguments).params
    options.pop("config_path")
    return config.resolve({name: text for name, text in options.items() if text is not None}, {})


def test_first_run_makes_everything_owner_only(tmp_path: Path) -> None:
    layout, made = prepare(tmp_path / "data", THREE)
    assert len(made) == 1 + 1 + 3 + 1
    assert stat.S_IMODE(layout.kek_file.stat().st_mode) == 0o600
    assert layout.kek_file.stat().st_size == 32
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    for key in (tmp_path / "data" / "certs").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_second_run_makes_nothing_and_changes_nothing(tmp_path: Path) -> None:
    prepare(tmp_path, THREE)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    layout, made = prepare(tmp_path, THREE)
    assert made == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert layout == Layout(tmp_path, THREE)


@pytest.mark.parametrize("missing", ["cluster.json", "kek.key", "certs", "n2", "client.env"])
def test_a_directory_that_takes_no_file_is_named(tmp_path: Path, missing: str) -> None:
    """A link that leads nowhere stands in the place of what is to be made."""
    prepare(tmp_path, THREE)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to("/proc/self/nothing")
    if missing == "cluster.json":
        path.with_name("cluster.json.tmp").mkdir()
    with pytest.raises(ElasticKVError) as caught:
        prepare(tmp_path, THREE)
    assert missing in caught.value.message
    assert caught.value.remedy


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    layout, _ = prepare(tmp_path, THREE)
    layout.nodes[0].log_path.mkdir()
    with pytest.raises(ConfigError, match=r"node\.log cannot be used"):
        local_processes.start_all(layout)


@pytest.mark.parametrize("python", ["/opt/py/python3", "/opt/a b/python3"])
def test_the_printed_commands_can_be_pasted_without_a_script(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setattr(sys, "executable", python)
    lines = local_cluster.commands(Layout(tmp_path, THREE)).splitlines()
    get = next(line for line in lines if "client get" in line)
    assert shlex.split(get) == [python, "-m", "elastickv", "client", "get", "greeting"]


def test_what_an_interrupted_first_run_left_out_is_made(tmp_path: Path) -> None:
    prepare(tmp_path, THREE)
    for name in ("n3.crt", "n3.key", "admin.crt", "admin.key"):
        (tmp_path / "certs" / name).unlink()
    _, made = prepare(tmp_path, THREE)
    assert len(made) == 2


@pytest.mark.parametrize("other", [Shape(1, 21051, 21151), Shape(3, 30000, 21151),
                                   Shape(3, 21051, 30000)], ids=str)
def test_another_shape_is_refused(tmp_path: Path, other: Shape) -> None:
    prepare(tmp_path, THREE)
    with pytest.raises(ConfigError, match="holds a cluster of 3") as caught:
        prepare(tmp_path, other)
    assert "NODES=3" in caught.value.remedy


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"nodes": 3}', "no json"])
def test_damaged_cluster_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "cluster.json").write_text(text)
    with pytest.raises(ConfigError, match=r"cluster\.json"):
        prepare(tmp_path, THREE)


def test_the_node_accepts_its_command_line(tmp_path: Path) -> None:
    layout, _ = prepare(tmp_path, THREE)
    for node in layout.nodes:
        settings = settings_of(layout, node)
        assert settings.raft_id == node.node_id
        assert [m.node_id for m in settings.founding_members] == ["n1", "n2", "n3"]
        assert settings.tls is not None
        assert settings.encryption_enabled
        assert settings.kek_file == layout.kek_file


def test_a_directory_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    layout, _ = prepare(tmp_path / os.fsdecode(b"caf\xe9"), Shape(1, 50051, 50151))
    assert b"/caf\xe9/certs/ca.crt" in layout.client_env.read_bytes()


def test_client_environment_is_shell(tmp_path: Path) -> None:
    layout, _ = prepare(tmp_path / "it's here", THREE)
    done = subprocess.run(
        ["bash", "-c", '. "$1"; env', "bash", str(layout.client_env)], capture_output=True,
        text=True, check=True)
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert variables["ELASTICKV_ENDPOINTS"] == "127.0.0.1:21051,127.0.0.1:21052,127.0.0.1:21053"
    for name in ("ELASTICKV_TLS_CA", "ELASTICKV_TLS_CERT", "ELASTICKV_TLS_KEY"):
        assert Path(variables[name]).is_file()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("kind", ["client", "raft"])
def test_busy_port_is_named(tmp_path: Path, listener: socket.socket, kind: str) -> None:
    busy = listener.getsockname()[1]
    shape = Shape(1, busy, 21151) if kind == "client" else Shape(1, 21051, busy)
    with pytest.raises(BindFailed, match=f"port {busy} for n1 is in use"):
        local_processes.check_ports(Layout(tmp_path, shape))


def test_ports_of_clients_and_members_must_not_meet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overlap"):
        local_processes.check_ports(Layout(tmp_path, Shape(2, 21051, 21052)))


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be made"):
        local_processes.prepare(tmp_path / "file" / "data", Shape(1, 21051, 21151))


def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> NodeProcess:
    """A `NodeProcess` that runs `script` in place of the node."""
    monkeypatch.setattr(local_processes, "node_command",
                        lambda layout, node: [sys.executable, "-c", script])
    (tmp_path / "n1").mkdir()
    layout = Layout(tmp_path, Shape(1, 21051, 21151))
    return NodeProcess(layout, layout.nodes[0])


def test_a_node_that_ends_is_reported_with_its_log(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(tmp_path, monkeypatch, "print('last words'); raise SystemExit(3)")
    assert [ended.node.node_id for ended in local_processes.exits([process])] == ["n1"]
    assert "exit code 3 (a start-up guard refused" in process.describe_exit()
    assert str(tmp_path / "n1" / "node.log") in process.describe_exit()
    with pytest.raises(StartupRefused, match="last words"):
        local_processes.require_alive([process])


def test_stop_terminates_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(tmp_path, monkeypatch, "import time; time.sleep(60)")
    local_processes.require_alive([process])
    assert local_processes.stop_all([process]) == {"n1": -signal.SIGTERM}
    assert "killed by SIGTERM" in process.describe_exit()


def test_a_node_that_ignores_sigterm_is_killed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
              "print('deaf', flush=True); time.sleep(60)")
    process = start(tmp_path, monkeypatch, script)
    while process.log_tail() != "deaf":
        local_processes.require_alive([process])
    monkeypatch.setattr(local_processes, "STOP_TIMEOUT_S", 0.1)
    assert local_processes.stop_all([process]) == {"n1": -signal.SIGKILL}


def test_nodes_see_no_stray_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTICKV_ACCEPT_LOOPS", "1")
    process = start(tmp_path, monkeypatch,
                    "import json, os; print(json.dumps(list(os.environ)))")
    process.wait_or_kill(30)
    names = json.loads(process.log_tail())
    assert "PATH" in names
    assert not [name for name in names if name.startswith("ELASTICKV_")]


def test_nodes_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """The parent is killed outright; the node in its own session still ends."""
    script = f"""
import sys, time
from pathlib import Path
from elastickv.cli import local_processes as lp
lp.node_command = lambda layout, node: [sys.executable, "-c", "import time; time.sleep(60)"]
Path({str(tmp_path)!r}, "n1").mkdir()
layout = lp.Layout(Path({str(tmp_path)!r}), lp.Shape(1, 21051, 21151))
print(lp.NodeProcess(layout, layout.nodes[0]).pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                          text=True) as parent:
        if parent.stdout is None:
            raise RuntimeError("no pipe")
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
    assert select.select([child], [], [], 30)[0] == [child]
    os.close(child)
