"""Decides when the overlay is flushed, and what a failed flush means. Runs in the node's loop.

A full disk is a state, not an end: `error` is set, nothing is lost (the overlay and the log keep
it), and the flush is tried again until it succeeds. Any other error leaves it open whether the
batch was written, so it is reported once as fatal and the loop ends: a failed fsync is never
retried (see `elastickv.durable`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from elastickv.errors import DiskFull
from elastickv.logs import Seldom, get_logger
from elastickv.store.gc import Compactor
from elastickv.store.mvcc_store import Store
from elastickv.store.tables import MapFull

log = get_logger("elastickv.store.flusher")

T = TypeVar("T")

DEFAULT_FLUSH_BYTES = 8 << 20
DISK_FULL_RETRY_S = 0.5
DISK_FULL_LOG_S = 60.0
AUDIT_POLL_S = 0.2


class Runner(Protocol):
    """Runs a blocking function: in a thread in production, inline in simulation."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class Flusher:
    """Flushes `store` when it holds `flush_bytes`, or `interval_ms` after its first dirty write.

    Steps of `compactor`, if there is one, run between flushes, never beside them.
    """

    def __init__(self, store: Store, runner: Runner, *,
                 on_fatal: Callable[[BaseException], None], interval_ms: int,
                 on_flushed: Callable[[int], None] | None = None,
                 compactor: Compactor | None = None,
                 flush_bytes: int = DEFAULT_FLUSH_BYTES) -> None:
        """`on_flushed(durable_index)` is called after every successful flush."""
        self._store = store
        self._runner = runner
        self._on_fatal = on_fatal
        self._on_flushed = on_flushed
        self._compactor = compactor
        self._flush_bytes = flush_bytes
        self._interval_s = interval_ms / 1000
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._due_at: float | None = None
        self._compact_at: float | None = None
        self._audit_pending = True
        self._flushed_last = False
        self._disk_full_line = Seldom(DISK_FULL_LOG_S)
        self.error: DiskFull | None = None
        store.on_dirty(self._notice)

    def start(self) -> None:
        """Start the loop. Once."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="store-flusher")

    def _notice(self) -> None:
        if self._due_at is None or self._store.overlay_bytes >= self._flush_bytes:
            self._wake.set()

    async def stop(self, *, flush: bool = True) -> None:
        """End the loop after the job under way; with `flush`, make everything applied durable.

        Raises `DiskFull` when that is impossible: nothing acknowledged is lost, the log has it.
        """
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        while flush and self._store.dirty:
            await self._flush()
            if self.error is not None:
                raise self.error

    async def _run(self) -> None:
        try:
            while not self._stopping:
                await self._step()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._on_fatal(error)

    async def _step(self) -> None:
        """Whatever is due first: a flush, a compaction step, or waiting for either."""
        now = asyncio.get_running_loop().time()
        self._wake.clear()
        self._audit_pending = self._audit_pending and self._store.backend.poll_audit()
        flush_due, compaction_due = self._flush_due(now), self._compaction_due(now)
        if compaction_due and (self._flushed_last or not flush_due):
            # In turns, so that flushes that never pause do not keep old versions for ever.
            self._flushed_last = False
            await self._compact()
        elif flush_due:
            self._flushed_last = True
            await self._flush()
        else:
            audit_at = now + AUDIT_POLL_S if self._audit_pending else None
            deadlines = [at for at in (self._due_at, self._compact_at, audit_at)
                         if at is not None]
            await _wait(self._wake, min(deadlines) - now if deadlines else None)

    def _flush_due(self, now: float) -> bool:
        if not self._store.dirty:
            # Also when a snapshot has replaced what could not be flushed.
            self._due_at = self.error = None
            return False
        if self._due_at is None:
            self._due_at = now + self._interval_s
        full = self.error is None and self._store.overlay_bytes >= self._flush_bytes
        return full or now >= self._due_at

    def _compaction_due(self, now: float) -> bool:
        if self._compactor is None:
            return False
        if self._compact_at is None:
            self._compact_at = now + self._compactor.delay_s()
        return now >= self._compact_at

    async def _compact(self) -> None:
        self._compact_at = None
        step = self._compactor.begin() if self._compactor is not None else None
        if step is None or self._compactor is None:
            return
        try:
            try:
                await self._runner(step.run)
            finally:
                self._compactor.finish(step)
        except MapFull:
            # Perhaps no flush comes that would grow the map.
            self._store.make_room()
        except DiskFull:
            # Compaction can wait; a flush will say that the disk is full.
            return

    async def _flush(self) -> None:
        job = self._store.begin_flush()
        if job is None:
            self._store.settle()
            return
        loop = asyncio.get_running_loop()
        try:
            await self._runner(job.run)
        except MapFull:
            # Still due: the next begin_flush grows the map.
            return
        except DiskFull as error:
            self.error = error
            self._due_at = loop.time() + DISK_FULL_RETRY_S
            if self._disk_full_line.due(loop.time()):
                log.error("disk full", error=str(error))
            return
        finally:
            self._store.finish_flush(job)
        self.error = None
        self._due_at = None
        if self._on_flushed is not None:
            self._on_flushed(self._store.durable_index)


async def _wait(event: asyncio.Event, timeout_s: float | None) -> None:
    """Wait for `event`, for at most `timeout_s` seconds of loop time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
