"""The way of committed entries into the state machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from elastickv.errors import ApplyHalted, DiskFull
from elastickv.raft.core import Context
from elastickv.raft.engine import Entry, StateMachine
from elastickv.raft.journal import FIRST_ANCHOR_INDEX
from elastickv.raft.membership import CONFIGURATION_KIND
from elastickv.raft.proposals import AppliedWaiters, Proposals
from elastickv.raft.pysyncobj_journal import NO_OP_COMMAND

REGULAR_KIND = b"\x00"
RETRY_S = 0.002
"""A state that took nothing, because it reads something first, is asked again after so long."""


class Applying:
    """Passes committed, durable entries on and tells those who wait for them."""

    def __init__(self, context: Context, machine: StateMachine, proposals: Proposals,
                 waiters: AppliedWaiters, configuration_committed: Callable[[int], None],
                 note_full_disk: Callable[[DiskFull], None]) -> None:
        """`configuration_committed` is told the index of every applied configuration."""
        self._context = context
        self._machine = machine
        self._proposals = proposals
        self._waiters = waiters
        self._configuration_committed = configuration_committed
        self._note_full_disk = note_full_disk
        self._waits_since = float("inf")
        self._waits_at = 0
        self._reads_first = False
        """Whether the state did not take all when it was passed entries last: perhaps it reads
        something for the next one."""
        self._retry_timer: asyncio.TimerHandle | None = None

    @property
    def waits_since(self) -> float:
        """Since when the state has taken no more, with nothing of it made durable; inf while it
        takes what there is to apply."""
        return self._waits_since

    def apply_group(self) -> None:
        """Apply one bounded group; a round is asked for when more is left.

        Raises `ApplyHalted` when an entry cannot be applied, for whatever reason but a disk that is
        full, and `OSError` for one that fails.
        """
        context, core, settings = self._context, self._context.core, self._context.settings
        low = core.applied_index() + 1
        limit = min(core.commit_index(), context.journal.durable_index)
        high = min(limit, low + settings.apply_group_entries - 1)
        if high < low:
            # A snapshot may have brought what was waited for.
            self._waits_since, self._reads_first = float("inf"), False
            return
        self._require_state_of(low - 1)
        try:
            if not self._machine.may_apply():
                self._wait_for_state()
                if self._reads_first:
                    self._retry_soon()
                return
            stored = context.journal.entries(low, high, settings.apply_group_bytes)
            group = [_entry(*entry) for entry in stored]
            results = self._apply(group)
        except DiskFull as error:
            self._wait_for_space(error)
            return
        # Also behind some that it took: then it is asked again at once, and says that it may not.
        self._reads_first = len(results) < len(group)
        if not results:
            self._wait_for_state()
            self._retry_soon()
            return
        self._waits_since = float("inf")
        applied = group[:len(results)]
        last_index = applied[-1].index
        core.advance_applied(last_index)
        self._proposals.applied(applied, results)
        self._waiters.advance(last_index)
        for command, index, _ in stored[:len(results)]:
            if command[:1] == CONFIGURATION_KIND:
                self._configuration_committed(index)
        if last_index < limit:
            context.schedule()

    def _apply(self, group: Sequence[Entry]) -> Sequence[object]:
        try:
            return self._machine.apply(group)
        except (ApplyHalted, DiskFull, OSError):
            raise
        except Exception as error:
            raise ApplyHalted(f"entries {group[0].index} to {group[-1].index} cannot be applied: "
                              f"{error}", remedy="see the log of this node") from error

    def _require_state_of(self, index: int) -> None:
        """What is applied over a gap would hide it for good."""
        applied_index = max(self._machine.applied_index, FIRST_ANCHOR_INDEX)
        if applied_index != index:
            raise ApplyHalted(f"the state is that of entry {applied_index}, not of {index}",
                              remedy="start this node again")

    def _retry_soon(self) -> None:
        if self._retry_timer is None:
            self._retry_timer = asyncio.get_running_loop().call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retry_timer = None
        self._context.schedule()

    def _wait_for_state(self) -> None:
        """The next tick asks again."""
        durable_index = self._machine.durable_index
        if self._waits_since == float("inf") or self._waits_at != durable_index:
            self._waits_since, self._waits_at = self._context.now(), durable_index

    def _wait_for_space(self, error: DiskFull) -> None:
        """The next tick tries again. A leader that applies nothing serves nobody."""
        self._waits_since = float("inf")
        self._note_full_disk(error)
        core = self._context.core
        if core.is_leading() and len(core.voters()) > 1:
            core.follow_nobody()


def _entry(command: bytes, index: int, term: int) -> Entry:
    """A log entry as the state machine sees it. Raises `ApplyHalted` on an unknown kind."""
    kind = command[:1]
    if kind == REGULAR_KIND:
        return Entry(index, term, command[1:])
    if kind in (NO_OP_COMMAND, CONFIGURATION_KIND):
        return Entry(index, term, b"")
    raise ApplyHalted(f"entry {index} is of the unknown kind 0x{kind.hex()}",
                      remedy="run a version that knows it")
