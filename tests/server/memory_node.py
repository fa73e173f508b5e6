"""A node for the servers to serve: real behaviour over `kv.api` and `raft.engine`, in memory.

One process, one copy of the data, no log: the rules are the node's own (`kv.txn`, the HLC, the
nonce ids), so that what a caller sees is what a node of one member shows. `faults` makes the next
calls fail as a node's parts can.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from elastickv.audit import AuditLog
from elastickv.clock import HybridLogicalClock, SystemClock, pack_timestamp
from elastickv.config import TlsFiles
from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import full_node_id
from elastickv.descriptors import MAX_CONNECTIONS
from elastickv.errors import (
    ConditionFailed,
    DeadlineExceeded,
    EncryptionConflict,
    GateOff,
    NotBootstrapped,
)
from elastickv.kv.api import (
    PAIR_OVERHEAD_BYTES,
    BootstrapResult,
    Capability,
    Condition,
    CutoverResult,
    DekStatus,
    MemberEncryptionStatus,
    Op,
    OpKind,
    ReadResult,
    RotateResult,
    ScanResult,
    SidecarState,
    WriteResult,
    WriterRow,
    result_too_large,
)
from elastickv.kv.txn import check_key, check_ops
from elastickv.raft.engine import EngineStatus, Member, Role, Suffrage
from elastickv.server.grpc_server import FRONT_H2, GrpcServer

MAX_VALUE_BYTES = 64 * 1024
MAX_REQUEST_BYTES = 256 * 1024


@dataclass
class Faults:
    """What the next calls run into: errors in order (None = none), and a gate that holds calls
    until set."""

    errors: deque[BaseException | None] = field(default_factory=deque)
    hold: asyncio.Event | None = None
    before: list[str] = field(default_factory=list)

    async def meet(self, call: str, timeout_s: float) -> None:
        """Called by every operation before it has any effect."""
        self.before.append(call)
        if self.hold is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.hold.wait()
            except TimeoutError:
                raise DeadlineExceeded("held until the deadline") from None
        if self.errors and (error := self.errors.popleft()) is not None:
            raise error


class MemoryKv:
    """`kv.api.KvApi`: every version of every key in a dictionary."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._hlc = HybridLogicalClock(SystemClock(), ceiling=pack_timestamp(1 << 47))
        self._versions: dict[bytes, list[tuple[int, bytes | None, int]]] = {}
        self.index = 0
        self.stale_ms = 0

    async def put(self, key: bytes, value: bytes, *, ttl_ms: int = 0,
                  timeout_s: float) -> WriteResult:
        return await self.batch([Op(OpKind.PUT, key, value, ttl_ms)], timeout_s=timeout_s)

    async def delete(self, key: bytes, *, timeout_s: float) -> WriteResult:
        return await self.batch([Op(OpKind.DELETE, key)], timeout_s=timeout_s)

    async def batch(self, ops: Sequence[Op], *, conditions: Sequence[Condition] = (),
                    timeout_s: float) -> WriteResult:
        check_ops(ops, conditions, max_value_bytes=MAX_VALUE_BYTES,
                  max_request_bytes=MAX_REQUEST_BYTES)
        await self._faults.meet("write", timeout_s)
        for condition in conditions:
            if self._visible(condition.key, 0)[0] != condition.commit_ts:
                raise ConditionFailed("a condition did not hold")
        commit_ts = self._hlc.next()
        if commit_ts is None:
            raise RuntimeError("the clock is at its ceiling")
        for op in ops:
            expiry = (commit_ts >> 16) + op.ttl_ms if op.ttl_ms else 0
            value = None if op.kind is OpKind.DELETE else op.value
            self._versions.setdefault(op.key, []).append((commit_ts, value, expiry))
        self.index += 1
        return WriteResult(self.index, commit_ts)

    def _visible(self, key: bytes, ts: int) -> tuple[int, bytes | None, int]:
        """Commit timestamp, value and what it has left, in milliseconds."""
        now_ms = ts >> 16 if ts else self._hlc.now_ms()
        for commit_ts, value, expiry in reversed(self._versions.get(key, ())):
            if ts and commit_ts > ts:
                continue
            if value is None or (expiry and expiry <= now_ms):
                return 0, None, 0
            return commit_ts, value, expiry - now_ms if expiry else 0
        return 0, None, 0

    async def get(self, key: bytes, *, ts: int = 0, stale: bool = False,
                  timeout_s: float) -> ReadResult:
        check_key(key)
        await self._faults.meet("stale read" if stale else "read", timeout_s)
        commit_ts, value, ttl_ms = self._visible(key, ts)
        return ReadResult(value or b"", value is not None, self.index, commit_ts,
                          self.stale_ms if stale else 0, ttl_ms)

    async def latest_commit_ts(self, key: bytes, *, timeout_s: float) -> tuple[int, bool]:
        check_key(key)
        await self._faults.meet("read", timeout_s)
        commit_ts, value, _ = self._visible(key, 0)
        return commit_ts, value is not None

    async def scan(self, start: bytes, end: bytes, *, limit: int, max_bytes: int, ts: int = 0,
                   reverse: bool = False, keys_only: bool = False, stale: bool = False,
                   timeout_s: float) -> ScanResult:
        await self._faults.meet("stale read" if stale else "read", timeout_s)
        keys = [key for key in sorted(self._versions, reverse=reverse)
                if key >= start and (not end or key < end)]
        visible = ((key, self._visible(key, ts)[1]) for key in keys)
        pairs = [(key, b"" if keys_only else value)
                 for key, value in visible if value is not None][:limit]
        sizes = (len(key) + len(value) + PAIR_OVERHEAD_BYTES for key, value in pairs)
        fitting = sum(total <= max_bytes for total in itertools.accumulate(sizes))
        if fitting < len(pairs):
            raise result_too_large(max_bytes, fitting, keys_only=keys_only)
        return ScanResult(pairs, self.stale_ms if stale else 0)


