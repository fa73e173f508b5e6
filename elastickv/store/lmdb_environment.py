"""One open LMDB file: its databases, its totals, its read transactions."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import lmdb

from elastickv.errors import JOIN_ANEW_REMEDY, DiskFull, Overloaded, StoreCorrupt
from elastickv.store import page_faults, records
from elastickv.store.audit import TOTALS
from elastickv.store.gate import Gate
from elastickv.store.lmdb_format import META_BYTES
from elastickv.store.records import Totals
from elastickv.store.tables import Found, Item, MapFull, Table, WriteBatch

PROBE_BYTES = 4 << 20

TOUCHED_BYTES = 6 << 20
"""What is read ahead at a time: about as much as a scan goes through in a turn."""

_MAX_READERS = 126
LOCK_FILE_BYTES = 8192
"""What LMDB's lock file takes for that many readers, which are also its default."""

_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CORRUPT_ERRORS = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError,
                  lmdb.VersionMismatchError, lmdb.IncompatibleError, lmdb.BadTxnError,
                  lmdb.BadValsizeError, lmdb.CursorFullError, lmdb.PageFullError,
                  lmdb.BadDbiError, lmdb.NotFoundError)
"""What LMDB raises of a damaged file."""


def raise_typed(error: lmdb.Error) -> NoReturn:
    """Raise what `error` means: a full map or disk, a damaged file, or an `OSError` (stop)."""
    code = getattr(error, "code", 0) or 0
    if isinstance(error, lmdb.MapFullError):
        raise MapFull("the store's memory map is full") from None
    if code in _FULL_ERRNOS:
        raise_full()
    if isinstance(error, CORRUPT_ERRORS):
        raise StoreCorrupt(f"the store's file is damaged ({error})",
                           remedy=JOIN_ANEW_REMEDY) from None
    raise OSError(code, f"the store failed: {error}") from None


def raise_full() -> NoReturn:
    """Raise `DiskFull`."""
    raise DiskFull("no space left to write the store",
                   remedy="free space on the data directory's file system") from None


