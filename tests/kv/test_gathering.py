"""When a group of writes goes: the rule as named cases, and its bound."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.kv.gathering import LIMIT_S, PATIENCE, Gathering


class Case(NamedTuple):
    """A group of `size` that took `took_s` and left `left` in the queue; then, `after_s` later,
    `waiting` writes wait."""

    name: str
    size: int
    left: int
    took_s: float
    after_s: float
    waiting: int
    wait_s: float


CASES = [
    Case("a lone caller never waits", 1, 0, 0.001, 0.0, 1, 0.0),
    Case("the second of two waits for the first", 1, 1, 0.001, 0.0, 1, 0.002),
    Case("both of two go", 1, 1, 0.001, 0.0005, 2, 0.0),
    Case("the first of many waits", 16, 0, 0.001, 0.0005, 1, 0.0015),
    Case("those who waited count among the callers", 10, 10, 0.001, 0.0, 10, 0.002),
    Case("all but a straggler of many go", 16, 0, 0.001, 0.0005, 15, 0.0),
    Case("what came goes at the end of the patience", 16, 0, 0.001, 0.002, 3, 0.0),
    Case("a first write after a pause goes", 16, 0, 0.001, 60.0, 1, 0.0),
    Case("a slow group earns no long wait", 16, 0, 1.0, 0.0, 1, LIMIT_S),
    Case("more callers than before go", 4, 0, 0.001, 0.0, 40, 0.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_when_a_group_goes(case: Case) -> None:
    gathering = Gathering()
    gathering.group_started(100.0)
    gathering.group_ended(100.0 + case.took_s, case.size, case.left)
    assert gathering.wait_s(100.0 + case.took_s + case.after_s, case.waiting) == pytest.approx(
        case.wait_s, abs=1e-9)


def test_the_first_write_of_all_goes() -> None:
    assert Gathering().wait_s(0.0, 1) == 0.0


@given(took_s=st.floats(0.0, 10.0), size=st.integers(1, 512), left=st.integers(0, 10_000),
       after_s=st.floats(0.0, 10.0), waiting=st.integers(1, 10_000))
def test_nobody_waits_longer_than_a_multiple_of_a_group(
        took_s: float, size: int, left: int, after_s: float, waiting: int) -> None:
    gathering = Gathering()
    gathering.group_started(0.0)
    gathering.group_ended(took_s, size, left)
    wait_s = gathering.wait_s(took_s + after_s, waiting)
    assert wait_s >= 0.0
    assert after_s + wait_s <= max(after_s, min(LIMIT_S, PATIENCE * took_s)) + 1e-9
