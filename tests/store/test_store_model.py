"""The store against a model: random groups, reads, flush stages, crashes, compaction, snapshots."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from elastickv.clock import pack_timestamp
from elastickv.store.gc import Compactor
from elastickv.store.mvcc import visible
from elastickv.store.mvcc_store import FlushJob, Store
from elastickv.store.snapshot import StoreSnapshots
from elastickv.store.tables import MapFull
from elastickv.store.values import plain_record, tombstone_record
from tests.store.conftest import LATEST, open_backend

KEYS = [b"a", b"a\x00", b"a\x00\x00", b"ab", b"\x00", b"\xff" * 30, b"k" * 24, b"k" * 25]
keys = st.sampled_from(KEYS)
bounds = st.one_of(st.just(b""), keys, st.binary(max_size=3))
RETENTION_MS = 20


class Group(NamedTuple):
    index: int
    writes: list[tuple[bytes, int, bytes]]
    rows: list[tuple[bytes, bytes]]
    meta: dict[bytes, bytes]


class StoreMachine(RuleBasedStateMachine):
    """`log` is what consensus holds; a crash forgets the store's memory and replays from it."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.number = 0
        self.store = self.open()
        self.log: list[Group] = []
        self.now_ms = 1_000
        self.counter = 0
        self.job: FlushJob | None = None
        self.horizon_ts = 0

    def open(self) -> Store:
        return Store.open(open_backend(self.kind, self.root / str(self.number)))

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    # --- the model ---

    def versions(self, user_key: bytes) -> dict[int, bytes]:
        return {commit_ts: record for group in self.log
                for key, commit_ts, record in group.writes if key == user_key}

    def expected(self, user_key: bytes, at_ts: int) -> tuple[int, bytes] | None:
        past = [(ts, record) for ts, record in self.versions(user_key).items() if ts <= at_ts]
        newest = max(past, default=None)
        return newest if newest is not None and visible(newest[1], self.now_ms) else None

    # --- rules ---

    @rule(data=st.data(), size=st.integers(0, 4), with_row=st.booleans())
    def apply(self, data: st.DataObject, size: int, with_row: bool) -> None:
        self.now_ms += data.draw(st.integers(0, 15))
        writes = []
        for _ in range(size):
            self.counter += data.draw(st.integers(0, 1))
            record = data.draw(st.sampled_from([
                plain_record(b"v%d" % len(self.log)), plain_record(b"big" * 1500),
                plain_record(b"short-lived", self.now_ms + 10), tombstone_record()]))
            # A counter that stands still repeats a key's timestamp, as one batch may.
            writes.append((data.draw(keys), pack_timestamp(self.now_ms, self.counter), record))
        index = len(self.log) + 1
        rows = [(b"row-%d" % (index % 3), b"%d" % index)] if with_row else []
        group = Group(index, writes, rows, {b"ceiling": b"%d" % index} if with_row else {})
        self.log.append(group)
        self.store.apply_group(*group)

    @precondition(lambda self: self.job is None)
    @rule()
    def begin_flush(self) -> None:
        self.job = self.store.begin_flush()

    @precondition(lambda self: self.job is not None)
    @rule()
    def run_flush(self) -> None:
        self.run_job()

    def run_job(self) -> None:
        """A map that turns out to be too small grows with the next attempt."""
        while True:
            assert self.job is not None
            try:
                self.job.run()
            except MapFull:
                self.store.finish_flush(self.job)
                self.job = self.store.begin_flush()
            else:
                return

    @precondition(lambda self: self.job is not None)
    @rule()
    def finish_flush(self) -> None:
        self.run_job()
        assert self.job is not None
        self.store.finish_flush(self.job)
        assert self.store.durable_index == self.job.index
        self.job = None

    @rule()
    def flush_now(self) -> None:
        self.store.flush_now()
        self.job = None
        assert self.store.durable_index == self.store.applied_index == len(self.log)

    @rule()
    def crash(self) -> None:
        ran = self.job is not None and self.job.done
        promised = self.job.index if ran and self.job is not None else self.store.durable_index
        if self.job is None or ran:
            self.store.close()
        else:
            # A job that never began dies with the process; `close` would wait for it.
            self.store.backend.close()
        self.store, self.job = self.open(), None
        assert self.store.applied_index == self.store.durable_index == promised
        for group in self.log[self.store.applied_index:]:
            self.store.apply_group(*group)

    @precondition(lambda self: self.job is None)
    @rule()
    def compact(self) -> None:
        Compactor(self.store, lambda: self.now_ms, retention_ms=RETENTION_MS).run_pass()
        self.horizon_ts = max(self.horizon_ts, self.store.horizon_ts)

    @precondition(lambda self: self.job is None)
    @rule(piece=st.sampled_from([1, 7, 4096]))
    def move_by_snapshot(self, piece: int) -> None:
        """Another replica takes a snapshot and the log's tail, and stands in for this one."""
        self.number += 1
        other = self.open()
        export = StoreSnapshots(self.store).open_export()
        receiver = StoreSnapshots(other).open_import()
        while chunk := export.read(piece):
            receiver.write(chunk)
        assert receiver.finish() == export.applied_index == self.store.durable_index
        export.close()
        self.store.close()
        self.store = other
        for group in self.log[other.applied_index:]:
            other.apply_group(*group)

    # --- reads ---

    def readable(self, data: st.DataObject) -> int:
        stamps = [ts for group in self.log for _, ts, _ in group.writes if ts >= self.horizon_ts]
        return data.draw(st.sampled_from([LATEST, *stamps, *[ts - 1 for ts in stamps
                                                             if ts > self.horizon_ts]]))

    @rule(data=st.data(), user_key=keys)
    def get(self, data: st.DataObject, user_key: bytes) -> None:
        at_ts = self.readable(data)
        found = self.store.get(user_key, at_ts, self.now_ms)
        assert (found and (found.commit_ts, found.record)) == self.expected(user_key, at_ts)

    @rule(data=st.data(), start=bounds, end=bounds, limit=st.integers(1, 9), reverse=st.booleans())
    def scan(self, data: st.DataObject, start: bytes, end: bytes, limit: int,
             reverse: bool) -> None:
        at_ts = self.readable(data)
        found = self.store.scan(start, end, limit, at_ts, self.now_ms, reverse)
        expected = [(key, self.expected(key, at_ts)) for key in sorted(KEYS, reverse=reverse)
                    if start <= key and (not end or key < end)]
        assert [(key, (version.commit_ts, version.record)) for key, version in found] == [
            pair for pair in expected if pair[1] is not None][:limit]

    @invariant()
    def facts_agree(self) -> None:
        rows: dict[bytes, bytes] = {}
        meta: dict[bytes, bytes] = {}
        for group in self.log:
            rows.update(group.rows)
            meta.update(group.meta)
        assert self.store.rows(b"row-") == sorted(rows.items())
        assert self.store.meta(b"ceiling") == meta.get(b"ceiling")
        assert self.store.applied_index == len(self.log)
        assert self.store.max_commit_ts == max(
            (ts for group in self.log for _, ts, _ in group.writes), default=0)


@pytest.mark.parametrize(("kind", "examples"), [("lmdb", 25), ("memory", 40)])
def test_store_agrees_with_the_model(kind: str, examples: int) -> None:
    machine = type("Machine", (StoreMachine,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(  # type: ignore[no-untyped-call]
        max_examples=examples, stateful_step_count=40, deadline=None,
        suppress_health_check=list(HealthCheck)))
