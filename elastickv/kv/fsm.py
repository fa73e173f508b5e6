"""The replicated state machine: one committed entry in, effects on store and keys out.

Every decision here depends only on the entry and on replicated state, never on a clock, a thread or
this node's identity, so every replica takes the same one. How many entries one call of `apply`
takes is none: the rest follows, in order. Three things can happen to an entry:

* it applies, and its result goes to whoever proposed it;
* a *request* in it is rejected (a compare-and-set condition does not hold, a plaintext value comes
  after the storage cutover): no effect, deterministic, reported to the proposer as a value;
* it cannot be applied (does not open, does not parse, is refused by the encryption rules): `apply`
  raises `ApplyHalted`, nothing of it takes effect, and the node stops.

A full disk is none of these, since it is this node's own affair: the entry is not applied *yet*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from elastickv.clock import HybridLogicalClock, timestamp_ms
from elastickv.crypto.cipher import open_raft
from elastickv.crypto.keystore import Keystore
from elastickv.errors import (
    JOIN_ANEW_REMEDY,
    ApplyHalted,
    ConditionFailed,
    CorruptionError,
    DiskFull,
    ElasticKVError,
    StorageEnvelopeRequired,
)
from elastickv.keys.applier import Applier
from elastickv.keys.guards import foreign_remedy
from elastickv.keys.provenance import Recorded
from elastickv.keys.rules import is_as_claimed
from elastickv.keys.sidecar import Sidecar, parse
from elastickv.keys.usage import apply_reservation, usage_key_of
from elastickv.kv.api import OpKind, WriteResult
from elastickv.kv.conditions import ConditionReader
from elastickv.kv.own_entries import OwnEntries
from elastickv.raft.engine import Entry
from elastickv.store.header import ENVELOPE_BITS, ENVELOPE_KEY_ID, PLAINTEXT_BITS, STATE_MASK
from elastickv.store.mvcc import visible
from elastickv.store.mvcc_store import Store, decode_number, encode_number
from elastickv.store.snapshot import HLC_CEILING, RAFT_CUTOVER_INDEX
from elastickv.wire import (
    CLEAR_OPCODES,
    EncryptionEntry,
    HlcCeiling,
    Registration,
    Reservation,
    WriteRequest,
    Writes,
    decode_entry,
)
from elastickv.wire import Entry as LogEntry

# A snapshot's header repeats these two.
META_HLC_CEILING = HLC_CEILING
META_RAFT_CUTOVER_INDEX = RAFT_CUTOVER_INDEX
META_LAST_ENCRYPTION_INDEX = b"last_encryption_index"
META_SIDECAR = b"sidecar"

MAX_OVERLAY_BYTES = 256 << 20
"""Some seconds of more writes than a disk takes flushes. Without such load it is never reached."""
MAX_OVERLAY_VERSIONS = 300_000
"""A flush sorts their keys in one call, during which the loop stands still: a tenth of a second."""

APPLY_S = 0.02
"""So long may several entries take together, an entry with conditions that have to be read from the
disk by itself. Between two such groups the engine does its other work."""

WriteOutcome = WriteResult | ElasticKVError
"""What one request of a write entry came to on every replica."""


def read_payload(payload: bytes, index: int, cutover_index: int, keystore: Keystore,
                 own_entries: OwnEntries | None = None) -> LogEntry:
    """The entry behind a log payload; from `own_entries` where it is known.

    Entries above the raft cutover are raft envelopes, with two exceptions: writer registrations
    and nonce reservations (opcodes 0x03 and 0x07, ids and counters only) may stay in the clear,
    because a cluster that restarts has nobody who may seal yet. Neither opcode is an envelope
    version, so they cannot be confused.
    Raises `CorruptionError` when the envelope does not open or the entry does not parse.
    """
    is_sealed = 0 < cutover_index < index and payload[0] not in CLEAR_OPCODES
    own = own_entries.take(payload, is_sealed=is_sealed) if own_entries is not None else None
    if own is not None:
        return own
    return decode_entry(open_raft(keystore, payload) if is_sealed else payload)


def recorded_keys(applied_index: int, meta: Callable[[bytes], bytes | None]) -> Recorded:
    """What a store's or a snapshot's facts say of the log's key entries. Raises `SidecarCorrupt`.
    """
    copy = meta(META_SIDECAR)
    return Recorded(applied_index, decode_number(meta(META_LAST_ENCRYPTION_INDEX)),
                    decode_number(meta(META_RAFT_CUTOVER_INDEX)),
                    parse(copy) if copy is not None else None)


class _NotInMemory(Exception):
    """What an entry's conditions compare with is on its way; nothing of the entry was applied."""


