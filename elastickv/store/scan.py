"""Ordered scans over several layers: overlays merged with a backend view, one version per key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

Pair = tuple[bytes, Version]


def stored_versions(view: ReadView, start: bytes, end: bytes, at_ts: int,
                    reverse: bool) -> Iterator[Pair]:
    """For each user key in the backend its newest version at or before `at_ts`."""
    entries = view.iterate(Table.MVCC, scan_bound(start), scan_bound(end), reverse=reverse)
    if reverse:
        return _newest_backward(entries, at_ts)
    return _newest_forward(entries, at_ts)


def _newest_forward(entries: Iterator[tuple[bytes, bytes]], at_ts: int) -> Iterator[Pair]:
    done = b""
    for store_key, record in entries:
        prefix = store_key[:-TIMESTAMP_BYTES]
        if prefix == done:
            continue
        commit_ts = commit_ts_of(store_key)
        if commit_ts <= at_ts:
            done = prefix
            yield decode_user_key(store_key), Version(commit_ts, store_key, record)


def _newest_backward(entries: Iterator[tuple[bytes, bytes]], at_ts: int) -> Iterator[Pair]:
    # Backwards the oldest version comes first: the last one seen that is not too new is the answer.
    current = b""
    best: Version | None = None
    for store_key, record in entries:
        prefix = store_key[:-TIMESTAMP_BYTES]
        if prefix != current:
            if best is not None:
                yield decode_user_key(best.store_key), best
            current, best = prefix, None
        commit_ts = commit_ts_of(store_key)
        if commit_ts <= at_ts:
            best = Version(commit_ts, store_key, record)
    if best is not None:
        yield decode_user_key(best.store_key), best


def overlay_versions(overlay: Overlay, start: bytes, end: bytes, at_ts: int,
                     reverse: bool) -> Iterator[Pair]:
    """The same for one overlay."""
    chains = overlay.chains
    for user_key in overlay.keys_between(start, end, reverse=reverse):
        chain = find(chains[user_key], at_ts)
        if chain is not None:
            yield user_key, Version(chain[0], encode_store_key(user_key, chain[0]), chain[1])


def merge(left: Iterator[Pair], right: Iterator[Pair], reverse: bool) -> Iterator[Pair]:
    """Two ordered streams as one; of a key in both, the newer version."""
    a = next(left, None)
    b = next(right, None)
    while a is not None and b is not None:
        if a[0] == b[0]:
            yield a if a[1].commit_ts >= b[1].commit_ts else b
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
                    at_ts: int, reverse: bool) -> Iterator[Pair]:
    """For each user key in any layer its newest version at or before `at_ts`, in scan order."""
    merged = stored_versions(view, start, end, at_ts, reverse)
    for overlay in reversed(overlays):
        if overlay.chains:
            merged = merge(overlay_versions(overlay, start, end, at_ts, reverse), merged, reverse)
    return merged
