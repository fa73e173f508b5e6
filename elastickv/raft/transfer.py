"""Handing the leadership over (Raft dissertation, section 3.10)."""

from __future__ import annotations

import asyncio

from elastickv.errors import DeadlineExceeded, InvalidArgument
from elastickv.raft import frames
from elastickv.raft.core import Context


class Transfer:
    """At most one hand-over of this leader. While it runs, nothing new is proposed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._target = ""
        self._asked = False
        self._done: asyncio.Future[None] | None = None

    @property
    def active(self) -> bool:
        """Whether a hand-over is under way."""
        return bool(self._target)

    def best_target(self) -> str:
        """The connected voter that has most of the log, "" when there is none."""
        context = self._context
        return max((voter for voter in context.core.voters()
                    if voter in context.connected and voter != context.node_id),
                   key=context.core.match_index, default="")

    async def run(self, target_id: str, timeout_s: float) -> None:
        """See `PySyncObjEngine.transfer_leadership`."""
        context = self._context
        target_id = target_id or self.best_target()
        if target_id == context.node_id:
            return
        if target_id not in context.core.voters():
            raise InvalidArgument(f"{target_id!r} is no other voter that could lead")
        loop = asyncio.get_running_loop()
        done = self._done = loop.create_future()
        self._target, self._asked = target_id, False
        context.schedule()
        timer = loop.call_later(timeout_s, self.end)
        try:
            await done
        finally:
            # Also when the caller gave up: a leader that hands over for ever refuses every write.
            timer.cancel()
            if self._done is done:
                self.end()
        if context.core.is_leading():
            raise DeadlineExceeded(f"{target_id!r} did not take over in time",
                                   remedy="see whether it runs and has caught up")

    def advance(self) -> None:
        """Ask the target to take over as soon as it has the whole log."""
        core = self._context.core
        if self._target and not self._asked \
                and core.match_index(self._target) == self._context.journal.last_index:
            self._asked = True
            self.ask(self._target)

    def ask(self, target_id: str) -> None:
        """Ask `target_id` to start an election at once."""
        self._context.send(target_id, frames.TimeoutNow(self._context.core.term()))

    def end(self) -> None:
        """This node leads no more, or time is up."""
        done, self._done = self._done, None
        self._target = ""
        if done is not None and not done.done():
            done.set_result(None)
