"""What a fault package is."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from typing import ClassVar

from jepsen.cluster import Cluster
from jepsen.preload import Preload
from jepsen.ticks import TICK_S, until_tick_s

UNDER_WAY_S = 0.02
"""So long calls take that begin together, about."""


class NotAvailable(Exception):
    """The node or the machine does not offer what this fault needs; the message says what. The run
    reports it and does not pass on its account."""


class NotNow(Exception):
    """The fault makes no sense at this moment; another time it may."""


class Violation(Exception):
    """The node answered a fault in a way that it must not; the run is invalid."""


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a package needs of the cluster from its start."""

    preloads: frozenset[Preload] = frozenset()
    small_disk: bool = False
    starts_in_clear: bool = False

    def on_this_machine(self, *, can_mount: bool) -> Requirements:
        """The same where small disks can be mounted; else libfiu takes their place."""
        if can_mount or not self.small_disk:
            return self
        return replace(self, small_disk=False, preloads=self.preloads | {Preload.FIU})


class Fault:
    """One kind of fault. An instance lives for one run and is injected and healed many times.

    `is_brief` packages have no window of their own: `inject` does everything, and they run beside
    the others, so that for example a rotation meets a partition. `must_settle` packages take a copy
    of the data away, so every member has to be whole before and after: two at once would exceed
    what any quorum survives. The one that came back with less than it had is `returned`: it is
    given the lead then, because only who leads makes nonces, and those must not be the ones that it
    made before.
    """

    name: ClassVar[str] = ""
    is_brief: ClassVar[bool] = False
    must_settle: ClassVar[bool] = False
    requirements: ClassVar[Requirements] = Requirements()

    def __init__(self, cluster: Cluster, source: random.Random) -> None:
        self.cluster = cluster
        self.random = source
        self.returned = ""

    async def inject(self) -> str:
        """Do it; one line that says what was done, to whom.

        Raises `NotAvailable` when it cannot be done here at all, `NotNow` when not at this moment,
        `Violation` when the node broke a promise, and `ElasticKVError` when an operator's call did
        not succeed this time.
        """
        raise NotImplementedError

    async def effect(self) -> str:
        """What shows, at the end of the window, that the fault did something; "" where `inject` has
        seen it already. An injection that did nothing is not counted.

        Raises `NotNow` when nothing came of it.
        """
        return ""

    async def heal(self) -> None:
        """Undo it: every node runs, every link and disk is whole. Called once after each `inject`
        of a package that is not brief, also when that failed half-way."""

    async def when_clients_act(self) -> None:
        """Wait until the next moment at which many calls have just begun: what strikes between two
        of those mostly finds none under way, and none of unknown outcome is what it leaves."""
        delay_s = self.random.uniform(0.0, UNDER_WAY_S)
        now_s = asyncio.get_running_loop().time()
        await asyncio.sleep(until_tick_s(now_s, TICK_S) + delay_s)

    async def some_node(self, prefer_leader: float = 0.5) -> str:
        """A node; with the given probability the leader, if there is one."""
        # Both are drawn each time: a moment without a leader must not change what comes later.
        wants_leader = self.random.random() < prefer_leader
        other = self.random.choice(self.cluster.nodes)
        return (await self.cluster.leader() if wants_leader else None) or other

    async def restart_all(self) -> None:
        """Start whatever does not run, and let nobody end by itself any more."""
        for node, process in self.cluster.processes.items():
            process.thaw()
            await self.cluster.restart(node)
            process.expected_codes = frozenset()
