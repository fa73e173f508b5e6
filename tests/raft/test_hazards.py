"""Every hazard of the underlying library: a scenario that holds with the fix, and does not without.

Each scenario raises AssertionError when the promise it is about is broken. It is run twice: as
shipped, where it must pass, and with that one fix switched off, where it must fail.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import pytest
from pysyncobj import SyncObj
from raft_lab import HeldOffload, Lab, LabNode, ListState, outcome, run

from elastickv.errors import ApplyHalted, OutcomeUnknown, PeerError
from elastickv.raft import applying, frames, records, rules
from elastickv.raft.elections import Elections
from elastickv.raft.engine import Entry, Role
from elastickv.raft.frames import AppendEntries, RequestVote, Vote
from elastickv.raft.hardstate import HardState, HardStateFile
from elastickv.raft.journal import Journal
from elastickv.raft.proposals import Proposals
from elastickv.raft.pysyncobj_core import RaftCore
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.reads import Reads
from elastickv.raft.replication import Replication
from elastickv.raft.storage import RaftStorage

Patch = pytest.MonkeyPatch
SECOND = 1.0


class Hazard(NamedTuple):
    name: str
    scenario: Callable[[], Awaitable[None]]
    switch_off: Callable[[Patch], None]


HAZARDS: list[Hazard] = []


def hazard(switch_off: Callable[[Patch], None]) -> Callable[..., Any]:
    """Register a scenario and how to switch its fix off."""
    def register(scenario: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        HAZARDS.append(Hazard(scenario.__name__, scenario, switch_off))
        return scenario
    return register


def appended(message: frames.AnyMessage) -> list[records.Record]:
    return records.decode_all(message.entries, 1 << 30) \
        if isinstance(message, AppendEntries) else []


# --- durability before acknowledgement ------------------------------------------------------------


@hazard(lambda patch: patch.setattr(rules, "acknowledged_index", lambda match, durable: match))
async def follower_acknowledges_only_after_its_fsync():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    for follower in lab.others(leader):
        follower.offload.holding = True
    proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=5)))
    await asyncio.sleep(0.3)
    assert not proposal.done(), "committed although no follower had made it durable"
    lab.others(leader)[0].offload.release()
    assert await proposal == b"x"


@hazard(lambda patch: patch.setattr(
    rules, "committed_index", lambda previous, proposed, *rest: max(previous, proposed)))
async def leader_counts_itself_only_after_its_fsync():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    leader.offload.holding = True
    lab.others(leader)[1].offload.holding = True
    proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=5)))
    await asyncio.sleep(0.3)
    status = leader.status()
    assert status.commit_index < status.last_log_index, "one durable copy of three"
    leader.offload.release()
    assert await proposal == b"x"


async def succeeded(lab: Lab, leader: LabNode, proposal: asyncio.Future[object]) -> None:
    """Another member leads, has what `leader` was proposed (x), and serves."""
    successor = await lab.leader(lab.others(leader))
    assert isinstance(await proposal, OutcomeUnknown)
    assert await successor.engine.propose(b"y", timeout_s=5) == b"y"
    assert successor.state.payloads() == [b"x", b"y"]


@hazard(lambda patch: patch.setattr(rules, "is_held_up", lambda durable_index, matches: False))
async def leader_whose_fsync_hangs_gives_way():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    leader.offload.holding = True
    proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=60)))
    await succeeded(lab, leader, proposal)
    leader.offload.release()
    await lab.settle()


@hazard(lambda patch: patch.setattr(rules, "has_successor", lambda last_index, matches: False))
async def leader_whose_store_hangs_gives_way():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    leader.state.takes_more = False
    proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=60)))
    await asyncio.sleep(leader.engine._settings.stalled_state_s - SECOND)
    assert leader.engine.is_leader(), "a slow flush takes seconds"
    await succeeded(lab, leader, proposal)
    leader.state.takes_more = True
    await lab.settle()


@hazard(lambda patch: patch.setattr(rules, "has_successor", lambda last_index, matches: False))
async def leader_whose_store_cannot_read_gives_way():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    leader.state.is_ready = False
    proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=60)))
    await asyncio.sleep(leader.engine._settings.stalled_state_s - SECOND)
    assert leader.engine.is_leader(), "reading takes seconds"
    await succeeded(lab, leader, proposal)
    leader.state.is_ready = True
    await lab.settle()


@hazard(lambda patch: patch.setattr(applying, "RETRY_S", 1e9))
async def state_that_reads_something_first_is_asked_again_before_the_next_tick():
    lab = Lab(tick_s=0.1)
    leader = await lab.start()
    await lab.settle()
    for wait_s in (0.33, 0.36, 0.39):
        leader.state.is_ready = False
        proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=5)))
        calls_before = leader.state.apply_calls
        await asyncio.sleep(wait_s)
        assert not proposal.done()
        assert leader.state.apply_calls - calls_before < 1.2 * wait_s / applying.RETRY_S + 10
        leader.state.is_ready = True
        await asyncio.sleep(0.01)
        assert proposal.done()
        assert await proposal == b"x"


class ReadsEachEntryFirst(ListState):
    """As a state machine whose entries have conditions, in a store that is not in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._is_reading = False
        self._has_read = 0

    def may_apply(self) -> bool:
        return not self._is_reading

    def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        results: list[object] = []
        for entry in entries:
            if entry.payload and entry.index != self._has_read:
                self._is_reading, self._has_read = True, entry.index
                asyncio.get_running_loop().call_later(
                    applying.RETRY_S / 4, setattr, self, "_is_reading", False)
                break
            results += super().apply([entry])
        return results


