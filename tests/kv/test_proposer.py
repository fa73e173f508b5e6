"""elastickv.kv.proposer: how the outcomes of proposals are counted, and ages rounded."""

from __future__ import annotations

import math

import pytest

from elastickv.errors import (
    ConditionFailed,
    DiskFull,
    InvalidArgument,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
)
from elastickv.kv.proposer import OUTCOMES, outcome_of
from elastickv.kv.reads import age_ms

CASES: dict[str, tuple[BaseException | None, str]] = {
    "no error": (None, "applied"),
    "rejected by the state machine": (ConditionFailed("no"), "rejected"),
    "not the leader": (NotLeader(), "refused"),
    "no leader": (NoLeader("no"), "refused"),
    "queue full": (Overloaded("no"), "refused"),
    "disk full": (DiskFull("no"), "refused"),
    "too large": (InvalidArgument("no"), "refused"),
    "leader lost on the way": (OutcomeUnknown("no"), "unknown"),
}


@pytest.mark.parametrize("name", CASES)
def test_outcome(name: str) -> None:
    error, expected = CASES[name]
    assert outcome_of(error) == expected


def test_every_outcome_occurs() -> None:
    assert {expected for _, expected in CASES.values()} == set(OUTCOMES)


@pytest.mark.parametrize(("age_s", "expected"), [
    (0.0, 0), (0.0001, 1), (0.25, 250), (12.3451, 12346), (math.inf, -1)])
def test_age_is_rounded_up(age_s: float, expected: int) -> None:
    assert age_ms(age_s) == expected
