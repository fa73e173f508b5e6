"""Planted bugs: the simulator must find each within 500 seeds.

A mutant is a patch of the shipped code that breaks one of the engine's invariants
(docs/internals/engine.md) or another promise. It is searched for with the plans that `make sim`
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import elastickv.store.snapshot as snapshot_module
from elastickv.crypto.nonce import NonceFactory
from elastickv.errors import OutcomeUnknown, Unreachable, WireError
from elastickv.kv.fsm import KvStateMachine
from elastickv.kv.sealing import Sealing, _plain_sealer
from elastickv.kv.writers import WriterEvent, WriterRegistrar
from elastickv.raft import pysyncobj_engine, readindex, rules, storage, trust
from elastickv.raft.elections import Elections
from elastickv.raft.hardstate import HardState, HardStateFile
from elastickv.raft.journal import Journal
from elastickv.raft.pysyncobj_core import RaftCore
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.readindex import ReadRounds, Waiter
from elastickv.raft.replication import Replication
from elastickv.raft.segment import Segment
from tests.sim.schedule import run_seed

MAX_SEEDS = 500

Mutate = Callable[[pytest.MonkeyPatch], None]


def ack_before_fsync(patch: pytest.MonkeyPatch) -> None:
    """A follower acknowledges what it has not synced."""
    patch.setattr(rules, "acknowledged_index", lambda match_index, durable_index: match_index)


def vote_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """Term and vote live in memory only; the boot counter is kept."""
    real_save = HardStateFile._save

    def save(self: HardStateFile, state: HardState) -> None:
        if state.boot_epoch != self.state.boot_epoch:
            real_save(self, state)
        self.state = state

    patch.setattr(HardStateFile, "_save", save)


def read_index_skipped(patch: pytest.MonkeyPatch) -> None:
    """A node serves what it has applied, without asking anybody."""

    async def read_index(self: PySyncObjEngine, *, timeout_s: float) -> int:
        return self._core.applied_index()

    patch.setattr(PySyncObjEngine, "read_index", read_index)


def match_index_across_terms(patch: pytest.MonkeyPatch) -> None:
    """A leader believes what followers acknowledged to it in an earlier term."""
    become_leader = RaftCore._SyncObj__onBecomeLeader

    def keep(self: Any) -> None:
        known = dict(self._SyncObj__raftMatchIndex)
        become_leader(self)
        for node, index in known.items():
            if node in self._SyncObj__raftMatchIndex:
                self._SyncObj__raftMatchIndex[node] = index

    patch.setattr(RaftCore, "_SyncObj__onBecomeLeader", keep)


def truncation_of_matching_entries(patch: pytest.MonkeyPatch) -> None:
    """Everything behind the previous entry of a message is dropped, as the library does."""
    plan_append = rules.plan_append

    def untrimmed(log: Any, committed: int, previous_index: int, previous_term: int,
                  entries: Any, leader_commit: int) -> rules.AppendPlan:
        plan = plan_append(log, committed, previous_index, previous_term, entries, leader_commit)
        if not plan.accepted or not entries or previous_index < log.anchor_index:
            return plan
        return plan._replace(previous_index=previous_index, previous_term=previous_term,
                             entries=entries, truncates=previous_index < log.last_index)

    patch.setattr(rules, "plan_append", untrimmed)


def nonce_epoch_not_bumped(patch: pytest.MonkeyPatch) -> None:
    """Every process counts under the same epoch."""
    confirmed = WriterRegistrar._confirmed

    def same_epoch(self: Any, dek_id: int, epoch: int) -> None:
        confirmed(self, dek_id, epoch)
        self._factories[dek_id] = NonceFactory(self._node_id16, 1)

    patch.setattr(WriterRegistrar, "_confirmed", same_epoch)


def apply_twice(patch: pytest.MonkeyPatch) -> None:
    """What is applied is not noted, as after an error in a callback of the library."""
    advance = RaftCore.advance_applied

    def sometimes(self: Any, index: int) -> None:
        if index % 20:
            advance(self, index)

    patch.setattr(RaftCore, "advance_applied", sometimes)


def snapshot_without_applied_index(patch: pytest.MonkeyPatch) -> None:
    """An installed state does not say how far it goes."""
    finish = snapshot_module.StoreImport.finish

    def forgetful(self: Any) -> int:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(snapshot_module, "APPLIED_INDEX", b"forgotten")
            try:
                return finish(self)
            except KeyError:
                raise WireError("unreachable") from None

    patch.setattr(snapshot_module.StoreImport, "finish", forgetful)


def own_term_not_required(patch: pytest.MonkeyPatch) -> None:
    """A leader commits entries of earlier terms by counting (Raft, section 5.4.2)."""

    def apply_log_entries(self: Any) -> bool:
        if self.is_leading():
            matches = self._SyncObj__raftMatchIndex
            acknowledged = sorted([self._journal.durable_index, *(
                matches[node] for node in self._SyncObj__otherNodes)], reverse=True)
            self._committed_index = max(self._committed_index, min(
                acknowledged[len(acknowledged) // 2], self._journal.durable_index))
            self._SyncObj__raftCommitIndex = self._committed_index
        self._hooks.apply_committed()
        return False

    patch.setattr(RaftCore, "_SyncObj__applyLogEntries", apply_log_entries)


def leader_counts_itself_at_once(patch: pytest.MonkeyPatch) -> None:
    """A leader counts itself before its fsync, as the library does."""
    committed_index = rules.committed_index
    patch.setattr(rules, "committed_index", lambda previous, last_index, durable_index, *rest:
                  committed_index(previous, last_index, last_index, *rest))


def read_before_own_entry(patch: pytest.MonkeyPatch) -> None:
    """A new leader reads before it has committed an entry of its term."""
    patch.setattr(RaftCore, "noop_index", lambda self: 0)


def reads_join_a_running_round(patch: pytest.MonkeyPatch) -> None:
    """A read is confirmed by probes that were sent before it arrived."""

    def add(self: ReadRounds, waiter: Waiter) -> int:
        ticket = next(self._tickets)
        (self._running if self.active else self._waiting)[ticket] = waiter
        return ticket

    patch.setattr(ReadRounds, "add", add)


def leader_confirms_itself(patch: pytest.MonkeyPatch) -> None:
    """A leader's own answer is enough for a read."""
    patch.setattr(readindex, "has_majority", lambda count, voters: True)


