"""Random faults against whole engines in the laboratory, and the promises checked after each step.

The simulator in `tests/sim` goes further (fake disks, the store, encryption); this one knows only
the engine, and is quick.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from raft_lab import Lab, LabNode, run

from elastickv.errors import ElasticKVError, PeerError
from elastickv.raft import rules
from elastickv.raft.engine import Entry, Role
from elastickv.raft.frames import AnyMessage, Request, Response
from elastickv.raft.pysyncobj_core import RaftCore
from elastickv.raft.pysyncobj_seams import peer_node, use_clock
from elastickv.raft.rules import AppendPlan

SMALL = {"segment_bytes": 600, "compact_bytes": 2000, "keep_entries": 5,
         "snapshot_chunk_bytes": 400, "batch_bytes": 600, "window_bytes": 3000}
STEPS = 60


class Chaos:
    """One seeded run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lab = Lab(self.random.choice([3, 3, 5]), **SMALL)
        self.down: set[str] = set()
        self.chosen: dict[int, Entry] = {}
        self.leaders: dict[int, str] = {}
        self.acknowledged: list[bytes] = []
        self.counter = 0
        self.tasks: dict[asyncio.Task[None], str] = {}
        self.installed = 0
        self.restored = 0
        self.backups: dict[str, tuple[dict[Path, bytearray], int]] = {}

    def rule(self, source: str, target: str, message: AnyMessage) -> int:
        if isinstance(message, Request | Response):
            return 1
        fate = self.random.random()
        return 0 if fate < self.loss else 2 if fate > 1 - self.loss else 1

    loss = 0.0

    async def main(self) -> None:
        for node in self.lab.nodes.values():
            await node.start()
            node.engine.on_role_change(self.noted(node))
        self.lab.hub.rule = self.rule
        for _ in range(STEPS):
            self.loss = self.random.choice([0.0, 0.0, 0.02, 0.2])
            for _ in range(self.random.randrange(30)):
                self.propose()
            if self.random.random() < 0.7:
                await self.fault()
            await asyncio.sleep(self.random.choice([0.01, 0.05, 0.3, 1.5]))
            self.check()
        await self.recover()

    def noted(self, node: LabNode) -> Any:
        def note(role: Role, term: int) -> None:
            if role is Role.LEADER:
                assert self.leaders.setdefault(term, node.node_id) == node.node_id, \
                    f"two leaders in term {term}"
        return note

    def propose(self) -> None:
        up = [node for node in self.lab.nodes.values() if node.node_id not in self.down]
        node = next((n for n in up if n.engine.is_leader() and self.random.random() < 0.8),
                    self.random.choice(up) if up else None)
        if node is not None:
            self.tasks[asyncio.ensure_future(self.write(node))] = node.node_id

    async def write(self, node: LabNode) -> None:
        self.counter += 1
        payload = b"%d-" % self.counter + b"x" * self.random.randrange(60)
        try:
            await node.engine.propose(payload, timeout_s=2)
        except PeerError:
            return
        self.acknowledged.append(payload)

    async def fault(self) -> None:
        nodes = list(self.lab.nodes.values())
        node = self.random.choice(nodes)
        match self.random.randrange(14):
            case 0 | 1:
                self.lab.hub.isolate(node.node_id)
            case 2:
                half = self.random.sample(nodes, len(nodes) // 2)
                for one in half:
                    self.lab.hub.isolate(one.node_id, [n.node_id for n in nodes
                                                       if n not in half])
            case 3 | 4 | 5:
                self.lab.hub.heal()
            case 6:
                for other in nodes:
                    if other is not node:
                        self.lab.hub.disconnect(node.node_id, other.node_id)
                self.lab.hub.connect_all()
            case 7 | 8:
                if node.node_id not in self.down:
                    self.kill(node)
            case 9:
                await self.start_all()
            case 10:
                self.backups.setdefault(node.node_id, (node.disk.copy(),
                                                       node.state.durable_index))
            case 11:
                await self.restore()
            case 12:
                node.offload.holding = self.random.random() < 0.5
                if not node.offload.holding:
                    node.offload.release()
            case _:
                if node.node_id not in self.down and node.engine.is_leader():
                    self.tasks[asyncio.ensure_future(self.transfer(node))] = node.node_id

    async def restore(self) -> None:
        """An old copy of one node's whole disk is put back while the others are up and none of
        them has yet to recover from the same: more than one such loss at a time is too many."""
        if not self.backups or self.down or self.lab.hub.cut_pairs \
                or any(node.engine._trust.suspect or node.engine._trust.current_floor() != (0, 0)
                       for node in self.lab.nodes.values()):
            return
        node_id = self.random.choice(sorted(self.backups))
        files, applied_index = self.backups.pop(node_id)
        node = self.lab.node(node_id)
        self.kill(node)
        node.put_back(files, applied_index)
        await self.start_all()
        await asyncio.sleep(0.1)
        self.restored += 1

    def kill(self, node: LabNode) -> None:
        node.kill()
        self.down.add(node.node_id)
        for task in [t for t, owner in self.tasks.items() if owner == node.node_id]:
            task.cancel()

    async def transfer(self, node: LabNode) -> None:
        try:
            await node.engine.transfer_leadership("", timeout_s=0.5)
        except ElasticKVError:
            return

    async def start_all(self) -> None:
        for node_id in sorted(self.down):
            node = self.lab.node(node_id)
            await node.start()
            node.engine.on_role_change(self.noted(node))
        self.down.clear()

    def check(self) -> None:
        for node in self.lab.nodes.values():
            assert not node.fatal, f"{node.node_id}: {node.fatal[0]!r}"
            for entry in node.state.entries:
                chosen = self.chosen.setdefault(entry.index, entry)
                assert chosen == entry, f"entry {entry.index} differs"

    async def last_write(self) -> LabNode:
        while True:
            leader = await self.lab.leader()
            try:
                await leader.engine.propose(b"the end", timeout_s=5)
            except PeerError:
                await asyncio.sleep(0.05)
                continue
            return leader

    async def recover(self) -> None:
        """With everything well again, all agree and nothing acknowledged is missing."""
        self.loss = 0.0
        for node in self.lab.nodes.values():
            node.offload.release()
        await self.start_all()
        self.lab.hub.heal()
        leader = await self.last_write()
        await self.lab.until(lambda: all(
            node.state.payloads()[-1:] == [b"the end"] for node in self.lab.nodes.values()))
        self.check()
        payloads = [payload for payload in leader.state.payloads() if payload != b"the end"]
        assert len(payloads) == len(set(payloads)), "an entry was applied twice"
        missing = set(self.acknowledged) - set(payloads)
        assert not missing, f"acknowledged and lost: {sorted(missing)[:3]}"
        await asyncio.sleep(2)
        assert all(task.done() for task in self.tasks), "a proposal hangs past its deadline"
        assert all(task.cancelled() or task.exception() is None for task in self.tasks)
        self.installed = sum(n.engine._receiver.installed_count for n in self.lab.nodes.values())


@pytest.mark.parametrize("seed", range(16))
def test_promises_hold_under_random_faults(seed):
    chaos = Chaos(seed)
    run(chaos.main())


def run_of(seed: int) -> tuple[object, ...]:
    """What a run comes to. It is a function of its seed, so that one decision that is taken
    otherwise changes all that follows."""
    chaos = Chaos(seed)
    run(chaos.main())
    nodes = chaos.lab.nodes.values()
    return (chaos.leaders, chaos.acknowledged, chaos.installed,
            [(node.state.payloads(), node.status(), node.core.election_deadline(),
              node.core._SyncObj__leaderCommitIndex) for node in nodes])


@pytest.mark.parametrize("seed", range(200, 204))
def test_acknowledgements_past_the_library_end_as_those_through_it(seed, monkeypatch):
    counted = []

    def through_the_library(core: RaftCore, peer_id: str, next_index: int, *,
                            accepted: bool) -> None:
        use_clock(core._now)
        counted.append(accepted)
        before = core.next_index(peer_id)
        core._SyncObj__onMessageReceived(peer_node(peer_id), {
            "type": "next_node_idx", "next_node_idx": next_index, "reset": not accepted,
            "success": accepted})
        core.set_next_index(peer_id, rules.next_index_after_ack(
            before, core.next_index(peer_id), core.match_index(peer_id), accepted=accepted))

    short = run_of(seed)
    monkeypatch.setattr(RaftCore, "receive_ack", through_the_library)
    assert run_of(seed) == short
    assert counted.count(True) > 100
    assert False in counted


@pytest.mark.parametrize("seed", range(200, 204))
def test_appends_past_the_library_end_as_those_through_it(seed, monkeypatch):
    extended = []
    extend = RaftCore._extend

    def counted(core: RaftCore, plan: AppendPlan) -> None:
        extended.append(plan)
        extend(core, plan)

    monkeypatch.setattr(RaftCore, "_extend", counted)
    short = run_of(seed)
    assert sum(len(plan.entries) for plan in extended) > 100
    monkeypatch.setattr(RaftCore, "_follows", lambda core, peer_id, term: False)
    extended.clear()
    assert run_of(seed) == short
    assert extended == []


def test_the_runs_reach_what_they_are_about():
    """A fault that never happens proves nothing."""
    installed = elections = restored = acknowledged = 0
    for seed in range(100, 112):
        chaos = Chaos(seed)
        run(chaos.main())
        installed += chaos.installed
        elections += len(chaos.leaders)
        restored += chaos.restored
        acknowledged += len(chaos.acknowledged)
    assert min(installed, elections - 10, restored, acknowledged - 500) > 0
