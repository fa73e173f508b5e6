"""Compaction: what may go, and that it goes in bounded steps."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.clock import FakeClock, pack_timestamp
from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, InvalidArgument
from elastickv.store import gc
from elastickv.store.gc import Compactor, StoredVersion, horizon, removable
from elastickv.store.header import encode_header
from elastickv.store.memory_backend import MemoryBackend, Tables
from elastickv.store.mvcc import Version, commit_ts_of, encode_store_key, visible
from elastickv.store.mvcc_store import Store
from elastickv.store.snapshot import StoreSnapshots
from elastickv.store.tables import Table, WriteBatch
from elastickv.store.values import plain_record, tombstone_record
from tests.store.conftest import LATEST, CountingView, OpenStore, open_backend

VALUE = encode_header()
GONE = encode_header(tombstone=True)


def version(commit_ms: int, header: bytes = VALUE) -> StoredVersion:
    commit_ts = pack_timestamp(commit_ms)
    return StoredVersion(commit_ts, encode_store_key(b"k", commit_ts), header)


@pytest.mark.parametrize(("wall_ms", "newest_ms", "retention_ms", "expected_ms"), [
    (1_000, 1_000, 100, 900), (1_000, 700, 100, 600), (700, 1_000, 100, 600),
    (1_000, 1_000, 1_000, 0), (1_000, 1_000, 5_000, 0), (1_000, 0, 100, 0),
    (1_000, 1_000, 0, 1_000),
], ids=["even", "replica-lags", "clock-lags", "all-retained", "retention-over-age", "empty-store",
        "no-retention"])
def test_horizon_follows_the_slower_of_clock_and_log(
        wall_ms: int, newest_ms: int, retention_ms: int, expected_ms: int) -> None:
    newest_ts = pack_timestamp(newest_ms, 7)
    assert horizon(wall_ms, newest_ts, retention_ms) == pack_timestamp(expected_ms)


@pytest.mark.parametrize(("versions", "gone_ms"), [
    ([version(50)], []),
    ([version(150)], []),
    ([version(50), version(40), version(30)], [40, 30]),
    ([version(150), version(100), version(99)], [99]),
    ([version(150), version(120), version(101)], []),
    ([version(50, GONE)], [50]),
    ([version(50, GONE), version(40)], [50, 40]),
    ([version(150, GONE), version(40)], []),
    ([version(150), version(50, GONE), version(40)], [50, 40]),
    ([version(50, encode_header(expiry_ms=100)), version(40)], [50, 40]),
    ([version(50, encode_header(expiry_ms=101)), version(40)], [40]),
    ([version(150, encode_header(expiry_ms=1)), version(40)], []),
    ([version(50), version(40, GONE), version(30)], [40, 30]),
    ([], []),
], ids=["single", "single-new", "shadowed", "base-at-horizon", "all-above", "tombstone",
        "tombstone-with-older", "new-tombstone", "tombstone-under-new", "expired-at-horizon",
        "expires-later", "new-and-expired", "live-over-tombstone", "none"])
def test_removable(versions: list[StoredVersion], gone_ms: list[int]) -> None:
    gone = removable(versions, pack_timestamp(100))
    assert [v.commit_ts for v in gone] == [pack_timestamp(ms) for ms in gone_ms]


@pytest.mark.parametrize(("versions", "gone_ms"), [
    ([version(50), version(40), version(30)], [40, 30]),
    ([version(150), version(120)], []),
    ([version(50, GONE)], []),
    ([version(50, GONE), version(40)], [40]),
    ([version(150), version(50, encode_header(expiry_ms=100)), version(40)], [40]),
], ids=["shadowed", "all-above", "tombstone", "tombstone-with-older", "expired-with-older"])
def test_removable_while_older_ones_are_to_follow(versions: list[StoredVersion],
                                                  gone_ms: list[int]) -> None:
    """What hides the older ones stays until they are gone."""
    gone = removable(versions, pack_timestamp(100), complete=False)
    assert [v.commit_ts for v in gone] == [pack_timestamp(ms) for ms in gone_ms]


headers = st.one_of(st.just(VALUE), st.just(GONE), st.builds(
    lambda expiry_ms: encode_header(expiry_ms=expiry_ms), st.integers(1, 12)))


@given(st.dictionaries(st.integers(1, 12), headers), st.integers(0, 12), st.integers(0, 12),
       st.integers(0, 12))
def test_no_permitted_read_changes(history: dict[int, bytes], horizon_ms: int, after_ms: int,
                                   later_ms: int) -> None:
    """A read at or above the horizon, at any time from the horizon on, sees what it saw."""
    versions = [version(ms, history[ms]) for ms in sorted(history, reverse=True)]
    kept = [v for v in versions if v not in removable(versions, pack_timestamp(horizon_ms))]

    def read(candidates: list[StoredVersion]) -> int | None:
        at_ts = pack_timestamp(horizon_ms + after_ms)
        found = next((v for v in candidates if v.commit_ts <= at_ts), None)
        if found is None or not visible(found.header, horizon_ms + later_ms):
            return None
        return found.commit_ts

    assert read(kept) == read(versions)


def fill(store: Store, keys: int, versions: int) -> None:
    for number in range(1, versions + 1):
        record = tombstone_record() if number == versions else plain_record(b"%d" % number)
        store.apply_group(store.applied_index + 1, [
            (b"key-%03d" % key, pack_timestamp(number), record if key % 2 else plain_record(b"v"))
            for key in range(keys)])
    store.flush_now()


@pytest.mark.parametrize("step_entries", [1, 7, 1000])
def test_passes_in_steps_of_any_size(store: Store, step_entries: int,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "STEP_ENTRIES", step_entries)
    fill(store, keys=20, versions=5)
    compactor = Compactor(store, lambda: 1 << 40, retention_ms=0)
    before = store.scan(b"", b"", 100, LATEST, 0)
    assert len(before) == 10
    # Ten keys keep one version, ten end in a tombstone and vanish.
    assert compactor.run_pass() == 20 * 5 - 10
    assert store.scan(b"", b"", 100, LATEST, 0) == before
    assert store.stats().entries[Table.MVCC] == 10
    assert compactor.run_pass() == 0


def steps_of(compactor: Compactor) -> Iterator[None]:
    """One pass, step by step."""
    passes = compactor.passes
    while compactor.passes == passes:
        step = compactor.begin()
        if step is None:
            return
        step.run()
        compactor.finish(step)
        yield


@pytest.mark.parametrize("last", [plain_record(b"last"), tombstone_record()],
                         ids=["value", "tombstone"])
@pytest.mark.parametrize("horizon_ms", [2_500, 5_001])
def test_no_step_takes_more_of_a_key_than_its_share(store: Store, monkeypatch: pytest.MonkeyPatch,
                                                    horizon_ms: int, last: bytes) -> None:
    monkeypatch.setattr(gc, "STEP_ENTRIES", 200)
    store.apply_group(1, [(b"counter", pack_timestamp(ms), VALUE) for ms in range(1, 5_001)])
    store.apply_group(2, [(b"counter", pack_timestamp(5_001), last)])
    store.flush_now()
    views: list[CountingView] = []
    view = store.backend.view

    def counted() -> CountingView:
        views.append(CountingView(view()))
        return views[-1]

    before = [store.get(b"counter", at_ts, 0) for at_ts in (pack_timestamp(horizon_ms), LATEST)]
    compactor = Compactor(store, lambda: horizon_ms, retention_ms=0)
    monkeypatch.setattr(store.backend, "view", counted)
    for _ in steps_of(compactor):
        assert [store.get(b"counter", at_ts, 0)
                for at_ts in (pack_timestamp(horizon_ms), LATEST)] == before
    assert max(each.entries for each in views) <= gc.STEP_ENTRIES + 2
    assert len(views) >= 5_000 // 200
    left = 5_001 - horizon_ms + (1 if before[0] is not None else 0)
    assert store.stats().entries[Table.MVCC] == left


records = st.sampled_from([plain_record(b"v"), tombstone_record(), plain_record(b"v", 5),
                           plain_record(bytes(300))])
runs = st.lists(st.tuples(st.sampled_from([b"a", b"a\x00", b"b"]), st.integers(1, 6), records),
                max_size=10)


@settings(deadline=None)
@given(runs, st.integers(0, 40), st.integers(1, 5), st.sampled_from([64, 1 << 20]),
       st.integers(0, 9))
def test_steps_of_any_size_leave_what_one_step_leaves(
        history: list[tuple[bytes, int, bytes]], horizon_ms: int, step_entries: int,
        step_bytes: int, crash_after: int) -> None:
    """And no permitted read sees a difference between two of them, or after a crash."""
    with tempfile.TemporaryDirectory(prefix="store-gc-") as directory, \
            pytest.MonkeyPatch.context() as patch:
        stores = [Store.open(open_backend("memory", Path(directory) / name))
                  for name in ("whole", "steps")]
        stamps = [pack_timestamp(horizon_ms)]
        for store in stores:
            written = 0
            for key, count, record in history:
                store.apply_group(store.applied_index + 1, [
                    (key, pack_timestamp(written + number), record)
                    for number in range(1, count + 1)])
                written += count
            store.apply_group(99, [(b"z", pack_timestamp(100), VALUE)])
            store.flush_now()
        stamps += [pack_timestamp(ms) for ms in range(horizon_ms, written + 2)] + [LATEST]

        def reads() -> list[object]:
            return [stores[1].get(key, at_ts, max(horizon_ms, min(at_ts >> 16, 50)))
                    for key in (b"a", b"a\x00", b"b") for at_ts in stamps]

        Compactor(stores[0], lambda: horizon_ms, retention_ms=0).run_pass()
        patch.setattr(gc, "STEP_ENTRIES", step_entries)
        patch.setattr(gc, "STEP_BYTES", step_bytes)
        before = reads()
        for number, _ in enumerate(steps_of(Compactor(stores[1], lambda: horizon_ms,
                                                      retention_ms=0)), 1):
            assert reads() == before
            if number == crash_after:
                stores[1].close()
                stores[1] = Store.open(open_backend("memory", Path(directory) / "steps"))
                Compactor(stores[1], lambda: horizon_ms, retention_ms=0).run_pass()
                break
        assert reads() == before
        views = [list(store.backend.view().iterate(Table.MVCC)) for store in stores]
        assert views[0] == views[1]
        assert stores[0].dek_counts == stores[1].dek_counts
        for store in stores:
            store.close()


@settings(deadline=None)
@given(runs, st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 5))
def test_no_permitted_read_changes_while_the_horizon_moves(
        history: list[tuple[bytes, int, bytes]], clock_ms: list[int], step_entries: int) -> None:
    """Steps begin in the middle of a key, which has got a newer witness meanwhile."""
    with tempfile.TemporaryDirectory(prefix="store-gc-") as directory, \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "STEP_ENTRIES", step_entries)
        store = Store.open(open_backend("memory", Path(directory)))
        written: list[Version] = []
        for key, count, record in history:
            for _ in range(count):
                commit_ts = pack_timestamp(len(written) + 1)
                written.append(Version(commit_ts, key, record))
                store.apply_group(len(written), [(key, commit_ts, record)])
        store.apply_group(99, [(b"z", pack_timestamp(100), VALUE)])
        store.flush_now()
        compactor = Compactor(store, lambda: clock_ms[0], retention_ms=0)
        for _ in range(len(clock_ms)):
            step = compactor.begin()
            if step is not None:
                step.run()
                compactor.finish(step)
            clock_ms = clock_ms[1:] + clock_ms[:1]
            horizon_ms = store.horizon_ts >> 16
            for key in (b"a", b"a\x00", b"b"):
                for at_ms in range(horizon_ms, len(written) + 2):
                    past = [v for v in written[:at_ms] if v.store_key == key]
                    newest = past[-1] if past and visible(past[-1].record, at_ms) else None
                    found = store.get(key, pack_timestamp(at_ms), at_ms)
                    assert (found and found.commit_ts) == (newest and newest.commit_ts)
        store.close()


def test_versions_in_the_overlay_do_not_confuse_it(store: Store) -> None:
    fill(store, keys=4, versions=3)
    store.apply_group(9, [(b"key-001", pack_timestamp(9), plain_record(b"again"))])
    Compactor(store, lambda: 1 << 40, retention_ms=0).run_pass()
    found = store.get(b"key-001", LATEST, 0)
    assert found is not None
    assert found.record == plain_record(b"again")
    store.flush_now()
    assert [key for key, _ in store.scan(b"", b"", 9, LATEST, 0)] == [
        b"key-000", b"key-001", b"key-002"]


def test_what_is_not_durable_does_not_move_the_horizon(store: Store) -> None:
    store.apply_group(1, [(b"k", pack_timestamp(1), plain_record(b"v", expiry_ms=2))])
    store.flush_now()
    store.apply_group(2, [(b"other", pack_timestamp(100), plain_record(b"v"))])
    # A crash now replays entry 2 and whatever compares with k before it: k must still be there.
    Compactor(store, lambda: 1 << 40, retention_ms=0).run_pass()
    assert store.get(b"k", LATEST, 1) is not None
    store.flush_now()
    Compactor(store, lambda: 1 << 40, retention_ms=0).run_pass()
    assert store.latest_version(b"k", LATEST) is None


@pytest.mark.parametrize(("old_versions", "step_delay_s"), [
    (0, gc.STEP_DELAY_S), (2, gc.STEP_DELAY_S), (3, 0.0), (9, 0.0)])
def test_steps_are_spaced_while_they_remove_little_and_passes_far_apart(
        store: Store, monkeypatch: pytest.MonkeyPatch, old_versions: int,
        step_delay_s: float) -> None:
    monkeypatch.setattr(gc, "STEP_ENTRIES", 10)
    store.apply_group(1, [(b"a", pack_timestamp(ms), VALUE) for ms in range(old_versions + 1)
                          if ms] + [(b"b%02d" % number, pack_timestamp(9), VALUE)
                                    for number in range(20)])
    store.apply_group(2, [(b"a", pack_timestamp(10), VALUE)])
    store.flush_now()
    compactor = Compactor(store, lambda: 1 << 40, retention_ms=0)
    assert compactor.delay_s() == gc.PASS_DELAY_S
    step = compactor.begin()
    assert step is not None
    assert compactor.begin() is None
    step.run()
    compactor.finish(step)
    assert (step.removed, compactor.delay_s()) == (old_versions, step_delay_s)
    compactor.run_pass()
    assert compactor.delay_s() == gc.PASS_DELAY_S


class Full(MemoryBackend):
    """Takes no more writes once it is told to."""

    full = False

    def write(self, batch: WriteBatch) -> None:
        if self.full:
            raise DiskFull("full")
        super().write(batch)


def test_steps_that_fail_are_spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "STEP_ENTRIES", 5)
    backend = Full(OsDisk(), tmp_path)
    store = Store.open(backend)
    fill(store, keys=4, versions=3)
    compactor = Compactor(store, lambda: 1 << 40, retention_ms=0)
    for full, delay_s in [(False, 0.0), (True, gc.STEP_DELAY_S), (True, gc.STEP_DELAY_S)]:
        backend.full = full
        step = compactor.begin()
        assert step is not None
        with contextlib.suppress(DiskFull):
            step.run()
        compactor.finish(step)
        assert compactor.delay_s() == delay_s


def test_what_comes_of_age_during_a_pass_goes_in_it(store: Store,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "STEP_ENTRIES", 3)
    for index, second in enumerate((1, 2, 3, 60), 1):
        store.apply_group(index, [(b"%d" % number, pack_timestamp(second * 1_000), VALUE)
                                  for number in range(4)])
    store.flush_now()
    seconds = iter((11, 12, 13, 14, 9, 9))
    compactor = Compactor(store, lambda: next(seconds) * 1_000, retention_ms=10_000)
    horizons = []
    for _ in steps_of(compactor):
        horizons.append(store.horizon_ts)
    # Key by key one version more; the clock that steps back at the end changes nothing.
    assert horizons == [pack_timestamp(second * 1_000) for second in (1, 2, 3, 4, 4, 4)]
    assert [commit_ts_of(key) >> 16 for key, _ in store.backend.view().iterate(Table.MVCC)] == [
        60_000, 3_000, 2_000, 1_000, 60_000, 3_000, 2_000, 60_000, 3_000, 60_000, 3_000]
    with pytest.raises(InvalidArgument):
        store.get(b"0", pack_timestamp(3_999), 0)


class Unsaved(MemoryBackend):
    """Keeps nothing on the disk."""

    def replace_all(self, tables: Tables) -> None:
        self._tables = tables


@pytest.mark.parametrize("keys", [1, 50])
@pytest.mark.parametrize("puts_per_s", [20, 75, 150])
def test_versions_stay_bounded_however_long_they_are_put(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, puts_per_s: int, keys: int) -> None:
    """A step takes 25 ms for 10 entries: 80 a second with pauses, 400 without."""
    monkeypatch.setattr(gc, "STEP_ENTRIES", 10)
    monkeypatch.setattr(gc, "PASS_DELAY_S", 1.0)
    retention_s = 10
    clock, generator = FakeClock(), random.Random(5)
    store = Store.open(Unsaved(OsDisk(), tmp_path))
    compactor = Compactor(store, clock.wall_ms, retention_ms=retention_s * 1_000)
    puts = peak = 0

    def work_for(seconds: float) -> None:
        nonlocal puts
        clock.advance(seconds)
        writes = []
        while puts < clock.monotonic() * puts_per_s:
            puts += 1
            writes.append((b"%02d" % generator.randrange(keys),
                           pack_timestamp(clock.wall_ms(), puts & 0xFFFF), VALUE))
        store.apply_group(store.applied_index + 1, writes)
        store.flush_now()

    while clock.monotonic() < 10 * retention_s:
        work_for(compactor.delay_s())
        step = compactor.begin()
        if step is not None:
            step.run()
            work_for(0.025)
            compactor.finish(step)
        if clock.monotonic() > 5 * retention_s:
            peak = max(peak, store.stats().entries[Table.MVCC])
    assert puts_per_s * retention_s < peak < 2 * puts_per_s * retention_s


def with_history(store: Store) -> Store:
    """z has been old, mid and new at 10, 12 and 14 s; a has been rewritten early."""
    history = [(b"a", 5), (b"a", 6), (b"z", 10), (b"z", 12), (b"z", 14)]
    for index, (key, second) in enumerate(history, 1):
        store.apply_group(index, [(key, pack_timestamp(second * 1000), VALUE + b"%d" % second)])
    store.flush_now()
    return store


def require_truth_at_11_s(store: Store) -> None:
    """What was true at 11 s, or a refusal; nothing else."""
    try:
        found = store.get(b"z", pack_timestamp(11_000), 0)
    except InvalidArgument:
        return
    assert found is not None
    assert found.record == VALUE + b"10"


def test_a_clock_that_steps_back_takes_no_horizon_back(open_store: OpenStore) -> None:
    store = with_history(open_store())
    Compactor(store, lambda: 14_000, retention_ms=1_000).run_pass()
    store.apply_group(9, [(b"a", pack_timestamp(7_000), VALUE)])
    store.flush_now()
    Compactor(store, lambda: 9_000, retention_ms=1_000).run_pass()
    require_truth_at_11_s(store)
    require_truth_at_11_s(open_store())


@pytest.mark.parametrize("pass_ms", [14_000, 9_000])
def test_a_snapshot_between_two_steps_takes_no_horizon_back(
        open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, pass_ms: int) -> None:
    """Its own horizon may be below that of the pass, or above it."""
    monkeypatch.setattr(gc, "STEP_ENTRIES", 2)
    source, store = with_history(open_store("source")), with_history(open_store())
    source.apply_group(9, [(b"y", pack_timestamp(15_000), VALUE)])
    source.flush_now()
    if pass_ms < 14_000:
        Compactor(source, lambda: 14_000, retention_ms=1_000).run_pass()
        source.apply_group(10, [(b"y", pack_timestamp(7_000), VALUE),
                                (b"y", pack_timestamp(7_001), VALUE)])
        source.flush_now()
    compactor = Compactor(store, lambda: pass_ms, retention_ms=1_000)
    step = compactor.begin()
    assert step is not None
    step.run()
    compactor.finish(step)
    export, target = StoreSnapshots(source).open_export(), StoreSnapshots(store).open_import()
    while piece := export.read(1 << 20):
        target.write(piece)
    export.close()
    target.finish()
    compactor.run_pass()
    require_truth_at_11_s(store)
    require_truth_at_11_s(open_store())


def test_an_empty_store_has_nothing_to_compact(store: Store) -> None:
    assert Compactor(store, lambda: 1 << 40, retention_ms=0).run_pass() == 0
