"""How a node ends: what it does first when it must stop, and that no failure skips the rest."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import elastickv.node
from elastickv import config, logs
from elastickv.cli.exit_codes import MEANINGS
from elastickv.data_directory import failure_of
from elastickv.errors import (
    CorruptionError,
    DiskFailed,
    DiskFull,
    ElasticKVError,
    ExitCode,
    OperatorError,
    RemovedFromCluster,
)
from elastickv.keys.guards import DataDirectoryUnusable
from elastickv.node import Node
from jepsen import preload
from jepsen.network import Unsupported
from jepsen.network.ports import free_ports
from jepsen.preload import Preload, PreloadFiles
from tests.cluster.cluster import Cluster, NodeProcess


def fiu_is_installed() -> bool:
    try:
        preload.find_libraries(Preload.FIU)
    except Unsupported:
        return False
    return True


def settings_for(directory: Path) -> config.NodeSettings:
    port, raft_port = free_ports(2)
    return config.resolve({
        "raft_id": "n1", "raft_bootstrap": "true", "insecure": "true",
        "raft_data_dir": str(directory / "data"), "address": f"127.0.0.1:{port}",
        "raft_address": f"127.0.0.1:{raft_port}"}, {})


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"), CorruptionError("damaged"),
    RemovedFromCluster("removed")], ids=lambda error: type(error).__name__)
async def test_a_fatal_error_stops_the_node_although_nothing_can_be_logged(
        tmp_path: Path, error: Exception) -> None:
    node = Node(settings_for(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        logs.configure(stream=stream)
        try:
            node._fail(error)
        finally:
            logs.configure()
    with pytest.raises(type(failure_of(error))):
        await asyncio.wait_for(node.run_until_stopped(), 10)


async def test_a_fatal_error_is_acted_on_before_it_is_logged(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwritable:
        def error(self, event: str, **fields: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    node = Node(settings_for(tmp_path))
    monkeypatch.setattr("elastickv.node.log", Unwritable())
    with pytest.raises(OSError, match="No space left"):
        node._fail(CorruptionError("damaged"))
    assert node._stop_requested.is_set()


@pytest.mark.parametrize(("error", "kind", "code", "remedy"), [
    (OSError(errno.EIO, "Input/output error"), DiskFailed, 10, "replace the disk"),
    (OSError(errno.EROFS, "Read-only file system"), DiskFailed, 10, "replace the disk"),
    (OSError(errno.ENOSPC, "No space left on device"), DiskFull, 1, "free space"),
    (OSError(errno.EMFILE, "Too many open files"), OperatorError, 1, "raise the limits"),
    (PermissionError(errno.EACCES, "Permission denied", "keys.json"), DataDirectoryUnusable, 3,
     "chown"),
], ids=["failed", "read-only", "full", "descriptors", "permission"])
def test_what_the_machine_refused_is_told_by_who_must_act(
        error: OSError, kind: type[ElasticKVError], code: int, remedy: str) -> None:
    failure = failure_of(error)
    assert type(failure) is kind
    assert isinstance(failure, ElasticKVError)
    assert failure.exit_code == code
    assert remedy in failure.remedy
    assert error.strerror in failure.message
    assert code in MEANINGS


@pytest.mark.parametrize("error", [
    ValueError("a defect"), ConnectionResetError("not foreseen"), TimeoutError(),
    *(OSError(number, os.strerror(number)) for number in (
        errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENOTCONN))], ids=repr)
def test_other_errors_are_what_they_were(error: Exception) -> None:
    assert failure_of(error) is error


def test_a_failure_tells_which_call_it_was() -> None:
    with pytest.raises(OSError, match="Is a directory") as caught:
        Path("/").read_bytes()
    assert failure_of(caught.value).__traceback__ is caught.value.__traceback__


@pytest.mark.parametrize("part", ["GrpcServer", "ContactBook", "EncryptionController",
                                  "PySyncObjEngine", "Flusher"])
async def test_a_step_of_the_stop_that_fails_skips_no_other(
        tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path)
    owner = getattr(elastickv.node, part)
    real = owner.stop

    def failing(*arguments: object, **named: object) -> object:
        outcome = real(*arguments, **named)
        if not asyncio.iscoroutine(outcome):
            raise OSError(errno.EIO, "Input/output error")

        async def finish() -> None:
            await outcome
            raise OSError(errno.EIO, "Input/output error")

        return finish()

    with monkeypatch.context() as patched:
        patched.setattr(owner, "stop", failing)
        node = Node(settings)
        await node.start()
        node.request_stop()
        with capture_logs() as logged, pytest.raises(OSError, match="Input/output"):
            await node.run_until_stopped()
    assert [event["event"] for event in logged if event["log_level"] == "error"] == [
        "a step of the stop failed"]
    assert logged[-1]["event"] == "node stopped"
    # Everything was given back: the same directory and ports serve again.
    again = Node(settings)
    await again.start()
    again.request_stop()
    assert await again.run_until_stopped() == ExitCode.OK


def start_with_faults(node: NodeProcess, files: PreloadFiles) -> subprocess.Popen[bytes]:
    with (node.directory.parent / f"{node.node_id}.log").open("ab") as log:
        node.process = subprocess.Popen(
            [sys.executable, "-m", "elastickv", "node", *node.arguments], stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **preload.environment([Preload.FIU], files)})
    return node.process


@pytest.mark.cluster
@pytest.mark.skipif(not fiu_is_installed(), reason="libfiu is not installed")
@pytest.mark.parametrize("call", ["posix/io/sync/fdatasync", "posix/io/rw/pwrite"])
async def test_a_disk_that_fails_ends_the_node_with_an_exit_code_of_its_own(
        one_member: Cluster, tmp_path: Path, call: str) -> None:
    node = one_member.nodes["n1"]
    files = PreloadFiles(tmp_path / "preload")
    files.prepare()
    process = start_with_faults(node, files)
    await one_member.ready("n1")
    preload.control_fiu(files, process.pid,
                        f"enable_random name={call},probability=1,failinfo={errno.EIO}")
    async with one_member.client(timeout_s=2.0) as client:
        with pytest.raises(ElasticKVError):
            await client.put(b"k", b"v")
    assert await one_member.exit_code("n1") == ExitCode.DISK_FAILED
    assert "Traceback" not in node.log
    last = node.log.splitlines()[-1]
    assert last.startswith("elastickv: the disk of the data directory failed: Input/output error")
    assert "Remedy: check the disk" in last


@pytest.mark.cluster
@pytest.mark.skipif(not preload.can_mount(), reason="mounting needs root")
async def test_a_node_on_a_full_disk_stops_in_order(tmp_path: Path) -> None:
    """One that wanted to write down whom it knows, too."""
    directory = tmp_path / "cluster" / "n1"
    cluster = Cluster(tmp_path / "cluster", size=1, extra=["--flush-interval-ms", "60000"])
    directory.mkdir()
    preload.mount_small_disk(directory, 256)
    node = cluster.nodes["n1"]
    try:
        await cluster.start()
        async with cluster.client() as client:
            await client.put(b"k", b"v")
        (directory / "contacts.json").unlink()
        preload.fill_disk(directory)
        assert node.kill(signal.SIGTERM) == ExitCode.OK
        assert "node stopped" in node.log
        preload.empty_disk(directory)
        await cluster.start()
        async with cluster.client() as client:
            assert (await client.get(b"k")).value == b"v"
    finally:
        cluster.stop()
        preload.keep_and_unmount(directory)


def test_a_full_disk_is_no_failed_disk() -> None:
    error = DiskFull("no space left")
    assert failure_of(error) is error
