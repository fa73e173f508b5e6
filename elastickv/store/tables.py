"""What a storage backend offers: named tables, consistent read views, atomic durable batches.

Keys and values are opaque here. The backend protects what it stores: a value that is not what was
written raises `StoreCorrupt`, it never comes back wrong.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from elastickv.errors import DiskFull

Item = tuple[bytes, bytes]
Found = tuple[bytes, bytes | None]
"""A key and its value; None when nothing was found for it."""


class Table(enum.StrEnum):
    """The tables of a store. Registry rows and the store's own facts are no MVCC keys."""

    MVCC = "mvcc"
    ROWS = "rows"
    META = "meta"


TABLE_NUMBERS: Mapping[Table, int] = {Table.MVCC: 1, Table.ROWS: 2, Table.META: 3}
"""How a table is named in binary forms (snapshot, image). Never renumbered."""


class MapFull(DiskFull):
    """The memory map has no room for the batch; the next `Backend.reserve` makes some."""


@dataclass(slots=True)
class WriteBatch:
    """Puts (each table's in ascending key order, keys unique) and deletes, applied as one.

    `puts` may be lazy: it is consumed once, by the thread that writes the batch, table by table in
    the order of `Table`.
    """

    puts: dict[Table, Iterable[Item]] = field(default_factory=dict)
    deletes: dict[Table, Sequence[bytes]] = field(default_factory=dict)


class BackendStats(NamedTuple):
    """Sizes: `bytes_used` of `bytes_mapped`, and entries per table."""

    bytes_used: int
    bytes_mapped: int
    entries: dict[Table, int]


class ReadView(Protocol):
    """The state after some committed batch; later batches do not show. Loop thread only.

    Reading raises `StoreCorrupt` where it meets damage, and `Overloaded` once the view is closed,
    as by `Backend.reserve` or an import.
    """

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The value of `key`, None when there is none."""
        ...

    def ceiling(self, table: Table, key: bytes, prefix: bytes = b"") -> Item | None:
        """The first entry at or after `key`, None when there is none, or its key does not begin
        with `prefix`; then its value, which may be a large one, is not read."""
        ...

    def iterate(self, table: Table, start: bytes = b"", end: bytes = b"", *,
                reverse: bool = False) -> Iterator[Item]:
        """Entries with start <= key < end in key order or against it; b"" = unbounded."""
        ...

    def newest(self, table: Table, start: bytes, end: bytes, suffix: bytes, *,
               reverse: bool = False) -> Iterator[Found]:
        """For each prefix of the keys with start <= key < end, in key order or against it, its
        first entry at or behind prefix + `suffix`; that key and None where it has none.

        A prefix is a key without as many bytes as `suffix` has. No prefix begins with another, and
        no bound parts the entries of one. Each costs about the same, however many they are: what is
        passed by is not checked.
        """
        ...

    def close(self) -> None:
        """Release what the view pins. Idempotent."""
        ...


class ImportSink(Protocol):
    """A complete replacement of a backend's content, built aside."""

    def append(self, table: Table, items: Sequence[Item]) -> None:
        """Add entries. Within a table, keys must ascend over all calls (`StoreCorrupt` if not)."""
        ...

    def install(self) -> None:
        """Make what was appended the backend's content, durably and atomically.

        Every open view is closed; nothing of the old content is left.
        """
        ...

    def discard(self) -> None:
        """Drop what was appended. Idempotent, and harmless after `install`."""
        ...


class Backend(Protocol):
    """Durable tables. One writer at a time, in any thread; everything else on the loop thread."""

    def view(self) -> ReadView:
        """A view of the latest committed batch."""
        ...

    def prefetch(self, table: Table, start: bytes, end: bytes, suffix: bytes, count: int, *,
                 reverse: bool = False) -> Callable[[], bool]:
        """Work for any thread, at any later time: it reads what the first `count` answers of
        `ReadView.newest` are found in, or as many as are a few MiB, so that it is in memory, and
        returns whether it had to wait for the disk. It does nothing once the backend is closed,
        raises nothing, and gives way to whoever changes the file.
        """
        ...

    def prefetch_all(self, table: Table, start: bytes, byte_count: int) -> Callable[[], bool]:
        """As `prefetch`, for every entry from `start` on until they are `byte_count` bytes."""
        ...

    def disk_waits(self) -> int:
        """How often this thread has waited for the disk so far where it read; only differences mean
        anything."""
        ...

    def write(self, batch: WriteBatch) -> None:
        """Apply `batch` atomically; durable when it returns.

        Raises `MapFull` or `DiskFull` with nothing changed; any other error leaves the outcome
        open, and the process must stop.
        """
        ...

    def reserve(self, byte_count: int) -> None:
        """Prepare for a batch of about `byte_count` bytes, as far as possible.

        Called on the loop thread while no batch is being written. May close open views.
        """
        ...

    def stats(self) -> BackendStats:
        """Current sizes."""
        ...

    def poll_audit(self) -> bool:
        """Whether a check of the stored data is still under way.

        Raises `StoreCorrupt` when it found damage: what was read so far may have been incomplete.
        """
        ...

    def begin_import(self) -> ImportSink:
        """Start a replacement of the content; leftovers of an earlier one are dropped."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...
