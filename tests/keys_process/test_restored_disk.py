"""A node whose disk is put back from an old copy never makes a nonce that it has made before.

Real processes. The node leads, is copied, leads on in two more processes, and goes back to the
copy; then every envelope on every disk and in every copy goes into one ledger.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from elastickv.client import Client
from elastickv.crypto.envelope import parse_envelope
from elastickv.crypto.kek_file import FileKekProvider
from elastickv.crypto.nonce import full_node_id, node_id16
from jepsen.disk_audit import NodeDisk, RecordFile, audit_nonces, build_keystore, load_sidecar
from jepsen.nonces import PayloadReader
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

WRITES = 60
RESTORED = "n1"


async def lead_and_write(cluster: Cluster, client: Client, round_name: str) -> None:
    """Make the node lead, so that it is the one that seals, and write the same keys again."""
    if await cluster.leader() != RESTORED:
        await client.raft.transfer_leadership(RESTORED, timeout_s=20)
    for number in range(WRITES):
        await client.put(b"key-%d" % number, f"{round_name}-{number}".encode())


async def confirmed_epochs(client: Client) -> dict[int, int]:
    """`{dek_id: epoch}` that the registry last saw from the node."""
    leader = await client.encryption.resync_sidecar(full_node_id(RESTORED))
    return dict(leader.writer_registry)


def epochs_on_disk(disks: list[NodeDisk], kek_path: Path) -> set[int]:
    """The epochs in the nonces that the node made, in any journal."""
    sidecars = [sidecar for disk in disks if (sidecar := load_sidecar(disk)) is not None]
    reader = PayloadReader(build_keystore(sidecars, FileKekProvider(kek_path).load()),
                           sidecars[0].raft_envelope_cutover_index)
    own = node_id16(full_node_id(RESTORED)).to_bytes(2, "big")
    return {int.from_bytes(envelope.nonce[2:4], "big")
            for disk in disks for path in (disk.directory / "raft").rglob("*.log")
            for record in RecordFile(path) if record.command[:1] == b"\0"
            for envelope in map(parse_envelope, reader.envelopes(
                record.index, record.term, record.command[1:]))
            if envelope.nonce[:2] == own}


async def test_no_nonce_is_made_twice_when_an_old_disk_comes_back(cluster: Cluster,
                                                                  tmp_path: Path) -> None:
    node = cluster.nodes[RESTORED]
    old, late = tmp_path / "old-copy", tmp_path / "late-copy"
    async with cluster.client() as client:
        await lead_and_write(cluster, client, "first")
        node.kill(signal.SIGTERM)
        shutil.copytree(node.directory, old)
        for name in ("second", "third"):
            await cluster.start(RESTORED)
            await lead_and_write(cluster, client, name)
            node.kill(signal.SIGKILL)
        before = await confirmed_epochs(client)
        node.directory.rename(late)
        shutil.copytree(old, node.directory)
        await cluster.start(RESTORED)
        await lead_and_write(cluster, client, "after")
        after = await confirmed_epochs(client)
        assert {dek_id for dek_id, epoch in before.items() if after[dek_id] <= epoch} == set()
        assert (await client.get(b"key-0")).value == b"after-0"
    for each in cluster.nodes.values():
        each.kill(signal.SIGTERM)

    disks = [NodeDisk(name, each.directory) for name, each in cluster.nodes.items()]
    disks += [NodeDisk("old copy", old), NodeDisk("late copy", late)]
    kek = cluster.directory / "kek"
    verdict = audit_nonces(disks, [], FileKekProvider(kek).load())
    assert verdict.is_valid, verdict
    # Four processes of the node have sealed, each in an epoch of its own.
    assert len(epochs_on_disk(disks, kek)) == 4
