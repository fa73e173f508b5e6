"""What is on the disks: no nonce used twice, replicas equal. (`leaks.py` looks for plaintext.)

Reads stopped nodes' data directories, the journal tap's spool (`tap.py`: what compaction and wiped
disks took away), and log files. Stores are opened as copies, so that an audit changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastickv.clock import MAX_TIMESTAMP, pack_timestamp, timestamp_ms
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore
from elastickv.durable import OsDisk
from elastickv.errors import ElasticKVError
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar
from elastickv.kv.fsm import (
    META_HLC_CEILING,
    META_LAST_ENCRYPTION_INDEX,
    META_RAFT_CUTOVER_INDEX,
)
from elastickv.raft import records
from elastickv.raft.segment import HEADER_SIZE, LOG_SUFFIX, SegmentHeader
from elastickv.store.dek_counts import dek_id_of
from elastickv.store.gc import Compactor
from elastickv.store.header import TOMBSTONE_BIT
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc import commit_ts_of, decode_store_key, decode_user_key
from elastickv.store.mvcc_store import HORIZON_TS, MAX_COMMIT_TS, Store
from elastickv.store.tables import Table
from elastickv.store.values import open_record
from jepsen.nonces import MAX_PROBLEMS, NonceLedger, PayloadReader, record_envelopes
from jepsen.verdict import Verdict, judge

MAX_COMMAND_BYTES = 128 << 20
REPLICATED_FACTS = (MAX_COMMIT_TS, META_HLC_CEILING, META_LAST_ENCRYPTION_INDEX,
                    META_RAFT_CUTOVER_INDEX)
REGULAR_KIND = b"\x00"
"""The first byte of a journal command that carries a state machine payload."""


# --- reading disks ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeDisk:
    """A data directory of a node that does not run; `name` is for reports."""

    name: str
    directory: Path


class RecordFile:
    """The records of a journal segment, or of a spool, up to the first that is not whole."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._offset, self._salt, self._next_index = 0, 0, 0
        self._is_readable = True
        if path.suffix == LOG_SUFFIX:
            header = SegmentHeader.decode(self._data[:HEADER_SIZE])
            self._is_readable = header is not None
            if header is not None:
                self._offset, self._salt = header.size, header.salt
                self._next_index = header.first_index

    def __iter__(self) -> Iterator[records.Record]:
        while self._is_readable and (found := records.decode_at(
                self._data, self._offset, MAX_COMMAND_BYTES, self._salt)) is not None:
            record, self._offset = found
            self._next_index = record.index + 1
            yield record

    def doubt(self, *, may_be_torn: bool) -> str:
        """Why there may be records besides those that were read; "" when there are none. A killed
        node leaves the last of its segments torn: then no whole record follows. Behind its end are
        zeros, or what is left of an older segment, whose salt is another."""
        if not self._is_readable:
            return "its header is damaged"
        if self._offset == len(self._data) or (may_be_torn and records.find_next(
                self._data, self._offset, self._next_index, MAX_COMMAND_BYTES,
                self._salt) is None):
            return ""
        return f"damaged at byte {self._offset} of {len(self._data)}"


def load_sidecar(disk: NodeDisk) -> Sidecar | None:
    """The node's sidecar; None when it has none."""
    return sidecar_file.load(OsDisk(), disk.directory / RELATIVE_PATH)


@dataclass(frozen=True, slots=True)
class StoreContent:
    """A store's applied index, its versions, its registry rows, and its facts."""

    applied_index: int
    versions: list[tuple[bytes, bytes]]
    rows: list[tuple[bytes, bytes]]
    facts: dict[bytes, bytes]

    def newest(self, at_ts: int = MAX_TIMESTAMP) -> dict[bytes, tuple[int, bytes]]:
        """The newest version, up to `at_ts`, of each user key that has not been deleted by then.
        Old versions and tombstones are no part of the logical state: each node drops them by its
        own clock."""
        state: dict[bytes, tuple[int, bytes]] = {}
        for store_key, record in self.versions:
            user_key, commit_ts = decode_store_key(store_key)
            if commit_ts <= at_ts:
                state.setdefault(user_key, (commit_ts, record))
        return {key: version for key, version in state.items()
                if not version[1][0] & TOMBSTONE_BIT}


def read_store(disk: NodeDisk) -> StoreContent | None:
    """Everything in a copy of the node's store; None when it has none. Raises `StoreCorrupt`."""
    with opened_copy(disk) as backend:
        return None if backend is None else content_of(backend)


