"""What is large, on links that carry it slowly: everything else waits behind it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import NamedTuple

import pytest
from raft_lab import Lab, LabNode, run

from elastickv.raft import frames
from elastickv.raft.replication import Replication

MIB = 1 << 20
MEGABIT = 1_000_000 / 8


class Line(NamedTuple):
    """Links, and the entries that go over them."""

    name: str
    entry_bytes: int
    bytes_per_s: float
    one_wire: bool = False
    others_up: int = 2


LINES = [
    Line("8 MiB, 100 Mbit/s", 8 * MIB, 100 * MEGABIT),
    Line("8 MiB, 50 Mbit/s", 8 * MIB, 50 * MEGABIT),
    Line("1.5 MiB, 10 Mbit/s", 3 * MIB // 2, 10 * MEGABIT),
    Line("8 MiB, 100 Mbit/s for both", 8 * MIB, 100 * MEGABIT, one_wire=True),
    Line("8 MiB, 50 Mbit/s for both", 8 * MIB, 50 * MEGABIT, one_wire=True),
    Line("1.5 MiB, 10 Mbit/s for both", 3 * MIB // 2, 10 * MEGABIT, one_wire=True),
    Line("8 MiB, 100 Mbit/s, one is down", 8 * MIB, 100 * MEGABIT, others_up=1),
    Line("8 MiB, 50 Mbit/s, one is down", 8 * MIB, 50 * MEGABIT, others_up=1),
    Line("16 MiB, 10 Mbit/s, one is down", 16 * MIB, 10 * MEGABIT, others_up=1),
]


async def connected_by(line: Line) -> tuple[LabNode, list[LabNode]]:
    """A leader, and its followers that are up."""
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    followers = lab.others(leader)
    for follower in followers[line.others_up:]:
        follower.kill()
    lab.hub.bytes_per_s, lab.hub.one_wire = line.bytes_per_s, line.one_wire
    return leader, followers[:line.others_up]


async def in_the_middle(others_up: int = 2) -> tuple[LabNode, list[LabNode]]:
    """An entry is on its way that takes 1.34 s, for 0.5 s already."""
    line = Line("", 8 * MIB, 50 * MEGABIT, others_up=others_up)
    leader, followers = await connected_by(line)
    proposal = leader.engine.propose(bytes(line.entry_bytes), timeout_s=60)
    proposal.add_done_callback(lambda done: done.exception())
    await asyncio.sleep(0.5)
    return leader, followers


def terms(*nodes: LabNode) -> set[int]:
    return {node.status().term for node in nodes}


def has_a_new_link(leader: LabNode, follower: LabNode) -> None:
    leader.lab.hub.disconnect(leader.node_id, follower.node_id)
    leader.lab.hub.connect_all()


@pytest.mark.parametrize("line", LINES, ids=[line.name for line in LINES])
def test_a_large_entry_deposes_nobody(line: Line) -> None:
    async def scenario() -> None:
        leader, followers = await connected_by(line)
        term = leader.status().term
        for number in range(3):
            payload = b"%d" % number + bytes(line.entry_bytes - 1)
            assert await leader.engine.propose(payload, timeout_s=120) == payload
        await leader.lab.until(
            lambda: {len(node.state.payloads()) for node in followers} == {3}, 120)
        assert terms(leader, *followers) == {term}
        assert leader.engine.is_leader()

    run(scenario())


@pytest.mark.parametrize("others_up", [1, 2])
def test_a_large_call_of_a_follower_deposes_nobody(others_up: int) -> None:
    """Its acknowledgements wait behind it."""
    async def scenario() -> None:
        leader, followers = await connected_by(
            Line("", 0, 50 * MEGABIT, others_up=others_up))
        term = leader.status().term

        async def take(peer_id: str, method: str, payload: bytes) -> bytes:
            return b"%d" % len(payload)

        leader.engine.handle("take", take)
        answers = await asyncio.gather(*(
            follower.engine.call(leader.node_id, "take", bytes(16 * MIB), timeout_s=60)
            for follower in followers))
        assert answers == [b"%d" % (16 * MIB)] * others_up
        assert terms(leader, *followers) == {term}
        assert leader.engine.is_leader()

    run(scenario())


def test_a_large_entry_on_a_new_link_deposes_nobody() -> None:
    """It may be the first thing that a follower gets there, before it has acknowledged any."""
    async def scenario() -> None:
        leader, (follower,) = await in_the_middle(others_up=1)
        term = leader.status().term
        has_a_new_link(leader, follower)
        await leader.lab.until(lambda: bool(follower.state.payloads()))
        assert terms(leader, follower) == {term}
        assert leader.engine.is_leader()

    run(scenario())


# --- who is gone is noticed -----------------------------------------------------------------------


def falls_silent(node: LabNode) -> None:
    node.lab.hub.silenced.add(node.node_id)


def halts(node: LabNode) -> None:
    """Its process and its links live on for a while."""
    node.engine._fail(OSError(errno.EIO, "Input/output error"))


def dies(node: LabNode) -> None:
    node.kill()


ENDS = [falls_silent, halts, dies]


@pytest.mark.parametrize("end", ENDS)
def test_a_leader_whose_last_follower_ends_while_it_sends_steps_down(
        end: Callable[[LabNode], None]) -> None:
    async def scenario() -> None:
        leader, (follower,) = await in_the_middle(others_up=1)
        end(follower)
        await asyncio.sleep(1.2)
        assert not leader.core.is_leading()

    run(scenario())


@pytest.mark.parametrize("end", ENDS)
def test_a_follower_that_ends_while_it_is_sent_to_holds_nothing_up(
        end: Callable[[LabNode], None]) -> None:
    async def scenario() -> None:
        leader, (ending, other) = await in_the_middle()
        term = leader.status().term
        end(ending)
        await leader.lab.until(lambda: bool(other.state.payloads()))
        assert terms(leader, other) == {term}
        assert leader.engine.is_leader()

    run(scenario())


@pytest.mark.parametrize("end", ENDS)
def test_a_leader_that_ends_while_it_sends_is_followed_by_another(
        end: Callable[[LabNode], None]) -> None:
    async def scenario() -> None:
        leader, followers = await in_the_middle()
        end(leader)
        await leader.lab.until(lambda: any(node.engine.is_leader() for node in followers), 2.5)

    run(scenario())


# --- what counts, and for what --------------------------------------------------------------------


def does_nothing(leader: LabNode, follower: LabNode) -> None:
    pass


def is_in_a_later_term(leader: LabNode, follower: LabNode) -> None:
    follower.core.step_down(follower.status().term + 1)


def is_asked_to_take_over(leader: LabNode, follower: LabNode) -> None:
    leader.lab.hub.inject(leader.node_id, follower.node_id,
                          frames.TimeoutNow(leader.status().term))


@pytest.mark.parametrize(("silent_s", "follower_does", "from_leader", "counts"), [
    (0.15, does_nothing, True, True),
    (0.15, does_nothing, False, False),
    (1.2, does_nothing, True, True),
    (0.15, has_a_new_link, True, True),
    (0.15, is_in_a_later_term, True, False),
    (0.15, is_asked_to_take_over, True, False),
])
def test_bytes_of_who_leads_in_the_term_count_as_heard_from_it(
        silent_s: float, follower_does: Callable[[LabNode, LabNode], None], from_leader: bool,
        counts: bool) -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        follower, other = lab.others(leader)
        lab.hub.rule = lambda source, target, message: 0
        await asyncio.sleep(silent_s)
        follower_does(leader, follower)
        deadline = follower.core.election_deadline()
        follower.engine.receiving((leader if from_leader else other).node_id)
        is_heard = follower.status().last_contact_ns == 0
        assert (is_heard, follower.core.election_deadline() != deadline) == (counts, counts)

    run(scenario())


def test_a_leader_that_sees_signs_of_life_helps_nobody_to_depose_it() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        alive, asking = lab.others(leader)
        lab.hub.rule = lambda source, target, message: int(not isinstance(message, frames.Ack))
        for _ in range(15):
            leader.engine.receiving(alive.node_id)
            await asyncio.sleep(0.1)
        lab.hub.inject(asking.node_id, leader.node_id, frames.PreVote(
            leader.status().term + 1, 1, asking.journal.last_index, asking.journal.last_term))
        replies = lab.hub.sent(frames.PreVoteReply, leader.node_id)
        assert [reply.granted for reply in replies] == [False]
        assert leader.core.is_leading()

    run(scenario())


def test_a_sign_of_life_is_no_answer() -> None:
    """It says nothing of the log, of reads, or of how fresh any state is."""
    async def scenario() -> None:
        leader, (follower,) = await in_the_middle(others_up=1)
        await asyncio.sleep(0.75)
        assert leader.core.is_leading()
        assert leader.engine.state_age_s() > 1.0
        assert follower.engine.state_age_s() > 1.0
        assert not leader.engine._context.answers(follower.node_id)

    run(scenario())


def test_a_sign_of_life_moves_no_index() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await leader.engine.propose(b"x", timeout_s=5)
        await lab.settle()
        follower, core = lab.others(leader)[0].node_id, leader.core
        replication: Replication = leader.engine._replication
        for probing in (False, True):
            if probing:
                replication.restart(follower)
            before = core.next_index(follower), core.match_index(follower)
            lab.hub.inject(follower, leader.node_id, frames.Ack(
                leader.status().term, frames.NO_SEQUENCE, 0, False, True))
            assert (core.next_index(follower), core.match_index(follower)) == before
            assert replication.progress(follower).probing == probing

    run(scenario())


def test_signs_of_life_are_no_more_than_heartbeats() -> None:
    async def scenario() -> None:
        _, (follower,) = await in_the_middle(others_up=1)
        signs = [ack for ack in follower.lab.hub.sent(frames.Ack, follower.node_id)
                 if ack.sequence == frames.NO_SEQUENCE]
        assert 3 <= len(signs) <= 5

    run(scenario())
