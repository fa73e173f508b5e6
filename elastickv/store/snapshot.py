"""Snapshots: the whole store as a stream, for a follower whose log no longer reaches the leader's.

    "EKVSNAP" version(1 = 0x01)
    frame*: kind (1) | sequence (4) | length (4) | payload (length) | CRC32C of all before it (4)

    kind 1, once, first   applied_index (8) | hlc_ceiling (8) | raft_cutover_index (8)
                          | max_commit_ts (8) | horizon_ts (8) | count (4) | count * ( name length
                          (2) | value length (4) | name | value )
    kind 2, any number    ( table (1) | key length (2) | value length (4) | key | value ) *
    kind 3, once, last    entry count (8) | SHA-256 of every byte before this frame (32)

Integers are big-endian. Entries come by table number and ascending key. The sequence counts frames
from 0, so a lost, doubled or swapped frame is refused where it occurs; the trailer refuses a
stream that ends early. Values are the records as stored, hence ciphertext after the cutover.

An import goes into a place of its own and becomes the store in one atomic, durable step after the
trailer was verified. Receivers may be given the bytes in pieces of any size.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from elastickv.errors import WireError
from elastickv.store.mvcc_store import (
    APPLIED_INDEX,
    HORIZON_TS,
    MAX_COMMIT_TS,
    Store,
    decode_number,
    encode_number,
)
from elastickv.store.records import crc32c
from elastickv.store.tables import TABLE_NUMBERS, ImportSink, Item, ReadView, Table

MAGIC = b"EKVSNAP\x01"
HLC_CEILING = b"hlc_ceiling"
RAFT_CUTOVER_INDEX = b"raft_cutover_index"

FRAME_TARGET_BYTES = 256 << 10
MAX_FRAME_BYTES = 1 << 30

WARM_PIECES = 4
"""After so many pieces in a row that threads found in memory the loop reads by itself again."""

_KIND_HEADER = 1
_KIND_ENTRIES = 2
_KIND_TRAILER = 3
_FRAME = struct.Struct(">BII")
_CRC_BYTES = 4
_NUMBERS = struct.Struct(">QQQQQI")
_META = struct.Struct(">HI")
_ENTRY = struct.Struct(">BHI")
_TRAILER = struct.Struct(">Q32s")
_HEADER_NUMBERS = frozenset((APPLIED_INDEX, MAX_COMMIT_TS, HORIZON_TS))
"""Facts that have fields of their own in the header. The counts by DEK travel as a fact."""
_DATA_TABLES = (Table.MVCC, Table.ROWS)
_TABLES = {TABLE_NUMBERS[table]: table for table in _DATA_TABLES}


class SnapshotHeader(NamedTuple):
    """What a snapshot says about itself; `meta` holds every fact of the state machine."""

    applied_index: int
    hlc_ceiling: int
    raft_cutover_index: int
    max_commit_ts: int
    horizon_ts: int
    meta: dict[bytes, bytes]


def encode_header(header: SnapshotHeader) -> bytes:
    """The payload of the header frame."""
    parts = [_NUMBERS.pack(*header[:5], len(header.meta))]
    for name, value in sorted(header.meta.items()):
        parts += (_META.pack(len(name), len(value)), name, value)
    return b"".join(parts)


def decode_header(payload: bytes) -> SnapshotHeader:
    """Inverse of `encode_header`. Raises `WireError` for anything else."""
    try:
        applied, ceiling, cutover, newest_ts, horizon_ts, count = _NUMBERS.unpack_from(payload)
        offset = _NUMBERS.size
        meta = {}
        for _ in range(count):
            name_size, value_size = _META.unpack_from(payload, offset)
            middle = offset + _META.size + name_size
            meta[payload[offset + _META.size:middle]] = payload[middle:middle + value_size]
            offset = middle + value_size
    except struct.error:
        raise WireError("a snapshot's header is cut short") from None
    header = SnapshotHeader(applied, ceiling, cutover, newest_ts, horizon_ts, meta)
    if offset != len(payload) or encode_header(header) != payload:
        raise WireError("a snapshot's header does not parse")
    if (header.hlc_ceiling != decode_number(meta.get(HLC_CEILING))
            or header.raft_cutover_index != decode_number(meta.get(RAFT_CUTOVER_INDEX))
            or not _HEADER_NUMBERS.isdisjoint(meta)):
        raise WireError("a snapshot's header contradicts itself")
    return header


def read_header(view: ReadView) -> SnapshotHeader:
    """The header of a snapshot of `view`."""
    meta = dict(view.iterate(Table.META))
    numbers = [decode_number(meta.pop(name, None))
               for name in (APPLIED_INDEX, MAX_COMMIT_TS, HORIZON_TS)]
    return SnapshotHeader(numbers[0], decode_number(meta.get(HLC_CEILING)),
                          decode_number(meta.get(RAFT_CUTOVER_INDEX)), numbers[1], numbers[2], meta)


def decode_entries(payload: bytes) -> Iterator[tuple[Table, Item]]:
    """The entries of a frame. Raises `WireError` when it does not parse to its last byte."""
    offset = 0
    while offset < len(payload):
        if offset + _ENTRY.size > len(payload):
            raise WireError("a snapshot entry is cut short")
        number, key_size, value_size = _ENTRY.unpack_from(payload, offset)
        start = offset + _ENTRY.size
        middle = start + key_size
        offset = middle + value_size
        table = _TABLES.get(number)
        if table is None or offset > len(payload):
            raise WireError("a snapshot entry names an unknown table or is cut short")
        yield table, (payload[start:middle], payload[middle:offset])


class _FrameWriter:
    """Numbers, checks and hashes frames."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256(MAGIC)
        self._sequence = 0

    def frame(self, kind: int, payload: bytes) -> bytes:
        body = _FRAME.pack(kind, self._sequence, len(payload)) + payload
        self._sequence += 1
        framed = body + crc32c(body).to_bytes(_CRC_BYTES, "big")
        self.digest.update(framed)
        return framed


