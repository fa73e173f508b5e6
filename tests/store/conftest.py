"""Stores for tests, over both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastickv.durable import OsDisk
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store
from elastickv.store.tables import Backend, Found, Item, ReadView, Table

LATEST = (1 << 64) - 1

OpenStore = Callable[..., Store]


def open_backend(kind: str, directory: Path) -> Backend:
    if kind == "lmdb":
        # A tiny map, so that every test also grows it.
        return LmdbBackend(directory, initial_map_bytes=1 << 17)
    return MemoryBackend(OsDisk(), directory)


class CountingView:
    """A `ReadView` that counts the entries which are read through it."""

    def __init__(self, view: ReadView) -> None:
        self._view = view
        self.entries = 0
        self.byte_count = 0

    def _count(self, entry: Item) -> Item:
        self.entries += 1
        self.byte_count += len(entry[1])
        return entry

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self._view.get(table, key)

    def ceiling(self, table: Table, key: bytes, prefix: bytes = b"") -> Item | None:
        entry = self._view.ceiling(table, key, prefix)
        return None if entry is None else self._count(entry)

    def iterate(self, table: Table, start: bytes = b"", end: bytes = b"", *,
                reverse: bool = False) -> Iterator[Item]:
        return map(self._count, self._view.iterate(table, start, end, reverse=reverse))

    def newest(self, table: Table, start: bytes, end: bytes, suffix: bytes, *,
               reverse: bool = False) -> Iterator[Found]:
        for key, value in self._view.newest(table, start, end, suffix, reverse=reverse):
            self._count((key, value or b""))
            yield key, value

    def close(self) -> None:
        self._view.close()


@pytest.fixture(params=["lmdb", "memory"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_store(kind: str, tmp_path: Path) -> Iterator[OpenStore]:
    """`open_store(name="store")`: a store over the backend under test; opening a name again closes
    the store that had it, without flushing: what a crash leaves."""
    stores: dict[str, Store] = {}

    def opener(name: str = "store") -> Store:
        if name in stores:
            stores.pop(name).close()
        stores[name] = Store.open(open_backend(kind, tmp_path / name))
        return stores[name]

    yield opener
    for store in stores.values():
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    return open_store()