@hazard(lambda patch: patch.setattr(applying, "RETRY_S", 1e9))
async def state_that_reads_behind_entries_that_it_took_is_asked_again_before_the_next_tick():
    lab = Lab(size=1, tick_s=0.1)
    for node in lab.nodes.values():
        node.state = ReadsEachEntryFirst()
    leader = await lab.start()
    await lab.settle()
    proposals = [asyncio.ensure_future(outcome(leader.engine.propose(b"%d" % number, timeout_s=5)))
                 for number in range(50)]
    await asyncio.sleep(0.3)
    assert [proposal.done() for proposal in proposals] == 50 * [True]


@hazard(lambda patch: patch.setattr(
    rules, "committed_index", lambda previous, proposed, *rest: max(previous, proposed)))
async def single_member_commits_only_after_its_fsync():
    lab = Lab(1)
    leader = await lab.start()
    leader.offload.holding = True
    proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=5)))
    await asyncio.sleep(0.3)
    assert leader.status().commit_index < leader.status().last_log_index
    leader.offload.release()
    assert await proposal == b"x"


def _vote_at_once(self: Elections, peer_id: str, term: int) -> None:
    self._context.send(peer_id, Vote(term))


@hazard(lambda patch: patch.setattr(Elections, "give_vote", _vote_at_once))
async def vote_leaves_after_the_log_behind_it_is_durable():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    voter, candidate = lab.others(leader)
    voter.offload.holding = True
    await outcome(leader.engine.propose(b"x", timeout_s=0.1))
    lab.hub.log.clear()
    term, last = voter.status().term, voter.journal
    lab.hub.inject(candidate.node_id, voter.node_id, RequestVote(
        term + 1, last.last_index, last.last_term, True))
    await asyncio.sleep(0.05)
    assert not lab.hub.sent(Vote, voter.node_id), "voted by a log that a power cut can shorten"
    voter.offload.release()
    await asyncio.sleep(0.05)
    assert lab.hub.sent(Vote, voter.node_id) == [Vote(term + 1)]


def _only_in_memory(self: HardStateFile, state: HardState) -> None:
    self.state = state


@hazard(lambda patch: patch.setattr(HardStateFile, "_save", _only_in_memory))
async def term_and_vote_are_durable_before_the_vote_leaves():
    lab = Lab()
    wrong: list[str] = []

    def look(source: str, target: str, message: frames.AnyMessage) -> int:
        if isinstance(message, Vote | RequestVote):
            node = lab.node(source)
            path = node.path / "hardstate"
            stored = HardStateFile(node.disk, path).state if node.disk.exists(path) else None
            vote = target if isinstance(message, Vote) else source
            if stored is None or (stored.term, stored.vote) != (message.term, vote):
                wrong.append(f"{message} left while {stored} was on the disk")
        return 1

    lab.hub.rule = look
    leader = await lab.start()
    lab.hub.isolate(leader.node_id)
    await lab.leader(lab.others(leader))
    assert not wrong, wrong


