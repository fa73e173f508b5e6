"""What a network driver offers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Unsupported(Exception):
    """This machine cannot do what was asked; the message says what is missing."""


class Link(NamedTuple):
    """One direction between two members: what `source` sends to `target`."""

    source: str
    target: str


class LinkShape(NamedTuple):
    """How a link treats what is sent over it. `loss` is the part of packets lost, 0 to 1."""

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    rate_kbit_s: float = math.inf

    @property
    def is_narrow(self) -> bool:
        """Whether more can be sent over it than it carries."""
        return self.rate_kbit_s < math.inf

    def __str__(self) -> str:
        parts = [f"{self.latency_ms:.0f} ms +- {self.jitter_ms:.0f} ms"]
        if self.loss:
            parts.append(f"{self.loss:.0%} loss")
        if self.is_narrow:
            parts.append(f"{self.rate_kbit_s:.0f} kbit/s")
        return ", ".join(parts)


CLEAN = LinkShape()


def links_between(sources: Iterable[str], targets: Iterable[str]) -> set[Link]:
    """Every link from one of `sources` to one of `targets`; a node has no link to itself."""
    targets = list(targets)
    return {Link(source, target) for source in sources for target in targets if source != target}


class Network(Protocol):
    """A network of named nodes. Cuts and shapes add up until `heal`."""

    name: str

    async def start(self, nodes: Sequence[str]) -> None:
        """Set up addresses for `nodes`. Raises `Unsupported`."""
        ...

    def client_address(self, node: str) -> str:
        """`host:port` where clients reach `node`; never affected by faults."""
        ...

    def raft_address(self, node: str) -> str:
        """`host:port` at which the other members reach `node`; the same for all of them."""
        ...

    def raft_listen_address(self, node: str) -> str:
        """`host:port` where `node` itself listens for members; it dials them from that host."""
        ...

    def launch_prefix(self, node: str) -> list[str]:
        """What to put before a command so that it runs on `node`."""
        ...

    async def cut(self, links: Iterable[Link]) -> None:
        """From now on nothing sent over `links` arrives."""
        ...

    async def shape(self, links: Iterable[Link], shape: LinkShape) -> None:
        """From now on `links` behave like `shape`. Raises `Unsupported`."""
        ...

    async def effect(self) -> int:
        """How much traffic the cuts and shapes since the last `heal` have touched: pieces or
        packets held, delayed or lost. 0 means that they changed nothing."""
        ...

    async def heal(self) -> None:
        """Every link is whole and clean again."""
        ...

    async def stop(self) -> None:
        """Take everything down. Idempotent."""
        ...
