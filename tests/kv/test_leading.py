"""elastickv.kv.leading: operations run where the leader is, and anew only if they had not begun."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from elastickv.errors import (
    DeadlineExceeded,
    EncryptionConflict,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    PeerError,
    Unreachable,
)
from elastickv.kv.leading import RETRY_S, on_leader

TIMEOUT_S = 20.0
NARROW = (NotLeader, NoLeader, Unreachable)


class Place:
    """Where an operation may run: this node leads or `leader_id` does, and each run comes to the
    next of `outcomes`."""

    def __init__(self, *outcomes: BaseException | str, leader_id: str = "n2") -> None:
        self._outcomes: Iterator[BaseException | str] = iter(outcomes)
        self.leader_id = leader_id
        self.runs: list[str] = []
        self.engine: Any = SimpleNamespace(
            node_id="n1", is_leader=lambda: self.leader_id == "n1",
            status=lambda: SimpleNamespace(leader_id=self.leader_id))

    def _run(self, where: str) -> str:
        self.runs.append(where)
        outcome = next(self._outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def lead(self, remaining_s: float) -> str:
        return self._run("here")

    async def ask(self, leader_id: str, remaining_s: float) -> str:
        return self._run(leader_id)

    async def come_to(self, *, timeout_s: float = TIMEOUT_S,
                      retried: tuple[type[PeerError], ...] = (PeerError,)) -> str:
        return await on_leader(self.engine, self.lead, self.ask, what="a change",
                               timeout_s=timeout_s, remedy="look", retried=retried)


@pytest.mark.parametrize("leader_id", ["n1", "n2"])
async def test_it_runs_where_the_leader_is(leader_id: str) -> None:
    place = Place("done", leader_id=leader_id)
    assert await place.come_to() == "done"
    assert place.runs == ["here" if leader_id == "n1" else "n2"]


@pytest.mark.parametrize(("error", "retried", "again"), [
    (NotLeader(), (PeerError,), True),
    (Overloaded("full"), (PeerError,), True),
    (OutcomeUnknown("lost"), (PeerError,), False),
    (DeadlineExceeded("late"), (PeerError,), False),
    (EncryptionConflict("no"), (PeerError,), False),
    (Unreachable("down"), NARROW, True),
    (Overloaded("full"), NARROW, False),
    (OutcomeUnknown("lost"), NARROW, False),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None)
@pytest.mark.parametrize("leader_id", ["n1", "n2"])
async def test_it_runs_again_only_after_what_is_retried(
        error: Exception, retried: tuple[type[PeerError], ...], again: bool,
        leader_id: str) -> None:
    place = Place(error, "done", leader_id=leader_id)
    if again:
        assert await place.come_to(retried=retried) == "done"
    else:
        with pytest.raises(type(error)):
            await place.come_to(retried=retried)
    assert len(place.runs) == 1 + again


async def test_it_waits_for_a_leader() -> None:
    place = Place("done", leader_id="")
    waiting = asyncio.ensure_future(place.come_to())
    await asyncio.sleep(0)
    assert place.runs == []
    place.leader_id = "n3"
    assert await waiting == "done"
    assert place.runs == ["n3"]


async def test_it_gives_up_with_the_last_error_when_no_time_is_left_for_another_run() -> None:
    place = Place(NotLeader(), "done")
    with pytest.raises(NotLeader):
        await place.come_to(timeout_s=RETRY_S)
    assert place.runs == ["n2"]


async def test_what_is_not_decided_in_time_is_of_unknown_outcome() -> None:
    async def never(remaining_s: float) -> str:
        return await asyncio.get_running_loop().create_future()

    place = Place(leader_id="n1")
    place.lead = never  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknown, match="a change was not decided") as caught:
        await place.come_to(timeout_s=RETRY_S)
    assert caught.value.remedy == "look"
