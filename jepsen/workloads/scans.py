"""Scans at a timestamp: a batch writes a whole group, scans look at it now and in the past."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import defaultdict
from collections.abc import Sequence

from elastickv.client import Pair, Put, WriteResult
from elastickv.client.aio import SCAN_PAGE
from elastickv.clock import pack_timestamp
from elastickv.store.gc import DEFAULT_RETENTION_MS
from jepsen.history import Record, Value
from jepsen.scans import check_scans
from jepsen.verdict import Verdict
from jepsen.workloads.api import Session, Workload, by_key

GROUPS = 4
GROUP_SIZE = 5
PAGE = 2
"""So that a group takes three."""
RECENT = 40
"""Most scans in the past go to one of so many latest timestamps of the group, the others to any
that nodes keep."""
KEPT = pack_timestamp(DEFAULT_RETENTION_MS // 2)
"""How far behind the newest timestamp scans go: reads further back are refused, as after a clock
that stepped by a day."""


class ScansWorkload(Workload):
    name = "scans"

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._turns = itertools.count()
        self._timestamps: dict[str, list[int]] = defaultdict(list)

    async def step(self, session: Session) -> None:
        group = f"group-{session.random.randrange(GROUPS)}"
        if not session.only_reads and session.random.random() < 0.6:
            await self._write(session, group)
        else:
            await self._scan(session, group, self._choose_timestamp(session.random, group))

    def _choose_timestamp(self, source: random.Random, group: str) -> int:
        known = self._kept(group)
        choice = source.random()
        if not known or choice < 0.3:
            return 0
        return source.choice(known if choice < 0.5 else known[-RECENT:])

    def _kept(self, group: str) -> Sequence[int]:
        known = self._timestamps[group]
        return known[bisect.bisect(known, known[-1] - KEPT):] if known else known

    async def _write(self, session: Session, group: str) -> None:
        number = next(self._numbers)
        value = session.codec.encode(number)

        def timestamp(written: WriteResult) -> Value:
            return written.commit_ts

        written = await session.write("batch", group, number, lambda: session.client.batch(
            [Put(f"{group}/{member}".encode(), value) for member in range(GROUP_SIZE)]), timestamp)
        if written is not None:
            bisect.insort(self._timestamps[group], written.commit_ts)

    async def _scan(self, session: Session, group: str, at_ts: int) -> None:
        """Against the order of keys every third time; in pages every fourth time, if the timestamp
        makes them show one moment."""
        turn = next(self._turns)
        reverse = turn % 3 == 1
        page = PAGE if at_ts and turn % 4 == 3 else SCAN_PAGE

        async def scan() -> list[Pair]:
            found: list[Pair] = []
            async for pairs in session.client.scan_pages(
                    f"{group}/".encode(), f"{group}0".encode(), page=page, ts=at_ts,
                    reverse=reverse):
                found += pairs
            return found[::-1] if reverse else found

        await session.read("scan", group, at_ts, scan, lambda pairs: by_key(pairs, session.codec))

    async def finish(self, sessions: Sequence[Session]) -> None:
        for number, session in enumerate(sessions):
            group = f"group-{number % GROUPS}"
            known = self._kept(group)
            any_of_them = session.random.sample(known, min(len(known), RECENT))
            for at_ts in (*any_of_them, *known[-RECENT:], 0):
                await self._scan(session, group, at_ts)

    def check(self, history: Sequence[Record]) -> Verdict:
        return check_scans(history, group_size=GROUP_SIZE)