@contextlib.contextmanager
def opened_copy(disk: NodeDisk) -> Iterator[LmdbBackend | None]:
    """A copy of the node's store, for as long as the context lasts; None when it has none. Raises
    `StoreCorrupt`."""
    source = disk.directory / "store"
    if not (source / "CURRENT").exists():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="jepsen-store-") as scratch:
        copy = Path(scratch) / "store"
        shutil.copytree(source, copy)
        backend = LmdbBackend(copy)
        try:
            yield backend
        finally:
            backend.close()


def content_of(backend: LmdbBackend) -> StoreContent:
    """Everything in a store. Raises `StoreCorrupt`."""
    view = backend.view()
    try:
        meta = dict(view.iterate(Table.META))
        return StoreContent(int.from_bytes(meta.get(b"applied_index", b""), "big"),
                            list(view.iterate(Table.MVCC)), list(view.iterate(Table.ROWS)), meta)
    finally:
        view.close()


def build_keystore(sidecars: Iterable[Sidecar], kek: Kek) -> Keystore:
    """Every DEK that any of the sidecars holds."""
    keystore = Keystore()
    for sidecar in sidecars:
        for dek_id, key in sidecar.keys.items():
            keystore = keystore.with_key(kek.unwrap_handle(key.wrapped, dek_id, key.purpose))
    return keystore


def unwrapped_keys(disks: Iterable[NodeDisk], kek: Kek) -> dict[str, bytes]:
    """Every DEK in any sidecar that can be read, as it must be on no disk, by its name."""
    keys: dict[str, bytes] = {}
    for disk in disks:
        # What cannot be read `audit_nonces` tells.
        with contextlib.suppress(ElasticKVError):
            if (sidecar := load_sidecar(disk)) is not None:
                for dek_id, key in sidecar.keys.items():
                    keys[f"DEK {dek_id}"] = kek.unwrap(key.wrapped)
    return keys


# --- nonces ----------------------------------------------------------------------------------


def audit_nonces(disks: Sequence[NodeDisk], spools: Sequence[Path], kek: Kek,
                 tap_error: str = "") -> Verdict:
    """Enter every envelope of every store, journal and spool into one ledger, and look for log
    entries that had to be sealed and were not.

    Unknown when a payload could not be opened, a store or a part of a log could not be read, a node
    that ran has no log entry, there was no envelope, or the tap that wrote the spools ended early:
    `tap_error`.
    """
    unknown: list[str] = [tap_error] if tap_error else []
    sidecars = []
    for disk in disks:
        try:
            sidecars.append(load_sidecar(disk))
        except ElasticKVError as error:
            unknown.append(f"{disk.name}: {error}")
    present = [sidecar for sidecar in sidecars if sidecar is not None]
    cutover = max((sidecar.raft_envelope_cutover_index for sidecar in present), default=0)
    reader = PayloadReader(build_keystore(present, kek), cutover)
    ledger = NonceLedger()
    entries: Counter[str] = Counter()
    for owner, path, may_be_torn in _journal_files(disks, spools):
        file = RecordFile(path)
        for record in file:
            entries[owner] += 1
            if record.command[:1] == REGULAR_KIND:
                for envelope in reader.envelopes(record.index, record.term,
                                                 record.command[1:]):
                    ledger.add(envelope, f"{owner} {path.name} entry {record.index} of term "
                                         f"{record.term}")
        if doubt := file.doubt(may_be_torn=may_be_torn):
            unknown.append(f"{owner} {path.name}: {doubt}")
    unknown += [f"{disk.name}: no log entry was read" for disk in disks
                if not entries[disk.name] and _has_run(disk)]
    for disk in disks:
        unknown += _enter_store(disk, ledger)
    if reader.unopened:
        unknown.append(f"{reader.unopened} log payloads could not be opened")
    if not ledger.envelopes:
        unknown.append("there was no envelope")
    problems = [*ledger.problems, *(
        f"entry {index} of term {term} is in the clear, behind the raft cutover"
        for index, term in reader.left_clear[:MAX_PROBLEMS])]
    facts = {"envelopes": ledger.envelopes, "distinct_nonces": ledger.distinct,
             "reused_nonces": ledger.reused, "log_entries": entries.total(),
             "disks": len(disks), "spools": len(spools)}
    return judge("nonces", problems, facts, unknown)


def _journal_files(disks: Sequence[NodeDisk],
                   spools: Sequence[Path]) -> Iterator[tuple[str, Path, bool]]:
    """Whose file it is, where, and whether it may end with a torn record."""
    for disk in disks:
        segments = sorted((disk.directory / "raft").rglob(f"*{LOG_SUFFIX}"))
        for path in segments:
            yield disk.name, path, path == segments[-1]
    for path in spools:
        yield "tap", path, False


def _has_run(disk: NodeDisk) -> bool:
    """Whether a node ran there: it begins with an empty directory. One that is gone may have held
    anything."""
    return not disk.directory.is_dir() or any(disk.directory.iterdir())