@hazard(lambda patch: patch.setattr(PySyncObjEngine, "_fail", lambda self, error: None))
async def failed_fsync_stops_the_node_and_is_not_retried():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    follower = lab.others(leader)[0]
    follower.disk.fail["sync"] = OSError(5, "Input/output error")
    await leader.engine.propose(b"x", timeout_s=5)
    await asyncio.sleep(0.1)
    follower.disk.fail.clear()
    before = lab.hub.sent(frames.Ack, follower.node_id)
    await leader.engine.propose(b"y", timeout_s=5)
    await asyncio.sleep(0.5)
    assert len(follower.fatal) == 1
    assert lab.hub.sent(frames.Ack, follower.node_id) == before, "acknowledged after a failed fsync"


# --- truncation -----------------------------------------------------------------------------------


def _untrimmed(log: Any, committed: int, previous_index: int, previous_term: int,
               entries: Any, leader_commit: int) -> rules.AppendPlan:
    return rules.AppendPlan(True, previous_index, previous_term, entries,
                            previous_index + len(entries), leader_commit, True)


@hazard(lambda patch: patch.setattr(rules, "plan_append", _untrimmed))
async def late_duplicate_truncates_no_matching_entry():
    lab = Lab()
    leader = await lab.start()
    for number in range(10):
        await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
    await lab.settle()
    follower = lab.others(leader)[0]
    old = [m for s, t, m in lab.hub.log
           if t == follower.node_id and appended(m)][2]
    last_index = follower.journal.last_index
    lab.hub.inject(leader.node_id, follower.node_id, old)
    assert follower.journal.last_index == last_index, "a late duplicate dropped entries"
    lab.hub.inject(leader.node_id, follower.node_id, AppendEntries(
        old.term, old.sequence, 2, old.previous_index, old.previous_term, b""))
    assert follower.journal.last_index == last_index, "a late heartbeat dropped entries"


@hazard(lambda patch: patch.setattr(rules, "_require_uncommitted", lambda index, committed: None))
async def committed_entry_is_never_truncated():
    lab = Lab()
    leader = await lab.start()
    for number in range(3):
        await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
    await lab.settle()
    follower = lab.others(leader)[0]
    before = follower.journal.entry(4)
    forged = records.encode(4, leader.status().term + 1, b"\x00forged", 0)
    lab.hub.inject(leader.node_id, follower.node_id, AppendEntries(
        leader.status().term + 1, 1, 4, 3, follower.journal.term_at(3), forged))
    assert follower.journal.entry(4) == before, "a committed entry was replaced"
    assert [type(error) for error in follower.fatal] == [rules.LogDiverged]


# --- pickle ---------------------------------------------------------------------------------------


class _Bomb:
    exploded = False

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> list[str]:
    _Bomb.exploded = True
    return ["add", "n9"]


def _library_parser(patch: Patch) -> None:
    name = "_SyncObj__parseChangeClusterRequest"
    patch.setattr(RaftCore, name, getattr(SyncObj, name))


@hazard(_library_parser)
async def nothing_from_the_wire_or_the_log_is_unpickled():
    _Bomb.exploded = False
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    follower = lab.others(leader)[0]
    term, last_index = leader.status().term, follower.journal.last_index
    kinds = (b"\x02", b"\x03", b"\x00")
    # The library sees only what changes more than the end of the log, as a new leader's does.
    for new_term, kind in [*((term, kind) for kind in kinds), *enumerate(kinds, term + 1)]:
        entry = records.encode(last_index + 1, new_term, kind + pickle.dumps(_Bomb()), 0)
        lab.hub.inject(leader.node_id, follower.node_id, AppendEntries(
            new_term, 10_000, 1, last_index, follower.journal.last_term, entry))
    follower.links.events.received(leader.node_id, pickle.dumps(_Bomb()))
    await asyncio.sleep(0.1)
    assert not _Bomb.exploded


# --- reads ----------------------------------------------------------------------------------------


async def _local_read(self: Reads, timeout_s: float) -> int:
    return self._context.core.commit_index()


@hazard(lambda patch: patch.setattr(Reads, "read_index", _local_read))
async def deposed_leader_serves_no_stale_read():
    lab = Lab(leader_fallback_s=30.0)
    old = await lab.start()
    await lab.settle()
    lab.hub.isolate(old.node_id)
    new = await lab.leader(lab.others(old))
    await new.engine.propose(b"newer", timeout_s=SECOND)
    written = new.status().applied_index
    assert old.engine.is_leader(), "the scenario needs a leader that does not know better"
    index = await outcome(old.engine.read_index(timeout_s=0.5))
    assert isinstance(index, PeerError) or index >= written, "a stale read"


