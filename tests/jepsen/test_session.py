"""How calls become history: what is ok, what failed, and what nobody knows."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence

import pytest

from elastickv.client import Client, Delete, Pair, Put, ReadResult, WriteResult
from elastickv.clock import pack_timestamp, timestamp_ms
from elastickv.errors import (
    ConditionFailed,
    DeadlineExceeded,
    ElasticKVError,
    NoLeader,
    OutcomeUnknown,
    Unreachable,
)
from jepsen.call_errors import check_errors
from jepsen.history import Kind, Recorder, Value, pair
from jepsen.values import FILLER_SIZES, Codec
from jepsen.verdict import Validity
from jepsen.workloads.api import Processes, Session, Workload, by_key
from jepsen.workloads.append import AppendWorkload
from jepsen.workloads.bank import BankWorkload
from jepsen.workloads.register import RegisterWorkload
from jepsen.workloads.scans import GROUP_SIZE, GROUPS, RECENT, ScansWorkload
from jepsen.workloads.unique import UniqueWorkload


async def session() -> tuple[Session, Recorder]:
    recorder = Recorder(itertools.count().__next__)
    # Connects only when used; here the calls are given.
    client = Client(["127.0.0.1:1"])
    return Session(client, recorder, Processes(), Codec(lambda: True), random.Random(1)), recorder


def failing(error: BaseException) -> Callable[[], Awaitable[int]]:
    async def call() -> int:
        raise error

    return call


async def succeed() -> int:
    return 41


@pytest.mark.parametrize(("error", "kind"), [
    (OutcomeUnknown("lost"), Kind.INFO),
    (NoLeader("none"), Kind.FAIL),
    (Unreachable("down"), Kind.FAIL),
    (ConditionFailed("no"), Kind.FAIL),
], ids=lambda value: type(value).__name__ if isinstance(value, ElasticKVError) else "")
async def test_a_write_that_ends_in_an_error(error: ElasticKVError, kind: Kind) -> None:
    one, recorder = await session()
    assert await one.write("write", "k", 1, failing(error)) is None
    (operation,) = pair(recorder.records)
    assert operation.kind is kind
    assert operation.error == type(error).__name__
    # A process whose operation is still open may not begin another one.
    assert (one.process != operation.process) == (kind is Kind.INFO)


@pytest.mark.parametrize("error", [OutcomeUnknown("lost"), DeadlineExceeded("late")])
async def test_a_read_that_ends_in_an_error_changed_nothing(error: ElasticKVError) -> None:
    one, recorder = await session()
    assert await one.read("read", "k", None, failing(error), int) is None
    (operation,) = pair(recorder.records)
    assert operation.kind is Kind.FAIL


async def test_a_write_that_is_cancelled_is_unknown() -> None:
    one, recorder = await session()
    with pytest.raises(asyncio.CancelledError):
        await one.write("write", "k", 1, failing(asyncio.CancelledError()))
    (operation,) = pair(recorder.records)
    assert operation.kind is Kind.INFO


async def test_success_records_what_came_back() -> None:
    one, recorder = await session()
    assert await one.read("read", "k", None, succeed, lambda answer: answer + 1) == 41
    assert await one.write("write", "k", 7, succeed) == 41
    assert await one.write("batch", "k", 8, succeed, lambda answer: [answer]) == 41
    results = [(op.kind, op.result) for op in pair(recorder.records)]
    assert results == [(Kind.OK, 42), (Kind.OK, 7), (Kind.OK, (41,))]


def test_values_carry_the_marker_of_their_phase() -> None:
    sealed = False
    codec = Codec(lambda: sealed)
    early = codec.encode([1, "a"])
    sealed = True
    late = codec.encode([1, "a"])
    marker, unit = codec.sealed_secrets
    assert marker in late
    assert marker not in early
    assert codec.sealed_count == 1
    longest = max((codec.encode(1) for _ in FILLER_SIZES), key=len)
    assert longest.count(unit) > 10
    assert codec.decode(early) == codec.decode(late) == [1, "a"]


@pytest.mark.parametrize("data", [b"", b"x|1", b"1"])
def test_a_value_that_no_client_wrote_is_told_apart(data: bytes) -> None:
    assert str(Codec(lambda: True).decode(data)).startswith("foreign value")
    damaged = Codec(lambda: True)
    assert str(damaged.decode(damaged.encode(1)[:-1])).startswith("foreign value")


def test_values_of_every_size_are_what_was_written() -> None:
    codec = Codec(lambda: True)
    values = [codec.encode(number) for number in range(2 * len(FILLER_SIZES))]
    assert [codec.decode(value) for value in values] == list(range(len(values)))
    assert {len(value) for value in values} == {len(codec.sealed_secrets[0]) + 3 + size
                                                for size in FILLER_SIZES}
    for value in values:
        damaged = value.replace(b"|", b"|.", 1)
        assert str(codec.decode(damaged)).startswith("foreign value")


class Answers(Client):
    """A client whose every read brings back `payload`."""

    def __init__(self, payload: Value) -> None:
        super().__init__(["127.0.0.1:1"])
        self._payload = payload

    async def get(self, key: bytes, **options: object) -> ReadResult:
        return ReadResult(CODEC.encode(self._payload), True, 1, 1)


CODEC = Codec(lambda: True)


@pytest.mark.parametrize("workload", [BankWorkload(), AppendWorkload()], ids=lambda each: each.name)
@pytest.mark.parametrize("payload", [7, "foreign value", None, {"a": 1}], ids=str)
async def test_what_nobody_wrote_like_that_is_corruption(workload: Workload,
                                                         payload: Value) -> None:
    recorder = Recorder(itertools.count().__next__)
    one = Session(Answers(payload), recorder, Processes(), CODEC, random.Random(1))
    while not any(record.f in ("transfer", "append") for record in recorder.records):
        await workload.step(one)
    assert pair(recorder.records)[-1].error == "CorruptionError"
    assert check_errors(pair(recorder.records), []).validity is Validity.INVALID


class Versions(Client):
    """A client of a store whose clock steps by a day after the first half of `STEPS` writes; it
    tells at which timestamps it was scanned."""

    STEPS = 400

    def __init__(self) -> None:
        super().__init__(["127.0.0.1:1"])
        self.commits: list[int] = []
        self.scanned: list[int] = []

    async def batch(self, *arguments: object, **options: object) -> WriteResult:
        day = DAY_MS * (len(self.commits) > self.STEPS // 2)
        self.commits.append(pack_timestamp(1_000 * len(self.commits) + day))
        return WriteResult(len(self.commits), self.commits[-1])

    async def scan(self, *arguments: object, ts: int = 0, **options: object) -> list[Pair]:
        self.scanned.append(ts)
        return []


DAY_MS = 86_400_000


async def test_scans_go_back_as_far_as_versions_are_kept() -> None:
    client, workload = Versions(), ScansWorkload()
    one = Session(client, Recorder(itertools.count().__next__), Processes(), CODEC,
                  random.Random(1))
    while len(client.commits) <= client.STEPS // 2:
        await workload.step(one)
    past = [ts for ts in client.scanned if ts]
    assert min(past) < client.commits[10]
    late = pack_timestamp(DAY_MS)
    while len(client.commits) < client.STEPS:
        await workload.step(one)
    scanned = len(client.scanned)
    await workload.finish([one] * GROUPS)
    finished = client.scanned[scanned:]
    assert finished.count(0) == GROUPS
    assert min(filter(None, finished)) > late
    assert len(set(finished)) > RECENT * GROUPS


async def test_scans_go_both_ways_and_in_pages() -> None:
    client, workload = Versions(), ScansWorkload()
    asked: set[tuple[bool, bool, bool]] = set()

    async def scan(start: bytes, end: bytes, *, limit: int, ts: int, reverse: bool,
                   **options: object) -> list[Pair]:
        asked.add((ts > 0, reverse, limit < GROUP_SIZE))
        found = [pair for number in range(GROUP_SIZE)
                 if start <= (pair := Pair(b"%b%d" % (group, number), value)).key < end]
        return (found[::-1] if reverse else found)[:limit]

    client.scan = scan  # type: ignore[method-assign]
    recorder = Recorder(itertools.count().__next__)
    one = Session(client, recorder, Processes(), CODEC, random.Random(1))
    for number in range(GROUPS * 12):
        group, value = b"group-%d/" % (number % GROUPS), CODEC.encode(number)
        await workload._scan(one, f"group-{number % GROUPS}", 7 * (number % 5 > 0))
    assert asked == {(True, False, False), (True, False, True), (True, True, False),
                     (True, True, True), (False, False, False), (False, True, False)}
    for number, operation in enumerate(pair(recorder.records)):
        assert operation.result == tuple((f"group-{number % GROUPS}/{member}", number)
                                         for member in range(GROUP_SIZE))


class Registers(Client):
    """A client of a store with nobody else."""

    def __init__(self) -> None:
        super().__init__(["127.0.0.1:1"])
        self.values: dict[bytes, bytes | None] = {}

    async def get(self, key: bytes, **options: object) -> ReadResult:
        value = self.values.get(key)
        return ReadResult(b"", False, 0, 1) if value is None else ReadResult(value, True, 1, 1)

    async def put(self, key: bytes, value: bytes, **options: object) -> WriteResult:
        self.values[key] = value
        return WriteResult(1, 1)

    async def delete(self, key: bytes, **options: object) -> WriteResult:
        self.values[key] = None
        return WriteResult(1, 1)

    async def batch(self, ops: Iterable[Put | Delete], **options: object) -> WriteResult:
        for op in ops:
            assert isinstance(op, Put)
            await self.put(op.key, op.value)
        return WriteResult(1, 1)


async def test_some_registers_are_left_deleted() -> None:
    client, workload = Registers(), RegisterWorkload()
    one = Session(client, Recorder(itertools.count().__next__), Processes(), CODEC,
                  random.Random(1))
    for _ in range(9000):  # a minute
        await workload.step(one)
    assert len(client.values) > 80
    assert list(client.values.values()).count(None) >= 5


class Expiring(Registers):
    """One in which times to live end `late_ms` too late, or too early."""

    def __init__(self, late_ms: int) -> None:
        super().__init__()
        self.late_ms = late_ms
        self.expiries: dict[bytes, int] = {}

    async def put(self, key: bytes, value: bytes, *, ttl_ms: int = 0,
                  **options: object) -> WriteResult:
        self.values[key] = value
        now_ms = 1_700_000_000_000 + len(self.values)
        if ttl_ms:
            self.expiries[key] = now_ms + ttl_ms + self.late_ms
        return WriteResult(1, pack_timestamp(now_ms, 5))

    async def get(self, key: bytes, *, ts: int = 0, **options: object) -> ReadResult:
        if key in self.expiries and timestamp_ms(ts) >= self.expiries[key]:
            return ReadResult(b"", False, 0, 1)
        return await super().get(key)


@pytest.mark.parametrize(("late_ms", "validity", "message"), [
    (0, Validity.VALID, ""), (-1, Validity.INVALID, "lost"),
    (1, Validity.INVALID, "there after its time to live")])
async def test_times_to_live_end_on_time(late_ms: int, validity: Validity, message: str) -> None:
    client, workload = Expiring(late_ms), UniqueWorkload()
    recorder = Recorder(itertools.count().__next__)
    one = Session(client, recorder, Processes(), CODEC, random.Random(1))
    for _ in range(60):
        await workload.step(one)
    assert 0 < len(client.expiries) < len(client.values)
    if validity is Validity.VALID:
        await workload.finish([one, one])
    verdict = workload.check(recorder.records)
    assert verdict.validity is validity
    assert message in "".join(verdict.problems[:1])


def pairs(*names: str) -> list[Pair]:
    return [Pair(name.encode(), CODEC.encode(1)) for name in names]


def test_a_scan_is_told_by_key() -> None:
    assert by_key(pairs("a", "b"), CODEC) == {"a": 1, "b": 1}
    assert by_key([], CODEC) == {}


@pytest.mark.parametrize("names", [("a", "a"), ("b", "a"), ("a", "b", "b")])
def test_a_scan_that_repeats_keys_or_has_them_out_of_order_is_told_as_such(
        names: Sequence[str]) -> None:
    assert by_key(pairs(*names), CODEC) == {"keys repeat or are out of order": list(names)}