class StoreExport:
    """A `raft.engine.SnapshotExport` of the latest flushed state.

    What was applied since is in the log, which is kept from `durable_index` on, so nothing has to
    be flushed first. The read transaction pins old pages until `close`: the file may grow
    meanwhile.
    """

    def __init__(self, store: Store) -> None:
        """Raises `DiskFull`."""
        self._store = store
        store.require_space()
        self._view = store.backend.view()
        header = read_header(self._view)
        self.applied_index = header.applied_index
        self._frames = self._generate(header)
        self._buffer = bytearray()
        self._last_key = b""
        self._warm_pieces = 0

    def _generate(self, header: SnapshotHeader) -> Iterator[bytes]:
        writer = _FrameWriter()
        yield MAGIC + writer.frame(_KIND_HEADER, encode_header(header))
        count = 0
        parts: list[bytes] = []
        size = 0
        for number, (key, value) in self._entries():
            parts += (_ENTRY.pack(number, len(key), len(value)), key, value)
            size += len(key) + len(value)
            count += 1
            if size >= FRAME_TARGET_BYTES:
                self._last_key = key
                yield writer.frame(_KIND_ENTRIES, b"".join(parts))
                parts, size = [], 0
        if parts:
            yield writer.frame(_KIND_ENTRIES, b"".join(parts))
        yield writer.frame(_KIND_TRAILER, _TRAILER.pack(count, writer.digest.digest()))

    def _entries(self) -> Iterator[tuple[int, Item]]:
        return chain.from_iterable(
            ((TABLE_NUMBERS[table], item) for item in self._view.iterate(table))
            for table in _DATA_TABLES)

    def read_ahead(self, max_bytes: int) -> Callable[[], None] | None:
        """Work for any thread, to be done before the next `read`; None where that is not expected
        to wait for the disk: it would for every page, and the loop with it."""
        missing = max_bytes - len(self._buffer)
        if self._warm_pieces >= WARM_PIECES or missing <= 0:
            return None
        # Whole frames; an eighth more, because checksums of entries count as well there.
        byte_count = -(-missing // FRAME_TARGET_BYTES) * FRAME_TARGET_BYTES * 9 // 8
        prefetch = self._store.backend.prefetch_all(
            Table.MVCC, self._last_key + b"\0" if self._last_key else b"", byte_count)

        def work() -> None:
            self._warm_pieces = 0 if prefetch() else self._warm_pieces + 1

        return work

    def read(self, max_bytes: int) -> bytes:
        """The next piece of the stream, b"" at its end. Raises `StoreCorrupt`, `Overloaded` when
        the store's file had to be resized (start over), and `DiskFull`."""
        self._store.require_space()  # with what this pins a flush may have enough
        before = self._store.backend.disk_waits()
        while len(self._buffer) < max_bytes:
            frame = next(self._frames, None)
            if frame is None:
                break
            self._buffer += frame
        if self._store.backend.disk_waits() > before:
            self._warm_pieces = 0
        piece = bytes(self._buffer[:max_bytes])
        del self._buffer[:max_bytes]
        return piece

    def close(self) -> None:
        """Release the read transaction. Idempotent."""
        self._frames = iter(())
        self._buffer.clear()
        self._view.close()


BeforeInstall = Callable[[SnapshotHeader, Sequence[Item]], None]


class StoreImport:
    """A `raft.engine.SnapshotImport`. After any error it is aborted and refuses more."""

    def __init__(self, store: Store, before_install: BeforeInstall | None,
                 on_installed: Callable[[int], None] | None) -> None:
        self._store = store
        self._before_install = before_install
        self._on_installed = on_installed
        self._sink: ImportSink | None = store.backend.begin_import()
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._sequence = 0
        self._started = False
        self._count = 0
        self._complete = False
        self._rows: list[Item] = []
        self.header: SnapshotHeader | None = None

    def write(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `WireError` or `StoreCorrupt` where the stream is damaged."""
        if self._sink is None:
            raise WireError("the snapshot import has ended")
        self._buffer += chunk
        try:
            self._consume(self._sink)
        except BaseException:
            self.abort()
            raise

    def _consume(self, sink: ImportSink) -> None:
        if not self._started:
            if len(self._buffer) < len(MAGIC):
                return
            if not self._buffer.startswith(MAGIC):
                raise WireError("this is no snapshot, or one of an unknown version")
            self._digest.update(MAGIC)
            del self._buffer[:len(MAGIC)]
            self._started = True
        offset = 0
        while True:
            end = self._frame_end(offset)
            if end is None:
                break
            self._take(sink, bytes(memoryview(self._buffer)[offset:end]))
            offset = end
        del self._buffer[:offset]

    def _frame_end(self, offset: int) -> int | None:
        """Where the frame at `offset` ends; None while it is incomplete."""
        if len(self._buffer) - offset < _FRAME.size:
            return None
        kind, sequence, length = _FRAME.unpack_from(self._buffer, offset)
        if self._complete or sequence != self._sequence or length > MAX_FRAME_BYTES or not (
                _KIND_HEADER <= kind <= _KIND_TRAILER):
            raise WireError("a snapshot frame is out of place")
        end = offset + _FRAME.size + length + _CRC_BYTES
        return int(end) if end <= len(self._buffer) else None

    def _take(self, sink: ImportSink, framed: bytes) -> None:
        body = framed[:-_CRC_BYTES]
        if crc32c(body).to_bytes(_CRC_BYTES, "big") != framed[-_CRC_BYTES:]:
            raise WireError("a snapshot frame fails its checksum")
        kind, payload = body[0], body[_FRAME.size:]
        if (kind == _KIND_HEADER) is not (self.header is None):
            raise WireError("a snapshot does not have exactly one header, first")
        if kind == _KIND_HEADER:
            self.header = decode_header(payload)
        elif kind == _KIND_ENTRIES:
            self._append(sink, payload)
        elif payload != _TRAILER.pack(self._count, self._digest.digest()):
            raise WireError("a snapshot's trailer contradicts its content")
        else:
            self._complete = True
        self._digest.update(framed)
        self._sequence += 1

    def _append(self, sink: ImportSink, payload: bytes) -> None:
        pending: dict[Table, list[Item]] = {}
        for table, item in decode_entries(payload):
            pending.setdefault(table, []).append(item)
            self._count += 1
        for table, items in pending.items():
            sink.append(table, items)
        self._rows += pending.get(Table.ROWS, [])

    def finish(self) -> int:
        """Make the snapshot the store's content, durably; its applied index.

        Raises `WireError`, with the store unchanged, when the stream is incomplete or would take
        the applied index back.
        """
        sink, header = self._sink, self.header
        if sink is None or header is None or not self._complete or self._buffer:
            self.abort()
            raise WireError("the snapshot is incomplete")
        if header.applied_index < self._store.applied_index:
            self.abort()
            raise WireError(f"the snapshot at index {header.applied_index} is behind this store, "
                            f"which is at {self._store.applied_index}")
        try:
            facts = {APPLIED_INDEX: encode_number(header.applied_index),
                     MAX_COMMIT_TS: encode_number(header.max_commit_ts)}
            if header.horizon_ts:
                facts[HORIZON_TS] = encode_number(header.horizon_ts)
            sink.append(Table.META, sorted({**header.meta, **facts}.items()))
            if self._before_install is not None:
                self._before_install(header, self._rows)
            self._store.install(sink)
        except BaseException:
            self.abort()
            raise
        self._sink = None
        if self._on_installed is not None:
            self._on_installed(header.applied_index)
        return header.applied_index

    def abort(self) -> None:
        """Drop everything received. Idempotent."""
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.discard()
        self._buffer.clear()


class StoreSnapshots:
    """A `raft.engine.SnapshotSource` over a store. Loop thread only.

    `before_install(header, rows)` is called with a complete and verified stream and its registry
    rows, before its content replaces the store's: what has to be durable first (the sidecar) is
    made so there, and an error from it leaves the store as it was. `on_installed(applied_index)` is
    called afterwards: what was derived from the old content has to be derived again, in memory,
    because nothing may fail any more.
    """

    def __init__(self, store: Store, *,
                 before_install: BeforeInstall | None = None,
                 on_installed: Callable[[int], None] | None = None) -> None:
        self._store = store
        self._before_install = before_install
        self._on_installed = on_installed

    def open_export(self) -> StoreExport:
        """A snapshot of the latest flushed state; its `applied_index` is the durable index. Raises
        `DiskFull` when the last flush found no space."""
        return StoreExport(self._store)

    def open_import(self) -> StoreImport:
        """Receives a snapshot. One import at a time."""
        return StoreImport(self._store, self._before_install, self._on_installed)