@hazard(lambda patch: patch.setattr(RaftCore, "noop_index", lambda self: 0))
async def new_leader_reads_only_after_an_entry_of_its_term_is_committed():
    lab = Lab()
    old = await lab.start()
    await lab.settle()
    last, other = lab.others(old)

    # The old leader commits an entry of which the others never learn that it is committed.
    lab.hub.rule = lambda s, t, m: int(not (
        isinstance(m, AppendEntries) and m.commit_index >= last.journal.last_index + 1))
    lab.hub.isolate(other.node_id)
    await old.engine.propose(b"acknowledged", timeout_s=SECOND)
    written = old.status().applied_index
    lab.hub.isolate(old.node_id)
    lab.hub.cut_pairs.discard(frozenset((last.node_id, other.node_id)))
    lab.hub.rule = lambda s, t, m: 0 if isinstance(m, frames.Ack) else 1
    lab.hub.connect_all()
    await lab.until(lambda: last.core.is_leading())
    index = await outcome(last.engine.read_index(timeout_s=0.3))
    assert isinstance(index, PeerError) or index >= written, "read below an acknowledged write"


@hazard(lambda patch: patch.setattr(
    Reads, "on_probe", lambda self, peer_id, message: self._context.send(
        peer_id, frames.ProbeAck(message.term, message.round))))
async def probe_is_confirmed_only_by_those_who_follow():
    """A follower that has moved to another term must not confirm the old leader."""
    lab = Lab(leader_fallback_s=30.0)
    old = await lab.start()
    await lab.settle()
    lab.hub.rule = lambda s, t, m: 0 if (
        (s == old.node_id and not isinstance(m, frames.Probe))
        or (t == old.node_id and not isinstance(m, frames.ProbeAck))) else 1
    new = await lab.leader(lab.others(old))
    await new.engine.propose(b"newer", timeout_s=SECOND)
    index = await outcome(old.engine.read_index(timeout_s=0.5))
    assert isinstance(index, PeerError) or index >= new.status().applied_index, "a stale read"


# --- leadership -----------------------------------------------------------------------------------


def _slow_fallback(patch: Patch) -> None:
    original = Lab.__init__
    patch.setattr(Lab, "__init__", lambda self, size=3, **overrides: original(
        self, size, **{"leader_fallback_s": 30.0, **overrides}))


@hazard(_slow_fallback)
async def leader_without_a_quorum_steps_down_within_its_fallback():
    lab = Lab()
    leader = await lab.start()
    lab.hub.isolate(leader.node_id)
    await asyncio.sleep(1.2)
    assert leader.status().role is not Role.LEADER


@hazard(lambda patch: patch.setattr(PySyncObjEngine, "receiving", lambda self, peer_id: None))
async def large_entry_on_a_slow_link_deposes_nobody():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    term = leader.status().term
    lab.hub.bytes_per_s = 50_000_000 / 8
    await outcome(leader.engine.propose(bytes(8 << 20), timeout_s=60))
    await lab.until(lambda: all(node.state.payloads() for node in lab.nodes.values()))
    assert {node.status().term for node in lab.nodes.values()} == {term}


@hazard(lambda patch: patch.setattr(
    Elections, "before_tick", lambda self: None))
async def isolated_node_raises_no_term_and_disturbs_nobody():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    term = leader.status().term
    lonely = lab.others(leader)[0]
    lab.hub.isolate(lonely.node_id, [leader.node_id])
    await asyncio.sleep(10)
    lab.hub.heal()
    await asyncio.sleep(3)
    assert {node.status().term for node in lab.nodes.values()} == {term}
    assert leader.engine.is_leader()


@hazard(lambda patch: patch.setattr(rules, "ignores_vote_request", lambda *arguments: False))
async def vote_request_does_not_depose_a_live_leader():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    term = leader.status().term
    candidate = lab.others(leader)[0]
    journal = candidate.journal
    for node in lab.nodes.values():
        if node is not candidate:
            lab.hub.inject(candidate.node_id, node.node_id, RequestVote(
                term + 5, journal.last_index, journal.last_term, False))
    await asyncio.sleep(0.2)
    assert leader.engine.is_leader()
    assert leader.status().term == term


