"""A transition table that notes which of its rows the code under test looks up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Walked(Mapping[Key, Value]):
    """Stands in for a table."""

    def __init__(self, table: Mapping[Key, Value]) -> None:
        self._table = table
        self._taken: set[Key] = set()

    def __getitem__(self, key: Key) -> Value:
        after = self._table[key]
        self._taken.add(key)
        return after

    def __iter__(self) -> Iterator[Key]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def keys_not_taken(self) -> set[Key]:
        """Rows that nothing has reached."""
        return set(self._table) - self._taken
