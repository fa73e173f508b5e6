"""elastickv.server.h2.budget: floods and silence, on a clock of the test's own."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import pytest

from elastickv.server.h2.budget import (
    HANDSHAKE_TIMEOUT_S,
    MAX_NUISANCES,
    MAX_UPDATES,
    NUISANCES_PER_S,
    PING_AFTER_S,
    PING_TIMEOUT_S,
    UPDATE_BYTES,
    Budget,
    Watchdog,
)
from elastickv.server.h2.wire import Code, ConnectionFailed


class Timers:
    """The part of an event loop that the watchdog uses."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Any:
        number = len(self._timers) + len(self._cancelled) + int(self.now * 1000)
        heapq.heappush(self._timers, (self.now + delay_s, number, callback))
        timers = self

        class Handle:
            def cancel(self) -> None:
                timers._cancelled.add(number)

        return Handle()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, number, callback = heapq.heappop(self._timers)
            if number not in self._cancelled:
                callback()
        self.now = end


def test_a_flood_ends_the_connection() -> None:
    budget = Budget(lambda: 0.0)
    for _ in range(MAX_NUISANCES):
        budget.spend()
    with pytest.raises(ConnectionFailed) as caught:
        budget.spend()
    assert caught.value.code is Code.ENHANCE_YOUR_CALM


def test_time_forgives() -> None:
    timers = Timers()
    budget = Budget(timers.time)
    for _ in range(20):
        for _ in range(NUISANCES_PER_S):
            budget.spend()
        timers.pass_time(1.0)
    for _ in range(MAX_NUISANCES):
        budget.spend()


def test_every_response_is_worth_a_ping() -> None:
    budget = Budget(lambda: 0.0)
    for _ in range(3 * MAX_NUISANCES):
        budget.answered(0)
        budget.spend_on_ping()
    for _ in range(10 * MAX_NUISANCES):
        budget.answered(0)
    for _ in range(2 * MAX_NUISANCES):
        budget.spend_on_ping()
    with pytest.raises(ConnectionFailed):
        budget.spend_on_ping()


def test_every_response_is_worth_a_reset_of_a_call_that_is_over() -> None:
    budget = Budget(lambda: 0.0)
    for _ in range(3 * MAX_NUISANCES):
        budget.answered(0)
        budget.spend_on_reset()
    for _ in range(10 * MAX_NUISANCES):
        budget.answered(0)
    for _ in range(2 * MAX_NUISANCES):
        budget.spend_on_reset()
    with pytest.raises(ConnectionFailed):
        budget.spend_on_reset()


@pytest.mark.parametrize("size", [5, UPDATE_BYTES - 1, UPDATE_BYTES, 34_005, 8 << 20],
                         ids=lambda size: f"{size} bytes")
def test_a_response_pays_for_the_window_updates_of_one_who_reads_it(size: int) -> None:
    budget = Budget(lambda: 0.0)
    for _ in range(10_000):
        budget.answered(size)
        for _ in range(size // UPDATE_BYTES + 1):
            budget.spend_on_update()
    for _ in range(MAX_NUISANCES):
        budget.spend_on_update()
    with pytest.raises(ConnectionFailed) as caught:
        budget.spend_on_update()
    assert caught.value.code is Code.ENHANCE_YOUR_CALM


def test_responses_pay_for_no_flood_of_window_updates() -> None:
    budget = Budget(lambda: 0.0)
    for _ in range(10):
        budget.answered(MAX_UPDATES * UPDATE_BYTES)
    for _ in range(MAX_UPDATES + MAX_NUISANCES):
        budget.spend_on_update()
    with pytest.raises(ConnectionFailed):
        budget.spend_on_update()


class Peer:
    """What the watchdog did."""

    def __init__(self, *, greeted: bool) -> None:
        self.greeted = greeted
        self.taken = 0
        self.pings = 0
        self.given_up: list[str] = []
        self.timers = Timers()
        self.dog = Watchdog(self.timers, greeted=lambda: self.greeted,  # type: ignore[arg-type]
                            taken=lambda: self.taken, ping=self.ping, give_up=self.given_up.append)

    def ping(self) -> None:
        self.pings += 1
        self.taken += 17  # by the kernel, at once


def test_a_peer_that_never_greets_is_given_up() -> None:
    peer = Peer(greeted=False)
    peer.timers.pass_time(HANDSHAKE_TIMEOUT_S - 1)
    assert peer.given_up == []
    peer.timers.pass_time(2)
    assert peer.given_up == ["no HTTP/2 preface in time"]


def test_a_busy_peer_is_left_alone() -> None:
    peer = Peer(greeted=True)
    for _ in range(100):
        peer.timers.pass_time(PING_AFTER_S / 2)
        peer.dog.heard = True
    assert (peer.pings, peer.given_up) == (0, [])


def test_a_silent_peer_is_asked_and_then_given_up() -> None:
    peer = Peer(greeted=True)
    peer.timers.pass_time(HANDSHAKE_TIMEOUT_S + PING_AFTER_S + 1)
    assert (peer.pings, peer.given_up) == (1, [])
    peer.timers.pass_time(PING_TIMEOUT_S)
    assert peer.given_up == ["no answer to a PING"]


def test_an_answer_is_enough() -> None:
    peer = Peer(greeted=True)
    peer.timers.pass_time(HANDSHAKE_TIMEOUT_S + PING_AFTER_S + 1)
    for asked in range(1, 6):
        assert (peer.pings, peer.given_up) == (asked, [])
        peer.dog.heard = True
        peer.timers.pass_time(PING_TIMEOUT_S + PING_AFTER_S)


def test_a_peer_that_reads_slowly_is_left_alone() -> None:
    """While it does, nothing is read from it, not even the answer to a PING."""
    peer = Peer(greeted=True)
    for _ in range(100):
        peer.taken += 1
        peer.timers.pass_time(PING_TIMEOUT_S / 2)
    assert (peer.pings, peer.given_up) == (0, [])
    peer.timers.pass_time(PING_AFTER_S + PING_TIMEOUT_S + PING_AFTER_S)
    assert peer.given_up == ["no answer to a PING"]


def test_a_stopped_watchdog_does_nothing() -> None:
    peer = Peer(greeted=False)
    peer.dog.stop()
    peer.timers.pass_time(1000)
    assert (peer.pings, peer.given_up) == (0, [])