def has_room(path: Path) -> bool:
    """Whether the file at `path` could grow by `PROBE_BYTES`: found out by writing that much to a
    new one, which a full file system may refuse as well."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and path.stat().st_size + PROBE_BYTES > limit:
        return False
    try:
        with tempfile.TemporaryFile(dir=path.parent, buffering=0) as probe:
            return probe.write(bytes(PROBE_BYTES)) == PROBE_BYTES
    except OSError as error:
        return error.errno not in _FULL_ERRNOS


def lock_file_of(path: Path) -> Path:
    """Where LMDB keeps the locks and readers of the file at `path`."""
    return path.with_name(path.name + "-lock")


def prepare_lock_file(path: Path) -> None:
    """See to it that the lock file of `path` has its blocks. Raises `DiskFull`.

    LMDB makes one as a hole and fills it through a map, where a full disk is a signal (SIGBUS) and
    no error. One that is long enough it takes as it is. Only the missing end is written, since
    another process may be using the rest; and this one must not have `path` open, because closing
    any descriptor of the lock file drops its locks.
    """
    lock_file = lock_file_of(path)
    try:
        if lock_file.exists() and lock_file.stat().st_size >= LOCK_FILE_BYTES:
            return
        descriptor = os.open(lock_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            while size < LOCK_FILE_BYTES:
                size += os.pwrite(descriptor, bytes(LOCK_FILE_BYTES - size), size)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _FULL_ERRNOS:
            raise_full()
        raise


class Environment:
    """One open LMDB file with its databases and totals."""

    def __init__(self, path: Path, map_bytes: int) -> None:
        self.path = path
        # Read transactions of other threads are inside: with one open the map must stay.
        self._gate = Gate()
        self._open(map_bytes)

    def _open(self, map_bytes: int) -> None:
        self.env: Any = None
        prepare_lock_file(self.path)
        try:
            self.env = lmdb.open(
                str(self.path), subdir=False, mode=0o600, map_size=map_bytes,
                max_dbs=len(Table) + 1, sync=True, metasync=True, readahead=False,
                max_readers=_MAX_READERS)
            # A process that was killed in a commit may have left its last page in the page cache.
            self.env.sync(True)
            self.forget_dead_readers()
            self.map_bytes: int = self.env.info()["map_size"]
            # That of the system which made the file.
            self.page_bytes = int(self.env.stat()["psize"])
            self.databases: dict[Table, Any] = {
                table: self.env.open_db(table.value.encode()) for table in Table}
            self.totals_database: Any = self.env.open_db(TOTALS)
            self.totals = self._read_totals()
        except lmdb.Error as error:
            self.close()
            self._raise_typed(error)
        except BaseException:
            self.close()
            raise

    def _raise_typed(self, error: lmdb.Error) -> NoReturn:
        """`raise_typed` after a write."""
        # LMDB calls a short write, which is how a disk fills up, an I/O error. Nothing was
        # committed then, and a repetition writes every page of the batch again.
        if getattr(error, "code", 0) == errno.EIO and not has_room(self.path):
            raise_full()
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
                                       f"{found.count}", remedy=JOIN_ANEW_REMEDY)
                totals[table] = found
        return totals

    def write(self, batch: WriteBatch) -> None:
        totals = {table: total.copy() for table, total in self.totals.items()}
        metas = self._read_metas()
        try:
            with self.env.begin(write=True) as txn:
                for table in Table:
                    self._apply(txn, table, batch, totals[table])
                    if totals[table] != self.totals[table]:
                        name = table.value.encode()
                        txn.put(name, records.protect(Table.META, name, totals[table].encode()),
                                db=self.totals_database)
        except lmdb.Error as error:
            self._put_back(metas)
            self._raise_typed(error)
        self.totals = totals

    def _read_metas(self) -> dict[int, bytes]:
        """Both meta pages, by their places in the file; nothing where it cannot be opened or read:
        that is a precaution, and no reason to stop."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return {place: os.pread(descriptor, META_BYTES, place)
                        for place in (0, self.page_bytes)}
            finally:
                os.close(descriptor)
        return {}

    def _put_back(self, metas: Mapping[int, bytes]) -> None:
        """After a commit that failed. Where that was in the write of its meta page, LMDB has put
        back the number of the older transaction there, but not its trees: the audit would take the
        file, whose newest state is sound, for a damaged one."""
        with contextlib.suppress(OSError):  # as the commit has; it is that which is told
            found = self._read_metas()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for place, meta in metas.items():
                    if found.get(place) != meta:
                        os.pwrite(descriptor, meta, place)
            finally:
                os.close(descriptor)

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

    def _insert(self, txn: Any, database: Any, table: Table, puts: Iterable[Item],
                totals: Totals) -> None:
        cursor = txn.cursor(database)
        for key, stored in records.protect_all(table, puts, totals):
            if cursor.put(key, stored, overwrite=False):
                continue
            totals.remove(cursor.value())
            cursor.put(key, stored)

    def grow(self, max_map_bytes: int) -> bool:
        """Double the map, if it may still grow. No transaction but those of `touch` and `touch_all`
        may be open in this process."""
        wanted = min(self.map_bytes * 2, max_map_bytes)
        if wanted <= self.map_bytes:
            return False
        self._gate.shut()
        try:
            self.env.set_mapsize(wanted)
        except lmdb.Error:
            # Address space was refused, and LMDB has closed the file. As large as it was it can be
            # opened again; a write that needs more then ends in `DiskFull`.
            self._open(self.map_bytes)
            return False
        finally:
            self._gate.open()
        self.map_bytes = wanted
        return True

    def forget_dead_readers(self) -> None:
        """Drop the read transactions of processes that are gone."""
        self.env.reader_check()

    def used_bytes(self) -> int:
        """How much of the map is, or was at some time, in use."""
        return (int(self.env.info()["last_pgno"]) + 1) * self.page_bytes

    def touch(self, table: Table, start: bytes, end: bytes, suffix: bytes, count: int, *,
              reverse: bool) -> bool:
        """Read the first `count` answers of `LmdbView.newest`, or `TOUCHED_BYTES` of them, and
        forget them; whether that had to wait for the disk. For any thread; LMDB reads without the
        interpreter's lock."""
        walk = _newest_backward if reverse else _newest_forward
        return self._touch(table, TOUCHED_BYTES,
                           lambda cursor: islice(walk(cursor, start, end, suffix), count))

    def touch_all(self, table: Table, start: bytes, byte_count: int) -> bool:
        """As `touch`, for entries from `start` on until they are `byte_count` bytes."""
        return self._touch(table, byte_count, lambda cursor: _forward(cursor, start, b""))

    def _touch(self, table: Table, byte_count: int,
               walk: Callable[[Any], Iterable[Found]]) -> bool:
        with self._gate.inside() as may_read:
            if not may_read:
                return False
            before = page_faults.major_faults()
            # Whoever reads it in earnest is told of damage.
            with contextlib.suppress(lmdb.Error), self.env.begin() as txn:
                left = byte_count
                for key, value in walk(txn.cursor(self.databases[table])):
                    left -= len(key) + len(value or b"")
                    if left <= 0 or self._gate.is_shut:
                        break
            return page_faults.major_faults() > before

    def close(self) -> None:
        """Close the file; no transaction but those of `touch` and `touch_all` may be open.
        Idempotent."""
        if self.env is not None:
            self._gate.shut()
            self.env.close()


