"""Sidecars that are lost or damaged where no leader can be had: the store's copy is taken."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.client import Purpose
from elastickv.crypto.kek_file import FileKekProvider, write_kek_file
from elastickv.errors import ExitCode
from elastickv.keys.sidecar import RELATIVE_PATH
from jepsen.disk_audit import NodeDisk, audit_nonces
from tests.cluster.cluster import Cluster
from tests.keys_process.doctor_shell import doctor, refused_start

pytestmark = [pytest.mark.cluster]

RESTORED = "sidecar restored from the store"


def lost(path: Path) -> None:
    path.unlink()


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flipped(path: Path) -> None:
    """The file parses, and one of its keys does not open any more."""
    before, field, after = path.read_bytes().partition(b'"wrapped": "')
    path.write_bytes(before + field + (b"B" if after[:1] == b"A" else b"A") + after[1:])


def require_distinct_nonces(cluster: Cluster) -> None:
    disks = [NodeDisk(name, node.directory) for name, node in cluster.nodes.items()]
    verdict = audit_nonces(disks, [], FileKekProvider(cluster.directory / "kek").load())
    assert verdict.is_valid, verdict


@pytest.mark.parametrize("how", [lost, damaged, flipped], ids=lambda how: how.__name__)
async def test_one_member(tmp_path: Path, how: Callable[[Path], None]) -> None:
    cluster = Cluster(tmp_path / "cluster", size=1)
    node = cluster.nodes["n1"]
    try:
        await cluster.start()
        await cluster.encrypt()
        async with cluster.client() as client:
            await client.put(b"k", b"0")
        node.kill(signal.SIGTERM)
        for number in range(1, 4):  # killed, so that the store is behind the log from now on
            how(node.directory / RELATIVE_PATH)
            code, verdicts = await asyncio.to_thread(doctor, node.arguments)
            assert code == ExitCode.ERROR
            failed = next(row for row in verdicts.values() if row["result"] == "fail")
            assert "start the node" in failed["remedy"]
            await cluster.start()
            assert node.log.count(RESTORED) == number
            async with cluster.client() as client:
                assert (await client.get(b"k")).value == b"%d" % (number - 1)
                await client.put(b"k", b"%d" % number)
                await client.encryption.rotate_dek(Purpose.STORAGE)
                await client.put(b"other", b"v")
            node.kill(signal.SIGKILL)
        await cluster.start()
        async with cluster.client() as client:
            assert (await client.get(b"k")).value == b"3"
        node.kill(signal.SIGTERM)
        require_distinct_nonces(cluster)
    finally:
        cluster.stop()


async def test_one_member_with_another_kek_refuses(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", size=1)
    node = cluster.nodes["n1"]
    try:
        await cluster.start()
        await cluster.encrypt()
        node.kill(signal.SIGTERM)
        lost(node.directory / RELATIVE_PATH)
        (cluster.directory / "kek").unlink()
        write_kek_file(cluster.directory / "kek")
        code, errors = await asyncio.to_thread(refused_start, node)
        assert code == ExitCode.STARTUP_REFUSED
        assert "start-up guard kek-unwraps" in errors
        assert "Traceback" not in errors
        assert not (node.directory / RELATIVE_PATH).exists()
    finally:
        cluster.stop()


@pytest.mark.slow
async def test_a_majority(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        await cluster.start()
        await cluster.encrypt()
        async with cluster.client() as client:
            await client.put(b"k", b"v")
        for node in cluster.nodes.values():
            node.kill(signal.SIGTERM)
        for name in ("n1", "n2"):
            lost(cluster.nodes[name].directory / RELATIVE_PATH)
        await cluster.start()
        logs = [node.log for node in cluster.nodes.values()]
        assert sum(RESTORED in log for log in logs) >= 1
        assert all("sidecar restored" in log for log in logs[:2])
        async with cluster.client() as client:
            assert (await client.get(b"k")).value == b"v"
            await client.put(b"k", b"w")
        for node in cluster.nodes.values():
            node.kill(signal.SIGTERM)
        require_distinct_nonces(cluster)
    finally:
        cluster.stop()