def _enter_store(disk: NodeDisk, ledger: NonceLedger) -> list[str]:
    try:
        content = read_store(disk)
        if content is not None:
            for store_key, record in content.versions:
                for envelope in record_envelopes(record):
                    user_key, commit_ts = decode_store_key(store_key)
                    ledger.add(envelope, f"{disk.name} store {user_key!r} at {commit_ts}")
    except ElasticKVError as error:
        return [f"{disk.name}: {error}"]
    return []


# --- replicas --------------------------------------------------------------------------------


def audit_replicas(disks: Sequence[NodeDisk], *, caught_up: bool = True) -> Verdict:
    """Stopped members that had applied the same hold the same newest versions, the same writer
    registry, the same keys and the same replicated facts; and the same versions altogether where
    neither has dropped any.

    Unknown with fewer than two readable stores, or one that is missing. Not `caught_up`: members
    may have been cut short at different entries, and what differs between those shows nothing.
    """
    problems: list[str] = []
    unknown: list[str] = []
    contents: dict[str, StoreContent] = {}
    keys: dict[str, object] = {}
    for disk in disks:
        try:
            content = read_store(disk)
            if content is not None:
                contents[disk.name] = content
            else:
                unknown.append(f"{disk.name} has no store")
            keys[disk.name] = _replicated_part(load_sidecar(disk))
        except ElasticKVError as error:
            problems.append(f"{disk.name} cannot be read: {error}")
    if len(contents) < 2:
        unknown.append(f"{len(contents)} stores cannot be compared")
    states = {name: content.newest() for name, content in contents.items()}
    reference = max(contents, key=lambda name: contents[name].applied_index, default="")
    for name in contents:
        different = _differences(reference, states[reference], name, states[name])
        different += _hidden_differences(reference, contents[reference], name, contents[name])
        if contents[name].rows != contents[reference].rows:
            different.append(f"the writer registries of {reference} and {name} differ")
        if keys.get(name) != keys.get(reference):
            different.append(f"the sidecars of {reference} and {name} differ")
        if caught_up or contents[name].applied_index == contents[reference].applied_index:
            problems += different
        elif different:
            unknown.append(f"{name} had applied {contents[name].applied_index} entries, "
                           f"{reference} {contents[reference].applied_index}")
    digests = {name: hashlib.blake2b(repr(sorted(state.items())).encode(),
                                     digest_size=8).hexdigest()
               for name, state in states.items()}
    facts = {"digests": digests, "keys": {name: len(state) for name, state in states.items()},
             "applied_index": {name: content.applied_index for name, content in contents.items()}}
    return judge("replicas", problems, facts, unknown)


# --- versions --------------------------------------------------------------------------------


def audit_versions(disks: Sequence[NodeDisk], kek: Kek, *, ended: bool = True) -> Verdict:
    """Every version in every store opens, none of a key holds what another one does (no workload
    writes the same twice, so that this was applied twice), and the last one is sealed under the
    active DEK.

    Unknown when a store is missing, or it or a sidecar cannot be read. Not `ended`: the last write
    may have come before the last rotation, and shows nothing.
    """
    problems: list[str] = []
    unknown: list[str] = []
    sidecars: dict[str, Sidecar] = {}
    for disk in disks:
        try:
            if (sidecar := load_sidecar(disk)) is not None:
                sidecars[disk.name] = sidecar
        except ElasticKVError as error:
            unknown.append(f"{disk.name}: {error}")
    keystore = build_keystore(sidecars.values(), kek)
    # Where a sidecar is missing among those, so may be the key.
    unopened = unknown if unknown else problems
    count = 0
    for disk in disks:
        try:
            content = read_store(disk)
        except ElasticKVError as error:
            unknown.append(f"{disk.name}: {error}")
            continue
        if content is None:
            unknown.append(f"{disk.name} has no store")
            continue
        count += len(content.versions)
        closed, repeated = _version_problems(disk.name, content, keystore)
        unopened += closed[:MAX_PROBLEMS]
        problems += repeated[:MAX_PROBLEMS]
        if ended and disk.name in sidecars:
            problems += _last_write_problems(disk.name, content, sidecars[disk.name])
    return judge("versions", problems, {"versions": count}, unknown)


