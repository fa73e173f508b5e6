"""Three real processes: encryption, rotation under load, crashes of one and of all."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elastickv.client import Client, Purpose
from elastickv.clock import MAX_TIMESTAMP
from elastickv.crypto.envelope import parse_envelope
from elastickv.errors import ElasticKVError, Outcome
from elastickv.store.header import HEADER_BYTES
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc_store import Store
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MARK = b"plaintext-that-must-never-rest-on-a-disk-"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "cluster")
    try:
        await cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Load:
    """Writers that remember what was acknowledged and what may have happened.

    Each key has one writer, so that the last acknowledged value and the doubtful ones after it are
    all that a read may find.
    """

    def __init__(self, client: Client, keys: int) -> None:
        self._client = client
        self._keys = [b"load-%04d" % number for number in range(keys)]
        self.allowed: dict[bytes, set[bytes]] = {key: {b""} for key in self._keys}
        self.acknowledged = 0
        self.failed = 0
        self._stopping = False

    async def run(self) -> None:
        await asyncio.gather(*(self._write(key) for key in self._keys))

    def stop(self) -> None:
        self._stopping = True

    async def _write(self, key: bytes) -> None:
        for number in itertools.count():
            if self._stopping:
                return
            value = MARK + key + b"-%d" % number
            try:
                await self._client.put(key, value)
            except ElasticKVError as error:
                self.failed += 1
                if error.outcome is Outcome.UNKNOWN:
                    self.allowed[key].add(value)
                await asyncio.sleep(0.01)
            else:
                self.acknowledged += 1
                self.allowed[key] = {value}

    async def wait_for(self, count: int) -> None:
        target = self.acknowledged + count
        async with asyncio.timeout(60):
            while self.acknowledged < target:
                await asyncio.sleep(0.01)

    async def check(self, client: Client) -> None:
        for key, allowed in self.allowed.items():
            found = await client.get(key)
            assert found.value in allowed, f"{key!r} lost an acknowledged write"


def stored_key_id(store: Store, key: bytes) -> int:
    """The DEK under which the store holds the latest version of `key`."""
    version = store.get(key, MAX_TIMESTAMP, 0)
    assert version is not None
    return parse_envelope(version.record[HEADER_BYTES:]).key_id


async def test_the_whole_life_of_an_encrypted_cluster(cluster: Cluster) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    await cluster.encrypt()
    leader = await cluster.leader()
    follower = generator.choice([name for name in cluster.nodes if name != leader])

    async with cluster.client(follower) as client:
        keys = [b"key-%04d" % number for number in range(1000)]
        for start in range(0, len(keys), 50):
            await asyncio.gather(*(client.put(key, MARK + key) for key in keys[start:start + 50]))
    async with cluster.client() as client:
        before = await client.encryption.sidecar_state()
        load = Load(client, keys=8)
        running = asyncio.create_task(load.run())
        await load.wait_for(50)
        await client.encryption.rotate_dek(Purpose.STORAGE)
        await load.wait_for(50)
        await client.encryption.rotate_dek(Purpose.RAFT)
        await load.wait_for(50)
        after = await client.encryption.sidecar_state()
        assert after.active_storage_id != before.active_storage_id
        assert after.active_raft_id != before.active_raft_id

        killed = await cluster.leader()
        cluster.nodes[killed].kill(signal.SIGKILL)
        await load.wait_for(50)
        await cluster.start(killed)
        await load.wait_for(50)
        load.stop()
        await running

    for node in cluster.nodes.values():
        node.kill(signal.SIGKILL)
    await cluster.start()

    async with cluster.client() as client:
        await client.put(b"fresh", MARK)
    for name in cluster.nodes:
        async with cluster.client(name) as client:
            await load.check(client)
            pairs = await client.scan(b"key-", b"key.", limit=2000)
            assert [(pair.key, pair.value) for pair in pairs] == [
                (key, MARK + key) for key in keys]
            state = await client.encryption.sidecar_state()
            assert state.active_storage_id == after.active_storage_id
    for name, node in cluster.nodes.items():
        node.kill(signal.SIGTERM)
        store = Store.open(LmdbBackend(node.directory / "store"))
        try:
            assert {stored_key_id(store, key) for key in keys} == {before.active_storage_id}
            assert stored_key_id(store, b"fresh") == after.active_storage_id, name
        finally:
            store.close()
    assert cluster.holds_bytes(MARK) == []


async def test_a_read_on_any_node_sees_every_write_acknowledged_before_it(
        cluster: Cluster) -> None:
    async with cluster.client("n1") as one, cluster.client("n2") as two, \
            cluster.client("n3") as three:
        clients = [one, two, three]
        for number in range(100):
            writer, reader = clients[number % 3], clients[(number + 1) % 3]
            await writer.put(b"counter", b"%d" % number)
            assert (await reader.get(b"counter")).value == b"%d" % number


async def test_a_write_that_comes_before_any_leader_is_known_is_done_once_there_is_one(
        tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", encryption=False)
    clients = [cluster.client(name, timeout_s=20) for name in cluster.nodes]
    try:
        for node in cluster.nodes.values():
            node.start()
        await asyncio.gather(*(client.put(b"from-%d" % number, b"v")
                               for number, client in enumerate(clients)))
    finally:
        for client in clients:
            await client.close()
        cluster.stop()


async def test_sigterm_drains_and_exits_zero(cluster: Cluster) -> None:
    async with cluster.client("n2", "n3") as client:
        await client.put(b"k", b"v")
        assert cluster.nodes["n1"].kill(signal.SIGTERM) == 0
        assert (await client.get(b"k")).value == b"v"


async def test_random_bytes_end_the_connection_and_nothing_else(cluster: Cluster) -> None:
    generator = random.Random(7)
    for name in cluster.nodes:
        for address in (cluster.nodes[name].address, cluster.nodes[name].raft_address):
            host, _, port = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(generator.randbytes(4096))
            async with asyncio.timeout(20):
                while await reader.read(1 << 16):
                    pass
            writer.close()
    async with cluster.client() as client:
        await client.put(b"k", b"v")
        for node in cluster.nodes.values():
            assert node.process is not None and node.process.poll() is None
