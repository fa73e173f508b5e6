"""The store: MVCC reads and group writes over an in-memory overlay and a durable backend.

A write goes to the *active* overlay. A flush freezes it and writes it to the backend in one atomic,
durable batch together with the index that it reaches; reads see active, then frozen, then the
backend's view from before the flush, until `finish_flush` swaps view and overlay in one step. After
a crash the store is what the last flush made it, and the log is replayed from `applied_index`.

All methods belong to the loop thread, except `FlushJob.run`. Nothing here reads a clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from elastickv.errors import DiskFull, InvalidArgument, StoreCorrupt, WireError
from elastickv.store.dek_counts import DekCounts, count_in, decode_counts, encode_counts
from elastickv.store.header import HEADER_BYTES, LASTING_HEADERS, MAX_FLAGS
from elastickv.store.job import Job
from elastickv.store.mvcc import (
    MAX_USER_KEY_BYTES,
    TIMESTAMP_BYTES,
    Version,
    commit_ts_of,
    encode_store_key,
    scan_bound,
    version_suffix,
    visible,
)
from elastickv.store.overlay import Chain, Overlay, find
from elastickv.store.scan import (
    ENTRY_COST,
    ScannedVersion,
    ScanRange,
    Work,
    merged_versions,
)
from elastickv.store.tables import (
    Backend,
    BackendStats,
    ImportSink,
    Item,
    MapFull,
    Table,
    WriteBatch,
)

Write = tuple[bytes, int, bytes]
"""`(user_key, commit_ts, record)`."""

APPLIED_INDEX = b"applied_index"
MAX_COMMIT_TS = b"max_commit_ts"
HORIZON_TS = b"gc_horizon_ts"
DEK_COUNTS = b"values_by_dek"
TURN_COST = 1_500 * ENTRY_COST
"""What a scan walks over before others have their turn, about three milliseconds of work: more than
a page of 1,000 values of 1 KiB, whatever versions they have. A key counts once for each layer that
it is in."""

ASKED_EVERY = 4
"""Keys between two questions whether a turn must end."""

RESERVED_META = frozenset((APPLIED_INDEX, MAX_COMMIT_TS, HORIZON_TS, DEK_COUNTS))


def encode_number(value: int) -> bytes:
    """A number in the meta table: 8 bytes, big-endian."""
    return value.to_bytes(8, "big")


def decode_number(data: bytes | None) -> int:
    """Inverse of `encode_number`; 0 when absent."""
    if data is None:
        return 0
    if len(data) != 8:
        raise StoreCorrupt("a number in the store's meta table is not 8 bytes long")
    return int.from_bytes(data, "big")


def check_write(write: Write) -> None:
    """Raise `WireError` unless the write could be stored and read back."""
    user_key, commit_ts, record = write
    if not 0 < len(user_key) <= MAX_USER_KEY_BYTES:
        raise WireError(f"a write has a key of {len(user_key)} bytes")
    if len(record) < HEADER_BYTES or record[0] > MAX_FLAGS:
        raise WireError("a write has a malformed record header")
    if not 0 < commit_ts < 1 << 64:
        raise WireError(f"a write has the impossible commit timestamp {commit_ts}")


class _Layer:
    """What a flush writes: versions, rows and meta up to and including `index`."""

    __slots__ = ("index", "meta", "overlay", "rows")

    def __init__(self) -> None:
        self.overlay = Overlay()
        self.rows: dict[bytes, bytes] = {}
        self.meta: dict[bytes, bytes] = {}
        self.index = 0


class FlushJob(Job):
    """One frozen layer on its way to the backend, in one atomic and durable batch."""

    def __init__(self, backend: Backend, layer: _Layer, facts: Mapping[bytes, bytes],
                 dek_counts: DekCounts) -> None:
        super().__init__()
        self._backend = backend
        self._layer = layer
        self._facts = facts
        self._counts = dict(dek_counts)
        self.index = layer.index

    def _work(self) -> None:
        self._backend.write(WriteBatch(puts={
            Table.MVCC: self._versions(),
            Table.ROWS: sorted(self._layer.rows.items()),
            Table.META: self._meta(),
        }))
        self.dek_counts = self._counts

    def _versions(self) -> Iterator[Item]:
        for user_key, commit_ts, record in self._layer.overlay.versions():
            yield encode_store_key(user_key, commit_ts), record

    def _meta(self) -> list[Item]:
        count_in(self._counts, self._layer.overlay.records())
        return sorted({**self._layer.meta, **self._facts,
                       DEK_COUNTS: encode_counts(self._counts)}.items())


class Store:
    """See the module. Made by `Store.open`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._view = backend.view()
        self._active = _Layer()
        self._frozen: _Layer | None = None
        self._job: Job | None = None
        self._failure: BaseException | None = None
        self.disk_full: DiskFull | None = None
        """What the last flush ended in, if that was a full disk."""
        self._on_dirty: Callable[[], None] | None = None
        self._rows: dict[bytes, bytes] = {}
        self._meta: dict[bytes, bytes] = {}
        self.applied_index = 0
        self.durable_index = 0
        self.max_commit_ts = 0
        self.horizon_ts = 0
        self.durable_commit_ts = 0
        self.dek_counts: DekCounts = {}
        """Durable values by DEK; those that are not flushed yet are missing."""
        self._load()

    @classmethod
    def open(cls, backend: Backend) -> Store:
        """The store in `backend`. Raises `StoreCorrupt` when its rows or facts are damaged."""
        return cls(backend)

    @property
    def backend(self) -> Backend:
        """Where flushes go."""
        return self._backend

    @property
    def busy(self) -> bool:
        """Whether a job (flush or compaction) is under way in the backend."""
        return self._job is not None

    @property
    def dirty(self) -> bool:
        """Whether anything is applied that is not durable."""
        return self.applied_index > self.durable_index

    def _load(self) -> None:
        """Drop everything in memory and take the state from the backend."""
        self._rows = dict(self._view.iterate(Table.ROWS))
        self._meta = dict(self._view.iterate(Table.META))
        self.applied_index = self.durable_index = decode_number(self._meta.pop(APPLIED_INDEX, None))
        self.durable_commit_ts = decode_number(self._meta.pop(MAX_COMMIT_TS, None))
        self.max_commit_ts = self.durable_commit_ts
        self.horizon_ts = decode_number(self._meta.pop(HORIZON_TS, None))
        self.dek_counts = self._stored_counts(self._meta.pop(DEK_COUNTS, None))
        self._active = _Layer()
        self._frozen = None
        self._job = None
        self.disk_full = None

    def _stored_counts(self, stored: bytes | None) -> DekCounts:
        if stored is not None:
            return decode_counts(stored)
        counts: dict[int, int] = {}  # a store from before they were kept
        count_in(counts, (record for _, record in self._view.iterate(Table.MVCC)))
        return counts

    # --- writing -----------------------------------------------------------------------------

    def apply_group(self, index: int, writes: Sequence[Write], rows: Sequence[Item] = (),
                    meta: Mapping[bytes, bytes] | None = None) -> None:
        """Make the effects of log entry `index` visible, and the index with them. Memory only.

        Raises `WireError` for a malformed write and `ValueError` for an index that does not
        advance or a reserved meta name; then nothing has changed.
        """
        if index <= self.applied_index:
            raise ValueError(f"index {index} does not advance {self.applied_index}")
        if meta and not RESERVED_META.isdisjoint(meta):
            raise ValueError("a reserved meta name was written")
        for user_key, commit_ts, record in writes:
            if not (0 < len(user_key) <= MAX_USER_KEY_BYTES and len(record) >= HEADER_BYTES
                    and record[0] <= MAX_FLAGS and 0 < commit_ts < 1 << 64):
                check_write((user_key, commit_ts, record))
        layer = self._active
        put = layer.overlay.put
        for user_key, commit_ts, record in writes:
            put(user_key, commit_ts, record)
        if layer.overlay.max_ts > self.max_commit_ts:
            self.max_commit_ts = layer.overlay.max_ts
        if rows:
            layer.rows.update(rows)
            self._rows.update(rows)
        if meta:
            layer.meta.update(meta)
            self._meta.update(meta)
        layer.index = index
        self.applied_index = index
        if self._on_dirty is not None:
            self._on_dirty()

    def on_dirty(self, callback: Callable[[], None]) -> None:
        """`callback()` after every `apply_group`; for the flusher, so it must be cheap."""
        self._on_dirty = callback

    # --- reading -----------------------------------------------------------------------------

    def get(self, user_key: bytes, at_ts: int, now_ms: int) -> Version | None:
        """The version of `user_key` visible at `at_ts`; None when there is none, when it is a
        tombstone, or when it has expired at `now_ms`.

        Raises `InvalidArgument` below the compaction horizon, `StoreCorrupt`, `IntegrityError`.
        """
        if at_ts < self.horizon_ts:
            self._refuse_below_horizon(at_ts)
        version = self.latest_version(user_key, at_ts)
        if version is None or not visible(version.record, now_ms):
            return None
        return version

    def latest_version(self, user_key: bytes, at_ts: int) -> Version | None:
        """The newest version at or before `at_ts`, tombstones and expired ones included."""
        chain = self._active.overlay.chains.get(user_key)
        frozen = self._frozen
        below_ts = self.durable_commit_ts
        if chain is not None:
            chain = find(chain, at_ts)
            # Timestamps rise with the log, so a hit in memory normally settles it; the comparison
            # keeps the answer right if one day they do not.
            if chain is not None and chain[0] > below_ts and (
                    frozen is None or chain[0] > frozen.overlay.max_ts):
                return Version(chain[0], encode_store_key(user_key, chain[0]), chain[1])
        if frozen is not None:
            other = find(frozen.overlay.chains.get(user_key), at_ts)
            if other is not None and (chain is None or other[0] > chain[0]):
                chain = other
                if chain[0] > below_ts:
                    return Version(chain[0], encode_store_key(user_key, chain[0]), chain[1])
        return self._newest_of(user_key, at_ts, chain)

    def _newest_of(self, user_key: bytes, at_ts: int, chain: Chain | None) -> Version | None:
        """The newer of `chain`'s first version and the backend's version at `at_ts`."""
        wanted = encode_store_key(user_key, at_ts)
        found = self._view.ceiling(Table.MVCC, wanted, wanted[:-TIMESTAMP_BYTES])
        if found is not None:
            stored_ts = commit_ts_of(found[0])
            if chain is None or stored_ts > chain[0]:
                return Version(stored_ts, found[0], found[1])
        if chain is None:
            return None
        return Version(chain[0], encode_store_key(user_key, chain[0]), chain[1])

    def scan(self, start: bytes, end: bytes, limit: int, at_ts: int, now_ms: int,
             reverse: bool = False) -> list[tuple[bytes, Version]]:
        """Up to `limit` visible pairs, all turns of a scan at once; see `ScanRange`.

        Raises what `scan_turn` raises.
        """
        pairs: list[tuple[bytes, Version]] = []
        rest: ScanRange | None = ScanRange(start, end, limit, at_ts, now_ms, reverse)
        while rest is not None:
            found, rest = self.scan_turn(rest)
            pairs += [(user_key, Version(commit_ts_of(store_key), store_key, record))
                      for user_key, store_key, record in found]
        return pairs

    def scan_turn(self, wanted: ScanRange, is_over: Callable[[], bool] = lambda: False,
                  ) -> tuple[list[ScannedVersion], ScanRange | None]:
        """The next visible versions, as many as bounded work finds (there may be none), and what is
        left; None at the end. `is_over` is asked every few keys whether the turn must end sooner.

        Writes may come between two turns: a scan shows none that was applied after its first.
        Raises `InvalidArgument` below the compaction horizon, `StoreCorrupt`, `IntegrityError`.
        """
        if wanted.at_ts < self.horizon_ts:
            self._refuse_below_horizon(wanted.at_ts)
        pairs: list[ScannedVersion] = []
        if wanted.empty():
            return pairs, None
        start, end, limit, at_ts, now_ms, reverse, keys_only = wanted
        layers = [self._active.overlay]
        if self._frozen is not None:
            layers.append(self._frozen.overlay)
        work = Work()
        candidates = merged_versions(self._view, layers, start, end, at_ts, reverse, work)
        for number, (user_key, store_key, record) in enumerate(candidates, 1):
            if record is not None and (record[:HEADER_BYTES] in LASTING_HEADERS
                                       or visible(record, now_ms)):
                pairs.append((user_key, store_key,
                              record[:HEADER_BYTES] if keys_only else record))
                if len(pairs) >= limit:
                    break
            if work.cost >= TURN_COST or (number % ASKED_EVERY == 0 and is_over()):
                # Later writes have later timestamps.
                return pairs, wanted.after(user_key, len(pairs), min(at_ts, self.max_commit_ts))
        return pairs, None

    def prefetch(self, wanted: ScanRange, keys: int) -> Callable[[], bool]:
        """Work for any thread: it brings what the next `keys` keys of `wanted` are found in into
        memory, and returns whether it had to wait for the disk."""
        return self._backend.prefetch(
            Table.MVCC, scan_bound(wanted.start), scan_bound(wanted.end),
            version_suffix(wanted.at_ts), keys, reverse=wanted.reverse)

    def _refuse_below_horizon(self, at_ts: int) -> None:
        raise InvalidArgument(
            f"timestamp {at_ts} is before {self.horizon_ts}, the oldest that is kept",
            remedy="read at a later timestamp, or without one")

    def row(self, key: bytes) -> bytes | None:
        """A registry row."""
        return self._rows.get(key)

    def rows(self, prefix: bytes = b"") -> list[Item]:
        """The registry rows under `prefix`, in key order."""
        return sorted(item for item in self._rows.items() if item[0].startswith(prefix))

    def meta(self, name: bytes) -> bytes | None:
        """A fact stored with `apply_group(meta=...)`."""
        return self._meta.get(name)

    # --- flushing ----------------------------------------------------------------------------

    @property
    def overlay_bytes(self) -> int:
        """Memory that is held until the next flushes, bookkeeping included."""
        frozen = self._frozen
        return self._active.overlay.byte_count + (frozen.overlay.byte_count if frozen else 0)

    @property
    def overlay_versions(self) -> int:
        """Versions that are not in the backend yet."""
        frozen = self._frozen
        return self._active.overlay.version_count + (frozen.overlay.version_count if frozen else 0)

    def begin_flush(self) -> FlushJob | None:
        """Freeze what is dirty and return the job that writes it; None when there is nothing to do
        or a job is under way.

        After a job that ended in `DiskFull` the next one is for the same frozen layer. After any
        other error nobody knows what was written, and this raises that error from then on.
        """
        if self._job is not None:
            return None
        if self._failure is not None:
            raise self._failure
        if self._frozen is None:
            if not self.dirty:
                return None
            self._frozen = self._active
            self._active = _Layer()
        frozen = self._frozen
        self._reserve(frozen.overlay.byte_count)
        newest_ts = max(self.durable_commit_ts, frozen.overlay.max_ts)
        job = FlushJob(self._backend, frozen, {
            APPLIED_INDEX: encode_number(frozen.index), MAX_COMMIT_TS: encode_number(newest_ts)},
            self.dek_counts)
        self.begin_job(job)
        return job

    def _reserve(self, byte_count: int) -> None:
        # Growing a memory map closes views, so this store's own is opened again.
        self._backend.reserve(byte_count)
        self._refresh_view()

    def make_room(self) -> None:
        """Let the backend grow as it has to since a job ended in `MapFull`. While none is under
        way."""
        self._reserve(0)

    def require_space(self) -> None:
        """Raise the `DiskFull` in which the last flush ended, if it did."""
        if self.disk_full is not None:
            raise self.disk_full.with_traceback(None)  # it is raised again and again

    def finish_flush(self, job: FlushJob) -> None:
        """Take note that `job.run` returned or raised: on success advance `durable_index`."""
        if job is self._job:
            if job.done and self._frozen is not None:
                self.durable_commit_ts = max(self.durable_commit_ts, self._frozen.overlay.max_ts)
                self.durable_index = job.index
                self._frozen = None
            full = job.error if isinstance(job.error, DiskFull) else None
            self.disk_full = None if isinstance(full, MapFull) else full
        self.finish_job(job)

    def flush_now(self) -> None:
        """Make everything applied durable before returning; waits for a job under way.

        Raises what `Backend.write` raises.
        """
        self.settle()
        while self.dirty:
            job = self.begin_flush()
            if job is None:
                raise StoreCorrupt("the store is dirty and has nothing to flush")
            try:
                job.run()
            except MapFull:
                # begin_flush grows the map; when it must not grow, the error is another one.
                continue
            finally:
                self.finish_flush(job)

    # --- jobs --------------------------------------------------------------------------------

    def begin_job(self, job: Job) -> None:
        """Register `job` as the one under way. Raises `ValueError` when there is one already."""
        if self._job is not None:
            raise ValueError("a job is under way in the store already")
        self._job = job

    def finish_job(self, job: Job) -> None:
        """The job is over: see what it wrote. Harmless when `settle` has done so."""
        if job is not self._job:
            return
        self._job = None
        if job.error is not None and not isinstance(job.error, DiskFull):
            self._failure = job.error
        else:
            if job.done and job.dek_counts is not None:
                self.dek_counts = job.dek_counts
            self._refresh_view()

    def settle(self) -> None:
        """Complete the job under way, if any, before returning. Raises what it raised."""
        job = self._job
        if job is None:
            return
        try:
            job.run()
        except DiskFull:
            # Nothing was written; whoever began the job is told by its own call of `run`.
            pass
        finally:
            if isinstance(job, FlushJob):
                self.finish_flush(job)
            else:
                self.finish_job(job)

    def _refresh_view(self) -> None:
        self._view.close()
        self._view = self._backend.view()

    def install(self, sink: ImportSink) -> None:
        """Replace the whole content, applied or not, by what `sink` holds; durable on return.

        What `sink` raises leaves the content as it was, also what is not flushed yet.
        """
        self.settle()
        self._view.close()
        try:
            sink.install()
        finally:
            self._view = self._backend.view()
        self._load()

    def raise_horizon(self, horizon_ts: int) -> None:
        """Refuse reads below `horizon_ts` from now on."""
        self.horizon_ts = max(self.horizon_ts, horizon_ts)

    def stats(self) -> BackendStats:
        """Sizes of the backend."""
        return self._backend.stats()

    def close(self) -> None:
        """Release the backend without flushing, after the job under way."""
        with contextlib.suppress(Exception):
            self.settle()
        self._view.close()
        self._backend.close()
