"""Patience with a peer: frames that cost this side and bring nothing, and silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from elastickv.server.h2.wire import Code, ConnectionFailed

NUISANCES_PER_S: Final = 2000
MAX_NUISANCES: Final = 4000
UPDATE_BYTES: Final = 16_384
"""A usual client opens a stream's window again for a quarter of the default window, or a frame."""
MAX_UPDATES: Final = 65_536
"""For 1 GiB of responses that a client has received and not read yet."""

HANDSHAKE_TIMEOUT_S: Final = 10.0
PING_AFTER_S: Final = 60.0
PING_TIMEOUT_S: Final = 20.0


class Budget:
    """Counts control frames, resets and empty frames; time forgives them. Pure but for `now`.

    A response pays for a PING, by which a busy client measures the link, for the stream's
    WINDOW_UPDATEs, which follow what the client has read, and for one RST_STREAM, by which some
    clients put away every call. The latter may come when the call is over.
    """

    __slots__ = ("_at", "_now", "_pings", "_resets", "_spent", "_updates")

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._at = now()
        self._spent = 0.0
        self._pings = 0
        self._resets = 0
        self._updates = 0

    def answered(self, size: int) -> None:
        """A response of `size` bytes went out."""
        self._pings += 1
        self._resets += 1
        self._updates += size // UPDATE_BYTES + 1

    def spend_on_ping(self) -> None:
        """A PING, which a response may have paid for. Raises as `spend` does."""
        if self._pings:
            self._pings = min(self._pings, MAX_NUISANCES) - 1
        else:
            self.spend()

    def spend_on_reset(self) -> None:
        """A RST_STREAM for a call that is over, which a response may have paid for. Raises as
        `spend` does."""
        if self._resets:
            self._resets = min(self._resets, MAX_NUISANCES) - 1
        else:
            self.spend()

    def spend_on_update(self) -> None:
        """A WINDOW_UPDATE for a call that is over, which a response may have paid for. Raises as
        `spend` does."""
        if self._updates:
            self._updates = min(self._updates, MAX_UPDATES) - 1
        else:
            self.spend()

    def spend(self) -> None:
        """One more. Raises `ConnectionFailed` when it is a flood."""
        now = self._now()
        elapsed_s, self._at = now - self._at, now
        self._spent = max(0.0, self._spent - elapsed_s * NUISANCES_PER_S) + 1
        if self._spent > MAX_NUISANCES:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too many control frames")


class Watchdog:
    """Asks a silent peer for a sign of life and gives up on one that shows none.

    `heard` is set by whoever receives; `taken()` counts the bytes that the peer took, which is a
    sign of life as well: from one that reads slowly nothing is read meanwhile. `ping()` asks,
    `give_up(reason)` ends the connection.
    """

    __slots__ = ("_give_up", "_greeted", "_loop", "_ping", "_taken", "_taken_before", "_timer",
                 "heard")

    def __init__(self, loop: asyncio.AbstractEventLoop, *, greeted: Callable[[], bool],
                 taken: Callable[[], int], ping: Callable[[], None],
                 give_up: Callable[[str], None]) -> None:
        self._loop = loop
        self._greeted = greeted
        self._taken = taken
        self._taken_before = 0
        self._ping = ping
        self._give_up = give_up
        self.heard = False
        self._timer = loop.call_later(HANDSHAKE_TIMEOUT_S, self._check_greeting)

    def stop(self) -> None:
        """No more timers."""
        self._timer.cancel()

    def _check_greeting(self) -> None:
        if self._greeted():
            self._expect(PING_AFTER_S, self._check_silence)
        else:
            self._give_up("no HTTP/2 preface in time")

    def _expect(self, within_s: float, check: Callable[[], None]) -> None:
        self.heard = False
        self._taken_before = self._taken()
        self._timer = self._loop.call_later(within_s, check)

    def _is_alive(self) -> bool:
        return self.heard or self._taken() > self._taken_before

    def _check_silence(self) -> None:
        if self._is_alive():
            self._expect(PING_AFTER_S, self._check_silence)
        else:
            self._ping()
            self._expect(PING_TIMEOUT_S, self._check_answer)

    def _check_answer(self) -> None:
        if self._is_alive():
            self._expect(PING_AFTER_S, self._check_silence)
        else:
            self._give_up("no answer to a PING")
