"""The rules for encryption entries: state and entry in, everything that will change out.

`plan` either returns the complete result or raises with nothing changed; it has no effects and
decides from replicated state alone, so every replica that holds the KEK comes to the same result.

Errors tell who is wrong: `EntryRejected` breaks a rule on every replica alike; `EntryNotApplicable`
says that this node lacks what others may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NamedTuple

from elastickv.crypto.envelope import MAX_KEY_ID
from elastickv.crypto.kek import WRAPPED_BYTES
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.crypto.nonce import node_id16
from elastickv.errors import (
    EncryptionConflict,
    EntryNotApplicable,
    EntryRejected,
    KekError,
    SidecarCorrupt,
)
from elastickv.keys.lifecycle import CutoverAction, step_cutover
from elastickv.keys.registry import ReadRow, decide, encode_row_value, row_key
from elastickv.keys.sidecar import Sidecar, SidecarKey
from elastickv.wire import (
    Bootstrap,
    EncryptionEntry,
    Entry,
    Registration,
    RegistryRow,
    Rotation,
    RotationTag,
)

Unwrap = Callable[[bytes, int, Purpose], KeyHandle]


@dataclass(frozen=True, slots=True)
class KeyState:
    """What a node knows of the keys; both parts change together."""

    sidecar: Sidecar | None
    keystore: Keystore


class Plan(NamedTuple):
    """The state after an entry, and the registry rows `(key, value)` it writes."""

    state: KeyState
    rows: list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the rules may ask for; none of it changes anything."""

    read_row: ReadRow
    unwrap: Unwrap
    created: str


def plan(state: KeyState, index: int, entry: EncryptionEntry, inputs: Inputs) -> Plan:
    """Everything that `entry`, committed at `index`, changes.

    Raises `EntryRejected` or `EntryNotApplicable`, and `SidecarCorrupt` when the sidecar claims the
    entry and does not hold its keys.
    """
    if isinstance(entry, Registration):
        return Plan(state, plan_rows((entry.row,), inputs.read_row))
    if state.sidecar is not None and index <= state.sidecar.raft_applied_index:
        return Plan(state, plan_rows(_replayed_rows(state, state.sidecar, index, entry, inputs),
                                     inputs.read_row))
    if isinstance(entry, Bootstrap):
        return _plan_bootstrap(state, index, entry, inputs)
    return _ROTATIONS[entry.tag](state, index, entry, inputs)


# --- registry rows ---------------------------------------------------------------------------


def plan_rows(rows: Sequence[RegistryRow], read_row: ReadRow) -> list[tuple[bytes, bytes]]:
    """Run rows through the registry cases in order; a later row sees what an earlier one wrote.

    Raises as `registry.decide` does.
    """
    written: dict[bytes, bytes] = {}
    for row in rows:
        key = row_key(row.dek_id, node_id16(row.full_node_id))
        existing = written[key] if key in written else read_row(key)
        record = decide(existing, row)
        if record is not None:
            written[key] = encode_row_value(record)
    return list(written.items())


def _replayed_rows(state: KeyState, sidecar: Sidecar, index: int, entry: Bootstrap | Rotation,
                   inputs: Inputs) -> tuple[RegistryRow, ...]:
    """The rows of an entry that the sidecar already holds."""
    for dek_id, purpose, wrapped in _keys_of(entry):
        _require_replayed(state.keystore, sidecar, index, dek_id, purpose, wrapped, inputs)
    if isinstance(entry, Bootstrap):
        return entry.rows
    if entry.tag is RotationTag.ROTATE_DEK:
        return (entry.proposer,)
    # Only the cutover that took effect registered its proposer; a stale or repeated one did not.
    cutovers = _cutover_indexes(sidecar)
    if entry.tag not in cutovers:
        raise _unsupported(entry.tag)
    return (entry.proposer,) if cutovers[entry.tag] == index else ()


def _cutover_indexes(sidecar: Sidecar) -> dict[RotationTag, int]:
    return {RotationTag.ENABLE_STORAGE_ENVELOPE: sidecar.storage_envelope_cutover_index,
            RotationTag.ENABLE_RAFT_ENVELOPE: sidecar.raft_envelope_cutover_index}


def is_as_claimed(sidecar: Sidecar, index: int, entry: Entry) -> bool:
    """Whether `entry` can be what a sidecar that `claims` entry `index` says that it is."""
    if not isinstance(entry, Bootstrap | Rotation):
        return False
    tag = entry.tag if isinstance(entry, Rotation) else None
    return all(tag is cutover for cutover, at in _cutover_indexes(sidecar).items() if at == index)


