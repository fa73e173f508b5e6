"""The schedule: what counts as injected, what makes the verdict, what gets its turn."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from elastickv.errors import NoLeader
from jepsen import nemesis
from jepsen.cluster import Cluster
from jepsen.faults import Fault, NotAvailable, NotNow, Requirements, Violation
from jepsen.faults.api import UNDER_WAY_S
from jepsen.faults.crashes import KillAll
from jepsen.nemesis import Nemesis
from jepsen.processes import NodeProcess
from jepsen.ticks import TICK_S
from jepsen.verdict import Validity


class FakeCluster:
    """Always whole."""

    nodes: Sequence[str] = ()
    processes: Mapping[str, NodeProcess] = {}

    def __init__(self) -> None:
        self.led: list[str] = []

    async def wait_ready(self, timeout_s: float) -> None:
        return

    async def let_lead(self, node: str) -> bool:
        self.led.append(node)
        return node != "n2"


class Scripted(Fault):
    """Does in turn what it was told: raise, or return a line."""

    injections: tuple[str | Exception, ...] = ("done",)
    effects: tuple[str | Exception, ...] = ("",)

    def __init__(self, cluster: Cluster, source: random.Random) -> None:
        super().__init__(cluster, source)
        self._inject = itertools.chain(self.injections, itertools.repeat(self.injections[-1]))
        self._effect = itertools.chain(self.effects, itertools.repeat(self.effects[-1]))
        self.healed = 0

    async def inject(self) -> str:
        return self._say(next(self._inject))

    async def effect(self) -> str:
        return self._say(next(self._effect))

    async def heal(self) -> None:
        self.healed += 1

    def _say(self, step: str | Exception) -> str:
        if isinstance(step, Exception):
            raise step
        return step


def scripted(name: str, **parts: Any) -> Scripted:
    kind = type(name, (Scripted,), {"name": name, **parts})
    return cast("Scripted", kind(cast("Cluster", FakeCluster()), random.Random(1)))


def schedule(*faults: Fault, every_must_happen: bool = True) -> Nemesis:
    return Nemesis(cast("Cluster", FakeCluster()), faults, 1,
                   itertools.count().__next__, {}, every_must_happen=every_must_happen)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORTEST_HOLD_S", "SHORTEST_CYCLE_S", "LONGEST_CYCLE_S"):
        monkeypatch.setattr(nemesis, name, 0.001)
    monkeypatch.setattr(nemesis, "OVERTIME_S", 0.05)
    monkeypatch.setattr(nemesis, "BRIEF_PAUSE_S", (0.0, 0.001))


async def test_an_injection_without_effect_is_healed_and_not_counted() -> None:
    fault = scripted("cut", effects=(NotNow("nothing was sent"),))
    one = schedule(fault)
    await one.run(0.05)
    assert one.injected["cut"] == 0
    assert fault.healed == len(one.windows) > 0
    assert one.windows[0].what == "done; not now: nothing was sent"
    verdict = one.verdict()
    assert verdict.validity is Validity.UNKNOWN
    assert "never happened: cut" in verdict.problems


@pytest.mark.parametrize(("step", "validity", "message"), [
    (NotAvailable("no root"), Validity.UNKNOWN, "cut is not available: no root"),
    (Violation("it ran on"), Validity.INVALID, "cut: it ran on"),
    (NoLeader("none"), Validity.UNKNOWN, "never happened: cut"),
    (OSError("no such device"), Validity.UNKNOWN, "cut broke down: OSError: no such device"),
], ids=["not available", "violation", "call failed", "harness failed"])
@pytest.mark.parametrize("is_brief", [False, True])
async def test_what_an_injection_that_fails_means(step: Exception, validity: Validity, message: str,
                                                  is_brief: bool) -> None:
    one = schedule(scripted("cut", injections=(step,), is_brief=is_brief))
    await one.run(0.02)
    verdict = one.verdict()
    assert verdict.validity is validity
    assert message in verdict.problems


@pytest.mark.parametrize(("node", "what"), [("n1", "done; n1 leads then"), ("n2", "done"),
                                            ("", "done")])
async def test_who_came_back_with_less_is_given_the_lead(node: str, what: str) -> None:
    fault = scripted("wipe", must_settle=True)
    fault.returned = node
    cluster = FakeCluster()
    one = Nemesis(cast("Cluster", cluster), [fault], 1, itertools.count().__next__, {})
    await one.run(0.0)
    assert [window.what for window in one.windows] == [what]
    assert cluster.led == [node] * bool(node)
    assert one.verdict().is_valid


async def test_each_package_that_was_named_gets_its_turn_after_the_load() -> None:
    late = scripted("late", injections=(*(NotNow("nobody leads"),) * 3, "done"))
    call = scripted("call", is_brief=True)
    one = schedule(late, scripted("other"), call)
    await one.run(0.0)
    assert {name: count > 0 for name, count in one.injected.items()} == {
        "late": True, "other": True, "call": True}
    assert one.verdict().is_valid


async def test_mixed_packages_need_not_all_happen() -> None:
    one = schedule(scripted("never", injections=(NotNow("no"),)), scripted("other"),
                   every_must_happen=False)
    await one.run(0.05)
    assert one.verdict().is_valid
    assert one.verdict().facts["not_reached"] == ["never"]


async def test_encryption_is_turned_on_before_other_calls() -> None:
    first = scripted("cutovers", is_brief=True, requirements=Requirements(starts_in_clear=True),
                     injections=(NoLeader("none"), NoLeader("none"), "done"))
    one = schedule(scripted("rotate", is_brief=True), first)
    await one.run(0.1)
    assert [window.name for window in one.windows[:3]] == ["cutovers"] * 3
    assert one.injected["rotate"] > 0


async def test_an_interrupted_run_heals_nothing() -> None:
    fault = scripted("cut")
    one = schedule(fault)
    task = asyncio.create_task(one._one_window(fault, 60.0))
    while not one.windows or not one.windows[0].what:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fault.healed == 0


async def test_a_run_without_faults_takes_its_time() -> None:
    one = schedule()
    began = asyncio.get_running_loop().time()
    await one.run(0.2)
    assert asyncio.get_running_loop().time() - began >= 0.2
    assert one.verdict().is_valid


async def test_how_long_calls_take_does_not_change_the_faults(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lane draws for itself."""
    monkeypatch.setattr(nemesis, "LONGEST_CYCLE_S", 0.01)
    orders = []
    for pause_s in (0.0, 0.02):
        class Slow(Scripted):
            name, is_brief = "slow", True

            async def inject(self, pause_s: float = pause_s) -> str:
                await asyncio.sleep(pause_s)
                return "done"

        one = schedule(*(scripted(name) for name in "abcd"),
                       Slow(cast("Cluster", FakeCluster()), random.Random(1)))
        await one.run(0.3)
        orders.append([window.name for window in one.windows if not window.is_brief][:8])
    assert orders[0] == orders[1]


