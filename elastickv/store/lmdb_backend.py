"""The LMDB backend: one memory-mapped B+tree file per *generation*, named by the file CURRENT.

    store/
      CURRENT               "gen-00000001 <CRC32C, 8 hex digits>\\n"; replaced durably
      gen-00000001.mdb      the live file (and gen-00000001.mdb-lock)
      gen-00000002.mdb      an import under way, or a leftover: removed at the next open

Installing a snapshot is writing CURRENT. Each file holds the named databases `mvcc`, `rows`,
`meta`, whose values carry checksums (`records`), and `totals`, with what a full walk of each must
add up to.

LMDB syncs data and meta page in each commit (sync and metasync on), so a batch is durable when
`write` returns; with metasync off the last commit could vanish in a power cut after the log entries
that it covers were deleted.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lmdb

from elastickv.durable import Disk, OsDisk
from elastickv.errors import DiskFull, Overloaded, StoreCorrupt
from elastickv.store import records
from elastickv.store.records import Totals
from elastickv.store.tables import BackendStats, Item, MapFull, Table, WriteBatch

INITIAL_MAP_BYTES = 4 << 30
MAX_MAP_BYTES = 1 << 44
_MAX_READERS = 64
_PAGE_BYTES = 4096
_TOTALS = b"totals"
_CURRENT = "CURRENT"
_GENERATION = re.compile(r"gen-(\d{8})\.mdb(-lock)?")
_RESTORE = "restore this node from a healthy member: remove its data directory and let it rejoin"
_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CORRUPT_ERRORS = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError,
                   lmdb.VersionMismatchError, lmdb.IncompatibleError, lmdb.BadTxnError,
                   lmdb.BadValsizeError, lmdb.CursorFullError, lmdb.PageFullError,
                   lmdb.BadDbiError, lmdb.NotFoundError)


def raise_typed(error: lmdb.Error) -> NoReturn:
    """Raise what `error` means: a full map or disk, a damaged file, or an `OSError` (stop)."""
    code = getattr(error, "code", 0) or 0
    if isinstance(error, lmdb.MapFullError):
        raise MapFull("the store's memory map is full") from None
    if code in _FULL_ERRNOS:
        raise DiskFull("no space left to write the store",
                       remedy="free space on the data directory's file system") from None
    if isinstance(error, _CORRUPT_ERRORS):
        raise StoreCorrupt(f"the store's file is damaged ({error})", remedy=_RESTORE) from None
    raise OSError(code, f"the store failed: {error}") from None


def encode_current(generation: int) -> bytes:
    """The content of CURRENT."""
    name = f"gen-{generation:08d}".encode()
    return name + b" %08x\n" % records.crc32c(name)


def decode_current(data: bytes) -> int:
    """The generation that CURRENT names. Raises `StoreCorrupt` unless it is exactly as written."""
    match = re.fullmatch(rb"gen-(\d{8}) [0-9a-f]{8}\n", data)
    if match is None or encode_current(int(match[1])) != data:
        raise StoreCorrupt("the store's CURRENT file is damaged", remedy=_RESTORE)
    return int(match[1])


class _Environment:
    """One open LMDB file with its databases and totals."""

    def __init__(self, path: Path, map_bytes: int) -> None:
        self.path = path
        try:
            self.env = lmdb.open(
                str(path), subdir=False, mode=0o600, map_size=map_bytes, max_dbs=len(Table) + 1,
                sync=True, metasync=True, readahead=False, max_readers=_MAX_READERS)
            self.env.reader_check()
            self.map_bytes: int = self.env.info()["map_size"]
            self.databases: dict[Table, Any] = {
                table: self.env.open_db(table.value.encode()) for table in Table}
            self.totals_database: Any = self.env.open_db(_TOTALS)
            self.totals = self._read_totals()
        except lmdb.Error as error:
            raise_typed(error)

    def _read_totals(self) -> dict[Table, Totals]:
        totals = {}
        with self.env.begin() as txn:
            for table in Table:
                name = table.value.encode()
                stored = txn.get(name, db=self.totals_database)
                entries = txn.stat(self.databases[table])["entries"]
                found = Totals() if stored is None else Totals.decode(
                    records.reveal(Table.META, name, stored))
                if found.count != entries:
                    raise StoreCorrupt(f"table {table} has {entries} entries instead of "
                                       f"{found.count}", remedy=_RESTORE)
                totals[table] = found
        return totals

    def write(self, batch: WriteBatch) -> None:
        totals = {table: total.copy() for table, total in self.totals.items()}
        try:
            with self.env.begin(write=True) as txn:
                for table in Table:
                    self._apply(txn, table, batch, totals[table])
                    if totals[table] != self.totals[table]:
                        name = table.value.encode()
                        txn.put(name, records.protect(Table.META, name, totals[table].encode()),
                                db=self.totals_database)
        except lmdb.Error as error:
            raise_typed(error)
        self.totals = totals

    def _apply(self, txn: Any, table: Table, batch: WriteBatch, totals: Totals) -> None:
        database = self.databases[table]
        for key in batch.deletes.get(table, ()):
            old = txn.pop(key, db=database)
            if old is not None:
                totals.remove(old)
        puts = batch.puts.get(table)
        if puts is None:
            return
        if table is Table.MVCC:
            # Versions are never rewritten, except that a log entry may repeat a timestamp.
            self._insert(txn, database, table, puts, totals)
            return
        for key, value in puts:
            stored = records.protect(table, key, value)
            old = txn.replace(key, stored, db=database)
            if old is not None:
                totals.remove(old)
            totals.add(stored)

    def _insert(self, txn: Any, database: Any, table: Table, puts: Any, totals: Totals) -> None:
        cursor = txn.cursor(database)
        for key, stored in records.protect_all(table, puts, totals):
            if cursor.put(key, stored, overwrite=False):
                continue
            totals.remove(cursor.value())
            cursor.put(key, stored)

    def close(self) -> None:
        self.env.close()


class LmdbView:
    """A `ReadView` on an LMDB read transaction."""

    def __init__(self, backend: LmdbBackend, environment: _Environment) -> None:
        self._backend = backend
        self._databases = environment.databases
        try:
            self._txn: Any = environment.env.begin()
            self._cursors: dict[Table, Any] = {
                table: self._txn.cursor(database) for table, database in self._databases.items()}
        except lmdb.Error as error:
            raise_typed(error)

    def get(self, table: Table, key: bytes) -> bytes | None:
        if self._txn is None:
            self._raise_closed()
        try:
            stored = self._txn.get(key, db=self._databases[table])
        except lmdb.Error as error:
            raise_typed(error)
        return None if stored is None else records.reveal(table, key, stored)

    def ceiling(self, table: Table, key: bytes) -> Item | None:
        if self._txn is None:
            self._raise_closed()
        cursor = self._cursors[table]
        try:
            if not cursor.set_range(key):
                return None
            found, stored = cursor.item()
        except lmdb.Error as error:
            raise_typed(error)
        return found, records.reveal(table, found, stored)

    def iterate(self, table: Table, start: bytes = b"", end: bytes = b"", *,
                reverse: bool = False) -> Iterator[Item]:
        entries = self._backward(table, start, end) if reverse else self._forward(table, start, end)
        return records.reveal_all(table, entries)

    def _forward(self, table: Table, start: bytes, end: bytes) -> Iterator[Item]:
        if self._txn is None:
            self._raise_closed()
        try:
            cursor = self._txn.cursor(self._databases[table])
            if not (cursor.set_range(start) if start else cursor.first()):
                return
            for entry in cursor.iternext():
                if end and entry[0] >= end:
                    return
                yield entry
        except lmdb.Error as error:
            raise_typed(error)

    def _backward(self, table: Table, start: bytes, end: bytes) -> Iterator[Item]:
        if self._txn is None:
            self._raise_closed()
        try:
            cursor = self._txn.cursor(self._databases[table])
            found = cursor.prev() if end and cursor.set_range(end) else cursor.last()
            if not found:
                return
            for entry in cursor.iterprev():
                if entry[0] < start:
                    return
                yield entry
        except lmdb.Error as error:
            raise_typed(error)

    def _raise_closed(self) -> NoReturn:
        raise Overloaded("the read view was closed while the store's file was being resized",
                         remedy="retry")

    def close(self) -> None:
        self._backend.forget(self)
        if self._txn is not None:
            self._cursors = {}
            self._txn.abort()
            self._txn = None


class LmdbImport:
    """An `ImportSink`: a new generation, unnamed by CURRENT until installed."""

    _BATCH_BYTES = 4 << 20

    def __init__(self, backend: LmdbBackend, generation: int, path: Path) -> None:
        self._backend = backend
        self._generation = generation
        self._path = path
        self._environment: _Environment | None = _Environment(path, INITIAL_MAP_BYTES)
        self._pending: dict[Table, list[Item]] = {}
        self._pending_bytes = 0
        self._last: dict[Table, bytes] = {}

    def append(self, table: Table, items: Sequence[Item]) -> None:
        last = self._last.get(table, b"")
        for key, value in items:
            if key <= last:
                raise StoreCorrupt(f"imported entries of table {table} are out of order")
            last = key
            self._pending_bytes += len(key) + len(value)
        self._last[table] = last
        self._pending.setdefault(table, []).extend(items)
        if self._pending_bytes >= self._BATCH_BYTES:
            self._drain()

    def _drain(self) -> None:
        environment = self._environment
        if environment is None:
            raise StoreCorrupt("the import was already ended")
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        try:
            environment.write(WriteBatch(puts=dict(pending)))
        except MapFull:
            grow(environment, self._backend.max_map_bytes)
            environment.write(WriteBatch(puts=dict(pending)))

    def install(self) -> None:
        self._drain()
        if self._environment is not None:
            self._environment.close()
            self._environment = None
        self._backend.switch(self._generation)

    def discard(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None
            self._backend.remove_generation(self._generation)


def grow(environment: _Environment, max_map_bytes: int) -> bool:
    """Double the map, if it may still grow. No transaction may be open in this process."""
    wanted = min(environment.map_bytes * 2, max_map_bytes)
    if wanted <= environment.map_bytes:
        return False
    try:
        environment.env.set_mapsize(wanted)
    except lmdb.Error:
        # Address space was refused: a write that needs it then ends in `DiskFull`.
        return False
    environment.map_bytes = wanted
    return True


class LmdbBackend:
    """A `Backend` over LMDB in `directory`."""

    def __init__(self, directory: Path, *, disk: Disk | None = None,
                 initial_map_bytes: int = INITIAL_MAP_BYTES,
                 max_map_bytes: int = MAX_MAP_BYTES) -> None:
        """Open or create. Raises `StoreCorrupt` when the file is damaged or missing."""
        self.max_map_bytes = max_map_bytes
        self._disk = disk or OsDisk()
        self._directory = directory
        self._initial_map_bytes = initial_map_bytes
        self._views: set[LmdbView] = set()
        self._wants_growth = False
        self._disk.make_directory(directory)
        self._generation = self._find_generation()
        self._remove_leftovers()
        self._environment = self._open(self._generation)

    @classmethod
    def open(cls, directory: Path) -> LmdbBackend:
        """The store in `directory`, created if absent. Raises `StoreCorrupt`."""
        return cls(directory)

    def _path_of(self, generation: int) -> Path:
        return self._directory / f"gen-{generation:08d}.mdb"

    def _find_generation(self) -> int:
        current = self._directory / _CURRENT
        if self._disk.exists(current):
            generation = decode_current(self._disk.read(current))
            if not self._disk.exists(self._path_of(generation)):
                raise StoreCorrupt(f"the store's file {self._path_of(generation)} is missing",
                                   remedy=_RESTORE)
            return generation
        if any(_GENERATION.fullmatch(name) for name in self._disk.list(self._directory)):
            environment = self._open(1)
            used = any(total.count for total in environment.totals.values())
            environment.close()
            if used:
                raise StoreCorrupt("the store's CURRENT file is missing", remedy=_RESTORE)
        else:
            self._open(1).close()
            self._disk.sync_directory(self._directory)
        self._disk.replace(current, encode_current(1))
        return 1

    def _open(self, generation: int) -> _Environment:
        return _Environment(self._path_of(generation), self._initial_map_bytes)

    def _remove_leftovers(self) -> None:
        for name in self._disk.list(self._directory):
            match = _GENERATION.fullmatch(name)
            if match and int(match[1]) != self._generation:
                self._disk.remove(self._directory / name)

    def view(self) -> LmdbView:
        view = LmdbView(self, self._environment)
        self._views.add(view)
        return view

    def forget(self, view: LmdbView) -> None:
        """A view was closed."""
        self._views.discard(view)

    def write(self, batch: WriteBatch) -> None:
        try:
            self._environment.write(batch)
        except MapFull:
            if self._environment.map_bytes >= self.max_map_bytes:
                raise DiskFull(f"the store has reached its limit of {self.max_map_bytes} bytes",
                               remedy="raise the limit or delete data") from None
            self._wants_growth = True
            raise

    def reserve(self, byte_count: int) -> None:
        environment = self._environment
        used = (environment.env.info()["last_pgno"] + 1) * _PAGE_BYTES
        # A random insert may copy a leaf page and split it, hence the factor.
        while self._wants_growth or used + 8 * byte_count > environment.map_bytes:
            self._close_views()
            if not grow(environment, self.max_map_bytes):
                self.max_map_bytes = environment.map_bytes
                self._wants_growth = False
                return
            self._wants_growth = False

    def _close_views(self) -> None:
        for view in list(self._views):
            view.close()

    def stats(self) -> BackendStats:
        environment = self._environment
        used = (environment.env.info()["last_pgno"] + 1) * _PAGE_BYTES
        return BackendStats(used, environment.map_bytes,
                            {table: total.count for table, total in environment.totals.items()})

    def begin_import(self) -> LmdbImport:
        self._remove_leftovers()
        generation = self._generation + 1
        return LmdbImport(self, generation, self._path_of(generation))

    def switch(self, generation: int) -> None:
        """Make `generation` current, durably, and drop the one before."""
        self._disk.sync_directory(self._directory)
        self._disk.replace(self._directory / _CURRENT, encode_current(generation))
        self._close_views()
        self._environment.close()
        old, self._generation = self._generation, generation
        self._environment = self._open(generation)
        self.remove_generation(old)

    def remove_generation(self, generation: int) -> None:
        """Delete a generation's files; never the current one's."""
        if generation == self._generation:
            raise ValueError("the current generation cannot be removed")
        path = self._path_of(generation)
        self._disk.remove(path)
        self._disk.remove(path.with_name(path.name + "-lock"))

    def close(self) -> None:
        self._close_views()
        self._environment.close()
