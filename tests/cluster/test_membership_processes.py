"""Members come and go in an encrypted cluster of real processes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elastickv.client import Client
from elastickv.client.model import RaftMember
from elastickv.crypto.nonce import full_node_id, node_id16
from elastickv.errors import (
    ConditionFailed,
    ExitCode,
    InvalidArgument,
    MembershipConflict,
    NotCapable,
)
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MARK = b"plaintext-that-must-never-rest-on-a-disk-"
COMPACTING = ["--snapshot-entries", "20", "--snapshot-log-bytes", str(1 << 20)]
VALUE_BYTES = 16 << 10
KEYS = 200


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "cluster", extra=COMPACTING)
    try:
        await cluster.start()
        await cluster.encrypt()
        yield cluster
    finally:
        cluster.stop()


async def fill(client: Client, seed: int) -> dict[bytes, bytes]:
    """More entries than the log may keep: one after the other, so that none share an entry."""
    generator = random.Random(seed)
    data = {b"key-%04d" % number: MARK + generator.randbytes(VALUE_BYTES)
            for number in range(KEYS)}
    for key, value in data.items():
        await client.put(key, value)
    return data


async def holds(client: Client, data: dict[bytes, bytes]) -> None:
    for key, value in data.items():
        assert (await client.get(key)).value == value


async def compacted(cluster: Cluster, name: str) -> None:
    """Wait until the log of `name` no longer begins at its beginning."""
    async with asyncio.timeout(30), cluster.client(name) as client:
        while (await client.raft.status()).last_snapshot_index < 20:
            await asyncio.sleep(0.1)


async def members(client: Client) -> dict[str, RaftMember]:
    return {member.node_id: member for member in await client.raft.members()}


async def test_a_newcomer_catches_up_by_snapshot_and_takes_over_from_the_old_leader(
        cluster: Cluster) -> None:
    old_leader = await cluster.leader()
    follower = next(name for name in cluster.nodes if name != old_leader)
    async with cluster.client() as client:
        data = await fill(client, 4)
    await compacted(cluster, old_leader)

    newcomer = cluster.newcomer("n4", follower)
    newcomer.start()
    await cluster.logged("n4", "waiting to be added")
    async with cluster.client(follower) as client:
        index = await client.raft.add_learner("n4", newcomer.raft_address)
        with pytest.raises(ConditionFailed, match=str(index)):
            await client.raft.promote_learner("n4", previous_index=index - 1)
        with pytest.raises(MembershipConflict, match="n4 has applied entry"):
            await client.raft.promote_learner("n4", min_applied_index=1 << 40)
        assert (await members(client))["n4"].suffrage == "learner"
    await cluster.ready("n4")
    async with cluster.client("n4") as client:
        await holds(client, data)
        assert await client.raft.promote_learner("n4", previous_index=index) > index
        assert {m.suffrage for m in (await members(client)).values()} == {"voter"}
    assert "snapshot installed" in newcomer.log
    store = newcomer.directory / "store"
    async with asyncio.timeout(30):
        while list(store.glob("gen-00000001*")):  # what it began with, deleted beside the loop
            await asyncio.sleep(0.1)
    assert [path.name for path in store.glob("*.mdb")] == ["gen-00000002.mdb"]

    async with cluster.client("n4") as client:
        await client.raft.transfer_leadership(old_leader)  # a request for what is so already
        await client.raft.remove_server(old_leader)
        assert await cluster.exit_code(old_leader) == ExitCode.REMOVED
        assert old_leader not in await members(client)
        removed = cluster.nodes.pop(old_leader)
        await client.raft.transfer_leadership("n4")
        assert await cluster.leader() == "n4"
        await client.put(b"after", MARK)
    assert f"removed member {old_leader} from the cluster" in removed.log
    assert "Traceback" not in removed.log

    # A removed node that is started again ends in the same way, whatever its flags say.
    cluster.nodes[old_leader] = removed
    removed.start()
    assert await cluster.exit_code(old_leader) == ExitCode.REMOVED
    del cluster.nodes[old_leader]

    # The membership is in the log and in the newcomer's own files by now: --raftJoin is ignored.
    for node in cluster.nodes.values():
        node.kill(signal.SIGKILL)
    await cluster.start()
    for name in cluster.nodes:
        async with cluster.client(name) as client:
            await holds(client, {**data, b"after": MARK})
            assert set(await members(client)) == set(cluster.nodes)
    assert cluster.holds_bytes(MARK) == []


async def test_a_node_that_may_not_join_is_refused_and_nothing_changes(cluster: Cluster) -> None:
    async with cluster.client("n2") as client:
        before = await client.raft.members()
        status = await client.raft.status()

        plain = cluster.newcomer("n5", "n1", kek="")
        plain.start()
        await cluster.logged("n5", "waiting to be added")
        with pytest.raises(NotCapable, match=r"n5 runs without a KEK.*--encryption-enabled"):
            await client.raft.add_voter("n5", plain.raft_address)

        foreign = cluster.newcomer("n6", "n1", kek="another-kek")
        foreign.start()
        await cluster.logged("n6", "waiting to be added")
        with pytest.raises(NotCapable, match=r"KEK of n6 does not open.*start n6 with the KEK"):
            await client.raft.add_learner("n6", foreign.raft_address)

        with pytest.raises(NotCapable, match=r"n7 at 127\.0\.0\.1:9 does not answer.*--raftJoin"):
            await client.raft.add_voter("n7", "127.0.0.1:9", timeout_s=15)

        with pytest.raises(NotCapable, match=f"n6 is reached by members at "
                                             f"{foreign.raft_address}, not at localhost"):
            await client.raft.add_voter(
                "n6", foreign.raft_address.replace("127.0.0.1", "localhost"))

        twin = next(name for name in (f"twin-{number}" for number in range(1 << 20))
                    if node_id16(full_node_id(name)) == node_id16(full_node_id("n3")))
        with pytest.raises(MembershipConflict, match=f"{twin} has the 16-bit node id .* of member "
                                                     "n3.*another --raftId"):
            await client.raft.add_voter(twin, "127.0.0.1:9")

        with pytest.raises(InvalidArgument, match=r"n3.*a member already"):
            await client.raft.add_voter("n3", "127.0.0.1:9")

        assert await client.raft.members() == before
        assert (await client.raft.status()).configuration_index == status.configuration_index


async def test_a_node_without_a_cluster_does_not_start(cluster: Cluster) -> None:
    stray = cluster.newcomer("n4", "n1")
    at = stray.arguments.index("--raftJoin")
    stray.arguments[at:at + 2] = []
    stray.start()
    assert await cluster.exit_code("n4") == ExitCode.STARTUP_REFUSED
    assert "--raftJoin to join one" in stray.log
    assert "Traceback" not in stray.log


async def test_a_newcomer_dials_nobody_wrong_and_is_dialled_by_the_leader(
        cluster: Cluster) -> None:
    """It was told of one member, which is down: the leader has to reach it by itself."""
    leader = await cluster.leader()
    down = next(name for name in cluster.nodes if name != leader)
    newcomer = cluster.newcomer("n4", down)
    newcomer.start()
    await cluster.logged("n4", "waiting to be added")
    cluster.nodes[down].kill(signal.SIGKILL)
    async with cluster.client(leader) as client:
        await client.put(b"k", MARK)
        await client.raft.add_voter("n4", newcomer.raft_address, timeout_s=15)
    await cluster.ready("n4")
    async with cluster.client("n4") as client:
        assert (await client.get(b"k")).value == MARK
