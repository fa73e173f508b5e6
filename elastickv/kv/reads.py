"""Reads: behind a read index, from the applied state, opened at this boundary only.

A linearizable read asks the engine for a read index and waits until this member has applied it; a
stale one takes the state as it is and says how old that may be.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable

from elastickv.clock import MAX_TIMESTAMP, HybridLogicalClock, timestamp_ms
from elastickv.errors import DeadlineExceeded, InvalidArgument, Overloaded
from elastickv.kv.api import (
    MAX_TIMEOUT_S,
    PAIR_OVERHEAD_BYTES,
    Pair,
    ReadResult,
    ScanResult,
    result_too_large,
)
from elastickv.kv.turns import Turns
from elastickv.kv.txn import check_key
from elastickv.raft.engine import RaftEngine
from elastickv.store.flusher import Runner
from elastickv.store.mvcc import Version, time_left_ms
from elastickv.store.mvcc_store import Store
from elastickv.store.scan import ScanRange

TURN_S = 0.004
"""So long may a turn of a scan take, and so long all reads of single keys in a round of the loop
together. Where pages have to come from the disk each key waits for one, and with it the whole loop:
a turn's worth of keys would take longer than an election timeout."""

PREFETCH_KEYS = 1_000
"""So many keys are read beside the loop once a turn took its time."""

NOTED_S = 0.000_05
"""A read of one key that takes less found everything in memory; one from a disk takes longer."""

MAX_GATHERED_BYTES = 256 << 20
"""What all scans under way may hold of their answers. Beyond it, whichever goes on and holds more
than `SMALL_ANSWER_BYTES` is refused: they all take turns, so none would end before its answer is
whole, and a client may have a thousand of them on one connection."""
SMALL_ANSWER_BYTES = 65_536
PAIR_MEMORY_BYTES = 128
"""What a pair takes in memory beside its key and value."""

WARM_READS = 16
"""After so many keys in a row that threads found in memory the loop reads keys itself again."""