def no_pre_vote(patch: pytest.MonkeyPatch) -> None:
    """A deadline that passed is an election."""
    patch.setattr(Elections, "before_tick", lambda self: None)


def vote_for_any_log(patch: pytest.MonkeyPatch) -> None:
    """A vote does not depend on the candidate's log."""
    patch.setattr(rules, "log_is_current", lambda *positions: True)
    receive = RaftCore.receive_vote_request
    patch.setattr(RaftCore, "receive_vote_request",
                  lambda self, peer_id, term, index, last_term: receive(
                      self, peer_id, term, 1 << 40, 1 << 40))


def vote_twice(patch: pytest.MonkeyPatch) -> None:
    """A vote that was given is forgotten at once."""
    receive = RaftCore.receive_vote_request

    def forget(self: Any, peer_id: str, term: int, index: int, last_term: int) -> None:
        self._SyncObj__votedForNodeId = None
        receive(self, peer_id, term, index, last_term)

    patch.setattr(RaftCore, "receive_vote_request", forget)


def learner_counts(patch: pytest.MonkeyPatch) -> None:
    """A learner votes and is counted."""
    set_members = RaftCore.set_members
    patch.setattr(RaftCore, "set_members", lambda self, voters, learners: set_members(
        self, [*voters, *learners], ()))


def only_voters_vote(patch: pytest.MonkeyPatch) -> None:
    """A member that has not heard that it is a voter refuses its vote."""
    on_pre_vote = Elections.on_pre_vote

    def refuse(self: Elections, peer_id: str, message: Any) -> None:
        if self._context.core.is_voter():
            on_pre_vote(self, peer_id, message)

    patch.setattr(Elections, "on_pre_vote", refuse)


def configuration_outlives_the_log(patch: pytest.MonkeyPatch) -> None:
    """A snapshot takes the place of the log, and not of the configurations that were in it."""
    patch.setattr(storage, "follow_log", lambda membership, journal: None)


def peer_memory_ignored(patch: pytest.MonkeyPatch) -> None:
    """Nobody tells a node that its disk is an old copy."""
    patch.setattr(trust, "what_was_lost", lambda remembered, own, **_: "")
    patch.setattr(trust, "missing_floor", lambda remembered, own: None)


def snapshot_keeps_the_log(patch: pytest.MonkeyPatch) -> None:
    """The old log stays behind an installed snapshot."""
    patch.setattr(storage, "holds_entry", lambda log, index, term: True)


def state_ahead_of_the_log_takes_part(patch: pytest.MonkeyPatch) -> None:
    """A full disk between the steps of an installation changes nothing for the node."""
    real_connected = PySyncObjEngine.connected

    def connected(self: PySyncObjEngine, peer_id: str, hello: Any) -> None:
        receiver = self._receiver
        marker, receiver._cut_short = receiver._cut_short, None
        try:
            real_connected(self, peer_id, hello)
        finally:
            receiver._cut_short = marker

    patch.setattr(PySyncObjEngine, "_takes_part", lambda self: self._active)
    patch.setattr(PySyncObjEngine, "connected", connected)


def failed_fsync_goes_on(patch: pytest.MonkeyPatch) -> None:
    """An error of fsync is taken for success."""
    finish_sync = Journal.finish_sync
    patch.setattr(Journal, "finish_sync",
                  lambda self, ticket, error=None: finish_sync(self, ticket))


