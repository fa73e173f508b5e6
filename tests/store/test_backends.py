"""What both backends promise alike."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.errors import StoreCorrupt
from elastickv.store.tables import Backend, Item, Table, WriteBatch
from tests.store.conftest import open_backend

FEW_KEYS = st.sampled_from([b"a", b"a\x00", b"b", b"c", b"\xff"])
batches = st.lists(st.tuples(st.sampled_from(Table),
                             st.dictionaries(FEW_KEYS, st.binary(max_size=3000), max_size=3),
                             st.sets(FEW_KEYS, max_size=2)), max_size=6)


@pytest.fixture
def backend(kind: str, tmp_path: Path) -> Iterator[Backend]:
    backend = open_backend(kind, tmp_path)
    yield backend
    backend.close()


def put(backend: Backend, table: Table, *items: Item) -> None:
    backend.reserve(sum(len(key) + len(value) for key, value in items))
    backend.write(WriteBatch(puts={table: sorted(items)}))


def content(backend: Backend, table: Table) -> list[Item]:
    view = backend.view()
    try:
        return list(view.iterate(table))
    finally:
        view.close()


@pytest.mark.parametrize("kind", ["lmdb", "memory"])
@given(batches=batches)
@settings(max_examples=30)
def test_batches_of_puts_and_deletes(tmp_path_factory: pytest.TempPathFactory, kind: str,
                                     batches: list[tuple[Table, dict[bytes, bytes],
                                                         set[bytes]]]) -> None:
    """Deletes come before puts in a batch; content and entry counts survive being opened again."""
    directory = tmp_path_factory.mktemp("backend")
    backend = open_backend(kind, directory)
    model: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}
    for table, puts, deletes in batches:
        backend.reserve(sum(map(len, puts.values())))
        backend.write(WriteBatch(puts={table: sorted(puts.items())},
                                 deletes={table: sorted(deletes)}))
        for key in deletes:
            model[table].pop(key, None)
        model[table].update(puts)
    for _ in ("written", "opened again"):
        for table in Table:
            assert content(backend, table) == sorted(model[table].items())
            assert backend.stats().entries[table] == len(model[table])
        backend.close()
        backend = open_backend(kind, directory)
    backend.close()


@pytest.mark.parametrize(("start", "end"), list(itertools.product(
    [b"", b"a", b"b", b"bb", b"z"], [b"", b"a", b"b\x00", b"c", b"zz"])))
def test_iteration_bounds(backend: Backend, start: bytes, end: bytes) -> None:
    items = [(key, key * 3) for key in (b"a", b"b", b"b\x00", b"c", b"d")]
    put(backend, Table.ROWS, *items)
    put(backend, Table.META, (b"b", b"another table"))
    expected = [item for item in items if start <= item[0] and (not end or item[0] < end)]
    view = backend.view()
    assert list(view.iterate(Table.ROWS, start, end)) == expected
    assert list(view.iterate(Table.ROWS, start, end, reverse=True)) == expected[::-1]
    ceiling = view.ceiling(Table.ROWS, start or b"\x00")
    assert ceiling == next((item for item in items if item[0] >= start), None)
    view.close()


PREFIXES = [b"a" * 3, b"ab\x00", b"ab\x01", b"b\xff\xff", b"\x00" * 3, b"\xff" * 3]
suffixes = st.integers(0, 9).map(lambda number: number.to_bytes(2, "big"))
spreads = st.sets(st.one_of(suffixes, st.sampled_from([b"\x00\xff", b"\xff\xff"])), max_size=9)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lmdb", "memory"])
@settings(deadline=None)
@given(entries=st.dictionaries(st.sampled_from(PREFIXES), spreads), data=st.data())
def test_the_newest_of_each_prefix(tmp_path_factory: pytest.TempPathFactory, kind: str,
                                   reverse: bool, entries: dict[bytes, set[bytes]],
                                   data: st.DataObject) -> None:
    backend = open_backend(kind, tmp_path_factory.mktemp("backend"))
    put(backend, Table.MVCC, *((prefix + suffix, prefix * 500 + suffix)
                               for prefix, some in entries.items() for suffix in some))
    put(backend, Table.ROWS, (b"aaa\x00\x00", b"another table"))
    view = backend.view()
    bounds = st.sampled_from([b"", *PREFIXES, b"ab", b"\xff" * 6])
    for _ in range(5):
        start, end, suffix = data.draw(bounds), data.draw(bounds), data.draw(suffixes)
        expected = []
        for prefix in sorted(entries, reverse=reverse):
            if entries[prefix] and start <= prefix and (not end or prefix < end):
                answer = min((each for each in entries[prefix] if each >= suffix), default=None)
                expected.append((prefix + suffix, None) if answer is None else (
                    prefix + answer, prefix * 500 + answer))
        assert list(view.newest(Table.MVCC, start, end, suffix, reverse=reverse)) == expected
    view.close()
    backend.close()


def test_a_view_does_not_move(backend: Backend) -> None:
    put(backend, Table.ROWS, (b"a", b"1"))
    before = backend.view()
    put(backend, Table.ROWS, (b"a", b"2"), (b"b", b"2"))
    after = backend.view()
    assert (before.get(Table.ROWS, b"a"), before.get(Table.ROWS, b"b")) == (b"1", None)
    assert (after.get(Table.ROWS, b"a"), after.get(Table.ROWS, b"b")) == (b"2", b"2")
    before.close()
    before.close()
    after.close()


def test_two_iterations_of_one_view_do_not_interfere(backend: Backend) -> None:
    items = [(b"%d" % number, b"v") for number in range(5)]
    put(backend, Table.MVCC, *items)
    view = backend.view()
    one, other = view.iterate(Table.MVCC), view.iterate(Table.MVCC, reverse=True)
    assert [(next(one), next(other)) for _ in items] == list(zip(items, items[::-1], strict=True))
    assert view.ceiling(Table.MVCC, b"3") == (b"3", b"v")
    assert view.ceiling(Table.MVCC, b"3", b"3") == (b"3", b"v")
    assert view.ceiling(Table.MVCC, b"3", b"4") is None
    view.close()


def test_an_import_replaces_everything_at_once(kind: str, tmp_path: Path,
                                               backend: Backend) -> None:
    put(backend, Table.ROWS, (b"old", b"1"))
    sink = backend.begin_import()
    sink.append(Table.MVCC, [(b"a", b"1"), (b"b", b"2")])
    sink.append(Table.MVCC, [(b"c", b"3")])
    sink.append(Table.META, [(b"m", b"4")])
    assert content(backend, Table.ROWS) == [(b"old", b"1")]
    sink.install()
    sink.discard()
    reopened = backend
    for _ in ("installed", "opened again"):
        assert content(reopened, Table.ROWS) == []
        assert content(reopened, Table.MVCC) == [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]
        assert content(reopened, Table.META) == [(b"m", b"4")]
        reopened.close()
        reopened = open_backend(kind, tmp_path)
    put(reopened, Table.ROWS, (b"new", b"5"))
    reopened.close()


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_fetched_ahead_is_read_as_ever(backend: Backend, reverse: bool) -> None:
    put(backend, Table.MVCC, (b"a1", b"x"), (b"b1", b"y"), (b"b2", b"z"))
    view = backend.view()
    work = [backend.prefetch(Table.MVCC, b"", b"", b"1", count, reverse=reverse)
            for count in (0, 1, 100)]
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    found = list(view.newest(Table.MVCC, b"", b"", b"1", reverse=reverse))
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [(b"a1", b"x"), (b"b1", b"y")]
    put(backend, Table.MVCC, (b"c1", b"w"))
    backend.close()
    for each in work:  # late, it does nothing
        each()


def test_entries_that_are_fetched_ahead_are_read_as_ever(backend: Backend) -> None:
    put(backend, Table.MVCC, (b"a1", b"x"), (b"b1", b"y"), (b"b2", b"z"))
    view = backend.view()
    work = [backend.prefetch_all(Table.MVCC, start, count)
            for start in (b"", b"b1", b"b2\0") for count in (0, 4, 1_000)]
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    found = list(view.iterate(Table.MVCC))
    for thread in threads:
        thread.join(30)
    assert found == [(b"a1", b"x"), (b"b1", b"y"), (b"b2", b"z")]
    backend.close()
    assert [each() for each in work] == [False] * len(work)


@pytest.mark.parametrize("keys", [[b"b", b"a"], [b"a", b"a"]], ids=["descending", "repeated"])
def test_imports_must_be_ordered(backend: Backend, keys: list[bytes]) -> None:
    sink = backend.begin_import()
    sink.append(Table.ROWS, [(keys[0], b"")])
    with pytest.raises(StoreCorrupt, match="order"):
        sink.append(Table.ROWS, [(keys[1], b"")])
    sink.discard()


def test_a_second_import_drops_the_first(backend: Backend) -> None:
    backend.begin_import().discard()
    sink = backend.begin_import()
    sink.append(Table.ROWS, [(b"a", b"1")])
    sink.install()
    assert content(backend, Table.ROWS) == [(b"a", b"1")]
