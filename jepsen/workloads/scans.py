"""Scans at a timestamp: a batch writes a whole group, scans look at it now and in the past."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

from elastickv.client import Put, WriteResult
from jepsen.history import Record, Value
from jepsen.scans import check_scans
from jepsen.verdict import Verdict
from jepsen.workloads.api import Session, Workload, by_key

GROUPS = 4
GROUP_SIZE = 5
RECENT = 40
"""Scans go to one of so many latest timestamps of the group."""


class ScansWorkload(Workload):
    name = "scans"

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._timestamps: dict[str, list[int]] = defaultdict(list)

    async def step(self, session: Session) -> None:
        group = f"group-{session.random.randrange(GROUPS)}"
        if not session.only_reads and session.random.random() < 0.6:
            await self._write(session, group)
        else:
            known = self._timestamps[group][-RECENT:]
            latest = not known or session.random.random() < 0.3
            await self._scan(session, group, 0 if latest else session.random.choice(known))

    async def _write(self, session: Session, group: str) -> None:
        number = next(self._numbers)
        value = session.codec.encode(number)

        def timestamp(written: WriteResult) -> Value:
            return written.commit_ts

        written = await session.write("batch", group, number, lambda: session.client.batch(
            [Put(f"{group}/{member}".encode(), value) for member in range(GROUP_SIZE)]), timestamp)
        if written is not None:
            self._timestamps[group].append(written.commit_ts)

    async def _scan(self, session: Session, group: str, at_ts: int) -> None:
        await session.read("scan", group, at_ts, lambda: session.client.scan(
            f"{group}/".encode(), f"{group}0".encode(), ts=at_ts),
            lambda pairs: by_key(pairs, session.codec))

    async def finish(self, sessions: Sequence[Session]) -> None:
        for number, session in enumerate(sessions):
            group = f"group-{number % GROUPS}"
            for at_ts in (*self._timestamps[group][-RECENT:], 0):
                await self._scan(session, group, at_ts)

    def check(self, history: Sequence[Record]) -> Verdict:
        return check_scans(history, group_size=GROUP_SIZE)
