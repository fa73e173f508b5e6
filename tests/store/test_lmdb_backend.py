"""The LMDB backend: files, growth, full disks, crashes, and generations."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest

from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, Overloaded, StoreCorrupt
from elastickv.store import lmdb_environment, records
from elastickv.store.audit import audit_file
from elastickv.store.lmdb_backend import LmdbBackend, LmdbImport, decode_current, encode_current
from elastickv.store.lmdb_environment import LOCK_FILE_BYTES, lock_file_of, prepare_lock_file
from elastickv.store.mvcc_store import Store
from elastickv.store.records import CRC_BYTES
from elastickv.store.snapshot import StoreSnapshots
from elastickv.store.tables import MapFull, Table, WriteBatch
from elastickv.store.values import plain_record
from tests.store.conftest import LATEST

REPOSITORY = Path(__file__).resolve().parents[2]


def run_child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=REPOSITORY,
                          text=True, capture_output=True, timeout=60, check=False)


def fill(store: Store, count: int, size: int = 1_000) -> None:
    store.apply_group(store.applied_index + 1, [
        (b"key-%05d" % number, store.applied_index + 1, plain_record(bytes(size)))
        for number in range(count)])


def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path / "store")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()}
    assert modes == {"CURRENT": 0o600, "gen-00000001.mdb": 0o600, "gen-00000001.mdb-lock": 0o600}
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    backend.close()


@pytest.mark.parametrize("data", [
    b"", b"gen-00000001\n", encode_current(1)[:-1], encode_current(1) + b"\n",
    encode_current(1).replace(b"1", b"2", 1), encode_current(1).upper(),
], ids=["empty", "no-checksum", "cut", "longer", "other-number", "other-case"])
def test_a_damaged_current_file_is_refused(tmp_path: Path, data: bytes) -> None:
    LmdbBackend(tmp_path).close()
    (tmp_path / "CURRENT").write_bytes(data)
    with pytest.raises(StoreCorrupt, match="CURRENT"):
        LmdbBackend(tmp_path)


@pytest.mark.parametrize("generation", [1, 2, 99_999_999])
def test_current_round_trip(generation: int) -> None:
    assert decode_current(encode_current(generation)) == generation


def test_a_missing_file_is_not_an_empty_store(tmp_path: Path) -> None:
    store = Store.open(LmdbBackend(tmp_path))
    fill(store, 1)
    store.flush_now()
    store.close()
    (tmp_path / "gen-00000001.mdb").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreCorrupt, match="missing"):
        LmdbBackend(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "gen-00000001.mdb")
    (tmp_path / "CURRENT").unlink()
    with pytest.raises(StoreCorrupt, match="CURRENT"):
        LmdbBackend(tmp_path)


@pytest.mark.parametrize("crashed_before", ["rename", "current"])
def test_a_crash_while_the_store_was_made(tmp_path: Path, crashed_before: str) -> None:
    LmdbBackend(tmp_path).close()
    (tmp_path / "CURRENT").unlink()
    if crashed_before == "rename":
        for name in ("gen-00000001.mdb", "gen-00000001.mdb-lock"):
            (tmp_path / name).rename(tmp_path / name.replace(".mdb", ".mdb.new"))
        (tmp_path / "gen-00000001.mdb.new").write_bytes(b"half a page")
    backend = LmdbBackend(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "CURRENT", "gen-00000001.mdb", "gen-00000001.mdb-lock"]
    backend.close()


def test_the_map_grows_from_a_tiny_size(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path, initial_map_bytes=1 << 17)
    store = Store.open(backend)
    first_bytes = backend.stats().bytes_mapped
    for _ in range(4):
        fill(store, 500)
        store.flush_now()
    assert backend.stats().bytes_mapped >= 16 * first_bytes
    assert len(store.scan(b"", b"", 9_999, LATEST, 0)) == 500
    store.close()
    reopened = Store.open(LmdbBackend(tmp_path, initial_map_bytes=1 << 17))
    assert len(reopened.scan(b"", b"", 9_999, LATEST, 0)) == 500
    fill(reopened, 500)
    reopened.flush_now()
    reopened.close()


def test_a_full_map_is_told_apart_from_its_limit(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path, initial_map_bytes=1 << 17, max_map_bytes=1 << 18)
    items = [(b"%05d" % number, bytes(1_000)) for number in range(1_000)]
    with pytest.raises(MapFull):
        backend.write(WriteBatch(puts={Table.MVCC: items}))
    backend.reserve(0)
    with pytest.raises(DiskFull, match=str(1 << 18)) as caught:
        backend.write(WriteBatch(puts={Table.MVCC: items}))
    assert not isinstance(caught.value, MapFull)
    backend.write(WriteBatch(puts={Table.MVCC: items[:50]}))
    view = backend.view()
    assert list(view.iterate(Table.MVCC)) == items[:50]
    backend.close()


def test_a_store_at_its_limit_goes_on_reading(tmp_path: Path) -> None:
    store = Store.open(LmdbBackend(tmp_path, initial_map_bytes=1 << 17, max_map_bytes=1 << 19))
    fill(store, 50)
    store.flush_now()
    fill(store, 1_000)
    with pytest.raises(DiskFull):
        store.flush_now()
    assert (store.durable_index, store.applied_index) == (1, 2)
    assert len(store.scan(b"", b"", 9_999, LATEST, 0)) == 1_000
    store.close()


def test_a_store_that_gets_no_address_space_goes_on_reading(tmp_path: Path) -> None:
    """In a process of its own, since the limit cannot be lifted again."""
    child = run_child("""
        import pathlib, resource, sys
        from elastickv.errors import DiskFull
        from elastickv.store.lmdb_backend import LmdbBackend
        from elastickv.store.mvcc_store import Store
        from elastickv.store.values import plain_record

        store = Store.open(LmdbBackend(pathlib.Path(sys.argv[1]), initial_map_bytes=64 << 20))
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), used + (30 << 20)))
        record = plain_record(bytes(1 << 20))
        try:
            for number in range(1, 100):
                store.apply_group(number, [(b"%d" % number, number, record)])
                if number % 4 == 0:
                    store.flush_now()
        except DiskFull as error:
            print(store.durable_index > 4, store.get(b"1", 1 << 60, 0).record == record, error)
        """, str(tmp_path))
    assert child.stdout.startswith("True True the store has reached its limit"), child.stderr[-999:]
    assert "ulimit -v" in child.stdout


def test_the_map_grows_while_threads_read_ahead(tmp_path: Path) -> None:
    """With one of their transactions open, LMDB would take the map away from under it."""
    backend = LmdbBackend(tmp_path, initial_map_bytes=256 << 10)
    written = []
    is_over = threading.Event()

    def read_ahead() -> None:
        while not is_over.is_set():
            backend.prefetch(Table.MVCC, b"", b"", b"\0", 10_000)()

    threads = [threading.Thread(target=read_ahead) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(150):
            written.append((b"%04d" % number, bytes([number]) * 20_000))
            backend.reserve(20_000)
            backend.write(WriteBatch(puts={Table.MVCC: written[-1:]}))
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)
    assert backend.stats().bytes_mapped >= 16 * (256 << 10)
    view = backend.view()
    assert list(view.iterate(Table.MVCC)) == written
    view.close()
    backend.close()


def test_large_values_are_not_read_ahead_by_the_thousand(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LmdbBackend(tmp_path)
    value = bytes(1 << 20)
    entries = 0

    def large(*arguments: bytes) -> Iterator[tuple[bytes, bytes]]:
        nonlocal entries
        while entries < 1_000:
            entries += 1
            yield b"key", value

    monkeypatch.setattr(lmdb_environment, "_newest_forward", large)
    backend.prefetch(Table.MVCC, b"", b"", b"\0", 1_000)()
    assert entries == lmdb_environment.TOUCHED_BYTES // len(value)
    backend.close()


@pytest.mark.parametrize(("start", "byte_count", "touched"), [
    (b"", 1, "0"), (b"", 103, "0"), (b"", 104, "01"), (b"", 10_000, "012345678"),
    (b"k-5", 10_000, "5678"), (b"k-5\0", 10_000, "678"), (b"l", 10_000, "")])
def test_entries_are_read_ahead_until_they_are_so_many_bytes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, byte_count: int,
        touched: str) -> None:
    backend = LmdbBackend(tmp_path)
    backend.write(WriteBatch(puts={Table.MVCC: [
        (b"k-%d" % number, bytes(100 - CRC_BYTES)) for number in range(9)]}))
    read = ""
    walk = lmdb_environment._forward

    def noted(*arguments: Any) -> Iterator[tuple[bytes, bytes]]:
        nonlocal read
        for entry in walk(*arguments):
            read += entry[0].decode().removeprefix("k-")
            yield entry

    monkeypatch.setattr(lmdb_environment, "_forward", noted)
    backend.prefetch_all(Table.MVCC, start, byte_count)()
    assert read == touched
    backend.close()


def test_waiting_for_the_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LmdbBackend(tmp_path)
    backend.write(WriteBatch(puts={Table.MVCC: [(b"k", b"v")]}))
    work = backend.prefetch_all(Table.MVCC, b"", 1_000)
    for counts, waited in (((7, 7), False), ((7, 8), True)):
        monkeypatch.setattr(lmdb_environment.page_faults, "major_faults",
                            partial(next, iter(counts)))
        assert work() is waited
    backend.close()


class RecordingEnvironment:
    """An LMDB environment that tells when its map is taken away."""

    def __init__(self, env: Any, events: list[str]) -> None:
        self._env = env
        self._events = events

    def __getattr__(self, name: str) -> object:
        if name in ("set_mapsize", "close"):
            self._events.append(name)
        return getattr(self._env, name)


@pytest.mark.parametrize(("change", "event"), [
    (lambda backend: backend._environment.grow(1 << 40), "set_mapsize"),
    (LmdbBackend.close, "close")], ids=["growth", "the end"])
def test_reading_ahead_gives_way_to_whoever_changes_the_map(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[LmdbBackend], object],
        event: str) -> None:
    """It stops at its next entry, and before that the map stays."""
    backend = LmdbBackend(tmp_path)
    environment = backend._environment
    events: list[str] = []
    environment.env = RecordingEnvironment(environment.env, events)
    has_begun = threading.Event()
    entries = 0
    deadline = time.monotonic() + 30

    def slow(*arguments: bytes) -> Iterator[tuple[bytes, None]]:
        nonlocal entries
        try:
            for entries in range(1_000):
                yield b"key", None
                has_begun.set()
                while entries == 2 and not environment._gate.is_shut \
                        and time.monotonic() < deadline:
                    pass
        finally:
            events.append("out")

    monkeypatch.setattr(lmdb_environment, "_newest_forward", slow)
    reader = threading.Thread(target=backend.prefetch(Table.MVCC, b"", b"", b"\0", 1_000))
    reader.start()
    assert has_begun.wait(30)
    change(backend)
    reader.join(30)
    assert (entries, events) == (3, ["out", event])
    backend.close()


@pytest.mark.parametrize("read_bytes", [10, 100_000])
def test_growth_ends_open_exports_with_a_typed_error(tmp_path: Path, read_bytes: int) -> None:
    """Whether they have only begun or stand in the middle of a table."""
    store = Store.open(LmdbBackend(tmp_path, initial_map_bytes=1 << 20))
    fill(store, 100, size=5_000)
    store.flush_now()
    export = StoreSnapshots(store).open_export()
    export.read(read_bytes)
    fill(store, 3_000)
    store.flush_now()
    with pytest.raises(Overloaded, match="resized"):
        b"".join(iter(lambda: export.read(1 << 20), b""))
    export.close()
    store.close()


def test_installing_removes_the_generation_before(tmp_path: Path) -> None:
    source = Store.open(LmdbBackend(tmp_path / "source"))
    fill(source, 10)
    source.flush_now()
    target = Store.open(LmdbBackend(tmp_path / "target"))
    for generation in (2, 3):
        export = StoreSnapshots(source).open_export()
        receiver = StoreSnapshots(target).open_import()
        receiver.write(export.read(1 << 30))
        receiver.finish()
        export.close()
        assert sorted(path.name for path in (tmp_path / "target").iterdir()) == [
            "CURRENT", f"gen-{generation:08d}.mdb", f"gen-{generation:08d}.mdb-lock"]
    source.close()
    target.close()


@pytest.mark.parametrize("named", [1, 2])
def test_a_crash_while_a_snapshot_is_installed(tmp_path: Path, named: int) -> None:
    """Before CURRENT is replaced the old content is the store, afterwards the new one."""
    for generation in (1, 2):
        backend = LmdbBackend(tmp_path / str(generation))
        backend.write(WriteBatch(puts={Table.ROWS: [(b"generation", b"%d" % generation)]}))
        backend.close()
    crashed = tmp_path / "1"
    (tmp_path / "2" / "gen-00000001.mdb").rename(crashed / "gen-00000002.mdb")
    (crashed / "CURRENT").write_bytes(encode_current(named))
    backend = LmdbBackend(crashed)
    view = backend.view()
    assert view.get(Table.ROWS, b"generation") == b"%d" % named
    backend.close()
    assert [path.name for path in crashed.glob("*.mdb")] == [f"gen-{named:08d}.mdb"]


def content(directory: Path) -> bytes | None:
    """The mark of the content that the store in `directory` has after a start."""
    backend = LmdbBackend(directory)
    view = backend.view()
    mark = view.get(Table.ROWS, b"mark")
    backend.close()
    return mark


def marked(directory: Path, disk: OsDisk | None = None, cleanup: Any = None) -> LmdbBackend:
    """A store with the content "old"."""
    options = {} if cleanup is None else {"cleanup": cleanup}
    backend = LmdbBackend(directory, disk=disk, **options)
    backend.write(WriteBatch(puts={Table.ROWS: [(b"mark", b"old")]}))
    return backend


def import_new(backend: LmdbBackend) -> LmdbImport:
    """An import of the content "new", complete."""
    sink = backend.begin_import()
    sink.append(Table.ROWS, [(b"mark", b"new")])
    return sink


def generations(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if "CURRENT" not in path.name)


class Crash(BaseException):
    """The process is gone."""


class CrashingDisk(OsDisk):
    """Ends with the operation number `crash_at`, counted from when that is set: before the
    operation, or behind it."""

    crash_at: int | None = None
    crashes_behind = False
    operations = 0

    def _crashing(self, operation: Callable[..., None], *arguments: Any) -> None:
        if self.crash_at is None:
            operation(*arguments)
            return
        self.operations += 1
        is_last = self.operations == self.crash_at
        if is_last and not self.crashes_behind:
            raise Crash
        operation(*arguments)
        if is_last:
            raise Crash

    def replace(self, path: Path, data: bytes) -> None:
        self._crashing(super().replace, path, data)

    def rename(self, source: Path, target: Path) -> None:
        self._crashing(super().rename, source, target)

    def remove(self, path: Path) -> None:
        self._crashing(super().remove, path)


@pytest.mark.parametrize("crashes_behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("end", ["install", "discard"])
def test_a_crash_at_any_step_of_the_end_of_an_import(tmp_path: Path, end: str,
                                                     crashes_behind: bool) -> None:
    """What a start finds is whole, and nothing else is left."""
    marks = []
    crashed = True
    while crashed:
        directory = tmp_path / f"{len(marks)}"
        disk = CrashingDisk()
        backend = marked(directory, disk)
        sink = import_new(backend)
        disk.crash_at, disk.crashes_behind = len(marks) + 1, crashes_behind
        crashed = False
        try:
            getattr(sink, end)()
        except Crash:
            crashed = True
        disk.crash_at = None
        backend.close()
        marks.append(content(directory))
        assert len(generations(directory)) == 2
    if end == "install":
        before = 0 if crashes_behind else 2  # CURRENT is replaced in two steps
        assert marks == [b"old"] * before + [b"new"] * (6 - before)
    else:
        assert marks == [b"old"] * 4


@pytest.mark.parametrize("end", ["install", "discard"])
def test_a_generation_that_is_large_goes_beside_the_loop(tmp_path: Path, end: str) -> None:
    """To delete a large file takes some file systems seconds."""
    later: deque[Callable[[], None]] = deque()
    backend = marked(tmp_path, cleanup=later.append)
    getattr(import_new(backend), end)()
    assert [name for name in generations(tmp_path) if name.endswith((".mdb", "-lock"))] == (
        ["gen-00000002.mdb", "gen-00000002.mdb-lock"] if end == "install"
        else ["gen-00000001.mdb", "gen-00000001.mdb-lock"])
    assert (len(later), len(generations(tmp_path))) == (1, 3)
    later.popleft()()
    assert len(generations(tmp_path)) == 2
    backend.close()


def test_an_import_is_not_disturbed_by_the_end_of_those_before(tmp_path: Path) -> None:
    """They had the same number, and nothing of them has been deleted yet."""
    later: deque[Callable[[], None]] = deque()
    backend = marked(tmp_path, cleanup=later.append)
    for _ in range(2):
        import_new(backend).discard()
    sink = import_new(backend)
    assert (len(later), len(generations(tmp_path))) == (2, 6)
    while later:
        later.popleft()()
    sink.install()
    later.popleft()()
    backend.close()
    assert generations(tmp_path) == ["gen-00000002.mdb", "gen-00000002.mdb-lock"]
    assert content(tmp_path) == b"new"


def test_a_disk_that_is_too_full_to_rename_the_old_generation(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not in use any more: the installation stands."""
    backend = marked(tmp_path, cleanup=lambda work: pytest.fail("nothing was renamed"))
    sink = import_new(backend)

    rename = backend._disk.rename

    def full(source: Path, target: Path) -> None:
        if source.suffix == ".mdb":
            raise DiskFull("no space left")
        rename(source, target)

    monkeypatch.setattr(backend._disk, "rename", full)
    sink.install()
    backend.close()
    assert generations(tmp_path) == ["gen-00000002.mdb", "gen-00000002.mdb-lock"]
    assert content(tmp_path) == b"new"


