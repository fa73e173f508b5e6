"""ReadIndex and pre-vote bookkeeping."""

from __future__ import annotations

import asyncio

import pytest
import raft_lab
from raft_lab import Lab, outcome, run

from elastickv.errors import DeadlineExceeded, NoLeader
from elastickv.raft import frames
from elastickv.raft.prevote import PreVoteRound
from elastickv.raft.readindex import ReadForwarder, ReadRounds

VOTERS = ["n1", "n2", "n3"]


def test_reads_that_wait_together_share_a_round():
    rounds, results = ReadRounds(), []
    rounds.add(results.append)
    rounds.add(results.append)
    number = rounds.begin(17)
    rounds.answer("n1", number, VOTERS)
    assert results == []
    rounds.answer("n3", number, VOTERS)
    assert results == [17, 17]
    assert not rounds.active


def test_read_that_arrives_during_a_round_needs_the_next_one():
    rounds, results = ReadRounds(), []
    rounds.add(results.append)
    first = rounds.begin(17)
    rounds.add(results.append)
    assert not rounds.due
    rounds.answer("n1", first, VOTERS)
    rounds.answer("n2", first, VOTERS)
    assert results == [17]
    assert rounds.due
    second = rounds.begin(20)
    rounds.answer("n2", first, VOTERS)
    rounds.answer("n3", first, VOTERS)
    assert results == [17]
    rounds.answer("n1", second, VOTERS)
    rounds.answer("n2", second, VOTERS)
    assert results == [17, 20]


def test_round_needs_a_majority_of_distinct_voters():
    rounds, results = ReadRounds(), []
    rounds.add(results.append)
    number = rounds.begin(5)
    for voter in ("n1", "n1", "n9"):
        rounds.answer(voter, number, VOTERS)
    assert results == []
    assert rounds.unanswered(VOTERS) == ["n2", "n3"]


def test_lost_leadership_fails_running_and_waiting_reads():
    rounds, results = ReadRounds(), []
    rounds.add(results.append)
    number = rounds.begin(5)
    rounds.add(results.append)
    rounds.lose()
    assert results == [0, 0]
    rounds.answer("n1", number, VOTERS)
    rounds.answer("n2", number, VOTERS)
    assert results == [0, 0]


def test_forwarder_takes_only_the_answer_to_its_latest_request():
    forwarder, results = ReadForwarder(), []
    forwarder.add(results.append)
    first = forwarder.begin("n2")
    forwarder.retry()
    second = forwarder.begin("n3")
    forwarder.answer("n2", first, 9)
    forwarder.answer("n2", second, 9)
    assert results == []
    forwarder.answer("n3", second, 9)
    assert results == [9]


def test_answer_of_a_node_that_does_not_lead_leaves_the_reads_waiting():
    forwarder, results = ReadForwarder(), []
    forwarder.add(results.append)
    number = forwarder.begin("n2")
    forwarder.answer("n2", number, 0)
    assert results == []
    assert not forwarder.due
    forwarder.retry()
    assert forwarder.due


def test_answer_to_a_request_that_was_sent_again_covers_those_who_came_before_it():
    forwarder, results = ReadForwarder(), []
    forwarder.add(lambda index: results.append(("before", index)))
    first = forwarder.begin("n2")
    forwarder.add(lambda index: results.append(("after", index)))
    forwarder.answer("n2", first, 9)
    assert results == [("before", 9)]
    second = forwarder.begin("n2")
    forwarder.answer("n2", first, 9)
    assert results == [("before", 9)]
    forwarder.answer("n2", second, 12)
    assert results == [("before", 9), ("after", 12)]


def test_refusal_counts_for_the_request_that_was_refused():
    forwarder, results = ReadForwarder(), []
    forwarder.add(results.append)
    first = forwarder.begin("n2")
    forwarder.answer("n2", first, 0)
    assert forwarder.refused
    forwarder.retry()
    second = forwarder.begin("n2")
    assert not forwarder.refused
    forwarder.answer("n2", first, 0)
    assert not forwarder.refused
    forwarder.answer("n2", second, 9)
    assert results == [9]


