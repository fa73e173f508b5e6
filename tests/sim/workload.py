"""Clients and operators: concurrent reads and writes, and every encryption operation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import full_node_id
from elastickv.errors import (
    CallerError,
    ConditionFailed,
    ElasticKVError,
    OperatorError,
    Outcome,
    PeerError,
)
from elastickv.kv.api import Condition, Op, OpKind, WriterRow
from elastickv.raft.membership import ChangeKind, MembershipChange
from jepsen.history import Kind, Recorder
from tests.sim.cluster import Cluster, Lost, Refused, SimNode, address_of
from tests.sim.invariants import SECRET

KEYS = tuple(f"k{number}" for number in range(4))
PAIR = ("pair-a", "pair-b")
"""Written together in one batch, read together in one scan: they must never differ."""

CALL_TIMEOUT_S = 0.8
ADMIN_TIMEOUT_S = 1.5


class Workload:
    """Everything that is asked of the cluster in one run."""

    def __init__(self, cluster: Cluster, recorder: Recorder) -> None:
        self.cluster = cluster
        self.recorder = recorder
        self.is_over = False
        self._is_cut_over = False
        self._processes = 0
        self._values = 0

    def _new_process(self) -> int:
        self._processes += 1
        return self._processes

    def _value(self, node: SimNode, generator: random.Random) -> bytes:
        """A value that nobody else writes; it says whether it may reach a disk in the clear."""
        self._values += 1
        sidecar = node.applier.sidecar
        sealed = self._is_cut_over and sidecar is not None and sidecar.storage_envelope_active
        filler = b"." * generator.choice((0, 0, 10, 200))
        return b"%s-%d-%s" % (SECRET if sealed else b"open", self._values, filler)

    # --- reads and writes -----------------------------------------------------------------------

    async def client(self, name: str) -> None:
        """One client: one operation after the other until the run is over."""
        generator = self.cluster.streams.stream(f"client/{name}")
        actions = (self._put, self._put, self._put, self._get, self._get, self._delete,
                   self._compare_and_set, self._batch, self._put_pair, self._scan_pair)
        while not self.is_over:
            node = generator.choice(self.cluster.nodes)
            if node.serving:
                await generator.choice(actions)(node, generator)
            await asyncio.sleep(generator.uniform(0.005, 0.08))

    async def reader(self) -> None:
        """Reads that do not wait for each other's end, so that a node out of touch is asked as
        often as any. In no history: the promises of reads are checked as they are kept."""
        generator = self.cluster.streams.stream("reader")
        reads: list[asyncio.Future[object]] = []
        while not self.is_over:
            node = generator.choice(self.cluster.nodes)
            if node.serving:
                reads.append(asyncio.ensure_future(self._quiet(node, lambda n: n.kv.get(
                    KEYS[0].encode(), timeout_s=CALL_TIMEOUT_S))))
            await asyncio.sleep(generator.uniform(0.01, 0.06))
        await asyncio.gather(*reads)

    async def _recorded(self, node: SimNode, operations: list[tuple[str, str, object]],
                        call: Callable[[SimNode], Awaitable[object]],
                        timeout_s: float = CALL_TIMEOUT_S) -> object:
        """Run `call` as the recorded operations `(function, key, value)`; None unless it is ok."""
        processes = [self._new_process() for _ in operations]
        for process, (f, key, value) in zip(processes, operations, strict=True):
            self.recorder.add(Kind.INVOKE, process, f, key, value)
        result: object = None
        try:
            result = await self.cluster.request(node, call, timeout_s)
            kind, error = Kind.OK, ""
        except Refused:
            kind, error = Kind.FAIL, "refused"
        except Lost as lost:
            kind, error = Kind.INFO, str(lost)
        except ElasticKVError as failure:
            kind = Kind.INFO if failure.outcome is Outcome.UNKNOWN else Kind.FAIL
            error = type(failure).__name__
        self.cluster.trace.count(f"operations {kind}")
        self.cluster.trace.add("ended", operations, kind, error, result)
        for process, (f, key, value) in zip(processes, operations, strict=True):
            if kind is Kind.OK and f == "read":
                value = result
            self.recorder.add(kind, process, f, key, value, error)
        return result if kind is Kind.OK else None

    async def _put(self, node: SimNode, generator: random.Random) -> None:
        key, value = generator.choice(KEYS), self._value(node, generator)
        await self._recorded(node, [("write", key, value.decode())], lambda n: n.kv.put(
            key.encode(), value, timeout_s=CALL_TIMEOUT_S))

    async def _delete(self, node: SimNode, generator: random.Random) -> None:
        key = generator.choice(KEYS)
        await self._recorded(node, [("delete", key, None)], lambda n: n.kv.delete(
            key.encode(), timeout_s=CALL_TIMEOUT_S))

    async def _get(self, node: SimNode, generator: random.Random) -> None:
        await self.read(node, generator.choice(KEYS))

    async def read(self, node: SimNode, key: str) -> object:
        """A linearizable read; what was read as a tuple of one, None when it did not end well."""
        seen: list[tuple[str | None, int]] = []

        async def call(n: SimNode) -> str | None:
            result = await n.kv.get(key.encode(), timeout_s=CALL_TIMEOUT_S)
            value = result.value.decode() if result.exists else None
            seen.append((value, result.commit_ts))
            return value

        before = len(self.recorder.records)
        await self._recorded(node, [("read", key, None)], call)
        ok = any(r.kind is Kind.OK for r in self.recorder.records[before:][-1:])
        return seen[0] if ok and seen else None

    async def _compare_and_set(self, node: SimNode, generator: random.Random) -> None:
        key = generator.choice(KEYS)
        found = await self.read(node, key)
        if not isinstance(found, tuple) or not node.serving:
            return
        expected, commit_ts = found
        value = self._value(node, generator)
        await self._recorded(
            node, [("cas", key, [expected, value.decode()])], lambda n: n.kv.batch(
                [Op(OpKind.PUT, key.encode(), value)],
                conditions=[Condition(key.encode(), commit_ts)], timeout_s=CALL_TIMEOUT_S))

    async def _batch(self, node: SimNode, generator: random.Random) -> None:
        keys = generator.sample(KEYS, 2)
        values = [self._value(node, generator) for _ in keys]
        await self._recorded(
            node, [("write", key, value.decode())
                   for key, value in zip(keys, values, strict=True)],
            lambda n: n.kv.batch(
                [Op(OpKind.PUT, key.encode(), value)
                 for key, value in zip(keys, values, strict=True)], timeout_s=CALL_TIMEOUT_S))

    async def _put_pair(self, node: SimNode, generator: random.Random) -> None:
        value = self._value(node, generator)
        await self._quiet(node, lambda n: n.kv.batch(
            [Op(OpKind.PUT, key.encode(), value) for key in PAIR], timeout_s=CALL_TIMEOUT_S))

    async def _scan_pair(self, node: SimNode, generator: random.Random) -> None:
        found = await self._quiet(node, lambda n: n.kv.scan(
            b"pair-", b"pair-z", limit=10, max_bytes=1 << 20, timeout_s=CALL_TIMEOUT_S))
        if found is not None and (len({value for _, value in found.pairs}) > 1
                                  or len(found.pairs) not in (0, len(PAIR))):
            self.cluster.oracle.fail("batches are atomic", f"{node.name} scans {found.pairs}")

    async def _quiet(self, node: SimNode, call: Callable[[SimNode], Awaitable[object]],
                     timeout_s: float = CALL_TIMEOUT_S) -> object:
        """Run a call that is in no history; None unless it is ok."""
        try:
            result = await self.cluster.request(node, call, timeout_s)
        except (Refused, Lost, ElasticKVError) as error:
            self.cluster.trace.add("ended", type(error).__name__, error)
            return None
        self.cluster.trace.count("operations ok")
        return result

    # --- encryption -----------------------------------------------------------------------------

    async def operator(self, *, until: str, repeat: bool) -> None:
        """Take the cluster through the encryption life cycle up to `until`; with `repeat`, go on
        with rotations and registrations until the run is over."""
        generator = self.cluster.streams.stream("operator")
        steps = {"bootstrap": 1, "storage": 2, "full-early": 3, "full-late": 3}.get(until, 0)
        for name in ("bootstrap", "storage cutover", "raft cutover")[:steps]:
            while not self.is_over and not await self._admin(name, generator):
                await asyncio.sleep(0.03)
        while repeat and steps and not self.is_over:
            name = generator.choice(("rotate storage", "rotate raft", "register", "bootstrap",
                                     "storage cutover", "resync", "status"))
            await self._admin(name, generator)
            await asyncio.sleep(generator.uniform(0.02, 0.2))

    async def _admin(self, name: str, generator: random.Random) -> bool:
        node = generator.choice(self.cluster.nodes)
        try:
            await self.cluster.request(node, _ADMIN_CALLS[name], ADMIN_TIMEOUT_S)
        except ConditionFailed:
            raise
        except (CallerError, OperatorError) as error:
            # Refused for what it asks: a bootstrap is there already, or not there yet.
            self.cluster.trace.add("admin refused", name, error)
            return name == "bootstrap" and "already" in str(error)
        except (Refused, Lost, PeerError) as error:
            self.cluster.trace.add("admin failed", name, error)
            return False
        self.cluster.trace.count(name)
        # A leader that has not applied its own cutover yet may still log a plaintext value, which
        # apply refuses. Its answer to the operator ends that.
        self._is_cut_over |= name == "storage cutover"
        return True

    # --- membership -----------------------------------------------------------------------------

    def membership(self) -> list[Coroutine[Any, Any, None]]:
        """The plan's story, to be run."""
        plan, nodes = self.cluster.plan, self.cluster.nodes
        leaver = self.cluster.streams.stream("leaver").choice(nodes)
        match plan.story:
            case "promote":
                return [self.promote(nodes[-1])]
            case "dismiss":
                return [self.dismiss(nodes[-1])]
            case "leave":
                return [self.dismiss(leaver)]
            case "join" | "join-learner":
                return [self.join(nodes[-1], as_learner=plan.story == "join-learner")]
        return []

    async def join(self, newcomer: SimNode, *, as_learner: bool) -> None:
        """Add a node, at some time in the run. To the end: whether it must agree then would be
        open otherwise."""
        generator = self.cluster.streams.stream("membership")
        await asyncio.sleep(generator.uniform(0.05, 1.0))
        kind = ChangeKind.ADD_LEARNER if as_learner else ChangeKind.ADD_VOTER
        change = MembershipChange(kind, newcomer.name, address_of(newcomer.name))
        while not await self._change(change, generator, done="is a member already"):
            await asyncio.sleep(generator.uniform(0.01, 0.1))
        if as_learner:
            await self.promote(newcomer)

    async def promote(self, learner: SimNode) -> None:
        """Make a voter of a learner, at some time in the run."""
        generator = self.cluster.streams.stream("membership")
        await asyncio.sleep(generator.uniform(0.1, 1.5))
        change = MembershipChange(ChangeKind.PROMOTE, learner.name)
        while not self.is_over:
            if await self._change(change, generator, done="is a voter already"):
                return
            await asyncio.sleep(generator.uniform(0.01, 0.1))

    async def dismiss(self, member: SimNode) -> None:
        """Remove a member, at some time in the run, while it is asked for reads. It may go on
        running and come back: it is only not counted on any more."""
        generator = self.cluster.streams.stream("membership")
        await asyncio.sleep(generator.uniform(0.1, 1.5))
        member.excuses.add("removal")
        readers = [asyncio.ensure_future(self._keep_reading(member, number))
                   for number in range(2)]
        change = MembershipChange(ChangeKind.REMOVE, member.name)
        # To the end: a removal whose outcome is unknown leaves open who must agree at the end.
        while not await self._change(change, generator, done="is not a member"):
            await asyncio.sleep(generator.uniform(0.01, 0.1))
        member.is_removed = True
        await asyncio.gather(*readers)

    async def _keep_reading(self, node: SimNode, number: int) -> None:
        generator = self.cluster.streams.stream(f"reader/{number}")
        while not node.is_removed and not self.is_over:
            if node.serving:
                await self._get(node, generator)
            await asyncio.sleep(generator.uniform(0.001, 0.02))

    async def _change(self, change: MembershipChange, generator: random.Random, *,
                      done: str) -> bool:
        """Ask some node for the change; whether it is made. `done` is what a refusal says of one
        that was made before."""
        node = generator.choice(self.cluster.nodes)
        try:
            await self.cluster.request(
                node, lambda n: n.engine.change_members(change, timeout_s=CALL_TIMEOUT_S),
                CALL_TIMEOUT_S)
        except (Refused, Lost, ElasticKVError) as error:
            self.cluster.trace.add("change refused", change.kind.value, error)
            return done in str(error)
        self.cluster.trace.count({ChangeKind.PROMOTE: "promotions",
                                  ChangeKind.REMOVE: "removals"}.get(change.kind, "additions"))
        return True


