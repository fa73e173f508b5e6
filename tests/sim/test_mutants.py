"""Planted bugs: the simulator must find each within 500 seeds.

A mutant is a patch of the shipped code that brings back one hazard of DESIGN.md. It is searched for
with the plans that everybody else gets, only with the faults narrowed to those that can show it, so
that the search is short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import elastickv.store.snapshot as snapshot_module
from elastickv.crypto.nonce import NonceFactory
from elastickv.errors import WireError
from elastickv.kv.writers import WriterRegistrar
from elastickv.raft import rules
from elastickv.raft.hardstate import HardState, HardStateFile
from elastickv.raft.pysyncobj_core import RaftCore
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from tests.sim.plan import SIZES
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


FIVE = (5,)
"""A follower can only hold a tail that loses where two nodes are a minority."""

CRASHES = ("crash", "power-cut", "crash-at-fsync", "crash-at-send")
NETWORK = ("partition", "one-way", "flapping", "weather", "reset")

MUTANTS: dict[str, tuple[Mutate, tuple[str, ...], tuple[int, ...]]] = {
    "ack before fsync": (ack_before_fsync, CRASHES, SIZES),
    "vote not persisted": (vote_not_persisted, (*CRASHES, "one-way", "partition"), SIZES),
    "ReadIndex skipped": (read_index_skipped, NETWORK, SIZES),
    "match index across terms": (match_index_across_terms, ("partition", "transfer", "pause"),
                                 FIVE),
    "truncation of matching entries": (truncation_of_matching_entries, (*NETWORK, "pause"), SIZES),
    "nonce epoch not bumped": (nonce_epoch_not_bumped, CRASHES, SIZES),
    "apply twice": (apply_twice, CRASHES, SIZES),
    "snapshot without applied index": (snapshot_without_applied_index, ("long-absence", "crash"),
                                       SIZES),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(MUTANTS))
def test_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, faults, sizes = MUTANTS[name]
    mutate(monkeypatch)
    for seed in range(MAX_SEEDS):
        if run_seed(seed, enabled=faults, sizes=sizes).violation:
            return
    pytest.fail(f"{name}: not found within {MAX_SEEDS} seeds")
