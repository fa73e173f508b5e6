"""What operations that belong on the leader share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from elastickv.errors import DeadlineExceeded, NoLeader, OutcomeUnknown, PeerError
from elastickv.raft.engine import RaftEngine

RETRY_S = 0.05

T = TypeVar("T")


def require_leader_id(engine: RaftEngine) -> str:
    """The member to ask instead of this one. Raises `NoLeader`."""
    leader_id = engine.status().leader_id
    if not leader_id or leader_id == engine.node_id:
        raise NoLeader("the cluster has no leader now; nothing was proposed",
                       remedy="retry; check elastickv admin raft status if it persists")
    return leader_id


async def on_leader(engine: RaftEngine, lead: Callable[[float], Awaitable[T]],
                    ask: Callable[[str, float], Awaitable[T]], *, what: str, timeout_s: float,
                    remedy: str, retried: tuple[type[PeerError], ...]) -> T:
    """Run an operation where it belongs: `lead(remaining_s)` where this node leads, else
    `ask(leader_id, remaining_s)`; again after an error that is `retried`, which both raise only
    where the operation certainly was not begun.

    Raises what they raise, or `OutcomeUnknown` with `remedy` when it was not decided in time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        remaining_s = deadline - loop.time()
        try:
            if engine.is_leader():
                return await asyncio.wait_for(lead(remaining_s), remaining_s)
            return await ask(require_leader_id(engine), remaining_s)
        except TimeoutError:
            raise OutcomeUnknown(f"{what} was not decided within the deadline",
                                 remedy=remedy) from None
        except (OutcomeUnknown, DeadlineExceeded):
            raise
        except retried:
            if deadline - loop.time() <= 2 * RETRY_S:
                raise
            await asyncio.sleep(RETRY_S)


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
