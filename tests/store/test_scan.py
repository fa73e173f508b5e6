"""Scans: what they find, what they read to find it, and what comes between their turns."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.clock import pack_timestamp
from elastickv.errors import InvalidArgument
from elastickv.store import mvcc_store, scan
from elastickv.store.gc import Compactor
from elastickv.store.mvcc import encode_store_key, visible
from elastickv.store.mvcc_store import Store, Write
from elastickv.store.scan import ScanRange
from elastickv.store.values import plain_record, tombstone_record
from tests.store.conftest import LATEST, CountingView, OpenStore, open_backend

VALUE = plain_record(b"value")
GONE = tombstone_record()
EXPIRED = plain_record(b"value", 5)
NOW_MS = 10


def counting(store: Store) -> CountingView:
    """The store's view from now until its next flush, counting."""
    view = CountingView(store._view)
    store._view = view
    return view


def apply(store: Store, *writes: Write) -> None:
    store.apply_group(store.applied_index + 1, writes)


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at_ts", [LATEST, 10_000, 5_000, 3, 1])
@pytest.mark.parametrize("in_overlay", [b"", b"counter", b"other"])
def test_a_key_of_many_versions_has_one_answer(
        store: Store, reverse: bool, at_ts: int, in_overlay: bytes) -> None:
    apply(store, (b"another", 1, VALUE), (b"other", 1, VALUE), *(
        (b"counter", ts, plain_record(b"%d" % ts)) for ts in range(1, 10_001)))
    store.flush_now()
    if in_overlay:
        apply(store, (in_overlay, 10_001, VALUE))
    found = store.scan(b"b", b"", 2, at_ts, 0, reverse)
    expected = {b"counter": min(at_ts, 10_000), b"other": 1}
    if in_overlay and at_ts == LATEST:
        expected[in_overlay] = 10_001
    assert {key: version.commit_ts for key, version in found} == expected


def test_a_lookup_reads_one_entry_however_many_there_are(store: Store) -> None:
    apply(store, *((b"counter", ts, VALUE) for ts in range(1, 10_001)))
    store.flush_now()
    view = counting(store)
    found = store.get(b"counter", 5_000, 0)
    assert found is not None
    assert (found.commit_ts, view.entries) == (5_000, 1)