class MemoryEncryption:
    """`kv.api.EncryptionApi` of a cluster of one: ids, rows and cutovers, no keys."""

    def __init__(self, faults: Faults, raft_id: str, *, gate: bool) -> None:
        self.gate = gate
        self.state: SidecarState | None = None
        self.proposals: list[str] = []
        self._faults = faults
        self._raft_id = raft_id

    def gate_open(self) -> bool:
        return self.gate

    async def _propose(self, what: str, timeout_s: float) -> int:
        if not self.gate:
            raise GateOff("the gate is off below the server")
        await self._faults.meet(what, timeout_s)
        self.proposals.append(what)
        return len(self.proposals)

    def _require_state(self) -> SidecarState:
        if self.state is None:
            raise NotBootstrapped("the cluster has no DEKs yet", remedy="bootstrap first")
        return self.state

    async def capability(self) -> Capability:
        return Capability(full_node_id(self._raft_id), self.gate, "test", self.state is not None,
                          1 if self.state else 0)

    async def sidecar_state(self) -> SidecarState:
        return self.state or SidecarState({}, 0, 0, False, 0, len(self.proposals))

    async def bootstrap(self, *, wrapped_storage: bytes, wrapped_raft: bytes, storage_dek_id: int,
                        raft_dek_id: int, writers: Sequence[WriterRow],
                        timeout_s: float) -> BootstrapResult:
        if self.state is not None:
            raise EncryptionConflict("the cluster is already bootstrapped")
        index = await self._propose("bootstrap", timeout_s)
        storage, raft = storage_dek_id or 1, raft_dek_id or 2
        self.state = SidecarState(
            {storage: wrapped_storage or b"w" * 60, raft: wrapped_raft or b"w" * 60},
            storage, raft, False, 0, index, {storage: 1, raft: 1})
        return BootstrapResult(index, storage, raft)

    async def rotate_dek(self, *, purpose: Purpose, wrapped: bytes, new_dek_id: int,
                         proposer_node_id: int, proposer_local_epoch: int,
                         timeout_s: float) -> RotateResult:
        state = self._require_state()
        index = await self._propose(f"rotate {purpose.label}", timeout_s)
        dek_id = new_dek_id or max(state.wrapped_deks_by_id) + 1
        self.state = replace(
            state, wrapped_deks_by_id={**state.wrapped_deks_by_id, dek_id: wrapped or b"w" * 60},
            active_storage_id=dek_id if purpose is Purpose.STORAGE else state.active_storage_id,
            active_raft_id=dek_id if purpose is Purpose.RAFT else state.active_raft_id)
        return RotateResult(index, dek_id)

    async def register_writers(self, *, dek_id: int, writers: Sequence[WriterRow],
                               timeout_s: float) -> int:
        self._require_state()
        return await self._propose(f"register {len(writers)} under {dek_id}", timeout_s)

    async def resync_sidecar(self, *, caller_full_node_id: int, timeout_s: float) -> SidecarState:
        await self._faults.meet("read", timeout_s)
        return self._require_state()

    async def enable_storage_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                      timeout_s: float) -> CutoverResult:
        state = self._require_state()
        if state.storage_envelope_active:
            return CutoverResult(0, [], True, cutover_index_unknown=True)
        index = await self._propose("enable storage", timeout_s)
        self.state = replace(state, storage_envelope_active=True)
        return CutoverResult(index, [await self.capability()], False)

    async def enable_raft_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                   timeout_s: float) -> CutoverResult:
        state = self._require_state()
        if state.raft_envelope_cutover_index:
            return CutoverResult(state.raft_envelope_cutover_index, [], True)
        index = await self._propose("enable raft", timeout_s)
        self.state = replace(state, raft_envelope_cutover_index=index)
        return CutoverResult(index, [await self.capability()], False)

    async def member_status(self, *, timeout_s: float) -> Sequence[MemberEncryptionStatus]:
        state = await self.sidecar_state()
        deks = [DekStatus(state.active_storage_id, Purpose.STORAGE, True, "confirmed", 1, 1, 5, 95)]
        return [
            MemberEncryptionStatus(self._raft_id, True, await self.capability(), state,
                                   deks=deks if self.state else []),
            MemberEncryptionStatus("gone", False, None, None, ["unreachable (no answer)"]),
        ]


