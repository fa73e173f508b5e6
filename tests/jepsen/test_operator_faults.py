"""Operators' calls that do not simply succeed: what is a breach, and what only looks like one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from elastickv.errors import EncryptionConflict, NoLeader
from jepsen.cluster import Cluster
from jepsen.faults import Fault, NotNow, Violation, encryption
from jepsen.faults.encryption import Bootstrap

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


class Operated:
    """A cluster of three, of which the tests say what each client is answered."""

    def __init__(self) -> None:
        self.nodes = ["n1", "n2", "n3"]
        self.admins = {node: SimpleNamespace(encryption=SimpleNamespace(), raft=SimpleNamespace())
                       for node in self.nodes}
        self.operator = SimpleNamespace(encryption=SimpleNamespace(), raft=SimpleNamespace(),
                                        close=Script(None))
        self.leader = Script("n1")

    def new_client(self, first: str, timeout_s: float) -> SimpleNamespace:
        return self.operator

    def admin(self, node: str) -> SimpleNamespace:
        return self.admins[node]

    def others(self, nodes: Sequence[str]) -> list[str]:
        return [node for node in self.nodes if node not in nodes]


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
