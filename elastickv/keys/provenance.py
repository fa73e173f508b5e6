"""Whether a sidecar is of the log that a node applies. Pure.

A sidecar of another cluster, or of a state that a restored cluster never came to, looks like one
that is ahead of its store. What the store has recorded tells them apart, at the start, when a
snapshot brings another state, and when the node is to lead: every key entry records its index, the
cutovers and a copy of the sidecar together with its other effects, and snapshots carry all three.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from elastickv.crypto.kek import Kek
from elastickv.errors import KekError
from elastickv.keys.sidecar import Sidecar


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a store or a snapshot says of the log's key entries, up to `applied_index`.

    `sidecar` is the copy that the last of them left: None without one, or when a version that kept
    no copy applied it. As a log is replayed the copy may be ahead of the store.
    """

    applied_index: int = 0
    last_encryption_index: int = 0
    raft_cutover_index: int = 0
    sidecar: Sidecar | None = None


class Contradiction(NamedTuple):
    """Why a sidecar is not of a log. `of_cutover`: the indexes of a cutover alone differ."""

    message: str
    of_cutover: bool = False


def contradiction(sidecar: Sidecar, recorded: Recorded,
                  rewrapped: Collection[int] = ()) -> Contradiction | None:
    """Why `sidecar` cannot be of the log that `recorded` comes from; None while it can be.

    `rewrapped` are the DEKs that it and `recorded.sidecar` hold in different wrappings of one key.
    """
    # Beyond what is applied the sidecar may be ahead: replay decides.
    if recorded.last_encryption_index < sidecar.raft_applied_index <= recorded.applied_index:
        return Contradiction(
            f"the sidecar stands at index {sidecar.raft_applied_index}; the log up to"
            f" {recorded.applied_index} has no encryption entry after"
            f" {recorded.last_encryption_index}: it is not of this log")
    strange = _strange_keys(sidecar, recorded.sidecar, rewrapped)
    if strange:
        return Contradiction(f"sidecar and log disagree on DEK {min(strange)}: the sidecar is"
                             " not of this log")
    for name, own, logged in (
            ("raft", sidecar.raft_envelope_cutover_index, recorded.raft_cutover_index),
            ("storage", _storage_cutover(sidecar), _recorded_storage_cutover(recorded))):
        # Each is what it is for good from its own entry on; no sidecar tells of one to come.
        if own != logged and own is not None and logged is not None and (
                0 < own <= recorded.applied_index or own > sidecar.raft_applied_index
                or 0 < logged <= sidecar.raft_applied_index):
            return Contradiction(f"the log says the {name} cutover is at index {logged}, the"
                                 f" sidecar {own}", of_cutover=True)
    return None


def may_have_refused(sidecar: Sidecar, recorded: Recorded) -> bool:
    """Whether a node that ran with `sidecar` may have refused writes that its log's other replicas
    applied: those behind a storage cutover that its store does not know."""
    if not sidecar.storage_envelope_active \
            or sidecar.storage_envelope_cutover_index >= recorded.applied_index:
        return False
    stored = recorded.sidecar
    return stored is None or not stored.storage_envelope_active or (
        stored.storage_envelope_cutover_index != sidecar.storage_envelope_cutover_index)


def rewrapped(kek: Kek | None, one: Sidecar | None, other: Sidecar | None) -> set[int]:
    """DEKs that are the same key in different wrappings: a rotation to a DEK that is known already
    may bring another one, whatever its purpose was."""
    if kek is None or one is None or other is None:
        return set()
    found = set()
    for dek_id in one.keys.keys() & other.keys.keys():
        key, twin = one.keys[dek_id], other.keys[dek_id]
        if key.wrapped != twin.wrapped:
            with contextlib.suppress(KekError):
                if kek.unwrap_handle(key.wrapped, dek_id, key.purpose).same_key(
                        kek.unwrap_handle(twin.wrapped, dek_id, twin.purpose)):
                    found.add(dek_id)
    return found


def unopened(kek: Kek, sidecar: Sidecar) -> set[int]:
    """DEKs that `kek` does not open."""
    closed = set()
    for dek_id, key in sidecar.keys.items():
        try:
            kek.unwrap_handle(key.wrapped, dek_id, key.purpose)
        except KekError:
            closed.add(dek_id)
    return closed


def _strange_keys(sidecar: Sidecar, stored: Sidecar | None,
                  rewrapped: Collection[int]) -> set[int]:
    """Keys are only added, so the earlier of the two states is contained in the later one."""
    if stored is None:
        return set()
    strange: set[int] = set()
    if sidecar.raft_applied_index >= stored.raft_applied_index:
        strange |= _not_contained(stored, sidecar, rewrapped)
    if sidecar.raft_applied_index <= stored.raft_applied_index:
        strange |= _not_contained(sidecar, stored, rewrapped)
    return strange


def _not_contained(earlier: Sidecar, later: Sidecar, rewrapped: Collection[int]) -> set[int]:
    """DEK ids of `earlier` that are missing or stand for another key in `later`. A rotation in
    between may have given one of them another purpose."""
    as_far = earlier.raft_applied_index == later.raft_applied_index
    return {dek_id for dek_id, key in earlier.keys.items()
            if (held := later.keys.get(dek_id)) is None
            or (as_far and held.purpose != key.purpose)
            or (held.wrapped != key.wrapped and dek_id not in rewrapped)}


def _storage_cutover(sidecar: Sidecar) -> int | None:
    """The index of the storage cutover, 0 = none; None where version 1 did not note it."""
    index = sidecar.storage_envelope_cutover_index
    return None if sidecar.storage_envelope_active and not index else index


def _recorded_storage_cutover(recorded: Recorded) -> int | None:
    if recorded.sidecar is not None:
        return _storage_cutover(recorded.sidecar)
    return None if recorded.last_encryption_index else 0
