"""When the overlay is flushed, and what failures mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastickv.clock import pack_timestamp
from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, StoreCorrupt
from elastickv.store import flusher as flusher_module
from elastickv.store import gc
from elastickv.store.flusher import Flusher
from elastickv.store.gc import Compactor
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store
from elastickv.store.tables import MapFull, WriteBatch
from elastickv.store.values import plain_record

NEVER_MS = 3_600_000


class Backend(MemoryBackend):
    """Fails with `errors`, one per write, then works; reports `damage` from its audit."""

    def __init__(self, directory: Path) -> None:
        super().__init__(OsDisk(), directory)
        self.errors: list[BaseException] = []
        self.damage: StoreCorrupt | None = None
        self.audits = 0
        self.needs_room = False

    def reserve(self, byte_count: int) -> None:
        self.needs_room = False

    def write(self, batch: WriteBatch) -> None:
        if self.needs_room:
            raise MapFull("full")
        if self.errors:
            raise self.errors.pop(0)
        super().write(batch)

    def poll_audit(self) -> bool:
        self.audits += 1
        if self.damage is not None and self.audits > 3:
            raise self.damage
        return self.damage is not None


async def threaded(work: Callable[[], None]) -> None:
    await asyncio.to_thread(work)


class Harness:
    """A store with its flusher, and events for what the flusher tells."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.store = Store.open(backend)
        self.flushed: asyncio.Queue[int] = asyncio.Queue()
        self.fatal: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.flusher: Flusher | None = None

    def start(self, *, interval_ms: int = 1, flush_bytes: int = 1 << 30,
              compactor: Compactor | None = None) -> Flusher:
        self.flusher = Flusher(self.store, threaded, on_fatal=self.fatal.set_result,
                               on_flushed=self.flushed.put_nowait, compactor=compactor,
                               flush_bytes=flush_bytes, interval_ms=interval_ms)
        self.flusher.start()
        return self.flusher

    def write(self, size: int = 10, commit_ts: int = 1) -> None:
        index = self.store.applied_index + 1
        self.store.apply_group(index, [(b"k%d" % index, commit_ts, plain_record(b"x" * size))])


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    harness = Harness(Backend(tmp_path))
    yield harness
    if harness.flusher is not None:
        harness.backend.errors.clear()
        await harness.flusher.stop()


async def test_flushes_after_the_interval(harness: Harness) -> None:
    harness.start(interval_ms=1)
    for index in (1, 2):
        harness.write()
        assert await harness.flushed.get() == index
    assert harness.store.durable_index == 2


async def test_flushes_early_when_enough_bytes_wait(harness: Harness) -> None:
    harness.start(interval_ms=NEVER_MS, flush_bytes=10_000)
    for _ in range(10):
        harness.write(size=2_000)
        await asyncio.sleep(0)
    assert await harness.flushed.get() >= 4


async def test_what_is_dirty_at_the_start_is_flushed(harness: Harness) -> None:
    harness.write()
    harness.start()
    assert await harness.flushed.get() == 1


async def test_stop_flushes_the_rest(harness: Harness) -> None:
    flusher = harness.start(interval_ms=NEVER_MS)
    harness.write()
    await flusher.stop()
    assert harness.store.durable_index == 1


async def test_stop_without_flushing(harness: Harness) -> None:
    flusher = harness.start(interval_ms=NEVER_MS)
    harness.write()
    await flusher.stop(flush=False)
    assert harness.store.durable_index == 0


async def test_a_full_disk_is_a_state_that_ends(harness: Harness,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flusher_module, "DISK_FULL_RETRY_S", 0.001)
    harness.backend.errors = [DiskFull("full")] * 3
    said: list[str] = []
    monkeypatch.setattr(flusher_module, "log", SimpleNamespace(
        error=lambda event, **fields: said.append(event)))
    flusher = harness.start()
    assert flusher.error is None
    harness.write()
    while flusher.error is None:
        await asyncio.sleep(0)
    assert isinstance(flusher.error, DiskFull)
    harness.write()
    assert await harness.flushed.get() == 1
    assert flusher.error is None
    assert said == ["disk full"]  # once a minute
    assert await harness.flushed.get() == 2
    assert not harness.fatal.done()


