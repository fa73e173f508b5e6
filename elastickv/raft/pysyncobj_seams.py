"""PySyncObj's module-level hooks, replaced once for the process.

PySyncObj takes its journal, poller and clock from names in its own module. The journal and the
poller are the same for every engine. The clock is each engine's own: calls into PySyncObj are
synchronous, so the engine that calls names its clock first (`use_clock`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from zlib import crc32

import pysyncobj.syncobj as library
from pysyncobj.node import Node

from elastickv.raft.pysyncobj_journal import create_journal

Now = Callable[[], float]


class _NoPoller:
    """The event loop polls."""

    def poll(self, timeout: float) -> None:
        """Nothing to wait for."""


class _Clock:
    """The clock of the engine whose call is running."""

    now: Now

    def __call__(self) -> float:
        return self.now()


_clock = _Clock()


def use_clock(now: Now) -> None:
    """PySyncObj's monotonic time is `now()` until another engine calls."""
    _clock.now = now


def install() -> None:
    """Put the replacements in place. Idempotent."""
    library.createJournal = create_journal
    library.createPoller = lambda kind: _NoPoller()
    library.monotonicTime = _clock
    library.PIPE_NOTIFIER_ENABLED = False


class PeerNode(Node):  # type: ignore[misc]
    """A member. Its hash does not depend on the process, so neither does any order of sending."""

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id, stable_hash=crc32(node_id.encode()))

    def __hash__(self) -> int:
        return int(self.stable_hash)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PeerNode) and self.id == other.id)


@cache
def peer_node(node_id: str) -> PeerNode:
    """The node of this id; one object per id, as sets and dicts compare by identity first."""
    return PeerNode(node_id)
