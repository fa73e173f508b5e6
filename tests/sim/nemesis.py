"""Injects the faults of a plan, one after the other, and mends everything at the end.

A fault that destroys a node's data (a flipped bit, a restored old disk) strikes at most a minority:
Raft promises nothing beyond that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from elastickv.errors import ElasticKVError
from elastickv.raft.membership import ChangeKind, MembershipChange
from tests.sim.cluster import Cluster, Lost, Refused, SimNode, address_of
from tests.sim.disk import Inode, Medium

RESTART_S = (0.03, 0.4)
ALONE = ("bit-flip", "old-disk")
ALONE_LIMIT_S = 1.5
ABSENCE_LIMIT_S = 3.0
GHOST = "ghost"
"""A learner that is never started."""

RARE_KINDS = ("sidecar", "store")
"""Files that are often not there yet when a bit is flipped."""


@dataclass(frozen=True)
class BitFlip:
    """A bit that reads back changed, and the byte that it makes."""

    path: str
    inode: Inode
    offset: int
    bit: int
    byte: int

    def mend(self, medium: Medium) -> None:
        """Change it back, unless the place was written anew since."""
        medium.cut_power()
        if medium.files.get(self.path) is self.inode and self.offset < len(self.inode.durable) \
                and self.inode.durable[self.offset] == self.byte:
            medium.flip_bit(self.path, self.offset, self.bit)


class Nemesis:
    """One run's faults."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._generator = cluster.streams.stream("nemesis")
        self._loop = cluster.loop
        self._damaged: dict[str, list[BitFlip]] = {}
        self._copies: dict[str, dict[str, bytes]] = {}
        self._victims: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    async def run(self) -> None:
        """Inject faults for the plan's time."""
        plan, generator = self._cluster.plan, self._generator
        end = self._loop.now + plan.fault_s
        supervisor = asyncio.ensure_future(self._supervise())
        while self._loop.now < end:
            kind = generator.choice(plan.faults)
            self._cluster.trace.add("fault", kind)
            if kind in ALONE:
                await self._alone(kind)
            else:
                self._tasks.append(asyncio.ensure_future(_ACTIONS[kind](self)))
            await asyncio.sleep(plan.fault_gap_s * generator.uniform(0.3, 1.7))
        self._is_over = True
        await asyncio.gather(*self._tasks)
        await supervisor

    async def _alone(self, kind: str) -> None:
        """A fault that the design bears only while everybody else is up and within reach."""
        await asyncio.gather(*self._tasks)
        self._tasks.clear()
        self.heal(mend_disks=False)
        nodes = self._cluster.nodes
        await self._wait(lambda: all(node.serving or not node.is_usable for node in nodes))
        await _ACTIONS[kind](self)
        await self._wait(lambda: all(
            not node.is_usable or (node.serving and not node.engine._trust.suspect)
            for node in nodes))

    async def _wait(self, condition: Callable[[], bool], limit_s: float = ALONE_LIMIT_S) -> None:
        deadline = self._loop.now + limit_s
        while not condition() and self._loop.now < deadline:
            await asyncio.sleep(0.02)

    async def _supervise(self) -> None:
        """Restart what went down, as a service manager does."""
        while not self._is_over:
            for node in self._cluster.nodes:
                if not node.is_up and not node.stays_down and not node.needs_operator:
                    node.stays_down = True
                    self._loop.schedule(None, self._loop.now + self._generator.uniform(*RESTART_S),
                                        self._restart, node)
            await asyncio.sleep(0.02)

    def _restart(self, node: SimNode) -> None:
        node.stays_down = False
        if not node.is_up:
            node.start()

    def heal(self, *, mend_disks: bool = True) -> None:
        """Mend everything and start every node."""
        cluster = self._cluster
        cluster.disarm()
        cluster.network.heal()
        cluster.network.conditions.loss = cluster.network.conditions.duplication = 0.0
        cluster.network.conditions.spike = 0.0
        cluster.network.widen()
        for node in cluster.nodes:
            node.fills_when_installed = node.medium.is_full = False
            node.medium.room = None
            node.medium.failing_syncs = 0
            if node.life is not None and node.life.paused:
                self._resume(node)
            if mend_disks and node.name in self._damaged:
                node.crash()
                node.needs_operator = False
                for flip in reversed(self._damaged.pop(node.name)):
                    flip.mend(node.medium)
            if not node.is_up and not node.stays_down and not node.needs_operator:
                node.start()

    # --- choosing -------------------------------------------------------------------------------

    def _node(self) -> SimNode:
        return self._generator.choice(self._cluster.nodes)

    def _leader_or_any(self) -> SimNode:
        leaders = [node for node in self._cluster.nodes
                   if node.core is not None and node.core.is_leading()]
        return self._generator.choice(leaders) if leaders and self._generator.random() < 0.6 \
            else self._node()

    def _victim(self) -> SimNode | None:
        """A node whose data may be destroyed; None when a minority already was."""
        node = self._node()
        limit = (self._cluster.plan.fewest_voters - 1) // 2
        if node.name not in self._victims and len(self._victims) >= limit:
            return None
        self._victims.add(node.name)
        return node

    def _count(self, kind: str) -> None:
        self._cluster.trace.count(kind)

    async def _hold(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self._generator.uniform(low_s, high_s))

    # --- processes ------------------------------------------------------------------------------

    async def crash(self) -> None:
        node = self._leader_or_any()
        if node.is_up:
            self._count("crash")
            node.crash()

    def _arm(self, kind: str) -> None:
        self._cluster.arm(self._leader_or_any().name, kind, self._generator.randrange(1, 30))

    async def crash_at_fsync(self) -> None:
        self._arm("fsync")

    async def crash_at_rename(self) -> None:
        self._arm("rename")

    async def crash_at_send(self) -> None:
        self._arm("send")

    async def power_cut(self) -> None:
        """All nodes at once, and what those that are down left in their page caches."""
        self._count("power-cut")
        for node in self._cluster.nodes:
            node.cut_power()

    async def stop(self) -> None:
        node = self._leader_or_any()
        if node.serving:
            self._count("stop")
            node.stop_orderly()

    async def pause(self) -> None:
        node = self._leader_or_any()
        life = node.life
        if life is None or life.paused:
            return
        self._count("pause")
        self._loop.pause(life)
        await self._hold(0.05, 0.7)
        if node.life is life and life.paused:
            self._resume(node)

    def _resume(self, node: SimNode) -> None:
        if node.life is not None:
            node.resumed_at = self._loop.now
            self._loop.resume(node.life)

    async def long_absence(self) -> None:
        """A node is away until the others have dropped the log that it would need; some have just
        enough space for the snapshot that they are sent, and not for the log behind it."""
        node = self._node()
        if any(other.stays_down for other in self._cluster.nodes):
            return
        self._count("long-absence")
        node.stays_down = True
        node.crash()
        await self._hold(0.3, 1.0)
        await self._wait(lambda: self._must_be_sent_the_state(node), ABSENCE_LIMIT_S)
        if self._generator.random() < 0.4:
            node.excuses.add("disk-full")
            node.fills_when_installed = True
        self._restart(node)
        if node.fills_when_installed:
            await self._hold(0.5, 2.5)
            node.fills_when_installed = node.medium.is_full = False

    def _must_be_sent_the_state(self, absent: SimNode) -> bool:
        return any(node.core is not None and node.core.is_leading()
                   and node.journal.anchor_index > absent.journal.last_index
                   for node in self._cluster.nodes if node.is_up)

    async def stranded_change(self) -> None:
        """A leader that is cut off appends a membership change that nobody else will ever hear of,
        and is away until it has to be sent the state."""
        leader = self._leader_or_any()
        if leader.core is None or not leader.core.is_leading():
            return
        self._count("stranded-change")
        others = [name for name in self._cluster.names if name != leader.name]
        pairs = {pair for other in others for pair in ((leader.name, other), (other, leader.name))}
        for source, target in sorted(pairs):
            self._cluster.network.cut(source, target)
        change = MembershipChange(ChangeKind.ADD_LEARNER, GHOST, address_of(GHOST))
        with contextlib.suppress(Refused, Lost, ElasticKVError):
            await self._cluster.request(
                leader, lambda n: n.engine.change_members(change, timeout_s=0.3), 0.3)
        await self._wait(lambda: leader.journal is not None
                         and self._must_be_sent_the_state(leader), ABSENCE_LIMIT_S)
        self._cluster.network.heal(pairs)

    async def transfer(self) -> None:
        """An operator hands the leadership to another node, and perhaps back at once, so that
        answers from the first term reach the same leader in a later one."""
        node, target = self._leader_or_any(), self._node()
        self._count("transfer")
        if await self._hand_over(node, target) and self._generator.random() < 0.5:
            await self._hand_over(target, node)

    async def _hand_over(self, source: SimNode, target: SimNode) -> bool:
        try:
            await self._cluster.request(
                source, lambda n: n.engine.transfer_leadership(target.name, timeout_s=0.5), 0.5)
        except (Refused, Lost, ElasticKVError) as error:
            self._cluster.trace.add("transfer failed", error)
            return False
        await self._wait(lambda: target.core is not None and target.core.is_leading())
        return True

    # --- network --------------------------------------------------------------------------------

    def _other(self, node: SimNode) -> SimNode:
        return self._generator.choice([n for n in self._cluster.nodes if n is not node])

    async def _cut_for(self, pairs: set[tuple[str, str]], low_s: float, high_s: float) -> None:
        for source, target in sorted(pairs):
            self._cluster.network.cut(source, target)
        await self._hold(low_s, high_s)
        self._cluster.network.heal(pairs)

    async def partition(self) -> None:
        """Two sides that do not hear each other."""
        self._count("partition")
        names = list(self._cluster.names)
        self._generator.shuffle(names)
        cut = self._generator.randrange(1, len(names))
        await self._cut_for({pair for a in names[:cut] for b in names[cut:]
                             for pair in ((a, b), (b, a))}, 0.1, 0.8)

    async def isolate_leader(self) -> None:
        """A leader is left with a minority, long enough for the others to elect another one, and
        goes on taking entries that nobody will ever commit."""
        leaders = [node for node in self._cluster.nodes
                   if node.core is not None and node.core.is_leading()]
        if not leaders:
            return
        self._count("isolate-leader")
        leader = self._generator.choice(leaders).name
        others = [name for name in self._cluster.names if name != leader]
        self._generator.shuffle(others)
        with_it = others[:self._generator.randrange((self._cluster.plan.size + 1) // 2)]
        await self._cut_for({pair for a in (leader, *with_it) for b in others if b not in with_it
                             for pair in ((a, b), (b, a))}, 0.3, 1.2)

    async def one_way(self) -> None:
        """A node that hears and is not heard, or the reverse."""
        self._count("one-way")
        node = self._leader_or_any().name
        others = [name for name in self._cluster.names if name != node]
        chosen = others if self._generator.random() < 0.5 else [self._generator.choice(others)]
        outward = self._generator.random() < 0.5
        await self._cut_for({(node, other) if outward else (other, node) for other in chosen},
                            0.1, 0.6)

    async def flapping(self) -> None:
        """A link that comes and goes."""
        self._count("flapping")
        node = self._leader_or_any()
        other = self._other(node)
        for _ in range(self._generator.randrange(3, 8)):
            await self._cut_for({(node.name, other.name), (other.name, node.name)}, 0.02, 0.08)
            await self._hold(0.01, 0.05)

    async def weather(self) -> None:
        """Frames are lost, doubled and late."""
        self._count("weather")
        conditions = self._cluster.network.conditions
        conditions.loss = self._generator.choice((0.0, 0.03, 0.1))
        conditions.duplication = self._generator.choice((0.0, 0.05, 0.2))
        conditions.spike = self._generator.choice((0.0, 0.1))
        await self._hold(0.2, 0.6)
        conditions.loss = conditions.duplication = conditions.spike = 0.0

    async def narrow(self) -> None:
        """Connections carry so little that what is large or queued takes longer than an election
        timeout."""
        self._count("narrow")
        network = self._cluster.network
        network.conditions.bytes_per_s = self._generator.choice((5_000.0, 20_000.0, 80_000.0))
        await self._hold(0.2, 0.8)
        network.widen()

    async def reset(self) -> None:
        """A connection breaks, at its two ends at different times."""
        node = self._leader_or_any()
        if self._cluster.network.reset(node.name, self._other(node).name,
                                       self._generator.choice((0.0, 0.05, 0.4))):
            self._count("reset")

    # --- disks ----------------------------------------------------------------------------------

    async def fsync_error(self) -> None:
        node = self._leader_or_any()
        if node.is_up:
            node.excuses.add("fsync-error")
            node.medium.failing_syncs = 1

    async def disk_full(self) -> None:
        node = self._leader_or_any()
        self._count("disk-full")
        node.excuses.add("disk-full")
        node.medium.room = self._generator.randrange(4)
        await self._hold(0.05, 0.5)
        node.medium.room = None

    async def bit_flip(self) -> None:
        """A byte of a file reads back changed; mended at the end, as from a backup."""
        node = self._victim()
        if node is None or node.stays_down:
            return
        node.stays_down = True
        node.cut_power()
        node.excuses.add("bit-flip")
        files: dict[str, list[tuple[str, Inode]]] = {}
        for path, inode in sorted(node.medium.files.items()):
            if inode.durable and not path.endswith(".tmp"):
                files.setdefault(_file_kind(path), []).append((path, inode))
        if files:
            kinds = sorted(files) + 3 * [kind for kind in RARE_KINDS if kind in files]
            path, inode = self._generator.choice(files[self._generator.choice(kinds)])
            offset = self._generator.randrange(len(inode.durable))
            bit = self._generator.randrange(8)
            node.medium.flip_bit(path, offset, bit)
            self._damaged.setdefault(node.name, []).append(
                BitFlip(path, inode, offset, bit, inode.durable[offset]))
            self._count(f"bit-flip {_file_kind(path)}")
        await self._hold(*RESTART_S)
        self._restart(node)

    async def old_disk(self) -> None:
        """A node comes back with the disk that it had a while ago."""
        node = self._victim()
        if node is None or node.name in self._damaged:
            return
        copy = node.medium.copy()
        await self._hold(0.1, 1.0)
        if node.stays_down:
            return
        self._count("old-disk")
        node.stays_down = True
        node.crash()
        node.excuses.add("old-disk")
        node.needs_operator = False
        node.medium.restore(copy)
        await self._hold(*RESTART_S)
        self._restart(node)

    async def clock_step(self) -> None:
        node = self._node()
        step_ms = self._generator.choice((-5000, -300, -20, 20, 300, 5000))
        self._count("clock-step back" if step_ms < 0 else "clock-step")
        node.clock.skew_ms += step_ms


def _file_kind(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return {"store.image": "store", "keys.json": "sidecar"}.get(
        name, "journal" if name.endswith((".log", ".index", ".spare")) else name)


_ACTIONS: dict[str, Callable[[Nemesis], Awaitable[None]]] = {
    "crash": Nemesis.crash,
    "crash-at-fsync": Nemesis.crash_at_fsync,
    "crash-at-rename": Nemesis.crash_at_rename,
    "crash-at-send": Nemesis.crash_at_send,
    "power-cut": Nemesis.power_cut,
    "stop": Nemesis.stop,
    "pause": Nemesis.pause,
    "partition": Nemesis.partition,
    "isolate-leader": Nemesis.isolate_leader,
    "one-way": Nemesis.one_way,
    "flapping": Nemesis.flapping,
    "weather": Nemesis.weather,
    "narrow": Nemesis.narrow,
    "reset": Nemesis.reset,
    "fsync-error": Nemesis.fsync_error,
    "disk-full": Nemesis.disk_full,
    "clock-step": Nemesis.clock_step,
    "bit-flip": Nemesis.bit_flip,
    "old-disk": Nemesis.old_disk,
    "long-absence": Nemesis.long_absence,
    "transfer": Nemesis.transfer,
    "stranded-change": Nemesis.stranded_change,
}