def no_fsync(patch: pytest.MonkeyPatch) -> None:
    """The journal is never synced."""
    begin_sync = Journal.begin_sync
    patch.setattr(Journal, "begin_sync", lambda self: (lambda: None, begin_sync(self)[1]))


def log_dropped_too_early(patch: pytest.MonkeyPatch) -> None:
    """Compaction does not wait for the state to be durable."""
    target = pysyncobj_engine.compaction_target
    patch.setattr(pysyncobj_engine, "compaction_target", lambda size, settings: target(
        size._replace(durable_state_index=size.last_index), settings))


def writer_not_registered(patch: pytest.MonkeyPatch) -> None:
    """A node seals under an epoch that it has not registered."""

    async def accepted(self: WriterRegistrar, dek_id: int, epoch: int) -> tuple[WriterEvent, int]:
        return WriterEvent.ACCEPTED, 0

    patch.setattr(WriterRegistrar, "_ask", accepted)


def values_not_sealed(patch: pytest.MonkeyPatch) -> None:
    """Values stay in the clear after the storage cutover."""
    patch.setattr(Sealing, "record_sealer", lambda self, count=1: _plain_sealer)


def unknown_outcome_is_retried(patch: pytest.MonkeyPatch) -> None:
    """A forwarded write whose answer was lost is sent again."""
    call = PySyncObjEngine.call

    async def forgetful(self: PySyncObjEngine, *arguments: Any, **options: Any) -> bytes:
        try:
            return await call(self, *arguments, **options)
        except OutcomeUnknown as error:
            raise Unreachable(error.message) from None

    patch.setattr(PySyncObjEngine, "call", forgetful)


def conditions_ignored(patch: pytest.MonkeyPatch) -> None:
    """A compare-and-set compares nothing."""
    patch.setattr(KvStateMachine, "_conditions_hold", lambda *arguments: True)


def commit_announced_to_anybody(patch: pytest.MonkeyPatch) -> None:
    """A leader tells a peer what is committed without asking whether it is a member still."""

    def announce_to(self: Replication, peer_id: str) -> None:
        progress, next_index = self.progress(peer_id), self._core.next_index(peer_id)
        if not progress.probing and progress.sent_commit < self._core.commit_index():
            self._send_append(peer_id, progress, next_index, empty=True)

    patch.setattr(Replication, "announce_to", announce_to)


def page_cache_believed(patch: pytest.MonkeyPatch) -> None:
    """A start takes for durable what the process before it has written."""
    patch.setattr(Segment, "make_tail_durable", lambda self, synced: None)


def full_disk_ends_the_node(patch: pytest.MonkeyPatch) -> None:
    """A node that runs ends when its disk is full."""
    patch.setattr(PySyncObjEngine, "_note_full_disk", lambda self, error: self._fail(error))


MUTANTS: dict[str, Mutate] = {
    "ack before fsync": ack_before_fsync,
    "vote not persisted": vote_not_persisted,
    "ReadIndex skipped": read_index_skipped,
    "match index across terms": match_index_across_terms,
    "truncation of matching entries": truncation_of_matching_entries,
    "nonce epoch not bumped": nonce_epoch_not_bumped,
    "apply twice": apply_twice,
    "snapshot without applied index": snapshot_without_applied_index,
    "own term not required": own_term_not_required,
    "leader counts itself at once": leader_counts_itself_at_once,
    "read before own entry": read_before_own_entry,
    "reads join a running round": reads_join_a_running_round,
    "leader confirms itself": leader_confirms_itself,
    "no pre-vote": no_pre_vote,
    "vote for any log": vote_for_any_log,
    "vote twice": vote_twice,
    "learner counts": learner_counts,
    "only voters vote": only_voters_vote,
    "configuration outlives the log": configuration_outlives_the_log,
    "peer memory ignored": peer_memory_ignored,
    "snapshot keeps the log": snapshot_keeps_the_log,
    "state ahead of the log takes part": state_ahead_of_the_log_takes_part,
    "failed fsync goes on": failed_fsync_goes_on,
    "no fsync": no_fsync,
    "log dropped too early": log_dropped_too_early,
    "writer not registered": writer_not_registered,
    "values not sealed": values_not_sealed,
    "unknown outcome is retried": unknown_outcome_is_retried,
    "conditions ignored": conditions_ignored,
    "commit announced to anybody": commit_announced_to_anybody,
    "page cache believed": page_cache_believed,
    "full disk ends the node": full_disk_ends_the_node,
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(MUTANTS))
def test_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    for seed in range(MAX_SEEDS):
        if violation := run_seed(seed).violation:
            # A patch that does not fit any more breaks every seed by itself.
            assert "TypeError" not in violation and "AttributeError" not in violation, violation
            return
    pytest.fail(f"{name}: not found within {MAX_SEEDS} seeds")
