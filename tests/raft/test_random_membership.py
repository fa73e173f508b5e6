"""Members that are added, promoted, removed and added again under their names, on empty disks,
while others are down, cut off, or learn of it late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from raft_lab import Lab, LabNode, outcome, run

from elastickv.errors import RemovedFromCluster
from elastickv.raft.engine import Entry, Member, Suffrage
from elastickv.raft.membership import ChangeKind, MembershipChange

NAMES = [f"n{number}" for number in range(1, 6)]
FEWEST_VOTERS = 2
"""A voter beside a single one is needed at once, whatever others remember of its name."""
STEPS = 80
TIMEOUT_S = 3.0


class Membership:
    """One seeded run, by an operator who adds a node under a name that was removed only with an
    empty disk, and removes a leader only after it has handed over."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.all_start = bool(seed % 2)
        self.lab = Lab(3, segment_bytes=self.random.choice([300, 2000]),
                       compact_entries=self.random.choice([5, 40]),
                       keep_entries=self.random.choice([2, 10]), compact_bytes=2000,
                       snapshot_chunk_bytes=self.random.choice([30, 1000]))
        self.up: set[str] = set()
        self.chosen: dict[int, Entry] = {}
        self.acknowledged: list[bytes] = []
        self.writes: list[asyncio.Task[None]] = []
        self.changes: dict[ChangeKind, int] = dict.fromkeys(ChangeKind, 0)
        self.misremembered: set[str] = set()
        """Who was added while somebody had yet to learn that its name was removed."""

    async def main(self) -> None:
        for node in self.lab.nodes.values():
            await self.start(node)
        await self.lab.leader()
        deeds: list[Callable[[], object]] = [
            self.write, self.write, self.add, self.add, self.promote, self.remove, self.stop_one,
            self.start_one, self.start_one, self.isolate, self.lab.hub.heal, self.transfer]
        for _ in range(STEPS):
            done = self.random.choice(deeds)()
            if asyncio.iscoroutine(done):
                await done
            await asyncio.sleep(self.random.choice([0.0, 0.1, 0.5, 2.0]))
            self.check()
        await self.recover()

    # --- what happens ---

    async def start(self, node: LabNode) -> None:
        if not isinstance(await outcome(node.start()), RemovedFromCluster):
            self.up.add(node.node_id)

    def leader(self) -> LabNode | None:
        leading = [node for node in self.running() if node.engine.is_leader()]
        return max(leading, key=lambda node: node.status().term, default=None)

    def running(self) -> list[LabNode]:
        return [self.lab.nodes[name] for name in sorted(self.up)]

    def write(self) -> None:
        if (leader := self.leader()) is not None:
            for _ in range(self.random.randrange(1, 30)):
                payload = b"%d" % len(self.writes)
                self.writes.append(asyncio.ensure_future(self.write_one(leader, payload)))

    async def write_one(self, leader: LabNode, payload: bytes) -> None:
        if await outcome(leader.engine.propose(payload, timeout_s=TIMEOUT_S)) == payload:
            self.acknowledged.append(payload)

    async def change(self, leader: LabNode, kind: ChangeKind, name: str, address: str = "") -> None:
        found = await outcome(leader.engine.change_members(
            MembershipChange(kind, name, address), timeout_s=TIMEOUT_S))
        self.changes[kind] += isinstance(found, int)

    async def add(self) -> None:
        leader = self.leader()
        if leader is None or isinstance(
                await outcome(leader.engine.propose(b"probe", timeout_s=1)), BaseException):
            return
        members = {member.node_id for member in leader.engine.members()}
        free = [name for name in NAMES if name not in members]
        if not free or leader.status().pending_configuration:
            return
        name = self.random.choice(free)
        if name in self.up and not self.lab.nodes[name].fatal:
            return  # the operator waits until it has learnt of its removal
        if name in self.lab.nodes:
            self.stop(self.lab.nodes[name])
        self.misremembered.discard(name)
        if any(other.state.applied_index < leader.status().configuration_index
               for other in self.lab.nodes.values() if other.node_id != name):
            self.misremembered.add(name)
        number = NAMES.index(name) + 1
        node = LabNode(self.lab, Member(name, f"host{number}:1"), joining=True)
        self.lab.nodes[name] = node
        await self.start(node)
        await asyncio.sleep(0.2)
        kind = self.random.choice([ChangeKind.ADD_VOTER, ChangeKind.ADD_LEARNER])
        await self.change(leader, kind, name, node.member.address)

    async def promote(self) -> None:
        if (leader := self.leader()) is not None:
            learners = [member.node_id for member in leader.engine.members()
                        if member.suffrage is Suffrage.LEARNER]
            if learners:
                await self.change(leader, ChangeKind.PROMOTE, self.random.choice(learners))

    async def remove(self) -> None:
        leader = self.leader()
        if leader is None:
            return
        member = self.random.choice(leader.engine.members())
        voters = [one for one in leader.engine.members() if one.suffrage is Suffrage.VOTER]
        if member.node_id == leader.node_id:
            await self.transfer()
        elif member.suffrage is Suffrage.LEARNER or len(voters) > FEWEST_VOTERS:
            await self.change(leader, ChangeKind.REMOVE, member.node_id)

    async def transfer(self) -> None:
        if (leader := self.leader()) is not None:
            await outcome(leader.engine.transfer_leadership("", timeout_s=1))

    def isolate(self) -> None:
        self.lab.hub.isolate(self.random.choice(sorted(self.lab.nodes)))

    def stop(self, node: LabNode) -> None:
        if node.node_id in self.up:
            node.kill()
            self.up.discard(node.node_id)

    def stop_one(self) -> None:
        self.stop(self.lab.nodes[self.random.choice(sorted(self.lab.nodes))])

    async def start_one(self) -> None:
        down = sorted(self.lab.nodes.keys() - self.up)
        if down:
            await self.start(self.lab.nodes[self.random.choice(down)])

    # --- what must hold ---

    def check(self) -> None:
        for node in self.running():
            for error in node.fatal:
                assert isinstance(error, RemovedFromCluster), f"{node.node_id}: {error!r}"
            assert not node.engine._trust.suspect or node.node_id in self.misremembered, \
                f"{node.node_id} is said to have lost data"
        for node in self.lab.nodes.values():
            for entry in node.state.entries:
                chosen = self.chosen.setdefault(entry.index, entry)
                assert chosen == entry, f"entry {entry.index} differs"

    async def recover(self) -> None:
        """With everybody up, members agree, there is a leader, and nothing acknowledged is lost."""
        self.lab.hub.heal()
        if self.all_start:
            for node in self.running():
                self.stop(node)
        for name in sorted(self.lab.nodes.keys() - self.up):
            await self.start(self.lab.nodes[name])
        await self.lab.until(lambda: self.leader() is not None, timeout_s=60)
        while (leader := self.leader()) is None or await outcome(
                leader.engine.propose(b"the end", timeout_s=TIMEOUT_S)) != b"the end":
            await asyncio.sleep(0.1)
        members = [self.lab.nodes[member.node_id] for member in leader.engine.members()]
        await self.lab.until(lambda: all(
            node.state.payloads()[-1:] == [b"the end"] and node.engine.members()
            == leader.engine.members() for node in members), timeout_s=60)
        self.check()
        await asyncio.sleep(2 * TIMEOUT_S)
        missing = set(self.acknowledged) - set(leader.state.payloads())
        assert not missing, f"acknowledged and lost: {sorted(missing)[:3]}"
        assert not any(node.engine._trust.suspect for node in members)


@pytest.mark.parametrize("seed", range(24))
def test_members_come_and_go(seed):
    run(Membership(seed).main())


def test_every_change_happens():
    done = dict.fromkeys(ChangeKind, 0)
    for seed in range(100, 104):
        membership = Membership(seed)
        run(membership.main())
        for kind, count in membership.changes.items():
            done[kind] += count
    assert min(done.values()) > 3, done
