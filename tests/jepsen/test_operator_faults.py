"""Operators' calls that do not simply succeed: what is a breach, and what only looks like one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from elastickv.client import Role
from elastickv.errors import (
    ElasticKVError,
    EncryptionConflict,
    ExitCode,
    InvalidArgument,
    MembershipConflict,
    NoLeader,
    OutcomeUnknown,
    Unimplemented,
)
from elastickv.keys.sidecar import RELATIVE_PATH
from jepsen.cluster import Cluster
from jepsen.faults import Fault, NotAvailable, NotNow, Violation, encryption, membership
from jepsen.faults.encryption import Bootstrap, Resync
from jepsen.faults.membership import Membership, Transfer

Answer = object
"""What a call returns, or an exception for it to raise."""


class Script:
    """A call that gives each answer in turn, and the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.calls: list[tuple[object, ...]] = []

    async def __call__(self, *arguments: object, **options: object) -> Answer:
        self.calls.append(arguments)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeProcess:
    """One that ends as it should when its node is removed."""

    def __init__(self) -> None:
        self.is_running = True
        self.expected_codes: frozenset[int] = frozenset()
        self.command = ["as a founder"]

    async def wait(self, timeout_s: float) -> int:
        self.is_running = False
        return int(ExitCode.REMOVED)

    async def kill(self) -> None:
        self.is_running = False

    def thaw(self) -> None:
        """Never frozen."""


class Operated:
    """A cluster of three, of which the tests say what each client is answered."""

    def __init__(self) -> None:
        self.nodes = ["n1", "n2", "n3"]
        self.admins = {node: SimpleNamespace(encryption=SimpleNamespace(), raft=SimpleNamespace())
                       for node in self.nodes}
        self.operator = SimpleNamespace(encryption=SimpleNamespace(), raft=SimpleNamespace(),
                                        close=Script(None))
        self.leader = Script("n1")
        self.processes = {node: FakeProcess() for node in self.nodes}
        self.network = SimpleNamespace(raft_address=lambda node: f"{node}:1")
        self.wiped: list[str] = []

    def new_client(self, first: str, timeout_s: float) -> SimpleNamespace:
        return self.operator

    def admin(self, node: str) -> SimpleNamespace:
        return self.admins[node]

    def others(self, nodes: Sequence[str]) -> list[str]:
        return [node for node in self.nodes if node not in nodes]


    def take_disk_away(self, node: str) -> None:
        assert not self.processes[node].is_running
        self.wiped.append(node)

    def joining_command(self, node: str) -> list[str]:
        return ["to join"]

    async def restart(self, node: str) -> None:
        self.processes[node].is_running = True


def fault_on(cluster: Operated, kind: type[Fault]) -> Fault:
    return kind(cast("Cluster", cluster), random.Random(1))


KEYS, NO_KEYS = SimpleNamespace(active_storage_id=7), SimpleNamespace(active_storage_id=0)
AWAY = NoLeader("none")


@pytest.mark.parametrize(("answers", "outcome"), [
    pytest.param([[KEYS]] * 3, "refused a second time", id="a second one"),
    pytest.param([[NO_KEYS], [KEYS], [KEYS]], "refused a second time", id="by way of a wiped node"),
    pytest.param([[NO_KEYS, KEYS], [AWAY], [AWAY]], "refused a second time",
                 id="a node that only just has its keys back"),
    pytest.param([[AWAY], [AWAY, KEYS], [NO_KEYS]], "refused a second time",
                 id="a node that was away"),
    pytest.param([[NO_KEYS]] * 3, Violation("there was no first"), id="no first one"),
    pytest.param([[NO_KEYS], [NO_KEYS], [AWAY]], NotNow("not every node"), id="nobody knows"),
])
async def test_a_bootstrap_that_is_refused(monkeypatch: pytest.MonkeyPatch,
                                           answers: Sequence[Sequence[Answer]],
                                           outcome: str | Exception) -> None:
    monkeypatch.setattr(encryption, "POLL_S", 0.001)
    monkeypatch.setattr(encryption, "REPAIR_TIMEOUT_S", 60.0 if isinstance(outcome, str) else 0.05)
    cluster = Operated()
    cluster.operator.encryption.bootstrap = Script(EncryptionConflict("done before"))
    cluster.operator.encryption.sidecar_state = Script(*answers[0])
    for node, said in zip(cluster.nodes, answers, strict=True):
        cluster.admins[node].encryption.sidecar_state = Script(*said)
    fault = fault_on(cluster, Bootstrap)
    if isinstance(outcome, str):
        assert await fault.inject() == outcome
    else:
        with pytest.raises(type(outcome), match=str(outcome)):
            await fault.inject()


LEADS = SimpleNamespace(role=Role.LEADER, pending_configuration=False)
PENDING = SimpleNamespace(role=Role.LEADER, pending_configuration=True)
DEPOSED = SimpleNamespace(role=Role.FOLLOWER, pending_configuration=False)
WITH = [SimpleNamespace(node_id=node) for node in ("n1", "n2", "n3")]
NO_MEMBER, LOST = InvalidArgument("no member"), OutcomeUnknown("lost")


def members_without(node: str) -> list[SimpleNamespace]:
    return [member for member in WITH if member.node_id != node]


async def chosen_node() -> str:
    """Whom the fault removes."""
    return await fault_on(Operated(), Membership).some_node(prefer_leader=0.3)


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "POLL_S", 0.001)
    monkeypatch.setattr(membership, "CHANGED_TIMEOUT_S", 0.05)


