"""Where blocking work runs: a thread in production, inline in simulation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

Done = Callable[[BaseException | None], None]


class Offload(Protocol):
    """Runs blocking work. One instance runs its work strictly in order."""

    def submit(self, work: Callable[[], None], done: Done) -> None:
        """Run `work`; then call `done(error or None)` in the caller's event loop."""
        ...

    def close(self) -> None:
        """Wait for what was submitted; nothing may be submitted afterwards."""
        ...


class InlineOffload:
    """Runs the work at once, in the caller."""

    def submit(self, work: Callable[[], None], done: Done) -> None:
        try:
            work()
        except Exception as error:
            done(error)
        else:
            done(None)

    def close(self) -> None:
        """Nothing is ever outstanding."""


class ThreadOffload:
    """One worker thread."""

    def __init__(self, name: str = "raft-disk") -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(self, work: Callable[[], None], done: Done) -> None:
        loop = asyncio.get_running_loop()

        def finished(future: Future[None]) -> None:
            # The loop may be closed already when the process is going down: nobody is waiting then.
            if not loop.is_closed():
                loop.call_soon_threadsafe(done, future.exception())

        self._executor.submit(work).add_done_callback(finished)

    def close(self) -> None:
        self._executor.shutdown(wait=True)
