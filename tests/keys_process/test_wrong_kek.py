"""One node with another KEK: it refuses to start, or stops at the entry that it cannot unwrap; the
others go on, and with the right KEK it goes on from the same index."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elastickv.client import Writer
from elastickv.crypto.kek_file import FileKekProvider, write_kek_file
from elastickv.crypto.nonce import full_node_id
from elastickv.errors import ElasticKVError, ExitCode
from elastickv.keys.sidecar import RELATIVE_PATH
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc_store import Store
from tests.cluster.cluster import Cluster, NodeProcess
from tests.keys_process.doctor_shell import refused_start

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

VICTIM = "n3"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "cluster")
    try:
        yield cluster
    finally:
        cluster.stop()


def with_other_kek(cluster: Cluster) -> list[str]:
    """The victim's arguments, with a KEK that is not the cluster's."""
    other = cluster.directory / "other-kek"
    write_kek_file(other)
    arguments = [*cluster.nodes[VICTIM].arguments]
    arguments[arguments.index("--kekFile") + 1] = str(other)
    return arguments


def applied_index(node: NodeProcess) -> int:
    store = Store.open(LmdbBackend(node.directory / "store"))
    try:
        return store.applied_index
    finally:
        store.close()


async def test_a_node_with_the_wrong_kek_refuses_to_start(cluster: Cluster) -> None:
    await cluster.start()
    await cluster.encrypt()
    node = cluster.nodes[VICTIM]
    node.kill(signal.SIGTERM)
    sidecar = (node.directory / RELATIVE_PATH).read_bytes()
    code, errors = refused_start(node, with_other_kek(cluster))
    assert code == ExitCode.STARTUP_REFUSED
    assert "start-up guard kek-unwraps" in errors
    assert (node.directory / RELATIVE_PATH).read_bytes() == sidecar
    async with cluster.client("n1", "n2") as client:
        await client.put(b"k", b"v")
    await cluster.start(VICTIM)
    async with cluster.client(VICTIM) as client:
        assert (await client.get(b"k")).value == b"v"


async def bootstrap_without_the_victim(cluster: Cluster) -> None:
    """With operator-made keys: the leader's own bootstrap asks every member first."""
    kek = FileKekProvider(cluster.directory / "kek").load()
    async with cluster.client("n1", "n2") as client:
        await client.encryption.bootstrap(
            wrapped_storage=kek.generate_wrapped_dek(), wrapped_raft=kek.generate_wrapped_dek(),
            storage_dek_id=11, raft_dek_id=22,
            writers=[Writer(full_node_id(name), 0) for name in cluster.nodes])
        await client.put(b"k", b"v")


async def test_a_node_that_cannot_unwrap_an_entry_halts_there_and_resumes_with_the_right_kek(
        cluster: Cluster) -> None:
    await cluster.start("n1", "n2")
    async with cluster.client("n1", "n2") as client:
        for number in range(20):
            await client.put(b"%d" % number, b"before")
    await bootstrap_without_the_victim(cluster)

    node = cluster.nodes[VICTIM]
    code, errors = refused_start(node, with_other_kek(cluster))
    assert code == ExitCode.APPLY_HALTED, errors
    assert "does not unwrap" in errors
    assert "Remedy:" in errors
    halted_at = applied_index(node)
    assert not (node.directory / RELATIVE_PATH).exists()

    code, errors = refused_start(node, with_other_kek_again(cluster))
    assert code == ExitCode.APPLY_HALTED, errors
    assert applied_index(node) == halted_at

    async with cluster.client("n1", "n2") as client:
        await client.put(b"k", b"w")
    await cluster.start(VICTIM)
    async with cluster.client(VICTIM) as client:
        assert (await client.get(b"k")).value == b"w"
        assert (await client.get(b"7")).value == b"before"
        state = await client.encryption.sidecar_state()
        assert (state.active_storage_id, state.active_raft_id) == (11, 22)


def with_other_kek_again(cluster: Cluster) -> list[str]:
    (cluster.directory / "other-kek").unlink()
    return with_other_kek(cluster)


async def test_the_leader_finds_a_wrong_kek_before_it_harms_anybody(cluster: Cluster) -> None:
    node = cluster.nodes[VICTIM]
    right = node.arguments
    node.arguments = with_other_kek(cluster)
    await cluster.start()
    async with cluster.client() as client:
        with pytest.raises(ElasticKVError, match="unwrap"):
            await client.encryption.bootstrap()
        await client.put(b"k", b"v")
    for each in cluster.nodes.values():
        assert each.process is not None and each.process.poll() is None
    node.kill(signal.SIGTERM)
    node.arguments = right
    await cluster.start(VICTIM)
    await cluster.encrypt()