def _version_problems(name: str, content: StoreContent,
                      keystore: Keystore) -> tuple[list[str], list[str]]:
    """Of versions that do not open, and of values that are there twice."""
    closed: list[str] = []
    repeated: list[str] = []
    first: dict[tuple[bytes, bytes], int] = {}
    for store_key, record in content.versions:
        if record[0] & TOMBSTONE_BIT:
            continue
        user_key, commit_ts = decode_store_key(store_key)
        try:
            value = open_record(keystore, store_key, record)
        except ElasticKVError as error:
            closed.append(f"{name}: {user_key!r} at {commit_ts} does not open: {error}")
            continue
        other_ts = first.setdefault((user_key, value), commit_ts)
        if other_ts != commit_ts:
            repeated.append(f"{name}: {user_key!r} was written twice with one value, at "
                            f"{commit_ts} and at {other_ts}")
    return closed, repeated


def _last_write_problems(name: str, content: StoreContent, sidecar: Sidecar) -> list[str]:
    """Of a rotation, or of a cutover, that has had no effect."""
    last = max(((commit_ts_of(store_key), store_key, record)
                for store_key, record in content.versions if not record[0] & TOMBSTONE_BIT),
               default=None)
    if last is None or not sidecar.storage_envelope_active:
        return []
    commit_ts, store_key, record = last
    dek_id = dek_id_of(record)
    if dek_id == sidecar.active_storage:
        return []
    how = f"sealed under DEK {dek_id}" if dek_id else "in the clear"
    return [f"{name}: the last write, {decode_user_key(store_key)!r} at {commit_ts}, is {how}, and "
            f"DEK {sidecar.active_storage} is active"]


# --- compaction ------------------------------------------------------------------------------


def audit_compaction(disks: Sequence[NodeDisk]) -> Verdict:
    """What the node's own compaction of a copy of each store leaves is read as before, at the
    horizon and later: members do not get to it within a run. The horizon is in the middle of what
    was written, then at its end.

    Unknown when a store is missing or cannot be read.
    """
    problems: list[str] = []
    unknown: list[str] = []
    removed = 0
    for disk in disks:
        try:
            with opened_copy(disk) as backend:
                if backend is None:
                    unknown.append(f"{disk.name} has no store")
                    continue
                before = content_of(backend)
                times_ms = sorted(timestamp_ms(decode_store_key(key)[1])
                                  for key, _ in before.versions)
                for horizon_ms in (times_ms[len(times_ms) // 2], times_ms[-1]) if times_ms else ():
                    removed += _compact(backend, horizon_ms)
                    after = content_of(backend)
                    for at_ts in (pack_timestamp(horizon_ms), MAX_TIMESTAMP):
                        problems += _differences(
                            disk.name, before.newest(at_ts),
                            f"what compaction up to {horizon_ms} ms leaves of it at {at_ts}",
                            after.newest(at_ts))
        except ElasticKVError as error:
            unknown.append(f"{disk.name}: {error}")
    return judge("compaction", problems, {"stores": len(disks), "removed": removed}, unknown)


def _compact(backend: LmdbBackend, horizon_ms: int) -> int:
    """Drop what no read at `horizon_ms` or later sees; how many versions that were."""
    return Compactor(Store.open(backend), lambda: horizon_ms, retention_ms=0).run_pass()


def _hidden_differences(reference: str, expected: StoreContent, name: str,
                        content: StoreContent) -> list[str]:
    """What reads of the latest state do not show."""
    found = [f"{fact.decode()} differs between {reference} and {name}" for fact in REPLICATED_FACTS
             if expected.facts.get(fact) != content.facts.get(fact)]
    if HORIZON_TS not in expected.facts and HORIZON_TS not in content.facts:
        wrong = sorted({*expected.versions} ^ {*content.versions})
        if wrong:
            user_key, commit_ts = decode_store_key(wrong[0][0])
            found.append(f"{len(wrong)} versions or tombstones are not in both {reference} and "
                         f"{name}, first {user_key!r} at {commit_ts}")
    return found


# --- differences -----------------------------------------------------------------------------


def _replicated_part(sidecar: Sidecar | None) -> object:
    """What a sidecar shares with the other members': not the epochs, times and applied index."""
    if sidecar is None:
        return None
    return (sidecar.storage_envelope_active, sidecar.storage_envelope_cutover_index,
            sidecar.raft_envelope_cutover_index, sidecar.active_storage, sidecar.active_raft,
            sorted((dek_id, key.purpose, key.wrapped) for dek_id, key in sidecar.keys.items()))


def _differences(reference: str, expected: dict[bytes, tuple[int, bytes]], name: str,
                 state: dict[bytes, tuple[int, bytes]]) -> list[str]:
    wrong = sorted(key for key in expected.keys() | state.keys()
                   if expected.get(key) != state.get(key))
    if not wrong:
        return []
    key = wrong[0]
    return [f"{len(wrong)} keys differ between {reference} and {name}, first {key!r}: timestamps "
            f"{expected.get(key, (None,))[0]} and {state.get(key, (None,))[0]}"]
