"""The event loop of the simulator: order, lives, clocks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.sim.loop import Crashed, Life, SimLoop, Stalled


def run(main: Callable[[SimLoop], Awaitable[None]]) -> SimLoop:
    loop = SimLoop()
    loop.run(main(loop))
    return loop


def test_time_passes_only_in_waiting() -> None:
    async def main(loop: SimLoop) -> None:
        await asyncio.sleep(3600.0)

    assert run(main).now == pytest.approx(3600.0)


def test_timers_of_one_instant_run_in_the_order_of_their_creation() -> None:
    order: list[int] = []

    async def main(loop: SimLoop) -> None:
        for number in range(5):
            loop.call_later(1.0, order.append, number)
        await asyncio.sleep(2.0)

    run(main)
    assert order == [0, 1, 2, 3, 4]


async def tick(count: list[float], loop: SimLoop) -> None:
    while True:
        await asyncio.sleep(1.0)
        count.append(loop.time())


def test_a_life_that_ended_never_runs_again() -> None:
    ticks: list[float] = []

    async def main(loop: SimLoop) -> None:
        life = Life("n1")
        loop.schedule(life, 0.0, lambda: loop.create_task(tick(ticks, loop)))
        await asyncio.sleep(3.5)
        life.end()
        await asyncio.sleep(10.0)

    run(main)
    assert len(ticks) == 3


def test_a_paused_life_keeps_its_callbacks_for_later() -> None:
    ticks: list[float] = []

    async def main(loop: SimLoop) -> None:
        life = Life("n1")
        loop.schedule(life, 0.0, lambda: loop.create_task(tick(ticks, loop)))
        await asyncio.sleep(1.5)
        loop.pause(life)
        await asyncio.sleep(5.0)
        assert len(ticks) == 1
        loop.resume(life)
        await asyncio.sleep(0.1)
        assert len(ticks) == 2

    run(main)


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 10), (2.0, 20), (0.5, 5)])
def test_a_life_has_a_clock_of_its_own(rate: float, expected: int) -> None:
    ticks: list[float] = []

    async def main(loop: SimLoop) -> None:
        life = Life("n1", rate=rate, offset_s=500.0)
        loop.schedule(life, 0.0, lambda: loop.create_task(tick(ticks, loop)))
        await asyncio.sleep(10.001)

    run(main)
    assert len(ticks) == expected
    assert ticks[0] == pytest.approx(501.0)


def test_timers_never_fire_before_their_own_clock_says_so() -> None:
    early: list[float] = []

    async def main(loop: SimLoop) -> None:
        life = Life("n1", rate=1.05, offset_s=617.3)

        def check(due: float) -> None:
            if loop.time() < due:
                early.append(due - loop.time())
            if due < 700.0:
                following = loop.time() + 0.037
                loop.call_at(following, check, following)

        loop.schedule(life, 0.0, check, 0.0)
        await asyncio.sleep(80.0)

    run(main)
    assert not early


def test_a_livelock_is_found() -> None:
    async def main(loop: SimLoop) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Stalled):
        run(main)


def test_nothing_left_to_run_is_found() -> None:
    async def main(loop: SimLoop) -> None:
        await loop.create_future()

    with pytest.raises(Stalled):
        run(main)


def test_an_error_in_a_callback_ends_the_run() -> None:
    async def main(loop: SimLoop) -> None:
        loop.call_later(1.0, int, "no number")
        await asyncio.sleep(2.0)

    with pytest.raises(ValueError, match="no number"):
        run(main)


@pytest.mark.parametrize(("error", "is_retrieved", "is_reported"), [
    pytest.param(KeyError("background"), False, True, id="nobody asks"),
    pytest.param(KeyError("background"), True, False, id="somebody asks"),
    pytest.param(asyncio.CancelledError(), False, False, id="cancelled"),
    pytest.param(Crashed("n1"), False, False, id="the process is gone"),
])
def test_a_task_that_fails_is_reported_although_it_is_kept(
        error: BaseException, is_retrieved: bool, is_reported: bool) -> None:
    async def fail() -> None:
        raise error

    async def main(loop: SimLoop) -> None:
        task = loop.create_task(fail())
        await asyncio.sleep(1.0)
        assert task.done()
        if is_retrieved:
            task.exception()

    loop = run(main)
    assert loop.failures() == ([error] if is_reported else [])


@pytest.mark.parametrize("name", ["run_in_executor", "call_soon_threadsafe"])
def test_threads_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError):
        getattr(SimLoop(), name)(None, print)
