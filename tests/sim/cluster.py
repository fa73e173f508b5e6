"""Simulated nodes, put together as `elastickv.node.Node` puts a real one together.

What differs from a real node: the disk, the network, the clocks, where an fsync and a flush run,
and that clients call `KeyValue` directly instead of over gRPC.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from elastickv import startup
from elastickv.clock import HybridLogicalClock
from elastickv.crypto.keystore import Keystore
from elastickv.crypto.nonce import full_node_id
from elastickv.errors import (
    ElasticKVError,
    JournalCorrupt,
    KekError,
    RemovedFromCluster,
    SidecarCorrupt,
    StoreCorrupt,
)
from elastickv.keys.applier import Applier
from elastickv.keys.guards import FileSystemUnsafe, GuardFailed, require_safe
from elastickv.keys.sidecar import RELATIVE_PATH
from elastickv.keys.usage import Limits
from elastickv.kv.conditions import ConditionReader
from elastickv.kv.encryption import EncryptionController
from elastickv.kv.fsm import META_HLC_CEILING, KvStateMachine
from elastickv.kv.key_value import KeyValue
from elastickv.kv.own_entries import OwnEntries
from elastickv.kv.rotation import RotationSettings
from elastickv.kv.snapshots import state_snapshots
from elastickv.raft.engine import Entry, Member, Suffrage
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.settings import EngineSettings
from elastickv.raft.tls_links import TlsLinks
from elastickv.store.flusher import Flusher
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store, decode_number
from elastickv.store.tables import Table
from elastickv.store.values import open_record
from tests.sim.disk import Medium, MountedDisk
from tests.sim.invariants import Oracle
from tests.sim.loop import Crashed, Life, SimLoop
from tests.sim.network import HostNames, Network, SimListener
from tests.sim.plan import Plan
from tests.sim.random_streams import Streams
from tests.sim.trace import Trace

T = TypeVar("T")

DATA = Path("/data")
MAX_VALUE_BYTES = 1 << 14
PORT = 7000
EPOCH_MS = 1_700_000_000_000
HALT_LIMIT_S = 0.05
"""How long a node may take to stop itself after a failed fsync."""

NEED_OPERATOR = (JournalCorrupt, StoreCorrupt, SidecarCorrupt, KekError, GuardFailed,
                 RemovedFromCluster)
"""A node that refused to start with one of these does not get better by being started again, unless
it is for its file system, which may be short of space for a while."""

EXPLAINS: Mapping[str, tuple[str, ...]] = {
    "fsync-error": ("OSError", "FileSystemUnsafe"),
    "disk-full": ("DiskFull", "FileSystemUnsafe"),
    "bit-flip": ("JournalCorrupt", "StoreCorrupt", "SidecarCorrupt", "KekError", "GuardFailed"),
    "old-disk": ("GuardFailed", "LogDiverged"),
    "removal": ("RemovedFromCluster",),
}
"""Which errors an injected fault explains: the classes that a node may halt with; `DiskFull` only
while it does not serve, at its start or in the last flush of a stop."""


class WallClock:
    """A node's clocks: the life's monotonic one, and a wall clock that can be stepped."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self.skew_ms = 0.0

    def monotonic(self) -> float:
        return self._loop.time()

    def wall_ms(self) -> int:
        return EPOCH_MS + int(self._loop.now * 1000 + self.skew_ms)


