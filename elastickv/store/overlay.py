"""The in-memory overlay: recent versions that are not in the backend yet.

A key's versions form a chain of `(commit_ts, record, older)` tuples, newest first, so that an
insert is one dictionary store and a lookup of the newest version is one dictionary load.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import Optional

Chain = tuple[int, bytes, Optional["Chain"]]

ENTRY_OVERHEAD_BYTES = 200
"""What a version costs beside its key and record: tuple, timestamp, dictionary slot, headers."""


def insert(chain: Chain | None, commit_ts: int, record: bytes) -> Chain:
    """`chain` with one more version; one with the same timestamp is replaced."""
    if chain is None or chain[0] < commit_ts:
        return (commit_ts, record, chain)
    newer = []
    rest: Chain | None = chain
    while rest is not None and rest[0] > commit_ts:
        newer.append(rest)
        rest = rest[2]
    if rest is not None and rest[0] == commit_ts:
        rest = rest[2]
    result: Chain = (commit_ts, record, rest)
    for version in reversed(newer):
        result = (version[0], version[1], result)
    return result


def find(chain: Chain | None, at_ts: int) -> Chain | None:
    """The part of `chain` that starts at the newest version at or before `at_ts`."""
    while chain is not None and chain[0] > at_ts:
        chain = chain[2]
    return chain


class Overlay:
    """One table of recent versions: first active (written to), then frozen (being flushed)."""

    __slots__ = ("_sorted_keys", "byte_count", "chains", "max_ts", "version_count")

    def __init__(self) -> None:
        self.chains: dict[bytes, Chain] = {}
        self.byte_count = 0
        self.version_count = 0
        self.max_ts = 0
        self._sorted_keys: list[bytes] = []

    def put(self, user_key: bytes, commit_ts: int, record: bytes) -> None:
        """Add a version."""
        chains = self.chains
        chain = chains.get(user_key)
        chains[user_key] = (commit_ts, record, None) if chain is None else insert(
            chain, commit_ts, record)
        if commit_ts > self.max_ts:
            self.max_ts = commit_ts
        self.version_count += 1
        self.byte_count += len(user_key) + len(record) + ENTRY_OVERHEAD_BYTES

    def sorted_keys(self) -> list[bytes]:
        """All user keys in order.

        A dictionary keeps insertion order, so the keys that came since the last call are those
        after as many as are sorted already. Two threads may call this for a frozen table: the one
        assignment at the end is atomic, and both assign the same.
        """
        known = self._sorted_keys
        if len(known) != len(self.chains):
            known = known + sorted(itertools.islice(self.chains, len(known), None))
            known.sort()
            self._sorted_keys = known
        return known

    def keys_between(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[bytes]:
        """User keys with start <= key < end (b"" = unbounded), in the order of the scan."""
        keys = self.sorted_keys()
        low = bisect.bisect_left(keys, start) if start else 0
        high = bisect.bisect_left(keys, end) if end else len(keys)
        return map(keys.__getitem__,
                   range(high - 1, low - 1, -1) if reverse else range(low, high))

    def records(self) -> Iterator[bytes]:
        """The record of every version, in no order."""
        for newest in self.chains.values():
            chain: Chain | None = newest
            while chain is not None:
                yield chain[1]
                chain = chain[2]

    def versions(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Every version as `(user_key, commit_ts, record)`: keys in order, newest version first."""
        chains = self.chains
        for user_key in self.sorted_keys():
            chain: Chain | None = chains[user_key]
            while chain is not None:
                yield user_key, chain[0], chain[1]
                chain = chain[2]
