"""Random faults of disks against whole engines: power cuts that take what was not synced, disks
that are full for some writes and not for others, emptied ones and ones from the past, while the
members are cut off from one another and leaders of the past go on leading."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from raft_lab import LabNode, MemoryDisk, MemoryFile, run
from test_random_faults import Chaos

from elastickv.durable import DiskFile
from elastickv.errors import DiskFull, ElasticKVError
from elastickv.raft.core import LEADER
from elastickv.raft.peer_memory import known_term, what_was_lost

KNOWN_AFTER_S = 1.0
"""Those who remember a node have told it by then, if nothing keeps them from it."""
FULL_FOR: list[tuple[str, ...]] = [("append",), ("replace",), ("append", "replace"), (), ()]


class _File(MemoryFile):
    def __init__(self, disk: Disk, path: Path, size: int | None = None) -> None:
        super().__init__(disk, path, size)
        self._synced = disk.synced

    def sync(self) -> None:
        super().sync()
        self._synced[self._path] = bytes(self.data)


class Disk(MemoryDisk):
    """Remembers what a power cut leaves."""

    def __init__(self, files: dict[Path, bytearray] | None = None) -> None:
        super().__init__()
        self.files = files or {}
        self.synced = {path: bytes(data) for path, data in self.files.items()}

    def open_append(self, path: Path) -> DiskFile:
        super().open_append(path)
        return _File(self, path)

    def reuse(self, source: Path, target: Path, head: bytes) -> DiskFile:
        super().reuse(source, target, head)
        self.synced[target] = bytes(self.files[target])
        return _File(self, target, len(head))

    def replace(self, path: Path, data: bytes) -> None:
        super().replace(path, data)
        self.synced[path] = data

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.synced[target] = self.synced.pop(source)

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.synced.pop(path, None)

    def cut_power(self, generator: random.Random) -> None:
        """Of what was only appended, a part may be left."""
        for path, data in self.files.items():
            synced = self.synced[path]
            end = max(len(synced), generator.choice([0, generator.randrange(len(data) + 1)]))
            self.files[path] = data[:end] if data.startswith(synced) else bytearray(synced)
            self.synced[path] = bytes(self.files[path])


class Disks(Chaos):
    """One seeded run. One disk at a time is lost, and those who remember its node are heard."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.lab.overrides |= {"housekeeping_s": 0.2, "full_disk_pause_s": 1.0,
                               "leader_fallback_s": self.random.choice([1.0, 3.0, 10.0])}
        for node in self.lab.nodes.values():
            node.disk = Disk()
        self.copies: dict[str, tuple[dict[Path, bytearray], int, float]] = {}
        self.forgot_at: dict[str, float] = {}
        self.lost = ""
        self.told_at = 0.0
        self.reads: list[asyncio.Task[None]] = []
        self.last_index = 0
        self.counts = {"cut": 0, "full": 0, "old": 0, "empty": 0, "read": 0, "suspect": 0}

    # --- what happens ---

    def noted(self, node: LabNode) -> Any:
        changed = node.engine.state_changed

        def note(old: int, new: int) -> None:
            if new == LEADER:
                term = node.core.term()
                assert self.leaders.setdefault(term, node.node_id) == node.node_id, \
                    f"two leaders in term {term}"
            changed(old, new)

        node.core._SyncObj__conf.onStateChanged = note
        return lambda role, term: None

    async def write(self, node: LabNode) -> None:
        self.counter += 1
        payload = b"%d-" % self.counter + b"x" * self.random.randrange(60)
        try:
            await node.engine.propose(payload, timeout_s=2)
        except ElasticKVError:
            return
        self.acknowledged.append(payload)
        self.last_index = max(self.last_index, next(
            entry.index for entry in reversed(node.state.entries) if entry.payload == payload))

    def read(self, node: LabNode) -> None:
        async def read() -> None:
            acknowledged = self.last_index
            try:
                index = await node.engine.read_index(timeout_s=1)
            except ElasticKVError:
                return
            assert index >= acknowledged, f"{node.node_id} reads at {index}, not {acknowledged}"
            self.counts["read"] += 1

        self.reads.append(asyncio.ensure_future(read()))

    async def fault(self) -> None:
        nodes = list(self.lab.nodes.values())
        node, other = self.random.sample(nodes, 2)
        is_up = node.node_id not in self.down
        if is_up:
            self.read(node)
        match self.random.randrange(13):
            case 0 | 1 | 2:
                self.cut(node, other)
            case 3:
                for one in nodes:
                    if one is not node:
                        self.cut(node, one)
            case 4 | 5:
                self.lab.hub.heal()
            case 6 if is_up and not self.is_being_told():
                self.kill(node)
            case 7:
                node.disk.fail = dict.fromkeys(self.random.choice(FULL_FOR), DiskFull("full"))
                self.counts["full"] += 1
            case 8 | 11 if is_up:
                now = asyncio.get_running_loop().time()
                self.copies[node.node_id] = node.disk.copy(), node.state.durable_index, now
            case 9:
                copied = self.random.choice([node.node_id, *sorted(self.copies)])
                await self.lose(self.lab.node(copied))
            case 10:
                node.offload.holding = not node.offload.holding
                if not node.offload.holding:
                    node.offload.release()
            case _:
                await self.start_all()

    def is_being_told(self) -> bool:
        return asyncio.get_running_loop().time() < self.told_at

    def cut(self, first: LabNode, second: LabNode) -> None:
        if not (self.is_being_told() and self.lost in (first.node_id, second.node_id)):
            self.lab.hub.isolate(first.node_id, [second.node_id])

    def kill(self, node: LabNode) -> None:
        memory, trust = node.engine._storage.memory, node.engine._trust
        if trust._unwritten_loss or trust._unwritten_floor != (0, 0):
            return  # a full disk would let it forget what it was told
        if memory._written_version != memory._version:
            self.forgot_at[node.node_id] = asyncio.get_running_loop().time()
        super().kill(node)
        if self.random.random() < 0.6:
            node.disk.cut_power(self.random)
            self.counts["cut"] += 1

    async def lose(self, node: LabNode) -> None:
        """Its disk is emptied, or put back from a copy."""
        name, others = node.node_id, [n for n in self.lab.nodes.values() if n is not node]
        if self.down or self.lost or any(
                one.engine._trust._waiting or one.engine._trust.suspect
                or one.engine._trust._floor() != (0, 0) for one in (node, *others)):
            return
        files, applied, at = self.copies.pop(name, ({}, 0, 0.0))
        memories = [one.engine._storage.memory.of(name) for one in others]
        if files:
            is_known = all(self.forgot_at.get(one.node_id, 0.0) < at for one in others)
        else:
            is_known = any(memory is not None and known_term(memory) >= node.core.term()
                           for memory in memories)
        if not is_known:
            return
        self.kill(node)
        self.lost = name
        node.disk = Disk(files)
        node.state.entries = [e for e in node.state.entries if e.index <= applied]
        node.overrides = {"joining": not files and self.random.random() < 0.5}
        self.told_at = asyncio.get_running_loop().time() + KNOWN_AFTER_S
        self.lab.hub.cut_pairs = {pair for pair in self.lab.hub.cut_pairs if name not in pair}
        await self.start_all()
        node.disk.fail = dict.fromkeys(self.random.choice(FULL_FOR), DiskFull("full"))
        self.counts["old" if files else "empty"] += 1

    async def start_all(self) -> None:
        for name in sorted(self.down):
            node = self.lab.node(name)
            try:
                await node.start()
            except DiskFull:
                node.links.vanish()
            else:
                self.down.discard(name)
                node.engine.on_role_change(self.noted(node))

    # --- what must hold ---

    def check(self) -> None:
        super().check()
        for node in self.lab.nodes.values():
            if node.node_id not in self.down and node.engine._trust.suspect:
                self.counts["suspect"] += 1
                assert node.node_id == self.lost, f"{node.node_id} has lost nothing"
        if self.lost and not self.down and not self.is_being_told() \
                and self.has_recovered(self.lab.node(self.lost)):
            self.lost = ""
        for read in [read for read in self.reads if read.done()]:
            read.result()
            self.reads.remove(read)

    def has_recovered(self, node: LabNode) -> bool:
        """From the loss of its disk. What it had acknowledged and nobody had committed, others may
        remember for longer than it is a suspect."""
        trust, position = node.engine._trust, node.engine._storage.position()
        memories = [other.engine._storage.memory.of(node.node_id)
                    for other in self.lab.others(node)]
        return (not trust.suspect and trust._floor() == (0, 0)
                and trust._caught_up_term >= max(self.leaders, default=0)
                and not any(memory and what_was_lost(memory, position) for memory in memories))

    async def recover(self) -> None:
        for node in self.lab.nodes.values():
            node.disk.fail = {}
        await super().recover()


@pytest.mark.parametrize("seed", [*range(11), 1250])
def test_promises_hold_whatever_becomes_of_one_disk(seed):
    run(Disks(seed).main())


def test_every_fault_of_a_disk_happens():
    counts: dict[str, int] = {}
    for seed in range(100, 108):
        disks = Disks(seed)
        run(disks.main())
        for kind, count in disks.counts.items():
            counts[kind] = counts.get(kind, 0) + count
    assert all(counts.values()), counts