class CountingCursor:
    """An LMDB cursor whose moves and read bytes are counted in `counts`."""

    def __init__(self, cursor: Any, counts: Counter[str]) -> None:
        self._cursor = cursor
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._cursor, name)

        def counted(*arguments: bytes) -> Any:
            result = method(*arguments)
            if name in ("value", "item"):
                self._counts["bytes"] += len(result if name == "value" else result[1])
            elif name != "key":
                self._counts["moves"] += 1
            return result

        return counted


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at", [0, 1, 50, 4_999, 5_000])
@pytest.mark.parametrize("only", [None, b"c"], ids=["all", "one"])
def test_a_walk_does_as_much_for_one_version_as_for_thousands(
        tmp_path: Path, reverse: bool, at: int, only: bytes | None) -> None:
    """It moves its cursor a few times a key, and reads one value that it does not need at most."""
    value = bytes(1_000)
    backend = LmdbBackend(tmp_path)
    versions = {b"a": 1, b"b": 5_000, b"c": 3, b"d": 5_000, b"e": 1}
    backend.write(WriteBatch(puts={Table.MVCC: [
        (prefix + number.to_bytes(8, "big"), value)
        for prefix, count in versions.items() for number in range(count)]}))
    view = backend.view()
    counts: Counter[str] = Counter()
    real = view._txn
    view._txn = SimpleNamespace(abort=real.abort, cursor=lambda database: CountingCursor(
        real.cursor(database), counts))
    found = dict(view.newest(Table.MVCC, only or b"", only + b"\xff" if only else b"",
                             at.to_bytes(8, "big"), reverse=reverse))
    wanted = [prefix for prefix in versions if only in (None, prefix)]
    assert found == {prefix + at.to_bytes(8, "big"): value if at < versions[prefix] else None
                     for prefix in wanted}
    answers = sum(at < versions[prefix] for prefix in wanted)
    assert counts["moves"] <= 5 * len(wanted) + 2
    assert counts["bytes"] <= (answers + 1) * (len(value) + 4)
    view.close()
    backend.close()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("damaged", "is_met"), [(0, False), (1, True), (2, False)])
