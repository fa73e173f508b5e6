"""elastickv.server.h2.sending: the peer's windows are never exceeded, and everything gets out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.server.h2 import wire
from elastickv.server.h2.sending import Outgoing, SendWindows
from elastickv.server.h2.wire import ConnectionFailed

TAIL = wire.frame(wire.HEADERS, wire.END_STREAM, 99, b"")


def sizes(pieces: Sequence[bytes | memoryview]) -> list[tuple[int, int]]:
    """`(stream id, payload bytes)` of the DATA frames in what was given out."""
    content = b"".join(pieces)
    found = []
    while content:
        length, kind, stream_id = content[:3], content[3], content[5:9]
        end = 9 + int.from_bytes(length, "big")
        assert end <= len(content)
        if kind == wire.DATA:
            found.append((int.from_bytes(stream_id, "big"), end - 9))
        content = content[end:]
    return found


def item(stream_id: int, size: int, done: list[int] | None = None) -> Outgoing:
    return Outgoing(stream_id, bytes(size), TAIL,
                    lambda: done.append(stream_id) if done is not None else None)


def test_streams_take_turns() -> None:
    windows = SendWindows()
    windows.add(item(1, 40_000))
    windows.add(item(3, 20_000))
    frames, done = windows.pump()
    assert sizes(frames) == [(1, 16_384), (3, 16_384), (1, 16_384), (3, 3_616), (1, 7_232)]
    assert [out.stream_id for out in done] == [3, 1]
    assert windows.waiting == 0
    assert windows.connection == 65_535 - 60_000


def test_the_connection_window_holds_all_back() -> None:
    windows = SendWindows()
    windows.add(item(1, 60_000))
    windows.add(item(3, 10_000))
    windows.pump()
    assert (windows.connection, windows.waiting) == (0, 1)
    assert windows.pump() == ([], [])
    windows.grow(0, 10)
    assert sizes(windows.pump()[0]) == [(1, 10)]
    windows.grow(0, 100_000)
    assert [out.stream_id for out in windows.pump()[1]] == [1]


def test_a_blocked_stream_does_not_hold_up_the_others() -> None:
    windows = SendWindows()
    windows.grow(0, 1 << 20)
    windows.add(item(1, 70_000))
    windows.add(item(3, 30_000))
    _, done = windows.pump()
    assert [out.stream_id for out in done] == [3]
    assert windows.of(1) == 0
    windows.grow(1, 5_000)
    assert [out.stream_id for out in windows.pump()[1]] == [1]


def test_a_smaller_initial_window_can_make_windows_negative() -> None:
    windows = SendWindows()
    windows.add(item(1, 60_000))
    windows.pump()
    windows.set_initial(1_000)
    assert windows.of(1) == 1_000 - 60_000
    assert windows.of(3) == 1_000
    windows.set_initial(100_000)
    assert windows.of(1) == 40_000


def test_a_forgotten_stream_sends_nothing_more() -> None:
    windows = SendWindows()
    windows.set_initial(0)
    windows.add(item(1, 10))
    windows.add(item(3, 10))
    windows.forget(1)
    windows.set_initial(100)
    assert [out.stream_id for out in windows.pump()[1]] == [3]


@pytest.mark.parametrize("initial", [0, 5, wire.DEFAULT_WINDOW])
def test_what_is_forgotten_does_not_wait(initial: int) -> None:
    windows = SendWindows()
    windows.set_initial(initial)
    for stream_id in (1, 3):
        windows.add(item(stream_id, 50_000))
    windows.pump()
    windows.forget(3)
    windows.forget(5)
    windows.grow(1, 50_000)
    windows.grow(0, 50_000)
    windows.pump()
    assert (windows.waiting, windows.waiting_bytes) == (0, 0)


def test_a_stream_whose_window_is_used_up_is_not_looked_at() -> None:
    """However many wait, a peer that opens windows a byte at a time costs no search."""

    class Counted(SendWindows):
        looked_at = 0

        def _next_frame(self, item: Outgoing) -> tuple[bytes | memoryview, ...]:
            self.looked_at += 1
            return super()._next_frame(item)

    windows = Counted()
    windows.set_initial(0)
    windows.grow(0, 1 << 20)
    for number in range(1000):
        windows.add(item(2 * number + 1, 100))
    for number in range(500):
        windows.grow(2 * number + 1, 1)
        assert sizes(windows.pump()[0]) == [(2 * number + 1, 1)]
    assert windows.looked_at == 500
    unblocked = 0
    real = windows._unblock

    def unblock(stream_id: int) -> None:
        nonlocal unblocked
        unblocked += 1
        real(stream_id)

    windows._unblock = unblock  # type: ignore[method-assign]
    for size in range(200, 10_200):  # as many as fit a frame
        windows.set_initial(size)
    assert len(windows.pump()[1]) == 1000
    assert unblocked == 1000
    assert windows.waiting == 0


def test_overflows() -> None:
    windows = SendWindows()
    assert windows.grow(1, wire.MAX_WINDOW - wire.DEFAULT_WINDOW)
    with pytest.raises(ConnectionFailed):
        windows.set_initial(wire.DEFAULT_WINDOW + 1)
    assert not SendWindows().grow(1, wire.MAX_WINDOW)
    with pytest.raises(ConnectionFailed):
        windows.grow(0, wire.MAX_WINDOW)


@given(st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 200_000)), max_size=3,
                unique_by=lambda pair: pair[0]),
       st.lists(st.tuples(st.sampled_from([0, 1, 3, 5]), st.integers(1, 50_000)), max_size=30),
       st.integers(0, 70_000))
def test_no_window_is_ever_exceeded(items: list[tuple[int, int]], grants: list[tuple[int, int]],
                                    initial: int) -> None:
    windows = SendWindows()
    windows.set_initial(initial)
    allowed = {0: wire.DEFAULT_WINDOW, **{stream_id: initial for stream_id, _ in items}}
    sent = dict.fromkeys(allowed, 0)
    for stream_id, size in items:
        windows.add(item(stream_id, size))
    total = sum(size for _, size in items)

    def pump() -> None:
        for stream_id, size in sizes(windows.pump()[0]):
            assert 0 < size <= windows.max_frame_bytes
            sent[stream_id] += size
            sent[0] += size
        assert all(sent[name] <= allowed[name] for name in allowed)
        assert windows.waiting_bytes == total - sent[0]

    pump()
    for stream_id, increment in grants:
        if stream_id in allowed:
            allowed[stream_id] += increment
            windows.grow(stream_id, increment)
            pump()
    for stream_id in allowed:
        allowed[stream_id] += 1 << 20
        windows.grow(stream_id, 1 << 20)
    pump()
    assert {name: sent[name] for name, _ in items} == dict(items)
    assert windows.waiting == 0
