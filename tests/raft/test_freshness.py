"""elastickv.raft.freshness: when a member's state counts as having been complete."""

from __future__ import annotations

import asyncio

import pytest
from raft_lab import Lab, run

from elastickv.raft import frames
from elastickv.raft.engine import Role
from elastickv.raft.freshness import NEVER, Freshness, quorum_contact

Step = tuple[float, int, int]
"""A contact: when, what the leader had committed, what was applied here."""

CASES: dict[str, tuple[list[Step], int, float]] = {
    "never heard of a leader": ([], 0, NEVER),
    "applied everything at the contact": ([(1.0, 5, 5)], 5, 1.0),
    "ahead of what the contact told": ([(1.0, 5, 7)], 7, 1.0),
    "behind at the contact, not caught up": ([(1.0, 5, 3)], 4, NEVER),
    "behind at the contact, caught up since": ([(1.0, 5, 3)], 5, 1.0),
    "the latest complete contact counts": ([(1.0, 5, 5), (2.0, 6, 6)], 6, 2.0),
    "behind again": ([(1.0, 5, 5), (2.0, 9, 5)], 5, 1.0),
    "always a little behind the newest contact":
        ([(1.0, 5, 4), (2.0, 6, 5), (3.0, 7, 6), (4.0, 8, 7)], 7, 3.0),
    "a later contact does not replace one that waits":
        ([(1.0, 5, 3), (2.0, 50, 4), (3.0, 60, 4)], 5, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_fresh_at(name: str) -> None:
    steps, applied_index, expected = CASES[name]
    freshness = Freshness()
    for now, commit_index, applied_then in steps:
        freshness.heard(now, commit_index, applied_then)
    assert freshness.fresh_at(applied_index) == expected


QUORUMS: dict[str, tuple[list[float], float]] = {
    "the only voter": ([], 10.0),
    "one other": ([4.0], 4.0),
    "two others: either makes a majority": ([4.0, 9.0], 9.0),
    "three others: two are needed": ([4.0, 9.0, 7.0], 7.0),
    "four others: two are needed": ([4.0, 9.0, 7.0, 1.0], 7.0),
    "nobody was ever heard": ([NEVER, NEVER], NEVER),
}


@pytest.mark.parametrize("name", QUORUMS)
def test_quorum_contact(name: str) -> None:
    others, expected = QUORUMS[name]
    assert quorum_contact(10.0, others) == expected


def test_ages_of_a_leader_and_of_its_followers() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        follower, other = lab.others(leader)
        await leader.engine.propose(b"x", timeout_s=1.0)
        await lab.settle()
        assert all(node.engine.state_age_s() < 0.3 for node in lab.nodes.values())

        lab.hub.isolate(follower.node_id)
        await asyncio.sleep(3.0)
        assert 2.7 < follower.engine.state_age_s() < 3.3
        assert leader.engine.state_age_s() < 0.3, "one other voter still makes a majority"

        lab.hub.isolate(other.node_id)
        await asyncio.sleep(0.6)
        assert leader.engine.is_leader(), "it has not noticed yet"
        assert 0.5 < leader.engine.state_age_s() < 0.9
        await lab.until(lambda: not leader.engine.is_leader())
        lab.hub.heal()
        await lab.leader()
        await lab.until(lambda: follower.engine.state_age_s() < 0.3)

    run(scenario())


def test_a_follower_that_hears_its_leader_and_cannot_keep_up_is_not_fresh() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        follower = lab.others(leader)[0]
        await leader.engine.propose(b"x", timeout_s=1.0)
        await lab.settle()
        follower.offload.holding = True  # its disk hangs: it hears, and applies nothing
        await leader.engine.propose(b"y", timeout_s=1.0)
        await asyncio.sleep(2.0)
        assert follower.status().last_contact_ns < 0.3e9
        assert follower.engine.state_age_s() > 1.8
        follower.offload.release()
        await lab.settle()
        await asyncio.sleep(0.3)
        assert follower.engine.state_age_s() < 0.3

    run(scenario())


def test_what_a_new_leader_knows_before_its_first_entry_is_committed_makes_nobody_fresh() -> None:
    """A cluster that was down: the states are those of the last flush, and the new leader does not
    know yet that what follows in its log is committed."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await leader.engine.propose(b"flushed", timeout_s=5)
        await lab.settle()
        flushed = len(leader.state.entries)
        await leader.engine.propose(b"acknowledged", timeout_s=5)
        await lab.settle()
        for node in lab.nodes.values():
            node.kill()
            del node.state.entries[flushed:]
        await asyncio.sleep(600.0)
        lab.hub.rule = lambda source, target, message: int(not isinstance(message, frames.Ack))
        for node in lab.nodes.values():
            await node.start()
        await lab.until(lambda: any(node.core.is_leading() for node in lab.nodes.values()))
        await asyncio.sleep(0.25)
        assert b"acknowledged" not in leader.state.payloads()
        assert {node.engine.state_age_s() for node in lab.nodes.values()} == {float("inf")}
        lab.hub.rule = lambda source, target, message: 1
        await lab.settle(await lab.leader())
        await lab.until(lambda: all(n.engine.state_age_s() < 0.3 for n in lab.nodes.values()))
        assert all(b"acknowledged" in node.state.payloads() for node in lab.nodes.values())

    run(scenario())


def test_a_follower_that_holds_what_is_committed_by_a_snapshot_is_fresh() -> None:
    """Nothing follows the snapshot, on an idle cluster."""
    async def scenario() -> None:
        lab = Lab(segment_bytes=2000, compact_bytes=6000, keep_entries=10)
        leader = await lab.start()
        behind = lab.others(leader)[0]
        lab.hub.isolate(behind.node_id)
        for number in range(400):
            await leader.engine.propose(b"%d" % number, timeout_s=5)
        await lab.until(lambda: leader.journal.anchor_index > behind.journal.last_index)
        lab.hub.heal()
        await lab.until(lambda: behind.status().snapshots_installed == 1)
        await lab.until(lambda: behind.engine.state_age_s() < 0.3)

    run(scenario())


def test_a_leader_that_nobody_can_replace_stops_all_the_same() -> None:
    async def scenario() -> None:
        lab = Lab(leader_fallback_s=5.0)
        leader = await lab.start()
        lab.hub.isolate(leader.node_id)
        assert leader.engine.is_leader()
        await leader.engine.stop()
        assert leader.status().role is Role.SHUTDOWN
        assert leader.node_id not in lab.hub.up, "its links are closed"

    run(scenario())
