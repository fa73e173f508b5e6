"""The life cycle of a writer's registration, and the shell that executes it."""

from __future__ import annotations

import asyncio

import pytest

from elastickv.crypto.nonce import MAX_EPOCH
from elastickv.errors import (
    DiskFull,
    ElasticKVError,
    EncryptionConflict,
    NodeIdCollision,
    NoLeader,
    OutcomeUnknown,
)
from elastickv.keys.epochs import next_epoch
from elastickv.keys.guards import EpochExhausted, NodeIdTaken
from elastickv.kv import writers
from elastickv.kv.forwarding import RegisterReply
from elastickv.kv.writers import TRANSITIONS, WriterEvent, WriterRegistrar, WriterState
from tests.walked import Walked


@pytest.mark.parametrize(("local", "last_seen", "expected"), [
    (0, None, 1), (4, None, 5), (4, 3, 5), (4, 4, 5), (4, 9, 10), (0, 0, 1),
])
def test_the_next_epoch_is_above_the_sidecar_and_the_registry(
        local: int, last_seen: int | None, expected: int) -> None:
    assert next_epoch(1, local, last_seen) == expected


@pytest.mark.parametrize(("local", "last_seen"), [(MAX_EPOCH, None), (0, MAX_EPOCH)])
def test_an_exhausted_epoch_is_refused_with_the_remedy(local: int, last_seen: int | None) -> None:
    with pytest.raises(EpochExhausted, match="rotate"):
        next_epoch(7, local, last_seen)


def test_only_an_accepted_proposal_confirms() -> None:
    ways = [(state, event) for (state, event), after in TRANSITIONS.items()
            if after is WriterState.CONFIRMED]
    assert ways == [(WriterState.PROPOSED, WriterEvent.ACCEPTED)]
    assert not any(state is WriterState.CONFIRMED for state, _ in TRANSITIONS)


class Leader:
    """A registry with the leader's rule, whose answers can be lost."""

    def __init__(self, last_seen: int = 0) -> None:
        self.last_seen = last_seen
        self.script: list[Exception] = []
        self.lose_after_commit = 0
        self.asked: list[int] = []

    async def register(self, dek_id: int, epoch: int) -> RegisterReply:
        self.asked.append(epoch)
        if self.script:
            raise self.script.pop(0)
        if epoch <= self.last_seen:
            return RegisterReply(0, self.last_seen)
        self.last_seen = epoch
        if self.lose_after_commit:
            self.lose_after_commit -= 1
            raise OutcomeUnknown("lost")
        return RegisterReply(1, epoch)


class Harness:
    """A registrar on a sidecar of one DEK."""

    def __init__(self, leader: Leader, local_epoch: int = 0) -> None:
        self.persisted = [local_epoch]
        self.confirmed: asyncio.Event = asyncio.Event()
        self.fatal: list[BaseException] = []
        self.registrar = WriterRegistrar(
            0x1234, local_epoch=lambda dek_id: self.persisted[-1],
            persist=lambda dek_id, epoch: self.persisted.append(epoch),
            register=leader.register, on_confirmed=lambda dek_id: self.confirmed.set(),
            on_fatal=self.fatal.append)

    async def confirm(self) -> int:
        assert self.registrar.nonces(1) is None
        await asyncio.wait_for(self.confirmed.wait(), 10)
        factory = self.registrar.nonces(1)
        assert factory is not None
        return factory.local_epoch


async def test_a_fresh_writer_confirms_with_epoch_one() -> None:
    harness = Harness(leader := Leader())
    assert await harness.confirm() == 1
    assert harness.persisted == [0, 1]
    assert leader.last_seen == 1


async def test_an_old_disk_goes_above_what_the_registry_saw() -> None:
    harness = Harness(Leader(last_seen=9), local_epoch=3)
    assert await harness.confirm() == 10
    assert harness.persisted == [3, 4, 10]


async def test_an_epoch_whose_answer_was_lost_is_never_used() -> None:
    leader = Leader()
    leader.lose_after_commit = 2
    harness = Harness(leader)
    assert await harness.confirm() == 3
    assert leader.asked == [1, 2, 3]


async def test_what_was_certainly_not_proposed_is_asked_again_with_the_same_epoch() -> None:
    leader = Leader()
    leader.script = [NoLeader("none"), NoLeader("none")]
    harness = Harness(leader)
    assert await harness.confirm() == 1
    assert leader.asked == [1, 1, 1]