class OneMemberEngine:
    """The part of `raft.engine.RaftEngine` that the servers use, for a group whose leader is this
    node while `leader_id` says so."""

    def __init__(self, raft_id: str) -> None:
        self.node_id = raft_id
        self.leader_id = raft_id
        self.leader_address = ""
        self.configuration_index = 1
        self.configuration = [Member(raft_id, "127.0.0.1:1")]

    def status(self) -> EngineStatus:
        leads = self.leader_id == self.node_id
        return EngineStatus(
            self.node_id, Role.LEADER if leads else Role.FOLLOWER, 3, self.leader_id,
            self.leader_address, 20, 18, 21, 7, 5, 21, 0, len(self.configuration) - 1, 1234,
            self.configuration_index, False, bool(self.leader_id))

    def members(self) -> Sequence[Member]:
        return tuple(self.configuration)

    async def add_voter(self, node_id: str, address: str, *, previous_index: int,
                        timeout_s: float) -> int:
        return self._add(Member(node_id, address), previous_index)

    async def add_learner(self, node_id: str, address: str, *, previous_index: int,
                          timeout_s: float) -> int:
        return self._add(Member(node_id, address, Suffrage.LEARNER), previous_index)

    def _add(self, member: Member, previous_index: int) -> int:
        self._check(previous_index)
        self.configuration.append(member)
        self.configuration_index += 1
        return self.configuration_index

    def _check(self, previous_index: int) -> None:
        if previous_index and previous_index != self.configuration_index:
            raise EncryptionConflict(f"the configuration stands at {self.configuration_index}")

    async def promote_learner(self, node_id: str, *, previous_index: int, min_applied_index: int,
                              skip_min_applied_check: bool, timeout_s: float) -> int:
        self._check(previous_index)
        self.configuration = [
            replace(member, suffrage=Suffrage.VOTER) if member.node_id == node_id else member
            for member in self.configuration]
        self.configuration_index += 1
        return self.configuration_index

    async def remove_server(self, node_id: str, *, previous_index: int, timeout_s: float) -> int:
        self._check(previous_index)
        self.configuration = [member for member in self.configuration
                              if member.node_id != node_id]
        self.configuration_index += 1
        return self.configuration_index

    async def transfer_leadership(self, target_id: str, target_address: str = "", *,
                                  timeout_s: float) -> None:
        self.leader_id = target_id or self.node_id


class MemoryNode:
    """One node in memory with its real gRPC server on a real port."""

    def __init__(self, raft_id: str = "n1", *, gate: bool = True, port: int = 0,
                 tls: TlsFiles | None = None, accept_loops: int = 2,
                 reflection: bool = False, front: str = FRONT_H2,
                 max_connections: int = MAX_CONNECTIONS, audit: AuditLog | None = None,
                 admin_names: Sequence[str] = ()) -> None:
        self.faults = Faults()
        self.kv = MemoryKv(self.faults)
        self.encryption = MemoryEncryption(self.faults, raft_id, gate=gate)
        self.engine = OneMemberEngine(raft_id)
        self.server = GrpcServer(
            "127.0.0.1", port, kv=self.kv, encryption=self.encryption, membership=self.engine,
            engine=self.engine,  # type: ignore[arg-type]
            tls=tls, accept_loops=accept_loops, reflection=reflection,
            max_value_bytes=MAX_VALUE_BYTES, front=front, max_connections=max_connections,
            audit=audit, admin_names=admin_names)

    @property
    def address(self) -> str:
        """Where clients reach it, once it runs."""
        return f"127.0.0.1:{self.server.port}"

    async def start(self) -> None:
        await self.server.start()
        self.engine.configuration[0] = replace(self.engine.configuration[0],
                                               client_address=self.address)

    async def stop(self) -> None:
        await self.server.stop(grace_s=0.0)


@contextlib.asynccontextmanager
async def running(*nodes: MemoryNode) -> AsyncIterator[None]:
    """The nodes, started and stopped."""
    started: list[MemoryNode] = []
    try:
        for node in nodes:
            await node.start()
            started.append(node)
        yield
    finally:
        for node in started:
            await node.stop()


@contextlib.contextmanager
def in_thread(node: MemoryNode) -> Iterator[MemoryNode]:
    """The node on a loop and a thread of its own, as it is for a program that blocks."""
    started = threading.Event()
    stop = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with running(node):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        if not started.wait(10):
            raise TimeoutError("the node did not start")
        yield node
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)


async def eventually(check: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return once `check()` holds; `TimeoutError` otherwise."""
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.01)
