"""Ordered scans over several layers: overlays merged with a backend view, one version per key.

A key may have any number of versions, and one is wanted: the backend seeks to it and past the rest
(`ReadView.newest`), so that a key costs about the same however many it has. So that a scan can stop
anywhere, a walk counts what it does (`Work`) and gives the keys that have no answer as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from elastickv.store.mvcc import (
    decode_user_key,
    encode_store_key,
    scan_bound,
    version_suffix,
)
from elastickv.store.overlay import Overlay, find
from elastickv.store.tables import ReadView, Table

ScannedVersion = tuple[bytes, bytes, bytes]
"""A user key, and the store key and record of a version of it."""
Candidate = tuple[bytes, bytes, bytes | None]
"""The same for a key's newest version in one layer; the record is None where it has none there."""

ENTRY_COST = 4096
"""Bytes of a record that take about as long as a key takes by itself."""


class ScanRange(NamedTuple):
    """What a scan, or the rest of one, is to find: up to `limit` pairs with start <= key < end (end
    b"" = unbounded), in key order or against it, as of `at_ts` and not expired at `now_ms`; their
    headers alone with `keys_only`."""

    start: bytes
    end: bytes
    limit: int
    at_ts: int
    now_ms: int
    reverse: bool = False
    keys_only: bool = False

    @classmethod
    def of_key(cls, key: bytes, at_ts: int, now_ms: int = 0) -> ScanRange:
        """The one that holds just `key`."""
        return cls(key, key + b"\0", 1, at_ts, now_ms)

    def empty(self) -> bool:
        """Whether nothing can be in it."""
        return self.limit < 1 or (self.end != b"" and self.start >= self.end)

    def after(self, user_key: bytes, found: int, at_ts: int) -> ScanRange:
        """What is left of it once `user_key` was reached and `found` pairs were found."""
        if self.reverse:
            return self._replace(end=user_key, limit=self.limit - found, at_ts=at_ts)
        return self._replace(start=user_key + b"\0", limit=self.limit - found, at_ts=at_ts)


class Work:
    """What a scan has walked over: bytes of the records it found, and `ENTRY_COST` for each key."""

    __slots__ = ("cost",)

    def __init__(self) -> None:
        self.cost = 0


def stored_versions(view: ReadView, start: bytes, end: bytes, at_ts: int, reverse: bool,
                    work: Work) -> Iterator[Candidate]:
    """For each user key in the backend its newest version at or before `at_ts`, or None."""
    for store_key, record in view.newest(Table.MVCC, scan_bound(start), scan_bound(end),
                                         version_suffix(at_ts), reverse=reverse):
        if record is None:
            work.cost += ENTRY_COST
        else:
            work.cost += ENTRY_COST + len(record)
        yield decode_user_key(store_key), store_key, record


def overlay_versions(overlay: Overlay, start: bytes, end: bytes, at_ts: int, reverse: bool,
                     work: Work) -> Iterator[Candidate]:
    """The same for one overlay."""
    chains = overlay.chains
    for user_key in overlay.keys_between(start, end, reverse=reverse):
        chain = find(chains[user_key], at_ts)
        if chain is None:
            work.cost += ENTRY_COST
            yield user_key, b"", None
        else:
            work.cost += ENTRY_COST + len(chain[1])
            yield user_key, encode_store_key(user_key, chain[0]), chain[1]


def merge(left: Iterator[Candidate], right: Iterator[Candidate],
          reverse: bool) -> Iterator[Candidate]:
    """Two ordered streams as one; of a key in both, the newer version, whose store key is the
    lesser one."""
    a = next(left, None)
    b = next(right, None)
    while a is not None and b is not None:
        if a[0] == b[0]:
            yield b if a[2] is None or (b[2] is not None and b[1] < a[1]) else a
            a = next(left, None)
            b = next(right, None)
        elif (a[0] < b[0]) is not reverse:
            yield a
            a = next(left, None)
        else:
            yield b
            b = next(right, None)
    if a is not None:
        yield a
        yield from left
    if b is not None:
        yield b
        yield from right


def merged_versions(view: ReadView, overlays: Sequence[Overlay], start: bytes, end: bytes,
                    at_ts: int, reverse: bool, work: Work) -> Iterator[Candidate]:
    """For each user key in any layer its newest version at or before `at_ts`, or None, in scan
    order."""
    merged = stored_versions(view, start, end, at_ts, reverse, work)
    for overlay in reversed(overlays):
        if overlay.chains:
            merged = merge(overlay_versions(overlay, start, end, at_ts, reverse, work), merged,
                           reverse)
    return merged
