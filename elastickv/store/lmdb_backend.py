"""The LMDB backend: one memory-mapped B+tree file per *generation*, named by the file CURRENT.

    store/
      CURRENT               "gen-00000001 <CRC32C, 8 hex digits>\\n"; replaced durably
      gen-00000001.mdb      the live file (and gen-00000001.mdb-lock)
      gen-00000002.mdb      an import under way, or a leftover: removed at the next open
      *.new                 the first generation while it is being made
      *.new-1               a generation on its way out: removed at the next open, if not before

Installing a snapshot is writing CURRENT. Each file holds the named databases `mvcc`, `rows`,
`meta`, whose values carry checksums (`records`), and `totals`, with what a full walk of each must
add up to.

Its pages have no checksum, so a file is audited before it is used (`audit`), a large one while it
is used already.

LMDB syncs data and meta page in each commit (sync and metasync on), so a batch is durable when
`write` returns; with metasync off the last commit could vanish in a power cut after the log entries
that it covers were deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from elastickv.durable import Disk, OsDisk
from elastickv.errors import JOIN_ANEW_REMEDY, DiskFull, StoreCorrupt
from elastickv.store import page_faults
from elastickv.store.audit import audit_file
from elastickv.store.audit_process import BackgroundAudit
from elastickv.store.lmdb_environment import Environment, LmdbView, lock_file_of
from elastickv.store.records import crc32c
from elastickv.store.tables import BackendStats, Item, MapFull, Table, WriteBatch

INITIAL_MAP_BYTES = 4 << 30
MAX_MAP_BYTES = 1 << 44
INLINE_AUDIT_BYTES = 256 << 20
"""Audited in about half a second."""

Cleanup = Callable[[Callable[[], None]], None]
"""Does work that nobody waits for. Asked by the loop thread."""

_CURRENT = "CURRENT"
_NEW = ".new"
_GENERATION = re.compile(r"gen-(\d{8})\.mdb(-lock)?")


def _do_at_once(work: Callable[[], None]) -> None:
    work()


def encode_current(generation: int) -> bytes:
    """The content of CURRENT."""
    name = f"gen-{generation:08d}".encode()
    return name + b" %08x\n" % crc32c(name)


def decode_current(data: bytes) -> int:
    """The generation that CURRENT names. Raises `StoreCorrupt` unless it is exactly as written."""
    match = re.fullmatch(rb"gen-(\d{8}) [0-9a-f]{8}\n", data)
    if match is None or encode_current(int(match[1])) != data:
        raise StoreCorrupt("the store's CURRENT file is damaged", remedy=JOIN_ANEW_REMEDY)
    return int(match[1])


def generation_file(directory: Path, generation: int) -> Path:
    """Where a generation is kept."""
    return directory / f"gen-{generation:08d}.mdb"


def named_generation(disk: Disk, directory: Path) -> int | None:
    """The generation that CURRENT names, whose file may be missing; None for a store that was never
    used. Raises `StoreCorrupt` when CURRENT is damaged, or missing beside generations."""
    current = directory / _CURRENT
    if disk.exists(current):
        return decode_current(disk.read(current))
    if not any(_GENERATION.fullmatch(name) for name in disk.list(directory)):
        return None
    first = generation_file(directory, 1)
    # A crash may have come between the making of the first generation and of CURRENT.
    if not disk.exists(first) or audit_file(first).entries:
        raise StoreCorrupt("the store's CURRENT file is missing", remedy=JOIN_ANEW_REMEDY)
    return None


class LmdbImport:
    """An `ImportSink`: a new generation, unnamed by CURRENT until installed."""

    _BATCH_BYTES = 4 << 20

    def __init__(self, backend: LmdbBackend, generation: int, path: Path) -> None:
        self._backend = backend
        self._generation = generation
        self._path = path
        self._environment: Environment | None = Environment(path, INITIAL_MAP_BYTES)
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
            environment.grow(self._backend.max_map_bytes)
            environment.write(WriteBatch(puts=dict(pending)))

    def install(self) -> None:
        self._drain()
        if self._environment is not None:
            self._environment.close()
            self._environment = None
        try:
            self._backend.switch(self._generation)
        except DiskFull:
            # CURRENT names the old one; after any other error it may name either.
            self._backend.remove_generation(self._generation)
            raise

    def discard(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None
            self._backend.remove_generation(self._generation)


class LmdbBackend:
    """A `Backend` over LMDB in `directory`."""

    def __init__(self, directory: Path, *, disk: Disk | None = None,
                 initial_map_bytes: int = INITIAL_MAP_BYTES,
                 max_map_bytes: int = MAX_MAP_BYTES,
                 inline_audit_bytes: int = INLINE_AUDIT_BYTES,
                 cleanup: Cleanup = _do_at_once) -> None:
        """Open or create. Raises `StoreCorrupt` when the file is damaged or missing.

        A file of at most `inline_audit_bytes` is audited before this returns, a larger one in a
        process of its own: see `poll_audit`. `cleanup` deletes generations (default: at once):
        10 GB take seconds on a file system that tells the disk of freed blocks.
        """
        self.max_map_bytes = max_map_bytes
        self._disk = disk or OsDisk()
        self._directory = directory
        self._initial_map_bytes = initial_map_bytes
        self._views: set[LmdbView] = set()
        self._wants_growth = False
        self._cleanup = cleanup
        self._dropped_count = 0
        self._disk.make_directory(directory)
        self._generation = self._find_generation()
        for leftover in self._leftovers():
            self._disk.remove(leftover)
        self._audit = self._begin_audit(self._path_of(self._generation), inline_audit_bytes)
        try:
            self._environment = self._open(self._generation)
        except BaseException:
            if self._audit is not None:
                self._audit.stop()
            raise

    def _path_of(self, generation: int) -> Path:
        return generation_file(self._directory, generation)

    def _find_generation(self) -> int:
        generation = named_generation(self._disk, self._directory)
        if generation is not None:
            if not self._disk.exists(self._path_of(generation)):
                raise StoreCorrupt(f"the store's file {self._path_of(generation)} is missing",
                                   remedy=JOIN_ANEW_REMEDY)
            return generation
        if not self._disk.exists(self._path_of(1)):
            self._create_first()
        self._disk.replace(self._directory / _CURRENT, encode_current(1))
        return 1

    def _create_first(self) -> None:
        """Make an empty first generation; under its name only when it is complete."""
        path = self._path_of(1)
        new = path.with_name(path.name + _NEW)
        for leftover in (new, lock_file_of(new)):
            self._disk.remove(leftover)
        Environment(new, self._initial_map_bytes).close()
        self._disk.remove(lock_file_of(new))
        self._disk.rename(new, path)

    def _open(self, generation: int) -> Environment:
        return Environment(self._path_of(generation), self._initial_map_bytes)

    def _begin_audit(self, path: Path, inline_bytes: int) -> BackgroundAudit | None:
        if path.stat().st_size > inline_bytes:
            return BackgroundAudit(path)
        audit_file(path)
        return None

    def poll_audit(self) -> bool:
        if self._audit is not None and not self._audit.poll():
            self._stop_audit()
        return self._audit is not None

    def _stop_audit(self) -> None:
        if self._audit is not None:
            self._audit.stop()
            self._audit = None
            # A killed child leaves its read transaction behind, which would pin pages for ever.
            self._environment.forget_dead_readers()

    def _leftovers(self) -> list[Path]:
        # After an installation that failed at its last step, CURRENT may name the other one.
        named = decode_current(self._disk.read(self._directory / _CURRENT))
        found = []
        for name in self._disk.list(self._directory):
            match = _GENERATION.fullmatch(name)
            if _NEW in name or (match and int(match[1]) not in (self._generation, named)):
                found.append(self._directory / name)
        return found

    def view(self) -> LmdbView:
        view = LmdbView(self._environment, self._views.discard)
        self._views.add(view)
        return view

    def prefetch(self, table: Table, start: bytes, end: bytes, suffix: bytes, count: int, *,
                 reverse: bool = False) -> Callable[[], bool]:
        return partial(self._environment.touch, table, start, end, suffix, count, reverse=reverse)

    def prefetch_all(self, table: Table, start: bytes, byte_count: int) -> Callable[[], bool]:
        return partial(self._environment.touch_all, table, start, byte_count)

    def disk_waits(self) -> int:
        return page_faults.major_faults()

    def write(self, batch: WriteBatch) -> None:
        try:
            self._environment.write(batch)
        except MapFull:
            if self._environment.map_bytes >= self.max_map_bytes:
                raise DiskFull(f"the store has reached its limit of {self.max_map_bytes} bytes",
                               remedy="allow the node more address space (ulimit -v) and restart "
                                      "it") from None
            self._wants_growth = True
            raise

    def reserve(self, byte_count: int) -> None:
        environment = self._environment
        used = environment.used_bytes()
        # A random insert may copy a leaf page and split it, hence the factor.
        while self._wants_growth or used + 8 * byte_count > environment.map_bytes:
            if environment.map_bytes < self.max_map_bytes:  # at the limit they are left alone
                self._close_views()
            if not environment.grow(self.max_map_bytes):
                self.max_map_bytes = environment.map_bytes
                self._wants_growth = False
                return
            self._wants_growth = False

    def _close_views(self) -> None:
        for view in list(self._views):
            view.close()

    def stats(self) -> BackendStats:
        environment = self._environment
        used = environment.used_bytes()
        return BackendStats(used, environment.map_bytes,
                            {table: total.count for table, total in environment.totals.items()})

    def begin_import(self) -> LmdbImport:
        for leftover in self._leftovers():
            if _NEW not in leftover.name:  # else it is on its way out
                self._drop(leftover)
        generation = self._generation + 1
        try:
            return LmdbImport(self, generation, self._path_of(generation))
        except DiskFull:
            self.remove_generation(generation)
            raise

    def switch(self, generation: int) -> None:
        """Make `generation` current, durably, and drop the one before. Raises `DiskFull` without
        effect."""
        self._disk.sync_directory(self._directory)
        self._disk.replace(self._directory / _CURRENT, encode_current(generation))
        self._stop_audit()
        self._close_views()
        self._environment.close()
        old, self._generation = self._generation, generation
        self._environment = self._open(generation)
        self.remove_generation(old)

    def remove_generation(self, generation: int) -> None:
        """Delete a generation's files, the large one perhaps later; never the current one's."""
        if generation == self._generation:
            raise ValueError("the current generation cannot be removed")
        path = self._path_of(generation)
        self._disk.remove(lock_file_of(path))
        if self._disk.exists(path):
            self._drop(path)

    def _drop(self, path: Path) -> None:
        """Delete a file that is not in use. Its name is free on return: another generation may get
        it before this one is deleted."""
        self._dropped_count += 1
        dropped = path.with_name(f"{path.name}{_NEW}-{self._dropped_count}")
        try:
            self._disk.rename(path, dropped)
        except DiskFull:
            self._disk.remove(path)
        else:
            self._cleanup(partial(self._disk.remove, dropped))

    def close(self) -> None:
        self._stop_audit()
        self._close_views()
        self._environment.close()