@hazard(lambda patch: patch.setattr(Elections, "on_stale_term", lambda *arguments: None))
async def node_in_a_later_term_is_joined_again():
    """It cannot follow the leader of an earlier term, and pre-vote keeps it from being elected."""
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    ahead = lab.others(leader)[0]
    ahead.core.step_down(leader.status().term + 5)
    await lab.until(lambda: len({n.status().term for n in lab.nodes.values()}) == 1, 10)
    new = await lab.leader()
    await new.engine.propose(b"x", timeout_s=SECOND)
    await lab.until(lambda: ahead.state.payloads() == [b"x"], 5)


@hazard(lambda patch: patch.setattr(rules, "counts_vote", lambda *arguments: True))
async def one_voter_counts_once():
    lab = Lab(5)
    leader = await lab.start()
    await lab.settle()
    lab.hub.rule = lambda s, t, m: 0 if isinstance(m, Vote) else 1
    lab.hub.isolate(leader.node_id)
    candidates = lab.others(leader)
    await lab.until(lambda: any(node.status().role is Role.CANDIDATE for node in candidates))
    candidate = next(n for n in candidates if n.status().role is Role.CANDIDATE)
    voter = next(n for n in candidates if n is not candidate)
    for _ in range(4):
        lab.hub.inject(voter.node_id, candidate.node_id, Vote(candidate.status().term))
    assert candidate.status().role is Role.CANDIDATE, "elected by two of five"


def _resend_one_by_one(patch: Patch) -> None:
    plan = rules.plan_append

    def hint_of_one(log: Any, committed: int, previous_index: int, *rest: Any) -> rules.AppendPlan:
        planned = plan(log, committed, previous_index, *rest)
        return planned if planned.accepted else planned._replace(
            next_index=min(previous_index, log.last_index + 1))

    patch.setattr(rules, "plan_append", hint_of_one)


@hazard(_resend_one_by_one)
async def diverged_log_is_repaired_in_few_round_trips():
    lab = Lab(leader_fallback_s=5.0)
    old = await lab.start()
    await lab.settle()
    lab.hub.isolate(old.node_id)
    for _ in range(200):
        old.engine.propose(b"lost", timeout_s=0.1).add_done_callback(lambda f: f.exception())
    new = await lab.leader(lab.others(old))
    await asyncio.gather(*(new.engine.propose(b"kept", timeout_s=SECOND) for _ in range(200)))
    await lab.until(lambda: old.status().role is not Role.LEADER, 10)
    lab.hub.log.clear()
    lab.hub.heal()
    await lab.until(lambda: old.state.payloads() == [b"kept"] * 200, 10)
    rejections = [m for m in lab.hub.sent(frames.Ack, old.node_id) if not m.accepted]
    assert len(rejections) < 5


# --- acknowledgements -----------------------------------------------------------------------------


@hazard(lambda patch: patch.setattr(
    rules, "next_index_after_ack", lambda before, after, match_index, *, accepted: after))
async def acknowledgement_does_not_rewind_what_is_under_way():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    lab.hub.log.clear()
    proposals = []
    for number in range(30):
        proposals.append(leader.engine.propose(b"%d" % number, timeout_s=SECOND))
        await asyncio.sleep(0.0003)
    await asyncio.gather(*proposals)
    sent = [(target, record.index) for _, target, message in lab.hub.log
            for record in appended(message)]
    assert len(sent) == len(set(sent)), "entries were sent again while they were under way"


def _termless(patch: Patch) -> None:
    on_ack = Replication.on_ack
    patch.setattr(Replication, "on_ack", lambda self, peer_id, message: on_ack(
        self, peer_id, frames.Ack(self._core.term(), 1 << 40, message.next_index,
                                  message.accepted, message.counted)))