def test_a_damaged_answer_is_an_error_and_what_is_passed_by_is_not_checked(
        tmp_path: Path, reverse: bool, damaged: int, is_met: bool) -> None:
    backend = LmdbBackend(tmp_path)
    keys = [b"k%d" % number for number in range(3)]
    backend.write(WriteBatch(puts={Table.MVCC: [(key, b"value") for key in keys]}))
    environment = backend._environment
    with environment.env.begin(write=True) as txn:
        txn.put(keys[damaged], b"something else", db=environment.databases[Table.MVCC])
    view = backend.view()
    walk = view.newest(Table.MVCC, b"", b"", b"1", reverse=reverse)
    if is_met:
        with pytest.raises(StoreCorrupt, match="checksum"):
            list(walk)
    else:
        assert list(walk) == [(b"k1", b"value")]
    view.close()
    backend.close()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_walk_ends_with_its_view(tmp_path: Path, reverse: bool, taken: int) -> None:
    backend = LmdbBackend(tmp_path)
    backend.write(WriteBatch(puts={Table.MVCC: [
        (b"%d%d" % (key, version), b"v") for key in range(4) for version in range(2)]}))
    view = backend.view()
    walk = view.newest(Table.MVCC, b"", b"", b"0", reverse=reverse)
    for _ in range(taken):
        next(walk)
    view.close()
    with pytest.raises(Overloaded, match="resized"):
        next(walk)
    backend.close()


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from elastickv.errors import DiskFull
    from elastickv.store.lmdb_backend import LmdbBackend
    from elastickv.store.mvcc_store import Store
    from elastickv.store.values import plain_record

    store = Store.open(LmdbBackend(Path(sys.argv[1])))
    store.apply_group(1, [(b"before", 1, plain_record(b"x" * 9000))])
    store.flush_now()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    store.apply_group(2, [(b"%04d" % n, 2, plain_record(b"y" * 1000)) for n in range(1000)])
    for attempt in range(3):
        try:
            store.flush_now()
        except DiskFull as error:
            print("full:", error.remedy)
    assert store.durable_index == 1
    assert len(store.scan(b"", b"", 9999, 1 << 40, 0)) == 1001
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    store.flush_now()
    assert store.durable_index == 2
    store.close()
    store = Store.open(LmdbBackend(Path(sys.argv[1])))
    assert len(store.scan(b"", b"", 9999, 1 << 40, 0)) == 1001
    print("recovered")