class LateOffload:
    """An `Offload` and the store's runner: blocking work ends after a while, strictly in order."""

    def __init__(self, loop: SimLoop, generator: random.Random, delay_s: float) -> None:
        self._loop = loop
        self._generator = generator
        self._delay_s = delay_s
        self._free_at = 0.0

    def _slot(self) -> float:
        """Seconds from now until the next piece of work is done."""
        now = self._loop.time()
        self._free_at = max(self._free_at, now) + self._delay_s * self._generator.random()
        return self._free_at - now

    def submit(self, work: Callable[[], None],
               done: Callable[[BaseException | None], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:
                done(error)
            else:
                done(None)

        self._loop.call_later(self._slot(), run)

    def close(self) -> None:
        """What was submitted before a stop is done by the stop itself or lost."""

    async def __call__(self, work: Callable[[], T]) -> T:
        await asyncio.sleep(self._slot())
        return work()


class ColdBackend(MemoryBackend):
    """Says now and then that something had to come from the disk."""

    def __init__(self, disk: MountedDisk, directory: Path, generator: random.Random,
                 trace: Trace) -> None:
        super().__init__(disk, directory)
        self._generator = generator
        self._trace = trace
        self._waits = 0

    def disk_waits(self) -> int:
        self._waits += self._generator.random() < 0.2
        return self._waits

    def prefetch(self, table: Table, start: bytes, end: bytes, suffix: bytes, count: int, *,
                 reverse: bool = False) -> Callable[[], bool]:
        self._trace.count("keys read ahead")
        return lambda: self._generator.random() < 0.7

    def prefetch_all(self, table: Table, start: bytes, byte_count: int) -> Callable[[], bool]:
        self._trace.count("snapshots read ahead")
        return lambda: self._generator.random() < 0.7


class ObservedMachine:
    """The state machine that the engine drives, with the oracle looking on."""

    def __init__(self, node: SimNode, machine: KvStateMachine) -> None:
        self._node = node
        self._machine = machine

    @property
    def applied_index(self) -> int:
        return self._machine.applied_index

    @property
    def durable_index(self) -> int:
        return self._machine.durable_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        self._node.cluster.oracle.applying(self._node, entries)
        return self._machine.apply(entries)


class SimNode:
    """One machine: its disk and its place in the cluster outlive the processes that run on it."""

    def __init__(self, cluster: Cluster, name: str, rate: float) -> None:
        self.cluster = cluster
        self.name = name
        self.rate = rate
        self.medium = Medium(name, cluster, cluster.streams.stream(f"disk/{name}"))
        self.clock = WallClock(cluster.loop)
        self.life: Life | None = None
        self.halted: Life | None = None
        self.serving = False
        self.excuses: set[str] = set()
        self.stays_down = False
        self.fills_when_installed = False
        self.needs_operator = False
        self.is_removed = False
        self.core: Any = None
        self._engine: PySyncObjEngine | None = None
        self._closed_journal: Any = None
        self.seen_commit = 0
        self.seen_role = (0, False)
        self.durable_applied = 0
        self.resumed_at = 0.0
        self.boots = 0

    @property
    def is_up(self) -> bool:
        return self.life is not None and self.life.alive

    @property
    def is_usable(self) -> bool:
        """Whether it is a member that no operator has to mend first."""
        return not self.needs_operator and not self.is_removed

    @property
    def has_booted(self) -> bool:
        """Whether an engine was ever up here; a dead one's journal tells what it left durable."""
        return self.seen_role[0] > 0

    @property
    def engine(self) -> Any:
        """The engine of the latest process, which may be gone."""
        return self._engine

    @engine.setter
    def engine(self, engine: PySyncObjEngine) -> None:
        if self._engine is not None:
            self._closed_journal = self.journal
        self._engine = engine

    @property
    def journal(self) -> Any:
        """The log that was opened last, also by a process that is gone.

        A process that died before it had opened its log took nothing from it that was durable.
        """
        return getattr(self._engine, "_journal", self._closed_journal)

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a process. The node must be down."""
        cluster = self.cluster
        self.boots += 1
        generator = cluster.streams.stream(f"node/{self.name}/{self.boots}")
        life = Life(self.name, rate=self.rate, offset_s=generator.uniform(1.0, 1000.0))
        self.life = life
        self.core = None
        life.on_death.append(self._died)
        disk = self.medium.mount(life)
        cluster.trace.add("start", self.name, self.boots)
        cluster.loop.schedule(life, cluster.loop.now, self._launch, disk, generator)

    def _died(self) -> None:
        self.serving = False
        self.core = None
        self.life = None
        self.cluster.trace.add("down", self.name)

    def _launch(self, disk: MountedDisk, generator: random.Random) -> None:
        task = self.cluster.loop.create_task(self._boot(disk, generator))
        task.add_done_callback(self._booted)

    def _booted(self, task: asyncio.Task[None]) -> None:
        error = task.exception()
        if error is not None and not isinstance(error, Crashed):
            if not isinstance(error, ElasticKVError | OSError):
                raise error
            self.halt(error)

    async def _boot(self, disk: MountedDisk, generator: random.Random) -> None:
        cluster, plan = self.cluster, self.cluster.plan
        disk.make_directory(DATA)
        cold = cluster.streams.stream(f"cold/{self.name}/{self.boots}")
        store = Store.open(ColdBackend(disk, DATA / "store", cold, cluster.trace))
        self.store = store
        cluster.oracle.restarted(self)
        self._observe_store(store)
        members = {name: full_node_id(name) for name in cluster.names}
        settings = SimpleNamespace(raft_id=self.name, encryption_enabled=True,
                                   kek_file=Path("/kek"), raft_data_dir=DATA)
        gathered = startup.gather(settings, disk, store, members)  # type: ignore[arg-type]
        require_safe(gathered.facts)
        self.applier = self._open_keys(disk, gathered.kek)
        hlc = HybridLogicalClock(self.clock, last=store.max_commit_ts,
                                 ceiling=decode_number(store.meta(META_HLC_CEILING)))
        own_entries = OwnEntries()
        machine = KvStateMachine(store, self.applier, hlc, on_keys_changed=self._keys_changed,
                                 own_entries=own_entries,
                                 max_overlay_bytes=plan.max_overlay_bytes,
                                 condition_reader=ConditionReader(store, LateOffload(
                                     cluster.loop, cold, plan.sync_delay_s)))
        snapshots = state_snapshots(store, self.applier, hlc, on_keys_changed=self._installed)
        offload = LateOffload(cluster.loop, generator, plan.sync_delay_s)
        self.engine = self._build_engine(disk, machine, snapshots, offload, generator)
        self.encryption = EncryptionController(
            self.engine, store, self.applier, full_node_id=full_node_id(self.name),
            kek=gathered.kek, gate=True, build_sha="simulated", on_fatal=self.halt,
            rotation=RotationSettings(Limits(1 << 32)), own_entries=own_entries)
        self.flusher = Flusher(store, LateOffload(cluster.loop, generator, plan.sync_delay_s),
                               on_fatal=self.halt, on_flushed=self._flushed,
                               interval_ms=plan.flush_interval_ms)
        self.kv = KeyValue(
            self.engine, store, hlc, self.encryption,
            opener=lambda store_key, record: open_record(self.applier.keystore, store_key, record),
            writable=lambda: self.flusher.error,
            max_value_bytes=MAX_VALUE_BYTES, max_request_bytes=2 * MAX_VALUE_BYTES)
        self.flusher.start()
        await self.engine.start()
        self.seen_commit = self.engine._core.commit_index()
        self.seen_role = (self.engine._core.term(), False)
        self.core = self.engine._core
        cluster.oracle.promises.watch_core(self)
        self.encryption.ensure_writers()
        self.serving = True

    def _build_engine(self, disk: MountedDisk, machine: KvStateMachine, snapshots: Any,
                      offload: LateOffload, generator: random.Random) -> PySyncObjEngine:
        cluster = self.cluster
        settings = EngineSettings(
            node_id=self.name, path=DATA / "raft", client_address=f"client-{self.name}",
            members=cluster.first_members(),
            joining=not cluster.is_founder(self.name),
            **cluster.plan.settings)
        links = TlsLinks(self.name, address_of(self.name), tls=None,
                         max_entry_bytes=settings.max_entry_bytes, generator=generator,
                         make_listener=SimListener, names=HostNames())
        engine = PySyncObjEngine(
            settings, ObservedMachine(self, machine), disk, links, offload=offload,
            cleanup=LateOffload(cluster.loop, generator, cluster.plan.sync_delay_s),
            read_ahead=LateOffload(cluster.loop, generator, cluster.plan.sync_delay_s),
            generator=generator, snapshots=snapshots)
        engine.on_fatal(self.halt)
        cluster.oracle.promises.watch(self, links, engine)
        return engine

    def _open_keys(self, disk: MountedDisk, kek: Any) -> Applier:
        applier = Applier(disk=disk, read_row=self.store.row, kek=kek, keystore=Keystore(),
                          sidecar_path=DATA / RELATIVE_PATH,
                          full_node_id=full_node_id(self.name), now=lambda: self.name)
        disk.make_directory(DATA / RELATIVE_PATH.parent)
        applier.load()
        return applier

    def _observe_store(self, store: Store) -> None:
        real_apply = store.apply_group
        oracle = self.cluster.oracle

        def observed(index: int, writes: Sequence[tuple[bytes, int, bytes]],
                     rows: Sequence[tuple[bytes, bytes]] = (),
                     meta: Mapping[bytes, bytes] | None = None) -> None:
            writes = list(writes)
            real_apply(index, writes, rows, meta)
            oracle.applied(self, index, writes, rows, dict(meta or {}))

        store.apply_group = observed  # type: ignore[method-assign]

    def _keys_changed(self, index: int) -> None:
        self.encryption.keys_changed(index)

    def _installed(self, index: int) -> None:
        """The state is that of a snapshot; the log does not follow it yet."""
        self.encryption.keys_changed(index)
        if self.fills_when_installed:
            self.medium.is_full = True
            self.cluster.trace.count("installations cut short")

    def _flushed(self, durable_index: int) -> None:
        self.durable_applied = max(self.durable_applied, durable_index)

    # --- ends -----------------------------------------------------------------------------------

    def crash(self) -> None:
        """The process is gone, now; `disk.POWER_CUTS` says how often its page cache is as well."""
        if self.life is not None:
            self.life.end()

    def cut_power(self) -> None:
        """Power off, now: what is not synced is in danger, also what earlier processes left."""
        self.crash()
        self.medium.cut_power()

    def halt(self, error: BaseException) -> None:
        """The node stops itself; its process is gone with the end of this step."""
        if isinstance(error, Crashed) or not self.is_up:
            return
        self.cluster.oracle.halted(self, error, EXPLAINS)
        self.needs_operator = isinstance(error, NEED_OPERATOR) \
            and not isinstance(error, FileSystemUnsafe)
        self.serving = False
        self.core = None
        life = self.halted = self.life
        if life is not None:
            self.cluster.loop.schedule(None, self.cluster.loop.now, life.end)

    def stop_orderly(self) -> None:
        """SIGTERM: hand over, flush, exit."""
        life = self.life
        if life is not None and self.serving:
            self.serving = False
            self.cluster.loop.schedule(life, self.cluster.loop.now, self._begin_stop, life)

    def _begin_stop(self, life: Life) -> None:
        task = self.cluster.loop.create_task(self._stop())
        task.add_done_callback(lambda done: self._stopped(life, done))

    async def _stop(self) -> None:
        self.encryption.writers.stop()
        await self.engine.stop()
        await self.flusher.stop(flush=True)
        self.store.close()

    def _stopped(self, life: Life, task: asyncio.Task[None]) -> None:
        error = task.exception()
        if error is not None and not isinstance(error, Crashed):
            self.halt(error)
        self.cluster.loop.schedule(None, self.cluster.loop.now, life.end)


def address_of(name: str) -> str:
    """Where members reach a node."""
    return f"{name}:{PORT}"


class Lost(Exception):
    """The node was gone before it answered; the operation may or may not have happened."""


class Refused(Exception):
    """The node was not there; the operation certainly did not happen."""


class Cluster:
    """All nodes, and what they share."""

    def __init__(self, loop: SimLoop, plan: Plan, streams: Streams, trace: Trace,
                 oracle: Oracle) -> None:
        self.loop = loop
        self.plan = plan
        self.streams = streams
        self.trace = trace
        self.oracle = oracle
        self.network = Network(loop, self, streams.stream)
        self.network.conditions.base_s = plan.network_s / 2
        self.network.conditions.jitter_s = plan.network_s
        loop.connector = self.network
        self.names = [f"n{number}" for number in range(1, plan.size + plan.others + 1)]
        self.nodes = [SimNode(self, name, rate)
                      for name, rate in zip(self.names, plan.rates, strict=False)]
        oracle.nodes = {node.name: node for node in self.nodes}
        loop.after_step = oracle.after_step
        self._armed: dict[str, tuple[str, int]] = {}

    def is_founder(self, name: str) -> bool:
        """Whether a node is a member from the beginning on."""
        return not self.plan.joins or name in self.names[:self.plan.size]

    def first_members(self) -> list[Member]:
        """The members that the cluster begins with."""
        return [Member(name, address_of(name), Suffrage.VOTER if number < self.plan.size
                       else Suffrage.LEARNER)
                for number, name in enumerate(self.names) if self.is_founder(name)]

    # --- crash points, and what disks and network report ----------------------------------------

    def arm(self, name: str, kind: str, countdown: int) -> None:
        """Crash the node at its `countdown`-th crash point of `kind` from now."""
        self._armed[name] = (kind, countdown)

    def disarm(self) -> None:
        """Forget the crashes that were not reached."""
        self._armed.clear()

    def crash_point(self, life: Life, kind: str) -> None:
        armed = self._armed.get(life.name)
        if armed is None or armed[0] != kind:
            return
        if armed[1] > 1:
            self._armed[life.name] = (kind, armed[1] - 1)
            return
        del self._armed[life.name]
        self.trace.count(f"crash-at-{kind}")
        life.end()
        raise Crashed(life.name)

    def written(self, node: str, path: str, data: bytes) -> None:
        self.trace.add("write", node, path, data)
        self.oracle.written(node, path, data)

    def changed(self, node: str, kind: str, path: str, size: int) -> None:
        self.trace.add(kind, node, path, size)
        if kind == "torn":
            self.trace.count("torn writes")
        elif kind == "reuse":
            self.trace.count("segments reused")
        elif kind == "fsync failed":
            self.trace.count("fsync-error")
            failed = self.oracle.nodes[node]
            self.loop.schedule(None, self.loop.now + HALT_LIMIT_S, self._require_halted, failed,
                               failed.life)

    def _require_halted(self, node: SimNode, life: Life) -> None:
        if life.alive and not life.paused and node.resumed_at < self.loop.now - HALT_LIMIT_S \
                and node.halted is not life:
            self.oracle.fail("a failed fsync stops the node", f"{node.name} goes on after one")

    def sent(self, source: str, target: str, data: bytes, fault: str) -> None:
        self.trace.add("send", source, target, fault, data)
        if fault:
            self.trace.count(f"frames {fault}")

    def count(self, name: str) -> None:
        self.trace.count(name)

    # --- clients --------------------------------------------------------------------------------

    async def request(self, node: SimNode, call: Callable[[SimNode], Awaitable[T]],
                      timeout_s: float) -> T:
        """Run `call` on a node as an RPC would. Raises what it raises, `Refused` or `Lost`."""
        life = node.life
        if life is None or not node.serving:
            await asyncio.sleep(0.005)
            raise Refused(node.name)
        begun_at = self.loop.now
        answer: asyncio.Future[T] = self.loop.create_future()
        life.on_death.append(lambda: self._answer(answer, None, Lost(node.name)))
        self.loop.schedule(life, self.loop.now + self.plan.network_s, self._begin, node, call,
                           answer)
        try:
            async with asyncio.timeout(timeout_s * 1.1 + 0.3):
                return await answer
        except TimeoutError:
            if life.alive and not life.paused and node.resumed_at < begun_at:
                self.oracle.fail("calls end by their deadline",
                                 f"a call of {timeout_s} s on {node.name} has not ended")
            raise Lost(node.name) from None

    def _begin(self, node: SimNode, call: Callable[[SimNode], Awaitable[T]],
               answer: asyncio.Future[T]) -> None:
        async def run() -> T:
            return await call(node)

        task = self.loop.create_task(run())
        task.add_done_callback(lambda done: self._finished(done, answer))

    def _finished(self, task: asyncio.Task[T], answer: asyncio.Future[T]) -> None:
        if task.cancelled():
            self._answer(answer, None, Lost("cancelled"))
            return
        error = task.exception()
        self._answer(answer, None if error else task.result(), error)

    def _answer(self, answer: asyncio.Future[Any], result: object,
                error: BaseException | None) -> None:
        self.loop.schedule(None, self.loop.now + self.plan.network_s, _resolve, answer, result,
                           error)


def _resolve(answer: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error if isinstance(error, Exception) else Lost(str(error)))
    else:
        answer.set_result(result)
