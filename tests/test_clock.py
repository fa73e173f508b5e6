"""elastickv.clock: the hybrid logical clock only goes forward, and stays under its ceiling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from elastickv.clock import (
    COUNTER_BITS,
    MAX_TIMESTAMP,
    FakeClock,
    HybridLogicalClock,
    SystemClock,
    pack_timestamp,
    timestamp_ms,
)

COUNTER_MASK = (1 << COUNTER_BITS) - 1
START_MS = 1_700_000_000_000
WINDOW_MS = 3000
NO_CEILING = MAX_TIMESTAMP


@given(st.integers(0, (1 << 48) - 1), st.integers(0, COUNTER_MASK))
def test_timestamps_order_like_their_parts(wall_ms: int, counter: int) -> None:
    packed = pack_timestamp(wall_ms, counter)
    assert timestamp_ms(packed) == wall_ms
    assert packed & COUNTER_MASK == counter
    assert 0 <= packed <= MAX_TIMESTAMP
    assert pack_timestamp(wall_ms + 1, 0) > packed


def test_follows_wall_time() -> None:
    clock = FakeClock(wall_ms=START_MS)
    hlc = HybridLogicalClock(clock, ceiling=NO_CEILING)
    assert hlc.next() == pack_timestamp(START_MS)
    clock.advance(0.005)
    assert hlc.next() == pack_timestamp(START_MS + 5)


def test_counts_within_a_millisecond_and_carries_over() -> None:
    hlc = HybridLogicalClock(FakeClock(wall_ms=START_MS), ceiling=NO_CEILING,
                             last=pack_timestamp(START_MS, COUNTER_MASK - 1))
    assert hlc.next() == pack_timestamp(START_MS, COUNTER_MASK)
    assert hlc.next() == pack_timestamp(START_MS + 1, 0)


def test_wall_clock_that_steps_back_changes_nothing() -> None:
    clock = FakeClock(wall_ms=START_MS)
    hlc = HybridLogicalClock(clock, ceiling=NO_CEILING)
    first = hlc.next()
    clock.step_wall(-86_400_000)
    assert first is not None
    assert hlc.next() == first + 1
    assert hlc.now_ms() == START_MS


@pytest.mark.parametrize(("ceiling", "issued"), [
    (0, False), (pack_timestamp(START_MS), False), (pack_timestamp(START_MS) + 1, True)])
def test_the_ceiling_is_exclusive(ceiling: int, issued: bool) -> None:
    hlc = HybridLogicalClock(FakeClock(wall_ms=START_MS), ceiling=ceiling)
    assert (hlc.next() is not None) is issued


def test_a_refused_timestamp_is_not_consumed() -> None:
    hlc = HybridLogicalClock(FakeClock(wall_ms=START_MS))
    assert hlc.next() is None
    hlc.observe_ceiling(pack_timestamp(START_MS + 1))
    assert hlc.next() == pack_timestamp(START_MS)


def test_a_new_leader_starts_above_what_its_predecessor_could_issue() -> None:
    ahead = HybridLogicalClock(FakeClock(wall_ms=START_MS + 60_000))
    ahead.observe_ceiling(ahead.raised_ceiling(WINDOW_MS))
    last_of_predecessor = ahead.next()
    assert last_of_predecessor is not None

    behind = HybridLogicalClock(FakeClock(wall_ms=START_MS))
    behind.observe_ceiling(ahead.ceiling)
    behind.lead()
    assert behind.next() is None
    behind.observe_ceiling(behind.raised_ceiling(WINDOW_MS))
    first_of_successor = behind.next()
    assert first_of_successor is not None
    assert first_of_successor > ahead.ceiling > last_of_predecessor


@pytest.mark.parametrize(("advance_ms", "due"), [(0, False), (1499, False), (1501, True)])
def test_the_ceiling_is_raised_before_it_is_reached(advance_ms: int, due: bool) -> None:
    clock = FakeClock(wall_ms=START_MS)
    hlc = HybridLogicalClock(clock)
    hlc.observe_ceiling(hlc.raised_ceiling(WINDOW_MS))
    clock.step_wall(advance_ms)
    assert hlc.needs_raise(WINDOW_MS) is due


def test_a_fake_clock_does_not_go_back() -> None:
    clock = FakeClock()
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-0.1)
    clock.advance(1.5)
    assert clock.monotonic() == 1.5


def test_the_machine_clock() -> None:
    clock = SystemClock()
    before = clock.monotonic()
    assert clock.wall_ms() > 1_600_000_000_000
    assert clock.monotonic() >= before


class HlcMachine(RuleBasedStateMachine):
    """Any order of clock steps, observations, leadership changes and issues."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock(wall_ms=START_MS)
        self.hlc = HybridLogicalClock(self.clock)
        self.issued: list[int] = []
        self.ceilings = [0]

    @rule(milliseconds=st.integers(-10_000_000, 10_000_000))
    def step(self, milliseconds: int) -> None:
        self.clock.step_wall(milliseconds)

    @rule(count=st.integers(1, 5))
    def issue(self, count: int) -> None:
        for _ in range(count):
            timestamp = self.hlc.next()
            if timestamp is None:
                return
            assert timestamp < self.hlc.ceiling
            assert not self.issued or timestamp > self.issued[-1]
            self.issued.append(timestamp)

    @rule()
    def raise_ceiling(self) -> None:
        proposed = self.hlc.raised_ceiling(WINDOW_MS)
        assert proposed > self.hlc.last
        self.hlc.observe_ceiling(proposed)
        assert self.hlc.next() is None or self.hlc.last < proposed
        self.issued.append(self.hlc.last)

    @rule(offset_ms=st.integers(-10_000, 10_000))
    def committed_elsewhere(self, offset_ms: int) -> None:
        self.hlc.observe_ceiling(pack_timestamp(START_MS + offset_ms))

    @rule(offset_ms=st.integers(-10_000, 10_000))
    def observe(self, offset_ms: int) -> None:
        timestamp = pack_timestamp(START_MS + offset_ms)
        self.hlc.observe(timestamp)
        assert self.hlc.last >= timestamp

    @rule()
    def lead(self) -> None:
        self.hlc.lead()
        assert self.hlc.next() is None or self.hlc.last > self.hlc.ceiling

    @invariant()
    def ceiling_never_falls(self) -> None:
        assert self.hlc.ceiling >= self.ceilings[-1]
        self.ceilings.append(self.hlc.ceiling)

    @invariant()
    def reading_time_never_lags(self) -> None:
        assert self.hlc.now_ms() >= timestamp_ms(self.hlc.last)


TestHlcMachine = HlcMachine.TestCase
