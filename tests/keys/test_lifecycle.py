"""The cutover table is complete, one-way and idempotent."""

from __future__ import annotations

import itertools

import pytest

from elastickv.keys.lifecycle import (
    CUTOVER_TRANSITIONS,
    CutoverAction,
    CutoverEvent,
    CutoverState,
    step_cutover,
)


def test_every_state_has_every_event() -> None:
    assert set(CUTOVER_TRANSITIONS) == set(itertools.product(CutoverState, CutoverEvent))


def test_nothing_leads_back() -> None:
    for event in CutoverEvent:
        assert CUTOVER_TRANSITIONS[CutoverState.ACTIVE, event] == (
            CutoverState.ACTIVE, CutoverAction.NOTHING)


def test_the_state_changes_exactly_where_the_action_says_so() -> None:
    for (state, _), (after, action) in CUTOVER_TRANSITIONS.items():
        assert (state is not after) == (action is CutoverAction.ACTIVATE)


@pytest.mark.parametrize(("active", "names_active_dek", "action"), [
    pytest.param(False, True, CutoverAction.ACTIVATE, id="first"),
    pytest.param(False, False, CutoverAction.NOTHING, id="stale"),
    pytest.param(True, True, CutoverAction.NOTHING, id="repeated"),
    pytest.param(True, False, CutoverAction.NOTHING, id="repeated after a rotation"),
])
def test_step(active: bool, names_active_dek: bool, action: CutoverAction) -> None:
    assert step_cutover(active, names_active_dek) is action
