"""Handing the leadership over (Raft dissertation, section 3.10)."""

from __future__ import annotations

import asyncio

from elastickv.errors import DeadlineExceeded, InvalidArgument, MembershipConflict
from elastickv.raft import frames
from elastickv.raft.core import Context


class Transfer:
    """At most one hand-over of this leader. While it runs, nothing new is proposed: so it begins
    only with a target that answers, and ends when that makes no progress for an election timeout.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._target = ""
        self._asked = False
        self._progress = (0, 0)
        self._progress_at = 0.0
        self._done: asyncio.Future[None] | None = None

    @property
    def active(self) -> bool:
        """Whether a hand-over is under way."""
        return bool(self._target)

    def best_target(self) -> str:
        """The voter that has most of the log of those that answer, "" when there is none."""
        context = self._context
        return max((voter for voter in context.core.voters()
                    if voter != context.node_id and context.answers(voter)),
                   key=context.core.match_index, default="")

    async def run(self, target_id: str, timeout_s: float) -> None:
        """See `RaftEngine.transfer_leadership`."""
        context = self._context
        if target_id == context.node_id:
            return
        target_id = self._require_target(target_id)
        loop = asyncio.get_running_loop()
        done = self._done = loop.create_future()
        self._target, self._asked = target_id, False
        self._progress, self._progress_at = self._reached(), context.now()
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

    def _require_target(self, target_id: str) -> str:
        """Who is to lead: `target_id`, or the best target for "". Raises `InvalidArgument`, or
        `MembershipConflict` when it does not answer."""
        context = self._context
        others = [voter for voter in context.core.voters() if voter != context.node_id]
        if not others or target_id not in ("", *others):
            raise InvalidArgument(f"{target_id!r} is no other voter that could lead")
        chosen = target_id or self.best_target()
        if not chosen or not context.answers(chosen):
            silent = target_id or ", ".join(others)
            raise MembershipConflict(
                f"the leadership is not handed over without an answer from {silent}",
                remedy=f"start {silent}, or name another voter")
        return chosen

    def advance(self) -> None:
        """Ask the target to take over as soon as it has the whole log and this node has applied it;
        give up when nothing comes of it.

        What is not applied here ends with an unknown outcome. A state that takes nothing is not
        waited for: it may be the reason for the hand-over.
        """
        if not self._target:
            return
        context, reached = self._context, self._reached()
        if reached != self._progress:
            self._progress, self._progress_at = reached, context.now()
        waited_s = context.now() - self._progress_at
        match_index, applied_index = reached
        last_index = context.journal.last_index
        if not self._asked and match_index == last_index \
                and (applied_index == last_index or waited_s > context.settings.election_min_s):
            self._asked, self._progress_at = True, context.now()
            self.ask(self._target)
        elif waited_s > context.settings.election_max_s:
            self.end()

    def _reached(self) -> tuple[int, int]:
        """What of the log the target has, and what of it this node has applied."""
        core = self._context.core
        return core.match_index(self._target), core.applied_index()

    def ask(self, target_id: str) -> None:
        """Ask `target_id` to start an election at once."""
        self._context.send(target_id, frames.TimeoutNow(self._context.core.term()))

    def end(self) -> None:
        """This node leads no more, or time is up."""
        done, self._done = self._done, None
        self._target = ""
        if done is not None and not done.done():
            done.set_result(None)
