"""`elastickv local-cluster` (what `make run` runs), end to end: its printed commands are run as
printed, the disk is searched, it is stopped and started again."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

VALUE = "a phrase that is easy to find"


def free_block(count: int) -> int:
    """The first of `count` consecutive free ports."""
    while True:
        first = random.randrange(20000, 30000, 10)
        with_ports = [socket.socket() for _ in range(count)]
        try:
            for number, probe in enumerate(with_ports):
                probe.bind(("127.0.0.1", first + number))
        except OSError:
            continue
        finally:
            for probe in with_ports:
                probe.close()
        return first


class Running:
    """A local cluster that is up, and what it printed."""

    def __init__(self, process: subprocess.Popen[str], printed: list[str]) -> None:
        self.process = process
        self.printed = printed

    def commands(self) -> list[str]:
        """The lines to paste, as printed."""
        return [line.strip() for line in self.printed if line.startswith("  ")]

    def table(self) -> list[dict[str, str]]:
        lines = [line.rstrip("\n").split("\t") for line in self.printed if "\t" in line]
        return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]

    def shell(self, script: str) -> str:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], text=True, timeout=120,
                              capture_output=True, check=False)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@contextmanager
def cluster(data: Path, nodes: int, ports: int) -> Iterator[Running]:
    command = [sys.executable, "-m", "elastickv", "local-cluster", "--nodes", str(nodes), "--data",
               str(data), "--client-port", str(ports), "--raft-port", str(ports + nodes)]
    with (data.parent / "stderr").open("ab") as errors, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("no pipe")
            printed: list[str] = []
            for line in process.stdout:
                printed.append(line)
                if line.startswith("Logs:"):
                    break
            assert process.poll() is None, (data.parent / "stderr").read_text()
            yield Running(process, printed)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(60)


def node_pid(data: Path, node_id: str) -> int:
    """The process that runs on `node_id`'s data directory."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(data / node_id).encode() in path.read_bytes().split(b"\0"):
                return int(path.parent.name)
    raise LookupError(node_id)


def stop(running: Running, number: signal.Signals) -> int:
    running.process.send_signal(number)
    return running.process.wait(60)


@pytest.mark.parametrize("nodes", [1, 3])
def test_first_run_commands_and_second_run(tmp_path: Path, nodes: int) -> None:
    data, ports = tmp_path / "data", free_block(2 * nodes)
    errors = tmp_path / "stderr"
    with cluster(data, nodes, ports) as running:
        first_table = running.table()
        assert [row["member"] for row in first_table] == [f"n{i + 1}" for i in range(nodes)]
        assert [row["role"] for row in first_table].count("leader") == 1
        for row in first_table:
            assert int(row["storage_dek_id"]) > 0
            assert int(row["raft_dek_id"]) > 0
            assert 0 < int(row["storage_cutover_index"]) < int(row["raft_cutover_index"])
        output = running.shell("\n".join(running.commands()))
        assert VALUE in output
        assert "not on any disk" in output
        assert stop(running, signal.SIGINT) == 0
    assert errors.read_text().count("exit code 0 (success; a node: stopped cleanly)") == nodes

    with cluster(data, nodes, ports) as running:
        assert "made " not in errors.read_text().split("stopping")[-1]
        rotated = running.table()
        assert {row["storage_dek_id"] for row in rotated} != {
            row["storage_dek_id"] for row in first_table}
        assert [row["raft_cutover_index"] for row in rotated] == [
            row["raft_cutover_index"] for row in first_table]
        source, _, get = running.commands()[:3]
        assert VALUE in running.shell(f"{source}\n{get}")
        assert stop(running, signal.SIGTERM) == 0


def test_an_idle_node_uses_less_than_90_mb(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with cluster(data, 3, free_block(6)) as running:
        for row in running.table():
            status = Path("/proc", str(node_pid(data, row["member"])), "status").read_text()
            resident_kib = int(status.split("VmRSS:")[1].split()[0])
            assert resident_kib < 90 * 1000


def test_no_value_is_on_any_disk_even_after_a_clean_stop(tmp_path: Path) -> None:
    """The overlay is flushed and the log trimmed on a stop: the files differ from those of a
    running node."""
    data = tmp_path / "data"
    with cluster(data, 1, free_block(2)) as running:
        source, put = running.commands()[:2]
        running.shell(f"{source}\n{put}")
        assert stop(running, signal.SIGINT) == 0
    files = [path for path in data.rglob("*") if path.is_file()]
    assert any(path.stat().st_size > 1000 for path in files if "store" in str(path))
    assert [path for path in files if VALUE.encode() in path.read_bytes()] == []


def test_a_killed_node_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with cluster(data, 3, free_block(6)) as running:
        source, put, get = running.commands()[:3]
        victim = next(row for row in running.table() if row["role"] == "leader")["member"]
        os.kill(node_pid(data, victim), signal.SIGKILL)
        running.shell(f"{source}\n{put}")
        assert VALUE in running.shell(f"{source}\n{get}")
        assert stop(running, signal.SIGINT) == 0
    errors = (tmp_path / "stderr").read_text()
    assert f"{victim} ended with exit code -9 (killed by SIGKILL)" in errors
    assert errors.count("exit code 0 ") == 2


def test_a_node_that_refuses_to_start_ends_the_command(tmp_path: Path) -> None:
    data, ports = tmp_path / "data", free_block(2)
    data.mkdir()
    (data / "kek.key").write_bytes(bytes(31))
    (data / "kek.key").chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-m", "elastickv", "local-cluster", "--nodes", "1", "--data", str(data),
         "--client-port", str(ports), "--raft-port", str(ports + 1)],
        capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "kek.key" in done.stderr
    assert "31 bytes" in done.stderr


def test_a_busy_port_ends_the_command_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        busy = server.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "elastickv", "local-cluster", "--nodes", "1", "--data",
             str(tmp_path / "data"), "--client-port", str(busy), "--raft-port", "19999"],
            capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 6
    assert f"port {busy}" in done.stderr
    assert not (tmp_path / "data").exists()  # or other ports could not be chosen, as it says