@pytest.mark.parametrize("one_way_ms", [1, 40, 100, 300])
@pytest.mark.parametrize("role", ["leader", "follower"])
def test_read_succeeds_however_long_an_answer_takes(monkeypatch, one_way_ms, role):
    async def scenario():
        lab = Lab()
        leader = await lab.start()
        await leader.engine.propose(b"x", timeout_s=5)
        await lab.settle()
        monkeypatch.setattr(raft_lab, "LATENCY_S", one_way_ms / 1000)
        reader = leader if role == "leader" else lab.others(leader)[0]
        index = await reader.engine.read_index(timeout_s=5)
        assert index >= leader.state.applied_index
        assert reader.engine._reads._forwarder.number <= 1

    run(scenario())


def test_read_that_a_member_refused_asks_the_leader_that_follows():
    async def scenario():
        lab = Lab()
        leader = await lab.start()
        reader, other = lab.others(leader)
        await leader.engine.propose(b"x", timeout_s=5)
        await lab.settle()
        lab.hub.rule = lambda source, target, message: int(
            target != leader.node_id or not isinstance(message, frames.ProbeAck))
        read = asyncio.ensure_future(reader.engine.read_index(timeout_s=5))
        await lab.until(lambda: bool(lab.hub.sent(frames.Probe)))
        await leader.engine.transfer_leadership(other.node_id, timeout_s=5)
        assert await read > 0
        assert lab.hub.sent(frames.ReadReply, leader.node_id)[0].index == 0

    run(scenario())


def test_pre_vote_needs_a_majority_of_distinct_voters_in_the_same_term():
    ballot = PreVoteRound()
    ballot.begin("n1", 4, ["n1", "n2", "n3", "n4", "n5"])
    assert not ballot.won
    assert not ballot.reply("n2", ballot.number, 4)
    assert not ballot.reply("n2", ballot.number, 4)
    assert not ballot.reply("n9", ballot.number, 4)
    assert not ballot.reply("n3", ballot.number - 1, 4)
    assert not ballot.reply("n3", ballot.number, 5)
    assert ballot.reply("n3", ballot.number, 4)
    assert ballot.won


def test_cancelled_pre_vote_is_void():
    ballot = PreVoteRound()
    ballot.begin("n1", 4, VOTERS)
    number = ballot.number
    ballot.cancel()
    assert not ballot.reply("n2", number, 4)
    assert not ballot.won


def test_single_voter_elects_itself():
    ballot = PreVoteRound()
    ballot.begin("n1", 4, ["n1"])
    assert ballot.won


def test_learner_cannot_elect_itself():
    ballot = PreVoteRound()
    ballot.begin("n4", 4, VOTERS)
    assert not ballot.reply("n1", ballot.number, 4)
    assert ballot.reply("n2", ballot.number, 4)


@pytest.mark.parametrize("kind", [ReadRounds, ReadForwarder])
def test_a_read_that_nobody_waits_for_is_forgotten(kind):
    queue, results = kind(), []
    kept, gone = queue.add(results.append), queue.add(results.append)
    queue.discard(gone)
    queue.discard(gone)
    queue.lose()
    assert (kept, gone, results) == (0, 1, [0])


def test_reads_that_timed_out_leave_nothing_behind():
    async def scenario():
        lab = Lab()
        leader = await lab.start()
        alone = lab.others(leader)[0]
        lab.hub.isolate(alone.node_id)
        for _ in range(3):
            assert isinstance(await outcome(alone.engine.read_index(timeout_s=0.1)),
                              DeadlineExceeded)
        await lab.until(lambda: not alone.status().leader_id)
        for _ in range(3):
            assert isinstance(await outcome(alone.engine.read_index(timeout_s=0.1)), NoLeader)
        cancelled = asyncio.ensure_future(alone.engine.read_index(timeout_s=9))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        forwarder = alone.engine._reads._forwarder
        assert not forwarder.due
        assert not forwarder._waiting
        assert not forwarder._running

    run(scenario())
