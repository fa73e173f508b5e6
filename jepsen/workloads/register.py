"""Registers: read, write, compare-and-set and delete, linearizable per key.

A compare-and-set is a batch on condition that the key still has the version that an earlier read of
the same session saw. Every written value is a number of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from elastickv.client import Condition, Put, ReadResult
from jepsen.history import Kind, Operation, Record, Value, pair
from jepsen.linearizable import check_register
from jepsen.verdict import Verdict, judge
from jepsen.workloads.api import Session, Workload

KEYS = 8
OPERATIONS_PER_KEY = 100
"""After so many operations a key rests and another takes its place: short searches per key. And
what a key was left with, perhaps nothing, has to be there after all faults: nobody writes over it.
"""


class RegisterWorkload(Workload):
    name = "register"

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._operations = 0
        self._keys: set[str] = set()
        # What each session saw last, per key: (value, commit timestamp).
        self._seen: dict[tuple[int, str], tuple[Value, int]] = {}

    def _choose_key(self, session: Session) -> str:
        self._operations += 1
        generation = self._operations // (KEYS * OPERATIONS_PER_KEY)
        key = f"register-{generation}-{session.random.randrange(KEYS)}"
        self._keys.add(key)
        return key

    async def step(self, session: Session) -> None:
        key = self._choose_key(session)
        choice = session.random.random()
        if session.only_reads or choice < 0.4:
            await self._read(session, key)
        elif choice < 0.72:
            number = next(self._numbers)
            await session.write("write", key, number, lambda: session.client.put(
                key.encode(), session.codec.encode(number)))
        elif choice < 0.94:
            await self._compare_and_set(session, key)
        else:
            await session.write("delete", key, None, lambda: session.client.delete(key.encode()))

    async def _read(self, session: Session, key: str) -> None:
        def value(found: ReadResult) -> Value:
            return session.codec.decode(found.value) if found.exists else None

        found = await session.read("read", key, None,
                                   lambda: session.client.get(key.encode()), value)
        if found is not None:
            self._seen[id(session), key] = (value(found), found.commit_ts)

    async def _compare_and_set(self, session: Session, key: str) -> None:
        # Used once: a second attempt on the same version could only fail.
        seen = self._seen.pop((id(session), key), None)
        if seen is None:
            await self._read(session, key)
            return
        expected, commit_ts = seen
        number = next(self._numbers)
        await session.write("cas", key, [expected, number], lambda: session.client.batch(
            [Put(key.encode(), session.codec.encode(number))],
            conditions=[Condition(key.encode(), commit_ts)]))

    async def finish(self, sessions: Sequence[Session]) -> None:
        keys = sorted(self._keys)

        async def read_share(number: int, session: Session) -> None:
            for key in keys[number::len(sessions)]:
                await self._read(session, key)

        await asyncio.gather(*(read_share(*each) for each in enumerate(sessions)))

    def check(self, history: Sequence[Record]) -> Verdict:
        verdict = check_register(history)
        if not verdict.is_valid:
            return verdict
        doubts = [f"the last acknowledged writes of {', '.join(unread)} were never read afterwards"
                  for unread in [unread_keys(pair(history))] if unread]
        if not any(record.f == "read" and record.kind is Kind.OK and record.value is not None
                   for record in history):
            doubts.append("no read saw anything written")
        return judge(verdict.checker, [], verdict.facts, doubts)


def unread_keys(operations: Sequence[Operation]) -> list[str]:
    """The keys whose last acknowledged write no read that ended well came after: of a write that
    nobody looked at, nothing is known."""
    written: dict[str | None, int] = {}
    read: dict[str | None, int] = {}
    for operation in operations:
        if operation.kind is Kind.OK and operation.completed is not None:
            key = operation.key
            if operation.f == "read":
                read[key] = max(read.get(key, -1), operation.invoked)
            else:
                written[key] = max(written.get(key, -1), operation.completed)
    return sorted(str(key) for key, position in written.items() if read.get(key, -1) < position)