class LmdbView:
    """A `ReadView` on an LMDB read transaction."""

    def __init__(self, environment: Environment, on_close: Callable[[LmdbView], None]) -> None:
        self._on_close = on_close
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

    def ceiling(self, table: Table, key: bytes, prefix: bytes = b"") -> Item | None:
        if self._txn is None:
            self._raise_closed()
        cursor = self._cursors[table]
        try:
            if not cursor.set_range(key):
                return None
            found = cursor.key()
            if not found.startswith(prefix):
                return None
            stored = cursor.value()
        except lmdb.Error as error:
            raise_typed(error)
        return found, records.reveal(table, found, stored)

    def iterate(self, table: Table, start: bytes = b"", end: bytes = b"", *,
                reverse: bool = False) -> Iterator[Item]:
        return records.reveal_all(table, self._walk(
            table, _backward if reverse else _forward, start, end))

    def newest(self, table: Table, start: bytes, end: bytes, suffix: bytes, *,
               reverse: bool = False) -> Iterator[Found]:
        return records.reveal_found(table, self._walk(
            table, _newest_backward if reverse else _newest_forward, start, end, suffix))

    def _walk(self, table: Table, walk: Callable[..., Iterator[Any]],
              *arguments: bytes) -> Iterator[Any]:
        """What `walk` finds with a cursor of its own, until the view is closed."""
        if self._txn is None:
            self._raise_closed()
        try:
            yield from walk(self._txn.cursor(self._databases[table]), *arguments)
        except lmdb.Error as error:
            if self._txn is None:
                self._raise_closed()
            raise_typed(error)

    def _raise_closed(self) -> NoReturn:
        raise Overloaded("the read view was closed while the store's file was being resized",
                         remedy="retry")

    def close(self) -> None:
        self._on_close(self)
        if self._txn is not None:
            self._cursors = {}
            self._txn.abort()
            self._txn = None


# The walks of a cursor, as `ReadView` describes them; values are as they are stored.


def _forward(cursor: Any, start: bytes, end: bytes) -> Iterator[Item]:
    if not (cursor.set_range(start) if start else cursor.first()):
        return
    for entry in cursor.iternext():
        if end and entry[0] >= end:
            return
        yield entry


def _backward(cursor: Any, start: bytes, end: bytes) -> Iterator[Item]:
    if not (cursor.prev() if end and cursor.set_range(end) else cursor.last()):
        return
    for entry in cursor.iterprev():
        if entry[0] < start:
            return
        yield entry


# These two read keys, and of values those of answers. A seek costs several times what a step does,
# so they step until they meet a prefix with a second entry.


def _newest_forward(cursor: Any, start: bytes, end: bytes, suffix: bytes) -> Iterator[Found]:
    size = len(suffix)
    one_each = True
    key_of, step, seek = cursor.key, cursor.next, cursor.set_range
    key = key_of() if (seek(start) if start else cursor.first()) else b""
    while key and not (end and key >= end):
        prefix = key[:-size]
        if key[-size:] < suffix:
            key = key_of() if seek(prefix + suffix) else b""
            if not key.startswith(prefix):
                yield prefix + suffix, None
                continue
        yield key, cursor.value()
        if one_each:
            key = key_of() if step() else b""
            if not key.startswith(prefix):
                continue
            one_each = False
        key = key_of() if seek(prefix + b"\xff" * (size + 1)) else b""


def _newest_backward(cursor: Any, start: bytes, end: bytes, suffix: bytes) -> Iterator[Found]:
    size = len(suffix)
    one_each = True
    key_of, step, seek = cursor.key, cursor.prev, cursor.set_range
    key = key_of() if (step() if end and seek(end) else cursor.last()) else b""
    while key and key >= start:
        prefix = key[:-size]
        if key[-size:] < suffix:
            yield prefix + suffix, None
        else:
            if one_each:
                entry = cursor.item()
                key = key_of() if step() else b""
                if not key.startswith(prefix):
                    yield entry
                    continue
                one_each = False
            seek(prefix + suffix)
            yield cursor.item()
        key = key_of() if step() else b""
        if key.startswith(prefix):
            seek(prefix)
            key = key_of() if step() else b""