@hazard(_termless)
async def acknowledgement_of_an_earlier_term_counts_for_nothing():
    lab = Lab()
    first = await lab.start()
    await lab.settle()
    follower, third = lab.others(first)
    # An entry that only the first leader has, and the acknowledgement that a follower sent for it.
    for _ in range(2):
        await first.engine.transfer_leadership(
            follower.node_id if first.core.is_leading() else "", timeout_s=SECOND)
        await lab.until(lambda: follower.engine.is_leader())
        await follower.engine.transfer_leadership(first.node_id, timeout_s=SECOND)
        await lab.until(lambda: first.engine.is_leader())
        break
    await lab.settle()
    for node in (follower, third):
        node.offload.holding = True
    first.engine.propose(b"x", timeout_s=5).add_done_callback(lambda f: f.exception())
    await asyncio.sleep(0.02)
    last_index, commit = first.journal.last_index, first.status().commit_index
    assert commit < last_index
    lab.hub.inject(follower.node_id, first.node_id,
                   frames.Ack(first.status().term - 2, 7, last_index + 1, True, True))
    await asyncio.sleep(0.01)
    assert first.status().commit_index == commit, "committed by an acknowledgement of an older term"


@hazard(lambda patch: patch.setattr(
    Proposals, "fail_all", lambda self, message: None))
async def proposal_of_a_deposed_leader_ends_as_unknown():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    lab.hub.isolate(leader.node_id)
    proposal = leader.engine.propose(b"x", timeout_s=60)
    ended = asyncio.ensure_future(outcome(proposal))
    await asyncio.sleep(3)
    assert ended.done(), "the proposal hangs"
    assert isinstance(ended.result(), OutcomeUnknown)


@hazard(lambda patch: patch.setattr(Proposals, "expire", lambda self, now: None))
async def proposal_ends_at_its_deadline():
    lab = Lab(leader_fallback_s=60.0)
    leader = await lab.start()
    await lab.settle()
    lab.hub.isolate(leader.node_id)
    ended = asyncio.ensure_future(outcome(leader.engine.propose(b"x", timeout_s=0.5)))
    await asyncio.sleep(1)
    assert ended.done(), "the proposal hangs past its deadline"
    assert isinstance(ended.result(), OutcomeUnknown)


# --- apply ----------------------------------------------------------------------------------------


@hazard(lambda patch: patch.setattr(PySyncObjEngine, "_fail", lambda self, error: None))
async def failing_apply_is_not_retried():
    lab = Lab(1)
    leader = await lab.start()
    await leader.engine.propose(b"fine", timeout_s=SECOND)
    leader.state.fail_on = b"poison"
    calls = leader.state.apply_calls
    await outcome(leader.engine.propose(b"poison", timeout_s=0.5))
    await asyncio.sleep(0.5)
    assert leader.state.apply_calls == calls + 1
    assert len(leader.fatal) == 1
    assert leader.state.payloads() == [b"fine"]


def _forget_applied(patch: Patch) -> None:
    original = RaftStorage.__init__

    def forget(self: RaftStorage, *arguments: Any) -> None:
        original(self, *arguments)
        self.applied_index_at_start = 1

    patch.setattr(RaftStorage, "__init__", forget)


@hazard(_forget_applied)
async def restart_applies_nothing_twice():
    lab = Lab(1)
    node = await lab.start()
    for number in range(5):
        await node.engine.propose(b"%d" % number, timeout_s=SECOND)
    await node.restart()
    await outcome(lab.until(node.engine.is_leader, 3))
    assert node.state.payloads() == [b"%d" % number for number in range(5)]
    assert not node.fatal


@hazard(lambda patch: patch.setattr(Journal, "durable_index", property(
    lambda self: self.last_index, lambda self, value: None), raising=False))
async def nothing_is_applied_that_the_journal_could_lose():
    """The store may be flushed before the journal: it must never be ahead of it."""
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    follower = lab.others(leader)[0]
    follower.offload.holding = True
    applied = follower.state.applied_index
    await leader.engine.propose(b"x", timeout_s=SECOND)
    await asyncio.sleep(0.3)
    assert leader.state.applied_index > applied
    assert follower.state.applied_index == applied


@hazard(lambda patch: patch.setattr(
    "elastickv.raft.applying._entry",
    lambda command, index, term: Entry(index, term, command[1:])))
async def entry_of_an_unknown_kind_is_not_skipped():
    lab = Lab(1)
    node = await lab.start()
    applied = node.state.applied_index
    node.core.append(b"\x07from the future")
    node.engine._schedule()
    await asyncio.sleep(0.1)
    assert node.state.applied_index == applied
    assert [type(error) for error in node.fatal] == [ApplyHalted]


# --- a disk from the past -------------------------------------------------------------------------