async def _bootstrap(node: SimNode) -> object:
    return await node.encryption.bootstrap(
        wrapped_storage=b"", wrapped_raft=b"", storage_dek_id=0, raft_dek_id=0, writers=(),
        timeout_s=ADMIN_TIMEOUT_S)


def _rotate(purpose: Purpose) -> Callable[[SimNode], Awaitable[object]]:
    return lambda node: node.encryption.rotate_dek(
        purpose=purpose, wrapped=b"", new_dek_id=0, proposer_node_id=0, proposer_local_epoch=0,
        timeout_s=ADMIN_TIMEOUT_S)


async def _register(node: SimNode) -> object:
    """Registers a writer that is no member, as an operator's tool does."""
    sidecar = node.applier.sidecar
    dek_id = sidecar.active_storage if sidecar is not None else 1
    return await node.encryption.register_writers(
        dek_id=dek_id, writers=[WriterRow(full_node_id("outsider"), 1)],
        timeout_s=ADMIN_TIMEOUT_S)


_ADMIN_CALLS: dict[str, Callable[[SimNode], Awaitable[object]]] = {
    "bootstrap": _bootstrap,
    "rotate storage": _rotate(Purpose.STORAGE),
    "rotate raft": _rotate(Purpose.RAFT),
    "register": _register,
    "storage cutover": lambda node: node.encryption.enable_storage_envelope(
        proposer_node_id=0, proposer_local_epoch=0, timeout_s=ADMIN_TIMEOUT_S),
    "raft cutover": lambda node: node.encryption.enable_raft_envelope(
        proposer_node_id=0, proposer_local_epoch=0, timeout_s=ADMIN_TIMEOUT_S),
    "resync": lambda node: node.encryption.resync_sidecar(
        caller_full_node_id=full_node_id(node.name), timeout_s=ADMIN_TIMEOUT_S),
    "status": lambda node: node.encryption.member_status(timeout_s=ADMIN_TIMEOUT_S),
}
