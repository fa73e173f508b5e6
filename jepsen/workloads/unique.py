"""Unique writes, read back while the run goes on and once more at its end: nothing may be lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from elastickv.client import ReadResult
from jepsen.history import Record, Value
from jepsen.unique_writes import check_unique_writes
from jepsen.verdict import Verdict
from jepsen.workloads.api import Session, Workload

RECENT = 50
"""Reads during the run go to one of so many latest keys, which faults are most likely to touch."""


class UniqueWorkload(Workload):
    name = "unique"

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._keys: list[str] = []

    async def step(self, session: Session) -> None:
        if session.only_reads or (self._keys and session.random.random() < 0.3):
            if self._keys:
                await self._read(session, session.random.choice(self._keys[-RECENT:]))
            return
        number = next(self._numbers)
        key = f"unique-{number:07d}"
        self._keys.append(key)
        await session.write("write", key, number, lambda: session.client.put(
            key.encode(), session.codec.encode(number)))

    async def _read(self, session: Session, key: str) -> None:
        def value(found: ReadResult) -> Value:
            return session.codec.decode(found.value) if found.exists else None

        await session.read("read", key, None, lambda: session.client.get(key.encode()), value)

    async def finish(self, sessions: Sequence[Session]) -> None:
        async def read_share(number: int, session: Session) -> None:
            for key in self._keys[number::len(sessions)]:
                await self._read(session, key)

        await asyncio.gather(*(read_share(*each) for each in enumerate(sessions)))

    def check(self, history: Sequence[Record]) -> Verdict:
        return check_unique_writes(history)