async def test_a_store_without_anything_to_flush_is_writable(
        harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a snapshot that replaced what did not fit."""
    monkeypatch.setattr(flusher_module, "DISK_FULL_RETRY_S", 0.01)
    harness.backend.errors = [DiskFull("full")]
    flusher = harness.start()
    harness.write()
    while flusher.error is None:
        await asyncio.sleep(0)
    harness.store.flush_now()
    async with asyncio.timeout(10):
        while flusher.error is not None:
            await asyncio.sleep(0.001)


async def test_stop_on_a_full_disk_says_so(harness: Harness) -> None:
    flusher = harness.start(interval_ms=NEVER_MS)
    harness.write()
    harness.backend.errors = [DiskFull("full")]
    with pytest.raises(DiskFull):
        await flusher.stop()
    assert (harness.store.durable_index, harness.store.applied_index) == (0, 1)


async def test_a_full_map_is_no_error(harness: Harness) -> None:
    harness.backend.errors = [MapFull("full")] * 2
    flusher = harness.start()
    harness.write()
    assert await harness.flushed.get() == 1
    assert flusher.error is None


async def test_any_other_error_is_fatal_and_final(harness: Harness) -> None:
    harness.backend.errors = [OSError(5, "I/O error")]
    flusher = harness.start()
    harness.write()
    error = await harness.fatal
    assert isinstance(error, OSError)
    with pytest.raises(OSError, match="I/O"):
        await flusher.stop()
    assert harness.store.durable_index == 0
    harness.flusher = None


async def test_damage_found_by_the_audit_is_fatal(harness: Harness,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flusher_module, "AUDIT_POLL_S", 0.001)
    harness.backend.damage = StoreCorrupt("damaged")
    harness.start()
    assert await harness.fatal is harness.backend.damage


async def test_compaction_runs_between_flushes_under_load(
        harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "PASS_DELAY_S", 0.002)
    monkeypatch.setattr(gc, "STEP_DELAY_S", 0.0)
    monkeypatch.setattr(gc, "STEP_ENTRIES", 10)
    store = harness.store
    compactor = Compactor(store, lambda: 1 << 40, retention_ms=0)
    harness.start(interval_ms=0, compactor=compactor)
    number = 0
    while compactor.passes < 2 or compactor.removed < 10:
        for _ in range(2):  # the second while the first is flushed
            number += 1
            store.apply_group(number, [
                (b"hot", pack_timestamp(number), plain_record(b"%d" % number))])
            await asyncio.sleep(0)
        await harness.flushed.get()
        assert not harness.fatal.done()
    found = store.get(b"hot", (1 << 64) - 1, 0)
    assert found is not None
    assert found.record == plain_record(b"%d" % number)


async def test_compaction_that_fills_the_map_goes_on_without_a_flush(
        harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "PASS_DELAY_S", 0.0)
    for index in range(1, 21):
        harness.store.apply_group(index, [(b"k", pack_timestamp(index), plain_record(b"v"))])
    harness.store.flush_now()
    harness.backend.needs_room = True
    compactor = Compactor(harness.store, lambda: 1 << 40, retention_ms=0)
    harness.start(compactor=compactor)
    async with asyncio.timeout(10):
        while compactor.removed == 0:
            await asyncio.sleep(0.001)
    assert not harness.fatal.done()
    assert harness.flushed.empty()


async def test_compaction_on_a_full_disk_waits(harness: Harness,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "PASS_DELAY_S", 0.0)
    for number in (1, 2):
        harness.store.apply_group(number, [(b"k", pack_timestamp(number), plain_record(b"v"))])
    harness.store.flush_now()
    compactor = Compactor(harness.store, lambda: 1 << 40, retention_ms=0)
    harness.backend.errors = [DiskFull("full")] * 2
    harness.start(compactor=compactor)
    while compactor.removed == 0:
        await asyncio.sleep(0)
    assert harness.backend.errors == []
    assert not harness.fatal.done()
