"""Ordered scans over several layers: overlays merged with a backend view, one version per key.

A key may have any number of versions, and one is wanted. After a few that are not, a walk seeks to
where the next answer is, so that a key costs about the same however many it has. So that a scan can
stop anywhere, a walk counts what it does (`Work`) and gives the keys that have no answer as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from elastickv.clock import MAX_TIMESTAMP
from elastickv.store.mvcc import (
    TIMESTAMP_BYTES,
    Version,
    commit_ts_of,
    decode_user_key,
    encode_store_key,
    scan_bound,
)
from elastickv.store.overlay import Overlay, find
from elastickv.store.tables import ReadView, Table

Pair = tuple[bytes, Version | None]

MAX_SKIPPED = 4
"""Versions of a key that are walked over before a seek, which costs about as much as they do."""
ENTRY_COST = 4096
"""Bytes of a record that take about as long as an entry takes by itself."""

_ENTRY_SHIFT = 12
_BEHIND = b"\xff" * (TIMESTAMP_BYTES + 1)


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

    def empty(self) -> bool:
        """Whether nothing can be in it."""
        return self.limit < 1 or (self.end != b"" and self.start >= self.end)

    def after(self, user_key: bytes, found: int, at_ts: int) -> ScanRange:
        """What is left of it once `user_key` was reached and `found` pairs were found."""
        if self.reverse:
            return self._replace(end=user_key, limit=self.limit - found, at_ts=at_ts)
        return self._replace(start=user_key + b"\0", limit=self.limit - found, at_ts=at_ts)


class Work:
    """What a scan has walked over: bytes of records, and `ENTRY_COST` more for each entry."""

    __slots__ = ("cost",)

    def __init__(self) -> None:
        self.cost = 0


def _newest_suffix(at_ts: int) -> bytes:
    """How the store key of the newest version that may answer ends, at the least."""
    return (MAX_TIMESTAMP - at_ts).to_bytes(TIMESTAMP_BYTES, "big")


def stored_versions(view: ReadView, start: bytes, end: bytes, at_ts: int, reverse: bool,
                    work: Work) -> Iterator[Pair]:
    """For each user key in the backend its newest version at or before `at_ts`, or None."""
    walk = _newest_backward if reverse else _newest_forward
    return walk(view, scan_bound(start), scan_bound(end), at_ts, work)


def _newest_forward(view: ReadView, low: bytes, high: bytes, at_ts: int,
                    work: Work) -> Iterator[Pair]:
    suffix = _newest_suffix(at_ts)
    prefix, answered, skipped = b"", True, 0
    while True:
        for store_key, record in view.iterate(Table.MVCC, low, high):
            work.cost += ENTRY_COST + len(record)
            if store_key[:-TIMESTAMP_BYTES] != prefix:
                if not answered:
                    yield decode_user_key(prefix + suffix), None
                prefix, answered, skipped = store_key[:-TIMESTAMP_BYTES], False, 0
            if not answered:
                commit_ts = commit_ts_of(store_key)
                if commit_ts <= at_ts:
                    answered = True
                    yield decode_user_key(store_key), Version(commit_ts, store_key, record)
                    continue
            skipped += 1 + (len(record) >> _ENTRY_SHIFT)
            if skipped > MAX_SKIPPED:
                low, skipped = prefix + (_BEHIND if answered else suffix), 0
                break
        else:
            if not answered:
                yield decode_user_key(prefix + suffix), None
            return


def _newest_backward(view: ReadView, low: bytes, high: bytes, at_ts: int,
                     work: Work) -> Iterator[Pair]:
    # Backwards the oldest version comes first: the last one seen that is not too new is the answer.
    suffix = _newest_suffix(at_ts)
    while True:
        prefix, skipped = b"", 0
        best: Version | None = None
        for store_key, record in view.iterate(Table.MVCC, low, high, reverse=True):
            work.cost += ENTRY_COST + len(record)
            if store_key[:-TIMESTAMP_BYTES] != prefix:
                if prefix:
                    yield decode_user_key(prefix + suffix), best
                prefix, best, skipped = store_key[:-TIMESTAMP_BYTES], None, 0
            else:
                skipped += 1 + (len(record) >> _ENTRY_SHIFT)
                if skipped > MAX_SKIPPED:
                    break
            commit_ts = commit_ts_of(store_key)
            if commit_ts <= at_ts:
                best = Version(commit_ts, store_key, record)
        else:
            if prefix:
                yield decode_user_key(prefix + suffix), best
            return
        yield decode_user_key(prefix + suffix), _found(view, prefix, suffix, work)
        high = prefix


def _found(view: ReadView, prefix: bytes, suffix: bytes, work: Work) -> Version | None:
    """The answer for one key, looked up."""
    entry = view.ceiling(Table.MVCC, prefix + suffix)
    if entry is None:
        return None
    store_key, record = entry
    work.cost += ENTRY_COST + len(record)
    if store_key[:-TIMESTAMP_BYTES] != prefix:
        return None
    return Version(commit_ts_of(store_key), store_key, record)


def overlay_versions(overlay: Overlay, start: bytes, end: bytes, at_ts: int, reverse: bool,
                     work: Work) -> Iterator[Pair]:
    """The same for one overlay."""
    chains = overlay.chains
    for user_key in overlay.keys_between(start, end, reverse=reverse):
        work.cost += ENTRY_COST
        chain = find(chains[user_key], at_ts)
        yield user_key, None if chain is None else Version(
            chain[0], encode_store_key(user_key, chain[0]), chain[1])


def merge(left: Iterator[Pair], right: Iterator[Pair], reverse: bool) -> Iterator[Pair]:
    """Two ordered streams as one; of a key in both, the newer version."""
    a = next(left, None)
    b = next(right, None)
    while a is not None and b is not None:
        if a[0] == b[0]:
            yield b if a[1] is None or (
                b[1] is not None and b[1].commit_ts > a[1].commit_ts) else a
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
                    at_ts: int, reverse: bool, work: Work) -> Iterator[Pair]:
    """For each user key in any layer its newest version at or before `at_ts`, or None, in scan
    order."""
    merged = stored_versions(view, start, end, at_ts, reverse, work)
    for overlay in reversed(overlays):
        if overlay.chains:
            merged = merge(overlay_versions(overlay, start, end, at_ts, reverse, work), merged,
                           reverse)
    return merged
