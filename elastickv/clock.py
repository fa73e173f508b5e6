"""Time: the clock seam and the hybrid logical clock (HLC).

A timestamp is 64 bits, `wall milliseconds (48) | counter (16)`, so that integer order is time
order. The HLC never goes back and never issues a timestamp above its replicated ceiling: a new
leader starts above the ceiling that its predecessor committed, whatever its own wall clock says.
"""

from __future__ import annotations

import time
from typing import Protocol

COUNTER_BITS = 16
MAX_TIMESTAMP = (1 << 64) - 1


class Clock(Protocol):
    """Where a component gets its time. Simulation supplies a fake."""

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean anything."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since the Unix epoch; may jump in both directions."""
        ...


class SystemClock:
    """The machine's clocks."""

    # The function itself: every read of a key asks twice.
    monotonic = staticmethod(time.monotonic)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


class FakeClock:
    """A clock that moves only when told to. Wall time can be stepped on its own."""

    def __init__(self, monotonic: float = 0.0, wall_ms: int = 1_700_000_000_000) -> None:
        self._monotonic = monotonic
        self._wall_ms = float(wall_ms)

    def monotonic(self) -> float:
        return self._monotonic

    def wall_ms(self) -> int:
        return int(self._wall_ms)

    def advance(self, seconds: float) -> None:
        """Move both clocks forward by `seconds`."""
        if seconds < 0:
            raise ValueError("monotonic time cannot go back")
        self._monotonic += seconds
        self._wall_ms += seconds * 1000

    def step_wall(self, milliseconds: float) -> None:
        """Step only the wall clock, in either direction."""
        self._wall_ms += milliseconds


def pack_timestamp(wall_ms: int, counter: int = 0) -> int:
    """`wall_ms` (48 bits) and `counter` (16 bits) as one timestamp."""
    return (wall_ms << COUNTER_BITS) | counter


def timestamp_ms(timestamp: int) -> int:
    """The wall milliseconds in a timestamp."""
    return timestamp >> COUNTER_BITS


class HybridLogicalClock:
    """Issues strictly increasing timestamps that follow wall time.

    `ceiling` is exclusive: `next()` returns None when the next timestamp would reach it, and the
    leader must first commit a higher ceiling.
    """

    def __init__(self, clock: Clock, *, last: int = 0, ceiling: int = 0) -> None:
        self.clock = clock
        self.last = last
        self.ceiling = ceiling

    def now_ms(self) -> int:
        """Wall milliseconds that never lag behind an issued or observed timestamp."""
        return max(self.clock.wall_ms(), self.last >> COUNTER_BITS)

    def observe(self, timestamp: int) -> None:
        """Never issue `timestamp` or anything below it again."""
        if timestamp > self.last:
            self.last = timestamp

    def next(self) -> int | None:
        """The next timestamp, or None when the ceiling must be raised first."""
        candidate = max(self.clock.wall_ms() << COUNTER_BITS, self.last + 1)
        if candidate >= self.ceiling:
            return None
        self.last = candidate
        return candidate

    def observe_ceiling(self, ceiling: int) -> None:
        """A ceiling was committed, perhaps by another leader: start above it when leading."""
        if ceiling > self.ceiling:
            self.ceiling = ceiling

    def lead(self) -> None:
        """Called on becoming leader: an earlier leader may have issued anything below the
        ceiling."""
        self.observe(self.ceiling)

    def needs_raise(self, window_ms: int) -> bool:
        """True when less than half a window is left below the ceiling."""
        due = max(self.clock.wall_ms() << COUNTER_BITS, self.last)
        return due + ((window_ms // 2) << COUNTER_BITS) >= self.ceiling

    def raised_ceiling(self, window_ms: int) -> int:
        """The ceiling to propose now: a window above every timestamp that could be issued."""
        now_ms = max(self.clock.wall_ms(), self.last >> COUNTER_BITS)
        return max(pack_timestamp(now_ms + window_ms), self.ceiling)