class Reader:
    """The reads of one node. `opener(store_key, record)` is the value in a record; `prefetcher`
    runs work beside the loop."""

    def __init__(self, engine: RaftEngine, store: Store, hlc: HybridLogicalClock, *,
                 opener: Callable[[bytes, bytes], bytes],
                 prefetcher: Runner | None = None) -> None:
        self._engine = engine
        self._store = store
        self._hlc = hlc
        self._open_record = opener
        self._prefetcher = prefetcher
        # All scans together have one turn between two of the loop's other work.
        self._scan_turns = Turns(0.0)
        self._gathered_bytes = 0
        self._waited_s = 0.0
        """How long reads of single keys have waited for the disk in this round of the loop."""
        self._is_cold = False
        """Whether threads read each key before the loop does."""
        self._warm_reads = 0

    async def get(self, key: bytes, *, ts: int = 0, stale: bool = False,
                  timeout_s: float) -> ReadResult:
        check_key(key)
        deadline = _deadline(timeout_s)
        index = await self._barrier(stale, deadline)
        if self._is_cold:
            await self._read_key_ahead(key, ts, deadline)
        stale_ms = age_ms(self._engine.state_age_s()) if stale else 0
        at_ts, now_ms = self._moment(ts)
        version = self._version(key, at_ts, now_ms)
        if version is None:
            return ReadResult(b"", False, index, 0, stale_ms)
        return ReadResult(self._open_record(version.store_key, version.record), True, index,
                          version.commit_ts, stale_ms, time_left_ms(version.record, now_ms))

    async def latest_commit_ts(self, key: bytes, *, timeout_s: float) -> tuple[int, bool]:
        check_key(key)
        deadline = _deadline(timeout_s)
        await self._barrier(False, deadline)
        if self._is_cold:
            await self._read_key_ahead(key, 0, deadline)
        at_ts, now_ms = self._moment(0)
        version = self._version(key, at_ts, now_ms)
        return (version.commit_ts, True) if version else (0, False)

    def _version(self, key: bytes, at_ts: int, now_ms: int) -> Version | None:
        """The visible version of `key`; how long that took is noted where it was long."""
        monotonic = self._hlc.clock.monotonic
        began_s = monotonic()
        version = self._store.get(key, at_ts, now_ms)
        if (took_s := monotonic() - began_s) >= NOTED_S:
            if not self._waited_s:
                asyncio.get_running_loop().call_soon(self._begin_round)
            self._waited_s += took_s
            if self._waited_s >= TURN_S:
                self._is_cold, self._warm_reads = True, 0
        return version

    def _begin_round(self) -> None:
        self._waited_s = 0.0

    async def _read_key_ahead(self, key: bytes, ts: int, deadline: float) -> None:
        """Let a thread bring `key` into memory: reads have kept the loop waiting for the disk long
        enough, there may be thousands of them, and it would wait behind those of the threads.
        Raises `DeadlineExceeded`."""
        waited = await self._read_ahead(ScanRange.of_key(key, *self._moment(ts)), deadline)
        self._warm_reads = 0 if waited else self._warm_reads + 1
        if self._warm_reads >= WARM_READS:
            self._is_cold = False
        if asyncio.get_running_loop().time() >= deadline:
            raise DeadlineExceeded("the disk did not answer within the deadline",
                                   remedy="retry with a longer timeout")

    async def scan(self, start: bytes, end: bytes, *, limit: int, max_bytes: int, ts: int = 0,
                   reverse: bool = False, keys_only: bool = False, stale: bool = False,
                   timeout_s: float) -> ScanResult:
        if limit < 1:
            raise InvalidArgument(f"limit is {limit}; it must be at least 1",
                                  remedy="ask for one or more pairs")
        loop = asyncio.get_running_loop()
        deadline = _deadline(timeout_s)
        await self._barrier(stale, deadline)
        complete_at = loop.time() - self._engine.state_age_s() if stale else 0.0
        at_ts, now_ms = self._moment(ts)
        whole = ScanRange(start, end, limit, at_ts, now_ms, reverse, keys_only)
        page = _Page(max_bytes, keys_only=keys_only)
        try:
            await self._fill(page, whole, ts, deadline)
        finally:
            self._gathered_bytes -= page.counted_bytes
        return ScanResult(page.pairs, age_ms(loop.time() - complete_at) if stale else 0)

    async def _fill(self, page: _Page, whole: ScanRange, ts: int, deadline: float) -> None:
        """Put all that is in `whole` onto the page. `ts` is what was asked for."""
        loop = asyncio.get_running_loop()
        rest: ScanRange | None = None
        while True:
            await self._scan_turns.enter()
            if rest is None or rest.at_ts < self._store.horizon_ts <= whole.at_ts:
                # Its first turn may be late, and shows the state as it is by now: what expired
                # meanwhile is not in it. Or compaction has overtaken it; nothing was answered yet,
                # so any later moment that was asked for is as good.
                rest = whole._replace(now_ms=self._moment(ts)[1])
                page.clear()
            left, took_its_time = self._scan_turn(rest, page)
            if left is None:
                return
            rest = left
            self._count(page)
            if loop.time() >= deadline:
                raise DeadlineExceeded(
                    "the scan did not get through its range within the deadline",
                    remedy="retry with a longer timeout, or scan a smaller range")
            if took_its_time:
                await self._read_ahead(rest, deadline)

    async def _read_ahead(self, wanted: ScanRange, deadline: float) -> bool:
        """Let a thread bring what comes next into memory, until `deadline` (loop time) at most;
        whether it had to wait for the disk."""
        if self._prefetcher is None:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                return await self._prefetcher(
                    self._store.prefetch(wanted, min(wanted.limit, PREFETCH_KEYS)))
        return True

    def _scan_turn(self, wanted: ScanRange, page: _Page) -> tuple[ScanRange | None, bool]:
        """Put the next pairs onto the page; what is left, None at the end, and whether it was time
        that ended the turn."""
        clock = self._hlc.clock
        ends_at_s = clock.monotonic() + TURN_S
        took_its_time = False

        def is_over() -> bool:
            nonlocal took_its_time
            took_its_time = clock.monotonic() >= ends_at_s
            return took_its_time

        found, rest = self._store.scan_turn(wanted, is_over)
        if wanted.keys_only:
            page.add((key, b"") for key, _, _ in found)
        else:
            open_record = self._open_record
            page.add((key, open_record(store_key, record)) for key, store_key, record in found)
        return rest, took_its_time

    def _count(self, page: _Page) -> None:
        """Count what an unfinished page holds. Raises `Overloaded` where all of them hold too much.
        """
        held_bytes = page.held_bytes
        self._gathered_bytes += held_bytes - page.counted_bytes
        page.counted_bytes = held_bytes
        if self._gathered_bytes > MAX_GATHERED_BYTES \
                and SMALL_ANSWER_BYTES < held_bytes < self._gathered_bytes:
            raise Overloaded(f"the scans under way hold {self._gathered_bytes} bytes",
                             remedy="scan less at a time, or in smaller pages")

    async def _barrier(self, stale: bool, deadline: float) -> int:
        """The index that the state is at least of. Raises what `RaftEngine.read_index` raises."""
        if stale:
            return self._store.applied_index
        loop = asyncio.get_running_loop()
        index = await self._engine.read_index(timeout_s=deadline - loop.time())
        if self._store.applied_index < index:
            remaining_s = deadline - loop.time()
            if remaining_s <= 0:
                raise DeadlineExceeded("this node did not catch up within the deadline",
                                       remedy="retry, or read with stale=true")
            await self._engine.wait_applied(index, timeout_s=remaining_s)
        return index

    def _moment(self, ts: int) -> tuple[int, int]:
        """`(at_ts, now_ms)`: a read at a timestamp sees what had not expired at that timestamp."""
        if not ts:
            return MAX_TIMESTAMP, self._hlc.now_ms()
        return ts, timestamp_ms(ts)


def _deadline(timeout_s: float) -> float:
    """When a call that begins now ends at the latest, in the loop's time."""
    return asyncio.get_running_loop().time() + min(timeout_s, MAX_TIMEOUT_S)


class _Page:
    """The answer to a scan, which may hold `max_bytes`."""

    def __init__(self, max_bytes: int, *, keys_only: bool) -> None:
        self.pairs: list[Pair] = []
        self._max_bytes = max_bytes
        self._room = max_bytes
        self._keys_only = keys_only
        self.counted_bytes = 0
        """What of it `Reader` has counted."""

    @property
    def held_bytes(self) -> int:
        """What it takes in memory, about."""
        return self._max_bytes - self._room + len(self.pairs) * PAIR_MEMORY_BYTES

    def clear(self) -> None:
        """Begin anew."""
        self.pairs.clear()
        self._room = self._max_bytes

    def add(self, pairs: Iterable[Pair]) -> None:
        """Raises `ResultTooLarge` at the first that is too much."""
        room = self._room
        for pair in pairs:
            room -= len(pair[0]) + len(pair[1]) + PAIR_OVERHEAD_BYTES
            if room < 0:
                raise result_too_large(self._max_bytes, len(self.pairs), keys_only=self._keys_only)
            self.pairs.append(pair)
        self._room = room


def age_ms(age_s: float) -> int:
    """Whole milliseconds, rounded up: no answer is older than it says. -1 for infinity."""
    return -1 if math.isinf(age_s) else math.ceil(age_s * 1000)
