"""Reads what conditions compare with beside the loop, while that has to come from the disk.

Conditions are judged where entries are applied, on every member and in the loop. Of a store that is
larger than the memory each key costs a wait for the disk or two, and an entry may have thousands of
conditions: the loop would stand still for longer than an election timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from elastickv.clock import MAX_TIMESTAMP
from elastickv.store.flusher import Runner
from elastickv.store.mvcc_store import Store
from elastickv.store.scan import ScanRange
from elastickv.wire import WriteRequest

SHARES = 8
"""Into so many pieces of work the keys of an entry are divided, so that as many threads read."""

MOST_WAITS = 16
"""So often may the loop wait for the disk for one entry whose keys no thread has read."""


class ConditionReader:
    """Brings the keys of one entry after the other into memory, for as long as that or the reading
    in the loop had to wait for the disk."""

    def __init__(self, store: Store, prefetcher: Runner) -> None:
        """`prefetcher` runs work beside the loop."""
        self._store = store
        self._prefetcher = prefetcher
        self._index = 0
        self._reading: asyncio.Future[None] | None = None
        self._waits_for_disk = True
        """Whether the latest reading had to; nothing is known of the first."""
        self._waits_before = 0

    @property
    def is_busy(self) -> bool:
        """Whether keys are on their way into memory."""
        return self._reading is not None and not self._reading.done()

    def is_ready(self, index: int, requests: Sequence[WriteRequest]) -> bool:
        """Whether the loop may read what the conditions in entry `index` compare with. If not,
        that is on its way: ask again when it `is_busy` no more."""
        if self.is_busy:
            return False
        if not self._waits_for_disk or index == self._index:
            return True
        self._index = index
        keys = dict.fromkeys(key for request in requests for key, _ in request.conditions)
        self._reading = asyncio.ensure_future(self._read([
            self._store.prefetch(ScanRange.of_key(key, MAX_TIMESTAMP), 1) for key in keys]))
        return False

    async def _read(self, readings: Sequence[Callable[[], bool]]) -> None:
        # When the node stops nobody reads any more.
        with contextlib.suppress(RuntimeError):
            self._waits_for_disk = any(await asyncio.gather(*(
                self._prefetcher(partial(_do_all, readings[number::SHARES]))
                for number in range(min(SHARES, len(readings))))))

    def begin(self) -> None:
        """The loop reads what the conditions of an entry compare with."""
        self._waits_before = self._store.backend.disk_waits()

    def may_go_on(self, index: int, requests: Sequence[WriteRequest]) -> bool:
        """Whether the loop may read one more: not when what was in memory for the entries before
        `index` has to come from the disk for this one. Then that is on its way, as for `is_ready`.
        """
        if index == self._index \
                or self._store.backend.disk_waits() - self._waits_before < MOST_WAITS:
            return True
        self._waits_for_disk = True
        return self.is_ready(index, requests)

    def end(self) -> None:
        """It has."""
        self._waits_for_disk |= self._store.backend.disk_waits() > self._waits_before


def _do_all(readings: Sequence[Callable[[], bool]]) -> bool:
    """Whether any of `readings` had to wait."""
    return any([reading() for reading in readings])
