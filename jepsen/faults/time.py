"""Wall clocks that jump."""

from __future__ import annotations

import asyncio

from jepsen import preload
from jepsen.faults.api import Fault, NotAvailable, Requirements
from jepsen.preload import Preload

STEPS_S = (-86_400.0, -600.0, -5.0, -0.2, 0.2, 5.0, 600.0, 86_400.0)


class ClockSteps(Fault):
    """The wall clock of some nodes steps, up to a day in either direction, and back again."""

    name = "clock"
    requirements = Requirements(preloads=frozenset({Preload.FAKETIME}))

    async def inject(self) -> str:
        nodes = self.random.sample(self.cluster.nodes,
                                   self.random.randint(1, len(self.cluster.nodes)))
        steps = {node: self.random.choice(STEPS_S) for node in sorted(nodes)}
        for node, offset_s in steps.items():
            process = self.cluster.processes[node]
            if process.is_running and not preload.is_loaded(process.pid, Preload.FAKETIME):
                raise NotAvailable(f"{node} runs without libfaketime")
            self.cluster.preload_files(node).set_clock(offset_s)
        await asyncio.sleep(preload.CLOCK_DELAY_S)
        return ", ".join(f"{node} {offset_s:+g} s" for node, offset_s in steps.items())

    async def heal(self) -> None:
        for node in self.cluster.nodes:
            self.cluster.preload_files(node).set_clock(0.0)