def _require_replayed(keystore: Keystore, sidecar: Sidecar, index: int, dek_id: int,
                      purpose: Purpose, wrapped: bytes, inputs: Inputs) -> None:
    held, handle = sidecar.keys.get(dek_id), keystore.get(dek_id)
    if held is None or handle is None:
        raise SidecarCorrupt(
            f"the sidecar claims entry {index} but lacks its key {dek_id}",
            remedy="restore it with elastickv admin encryption resync-sidecar")
    # A later rotation to this DEK may have brought another wrapping, but no other key.
    if held.wrapped != wrapped \
            and not handle.same_key(_unwrap(dek_id, purpose, wrapped, inputs)):
        raise SidecarCorrupt(
            f"the sidecar claims entry {index} but holds another key as DEK {dek_id}",
            remedy="move it away, and the leader's is taken over at the next start; if somebody "
                   "else could write to this disk, join the node anew")


# --- keys ------------------------------------------------------------------------------------


def _check_new_key(dek_id: int, wrapped: bytes) -> None:
    if not 1 <= dek_id <= MAX_KEY_ID:
        raise EntryRejected(f"DEK id {dek_id} is never a key")
    if len(wrapped) != WRAPPED_BYTES:
        raise EntryRejected(f"DEK {dek_id} is wrapped in {len(wrapped)} bytes,"
                            f" must be {WRAPPED_BYTES}")


def _install(keystore: Keystore, dek_id: int, purpose: Purpose, wrapped: bytes,
             inputs: Inputs) -> Keystore:
    """The keystore with one more DEK: a new key under a new id, or what is held already."""
    _check_new_key(dek_id, wrapped)
    handle = _unwrap(dek_id, purpose, wrapped, inputs)
    try:
        return keystore.with_key(handle)
    except EncryptionConflict as error:
        raise EntryRejected(error.message, remedy=error.remedy) from None


def _unwrap(dek_id: int, purpose: Purpose, wrapped: bytes, inputs: Inputs) -> KeyHandle:
    try:
        return inputs.unwrap(wrapped, dek_id, purpose)
    except KekError as error:
        raise EntryNotApplicable(f"DEK {dek_id} does not unwrap: {error.message}",
                                 remedy=error.remedy) from None


def _record_key(sidecar: Sidecar, dek_id: int, purpose: Purpose, wrapped: bytes,
                created: str) -> Sidecar:
    """The sidecar with a DEK in it. Its `local_epoch` is this node's own and never goes back."""
    known = sidecar.keys.get(dek_id)
    if known is None:
        key = SidecarKey(purpose, wrapped, created, 0)
    else:
        key = replace(known, purpose=purpose, wrapped=wrapped)
    return sidecar.with_key(dek_id, key)


def _checked(sidecar: Sidecar, index: int) -> Sidecar:
    """The resulting sidecar, refused here if it could not be written."""
    result = replace(sidecar, raft_applied_index=max(index, sidecar.raft_applied_index))
    try:
        result.validate()
    except SidecarCorrupt as error:
        raise EntryRejected(f"entry {index} would leave a contradictory sidecar: {error.message}"
                            ) from None
    return result


# --- bootstrap -------------------------------------------------------------------------------


def _plan_bootstrap(state: KeyState, index: int, entry: Bootstrap, inputs: Inputs) -> Plan:
    if entry.storage_dek_id == entry.raft_dek_id:
        raise EntryRejected(f"bootstrap names DEK {entry.storage_dek_id} for both purposes")
    for row in entry.rows:
        if row.dek_id not in (entry.storage_dek_id, entry.raft_dek_id):
            raise EntryRejected(f"bootstrap registers a writer of DEK {row.dek_id},"
                                " which it does not make")
    sidecar = state.sidecar or Sidecar()
    if sidecar.bootstrapped:
        _check_repeated_bootstrap(sidecar, entry)
    keystore = state.keystore
    for dek_id, purpose, wrapped in _keys_of(entry):
        keystore = _install(keystore, dek_id, purpose, wrapped, inputs)
        sidecar = _record_key(sidecar, dek_id, purpose, wrapped, inputs.created)
    sidecar = replace(sidecar, active_storage=entry.storage_dek_id, active_raft=entry.raft_dek_id)
    return Plan(KeyState(_checked(sidecar, index), keystore),
                plan_rows(entry.rows, inputs.read_row))


def _keys_of(entry: Bootstrap | Rotation) -> tuple[tuple[int, Purpose, bytes], ...]:
    """The DEKs that an entry brings, each wrapped; a cutover brings none."""
    if isinstance(entry, Rotation):
        return (((entry.dek_id, _purpose(entry), entry.wrapped),)
                if entry.tag is RotationTag.ROTATE_DEK else ())
    return ((entry.storage_dek_id, Purpose.STORAGE, entry.wrapped_storage),
            (entry.raft_dek_id, Purpose.RAFT, entry.wrapped_raft))


