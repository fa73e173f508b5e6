"""A sidecar that is an old copy, damaged or lost is restored from the leader: by the node itself
when a leader answers, by the printed command when none does."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.client import Purpose
from elastickv.contacts import FILE_NAME
from elastickv.data_directory import program
from elastickv.durable import OsDisk
from elastickv.errors import ExitCode
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar
from tests.cluster.cluster import Cluster, NodeProcess
from tests.keys_process.doctor_shell import BOUND_BY_MODES, doctor, elastickv, refused_start

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

VICTIM = "n3"


def sidecar_of(node: NodeProcess) -> Sidecar:
    found = sidecar_file.load(OsDisk(), node.directory / RELATIVE_PATH)
    assert found is not None
    return found


def old_copy(path: Path, copy: bytes) -> None:
    path.write_bytes(copy)


def damaged(path: Path, copy: bytes) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def lost(path: Path, copy: bytes) -> None:
    path.unlink()


def flipped(path: Path, copy: bytes) -> None:
    """A bit of a wrapped key: the file parses, and one of its keys does not open any more."""
    before, field, after = path.read_bytes().partition(b'"wrapped": "')
    path.write_bytes(before + field + (b"B" if after[:1] == b"A" else b"A") + after[1:])


async def spoil(cluster: Cluster, how: Callable[[Path, bytes], None]) -> Sidecar:
    """Rotate, stop the victim, and spoil its sidecar; what it was just before."""
    node = cluster.nodes[VICTIM]
    path = node.directory / RELATIVE_PATH
    copy = path.read_bytes()
    async with cluster.client() as client:
        await client.encryption.rotate_dek(Purpose.STORAGE)
        await client.encryption.rotate_dek(Purpose.RAFT)
        await client.put(b"k", b"v")
    await cluster.ready(VICTIM)
    assert node.kill(signal.SIGTERM) == 0
    good = sidecar_of(node)
    assert len(good.keys) == 4
    how(path, copy)
    return good


@pytest.mark.parametrize("how", [old_copy, damaged, lost, flipped], ids=lambda how: how.__name__)
async def test_a_node_takes_the_keys_over_from_the_leader_at_its_start(
        cluster: Cluster, how: Callable[[Path, bytes], None]) -> None:
    good = await spoil(cluster, how)
    node = cluster.nodes[VICTIM]
    await cluster.start(VICTIM)
    assert "sidecar restored from the leader" in node.log
    async with cluster.client(VICTIM) as client:
        assert (await client.get(b"k")).value == b"v"
        await client.raft.transfer_leadership(VICTIM, timeout_s=20)
        await client.put(b"k", b"w")
    assert node.kill(signal.SIGTERM) == 0
    restored = sidecar_of(node)
    assert restored.keys.keys() == good.keys.keys()
    assert restored.raft_envelope_cutover_index == good.raft_envelope_cutover_index
    assert restored.storage_envelope_cutover_index == good.storage_envelope_cutover_index
    for dek_id in (good.active_storage, good.active_raft):
        assert restored.keys[dek_id].local_epoch > good.keys[dek_id].local_epoch
    code, _ = doctor(node.arguments)
    assert code == ExitCode.OK


async def test_without_a_leader_it_refuses_and_the_printed_command_repairs_it(
        cluster: Cluster) -> None:
    await spoil(cluster, old_copy)
    node = cluster.nodes[VICTIM]
    spoilt = sidecar_of(node)
    others = [name for name in cluster.nodes if name != VICTIM]
    for name in others:
        cluster.nodes[name].kill(signal.SIGKILL)
    code, errors = refused_start(node)
    assert code == ExitCode.STARTUP_REFUSED, errors
    assert sidecar_of(node) == spoilt
    command = re.search(
        re.escape(program()) + r" (admin encryption resync-sidecar [^\n\"]*)", errors)
    assert command is not None, errors

    code, _, errors = elastickv(*shlex.split(command[1]), "--timeout", "2")
    assert code == ExitCode.UNAVAILABLE, errors
    assert sidecar_of(node) == spoilt

    await cluster.start(*others)
    code, out, errors = elastickv(*shlex.split(command[1]))
    assert code == ExitCode.OK, errors
    assert "to index" in out
    await cluster.start(VICTIM)
    assert "sidecar restored" not in node.log.splitlines()[-1]
    async with cluster.client(VICTIM) as client:
        assert (await client.get(b"k")).value == b"v"


async def test_a_foreign_sidecar_is_neither_used_nor_overwritten(cluster: Cluster,
                                                                 tmp_path: Path) -> None:
    """Its node would seal what no other member can open, and stop them all."""
    other = Cluster(tmp_path / "other", size=1)
    shutil.copy2(cluster.directory / "kek", other.directory / "kek")
    try:
        await other.start()
        await other.encrypt()
        async with other.client() as client:
            for _ in range(20):
                await client.encryption.rotate_dek(Purpose.STORAGE)
    finally:
        other.stop()
    foreign = other.nodes["n1"].directory / RELATIVE_PATH
    node = cluster.nodes[VICTIM]
    path = node.directory / RELATIVE_PATH
    assert node.kill(signal.SIGTERM) == 0
    shutil.copy2(foreign, path)
    code, errors = refused_start(node)
    assert code == ExitCode.STARTUP_REFUSED, errors
    assert "start-up guard sidecar-foreign" in errors
    assert path.read_bytes() == foreign.read_bytes()
    path.unlink()
    await cluster.start(VICTIM)
    assert "sidecar restored from the leader" in node.log


async def test_the_command_refuses_a_node_that_runs(cluster: Cluster) -> None:
    node = cluster.nodes[VICTIM]
    code, _, errors = elastickv(
        "admin", "encryption", "resync-sidecar", "--raftId", VICTIM, "--raftDataDir",
        str(node.directory), "--kekFile", str(cluster.directory / "kek"), "--endpoints",
        ",".join(cluster.endpoints), "--insecure")
    assert code == ExitCode.STARTUP_REFUSED
    assert "stop that node" in errors


@pytest.mark.parametrize(("raft_id", "directory", "words"), [
    ("n2", "n3", "is that of member n3"), ("n9", "n3", "is that of member n3"),
    ("n3", "elsewhere", "holds no node's data")])
async def test_the_command_writes_into_no_other_directory(
        cluster: Cluster, raft_id: str, directory: str, words: str) -> None:
    assert cluster.nodes[VICTIM].kill(signal.SIGTERM) == 0
    target = cluster.nodes[VICTIM].directory.parent / directory
    target.mkdir(exist_ok=True)
    before = {path: path.read_bytes() for path in target.rglob("keys.json")}
    code, _, errors = elastickv(
        "admin", "encryption", "resync-sidecar", "--raftId", raft_id, "--raftDataDir",
        str(target), "--kekFile", str(cluster.directory / "kek"), "--endpoints",
        ",".join(cluster.endpoints), "--insecure")
    assert code == ExitCode.USAGE
    assert words in errors
    assert {path: path.read_bytes() for path in target.rglob("keys.json")} == before


async def test_a_node_that_knows_nobody_names_the_command(cluster: Cluster) -> None:
    await spoil(cluster, old_copy)
    node = cluster.nodes[VICTIM]
    (node.directory / FILE_NAME).unlink()
    code, errors = refused_start(node)
    assert code == ExitCode.STARTUP_REFUSED
    assert "no other member is known" in errors
    assert "resync-sidecar --raftId n3" in errors


async def test_a_node_that_asks_for_its_keys_heeds_a_stop(cluster: Cluster) -> None:
    await spoil(cluster, lost)
    for name in [name for name in cluster.nodes if name != VICTIM]:
        cluster.nodes[name].kill(signal.SIGKILL)
    node = cluster.nodes[VICTIM]
    node.start()
    await cluster.logged(VICTIM, "asking the leader for the key state")
    assert node.kill(signal.SIGTERM) == ExitCode.OK
    assert "start-up guard" not in node.log


def arguments_of_the_command(cluster: Cluster) -> list[str]:
    return ["admin", "encryption", "resync-sidecar", "--raftId", VICTIM, "--raftDataDir",
            str(cluster.nodes[VICTIM].directory), "--kekFile", str(cluster.directory / "kek"),
            "--endpoints", ",".join(cluster.endpoints), "--insecure"]


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
async def test_the_command_refuses_to_write_what_the_nodes_user_could_not_read(
        cluster: Cluster) -> None:
    """As with sudo: the sidecar would be root's, readable by its owner only."""
    await spoil(cluster, lost)
    node = cluster.nodes[VICTIM]
    for path in (node.directory, *node.directory.rglob("*")):
        os.chown(path, 1, 1)
    code, _, errors = elastickv(*arguments_of_the_command(cluster))
    assert code == ExitCode.STARTUP_REFUSED
    assert "sudo takes no ELASTICKV_ variable along" in errors
    assert f"sudo -u {pwd.getpwuid(1).pw_name} {program()} ..." in errors
    assert not (node.directory / RELATIVE_PATH).exists()


async def test_a_sidecar_that_the_node_may_not_read_is_no_traceback(cluster: Cluster) -> None:
    await cluster.ready(VICTIM)
    node = cluster.nodes[VICTIM]
    assert node.kill(signal.SIGTERM) == 0
    path = node.directory / RELATIVE_PATH
    path.chmod(0)
    for command in (["node", *node.arguments], arguments_of_the_command(cluster)):
        code, _, errors = elastickv(*command, launcher=BOUND_BY_MODES)
        assert code == ExitCode.STARTUP_REFUSED, errors
        assert f"{path} cannot be used: Permission denied" in errors
        assert "chown" in errors
        assert "Traceback" not in errors
