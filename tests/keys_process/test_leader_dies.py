"""The leader is killed in the middle of a key change under load: every node ends in one clear
state, and no acknowledged write is lost."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from elastickv.client import Client, Purpose, SidecarState
from elastickv.errors import ElasticKVError, Outcome
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Change = Callable[[Client], Awaitable[object]]


async def storage_cutover(client: Client) -> object:
    return await client.encryption.enable_storage_envelope(timeout_s=15)


async def raft_cutover(client: Client) -> object:
    return await client.encryption.enable_raft_envelope(timeout_s=15)


async def rotate_storage(client: Client) -> object:
    return await client.encryption.rotate_dek(Purpose.STORAGE, timeout_s=15)


async def rotate_raft(client: Client) -> object:
    return await client.encryption.rotate_dek(Purpose.RAFT, timeout_s=15)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "cluster")
    try:
        await cluster.start()
        async with cluster.client() as client:
            await client.encryption.bootstrap()
        yield cluster
    finally:
        cluster.stop()


class Writers:
    """Concurrent writers, each of its own keys; what was acknowledged."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.acknowledged: dict[bytes, bytes] = {}
        self.stopping = False

    async def run(self, name: int) -> None:
        number = 0
        while not self.stopping:
            key = b"%d-%d" % (name, number)
            number += 1
            try:
                await self.client.put(key, b"value " + key, timeout_s=10)
            except ElasticKVError as error:
                if error.outcome is Outcome.NOT_APPLIED:
                    await asyncio.sleep(0.01)
            else:
                self.acknowledged[key] = b"value " + key

    async def more(self, count: int) -> None:
        """Wait until `count` more writes are acknowledged."""
        wanted = len(self.acknowledged) + count
        async with asyncio.timeout(60):
            while len(self.acknowledged) < wanted:
                await asyncio.sleep(0.01)


def replicated(state: SidecarState) -> tuple[object, ...]:
    """What every member must agree on."""
    return (state.active_storage_id, state.active_raft_id, state.storage_envelope_active,
            state.storage_envelope_cutover_index, state.raft_envelope_cutover_index,
            dict(state.wrapped_deks_by_id))


async def agreed_state(cluster: Cluster) -> tuple[object, ...]:
    """The key state that all members have once they have applied the same entries."""
    states = []
    for name in cluster.nodes:
        await cluster.ready(name)
        async with cluster.client(name) as client:
            states.append(replicated(await client.encryption.sidecar_state()))
    assert states.count(states[0]) == len(states)
    return states[0]


CUTOVER_INDEX = {storage_cutover: 3, raft_cutover: 4}
"""Where a cutover's index stands in `replicated`."""


@pytest.mark.parametrize("pause_s", [0.005], ids=["5 ms"])
@pytest.mark.parametrize("change", [raft_cutover, rotate_raft, storage_cutover],
                         ids=lambda change: change.__name__)
async def test_the_leader_dies_during(cluster: Cluster, change: Change, pause_s: float) -> None:
    async with cluster.client() as client:
        if change is not storage_cutover:
            await storage_cutover(client)
        if change is rotate_raft:
            await raft_cutover(client)
        writers = Writers(client)
        tasks = [asyncio.create_task(writers.run(name)) for name in range(8)]
        await writers.more(100)
        leader = await cluster.leader()
        attempt = asyncio.create_task(change(client))
        await asyncio.sleep(pause_s)  # not for a condition: the moment of the kill is what varies
        cluster.nodes[leader].kill(signal.SIGKILL)
        with contextlib.suppress(ElasticKVError):
            await attempt
        await writers.more(50)
        await cluster.start(leader)
        await writers.more(50)
        before = await agreed_state(cluster)
        # Before or after, never between: what was done is reported, what was not is done now.
        await change(client)
        after = await agreed_state(cluster)
        if change is not rotate_raft:
            done = CUTOVER_INDEX[change]
            assert after[done] != 0
            assert before[done] in (0, after[done])
        await writers.more(50)
        writers.stopping = True
        await asyncio.gather(*tasks)
        for name in cluster.nodes:
            async with cluster.client(name) as reader:
                pairs = {pair.key: pair.value
                         async for page in reader.scan_pages() for pair in page}
                missing = {key for key, value in writers.acknowledged.items()
                           if pairs.get(key) != value}
                assert missing == set()
    for node in cluster.nodes.values():
        assert node.process is not None and node.process.poll() is None


async def test_a_member_that_was_down_catches_up_with_every_rotation(cluster: Cluster) -> None:
    async with cluster.client("n1", "n2", "n3") as client:
        await storage_cutover(client)
        await raft_cutover(client)
        leader = await cluster.leader()
        down = next(name for name in cluster.nodes if name != leader)
        cluster.nodes[down].kill(signal.SIGKILL)
        others = [name for name in cluster.nodes if name != down]
        async with cluster.client(*others) as rest:
            for number in range(3):
                await rotate_storage(rest)
                await rotate_raft(rest)
                await rest.put(b"key-%d" % number, b"value")
        await cluster.start(down)
        await agreed_state(cluster)
        async with cluster.client(down) as late:
            for number in range(3):
                assert (await late.get(b"key-%d" % number)).value == b"value"
            assert len((await late.encryption.sidecar_state()).wrapped_deks_by_id) == 8