def _believe_every_disk(patch: Patch) -> None:
    from elastickv.raft import trust
    patch.setattr(trust, "what_was_lost", lambda remembered, own, **_: "")


@hazard(_believe_every_disk)
async def node_with_an_old_disk_elects_nobody_who_lacks_its_entries():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    forgetful, lagging = lab.others(leader)
    backup, applied = forgetful.disk.copy(), forgetful.state.applied_index
    lab.hub.isolate(lagging.node_id)
    await leader.engine.propose(b"acknowledged", timeout_s=SECOND)
    forgetful.kill()
    forgetful.put_back(backup, applied)
    await forgetful.start()
    await asyncio.sleep(0.01)
    # Now the only other copy is out of reach, and the one that lacks the entry comes back.
    lab.hub.isolate(leader.node_id)
    lab.hub.cut_pairs.discard(frozenset((forgetful.node_id, lagging.node_id)))
    lab.hub.connect_all()
    await asyncio.sleep(10)
    assert not any(node.core.is_leading() for node in (forgetful, lagging)), \
        "elected without an acknowledged entry"
    lab.hub.heal()
    await lab.settle()
    assert all(b"acknowledged" in node.state.payloads() for node in lab.nodes.values())
    await lab.until(lambda: not forgetful.engine._trust.suspect)


@hazard(_believe_every_disk)
async def node_with_an_old_disk_votes_only_once_in_a_term():
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    voter, candidate = lab.others(leader)
    backup, applied = voter.disk.copy(), voter.state.applied_index
    lab.hub.isolate(leader.node_id)
    await lab.leader([voter, candidate])
    elected = voter if voter.core.is_leading() else candidate
    if elected is voter:
        await voter.engine.transfer_leadership(candidate.node_id, timeout_s=SECOND)
        await lab.until(candidate.engine.is_leader)
    term = candidate.status().term
    voter.kill()
    voter.put_back(backup, applied)
    await voter.start()
    await asyncio.sleep(1)
    lab.hub.log.clear()
    lab.hub.inject(candidate.node_id, voter.node_id, RequestVote(term, 10_000, term, True))
    await asyncio.sleep(0.1)
    assert not lab.hub.sent(Vote, voter.node_id), "voted twice in one term"


def _without_floor(patch: Patch) -> None:
    from elastickv.raft import trust
    patch.setattr(trust, "missing_floor", lambda remembered, own: None)


@hazard(_without_floor)
async def former_leader_with_an_old_disk_is_not_elected_without_what_it_committed():
    """Only it knew that the entry was committed; the follower that has it heard of it as of one
    that may have been lost before the fsync."""
    lab = Lab()
    leader = await lab.start()
    await lab.settle()
    holder, lagging = lab.others(leader)
    backup, applied = leader.disk.copy(), leader.state.applied_index
    lab.hub.isolate(lagging.node_id)
    lab.hub.rule = lambda s, t, m: int(not isinstance(m, AppendEntries)
                                       or m.commit_index <= applied)
    await leader.engine.propose(b"acknowledged", timeout_s=SECOND)
    leader.kill()
    lab.hub.rule = lambda s, t, m: 1
    leader.put_back(backup, applied)
    await leader.start()
    await asyncio.sleep(0.01)
    lab.hub.isolate(holder.node_id)
    lab.hub.cut_pairs.discard(frozenset((leader.node_id, lagging.node_id)))
    lab.hub.connect_all()
    await asyncio.sleep(10)
    assert not any(node.core.is_leading() for node in (leader, lagging)), \
        "elected without an acknowledged entry"
    lab.hub.heal()
    await lab.leader()
    await lab.settle()
    assert all(b"acknowledged" in node.state.payloads() for node in lab.nodes.values())


# --- the two runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HAZARDS, ids=[case.name for case in HAZARDS])
def test_fix_holds(case):
    run(case.scenario())


@pytest.mark.parametrize("case", HAZARDS, ids=[case.name for case in HAZARDS])
def test_scenario_notices_when_the_fix_is_off(case, monkeypatch):
    case.switch_off(monkeypatch)
    with pytest.raises(AssertionError):
        run(case.scenario())


def test_held_offload_keeps_the_order():
    offload, done = HeldOffload(), []
    offload.holding = True
    for number in range(3):
        offload.submit(lambda: None, lambda error, number=number: done.append(number))
    assert done == []
    offload.release()
    assert done == [0, 1, 2]
