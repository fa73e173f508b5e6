"""Automatic rotation: when a DEK is due for a successor, and the one task that sees to it.

`reason_to_rotate` is the rule, `TRANSITIONS` the life cycle that the task executes, for each
purpose:

    IDLE --due--> ROTATING --applied--> IDLE
                     |
                     +--failed--> WAITING --retry time--> IDLE
    anything --deposed--> IDLE

A rotation that fails because this node leads no more is *deposed*, not *failed*: its successor
judges anew. Only the leader acts, and only on the DEK that it judged: when an operator's rotation
was faster, nothing is left to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from elastickv import logs
from elastickv.clock import Clock
from elastickv.crypto.keystore import Purpose
from elastickv.errors import ElasticKVError
from elastickv.keys.usage import Limits
from elastickv.kv.member_rules import NEAR_END_OF_EPOCHS

TICK_S = 1.0
RETRY_S = 5.0
CLOCKS_DIFFER_S = 86_400.0
"""A DEK that is further in the future than this was applied by a clock that was wrong: its age is
unknown, and would be until that time comes."""
STARTUP_S = 60.0
"""How long a node that follows leaves the rotation after a start to the one that leads."""

log = logs.get_logger(__name__)


class RotationState(enum.Enum):
    """Where the automatic rotation of one purpose stands on this node."""

    IDLE = "idle"
    ROTATING = "rotating"
    WAITING = "waiting"


class RotationEvent(enum.Enum):
    """What can happen to it."""

    DUE = "due"
    APPLIED = "applied"
    FAILED = "failed"
    RETRY_TIME = "retry time"
    DEPOSED = "deposed"


TRANSITIONS: Mapping[tuple[RotationState, RotationEvent], RotationState] = {
    (RotationState.IDLE, RotationEvent.DUE): RotationState.ROTATING,
    (RotationState.ROTATING, RotationEvent.APPLIED): RotationState.IDLE,
    (RotationState.ROTATING, RotationEvent.FAILED): RotationState.WAITING,
    (RotationState.WAITING, RotationEvent.RETRY_TIME): RotationState.IDLE,
    (RotationState.IDLE, RotationEvent.DEPOSED): RotationState.IDLE,
    (RotationState.ROTATING, RotationEvent.DEPOSED): RotationState.IDLE,
    (RotationState.WAITING, RotationEvent.DEPOSED): RotationState.IDLE,
}


class Reason(enum.StrEnum):
    """Why a DEK gets a successor, as the node's log says it."""

    STARTUP = "start-up"
    WRITES = "writes"
    AGE = "age"
    EPOCHS = "epochs"


@dataclass(frozen=True, slots=True)
class DekFacts:
    """What the rule looks at. `age_s` None = unknown; `highest_epoch` is over all members; `spent`:
    the limit keeps a write that waits from taking its nonces."""

    dek_id: int
    age_s: float | None
    writes: int
    highest_epoch: int
    spent: bool = False


@dataclass(frozen=True, slots=True)
class RotationSettings:
    """`max_age_s` 0 = DEKs do not age."""

    limits: Limits
    max_age_s: int = 0
    on_startup: bool = False


def reason_to_rotate(facts: DekFacts, settings: RotationSettings, *,
                     startup_due: bool = False) -> Reason | None:
    """Why the active DEK must be rotated now, the most pressing reason first."""
    if facts.spent or settings.limits.rotation_due(facts.writes):
        return Reason.WRITES
    if facts.highest_epoch >= NEAR_END_OF_EPOCHS:
        return Reason.EPOCHS
    if settings.max_age_s and facts.age_s is not None and not (
            -CLOCKS_DIFFER_S <= facts.age_s < settings.max_age_s):
        return Reason.AGE
    return Reason.STARTUP if startup_due else None


