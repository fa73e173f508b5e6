"""A sidecar that is lost and taken from the store: no epoch is ever used twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv import resync
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Purpose
from elastickv.durable import OsDisk
from elastickv.errors import EncryptionConflict, KekError
from elastickv.keys.sidecar import Sidecar, SidecarKey, parse
from elastickv.kv.fsm import META_SIDECAR
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store
from tests.kv.key_cluster import KEK_BYTES, TIMEOUT_S, KeyCluster, MakeCluster, Node, until

KEK = Kek(KEK_BYTES)


async def crash(node: Node) -> None:
    """End with what the log holds and without another flush of the store."""
    node.encryption.stop()
    await node.engine.stop()
    node.store.close()


def restore(cluster: KeyCluster, node_id: str) -> Sidecar:
    """Lose the sidecar, and take the store's copy."""
    directory = cluster.directory / node_id
    path = directory / "keys.json"
    path.unlink()
    store = Store.open(MemoryBackend(OsDisk(), directory / "store"))
    content = store.meta(META_SIDECAR)
    assert content is not None
    new = resync.take_stored(parse(content), node_id, KEK, OsDisk(), path, store.rows())
    store.close()
    return new


def confirmed(node: Node) -> dict[int, int]:
    """`{dek_id: epoch}` that this process makes nonces in."""
    return {dek_id: epoch for dek_id in node.sidecar.keys
            if (epoch := node.encryption.writers.epoch(dek_id)) is not None}


async def until_writer(cluster: KeyCluster, node: Node) -> None:
    await cluster.settled()


async def until_leader(cluster: KeyCluster, node: Node) -> None:
    """Its registrations may be in the log or not."""
    await until(node.engine.is_leader)


async def rotated(cluster: KeyCluster, node: Node) -> None:
    """The log has a key that the store's copy does not."""
    await cluster.settled()
    await node.rotate(Purpose.STORAGE)
    await node.rotate(Purpose.RAFT)


@pytest.mark.parametrize("before", [until_writer, until_leader, rotated],
                         ids=lambda before: before.__name__)
async def test_no_epoch_is_used_twice_when_the_node_crashes_before_a_flush(
        make_cluster: MakeCluster, before: Callable[..., object]) -> None:
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    await cluster.settled()
    await node.put(b"k", b"before")
    node.store.flush_now()
    used = set(confirmed(node).items())
    await crash(node)
    for _ in range(4):
        restore(cluster, "n1")
        node = cluster.make("n1")
        await node.start()
        await before(cluster, node)  # type: ignore[misc]
        if before is not until_leader:
            await node.put(b"k", b"after")
        epochs = set(confirmed(node).items())
        assert not epochs & used
        used |= epochs
        await crash(node)
    restore(cluster, "n1")
    node = cluster.make("n1")
    await node.start()
    await cluster.settled()
    assert not set(confirmed(node).items()) & used
    assert (await node.kv.get(b"k", timeout_s=TIMEOUT_S)).value == \
        (b"before" if before is until_leader else b"after")
    assert node.fatal == []


async def test_the_stores_copy_is_raised_to_what_its_registry_saw(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    await cluster.nodes["n1"].encrypt()
    for _ in range(3):
        await cluster.restart("n1")
        await cluster.settled()
    node = cluster.nodes["n1"]
    epochs = confirmed(node)
    await node.stop()
    restored = restore(cluster, "n1")
    assert {dek_id: restored.keys[dek_id].local_epoch for dek_id in epochs} == epochs
    node = cluster.make("n1")
    await node.start()
    await cluster.settled()


WRAPPED = KEK.generate_wrapped_dek()


@pytest.mark.parametrize(("kek", "wrapped", "error"), [
    (Kek(bytes(32)), KEK.generate_wrapped_dek(), KekError), (KEK, WRAPPED, EncryptionConflict)],
    ids=["another KEK", "one key under two ids"])
def test_a_copy_that_cannot_be_used_is_not_written(
        tmp_path: Path, kek: Kek, wrapped: bytes, error: type[Exception]) -> None:
    copy = Sidecar(active_storage=1, active_raft=2, keys={
        1: SidecarKey(Purpose.STORAGE, WRAPPED, ""), 2: SidecarKey(Purpose.RAFT, wrapped, "")})
    with pytest.raises(error):
        resync.take_stored(copy, "n1", kek, OsDisk(), tmp_path / "keys.json", [])
    assert not (tmp_path / "keys.json").exists()
