"""When a DEK is due for a successor, and the task that sees to it."""

from __future__ import annotations

import pytest

from elastickv.clock import FakeClock
from elastickv.crypto.keystore import Purpose
from elastickv.errors import NotCapable, NotLeader, StoreCorrupt
from elastickv.keys.usage import Limits
from elastickv.kv import rotation
from elastickv.kv.member_rules import NEAR_END_OF_EPOCHS
from elastickv.kv.rotation import (
    CLOCKS_DIFFER_S,
    RETRY_S,
    STARTUP_S,
    TRANSITIONS,
    AutomaticRotation,
    DekFacts,
    Reason,
    RotationEvent,
    RotationSettings,
    RotationState,
    View,
    age_s,
    reason_to_rotate,
)
from tests.kv.key_cluster import MakeCluster, until
from tests.walked import Walked

SETTINGS = RotationSettings(Limits(1000), max_age_s=3600)
FRESH = DekFacts(7, age_s=0.0, writes=0, highest_epoch=1)


@pytest.mark.parametrize(("facts", "startup", "expected"), [
    (FRESH, False, None),
    (DekFacts(7, 3599.0, 899, 1), False, None),
    (DekFacts(7, 0.0, 900, 1), False, Reason.WRITES),
    (DekFacts(7, 0.0, 0, 1, spent=True), False, Reason.WRITES),
    (DekFacts(7, 3600.0, 0, 1), False, Reason.AGE),
    (DekFacts(7, None, 0, 1), False, None),
    (DekFacts(7, -5.0, 0, 1), False, None),
    (DekFacts(7, -CLOCKS_DIFFER_S, 0, 1), False, None),
    (DekFacts(7, -CLOCKS_DIFFER_S - 1, 0, 1), False, Reason.AGE),
    (DekFacts(7, -1e9, 999, 1), False, Reason.WRITES),
    (DekFacts(7, 0.0, 0, NEAR_END_OF_EPOCHS), False, Reason.EPOCHS),
    (FRESH, True, Reason.STARTUP),
    (DekFacts(7, 9999.0, 999, NEAR_END_OF_EPOCHS), True, Reason.WRITES),
], ids=["fresh", "just below", "writes", "spent", "age", "age unknown", "clock behind",
        "clock a day behind", "made in the future", "made in the future, and used up", "epochs",
        "start-up", "several"])
def test_reason(facts: DekFacts, startup: bool, expected: Reason | None) -> None:
    assert reason_to_rotate(facts, SETTINGS, startup_due=startup) is expected


def test_without_an_age_limit_deks_do_not_age() -> None:
    for age in (1e9, -1e9):
        facts = DekFacts(7, age, 0, 1)
        assert reason_to_rotate(facts, RotationSettings(Limits(1000))) is None


@pytest.mark.parametrize(("created", "expected"), [
    ("2026-01-01T00:00:00Z", 60.0), ("2026-01-01T01:00:00+01:00", 60.0),
    ("2026-01-01T00:00:00", 60.0), ("n1", None), ("", None),
])
def test_age(created: str, expected: float | None) -> None:
    assert age_s(created, 1_767_225_660_000) == expected


def test_every_state_can_be_left_by_losing_the_lead() -> None:
    for state in RotationState:
        assert TRANSITIONS[(state, RotationEvent.DEPOSED)] is RotationState.IDLE


class Harness:
    """The task's surroundings: a cluster that it sees, and rotations that may fail."""

    def __init__(self, settings: RotationSettings = SETTINGS) -> None:
        self.clock = FakeClock()
        self.view: View | Exception = View(True, False, {Purpose.STORAGE: FRESH,
                                                         Purpose.RAFT: FRESH})
        self.made: list[tuple[Purpose, int]] = []
        self.error: Exception | None = None
        self.fatal: list[BaseException] = []
        self.failures: list[list[RotationState]] = []
        self.task = AutomaticRotation(settings, self.look, self.rotate, self.clock,
                                      on_fatal=self.fatal.append,
                                      on_failed=lambda: self.failures.append(self.states()))

    def look(self) -> View:
        if isinstance(self.view, Exception):
            raise self.view
        return self.view

    async def rotate(self, purpose: Purpose, dek_id: int) -> None:
        self.made.append((purpose, dek_id))
        if isinstance(self.error, NotLeader):
            self.view = View(False, True, {})
        if self.error is not None:
            raise self.error

    def states(self) -> list[RotationState]:
        return [self.task.state(purpose) for purpose in Purpose]

    async def steps(self) -> None:
        for purpose in Purpose:
            await self.task.step(purpose)


DUE = View(True, False, {Purpose.STORAGE: DekFacts(7, 0.0, 950, 1), Purpose.RAFT: FRESH})


async def test_damage_in_what_the_rule_looks_at_is_fatal() -> None:
    harness = Harness()
    harness.view = StoreCorrupt("a nonce usage row does not parse")
    harness.task.start()
    await until(lambda: bool(harness.fatal))
    assert harness.fatal == [harness.view]
    assert not harness.task.relieves(Purpose.STORAGE)


