"""elastickv.store.gate: who shuts it is alone."""

from __future__ import annotations

import threading

from elastickv.store.gate import Gate


def test_many_are_inside_at_a_time() -> None:
    gate = Gate()
    with gate.inside() as first, gate.inside() as second:
        assert first
        assert second


def test_nobody_enters_while_it_is_shut() -> None:
    gate = Gate()
    gate.shut()
    gate.shut()
    with gate.inside() as entered:
        assert not entered
    gate.open()
    with gate.inside() as entered:
        assert entered
        assert not gate.is_shut


def test_shutting_waits_until_everybody_is_out() -> None:
    gate = Gate()
    events: list[str] = []
    is_inside, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with gate.inside():
            is_inside.set()
            assert may_leave.wait(30)
            events.append("out")

    def shut() -> None:
        gate.shut()
        events.append("shut")

    visitor, keeper = threading.Thread(target=stay), threading.Thread(target=shut)
    visitor.start()
    assert is_inside.wait(30)
    keeper.start()
    while not gate.is_shut:  # it waits now, and nobody else comes in
        pass
    with gate.inside() as entered:
        assert not entered
    assert events == []
    may_leave.set()
    for thread in (visitor, keeper):
        thread.join(30)
    assert events == ["out", "shut"]


def test_whoever_fails_inside_is_out() -> None:
    gate = Gate()
    try:
        with gate.inside():
            raise ValueError
    except ValueError:
        gate.shut()
    assert gate.is_shut