def _check_repeated_bootstrap(sidecar: Sidecar, entry: Bootstrap) -> None:
    """A repeated bootstrap may only say what is so already; its rows may still be new."""
    if (entry.storage_dek_id, entry.raft_dek_id) != (sidecar.active_storage, sidecar.active_raft):
        raise EntryRejected(
            f"already bootstrapped: DEK {sidecar.active_storage} (storage) and"
            f" {sidecar.active_raft} (raft) are active", remedy="use rotate-dek for a new key")
    if (entry.wrapped_storage != sidecar.keys[entry.storage_dek_id].wrapped
            or entry.wrapped_raft != sidecar.keys[entry.raft_dek_id].wrapped):
        raise EntryRejected("already bootstrapped with other key material under the same ids",
                            remedy="use rotate-dek for a new key")


# --- rotation and cutovers -------------------------------------------------------------------


def _unsupported(tag: RotationTag) -> EntryRejected:
    return EntryRejected(f"{tag.name} is not supported by this build",
                         remedy="upgrade every node before using it")


def _check_proposer(entry: Rotation) -> None:
    if entry.proposer.dek_id != entry.dek_id:
        raise EntryRejected(f"{entry.tag.name} of DEK {entry.dek_id} registers its proposer for"
                            f" DEK {entry.proposer.dek_id}")


def _purpose(entry: Rotation) -> Purpose:
    try:
        return Purpose(entry.purpose)
    except ValueError:
        raise EntryRejected(f"{entry.tag.name} has unknown purpose 0x{entry.purpose:02x}") from None


def _require_sidecar(state: KeyState, entry: Rotation) -> Sidecar:
    if state.sidecar is None or not state.sidecar.bootstrapped:
        raise EntryRejected(f"{entry.tag.name} before the bootstrap",
                            remedy="run elastickv admin encryption bootstrap first")
    return state.sidecar


def _plan_rotate_dek(state: KeyState, index: int, entry: Rotation, inputs: Inputs) -> Plan:
    purpose = _purpose(entry)
    _check_proposer(entry)
    sidecar = _require_sidecar(state, entry)
    keystore = _install(state.keystore, entry.dek_id, purpose, entry.wrapped, inputs)
    sidecar = _record_key(sidecar, entry.dek_id, purpose, entry.wrapped, inputs.created)
    if purpose is Purpose.STORAGE:
        sidecar = replace(sidecar, active_storage=entry.dek_id)
    else:
        sidecar = replace(sidecar, active_raft=entry.dek_id)
    return Plan(KeyState(_checked(sidecar, index), keystore),
                plan_rows((entry.proposer,), inputs.read_row))


_CUTOVER_PURPOSE: Final = {RotationTag.ENABLE_STORAGE_ENVELOPE: Purpose.STORAGE,
                           RotationTag.ENABLE_RAFT_ENVELOPE: Purpose.RAFT}


def _plan_cutover(state: KeyState, index: int, entry: Rotation, inputs: Inputs) -> Plan:
    purpose = _purpose(entry)
    if purpose is not _CUTOVER_PURPOSE[entry.tag]:
        raise EntryRejected(f"{entry.tag.name} has purpose {purpose.label}")
    if entry.wrapped:
        raise EntryRejected(f"{entry.tag.name} carries {len(entry.wrapped)} bytes of key material")
    _check_proposer(entry)
    sidecar = _require_sidecar(state, entry)
    action = step_cutover(sidecar.is_cut_over(purpose), entry.dek_id == sidecar.active(purpose))
    if action is CutoverAction.NOTHING:
        return Plan(KeyState(_checked(sidecar, index), state.keystore), [])
    if purpose is Purpose.STORAGE:
        sidecar = replace(sidecar, storage_envelope_active=True,
                          storage_envelope_cutover_index=index)
    else:
        sidecar = replace(sidecar, raft_envelope_cutover_index=index)
    return Plan(KeyState(_checked(sidecar, index), state.keystore),
                plan_rows((entry.proposer,), inputs.read_row))


def _plan_unsupported(state: KeyState, index: int, entry: Rotation, inputs: Inputs) -> Plan:
    raise _unsupported(entry.tag)


_ROTATIONS: Final[Mapping[RotationTag, Callable[[KeyState, int, Rotation, Inputs], Plan]]] = \
    MappingProxyType({
        RotationTag.ROTATE_DEK: _plan_rotate_dek,
        RotationTag.REWRAP_DEKS: _plan_unsupported,
        RotationTag.RETIRE_DEK: _plan_unsupported,
        RotationTag.ENABLE_STORAGE_ENVELOPE: _plan_cutover,
        RotationTag.ENABLE_RAFT_ENVELOPE: _plan_cutover,
    })
