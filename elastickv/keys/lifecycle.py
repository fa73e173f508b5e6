"""The life cycles that encryption entries drive, as the tables that the code executes.

A cutover is one-way and idempotent. Its entry names the DEK that its proposer saw active; if a
rotation was committed in between, the entry is *stale* and does nothing, so the race is harmless.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


class CutoverState(enum.StrEnum):
    """Whether new values (or log entries) must be envelopes."""

    BEFORE = "before"
    ACTIVE = "active"


class CutoverEvent(enum.StrEnum):
    """A committed cutover entry, as it meets the state."""

    ENTRY_FOR_ACTIVE_DEK = "entry names the active DEK"
    ENTRY_FOR_OTHER_DEK = "entry names another DEK"


class CutoverAction(enum.StrEnum):
    """What the applier does besides noting the entry's index."""

    ACTIVATE = "set the cutover index and register the proposer"
    NOTHING = "nothing"


CUTOVER_TRANSITIONS: Final[
    Mapping[tuple[CutoverState, CutoverEvent], tuple[CutoverState, CutoverAction]]
] = MappingProxyType({
    (CutoverState.BEFORE, CutoverEvent.ENTRY_FOR_ACTIVE_DEK):
        (CutoverState.ACTIVE, CutoverAction.ACTIVATE),
    (CutoverState.BEFORE, CutoverEvent.ENTRY_FOR_OTHER_DEK):
        (CutoverState.BEFORE, CutoverAction.NOTHING),
    (CutoverState.ACTIVE, CutoverEvent.ENTRY_FOR_ACTIVE_DEK):
        (CutoverState.ACTIVE, CutoverAction.NOTHING),
    (CutoverState.ACTIVE, CutoverEvent.ENTRY_FOR_OTHER_DEK):
        (CutoverState.ACTIVE, CutoverAction.NOTHING),
})


def step_cutover(active: bool, names_active_dek: bool) -> CutoverAction:
    """Look up what a cutover entry does."""
    state = CutoverState.ACTIVE if active else CutoverState.BEFORE
    event = (CutoverEvent.ENTRY_FOR_ACTIVE_DEK if names_active_dek
             else CutoverEvent.ENTRY_FOR_OTHER_DEK)
    return CUTOVER_TRANSITIONS[state, event][1]