async def test_every_epoch_is_durable_before_it_is_asked_for() -> None:
    leader = Leader(last_seen=5)
    harness = Harness(leader)
    await harness.confirm()
    assert harness.persisted[1:] == leader.asked


async def test_a_full_disk_delays_a_registration_and_stops_nobody() -> None:
    harness = Harness(leader := Leader())
    refusals = [DiskFull("no space left"), DiskFull("no space left")]

    def persist(dek_id: int, epoch: int) -> None:
        if refusals:
            raise refusals.pop()
        harness.persisted.append(epoch)

    harness.registrar._persist = persist
    assert await harness.confirm() == 1
    assert (leader.asked, harness.fatal, refusals) == ([1], [], [])


async def test_a_rotation_of_our_own_confirms_without_a_round() -> None:
    leader = Leader()
    harness = Harness(leader)
    harness.registrar.begin_rotation(1)
    assert harness.registrar.nonces(1) is None
    await asyncio.sleep(0)
    harness.registrar.end_rotation(1, 1, applied=True)
    factory = harness.registrar.nonces(1)
    assert factory is not None and factory.local_epoch == 1
    assert harness.persisted == [0, 1]
    assert leader.asked == []


async def test_the_epoch_of_a_rotation_that_is_in_doubt_is_abandoned() -> None:
    leader = Leader(last_seen=1)  # it was committed after all
    harness = Harness(leader, local_epoch=1)
    harness.registrar.begin_rotation(1)
    harness.registrar.end_rotation(1, 1, applied=False)
    assert await harness.confirm() == 2


async def test_exhaustion_stops_the_node() -> None:
    harness = Harness(Leader(), local_epoch=MAX_EPOCH)
    harness.registrar.ensure(1)
    while not harness.fatal:
        await asyncio.sleep(0)
    assert isinstance(harness.fatal[0], EpochExhausted)


async def test_a_taken_node_id_stops_the_node_with_the_guards_remedy() -> None:
    leader = Leader()
    leader.script = [NodeIdCollision("nodes share the 16-bit id")]
    harness = Harness(leader)
    harness.registrar.ensure(1)
    while not harness.fatal:
        await asyncio.sleep(0)
    error = harness.fatal[0]
    assert isinstance(error, NodeIdTaken)
    assert "--raftId" in error.remedy
    assert leader.asked == [1]


@pytest.mark.parametrize("refusal", [
    EncryptionConflict("DEK 1 does not exist", remedy="resync"),
    DiskFull("no space left", remedy="resync"),
], ids=lambda refusal: type(refusal).__name__)
async def test_a_refused_registration_is_told_and_tried_again_with_the_same_epoch(
        monkeypatch: pytest.MonkeyPatch, refusal: ElasticKVError) -> None:
    """A leader whose disk is full for a day must not use up the epochs of every member."""
    monkeypatch.setattr(writers, "FIRST_PAUSE_S", 0.0)
    leader = Leader()
    leader.script = [refusal] * 50
    harness = Harness(leader)
    harness.registrar.ensure(1)
    while not harness.registrar.problem(1):
        await asyncio.sleep(0)
    assert "resync" in harness.registrar.problem(1)
    assert await harness.confirm() == 1
    assert harness.registrar.problem(1) == ""
    assert harness.persisted == [0, 1]
    assert leader.asked == [1] * 51


async def test_an_epoch_that_was_refused_and_taken_meanwhile_is_not_confirmed() -> None:
    """As when an operator registers this node with it."""
    leader = Leader()
    leader.script = [DiskFull("no space left")]
    harness = Harness(leader)
    harness.registrar.ensure(1)
    while not harness.registrar.problem(1):
        await asyncio.sleep(0)
    leader.last_seen = 1
    assert await harness.confirm() == 2


async def test_nothing_is_confirmed_after_a_stop() -> None:
    harness = Harness(Leader())
    harness.registrar.stop()
    assert harness.registrar.nonces(1) is None
    await asyncio.sleep(0)
    assert harness.persisted == [0]


async def test_every_transition_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = Walked(TRANSITIONS)
    monkeypatch.setattr(writers, "TRANSITIONS", walked)
    leader = Leader(last_seen=5)
    leader.script = [OutcomeUnknown("lost"), EncryptionConflict("no such DEK")]
    harness = Harness(leader)
    await harness.confirm()
    harness.registrar.begin_rotation(2)
    harness.registrar.end_rotation(2, 1, applied=True)
    assert walked.keys_not_taken() == set()
    assert {event for _, event in TRANSITIONS} == set(WriterEvent)
