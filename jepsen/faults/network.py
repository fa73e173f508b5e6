"""Links that are cut, slow, lossy or narrow. Who is cut from whom is decided by pure functions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jepsen.faults.api import Fault, NotAvailable, NotNow
from jepsen.network import Link, LinkShape, Unsupported, links_between


def halves(nodes: Sequence[str], source: random.Random) -> tuple[list[str], list[str]]:
    """A random majority and the rest."""
    shuffled = source.sample(list(nodes), len(nodes))
    size = len(nodes) // 2 + 1
    return sorted(shuffled[:size]), sorted(shuffled[size:])


def both_ways(left: Sequence[str], right: Sequence[str]) -> set[Link]:
    """Every link between the two sides."""
    return links_between(left, right) | links_between(right, left)


def ring_cuts(circle: Sequence[str]) -> set[Link]:
    """The cuts that leave each node only its two neighbours in `circle`: with five nodes everybody
    sees a majority, and no two see the same one. Three nodes are all neighbours; there each can
    only send to the next."""
    count = len(circle)
    cuts: set[Link] = set()
    for place, node in enumerate(circle):
        kept = {circle[(place + 1) % count]}
        if count > 3:
            kept.add(circle[place - 1])
        cuts |= {Link(node, other) for other in circle if other != node and other not in kept}
    return cuts


class _Cut(Fault):
    async def effect(self) -> str:
        touched = await self.cluster.network.effect()
        if not touched:
            raise NotNow("nothing was sent over those links")
        return f"{touched} pieces held, delayed or lost"

    async def heal(self) -> None:
        await self.cluster.network.heal()


class PartitionHalves(_Cut):
    """A majority and a minority that do not hear each other."""

    name = "partition-halves"

    async def inject(self) -> str:
        left, right = halves(self.cluster.nodes, self.random)
        await self.cluster.network.cut(both_ways(left, right))
        return f"{', '.join(left)} | {', '.join(right)}"


class OneWay(_Cut):
    """One node hears everybody and is heard by nobody, or the other way round."""

    name = "one-way"

    async def inject(self) -> str:
        node = await self.some_node()
        others = self.cluster.others([node])
        if self.random.random() < 0.5:
            await self.cluster.network.cut(links_between([node], others))
            return f"{node} is not heard"
        await self.cluster.network.cut(links_between(others, [node]))
        return f"{node} does not hear"


class Ring(_Cut):
    """Each node talks to its neighbours in a circle only."""

    name = "ring"

    async def inject(self) -> str:
        circle = self.random.sample(self.cluster.nodes, len(self.cluster.nodes))
        await self.cluster.network.cut(ring_cuts(circle))
        return f"ring {' '.join(circle)}"


class IsolateLeader(_Cut):
    """The leader alone on one side."""

    name = "isolate-leader"

    async def inject(self) -> str:
        leader = await self.cluster.leader()
        if leader is None:
            raise NotNow("nobody leads")
        await self.when_clients_act()
        await self.cluster.network.cut(both_ways([leader], self.cluster.others([leader])))
        return f"{leader} isolated"


class _Shape(_Cut):
    def shape(self) -> LinkShape:
        raise NotImplementedError

    async def inject(self) -> str:
        shape = self.shape()
        nodes = self.cluster.nodes
        if self.random.random() < 0.5:
            node = await self.some_node()
            links, whose = both_ways([node], self.cluster.others([node])), node
        else:
            links, whose = links_between(nodes, nodes), "all"
        try:
            await self.cluster.network.shape(links, shape)
        except Unsupported as error:
            raise NotAvailable(str(error)) from None
        return f"links of {whose}: {shape}"


class Slow(_Shape):
    """Latency from 20 to 400 ms, with jitter."""

    name = "slow"

    def shape(self) -> LinkShape:
        latency_ms = self.random.uniform(20, 400)
        return LinkShape(latency_ms, latency_ms / 4)


class Lossy(_Shape):
    """5 to 30 % of what is sent is lost."""

    name = "lossy"

    def shape(self) -> LinkShape:
        return LinkShape(latency_ms=1.0, jitter_ms=1.0, loss=self.random.uniform(0.05, 0.3))


class Narrow(_Shape):
    """64 to 800 kbit/s: what clients write in a moment takes longer than an election timeout."""

    name = "narrow"

    def shape(self) -> LinkShape:
        return LinkShape(latency_ms=5.0, jitter_ms=1.0, rate_kbit_s=self.random.uniform(64, 800))