async def test_only_what_is_due_is_rotated_and_only_by_the_leader() -> None:
    harness = Harness()
    await harness.steps()
    harness.view = View(False, True, DUE.dek_facts)
    await harness.steps()
    assert harness.made == []
    harness.view = DUE
    await harness.steps()
    assert harness.made == [(Purpose.STORAGE, 7)]


async def test_a_failed_rotation_is_tried_again_after_a_while() -> None:
    harness = Harness()
    harness.view, harness.error = DUE, NotCapable("n3 is down")
    await harness.steps()
    assert harness.failures == [[RotationState.WAITING, RotationState.IDLE]]
    await harness.steps()
    assert len(harness.made) == 1
    harness.clock.advance(RETRY_S)
    harness.error = None
    await harness.steps()
    assert len(harness.made) == 2
    assert harness.task.state(Purpose.STORAGE) is RotationState.IDLE


async def test_a_new_leader_does_not_wait_for_the_old_ones_retry() -> None:
    harness = Harness()
    harness.view, harness.error = DUE, NotCapable("n3 is down")
    await harness.steps()
    harness.view = View(False, True, {})
    await harness.steps()
    harness.view = DUE
    await harness.steps()
    assert len(harness.made) == 2


async def test_a_rotation_that_the_lead_was_lost_over_is_no_failure() -> None:
    harness = Harness()
    harness.view, harness.error = DUE, NotLeader()
    await harness.task.step(Purpose.STORAGE)
    assert harness.task.state(Purpose.STORAGE) is RotationState.IDLE


async def test_every_transition_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = Walked(TRANSITIONS)
    monkeypatch.setattr(rotation, "TRANSITIONS", walked)
    harness = Harness()
    for error in (NotCapable("n3 is down"), None, NotLeader(), NotCapable("n3 is down")):
        harness.view, harness.error = DUE, error
        await harness.steps()
        harness.clock.advance(RETRY_S)
    harness.view = View(False, True, {})
    await harness.steps()
    assert walked.keys_not_taken() == set()
    assert {event for _, event in TRANSITIONS} == set(RotationEvent)


STARTUP = RotationSettings(Limits(1 << 32), on_startup=True)
SOUND = {Purpose.STORAGE: FRESH, Purpose.RAFT: FRESH}


async def test_rotate_on_startup_is_done_once_by_the_leader() -> None:
    harness = Harness(STARTUP)
    harness.view = View(False, False, {})
    await harness.steps()
    harness.view = View(True, False, SOUND)
    await harness.steps()
    await harness.steps()
    assert [purpose for purpose, _ in harness.made] == BOTH


ACTIVE = {purpose: FRESH.dek_id for purpose in Purpose}
FOLLOWS = View(False, True, {}, ACTIVE)
BOTH = [Purpose.STORAGE, Purpose.RAFT]
ROTATED = {purpose: FRESH.dek_id + 1 for purpose in Purpose}


@pytest.mark.parametrize(("meanwhile", "expected"), [
    pytest.param(FOLLOWS, BOTH, id="the first leader ended before it rotated"),
    pytest.param(View(False, True, {}), BOTH, id="a member without a sidecar yet"),
    pytest.param(View(False, True, {}, ROTATED), [], id="the first leader has rotated"),
    pytest.param(View(False, False, {}, ROTATED), [], id="it has rotated and ended"),
])
async def test_rotate_on_startup_is_left_to_the_first_leader_until_it_ends(
        meanwhile: View, expected: list[Purpose]) -> None:
    harness = Harness(STARTUP)
    harness.view = FOLLOWS
    await harness.steps()
    harness.view = meanwhile
    await harness.steps()
    harness.view = View(True, False, SOUND, meanwhile.active_deks)
    await harness.steps()
    await harness.steps()
    assert [purpose for purpose, _ in harness.made] == expected


async def test_rotate_on_startup_is_not_done_by_one_that_leads_later() -> None:
    harness = Harness(STARTUP)
    harness.view = FOLLOWS
    await harness.steps()
    harness.clock.advance(STARTUP_S)
    await harness.steps()
    harness.view = View(True, False, SOUND)
    await harness.steps()
    assert harness.made == []


async def test_rotate_on_startup_before_the_bootstrap_rotates_nothing_later() -> None:
    harness = Harness(STARTUP)
    harness.view = View(True, False, {})
    await harness.steps()
    harness.view = View(True, False, SOUND)
    await harness.steps()
    assert harness.made == []


async def test_one_member_of_three_rotates_on_startup(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3)
    leader = await cluster.leader()
    await leader.encrypt()
    await cluster.settled()
    before = set(leader.sidecar.keys)
    for node in cluster.nodes.values():
        await node.stop()
    cluster.options["rotation"] = STARTUP
    for name in list(cluster.nodes):
        await cluster.make(name).start()
    await until(lambda: all(len(node.sidecar.keys) == len(before) + 2
                            for node in cluster.nodes.values()))
    leader = await cluster.leader()
    await leader.put(b"k")
    other = next(name for name, node in cluster.nodes.items() if node is not leader)
    await cluster.hand_over(other)
    await until(lambda: cluster.nodes[other].engine.is_leader())
    await cluster.nodes[other].put(b"k")
    assert len(cluster.nodes[other].sidecar.keys) == len(before) + 2
