"""MVCC compaction: removes versions that no permitted read can see.

The *horizon* is a timestamp: reads at or above it see what they always saw, reads below it are
refused by the store. It is a retention window behind the **lower** of wall time and the newest
commit timestamp that is durable here: a replica that lags, or that replays its log, must not expire
by its own clock what an older entry that it has still to apply will compare with.

A pass walks the whole table in bounded steps, each one job between two flushes; walking checks
every record's checksum as well, so that damage at rest is found before a client asks for it. A key
with more versions than a step takes is compacted in several steps: see `removable`.

Each step has the horizon of its own moment, and none waits while there is much to remove: else a
pass that takes long would leave behind what came meanwhile, and the next one would take longer yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from elastickv.clock import COUNTER_BITS, pack_timestamp, timestamp_ms
from elastickv.store.dek_counts import DekCounts, dek_id_of, encode_counts, without
from elastickv.store.header import HEADER_BYTES
from elastickv.store.job import Job
from elastickv.store.mvcc import TIMESTAMP_BYTES, commit_ts_of, visible
from elastickv.store.mvcc_store import DEK_COUNTS, HORIZON_TS, Store, encode_number
from elastickv.store.tables import Backend, ReadView, Table, WriteBatch

DEFAULT_RETENTION_MS = 3_600_000
STEP_ENTRIES = 2_000
STEP_BYTES = 8 << 20
STEP_DELAY_S = 0.1
BUSY_SHARE = 4
"""While more than one in so many of the versions that were walked was removed, steps follow each
other at once, so that about a fourth of the table is removable at most. The share is that of a
whole pass, because a step alone may see nothing but the new versions of one key."""
PASS_DELAY_S = 300.0


class StoredVersion(NamedTuple):
    """A version as compaction sees it: no body."""

    commit_ts: int
    store_key: bytes
    header: bytes
    dek_id: int | None = None


def horizon(wall_ms: int, durable_commit_ts: int, retention_ms: int) -> int:
    """The horizon timestamp; 0 when nothing is old enough."""
    newest_ms = min(wall_ms, timestamp_ms(durable_commit_ts))
    return pack_timestamp(max(newest_ms - retention_ms, 0))


def removable(versions: Sequence[StoredVersion], horizon_ts: int, *,
              complete: bool = True) -> Sequence[StoredVersion]:
    """Which of one key's versions (newest first) no read at or above `horizon_ts` sees.

    Above the horizon everything stays. Of those at or below it, the newest is what a read at the
    horizon finds: it stays unless it is a tombstone or had expired by then. All older ones go.

    Without the key's oldest versions (not `complete`) that newest one stays in any case: it hides
    them until they are gone. Without its newest ones, whether above the horizon or not, what goes
    may go: at most one version more than needed stays.
    """
    position = witness(versions, horizon_ts)
    if position is None:
        return ()
    if complete and not visible(versions[position].header, horizon_ts >> COUNTER_BITS):
        return versions[position:]
    return versions[position + 1:]


def witness(versions: Sequence[StoredVersion], horizon_ts: int) -> int | None:
    """The position of the newest version at or below the horizon."""
    for position, version in enumerate(versions):
        if version.commit_ts <= horizon_ts:
            return position
    return None


class CompactionStep(Job):
    """Walks from `start` for a bounded number of entries and removes what is removable.

    Afterwards `next_start` is where the next step begins, b"" at the end of the table.
    """

    def __init__(self, backend: Backend, view: ReadView, start: bytes, horizon_ts: int,
                 dek_counts: DekCounts) -> None:
        super().__init__()
        self._counts = dek_counts
        self._backend = backend
        self._view = view
        self._start = start
        self._horizon_ts = horizon_ts
        self.next_start = b""
        self.walked = 0
        self.removed = 0

    def _work(self) -> None:
        doomed: list[StoredVersion] = []
        group: list[StoredVersion] = []
        byte_count = seen = 0
        for seen, (store_key, record) in enumerate(self._view.iterate(Table.MVCC, self._start)):
            full = seen >= STEP_ENTRIES or byte_count >= STEP_BYTES
            if group and store_key[:-TIMESTAMP_BYTES] != group[0].store_key[:-TIMESTAMP_BYTES]:
                doomed += removable(group, self._horizon_ts)
                group = []
            if full and not group:
                self.next_start = store_key
                break
            # With one version of a key alone a step might end where it began.
            if full and len(group) > 1:
                doomed += removable(group, self._horizon_ts, complete=False)
                position = witness(group, self._horizon_ts)
                self.next_start = store_key if position is None else group[position].store_key
                break
            byte_count += len(record)
            group.append(StoredVersion(commit_ts_of(store_key), store_key, record[:HEADER_BYTES],
                                       dek_id_of(record)))
        else:
            doomed += removable(group, self._horizon_ts)
        self.walked = seen
        if doomed:
            counts = without(self._counts, (version.dek_id for version in doomed))
            self._backend.write(WriteBatch(
                deletes={Table.MVCC: [version.store_key for version in doomed]},
                puts={Table.META: [(HORIZON_TS, encode_number(self._horizon_ts)),
                                   (DEK_COUNTS, encode_counts(counts))]}))
            self.dek_counts = counts
        self.removed = len(doomed)

    def release(self) -> None:
        """Close the view. On the loop thread, when the job is over."""
        self._view.close()


class Compactor:
    """Runs passes over a store; driven by the flusher. `wall_ms` is this node's clock."""

    def __init__(self, store: Store, wall_ms: Callable[[], int], *,
                 retention_ms: int = DEFAULT_RETENTION_MS) -> None:
        self._store = store
        self._wall_ms = wall_ms
        self._retention_ms = retention_ms
        self._position: bytes | None = None
        # Of this pass, and half of what was before it.
        self._recently_walked = self._recently_removed = 0
        self._busy = False
        self.removed = 0
        self.passes = 0

    def delay_s(self) -> float:
        """Seconds until the next step is due."""
        if self._position is None:
            return PASS_DELAY_S
        return 0.0 if self._busy else STEP_DELAY_S

    def begin(self) -> CompactionStep | None:
        """The next step, or None when there is nothing to compact or another job is under way."""
        store = self._store
        if store.busy:
            return None
        horizon_ts = horizon(self._wall_ms(), store.durable_commit_ts, self._retention_ms)
        if self._position is None:
            if horizon_ts == 0:
                return None
            self._position = b""
        # The store's counts: the clock may have stepped back, and a snapshot installed between two
        # steps brings a horizon of its own, higher or lower.
        store.raise_horizon(horizon_ts)
        step = CompactionStep(store.backend, store.backend.view(), self._position, store.horizon_ts,
                              store.dek_counts)
        store.begin_job(step)
        return step

    def finish(self, step: CompactionStep) -> None:
        """Take note that the step's `run` returned or raised."""
        step.release()
        self._store.finish_job(step)
        self._busy = False
        if not step.done:
            return
        self._recently_walked += step.walked
        self._recently_removed += step.removed
        self._busy = self._recently_removed * BUSY_SHARE > self._recently_walked
        self.removed += step.removed
        self._position = step.next_start or None
        if self._position is None:
            self.passes += 1
            self._recently_walked //= 2
            self._recently_removed //= 2

    def run_pass(self) -> int:
        """A whole pass at once, inline; the number of versions removed. For tests and tools."""
        before, passes = self.removed, self.passes
        while self.passes == passes:
            step = self.begin()
            if step is None:
                break
            try:
                step.run()
            finally:
                self.finish(step)
        return self.removed - before
