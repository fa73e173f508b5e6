"""Whole engines: three members, real TLS links and real journals on loopback."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from elastickv.errors import (
    ConditionFailed,
    ElasticKVError,
    InvalidArgument,
    NotLeader,
    OutcomeUnknown,
    PeerError,
    Unreachable,
)
from elastickv.raft.engine import Role

SECOND = 5.0


async def test_propose_resolves_to_what_apply_returned(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    assert await leader.engine.propose(b"payload", timeout_s=SECOND) == b"PAYLOAD"
    await cluster.applied_everywhere()
    assert all(node.machine.payloads() == [b"payload"] for node in cluster.nodes)


async def test_replicas_apply_the_same_entries_in_the_same_order(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    await asyncio.gather(*(leader.engine.propose(b"%d" % number, timeout_s=SECOND)
                           for number in range(300)))
    await cluster.applied_everywhere()
    first, *others = [node.machine.entries for node in cluster.nodes]
    assert all(entries == first for entries in others)
    assert sorted(entry.payload for entry in first if entry.payload) \
        == sorted(b"%d" % number for number in range(300))


async def test_leader_is_announced_only_when_it_may_serve(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    assert leader.roles[-1] == (Role.LEADER, leader.engine.status().term)
    status = leader.engine.status()
    assert status.applied_index >= 2
    assert leader.machine.entries[-1].term == status.term


async def test_single_member_cluster_works_and_restarts(make_cluster):
    cluster = make_cluster(1)
    await cluster.start()
    node = await cluster.leader()
    assert await node.engine.propose(b"one", timeout_s=SECOND) == b"ONE"
    assert await node.engine.read_index(timeout_s=SECOND) >= 3
    await node.engine.stop()
    await node.restart()
    await cluster.leader()
    assert await node.engine.propose(b"two", timeout_s=SECOND) == b"TWO"
    assert node.machine.payloads() == [b"one", b"two"]


async def test_read_index_covers_a_finished_write_on_every_member(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    for number in range(20):
        await leader.engine.propose(b"w%d" % number, timeout_s=SECOND)
        written = leader.engine.status().applied_index
        for node in cluster.nodes:
            index = await node.engine.read_index(timeout_s=SECOND)
            assert index >= written
            await node.engine.wait_applied(index, timeout_s=SECOND)
            assert node.machine.payloads()[-1] == b"w%d" % number


@contextlib.asynccontextmanager
async def cluster_without_heartbeats(make_cluster, until, **overrides):
    """A started cluster and its leader. Nothing but what the overrides say is sent by a timer."""
    cluster = make_cluster(**{"heartbeat_s": 100.0, "leader_fallback_s": 600.0,
                              "election_min_s": 600.0, "election_max_s": 900.0, **overrides})
    await cluster.start()
    # A member grants no vote before every voter has greeted it, and nobody would ask it again.
    await until(lambda: all(node.engine.status().peers == len(node.engine._connected)
                            for node in cluster.nodes))
    cluster.nodes[0].engine._core.elect_now()
    leader = await cluster.leader()
    try:
        yield cluster, leader
    finally:
        # The followers first: the leader would wait an election timeout for one to take over.
        for node in cluster.nodes:
            if node is not leader:
                await node.engine.stop()
        await until(lambda: not leader.engine._connected)
        await leader.engine.stop()


@pytest.mark.parametrize(("commit_delay_s", "proposed", "applied"), [
    pytest.param(600.0, [b"first", b"second"], [b"first"], id="with the next entries"),
    pytest.param(0.001, [b"last"], [b"last"], id="alone when none follow"),
])
async def test_how_followers_learn_of_a_commit_index(make_cluster, until, commit_delay_s, proposed,
                                                     applied):
    async with cluster_without_heartbeats(make_cluster, until, commit_delay_s=commit_delay_s) as (
            cluster, leader):
        for payload in proposed:
            await leader.engine.propose(payload, timeout_s=SECOND)
        for node in await cluster.followers():
            await until(lambda node=node: node.machine.payloads() == applied)


async def test_read_on_a_follower_does_not_wait_for_the_commit_index(make_cluster, until):
    async with cluster_without_heartbeats(make_cluster, until, commit_delay_s=600.0) as (
            cluster, leader):
        await leader.engine.propose(b"last", timeout_s=SECOND)
        for node in await cluster.followers():
            index = await node.engine.read_index(timeout_s=SECOND)
            await node.engine.wait_applied(index, timeout_s=SECOND)
            assert node.machine.payloads() == [b"last"]


async def test_follower_refuses_a_proposal_and_names_the_leader(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    await cluster.applied_everywhere()
    follower = (await cluster.followers())[0]
    with pytest.raises(NotLeader) as caught:
        await follower.engine.propose(b"x", timeout_s=SECOND)
    assert caught.value.leader_id == leader.member.node_id
    assert caught.value.leader_address == f"client-of-{leader.member.node_id}"


async def test_rejection_by_the_state_machine_reaches_the_proposer(make_cluster, monkeypatch):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    apply = leader.machine.apply
    monkeypatch.setattr(leader.machine, "apply", lambda entries: [
        ConditionFailed("the key changed") if entry.payload == b"cas" else result
        for entry, result in zip(entries, apply(entries), strict=True)])
    with pytest.raises(ConditionFailed, match="the key changed"):
        await leader.engine.propose(b"cas", timeout_s=SECOND)
    assert await leader.engine.propose(b"next", timeout_s=SECOND) == b"NEXT"


async def test_failing_apply_halts_the_node_and_nothing_later_is_applied(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    leader.machine.refuse[b"poison"] = ValueError("cannot")
    before = leader.machine.applied_index
    with pytest.raises(OutcomeUnknown):
        await leader.engine.propose(b"poison", timeout_s=SECOND)
    assert leader.machine.applied_index == before
    assert [type(error).__name__ for error in leader.fatal] == ["ApplyHalted"]
    with pytest.raises(ElasticKVError):
        await leader.engine.propose(b"later", timeout_s=SECOND)
    survivor = cluster.nodes[cluster.nodes.index(leader) - 1]
    cluster.nodes.remove(leader)
    try:
        new_leader = await cluster.leader()
        await new_leader.engine.propose(b"goes on", timeout_s=SECOND)
        await cluster.applied_everywhere()
        assert survivor.machine.payloads()[-1] == b"goes on"
    finally:
        cluster.nodes.append(leader)


async def test_entry_over_the_limit_is_refused_when_proposed(make_cluster):
    cluster = make_cluster(1, max_entry_bytes=1000)
    await cluster.start()
    leader = await cluster.leader()
    assert await leader.engine.propose(b"x" * 1000, timeout_s=SECOND)
    with pytest.raises(InvalidArgument, match="1000 bytes"):
        await leader.engine.propose(b"x" * 1001, timeout_s=SECOND)


async def test_large_entries_replicate(make_cluster):
    cluster = make_cluster(election_min_s=1.0, election_max_s=2.0, leader_fallback_s=4.0)
    await cluster.start()
    leader = await cluster.leader()
    payloads = [bytes([65 + number]) * (70_000 << number) for number in range(5)]
    await asyncio.gather(*(leader.engine.propose(payload, timeout_s=SECOND)
                           for payload in payloads))
    await cluster.applied_everywhere()
    assert all(node.machine.payloads() == payloads for node in cluster.nodes)


async def test_restarted_follower_catches_up_without_applying_twice(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    follower = (await cluster.followers())[0]
    await leader.engine.propose(b"before", timeout_s=SECOND)
    await follower.engine.stop()
    for number in range(50):
        await leader.engine.propose(b"during%d" % number, timeout_s=SECOND)
    await follower.restart()
    await cluster.applied_everywhere()
    assert follower.machine.entries == leader.machine.entries


async def test_all_restart_and_nothing_is_lost(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    for number in range(30):
        await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
    await cluster.applied_everywhere()
    await cluster.stop()
    for node in cluster.nodes:
        await node.restart()
    leader = await cluster.leader()
    await leader.engine.propose(b"after", timeout_s=SECOND)
    await cluster.applied_everywhere()
    expected = [b"%d" % number for number in range(30)] + [b"after"]
    assert all(node.machine.payloads() == expected for node in cluster.nodes)


async def test_stopping_the_leader_hands_over(make_cluster, until):
    cluster = make_cluster()
    await cluster.start()
    leader = await cluster.leader()
    await cluster.applied_everywhere()
    term = leader.engine.status().term
    await leader.engine.stop()
    others = [node for node in cluster.nodes if node is not leader]
    await until(lambda: any(node.engine.is_leader() for node in others))
    assert {node.engine.status().term for node in others} == {term + 1}


async def test_call_reaches_the_handler_of_a_peer_and_carries_typed_errors(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    await cluster.leader()
    first, second, third = cluster.nodes

    async def echo(peer_id: str, method: str, payload: bytes) -> bytes:
        return f"{peer_id}:{method}:".encode() + payload

    async def refuse(peer_id: str, method: str, payload: bytes) -> bytes:
        raise ConditionFailed("not so", remedy="do otherwise")

    async def crash(peer_id: str, method: str, payload: bytes) -> bytes:
        raise RuntimeError("secret detail")

    second.engine.handle("echo", echo)
    second.engine.handle("refuse", refuse)
    second.engine.handle("crash", crash)
    assert await first.engine.call("n2", "echo", b"hi", timeout_s=SECOND) == b"n1:echo:hi"
    assert await second.engine.call("n2", "echo", b"self", timeout_s=SECOND) == b"n2:echo:self"
    with pytest.raises(ConditionFailed) as refused:
        await third.engine.call("n2", "refuse", b"", timeout_s=SECOND)
    assert (refused.value.message, refused.value.remedy) == ("not so", "do otherwise")
    with pytest.raises(PeerError) as crashed:
        await third.engine.call("n2", "crash", b"", timeout_s=SECOND)
    assert "secret" not in str(crashed.value)
    with pytest.raises(PeerError, match="does not serve"):
        await first.engine.call("n2", "absent", b"", timeout_s=SECOND)
    with pytest.raises(Unreachable):
        await first.engine.call("n9", "echo", b"", timeout_s=SECOND)


async def test_call_ends_as_unknown_when_the_peer_dies_or_is_slow(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    await cluster.leader()
    first, second, _ = cluster.nodes
    entered = asyncio.Event()

    async def never(peer_id: str, method: str, payload: bytes) -> bytes:
        entered.set()
        await asyncio.Event().wait()
        return b""

    second.engine.handle("never", never)
    with pytest.raises(OutcomeUnknown):
        await first.engine.call("n2", "never", b"", timeout_s=0.05)
    entered.clear()
    call = asyncio.ensure_future(first.engine.call("n2", "never", b"", timeout_s=SECOND))
    await entered.wait()
    await second.engine.stop()
    with pytest.raises(OutcomeUnknown):
        await call


async def test_members_learn_each_others_client_addresses(make_cluster):
    cluster = make_cluster()
    await cluster.start()
    await cluster.leader()
    await cluster.applied_everywhere()
    for node in cluster.nodes:
        addresses = {m.node_id: m.client_address for m in node.engine.members()}
        known = {node_id for node_id, address in addresses.items()
                 if address == f"client-of-{node_id}"}
        assert {node.member.node_id, (await cluster.leader()).member.node_id} <= known
