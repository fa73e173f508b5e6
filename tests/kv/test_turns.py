"""elastickv.kv.turns: the loop does other work between what takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import groupby

import pytest

from elastickv.kv.turns import TURN_S, Turns


class Passes:
    """Counts the passes of the loop."""

    def __init__(self) -> None:
        self.number = 0
        self._loop = asyncio.get_running_loop()
        self._next()

    def _next(self) -> None:
        self.number += 1
        self._handle = self._loop.call_soon(self._next)

    def stop(self) -> None:
        self._handle.cancel()


@pytest.fixture
async def passes() -> AsyncIterator[Passes]:
    counter = Passes()
    yield counter
    counter.stop()


@pytest.mark.parametrize(("turn_s", "takes_s", "together"), [
    pytest.param(TURN_S, 0.0, 20, id="in one pass what takes no time"),
    pytest.param(TURN_S, TURN_S / 2, 3, id="a few that take some"),
    pytest.param(TURN_S, TURN_S, 2, id="one more than there was time for"),
    pytest.param(0.0, 0.0, 1, id="one at a time"),
])
async def test_one_pass_lets_in_what_there_is_time_for(
        passes: Passes, monkeypatch: pytest.MonkeyPatch, turn_s: float, takes_s: float,
        together: int) -> None:
    turns, now_s = Turns(turn_s), 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now_s)
    done: list[tuple[int, int]] = []

    async def serve(number: int) -> None:
        nonlocal now_s
        await turns.enter()
        done.append((passes.number, number))
        now_s += takes_s

    await asyncio.gather(*map(serve, range(20)))
    assert [number for _, number in done] == list(range(20))
    counts = [len(list(group)) for _, group in groupby(done, key=lambda one: one[0])]
    assert counts[0] == together
    assert max(counts) == together


async def test_who_gives_up_keeps_nobody_waiting() -> None:
    turns = Turns(0.0)
    tasks = [asyncio.ensure_future(turns.enter()) for _ in range(4)]
    await asyncio.sleep(0)
    assert [task.done() for task in tasks] == [True, False, False, False]
    tasks[1].cancel()
    await asyncio.gather(tasks[2], tasks[3])
    await turns.enter()