NOTHING_TO_SEE: dict[str, tuple[list[bytes], int]] = {
    "deleted": ([VALUE, GONE], LATEST),
    "expired": ([EXPIRED], LATEST),
    "too new": ([VALUE] * 12, 1),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize("name", NOTHING_TO_SEE)
def test_what_is_not_shown_takes_turns_as_well(store: Store, monkeypatch: pytest.MonkeyPatch,
                                               name: str, flushed: bool, reverse: bool) -> None:
    monkeypatch.setattr(mvcc_store, "TURN_COST", 10 * scan.ENTRY_COST)
    records, at_ts = NOTHING_TO_SEE[name]
    apply(store, *((b"%03d" % number, ts, record) for number in range(200)
                   for ts, record in enumerate(records, 2)))
    apply(store, (b"000", 1_000, VALUE), (b"199", 1_000, VALUE))
    if flushed:
        store.flush_now()
    view = counting(store)
    rest: ScanRange | None = ScanRange(b"", b"", 200, at_ts, NOW_MS, reverse)
    turns, shown = 0, []
    while rest is not None:
        before = view.entries
        found, rest = store.scan_turn(rest)
        # A turn ends with the key during which it has done enough.
        assert view.entries - before <= 10 + 1
        turns += 1
        shown += [key for key, _, _ in found]
    assert shown == ([] if at_ts == 1 else sorted([b"000", b"199"], reverse=reverse))
    assert turns >= 200 // 10


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [12_000, 1 << 20])
@pytest.mark.parametrize("flushed", [0, 10, 20])
def test_large_records_end_a_turn_early(store: Store, reverse: bool, size: int,
                                        flushed: int) -> None:
    """Whether they are in memory or not."""
    large = plain_record(bytes(size))
    count = 20 * (1 << 20) // size
    apply(store, *((b"%04d" % number, 1, large) for number in range(count * flushed // 20)))
    store.flush_now()
    apply(store, *((b"%04d" % number, 1, large)
                   for number in range(count * flushed // 20, count)))
    rest: ScanRange | None = ScanRange(b"", b"", count, LATEST, 0, reverse)
    shown = 0
    while rest is not None:
        found, rest = store.scan_turn(rest)
        assert sum(len(record) for _, _, record in found) <= (
            mvcc_store.TURN_COST + len(large))
        shown += len(found)
    assert shown == count


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("versions", [1, 2, 6, 30])
def test_a_page_of_a_thousand_takes_one_turn(store: Store, versions: int, reverse: bool) -> None:
    value = plain_record(bytes(1_024))
    for ts in range(1, versions + 1):
        apply(store, *((b"%04d" % number, ts, value) for number in range(1_000)))
    store.flush_now()
    found, rest = store.scan_turn(ScanRange(b"", b"", 1_000, LATEST, 0, reverse))
    assert (len(found), rest) == (1_000, None)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_turn_ends_when_its_time_is_over(store: Store, reverse: bool) -> None:
    """After a few keys at least, or it would never get through."""
    apply(store, *((b"%02d" % number, 1, VALUE) for number in range(50)))
    store.flush_now()
    whole = ScanRange(b"", b"", 50, LATEST, 0, reverse)
    expected, _ = store.scan_turn(whole)
    asked = 0

    def every_third_time() -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    found, sizes = [], []
    rest: ScanRange | None = whole
    while rest is not None:
        pairs, rest = store.scan_turn(rest, every_third_time)
        sizes.append(len(pairs))
        found += pairs
    assert found == expected
    assert sizes == [3 * mvcc_store.ASKED_EVERY] * 4 + [2]
    pairs, rest = store.scan_turn(whole, lambda: True)
    assert (len(pairs), rest is None) == (mvcc_store.ASKED_EVERY, False)


def test_keys_only_keeps_headers(store: Store) -> None:
    apply(store, (b"k", 1, plain_record(b"value", 99)), (b"gone", 1, GONE))
    for _ in ("overlay", "backend"):
        found, rest = store.scan_turn(ScanRange(b"", b"", 9, LATEST, 0, keys_only=True))
        assert rest is None
        assert found == [(b"k", encode_store_key(b"k", 1), plain_record(b"", 99))]
        store.flush_now()


# --- what comes between two turns ---------------------------------------------------------------


def flush(store: Store) -> None:
    store.flush_now()


def write_everywhere(store: Store) -> None:
    ts = store.max_commit_ts + 1
    apply(store, *((b"%d" % number, ts, plain_record(b"new")) for number in range(20)))


def delete_everything(store: Store) -> None:
    ts = store.max_commit_ts + 1
    apply(store, *((b"%d" % number, ts, GONE) for number in range(20)))


def compact(store: Store) -> None:
    store.flush_now()
    Compactor(store, lambda: 1 << 40, retention_ms=100).run_pass()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("step", [flush, write_everywhere, delete_everything, compact])
def test_a_scan_shows_one_moment(store: Store, monkeypatch: pytest.MonkeyPatch, step: object,
                                 reverse: bool) -> None:
    monkeypatch.setattr(mvcc_store, "TURN_COST", 1)
    assert callable(step)
    apply(store, *((b"%d" % number, pack_timestamp(1, number + 1), VALUE)
                   for number in range(1, 20, 2)))
    store.flush_now()
    apply(store, *((b"%d" % number, pack_timestamp(2, number + 1), VALUE)
                   for number in range(0, 20, 4)))
    expected = [(key, version.store_key, version.record)
                for key, version in store.scan(b"", b"", 99, LATEST, 0, reverse)]
    found = []
    rest: ScanRange | None = ScanRange(b"", b"", 99, LATEST, 0, reverse)
    while rest is not None:
        pairs, rest = store.scan_turn(rest)
        found += pairs
        step(store)
    assert found == expected


def test_a_scan_that_compaction_overtakes_is_refused(store: Store,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvcc_store, "TURN_COST", 1)
    apply(store, *((b"%d" % number, 5, VALUE) for number in range(9)))
    _, rest = store.scan_turn(ScanRange(b"", b"", 9, 5, 0))
    assert rest is not None
    store.raise_horizon(6)
    with pytest.raises(InvalidArgument, match="the oldest that is kept"):
        store.scan_turn(rest)


# --- what is found ------------------------------------------------------------------------------

KEYS = [b"a", b"a\x00", b"ab", b"\x00", b"\xff" * 30, b"k" * 24, b"k" * 25, b"m" * 480]
keys = st.sampled_from(KEYS)
bounds = st.one_of(st.just(b""), keys, st.binary(max_size=3), st.just(b"m" * 481))
# Long runs of one key's versions, which single draws would hardly ever make.
runs = st.tuples(keys, st.integers(1, 15), st.sampled_from([VALUE, GONE, EXPIRED,
                                                            plain_record(bytes(5_000))]))


def history(drawn: list[tuple[bytes, int, bytes]]) -> list[list[Write]]:
    """Runs as groups of writes, with timestamps that rise."""
    groups: list[list[Write]] = []
    ts = 0
    for key, count, record in drawn:
        groups.append([(key, ts + number, record) for number in range(1, count + 1)])
        ts += count
    return groups


@pytest.mark.parametrize("kind", ["lmdb", "memory"])
@settings(deadline=None, max_examples=60)
@given(drawn=st.lists(runs, max_size=12), flushes=st.lists(st.booleans(), max_size=12),
       data=st.data())
def test_a_scan_finds_what_there_is(kind: str, drawn: list[tuple[bytes, int, bytes]],
                                    flushes: list[bool], data: st.DataObject) -> None:
    groups = history(drawn)
    newest = max((ts for group in groups for _, ts, _ in group), default=0)
    with tempfile.TemporaryDirectory(prefix="store-scan-") as directory, \
            pytest.MonkeyPatch.context() as patch:
        store = Store.open(open_backend(kind, Path(directory)))
        for index, group in enumerate(groups, 1):
            store.apply_group(index, group)
            if index <= len(flushes) and flushes[index - 1]:
                store.flush_now()
        if data.draw(st.booleans(), "frozen"):
            store.begin_flush()
        patch.setattr(mvcc_store, "TURN_COST", data.draw(
            st.sampled_from([1, 7 * scan.ENTRY_COST, mvcc_store.TURN_COST])))
        for _ in range(8):
            start, end, limit = data.draw(bounds), data.draw(bounds), data.draw(st.integers(1, 9))
            at_ts = data.draw(st.one_of(st.just(LATEST), st.integers(0, newest + 1)))
            now_ms, reverse = data.draw(st.sampled_from([1, NOW_MS])), data.draw(st.booleans())
            found = store.scan(start, end, limit, at_ts, now_ms, reverse)
            assert [(key, version.commit_ts, version.record) for key, version in found] == list(
                expected_pairs(groups, start, end, at_ts, now_ms, reverse))[:limit]
        store.close()


def expected_pairs(groups: list[list[Write]], start: bytes, end: bytes, at_ts: int, now_ms: int,
                   reverse: bool) -> Iterator[Write]:
    for user_key in sorted(KEYS, reverse=reverse):
        past = [write for group in groups for write in group
                if write[0] == user_key and write[1] <= at_ts]
        newest = max(past, key=lambda write: write[1], default=None)
        if start <= user_key and (not end or user_key < end) and (
                newest is not None and visible(newest[2], now_ms)):
            yield newest


def test_turns_of_any_size_find_the_same(open_store: OpenStore,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    apply(store, *((b"%02d" % (number % 37), number, VALUE) for number in range(1, 300)))
    store.flush_now()
    apply(store, *((b"%02d" % (number % 23), number, VALUE) for number in range(300, 330)))
    whole = {reverse: store.scan(b"03", b"31", 20, LATEST, 0, reverse)
             for reverse in (False, True)}
    for entries in range(1, 60):
        monkeypatch.setattr(mvcc_store, "TURN_COST", entries * scan.ENTRY_COST)
        for reverse, expected in whole.items():
            assert store.scan(b"03", b"31", 20, LATEST, 0, reverse) == expected
