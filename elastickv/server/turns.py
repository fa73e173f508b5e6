"""Turns at requests that take the loop's time before anything of them is under way.

A request with thousands of parts is parsed and checked for tens of milliseconds, and many may come
in one pass of the event loop, over any number of connections. While they were looked at one after
the other the loop would do nothing else: no heartbeat leaves, and the members elect another leader.
"""

from __future__ import annotations

import asyncio

TURN_S = 0.004
"""So long may those of one pass take together, the last one of them beyond it."""


class Turns:
    """For all requests to one service. `enter` before one is parsed."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._began_s: float | None = None
        """When the first one of this pass of the loop was let in."""

    async def enter(self) -> None:
        """Return at once while there is time in this pass of the loop, else in a later one, in the
        order of the calls."""
        await self._lock.acquire()
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if self._began_s is None:
            self._began_s = now_s
            loop.call_soon(self._end_pass)
        if now_s - self._began_s < TURN_S:
            self._lock.release()
        else:
            # Others wait for the next pass, and this one is the last in this.
            loop.call_soon(self._lock.release)

    def _end_pass(self) -> None:
        self._began_s = None
