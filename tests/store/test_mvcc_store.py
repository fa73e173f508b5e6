"""The store's own rules; its reads in general are in test_store_model."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, InvalidArgument, StoreCorrupt, WireError
from elastickv.store.gc import Compactor
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import RESERVED_META, Store, Write
from elastickv.store.tables import MapFull, Table, WriteBatch
from elastickv.store.values import plain_record, tombstone_record
from tests.store.conftest import LATEST, OpenStore

VALUE = plain_record(b"value")


class ObedientBackend(MemoryBackend):
    """Fails with `error` when told to, waits for `gate` before it writes, counts reservations."""

    def __init__(self, directory: Path) -> None:
        super().__init__(OsDisk(), directory)
        self.error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.writes = 0
        self.reserved = 0

    def write(self, batch: WriteBatch) -> None:
        self.entered.set()
        self.gate.wait()
        if self.error is not None:
            raise self.error
        self.writes += 1
        super().write(batch)

    def reserve(self, byte_count: int) -> None:
        self.reserved += 1
        if isinstance(self.error, MapFull) and self.reserved > 2:
            self.error = None


@pytest.fixture
def backend(tmp_path: Path) -> ObedientBackend:
    return ObedientBackend(tmp_path)


def keys_of(store: Store) -> list[bytes]:
    return [key for key, _ in store.scan(b"", b"", 100, LATEST, 0)]


@pytest.mark.parametrize(("index", "bad", "error"), [
    (2, (b"", 5, VALUE), WireError),
    (2, (b"k" * 481, 5, VALUE), WireError),
    (2, (b"k", 0, VALUE), WireError),
    (2, (b"k", 1 << 64, VALUE), WireError),
    (2, (b"k", 5, b"\x00" * 8), WireError),
    (2, (b"k", 5, b"\x04" + bytes(8)), WireError),
    (1, (b"k", 5, VALUE), ValueError),
    (0, (b"k", 5, VALUE), ValueError),
], ids=["empty-key", "long-key", "zero-timestamp", "huge-timestamp", "short-record",
        "unknown-encryption-state", "repeated-index", "earlier-index"])
def test_a_refused_group_changes_nothing(store: Store, index: int, bad: Write,
                                         error: type[Exception]) -> None:
    store.apply_group(1, [(b"first", 1, VALUE)], rows=[(b"row", b"1")], meta={b"fact": b"1"})
    with pytest.raises(error):
        store.apply_group(index, [(b"good", 4, VALUE), bad], rows=[(b"row", b"2")],
                          meta={b"fact": b"2"})
    assert (store.applied_index, store.max_commit_ts, keys_of(store)) == (1, 1, [b"first"])
    assert (store.row(b"row"), store.meta(b"fact")) == (b"1", b"1")


@pytest.mark.parametrize("name", sorted(RESERVED_META))
def test_the_stores_own_facts_cannot_be_overwritten(store: Store, name: bytes) -> None:
    with pytest.raises(ValueError, match="reserved"):
        store.apply_group(1, (), meta={name: b"x"})
    assert store.applied_index == 0


def test_timestamps_out_of_log_order_still_read_right(store: Store) -> None:
    """A version that was applied later but committed earlier never hides the newer one."""
    store.apply_group(1, [(b"k", 50, plain_record(b"50"))])
    store.flush_now()
    store.apply_group(2, [(b"k", 40, plain_record(b"40"))])
    newest = store.get(b"k", LATEST, 0)
    assert newest is not None
    assert newest.commit_ts == 50
    job = store.begin_flush()
    store.apply_group(3, [(b"k", 30, plain_record(b"30"))])
    assert job is not None
    for at_ts, expected in [(LATEST, 50), (49, 40), (39, 30), (29, None)]:
        version = store.get(b"k", at_ts, 0)
        assert (version.commit_ts if version else None) == expected
        scanned = store.scan(b"", b"", 9, at_ts, 0)
        assert [pair[1].commit_ts for pair in scanned] == ([expected] if expected else [])
    job.run()
    store.finish_flush(job)


def test_latest_version_shows_tombstones_and_expired_values(store: Store) -> None:
    store.apply_group(1, [(b"gone", 1, VALUE), (b"old", 1, plain_record(b"v", 10))])
    store.apply_group(2, [(b"gone", 2, tombstone_record())])
    for _ in ("overlay", "backend"):
        assert store.get(b"gone", LATEST, 0) is None
        assert store.get(b"old", LATEST, 10) is None
        gone = store.latest_version(b"gone", LATEST)
        old = store.latest_version(b"old", LATEST)
        assert gone is not None
        assert old is not None
        assert (gone.commit_ts, gone.record) == (2, tombstone_record())
        assert old.commit_ts == 1
        assert store.latest_version(b"none", LATEST) is None
        store.flush_now()


def test_scan_limits_and_empty_ranges(store: Store) -> None:
    store.apply_group(1, [(b"%d" % number, number, VALUE) for number in range(1, 6)])
    for _ in ("overlay", "backend"):
        assert store.scan(b"", b"", 0, LATEST, 0) == []
        assert store.scan(b"3", b"3", 9, LATEST, 0) == []
        assert store.scan(b"4", b"2", 9, LATEST, 0) == []
        assert [key for key, _ in store.scan(b"2", b"5", 2, LATEST, 0)] == [b"2", b"3"]
        assert [key for key, _ in store.scan(b"2", b"5", 2, LATEST, 0, True)] == [b"4", b"3"]
        assert [key for key, _ in store.scan(b"4", b"z" * 500, 9, LATEST, 0)] == [b"4", b"5"]
        store.flush_now()


def test_reads_during_a_flush_see_every_layer_once(backend: ObedientBackend) -> None:
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1, VALUE), (b"b", 1, VALUE)])
    store.flush_now()
    store.apply_group(2, [(b"b", 2, VALUE), (b"c", 2, VALUE)])
    backend.gate.clear()
    job = store.begin_flush()
    assert job is not None
    worker = threading.Thread(target=job.run)
    worker.start()
    backend.entered.wait()
    store.apply_group(3, [(b"c", 3, VALUE), (b"d", 3, VALUE)])
    expected = [(b"a", 1), (b"b", 2), (b"c", 3), (b"d", 3)]

    def scanned() -> list[tuple[bytes, int]]:
        return [(key, version.commit_ts) for key, version in store.scan(b"", b"", 9, LATEST, 0)]

    assert scanned() == expected
    backend.gate.set()
    worker.join()
    assert scanned() == expected
    assert (store.durable_index, store.overlay_versions) == (1, 4)
    store.finish_flush(job)
    assert scanned() == expected
    assert (store.durable_index, store.overlay_versions) == (2, 2)


def test_an_open_scan_view_is_not_disturbed_by_later_batches(store: Store) -> None:
    store.apply_group(1, [(b"a", 1, VALUE)])
    store.flush_now()
    view = store.backend.view()
    store.apply_group(2, [(b"b", 2, VALUE)])
    store.flush_now()
    assert len(list(view.iterate(Table.MVCC))) == 1
    view.close()


@pytest.mark.parametrize("failure", ["begin", "finish"])
def test_a_full_disk_loses_nothing_and_the_flush_can_be_repeated(
        backend: ObedientBackend, failure: str) -> None:
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1, VALUE)], rows=[(b"r", b"1")])
    backend.error = DiskFull("full")
    job = store.begin_flush()
    assert job is not None
    store.apply_group(2, [(b"b", 2, VALUE)])
    with pytest.raises(DiskFull):
        job.run()
    if failure == "begin":
        assert store.begin_flush() is None
    store.finish_flush(job)
    assert (store.durable_index, store.applied_index, keys_of(store)) == (0, 2, [b"a", b"b"])
    with pytest.raises(DiskFull):
        store.flush_now()
    backend.error = None
    store.flush_now()
    assert store.durable_index == 2
    assert keys_of(Store.open(MemoryBackend(OsDisk(), backend._path.parent))) == [b"a", b"b"]


def test_a_repeated_flush_promises_only_what_it_wrote(backend: ObedientBackend) -> None:
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1, VALUE)])
    backend.error = DiskFull("full")
    with pytest.raises(DiskFull):
        store.flush_now()
    store.apply_group(2, [(b"b", 2, VALUE)])
    backend.error = None
    job = store.begin_flush()
    assert job is not None
    job.run()
    after_a_crash = Store.open(MemoryBackend(OsDisk(), backend._path.parent))
    assert (after_a_crash.applied_index, after_a_crash.max_commit_ts) == (1, 1)
    assert keys_of(after_a_crash) == [b"a"]


def test_a_full_map_is_grown_and_the_flush_repeated(backend: ObedientBackend) -> None:
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1, VALUE)])
    backend.error = MapFull("full")
    store.flush_now()
    assert (store.durable_index, backend.reserved) == (1, 3)


def test_flush_now_waits_for_the_job_under_way(backend: ObedientBackend) -> None:
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1, VALUE)])
    backend.gate.clear()
    job = store.begin_flush()
    assert job is not None
    worker = threading.Thread(target=job.run)
    worker.start()
    backend.entered.wait()
    store.apply_group(2, [(b"b", 2, VALUE)])
    threading.Timer(0.01, backend.gate.set).start()
    store.flush_now()
    worker.join()
    assert (store.durable_index, backend.writes) == (2, 2)
    store.finish_flush(job)
    assert store.durable_index == 2


def test_flush_now_does_the_work_of_a_job_that_has_not_begun(backend: ObedientBackend) -> None:
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1, VALUE)])
    job = store.begin_flush()
    assert job is not None
    store.flush_now()
    assert store.durable_index == 1
    job.run()
    store.finish_flush(job)
    assert backend.writes == 1


@pytest.mark.parametrize("noticed", [False, True])
def test_a_failed_flush_is_not_tried_again(backend: ObedientBackend, noticed: bool) -> None:
    """After a failed fsync the pages may be gone: only stopping is safe."""
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1, VALUE)])
    backend.error = OSError(5, "I/O error")
    job = store.begin_flush()
    assert job is not None
    with pytest.raises(OSError, match="I/O"):
        job.run()
    backend.error = None
    if noticed:
        store.finish_flush(job)
    for _ in range(2):
        with pytest.raises(OSError, match="I/O"):
            store.flush_now()
    assert (store.durable_index, backend.writes) == (0, 0)


def test_only_one_job_at_a_time(backend: ObedientBackend) -> None:
    store = Store.open(backend)
    store.apply_group(1, [(b"a", 1 << 40, VALUE)])
    job = store.begin_flush()
    assert job is not None
    assert store.busy
    assert store.begin_flush() is None
    assert Compactor(store, lambda: 1 << 40, retention_ms=0).begin() is None
    with pytest.raises(ValueError, match="under way"):
        store.begin_job(job)
    job.run()
    store.finish_flush(job)
    assert not store.busy
    assert store.begin_flush() is None


def test_reads_below_the_horizon_are_refused_also_after_a_restart(open_store: OpenStore) -> None:
    store = open_store()
    newest_ms = 10_000
    store.apply_group(1, [(b"k", ms << 16, VALUE) for ms in (1, 2, newest_ms)])
    store.flush_now()
    assert Compactor(store, lambda: newest_ms, retention_ms=1_000).run_pass() == 1
    store.apply_group(2, [(b"k", (newest_ms << 16) + 1, VALUE)])
    store.flush_now()
    horizon_ts = 9_000 << 16
    for _ in ("running", "restarted"):
        assert store.horizon_ts == horizon_ts
        assert store.get(b"k", horizon_ts, 0) is not None
        with pytest.raises(InvalidArgument, match=str(horizon_ts)):
            store.get(b"k", horizon_ts - 1, 0)
        with pytest.raises(InvalidArgument, match=str(horizon_ts)):
            store.scan(b"", b"", 1, horizon_ts - 1, 0)
        store = open_store()


def test_nothing_applied_means_nothing_to_flush(store: Store) -> None:
    assert store.begin_flush() is None
    store.flush_now()
    assert (store.applied_index, store.durable_index, store.dirty) == (0, 0, False)


def test_an_entry_without_effects_still_moves_the_index(open_store: OpenStore) -> None:
    store = open_store()
    store.apply_group(7, ())
    assert store.dirty
    store.flush_now()
    assert open_store().applied_index == 7


def test_a_malformed_fact_is_corruption(tmp_path: Path) -> None:
    backend = MemoryBackend(OsDisk(), tmp_path)
    backend.write(WriteBatch(puts={Table.META: [(b"applied_index", b"short")]}))
    with pytest.raises(StoreCorrupt):
        Store.open(backend)


def test_dirty_notices_and_sizes(store: Store) -> None:
    notices: list[int] = []
    store.on_dirty(lambda: notices.append(store.overlay_bytes))
    store.apply_group(1, [(b"k", 1, plain_record(b"x" * 1000))])
    assert len(notices) == 1
    assert notices[0] > 1000
    store.flush_now()
    assert (store.overlay_bytes, store.overlay_versions) == (0, 0)
    assert store.stats().entries[Table.MVCC] == 1


class Refusing(MemoryBackend):
    """Refuses writes with `error` while there is one."""

    error: Exception | None = None

    def write(self, batch: WriteBatch) -> None:
        if self.error is not None:
            raise self.error
        super().write(batch)


@pytest.mark.parametrize(("error", "is_full"), [
    pytest.param(DiskFull("no space left", remedy="free space"), True, id="a full disk"),
    pytest.param(MapFull("the map is full"), False, id="a map that will grow")])
def test_who_waits_for_space_is_told_by_flushes_alone(tmp_path: Path, error: Exception,
                                                      is_full: bool) -> None:
    backend = Refusing(OsDisk(), tmp_path)
    store = Store.open(backend)
    for index in (1, 2):
        store.apply_group(index, [(b"k", index, plain_record(b"v"))])
        store.flush_now()
    store.apply_group(3, [(b"k", 3, plain_record(b"v"))])
    job = store.begin_flush()
    assert job is not None
    backend.error = error
    with pytest.raises(type(error)):
        job.run()
    store.finish_flush(job)
    assert (store.disk_full is error) is is_full
    # Compaction says nothing of it, whether it has something to remove or not.
    for horizon_ms in (0, 1 << 40):
        step = Compactor(store, lambda ms=horizon_ms: ms, retention_ms=0).begin()
        if step is not None:
            with contextlib.suppress(DiskFull):
                step.run()
            store.finish_job(step)
        assert (store.disk_full is error) is is_full
    backend.error = None
    store.flush_now()
    assert store.disk_full is None