"""


def test_a_full_disk_under_lmdb(tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the kernel refuses the same writes."""
    done = run_child(FULL_DISK, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("full: free space") == 3
    assert done.stdout.endswith("recovered\n")


def test_a_store_whose_last_commit_failed_is_as_it_was_before(tmp_path: Path) -> None:
    """Of a commit that ends in an error of the disk the next start finds nothing, and no damage."""
    store = Store.open(LmdbBackend(tmp_path))
    for number in range(1, 7):
        fill(store, number)
        store.flush_now()
    fill(store, 9)
    path = tmp_path / "gen-00000001.mdb"
    [for_metas] = [number for number in map(int, os.listdir("/proc/self/fd"))
                   if os.path.exists(f"/proc/self/fd/{number}")
                   and os.path.samefile(f"/proc/self/fd/{number}", path)
                   and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DSYNC]
    reading = os.open(path, os.O_RDONLY)
    os.dup2(reading, for_metas)  # a meta page is written last, and only through this one
    os.close(reading)
    with pytest.raises(OSError, match="the store failed"):
        store.flush_now()
    store.close()
    store = Store.open(LmdbBackend(tmp_path))
    assert (store.applied_index, len(store.scan(b"", b"", 99, LATEST, 0))) == (6, 6)
    fill(store, 9)
    store.flush_now()
    store.close()
    assert audit_file(path).entries


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 99 files of its own."""
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=99,mode=700", "tmpfs",
               str(mount_point)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a file system here")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)


@pytest.mark.parametrize("takes_files", [True, False])
def test_a_full_file_system(small_disk: Path, takes_files: bool) -> None:
    store = Store.open(LmdbBackend(small_disk / "store"))
    fill(store, 10)
    store.flush_now()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(7 << 20))
    if not takes_files:
        with contextlib.suppress(OSError):
            for number in range(100):
                (small_disk / f"{number}").touch()
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "one more").touch()
    fill(store, 1_500)
    for _ in range(2):
        with pytest.raises(DiskFull, match="no space"):
            store.flush_now()
    assert (store.durable_index, len(store.scan(b"", b"", 9_999, LATEST, 0))) == (1, 1_500)
    ballast.unlink()
    store.flush_now()
    store.close()
    store = Store.open(LmdbBackend(small_disk / "store"))
    assert (store.applied_index, len(store.scan(b"", b"", 9_999, LATEST, 0))) == (2, 1_500)
    store.close()


def test_an_export_on_a_full_file_system_ends_and_gives_its_room_back(small_disk: Path) -> None:
    """It pins the pages that the flush could use again."""
    store = Store.open(LmdbBackend(small_disk / "store"))

    def rewrite() -> None:
        store.apply_group(store.applied_index + 1, [
            (b"%04d" % number, 1, plain_record(bytes(1_000))) for number in range(500)])
        store.flush_now()

    rewrite()
    snapshots = StoreSnapshots(store)
    export = snapshots.open_export()
    export.read(1)
    with pytest.raises(DiskFull):
        deque(iter(rewrite, "never"), maxlen=0)
    for refused in (partial(export.read, 1), snapshots.open_export):
        with pytest.raises(DiskFull, match="no space"):
            refused()
    export.close()
    store.flush_now()
    snapshots.open_export().close()
    store.close()


def test_an_import_on_a_full_file_system(small_disk: Path, tmp_path: Path) -> None:
    source = Store.open(LmdbBackend(tmp_path / "source"))
    fill(source, 9_000)
    source.flush_now()
    target = Store.open(LmdbBackend(small_disk / "store"))
    export = StoreSnapshots(source).open_export()
    receiver = StoreSnapshots(target).open_import()
    with pytest.raises(DiskFull):
        deque(map(receiver.write, iter(lambda: export.read(1 << 20), b"")), maxlen=0)
    export.close()
    assert [path.name for path in (small_disk / "store").glob("*.mdb")] == ["gen-00000001.mdb"]
    fill(target, 10)
    target.flush_now()
    source.close()
    target.close()


EVERY_AMOUNT_OF_ROOM = """
    import os, sys
    from pathlib import Path
    from elastickv.errors import DiskFull
    from elastickv.store.lmdb_backend import LmdbBackend

    directory = Path(sys.argv[1])
    backend = LmdbBackend(directory / "store")
    ballast = os.open(directory / "ballast", os.O_CREAT | os.O_WRONLY)
    size = 0
    for piece in (1 << 20, 4096, 1):
        try:
            while True:
                size += os.write(ballast, bytes(piece))
        except OSError:
            pass
    refused = 0
    while True:
        try:
            backend.begin_import().discard()
            break
        except DiskFull:
            refused += 1
            assert not list(directory.glob("store/gen-00000002*"))
        size -= 4096
        os.ftruncate(ballast, size)
    print(refused > 2, refused < 30)
"""


def test_an_import_begins_or_is_refused_on_every_amount_of_room(small_disk: Path) -> None:
    """In a process of its own: LMDB makes its lock file through a map, where a full disk kills."""
    done = run_child(EVERY_AMOUNT_OF_ROOM, str(small_disk))
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr


def test_lmdb_never_finds_a_lock_file_without_blocks(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    real_open = lmdb.open

    def watched(path: str, **options: Any) -> Any:
        allocated.append(lock_file_of(Path(path)).stat().st_blocks * 512)
        return real_open(path, **options)

    monkeypatch.setattr(lmdb, "open", watched)
    backend = LmdbBackend(tmp_path)
    backend.begin_import().install()
    backend.close()
    lock_file_of(tmp_path / "gen-00000002.mdb").unlink()
    LmdbBackend(tmp_path).close()
    assert len(allocated) == 5
    assert min(allocated) >= LOCK_FILE_BYTES


@pytest.mark.parametrize("content", [
    None, b"", b"in use" * 700, b"in use" * 1_365 + b"..", b"in use" * 2_000,
], ids=["absent", "empty", "shorter", "whole", "longer"])
def test_what_a_lock_file_holds_stays(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is not None:
        lock_file_of(path).write_bytes(content)
    prepare_lock_file(path)
    content = content or b""
    assert lock_file_of(path).read_bytes() == content.ljust(LOCK_FILE_BYTES, b"\0")


def test_lmdb_takes_a_prepared_lock_file_as_it_is(tmp_path: Path) -> None:
    """Neither cut nor grown, by the node or a second process; the node's readers stay in it."""
    backend = LmdbBackend(tmp_path)
    view = backend.view()
    path = tmp_path / "gen-00000001.mdb"
    other = run_child("""
        import pathlib, sys
        import lmdb
        from elastickv.store.lmdb_environment import prepare_lock_file
        path = pathlib.Path(sys.argv[1])
        prepare_lock_file(path)
        with lmdb.open(str(path), subdir=False, readonly=True) as environment:
            with environment.begin():
                print(environment.readers().count("\\n"), environment.info()["max_readers"])
        """, str(path))
    assert other.stdout == f"3 {backend._environment.env.info()['max_readers']}\n", other.stderr
    assert lock_file_of(path).stat().st_size == LOCK_FILE_BYTES
    view.close()
    backend.close()


WRITER = """
    import sys
    from pathlib import Path
    from elastickv.store.lmdb_backend import LmdbBackend
    from elastickv.store.mvcc_store import Store
    from elastickv.store.values import plain_record

    store = Store.open(LmdbBackend(Path(sys.argv[1]), initial_map_bytes=1 << 17))
    while True:
        index = store.applied_index + 1
        key, record = b"%03d" % (index * 7 % 101), plain_record(b"%d" % index)
        store.apply_group(index, [(key, index, record)], rows=[(b"row", b"%d" % index)])
        store.flush_now()
        print(index, flush=True)
"""


def test_kill_at_any_moment_keeps_what_was_flushed(tmp_path: Path) -> None:
    generator = random.Random(7)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)], cwd=REPOSITORY,
            stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(generator.randint(5, 40)):
            last = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split("\n")[:-1]
        process.wait()
        process.stdout.close()
        flushed = int(rest[-1]) if rest else last
        store = Store.open(LmdbBackend(tmp_path, initial_map_bytes=1 << 17))
        assert store.applied_index in (flushed, flushed + 1)
        for index in range(1, store.applied_index + 1):
            version = store.latest_version(b"%03d" % (index * 7 % 101), index)
            assert version is not None
            assert version.record == plain_record(b"%d" % index)
        assert store.row(b"row") == b"%d" % store.applied_index
        store.close()


def test_a_key_that_is_not_there_costs_no_look_at_its_neighbour_s_value(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a large one, on pages that are not in memory."""
    store = Store.open(LmdbBackend(tmp_path))
    store.apply_group(1, [(b"k2", 5, plain_record(b"v" * (1 << 20)))])
    store.flush_now()

    def reveal(table: Table, key: bytes, stored: bytes) -> bytes:
        raise AssertionError("the value was read")

    monkeypatch.setattr(records, "reveal", reveal)
    assert store.get(b"k1", LATEST, 0) is None
    with pytest.raises(AssertionError, match="was read"):
        store.get(b"k2", LATEST, 0)
    store.close()
