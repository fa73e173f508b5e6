"""What operations that belong on the leader share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from elastickv.errors import NoLeader
from elastickv.raft.engine import RaftEngine

T = TypeVar("T")


def require_leader_id(engine: RaftEngine) -> str:
    """The member to ask instead of this one. Raises `NoLeader`."""
    leader_id = engine.status().leader_id
    if not leader_id or leader_id == engine.node_id:
        raise NoLeader("the cluster has no leader now; nothing was proposed",
                       remedy="retry; check elastickv admin raft status if it persists")
    return leader_id


class Decisions:
    """Operations that run to their ends even if their callers give up: what an operation holds (a
    lock, a barrier) must cover the decision."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `operation()`, or what it raises."""
        task = asyncio.get_running_loop().create_task(operation())
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Its caller may be gone; an error that nobody looks at would be logged as lost.
            task.exception()
