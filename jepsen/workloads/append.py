"""Lists that grow: read the list, then write it with one more element if it is still the same."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from elastickv.client import Condition, Put, ReadResult, WriteResult
from elastickv.errors import ConditionFailed, CorruptionError
from jepsen.append import check_append
from jepsen.history import Record, Value
from jepsen.verdict import Verdict
from jepsen.workloads.api import Session, Workload

KEYS = 6
ELEMENTS_PER_KEY = 80
"""About so many appends are tried on a key before another takes its place."""

ATTEMPTS = 4


class AppendWorkload(Workload):
    name = "append"

    def __init__(self) -> None:
        self._elements = itertools.count(1)
        self._appends = 0
        self._keys: set[str] = set()

    async def step(self, session: Session) -> None:
        generation = self._appends // (KEYS * ELEMENTS_PER_KEY)
        key = f"list-{generation}-{session.random.randrange(KEYS)}"
        self._keys.add(key)
        if session.only_reads or session.random.random() < 0.3:
            await self._read(session, key)
            return
        self._appends += 1
        element = next(self._elements)
        await session.write("append", key, element, lambda: self._append(session, key, element))

    async def _append(self, session: Session, key: str, element: int) -> WriteResult:
        """Only a condition that did not hold is tried again: then nothing was written. Raises
        `CorruptionError` for what is no list."""
        for attempt in range(1, ATTEMPTS + 1):
            found = await session.client.get(key.encode())
            elements = session.codec.decode(found.value) if found.exists else []
            if not isinstance(elements, list):
                raise CorruptionError("a list is not what was written")
            try:
                return await session.client.batch(
                    [Put(key.encode(), session.codec.encode([*elements, element]))],
                    conditions=[Condition(key.encode(), found.commit_ts)])
            except ConditionFailed:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("not reached")

    async def _read(self, session: Session, key: str) -> None:
        def elements(found: ReadResult) -> Value:
            return session.codec.decode(found.value) if found.exists else None

        await session.read("read", key, None, lambda: session.client.get(key.encode()), elements)

    async def finish(self, sessions: Sequence[Session]) -> None:
        keys = sorted(self._keys)

        async def read_share(number: int, session: Session) -> None:
            for key in keys[number::len(sessions)]:
                await self._read(session, key)

        await asyncio.gather(*(read_share(*each) for each in enumerate(sessions)))

    def check(self, history: Sequence[Record]) -> Verdict:
        return check_append(history)
