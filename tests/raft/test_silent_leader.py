"""Who leads, in the eyes of a member that hears no leader any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import pytest
from raft_lab import Lab, LabNode, outcome, run
from test_members import learner, silent

from elastickv.errors import DeadlineExceeded, NoLeader, NotLeader
from elastickv.raft import frames
from elastickv.raft.engine import Role
from elastickv.raft.membership import encode_members

SECOND = 1.0


class Announced:
    """(role, term, leader) of every change that a member's owner is told."""

    def __init__(self, node: LabNode) -> None:
        self.changes: list[tuple[Role, int, str]] = []
        node.engine.on_role_change(lambda role, term: self.changes.append(
            (role, term, node.status().leader_id)))


def cut_off(lab: Lab, node: LabNode) -> None:
    """No link is left."""
    lab.hub.isolate(node.node_id)


def deaf(lab: Lab, node: LabNode) -> None:
    """It is heard, and hears nothing."""
    lab.hub.rule = lambda source, target, message: int(target != node.node_id)


def left_by_its_leader(lab: Lab, node: LabNode) -> None:
    """It hears the others, whom their leader keeps from electing another one."""
    leader_id = node.status().leader_id
    lab.hub.rule = lambda source, target, message: int({source, target} != {leader_id,
                                                                            node.node_id})


def mended(lab: Lab) -> None:
    lab.hub.rule = lambda source, target, message: 1
    lab.hub.heal()


class Case(NamedTuple):
    """How a member loses its leader, and whether it has a vote."""

    lose: Callable[[Lab, LabNode], None]
    votes: bool = True


CASES = {
    "a follower that is cut off": Case(cut_off),
    "a follower whose links stand, and nothing arrives": Case(silent),
    "a follower that is heard and hears nothing": Case(deaf),
    "a follower that hears all but the leader": Case(left_by_its_leader),
    "a learner that is cut off": Case(cut_off, votes=False),
    "a learner whose links stand, and nothing arrives": Case(silent, votes=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_member_that_hears_no_leader_names_none_until_it_hears_it_again(case: Case) -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        node = lab.others(leader)[0] if case.votes else await learner(lab, leader)
        await lab.settle()
        term, vote = node.core.term(), node.engine._storage.hard_state.state.vote
        announced = Announced(node)

        case.lose(lab, node)
        assert node.status().leader_id == leader.node_id, "it has not noticed yet"
        assert isinstance(await outcome(node.engine.read_index(timeout_s=0.1)), DeadlineExceeded)
        await lab.until(lambda: not node.status().leader_id, 1.2)
        await asyncio.sleep(10)
        status = node.status()
        assert (status.role, status.term, status.leader_address) == (Role.FOLLOWER, term, "")
        assert node.engine._storage.hard_state.state.vote == vote
        assert isinstance(await outcome(node.engine.read_index(timeout_s=0.1)), NoLeader)
        assert isinstance(await outcome(node.engine.propose(b"x", timeout_s=0.1)), NoLeader)
        assert announced.changes == [(Role.FOLLOWER, term, "")]

        read = asyncio.ensure_future(node.engine.read_index(timeout_s=5))
        await asyncio.sleep(0.2)
        assert await leader.engine.propose(b"y", timeout_s=SECOND) == b"y"
        mended(lab)
        assert await read == leader.core.commit_index()
        assert node.status().leader_id == leader.node_id
        assert isinstance(await outcome(node.engine.propose(b"x", timeout_s=0.1)), NotLeader)
        assert announced.changes[1:] == [(Role.FOLLOWER, term, leader.node_id)]
        assert leader.engine.is_leader()
        await lab.settle()

    run(scenario())


def test_who_is_left_of_a_lost_majority_names_no_leader() -> None:
    """The leader that gives up as well as the follower that survives."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        first, second = lab.others(leader)
        for node in (first, second):
            lab.hub.isolate(node.node_id)
        for node in (leader, first, second):
            await lab.until(lambda node=node: not node.status().leader_id, 1.2)
            assert node.status().role is Role.FOLLOWER
            assert isinstance(await outcome(node.engine.read_index(timeout_s=0.1)), NoLeader)
            assert isinstance(await outcome(node.engine.propose(b"x", timeout_s=0.1)), NoLeader)
        second.kill()
        lab.hub.heal()
        elected = await lab.leader([leader, first])
        await lab.until(lambda: {node.status().leader_id for node in (leader, first)}
                        == {elected.node_id})
        assert await elected.engine.propose(b"y", timeout_s=SECOND) == b"y"

    run(scenario())


def test_a_member_that_was_to_take_over_and_is_cut_off_names_no_leader() -> None:
    """It waits for a link, to stand for election as it was asked to."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        target = lab.others(leader)[0]
        lab.hub.inject(leader.node_id, target.node_id, frames.TimeoutNow(target.core.term()))
        lab.hub.isolate(target.node_id)
        await asyncio.sleep(0.1)
        assert target.status().leader_id == leader.node_id
        await lab.until(lambda: not target.status().leader_id, 1.2)

    run(scenario())


def test_what_a_silent_leader_sends_before_its_next_entries_is_taken() -> None:
    """In its term nobody else leads, and the next heartbeat may be a while in coming."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        node, other = lab.others(leader)
        await lab.settle()
        silent(lab, node)
        await lab.until(lambda: not node.status().leader_id)
        lab.hub.rule = lambda source, target, message: int(
            {source, target} != {leader.node_id, node.node_id}
            or isinstance(message, (frames.ProbeAck, frames.SnapshotAck)))
        term = node.core.term()
        lab.hub.inject(leader.node_id, node.node_id, frames.Probe(term, 7))
        assert lab.hub.sent(frames.ProbeAck, node.node_id)[-1] == frames.ProbeAck(term, 7)
        for sender, offset in ((other, frames.REFUSED_OFFSET), (leader, 0)):
            lab.hub.inject(sender.node_id, node.node_id, frames.SnapshotOffer(
                term, 8, 1000, term, 0, encode_members([])))
            assert lab.hub.sent(frames.SnapshotAck, node.node_id)[-1].offset == offset
        assert not node.status().leader_id

    run(scenario())
