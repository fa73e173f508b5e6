"""Turns at what takes the loop's time: parts of scans, and requests that are looked at.

A request with thousands of parts is parsed and checked for tens of milliseconds, and many may come
in one pass of the event loop, over any number of connections. While they were looked at one after
the other the loop would do nothing else: no heartbeat leaves, and the members elect another leader.
"""

from __future__ import annotations

import asyncio

TURN_S = 0.004
"""So long may requests of one pass take together, the last one of them beyond it."""


class Turns:
    """For all that take turns with one another: `enter` before each part of the work. Those of one
    pass of the loop may take `turn_s` together; with 0 there is one in a pass."""

    def __init__(self, turn_s: float = TURN_S) -> None:
        self._turn_s = turn_s
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
        if now_s - self._began_s < self._turn_s:
            self._lock.release()
        else:
            # Others wait for the next pass, and this one is the last in this.
            loop.call_soon(self._lock.release)

    def _end_pass(self) -> None:
        self._began_s = None
