"""A backend whose content is in memory and, as one image file, on a `durable.Disk`.

For tests and the simulator: it loses in a simulated power cut exactly what was not synced, because
every batch replaces the whole image durably before it shows.

    magic (8) | table number (1) key length (4) value length (4) key value | ... | CRC32C (4)

Integers are big-endian; entries are ordered by table number and key.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from elastickv.durable import Disk
from elastickv.errors import JOIN_ANEW_REMEDY, StoreCorrupt
from elastickv.store.records import crc32c
from elastickv.store.tables import (
    TABLE_NUMBERS,
    BackendStats,
    Found,
    Item,
    Table,
    WriteBatch,
)

_MAGIC = b"EKVIMG1\n"
_ENTRY = struct.Struct(">BII")
_TABLES = {number: table for table, number in TABLE_NUMBERS.items()}


class SortedTable:
    """An immutable sorted mapping."""

    __slots__ = ("keys", "values")

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self.values = values
        self.keys = sorted(values)

    def changed(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> SortedTable:
        """A copy with `deletes` and then `puts` applied."""
        values = dict(self.values)
        for key in deletes:
            values.pop(key, None)
        values.update(puts)
        return SortedTable(values)


Tables = dict[Table, SortedTable]


def encode_image(tables: Tables) -> bytes:
    """The image file's content."""
    parts = [_MAGIC]
    for table, number in TABLE_NUMBERS.items():
        content = tables[table]
        for key in content.keys:
            value = content.values[key]
            parts += (_ENTRY.pack(number, len(key), len(value)), key, value)
    body = b"".join(parts)
    return body + crc32c(body).to_bytes(4, "big")


def decode_image(image: bytes) -> Tables:
    """Inverse of `encode_image`. Raises `StoreCorrupt` for anything else."""
    body = image[:-4]
    if not body.startswith(_MAGIC) or crc32c(body).to_bytes(4, "big") != image[-4:]:
        raise StoreCorrupt("the store's image is damaged",
                           remedy=JOIN_ANEW_REMEDY)
    content: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}
    offset = len(_MAGIC)
    while offset < len(body):
        number, key_size, value_size = _ENTRY.unpack_from(body, offset)
        start = offset + _ENTRY.size
        middle = start + key_size
        offset = middle + value_size
        content[_TABLES[number]][body[start:middle]] = body[middle:offset]
    return {table: SortedTable(values) for table, values in content.items()}


class MemoryView:
    """A `ReadView`: tables are immutable, so holding them is enough."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self._tables[table].values.get(key)

    def ceiling(self, table: Table, key: bytes, prefix: bytes = b"") -> Item | None:
        content = self._tables[table]
        position = bisect.bisect_left(content.keys, key)
        if position == len(content.keys):
            return None
        found = content.keys[position]
        return (found, content.values[found]) if found.startswith(prefix) else None

    def iterate(self, table: Table, start: bytes = b"", end: bytes = b"", *,
                reverse: bool = False) -> Iterator[Item]:
        content = self._tables[table]
        low = bisect.bisect_left(content.keys, start)
        high = bisect.bisect_left(content.keys, end) if end else len(content.keys)
        positions = range(high - 1, low - 1, -1) if reverse else range(low, high)
        for position in positions:
            key = content.keys[position]
            yield key, content.values[key]

    def newest(self, table: Table, start: bytes, end: bytes, suffix: bytes, *,
               reverse: bool = False) -> Iterator[Found]:
        keys, values = self._tables[table].keys, self._tables[table].values
        low = bisect.bisect_left(keys, start)
        high = bisect.bisect_left(keys, end) if end else len(keys)
        while low < high:
            prefix = keys[high - 1 if reverse else low][:-len(suffix)]
            first = bisect.bisect_left(keys, prefix, low, high)
            behind = bisect.bisect_left(keys, prefix + b"\xff" * (len(suffix) + 1), first, high)
            wanted = prefix + suffix
            position = bisect.bisect_left(keys, wanted, first, behind)
            if position < behind:
                yield keys[position], values[keys[position]]
            else:
                yield wanted, None
            if reverse:
                high = first
            else:
                low = behind

    def close(self) -> None:
        """Nothing is pinned."""


class MemoryImport:
    """An `ImportSink` for `MemoryBackend`."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._content: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}
        self._last: dict[Table, bytes] = {}

    def append(self, table: Table, items: Sequence[Item]) -> None:
        for key, value in items:
            if key <= self._last.get(table, b""):
                raise StoreCorrupt(f"imported entries of table {table} are out of order")
            self._last[table] = key
            self._content[table][key] = value

    def install(self) -> None:
        self._backend.replace_all(
            {table: SortedTable(values) for table, values in self._content.items()})

    def discard(self) -> None:
        self._content = {table: {} for table in Table}


class MemoryBackend:
    """A `Backend` in memory over an image file `store.image` in `directory`."""

    def __init__(self, disk: Disk, directory: Path) -> None:
        """Load the image if there is one. Raises `StoreCorrupt` when it is damaged."""
        self._disk = disk
        self._path = directory / "store.image"
        disk.make_directory(directory)
        if disk.exists(self._path):
            self._tables = decode_image(disk.read(self._path))
        else:
            self._tables = {table: SortedTable({}) for table in Table}

    def view(self) -> MemoryView:
        return MemoryView(self._tables)

    def prefetch(self, table: Table, start: bytes, end: bytes, suffix: bytes, count: int, *,
                 reverse: bool = False) -> Callable[[], bool]:
        return lambda: False

    def prefetch_all(self, table: Table, start: bytes, byte_count: int) -> Callable[[], bool]:
        return lambda: False

    def disk_waits(self) -> int:
        return 0

    def write(self, batch: WriteBatch) -> None:
        tables = dict(self._tables)
        for table in Table:
            puts = list(batch.puts.get(table, ()))
            deletes = batch.deletes.get(table, ())
            if puts or deletes:
                tables[table] = tables[table].changed(puts, deletes)
        self.replace_all(tables)

    def replace_all(self, tables: Tables) -> None:
        """Durably make `tables` the content."""
        self._disk.replace(self._path, encode_image(tables))
        self._tables = tables

    def reserve(self, byte_count: int) -> None:
        """Memory needs no reservation."""

    def stats(self) -> BackendStats:
        size = sum(len(key) + len(value) for content in self._tables.values()
                   for key, value in content.values.items())
        return BackendStats(size, size, {table: len(content.keys)
                                         for table, content in self._tables.items()})

    def poll_audit(self) -> bool:
        """The image was checked as a whole when it was read."""
        return False

    def begin_import(self) -> MemoryImport:
        return MemoryImport(self)

    def close(self) -> None:
        """Nothing is held."""
