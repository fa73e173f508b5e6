"""Processes that die or stand still."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

from jepsen.faults.api import Fault, NotNow


class _Kill(Fault):
    async def victims(self) -> Sequence[str]:
        raise NotImplementedError

    async def inject(self) -> str:
        victims = await self.victims()
        await self.when_clients_act()
        processes = [self.cluster.processes[node] for node in victims]
        if not all(process.is_running for process in processes):
            raise NotNow("a node does not run")
        await asyncio.gather(*(process.kill() for process in processes))
        if any(process.exits[-1].code != -signal.SIGKILL for process in processes):
            raise NotNow("a node had ended by itself before")
        return f"kill -9 {', '.join(victims)}"

    async def heal(self) -> None:
        await self.restart_all()


class KillOne(_Kill):
    """kill -9 one node, the leader every other time."""

    name = "kill-one"

    async def victims(self) -> Sequence[str]:
        return [await self.some_node()]


class KillMinority(_Kill):
    """kill -9 as many nodes as the cluster has to survive, at once."""

    name = "kill-minority"

    async def victims(self) -> Sequence[str]:
        first = await self.some_node()
        rest = self.random.sample(self.cluster.others([first]), self.cluster.minority() - 1)
        return sorted([first, *rest])


class KillAll(_Kill):
    """kill -9 every node at once."""

    name = "kill-all"

    async def victims(self) -> Sequence[str]:
        return self.cluster.nodes


class Pause(Fault):
    """SIGSTOP a minority: connections stand, nobody answers, and the leader does not know that it
    was deposed when it goes on."""

    name = "pause"

    async def inject(self) -> str:
        first = await self.some_node(prefer_leader=0.7)
        rest = self.random.sample(self.cluster.others([first]), self.random.randint(
            0, self.cluster.minority() - 1))
        await self.when_clients_act()
        for node in (first, *rest):
            self.cluster.processes[node].freeze()
        for node in (first, *rest):
            await self.cluster.processes[node].wait_frozen()
        return f"SIGSTOP {', '.join((first, *rest))}"

    async def heal(self) -> None:
        for process in self.cluster.processes.values():
            process.thaw()
        await self.restart_all()
