"""elastickv.server.measure: every unary call counted once, by method and status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from elastickv.errors import InvalidArgument, NoLeader
from elastickv.server.measure import measured
from elastickv.server.methods import Stream, Unary


class Remembering:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.durations: list[tuple[str, float]] = []

    def count(self, name: str, *labels: str, amount: float = 1) -> None:
        assert name == "grpc_calls_total"
        self.calls.append((labels[0], labels[1]))

    def observe(self, name: str, value: float, *labels: str) -> None:
        assert name == "grpc_call_seconds"
        self.durations.append((labels[0], value))


def method(outcome: BaseException | str) -> Unary:
    async def call(request: str, timeout_s: float) -> str:
        if isinstance(outcome, BaseException):
            raise outcome
        return f"{outcome} {request} {timeout_s}"

    return Unary(call, bytes.decode, str.encode)


@pytest.mark.parametrize(("error", "status"), [
    (InvalidArgument("no"), "INVALID_ARGUMENT"), (NoLeader("no"), "UNAVAILABLE"),
    (ValueError("no"), "INTERNAL"), (asyncio.CancelledError(), "CANCELLED"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
async def test_failures_pass_through_and_are_counted(error: BaseException, status: str) -> None:
    recorder = Remembering()
    services: Any = measured({"S": {"M": method(error)}}, recorder)
    with pytest.raises(type(error)):
        await services["S"]["M"].call("r", 1.0)
    assert recorder.calls == [("S/M", status)]
    assert [name for name, _ in recorder.durations] == ["S/M"]


async def test_results_pass_through_and_streams_are_left_alone() -> None:
    async def follow(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            yield request

    recorder = Remembering()
    stream = Stream(follow, bytes.decode, str.encode)
    services: Any = measured({"S": {"M": method("ok"), "W": stream}}, recorder)
    assert await services["S"]["M"].call("r", 1.0) == "ok r 1.0"
    assert services["S"]["W"] is stream
    assert recorder.calls == [("S/M", "OK")]
    assert recorder.durations[0][1] >= 0
