"""Unique writes, read back while the run goes on and once more at its end: nothing may be lost.

Some have a time to live, longer than any run and than clocks step. What is left of it at the end is
seen by reads at the timestamps at which it is about to be over and at which it is over: that does
not depend on anybody's clock.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from elastickv.client import ReadResult
from elastickv.clock import pack_timestamp, timestamp_ms
from jepsen.history import Record, Value
from jepsen.unique_writes import check_unique_writes
from jepsen.verdict import Verdict
from jepsen.workloads.api import Session, Workload

RECENT = 50
"""Reads during the run go to one of so many latest keys, which faults are most likely to touch."""

TTL_MS = 100 * 24 * 3_600_000
ONE_IN = 3
"""How often a key has a time to live."""


class UniqueWorkload(Workload):
    name = "unique"

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._keys: list[str] = []
        self._ends: dict[str, int] = {}
        """The first timestamp at which a key is gone, of those that were acknowledged and have a
        time to live."""
        self._ways = itertools.cycle((self._read, self._read_last, self._read, self._read_expired))

    async def step(self, session: Session) -> None:
        if session.only_reads or (self._keys and session.random.random() < 0.3):
            if self._keys:
                await next(self._ways)(session, session.random.choice(self._keys[-RECENT:]))
            return
        number = next(self._numbers)
        key = f"unique-{number:07d}"
        self._keys.append(key)
        ttl_ms = 0 if number % ONE_IN else TTL_MS
        written = await session.write("write", key, number, lambda: session.client.put(
            key.encode(), session.codec.encode(number), ttl_ms=ttl_ms), lambda _: number)
        if written is not None and ttl_ms:
            self._ends[key] = pack_timestamp(timestamp_ms(written.commit_ts) + ttl_ms)

    async def _read(self, session: Session, key: str) -> None:
        await self._read_at(session, "read", key, 0)

    async def _read_last(self, session: Session, key: str) -> None:
        """At the last timestamp at which it is there."""
        await self._read_at(session, "read", key, self._ends[key] - 1 if key in self._ends else 0)

    async def _read_expired(self, session: Session, key: str) -> None:
        if key in self._ends:
            await self._read_at(session, "expired", key, self._ends[key])

    async def _read_at(self, session: Session, f: str, key: str, at_ts: int) -> None:
        def value(found: ReadResult) -> Value:
            return session.codec.decode(found.value) if found.exists else None

        await session.read(f, key, None, lambda: session.client.get(key.encode(), ts=at_ts), value)

    async def finish(self, sessions: Sequence[Session]) -> None:
        async def read_share(number: int, session: Session) -> None:
            for key in self._keys[number::len(sessions)]:
                await self._read(session, key)
                if key in self._ends:
                    await self._read_last(session, key)
                    await self._read_expired(session, key)

        await asyncio.gather(*(read_share(*each) for each in enumerate(sessions)))

    def check(self, history: Sequence[Record]) -> Verdict:
        return check_unique_writes(history)
