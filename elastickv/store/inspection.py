"""Reading what a store says of its node without opening it for use: nothing is created, written or
removed, so that a check of a node cannot change it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import lmdb

from elastickv.durable import OsDisk
from elastickv.errors import JOIN_ANEW_REMEDY, StoreCorrupt
from elastickv.store.audit import audit_file
from elastickv.store.lmdb_backend import generation_file, named_generation
from elastickv.store.lmdb_environment import raise_typed
from elastickv.store.mvcc_store import APPLIED_INDEX, decode_number
from elastickv.store.records import reveal_all
from elastickv.store.tables import Item, Table

_ATTEMPTS = 3
"""A running node may replace its file, as for a snapshot, between two steps of reading."""


class InspectedStore:
    """The rows and the facts of a store at one moment; reads as `Store` does."""

    def __init__(self, rows: Mapping[bytes, bytes], meta: Mapping[bytes, bytes]) -> None:
        self._rows = rows
        self._meta = meta

    def rows(self, prefix: bytes = b"") -> list[Item]:
        """The registry rows under `prefix`, in key order."""
        return sorted(item for item in self._rows.items() if item[0].startswith(prefix))

    def meta(self, name: bytes) -> bytes | None:
        """A fact of the state machine."""
        return self._meta.get(name)

    @property
    def applied_index(self) -> int:
        """The index of the last entry whose effects the store holds."""
        return decode_number(self._meta.get(APPLIED_INDEX))


def inspect(directory: Path, *, in_use: bool) -> InspectedStore:
    """The facts in the store at `directory`; empty when there is none yet.

    A store that is not in use is audited whole; that of a running node was when the node started,
    and cannot be while pages are replaced. Raises `StoreCorrupt`, or `OSError` when a file cannot
    be read.
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            return _inspect(directory, in_use)
    return _inspect(directory, in_use)


def _inspect(directory: Path, in_use: bool) -> InspectedStore:
    generation = named_generation(OsDisk(), directory)
    if generation is None:
        return InspectedStore({}, {})
    path = generation_file(directory, generation)
    if not path.exists() and not in_use:
        raise StoreCorrupt(f"the store's file {path} is missing", remedy=JOIN_ANEW_REMEDY)
    if not in_use:
        audit_file(path)
    return _read(path, in_use)


def _read(path: Path, in_use: bool) -> InspectedStore:
    """Without a lock where nobody writes: taking one would write the lock file."""
    path.open("rb").close()  # LMDB's own errors do not tell a missing file from a damaged one
    try:
        with contextlib.closing(lmdb.open(
                str(path), subdir=False, readonly=True, create=False, lock=in_use,
                readahead=False, max_dbs=len(Table) + 1)) as environment:
            databases = {table: environment.open_db(table.value.encode(), create=False)
                         for table in (Table.ROWS, Table.META)}
            with environment.begin() as txn:
                rows, meta = (dict(reveal_all(table, txn.cursor(database)))
                              for table, database in databases.items())
    except lmdb.Error as error:
        raise_typed(error)
    return InspectedStore(rows, meta)
