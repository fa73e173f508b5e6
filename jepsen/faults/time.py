"""Wall clocks that jump."""

from __future__ import annotations

import asyncio
import random

from jepsen import preload
from jepsen.cluster import Cluster
from jepsen.faults.api import Fault, NotAvailable, NotNow, Requirements
from jepsen.preload import Preload

STEPS_S = (-86_400.0, -600.0, -5.0, -0.2, 0.2, 5.0, 600.0, 86_400.0)


class ClockSteps(Fault):
    """The wall clock of some nodes steps, up to a day in either direction, and back again."""

    name = "clock"
    requirements = Requirements(preloads=frozenset({Preload.FAKETIME}))

    def __init__(self, cluster: Cluster, source: random.Random) -> None:
        super().__init__(cluster, source)
        self._unseen: list[str] = []

    async def inject(self) -> str:
        nodes = self.random.sample(self.cluster.nodes,
                                   self.random.randint(1, len(self.cluster.nodes)))
        steps = {node: self.random.choice(STEPS_S) for node in sorted(nodes)}
        self._unseen = []
        for node, offset_s in steps.items():
            process = self.cluster.processes[node]
            is_loaded = (preload.is_loaded(process.pid, Preload.FAKETIME) if process.is_running
                         else None)
            if is_loaded is None:
                self._unseen.append(node)
            elif not is_loaded:
                raise NotAvailable(f"{node} runs without libfaketime")
            self.cluster.preload_files(node).set_clock(offset_s)
        await asyncio.sleep(preload.CLOCK_DELAY_S)
        return ", ".join(f"{node} {offset_s:+g} s" for node, offset_s in steps.items())

    async def effect(self) -> str:
        unread = [node for node in self._unseen
                  if not self.cluster.preload_files(node).clock_was_read()]
        if unread:
            raise NotNow(f"{', '.join(unread)} was not seen to look at its clock")
        return ""

    async def heal(self) -> None:
        for node in self.cluster.nodes:
            self.cluster.preload_files(node).set_clock(0.0)
