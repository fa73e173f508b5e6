"""What a workload is, and how its calls become history."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from elastickv.client import Client, Pair
from elastickv.errors import ElasticKVError, Outcome
from jepsen.history import Kind, Record, Recorder, Value
from jepsen.values import Codec
from jepsen.verdict import Verdict

T = TypeVar("T")


class Processes:
    """Hands out process numbers. A process whose operation is still open is never used again."""

    def __init__(self) -> None:
        self._next = 0

    def new(self) -> int:
        self._next += 1
        return self._next - 1


class Session:
    """One logical client of a workload: a connection, a process number, a source of choices.

    A session that `only_reads` asks one node and no other, so that there is somebody to notice when
    a node that was cut off answers with what it last knew; a writer would hang there.
    """

    def __init__(self, client: Client, recorder: Recorder, processes: Processes, codec: Codec,
                 source: random.Random, *, only_reads: bool = False) -> None:
        self.client = client
        self.recorder = recorder
        self.codec = codec
        self.random = source
        self.only_reads = only_reads
        self._processes = processes
        self.process = processes.new()

    async def read(self, f: str, key: str | None, argument: Value,
                   call: Callable[[], Awaitable[T]],
                   result: Callable[[T], Value]) -> T | None:
        """Perform and record a read. A read that failed certainly changed nothing: `fail`."""
        recorder, process = self.recorder, self.process
        recorder.add(Kind.INVOKE, process, f, key, argument)
        try:
            answer = await call()
        except ElasticKVError as error:
            recorder.add(Kind.FAIL, process, f, key, argument, type(error).__name__)
            return None
        recorder.add(Kind.OK, process, f, key, result(answer))
        return answer

    async def write(self, f: str, key: str | None, argument: Value,
                    call: Callable[[], Awaitable[T]],
                    result: Callable[[T], Value] | None = None) -> T | None:
        """Perform and record a write. Only an error that says so itself is a `fail`; whatever else
        ends a write leaves its outcome unknown, and the process to it."""
        recorder, process = self.recorder, self.process
        recorder.add(Kind.INVOKE, process, f, key, argument)
        try:
            answer = await call()
        except ElasticKVError as error:
            certain = error.outcome is Outcome.NOT_APPLIED
            recorder.add(Kind.FAIL if certain else Kind.INFO, process, f, key, argument,
                         type(error).__name__)
            if not certain:
                self.process = self._processes.new()
            return None
        except BaseException as error:
            recorder.add(Kind.INFO, process, f, key, argument, type(error).__name__)
            self.process = self._processes.new()
            raise
        recorder.add(Kind.OK, process, f, key, argument if result is None else result(answer))
        return answer


def by_key(pairs: Sequence[Pair], codec: Codec) -> Value:
    """What a scan brought back. Keys that repeat or are out of order, which a mapping would hide,
    are told in the place of a value that nobody wrote."""
    names = [pair.key.decode() for pair in pairs]
    if names != sorted(set(names)):
        return {"keys repeat or are out of order": names}
    return {name: codec.decode(pair.value) for name, pair in zip(names, pairs, strict=True)}


class Workload:
    """A kind of load and what must hold of it. Subclasses fill in the parts."""

    name = ""

    async def prepare(self, session: Session) -> None:
        """Write what the load needs to be there. Runs before any fault; raises what calls raise."""

    async def step(self, session: Session) -> None:
        """One operation, recorded."""
        raise NotImplementedError

    async def finish(self, sessions: Sequence[Session]) -> None:
        """Read back everything that must be there, recorded. Runs after every fault is healed."""
        raise NotImplementedError

    def check(self, history: Sequence[Record]) -> Verdict:
        """Judge the history."""
        raise NotImplementedError