@pytest.mark.parametrize(("removals", "says_with", "states"), [
    pytest.param([7], 0, [LEADS], id="removed"),
    pytest.param([LOST], 0, [LEADS], id="it was lost, and took effect"),
    pytest.param([LOST, NO_MEMBER], 1, [LEADS], id="it took effect later"),
    pytest.param([NO_MEMBER], 0, [LEADS], id="the client had asked twice"),
    pytest.param([MembershipConflict("under way"), 7], 1, [LEADS], id="another one was under way"),
    pytest.param([LOST, 7], 0, [PENDING], id="a leader that may lose it"),
    pytest.param([LOST, 7], 0, [DEPOSED], id="a leader that is none any more"),
    pytest.param([LOST, 7], 0, [AWAY], id="a leader that does not say"),
])
@pytest.mark.usefixtures("briefly")
async def test_a_removal_is_asked_for_until_the_leader_says_that_it_is_done(
        monkeypatch: pytest.MonkeyPatch, removals: Sequence[Answer], says_with: int,
        states: Sequence[Answer]) -> None:
    monkeypatch.setattr(membership, "CHANGED_TIMEOUT_S", 60.0)
    cluster, node = Operated(), await chosen_node()
    raft, leader = cluster.operator.raft, cluster.admins["n1"].raft
    raft.remove_server = Script(*removals)
    raft.members = Script(WITH)  # It asks one that is behind.
    leader.members = Script(*[WITH] * says_with, members_without(node))
    leader.status = Script(*states)
    assert await fault_on(cluster, Membership).inject() == f"{node} removed"
    assert len(raft.remove_server.calls) == len(removals)


@pytest.mark.parametrize(("error", "raised", "is_member", "is_anew"), [
    pytest.param(Unimplemented("no"), NotAvailable, True, False, id="there is no such call"),
    pytest.param(MembershipConflict("no majority"), MembershipConflict, True, False,
                 id="it was refused to the end"),
    pytest.param(LOST, OutcomeUnknown, True, False, id="it was lost without effect"),
    pytest.param(LOST, OutcomeUnknown, False, True, id="it was lost, and took effect in the end"),
])
@pytest.mark.usefixtures("briefly")
async def test_only_a_member_that_is_none_any_more_joins_anew(
        error: ElasticKVError, raised: type[Exception], is_member: bool, is_anew: bool) -> None:
    cluster, node = Operated(), await chosen_node()
    cluster.operator.raft.remove_server = Script(error)
    cluster.operator.raft.members = Script(WITH)
    cluster.operator.raft.add_voter = Script(7)
    leader = cluster.admins["n1"].raft
    leader.members, leader.status = Script(WITH), Script(LEADS)
    fault = fault_on(cluster, Membership)
    with pytest.raises(raised):
        await fault.inject()
    leader.members = Script(WITH if is_member else members_without(node))
    await fault.heal()
    assert cluster.wiped == [node] * is_anew
    assert cluster.processes[node].is_running
    assert cluster.processes[node].command == (["to join"] if is_anew else ["as a founder"])
    assert cluster.operator.raft.add_voter.calls == [(node, f"{node}:1")] * is_anew


@pytest.mark.usefixtures("briefly")
async def test_an_addition_is_asked_for_until_the_leader_says_that_it_is_done(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "CHANGED_TIMEOUT_S", 60.0)
    cluster, node = Operated(), await chosen_node()
    raft, leader = cluster.operator.raft, cluster.admins["n1"].raft
    raft.remove_server, raft.members = Script(7), Script(WITH)
    raft.add_voter = Script(MembershipConflict("it only just started"), LOST)
    leader.status = Script(LEADS)
    leader.members = Script(members_without(node), members_without(node), WITH)
    fault = fault_on(cluster, Membership)
    await fault.inject()
    await fault.heal()
    assert len(raft.add_voter.calls) == 2
    assert cluster.wiped == [node]


@pytest.mark.parametrize("leaders", [
    pytest.param([None, "n1", "n1", "n1"], id="a moment without a leader"),
    pytest.param(["n2", "n1", "n1", "n1"], id="another leader at first")])
async def test_who_leads_does_not_change_whom_later_transfers_are_to(leaders: list[str | None]
                                                                     ) -> None:
    async def targets(leaders: Sequence[str | None]) -> list[object]:
        cluster = Operated()
        cluster.operator.raft.transfer_leadership = Script(None)
        fault = fault_on(cluster, Transfer)
        for leader in leaders:
            cluster.leader = Script(leader, "n3" if leader != "n3" else "n2")
            with contextlib.suppress(NotNow):
                await fault.inject()
        return [target for target, in cluster.operator.raft.transfer_leadership.calls[-3:]]

    assert await targets(leaders) == await targets(["n1"] * 4)


async def test_a_moment_without_keys_does_not_change_what_later_happens_to_a_sidecar(
        tmp_path: Path) -> None:
    async def fates(states: Sequence[Answer]) -> list[str]:
        cluster = Operated()
        cluster.data_directory = lambda node: tmp_path / node  # type: ignore[attr-defined]
        fault = fault_on(cluster, Resync)
        found = []
        for state in states:
            for node in cluster.nodes:
                sidecar = tmp_path / node / RELATIVE_PATH
                sidecar.parent.mkdir(parents=True, exist_ok=True)
                sidecar.write_bytes(bytes(1000))
                cluster.admins[node].encryption.sidecar_state = Script(state)
            with contextlib.suppress(NotNow):
                how = await fault.inject()
                sizes = [path.stat().st_size if (path := tmp_path / node / RELATIVE_PATH).exists()
                         else -1 for node in cluster.nodes]
                found.append(f"{how} {sizes}")
        return found

    assert await fates([NO_KEYS, *[KEYS] * 6]) == (await fates([KEYS] * 7))[1:]