def age_s(created: str, wall_ms: int) -> float | None:
    """Seconds since a sidecar's `created` (RFC 3339, UTC); None when it does not parse."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return wall_ms / 1000 - moment.timestamp()


@dataclass(frozen=True, slots=True)
class View:
    """What the task sees of the cluster: whether this node leads or another one does, what is known
    of the active DEKs where it leads, and their ids in any case."""

    leads: bool
    another_leads: bool
    dek_facts: Mapping[Purpose, DekFacts]
    active_deks: Mapping[Purpose, int] = field(default_factory=dict)


class AutomaticRotation:
    """The task of one node. `rotate(purpose, dek_id)` replaces that DEK through the
    leader's own operations and raises typed errors. What else ends the task, as damage in what the
    view is read from, is told to `on_fatal`: a node must not go on with DEKs that nobody rotates.
    `on_failed()` is called when a rotation has failed: nobody is to wait for it any more.
    """

    def __init__(self, settings: RotationSettings, view: Callable[[], View],
                 rotate: Callable[[Purpose, int], Awaitable[None]], clock: Clock, *,
                 on_fatal: Callable[[BaseException], None],
                 on_failed: Callable[[], None]) -> None:
        self._settings = settings
        self._view = view
        self._rotate = rotate
        self._clock = clock
        self._on_fatal = on_fatal
        self._on_failed = on_failed
        self._states = dict.fromkeys(Purpose, RotationState.IDLE)
        self._retry_at = dict.fromkeys(Purpose, 0.0)
        self._startup_due = dict.fromkeys(Purpose, settings.on_startup)
        self._startup_ends: float | None = None
        self._began_with: dict[Purpose, int] = {}
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin. Once."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="dek-rotation")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_fatal(error)

    def stop(self) -> None:
        """End; a rotation under way is decided by the log."""
        if self._task is not None:
            self._task.cancel()

    def poke(self) -> None:
        """Something that the rule looks at has changed."""
        self._poked.set()

    def relieves(self, purpose: Purpose) -> bool:
        """Whether writes that found the DEK spent should wait, because a successor is coming."""
        return self._task is not None and not self._task.done() \
            and self._states[purpose] is not RotationState.WAITING

    def state(self, purpose: Purpose) -> RotationState:
        """Where the rotation of a purpose stands."""
        return self._states[purpose]

    async def _run(self) -> None:
        while True:
            self._poked.clear()
            for purpose in Purpose:
                await self.step(purpose)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._poked.wait()

    async def step(self, purpose: Purpose) -> None:
        """Look once, and rotate if that is due."""
        view = self._view()
        if not view.leads:
            self._event(purpose, RotationEvent.DEPOSED)
            if self._startup_due[purpose]:
                self._leave_startup(purpose, view)
            return
        if self._states[purpose] is RotationState.WAITING:
            if self._clock.monotonic() < self._retry_at[purpose]:
                return
            self._event(purpose, RotationEvent.RETRY_TIME)
        facts = view.dek_facts.get(purpose)
        reason = reason_to_rotate(facts, self._settings,
                                  startup_due=self._startup_due[purpose]) if facts else None
        if facts is None or reason is None:
            self._startup_due[purpose] = False
            return
        self._event(purpose, RotationEvent.DUE)
        try:
            await self._rotate(purpose, facts.dek_id)
        except ElasticKVError as error:
            log.warning("automatic rotation failed", purpose=purpose.label, reason=reason.value,
                        error=str(error))
            self._retry_at[purpose] = self._clock.monotonic() + RETRY_S
            self._event(purpose, RotationEvent.FAILED if self._view().leads
                        else RotationEvent.DEPOSED)
            self._on_failed()
        else:
            log.info("dek rotated", purpose=purpose.label, reason=reason.value)
            self._startup_due[purpose] = False
            self._event(purpose, RotationEvent.APPLIED)

    def _leave_startup(self, purpose: Purpose, view: View) -> None:
        """Whoever leads after the start rotates; if it ends before it has, the next leader does. A
        node that was started alone follows one that does nothing: once it has done so for a while,
        it does nothing either when it leads one day."""
        now = self._clock.monotonic()
        if view.another_leads and self._startup_ends is None:
            self._startup_ends = now + STARTUP_S
        is_over = self._startup_ends is not None and now >= self._startup_ends
        dek_id = view.active_deks.get(purpose)
        is_rotated = dek_id is not None \
            and self._began_with.setdefault(purpose, dek_id) != dek_id
        if is_rotated or is_over:
            self._startup_due[purpose] = False

    def _event(self, purpose: Purpose, event: RotationEvent) -> None:
        self._states[purpose] = TRANSITIONS[(self._states[purpose], event)]
