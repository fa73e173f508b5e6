"""How calls become history: what is ok, what failed, and what nobody knows."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable

import pytest

from elastickv.client import Client
from elastickv.errors import (
    ConditionFailed,
    DeadlineExceeded,
    ElasticKVError,
    NoLeader,
    OutcomeUnknown,
    Unreachable,
)
from jepsen.history import Kind, Recorder, pair
from jepsen.values import FILLER_SIZES, Codec
from jepsen.workloads.api import Processes, Session


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
