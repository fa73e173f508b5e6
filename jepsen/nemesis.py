"""Injects faults by a seeded schedule while clients work, and keeps the nodes alive otherwise.

Two lanes run side by side. The main lane takes one package after the other: quiet, inject, hold,
heal. The brief lane performs operators' calls (rotations, transfers, cutovers) every now and then,
whatever the main lane is doing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from elastickv.errors import ElasticKVError
from jepsen.cluster import Cluster, ClusterError
from jepsen.faults import Fault, NotAvailable, NotNow, Violation
from jepsen.verdict import Verdict, judge

SHORTEST_CYCLE_S = 2.0
LONGEST_CYCLE_S = 9.0
SHORTEST_HOLD_S = 1.0
OVERTIME_S = 60.0
BRIEF_PAUSE_S = (0.5, 3.0)
SETTLE_TIMEOUT_S = 60.0
SUPERVISE_S = 0.2
RESTART_AFTER_S = 0.5
MAX_RESTARTS = 5


@dataclass(slots=True)
class Window:
    """One injection: when, what, and how it went. `end_ns` 0 = not healed yet."""

    name: str
    begin_ns: int
    what: str
    end_ns: int = 0
    is_brief: bool = False


class Nemesis:
    """Runs the schedule. What it decides comes from `seed`, for each lane by itself: how long the
    calls of one take must not change what the other does."""

    def __init__(self, cluster: Cluster, faults: Sequence[Fault], seed: int,
                 now_ns: Callable[[], int], not_available: Mapping[str, str], *,
                 every_must_happen: bool = True) -> None:
        """`not_available` says of packages that were asked for why this machine lacks them.
        `every_must_happen`: each package gets its turn even if that takes longer than the load."""
        self._cluster = cluster
        self._long = [fault for fault in faults if not fault.is_brief]
        self._brief = sorted((fault for fault in faults if fault.is_brief),
                             key=lambda fault: not fault.requirements.starts_in_clear)
        self._random = random.Random(f"{seed} faults")
        self._brief_random = random.Random(f"{seed} calls")
        self._now_ns = now_ns
        self.windows: list[Window] = []
        self.injected: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.not_available = dict(not_available)
        self.problems: list[str] = []
        self.doubts: list[str] = []
        self._wanted = [*(fault.name for fault in faults), *not_available]
        self._every_must_happen = every_must_happen

    async def run(self, duration_s: float) -> None:
        """Until `duration_s` have passed and everything is healed."""
        deadline = asyncio.get_running_loop().time() + duration_s
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_long(deadline))
            group.create_task(self._run_brief(deadline))
            group.create_task(asyncio.sleep(duration_s))
        if self._every_must_happen:
            await self._run_rest(asyncio.get_running_loop().time() + OVERTIME_S)

    def _still_to_happen(self) -> list[Fault]:
        return [fault for fault in (*self._long, *self._brief)
                if not self.injected[fault.name] and fault.name not in self.not_available]

    async def _run_rest(self, deadline: float) -> None:
        """What was asked for and has not happened yet, for lack of time or because the moment was
        never right."""
        now = asyncio.get_running_loop().time
        while now() < deadline and (rest := self._still_to_happen()):
            for fault in rest:
                await asyncio.sleep(SHORTEST_HOLD_S)
                if fault.is_brief:
                    await self._one_call(fault)
                else:
                    await self._one_window(fault, SHORTEST_HOLD_S * 2)

    async def _run_long(self, deadline: float) -> None:
        now = asyncio.get_running_loop().time
        if not self._long:
            return
        cycle_s = min(max((deadline - now()) / len(self._long), SHORTEST_CYCLE_S), LONGEST_CYCLE_S)
        while (bag := [f for f in self._long if f.name not in self.not_available]):
            self._random.shuffle(bag)
            for fault in bag:
                quiet_s = cycle_s * self._random.uniform(0.15, 0.35)
                if now() + quiet_s >= deadline:
                    return
                await asyncio.sleep(quiet_s)
                hold_s = cycle_s * self._random.uniform(0.4, 0.7)
                await self._one_window(
                    fault, max(SHORTEST_HOLD_S, min(hold_s, deadline - now())))

    async def _one_window(self, fault: Fault, hold_s: float) -> None:
        if fault.must_settle and not await self._settle(f"before {fault.name}"):
            return
        window = Window(fault.name, self._now_ns(), "")
        self.windows.append(window)
        if await self._attempt(fault.inject, fault, window):
            await asyncio.sleep(hold_s)
            if await self._attempt(fault.effect, fault, window):
                self.injected[fault.name] += 1
        # A run that is interrupted takes everything down instead.
        try:
            await fault.heal()
        except (ElasticKVError, ClusterError) as error:
            self.problems.append(f"{fault.name} could not be healed: {error}")
        except Exception as error:
            self.doubts.append(f"healing {fault.name} broke down: {type(error).__name__}: {error}")
        window.end_ns = self._now_ns()
        if fault.must_settle and await self._settle(f"after {fault.name}") and fault.returned \
                and await self._cluster.let_lead(fault.returned):
            window.what += f"; {fault.returned} leads then"

    async def _settle(self, when: str) -> bool:
        try:
            await self._cluster.wait_ready(SETTLE_TIMEOUT_S)
        except ClusterError as error:
            self.problems.append(f"the cluster did not become whole {when}: {error}")
            return False
        return True

    async def _run_brief(self, deadline: float) -> None:
        now = asyncio.get_running_loop().time
        turn = 0
        while (usable := [f for f in self._brief if f.name not in self.not_available]):
            pause_s = self._brief_random.uniform(*BRIEF_PAUSE_S)
            if now() + pause_s >= deadline:
                return
            await asyncio.sleep(pause_s)
            # Encryption is turned on early in a run that begins without it, so that most of the run
            # has something to protect.
            first = next((fault for fault in usable if fault.requirements.starts_in_clear
                          and not self.injected[fault.name]), None)
            if first is None:
                first = usable[turn % len(usable)]
                turn += 1
            await self._one_call(first)

    async def _one_call(self, fault: Fault) -> None:
        window = Window(fault.name, self._now_ns(), "", is_brief=True)
        self.windows.append(window)
        if await self._attempt(fault.inject, fault, window):
            self.injected[fault.name] += 1
        window.end_ns = self._now_ns()

    async def _attempt(self, step: Callable[[], Awaitable[str]], fault: Fault,
                       window: Window) -> bool:
        """One step of a fault; what came of it goes into the window. True when it worked."""
        def note(text: str) -> None:
            window.what = "; ".join(filter(None, (window.what, text)))

        try:
            note(await step())
        except NotAvailable as error:
            self.not_available[fault.name] = str(error)
            note(f"not available: {error}")
        except NotNow as error:
            note(f"not now: {error}")
        except Violation as error:
            self.problems.append(f"{fault.name}: {error}")
            note(f"violation: {error}")
        except ElasticKVError as error:
            self.failed[fault.name] += 1
            note(f"{type(error).__name__}: {error}")
        except Exception as error:  # Of the harness: the run shows nothing about this fault.
            self.doubts.append(f"{fault.name} broke down: {type(error).__name__}: {error}")
            note(self.doubts[-1])
        else:
            return True
        return False

    async def heal_all(self) -> None:
        """Whatever happened before: links whole, nodes running."""
        await self._cluster.network.heal()
        for node, process in self._cluster.processes.items():
            process.thaw()
            process.expected_codes = frozenset()
            await self._cluster.restart(node)

    async def supervise(self) -> None:
        """Start nodes again that ended by themselves, as an operator's supervisor would; never
        returns. A node that ended because of a fault is that fault's to heal."""
        restarts: Counter[str] = Counter()
        while True:
            await asyncio.sleep(SUPERVISE_S)
            for node, process in self._cluster.processes.items():
                if process.is_running or not process.exits or process.exits[-1].asked_for:
                    continue
                if restarts[node] < MAX_RESTARTS:
                    restarts[node] += 1
                    await asyncio.sleep(RESTART_AFTER_S)
                    await self._cluster.restart(node)

    def verdict(self) -> Verdict:
        """Invalid when a fault met a broken promise; unknown when one that was asked for did not
        happen, because then the run shows nothing about it."""
        unknown = [*self.doubts, *(f"{name} is not available: {reason}"
                                   for name, reason in self.not_available.items())]
        missing = [name for name in self._wanted
                   if not self.injected[name] and name not in self.not_available]
        if missing and (self._every_must_happen or not self.injected):
            unknown.append(f"never happened: {', '.join(missing)}")
        facts = {"injected": dict(self.injected), "failed": dict(self.failed),
                 "not_available": self.not_available, "not_reached": missing}
        return judge("faults", self.problems, facts, unknown)


def check_processes(cluster: Cluster) -> Verdict:
    """No node may end by itself outside a fault that lets it, let alone again and again."""
    problems = [f"{end.node} ended by itself with exit code {end.code} at "
                f"{end.time_ns / 1e9:.1f} s" for end in cluster.exits() if not end.asked_for]
    by_node = Counter(end.node for end in cluster.exits() if not end.asked_for)
    problems += [f"{node} is in a restart loop: it ended {count} times by itself"
                 for node, count in by_node.items() if count >= 3]
    starts = {node: process.starts for node, process in cluster.processes.items()}
    codes = {node: [end.code for end in process.exits]
             for node, process in cluster.processes.items()}
    return judge("processes", problems, {"starts": starts, "exit_codes": codes,
                                         "snapshots_installed": cluster.snapshots_installed()})
