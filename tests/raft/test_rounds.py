"""What a member does at once, and what it leaves for its next tick.

Time is virtual. Ticks are a second apart here, so whatever happens between two of them was not
done by a tick.
"""

from __future__ import annotations

import asyncio
from typing import Any

from raft_lab import Lab, LabNode, run

from elastickv.raft.engine import Entry
from elastickv.raft.frames import RequestVote

TICK_S = 1.0
SLOW_TICKS: dict[str, Any] = {
    "tick_s": TICK_S, "heartbeat_s": 2 * TICK_S, "election_min_s": 8 * TICK_S,
    "election_max_s": 16 * TICK_S, "leader_fallback_s": 16 * TICK_S,
    "inline_sync_bytes": 1 << 20, "apply_lag_entries": 10,
}


def watch_groups(node: LabNode) -> list[int]:
    """How many entries each group has that `node` applies from now on."""
    groups: list[int] = []
    apply = node.state.apply

    def counted(entries: list[Entry]) -> Any:
        groups.append(len(entries))
        return apply(entries)

    node.state.apply = counted  # type: ignore[method-assign,assignment]
    return groups


async def started() -> tuple[Lab, LabNode, LabNode]:
    """A cluster just behind a tick; its leader and a follower that has applied everything."""
    lab = Lab(**SLOW_TICKS)
    leader = await lab.start()
    await leader.engine.propose(b"first", timeout_s=60)
    follower = lab.others(leader)[0]
    await lab.until(lambda: follower.status().applied_index == leader.status().applied_index)
    return lab, leader, follower


async def write(leader: LabNode, count: int) -> float:
    """Write one after the other; the virtual seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(count):
        await leader.engine.propose(b"%d" % number, timeout_s=60)
    return loop.time() - began


def test_a_leader_answers_without_a_tick() -> None:
    async def scenario() -> None:
        _, leader, _ = await started()
        assert await write(leader, 5) < TICK_S / 2

    run(scenario())


def test_a_follower_applies_several_entries_at_once() -> None:
    async def scenario() -> None:
        lab, leader, follower = await started()
        groups = watch_groups(follower)
        assert await write(leader, 8) < TICK_S / 2
        assert groups == []
        await lab.until(lambda: follower.status().applied_index == leader.status().applied_index)
        assert sum(groups) == 8
        assert len(groups) <= 2
        assert follower.state.payloads() == leader.state.payloads()

    run(scenario())


def test_a_follower_that_is_far_behind_does_not_wait_for_its_tick() -> None:
    async def scenario() -> None:
        _, leader, follower = await started()
        groups = watch_groups(follower)
        assert await write(leader, 30) < TICK_S / 2
        assert sum(groups) >= 20
        assert len(groups) <= 3

    run(scenario())


def test_a_follower_applies_at_once_for_a_read() -> None:
    async def scenario() -> None:
        _, leader, follower = await started()
        await write(leader, 3)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await follower.engine.wait_applied(await follower.engine.read_index(timeout_s=60),
                                           timeout_s=60)
        assert loop.time() - began < TICK_S / 2
        assert follower.state.payloads() == leader.state.payloads()

    run(scenario())


def test_entries_that_come_while_a_read_waits_are_applied_at_once() -> None:
    async def scenario() -> None:
        _, leader, follower = await started()
        loop = asyncio.get_running_loop()
        target = leader.status().applied_index + 2
        waiting = asyncio.ensure_future(follower.engine.wait_applied(target, timeout_s=60))
        await write(leader, 3)
        began = loop.time()
        await waiting
        assert loop.time() - began < TICK_S / 2

    run(scenario())


def test_a_new_leader_applies_what_it_had_left() -> None:
    async def scenario() -> None:
        lab, leader, follower = await started()
        await write(leader, 5)
        assert follower.status().applied_index < leader.status().applied_index
        await leader.engine.transfer_leadership(follower.node_id, timeout_s=60)
        await lab.leader([follower])
        await follower.engine.propose(b"last", timeout_s=60)
        assert follower.state.payloads() \
            == [b"first", *(b"%d" % number for number in range(5)), b"last"]

    run(scenario())


def test_a_pre_vote_counts_for_the_term_that_it_was_granted_for():
    """Whoever stands in that term first raises this node's, which has no grants for the next."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        node, candidate = lab.others(leader)
        lab.hub.rule = lambda source, target, message: int(node.node_id not in (source, target))
        await asyncio.sleep(2)  # of a silent leader
        term = node.core.term()
        node.engine._elections._clear()
        lab.hub.inject(candidate.node_id, node.node_id, RequestVote(term + 1, 0, 0, False))
        await asyncio.sleep(1)
        assert node.core.term() == term + 1
        lab.hub.rule = lambda source, target, message: 1
        await lab.settle()

    run(scenario())
