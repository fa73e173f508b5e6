"""What must be done to its end, although the run is interrupted meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` however often this is interrupted; then raise the interruption: who interrupts a
    run twice wants it ended, and would be left with mounts and networks."""
    doing = asyncio.ensure_future(work)
    interrupted: asyncio.CancelledError | None = None
    while not doing.done():
        try:
            await asyncio.shield(doing)
        except asyncio.CancelledError as error:
            interrupted = error
    doing.result()
    if interrupted is not None:
        raise interrupted