class KvStateMachine:
    """Applies entries to the store and the encryption state. Implements `raft.engine.StateMachine`.

    `on_keys_changed(entry_index)` is called after an encryption entry changed keys or registry.
    `own_entries` knows what this process proposed itself. `max_overlay_bytes` may wait for a flush
    before nothing more is applied: a disk that takes entries faster than the store takes their
    effects would fill the memory, and after the restart again. Entries with conditions wait for
    `condition_reader`, if there is one.
    """

    def __init__(self, store: Store, applier: Applier, hlc: HybridLogicalClock, *,
                 on_keys_changed: Callable[[int], None],
                 own_entries: OwnEntries | None = None,
                 max_overlay_bytes: int = MAX_OVERLAY_BYTES,
                 condition_reader: ConditionReader | None = None) -> None:
        self._store = store
        self._applier = applier
        self._hlc = hlc
        self._on_keys_changed = on_keys_changed
        self._own_entries = own_entries
        self._max_overlay_bytes = max_overlay_bytes
        self._condition_reader = condition_reader

    @property
    def applied_index(self) -> int:
        return self._store.applied_index

    @property
    def durable_index(self) -> int:
        return self._store.durable_index

    def may_apply(self) -> bool:
        if self._condition_reader is not None and self._condition_reader.is_busy:
            return False
        if self._store.overlay_bytes < self._max_overlay_bytes \
                and self._store.overlay_versions < MAX_OVERLAY_VERSIONS:
            return True
        self._store.require_space()
        return False

    def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        """Apply in order, as many as there is time for; none while what conditions compare with
        comes from the disk. An error leaves every entry before the failing one applied."""
        results: list[object] = []
        clock = self._hlc.clock
        ends_at_s = clock.monotonic() + APPLY_S
        for entry in entries:
            if results and clock.monotonic() >= ends_at_s:
                break
            try:
                results.append(self._apply_one(entry))
            except _NotInMemory:
                break
            except DiskFull:
                if not results:
                    raise
                break
        return results

    def _apply_one(self, entry: Entry) -> object:
        index = entry.index
        sidecar = self._applier.sidecar
        claiming = sidecar if (sidecar is not None and index <= sidecar.raft_applied_index
                               and sidecar.claims(index)) else None
        if not entry.payload:
            if claiming is not None:
                raise self._foreign(index, claiming)
            self._store.apply_group(index, ())
            return index
        try:
            cutover = sidecar.raft_envelope_cutover_index if sidecar else 0
            decoded = read_payload(entry.payload, index, cutover, self._applier.keystore,
                                   self._own_entries)
            if claiming is not None and not is_as_claimed(claiming, index, decoded):
                raise self._foreign(index, claiming)
            match decoded:
                case Writes():
                    return self._apply_writes(index, decoded.requests, sidecar)
                case HlcCeiling():
                    self._store.apply_group(
                        index, (), meta={META_HLC_CEILING: encode_number(decoded.ceiling_ts)})
                    self._hlc.observe_ceiling(decoded.ceiling_ts)
                    return index
                case Reservation():
                    self._store.apply_group(index, (), rows=[apply_reservation(
                        self._store.row(usage_key_of(decoded)), decoded)])
                    return index
                case _:
                    return self._apply_encryption(index, decoded)
        except ApplyHalted:
            raise
        except CorruptionError as error:
            raise ApplyHalted(f"entry {index} cannot be applied: {error.message}",
                              remedy=error.remedy or JOIN_ANEW_REMEDY) from None

    def _foreign(self, index: int, sidecar: Sidecar) -> ApplyHalted:
        return ApplyHalted(
            f"the sidecar claims a key entry at index {index}, and the log has another there: the"
            " sidecar is not of this log",
            remedy=foreign_remedy(sidecar, recorded_keys(self._store.applied_index,
                                                         self._store.meta)))

    def _apply_writes(self, index: int, requests: Sequence[WriteRequest],
                      sidecar: Sidecar | None) -> list[WriteOutcome]:
        # Compared by index: after a crash the sidecar may be ahead of the store, and what was
        # plaintext below the cutover must be replayed as it was.
        storage_active = (sidecar is not None and sidecar.storage_envelope_active
                          and index > sidecar.storage_envelope_cutover_index)
        writes: list[tuple[bytes, int, bytes]] = []
        outcomes: list[WriteOutcome] = []
        # What earlier requests of this same entry wrote last, for later ones' conditions.
        latest: dict[bytes, tuple[int, bytes]] = {}
        track_latest = any(request.conditions for request in requests)
        reader = self._condition_reader if track_latest else None
        if reader is not None:
            if not reader.is_ready(index, requests):
                raise _NotInMemory
            reader.begin()

        def may_read() -> bool:
            return reader is None or reader.may_go_on(index, requests)

        known_ids: set[bytes] = set()
        for commit_ts, ops, conditions in requests:
            if conditions and not self._conditions_hold(commit_ts, conditions, latest, may_read):
                outcomes.append(ConditionFailed("a condition of the batch does not hold",
                                                remedy="read the keys again and retry"))
                continue
            group = []
            for kind, key, record in ops:
                state = record[0] & STATE_MASK
                if state == ENVELOPE_BITS:
                    if record[ENVELOPE_KEY_ID] not in known_ids:
                        self._require_known_key(index, record)
                        known_ids.add(record[ENVELOPE_KEY_ID])
                elif storage_active and kind == OpKind.PUT and state == PLAINTEXT_BITS:
                    break
                group.append((key, commit_ts, record))
            else:
                writes += group
                if track_latest:
                    latest.update((key, (commit_ts, record)) for _, key, record in ops)
                outcomes.append(WriteResult(index, commit_ts))
                if commit_ts > self._hlc.last:
                    self._hlc.last = commit_ts
                continue
            outcomes.append(StorageEnvelopeRequired(
                "the storage envelope became active before this write"))
        if reader is not None:
            reader.end()
        self._store.apply_group(index, writes)
        return outcomes

    def _conditions_hold(self, commit_ts: int, conditions: Sequence[tuple[bytes, int]],
                         latest: Mapping[bytes, tuple[int, bytes]],
                         may_read: Callable[[], bool]) -> bool:
        """Raises `_NotInMemory` where the loop is not to read one more: nothing of the entry has
        been applied by then."""
        # Expiry is judged at the request's own timestamp: replicated, hence the same everywhere.
        now_ms = timestamp_ms(commit_ts)
        for key, expected in conditions:
            if key in latest:
                written_ts, record = latest[key]
                current = written_ts if visible(record, now_ms) else 0
            else:
                if not may_read():
                    raise _NotInMemory
                version = self._store.get(key, commit_ts, now_ms)
                current = version.commit_ts if version else 0
            if current != expected:
                return False
        return True

    def _require_known_key(self, index: int, record: bytes) -> None:
        key_id = int.from_bytes(record[ENVELOPE_KEY_ID], "big")
        if key_id not in self._applier.keystore:
            raise ApplyHalted(f"entry {index} holds a value under unknown DEK {key_id}",
                              remedy="restore this node's sidecar from the leader")

    def _apply_encryption(self, index: int, decoded: EncryptionEntry) -> int:
        before = self._applier.sidecar
        rows = self._applier.apply(index, decoded)
        after = self._applier.sidecar
        meta: dict[bytes, bytes] = {}
        if after is not None and not isinstance(decoded, Registration):
            # A replaying replica's sidecar may know a cutover that its log has not come to yet.
            cutover = after.raft_envelope_cutover_index
            meta = {META_LAST_ENCRYPTION_INDEX: encode_number(index),
                    META_RAFT_CUTOVER_INDEX: encode_number(cutover if cutover <= index else 0),
                    META_SIDECAR: after.encode()}
        self._store.apply_group(index, (), rows=rows, meta=meta)
        if after is not before or rows:
            self._on_keys_changed(index)
        return index