async def test_a_moment_without_a_leader_does_not_change_later_choices() -> None:
    async def choices(leaders: list[str | None]) -> list[str]:
        class Led(FakeCluster):
            nodes = ("n1", "n2", "n3")

            async def leader(self) -> str | None:
                return leaders.pop(0)

        fault = Fault(cast("Cluster", Led()), random.Random(5))
        return [await fault.some_node() for _ in range(12)]

    always, at_times = await choices(["n9"] * 12), await choices([None, *["n9"] * 11])
    assert [a == b for a, b in zip(always, at_times, strict=True)].count(False) <= 1


async def test_a_node_that_does_not_run_is_not_killed() -> None:
    process = NodeProcess("n1", ["sleep", "60"], {"PATH": os.defpath}, Path(os.devnull), lambda: 0)
    cluster = FakeCluster()
    cluster.processes = {"n1": process}
    cluster.nodes = ("n1",)
    fault = KillAll(cast("Cluster", cluster), random.Random(1))
    with pytest.raises(NotNow, match="does not run"):
        await fault.inject()
    await process.start()
    assert "kill -9 n1" in await fault.inject()
    with pytest.raises(NotNow, match="does not run"):
        await fault.inject()


async def test_what_strikes_meets_calls_that_have_just_begun() -> None:
    fault = Fault(cast("Cluster", FakeCluster()), random.Random(1))
    now = asyncio.get_running_loop().time
    for _ in range(4):
        await asyncio.sleep(fault.random.uniform(0.0, TICK_S))
        began = now()
        await fault.when_clients_act()
        assert now() - began < 2 * TICK_S + 0.05
        assert now() % TICK_S < UNDER_WAY_S + 0.03


async def test_a_process_is_started_once_at_a_time() -> None:
    process = NodeProcess("n1", ["sleep", "60"], {"PATH": os.defpath}, Path(os.devnull), lambda: 0)
    first = asyncio.ensure_future(process.start())
    await asyncio.sleep(0)
    assert process.is_running
    with pytest.raises(RuntimeError, match="runs already"):
        await process.start()
    await process.kill()
    await first
    assert not process.is_running
    assert process.starts == 1


def block_until_over(pid: int) -> None:
    """So that the event loop has not learned of the end yet. Some loops leave it to themselves to
    collect what is left of a process (a zombie), others have threads for that."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize(("script", "end", "code", "asked_for"), [
    ("exec sleep 60", NodeProcess.kill, -signal.SIGKILL, True),
    ("exec sleep 60", NodeProcess.stop, -signal.SIGTERM, True),
    ("exit 3", NodeProcess.kill, 3, False),
    ("exit 0", NodeProcess.kill, 0, False),
    ("exit 7", NodeProcess.kill, 7, True),
], ids=["killed", "stopped", "had ended by itself", "had ended well", "a fault explains it"])
async def test_only_a_process_that_was_killed_was_asked_to_end_by_a_kill(
        script: str, end: Callable[[NodeProcess], Awaitable[object]], code: int,
        asked_for: bool) -> None:
    process = NodeProcess("n1", ["sh", "-c", script], {"PATH": os.defpath}, Path(os.devnull),
                          lambda: 0)
    process.expected_codes = frozenset({7})
    await process.start()
    if script.startswith("exit"):
        block_until_over(process.pid)
    await end(process)
    assert [(each.code, each.asked_for) for each in process.exits] == [(code, asked_for)]
