"""The composition root: builds one node from its settings and runs it until it is told to stop.

Start: guards, keys, store, engine, servers; each step can refuse with a typed error and an exit
code. Stop: servers drain, leadership is handed over, the overlay is flushed, files are closed. A
fatal error (fail-stop apply, a failed fsync, corruption) stops the node the same way, with its
exit code.
"""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from elastickv import __version__, config, data_directory, descriptors, hygiene, logs, startup
from elastickv.audit import AuditLog
from elastickv.certs import uncovered_host
from elastickv.clock import HybridLogicalClock, SystemClock
from elastickv.config import NodeSettings
from elastickv.contacts import ContactBook
from elastickv.crypto.envelope import EnvelopeError
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore
from elastickv.crypto.nonce import full_node_id
from elastickv.data_directory import failure_of
from elastickv.durable import OsDisk
from elastickv.errors import (
    DiskFull,
    ElasticKVError,
    ExitCode,
    IntegrityError,
    RemovedFromCluster,
)
from elastickv.keys.applier import Applier
from elastickv.keys.guards import failures, require_safe
from elastickv.keys.sidecar import RELATIVE_PATH
from elastickv.keys.usage import Limits
from elastickv.kv.conditions import SHARES, ConditionReader
from elastickv.kv.encryption import EncryptionController
from elastickv.kv.fsm import META_HLC_CEILING, KvStateMachine
from elastickv.kv.key_value import KeyValue
from elastickv.kv.membership import MembershipController
from elastickv.kv.own_entries import OwnEntries
from elastickv.kv.rotation import RotationSettings
from elastickv.kv.snapshots import state_snapshots
from elastickv.metrics import Metrics, NullRecorder, Recorder
from elastickv.raft.engine import Member, Role, SnapshotSource
from elastickv.raft.offload import ThreadOffload
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.settings import EngineSettings
from elastickv.raft.tls_links import TlsLinks
from elastickv.server.grpc_server import GrpcServer
from elastickv.store.flusher import Flusher
from elastickv.store.gc import Compactor
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc_store import Store, decode_number
from elastickv.store.values import open_record
from elastickv.wire import MAX_ENTRY_BYTES

log = logs.get_logger(__name__)

T = TypeVar("T")

REQUEST_SLACK_BYTES = 1 << 20

# LMDB gives the interpreter lock back for every value it writes. With the default of 5 ms a busy
# loop would let a flush of thousands of values wait 5 ms for each.
SWITCH_INTERVAL_S = 0.0005
KEEP_ENTRIES = 10_000
"""Entries that stay in the log for members that are a little behind."""
SEGMENT_BYTES = 64 << 20
PREFETCH_THREADS = 8
"""So many scans may wait for the disk at a time."""
DRAIN_S = 2.0
"""How long a stop waits for calls under way."""


class StopRequested(Exception):
    """The node was asked to stop before it had started."""


class ThreadRunner:
    """`await run(work)`: blocking work off the loop, as many pieces at a time as it has threads."""

    def __init__(self, name: str, *, threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)

    async def __call__(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Wait for what runs."""
        self._executor.shutdown(wait=True)


class Node:
    """One running node. `start`, then `run_until_stopped`."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._stop_requested = asyncio.Event()
        self._fatal: BaseException | None = None
        self._stops = _Stops()
        self._metrics = Metrics() if settings.metrics_address is not None else None

    async def start(self) -> None:
        """Bring everything up. Raises typed errors; then call `stop`: it takes down what is up."""
        settings = self._settings
        disk = OsDisk()
        audit, store = self._open_files(disk)
        kek = await self._checked_kek(disk, store)
        applier = self._open_keys(disk, kek, store)
        self._build(disk, store, applier, kek)
        self._stops.push("flush", self._flush_and_stop)
        self._flusher.start()
        self._stops.push("engine", self._engine.stop)
        await self._engine.start()
        self._stops.push("encryption", self._encryption.stop)
        self._encryption.start()
        contacts = ContactBook(disk, settings.raft_data_dir, self._engine.members)
        self._stops.push("contacts", lambda: contacts.stop(
            removed=settings.raft_id if self._is_removed() else ""))
        contacts.start()
        await self._start_server(audit)
        await self._start_http(store, applier)
        log.info("node started", node=settings.raft_id, address=str(settings.address),
                 raft_address=str(settings.raft_address), applied_index=store.applied_index,
                 encryption=self._encryption.gate_open())
        if settings.raft_id not in {member.node_id for member in self._engine.members()}:
            log.info("waiting to be added to the cluster",
                     command=f"elastickv admin raft add-learner {settings.raft_id}"
                             f" {settings.raft_address}")

    def _open_files(self, disk: OsDisk) -> tuple[AuditLog, Store]:
        """Take the data directory, and open what is in it but the log."""
        settings, stops = self._settings, self._stops
        data = settings.raft_data_dir
        disk.make_directory(data)
        lock = data_directory.take(data)
        stops.push("lock", partial(os.close, lock))
        startup.require_file_system(settings, disk)
        audit = AuditLog(settings.audit_file)
        stops.push("audit log", audit.close)
        self._runner = ThreadRunner("store")
        stops.push("store's thread", self._runner.close)
        self._cleanup = ThreadOffload("cleanup")
        stops.push("cleanup thread", self._cleanup.close)
        # Closed after the store: what they read for is given up then.
        self._prefetcher = ThreadRunner("prefetch", threads=PREFETCH_THREADS)
        stops.push("prefetch threads", self._prefetcher.close)
        # Of their own: everything that is applied waits for them, and must not for scans.
        self._condition_threads = ThreadRunner("conditions", threads=SHARES)
        stops.push("condition threads", self._condition_threads.close)
        store = Store.open(LmdbBackend(data / "store", cleanup=self._clean_up))
        stops.push("store", store.close)
        return audit, store

    def _clean_up(self, work: Callable[[], None]) -> None:
        self._cleanup.submit(work, self._cleaned_up)

    def _cleaned_up(self, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)

    async def _checked_kek(self, disk: OsDisk, store: Store) -> Kek | None:
        """The KEK, once the guards let this node start; a sidecar that they refuse is repaired if
        it can be."""
        settings = self._settings
        members = {member.node_id: full_node_id(member.node_id)
                   for member in settings.founding_members or settings.raft_join}
        gathered = startup.gather(settings, disk, store, members)
        if failures(gathered.facts):
            # Imported here: it brings the client library, which a sound node does not need.
            from elastickv import resync

            if await self._unless_stopped(resync.repair(settings, disk, store, gathered)):
                gathered = startup.gather(settings, disk, store, members)
        require_safe(gathered.facts)
        return gathered.kek

    def _build(self, disk: OsDisk, store: Store, applier: Applier, kek: Kek | None) -> None:
        """Put the parts together; none of them does anything yet."""
        settings = self._settings
        hlc = HybridLogicalClock(SystemClock(), last=store.max_commit_ts,
                                 ceiling=decode_number(store.meta(META_HLC_CEILING)))
        own_entries = OwnEntries()
        machine = KvStateMachine(store, applier, hlc, on_keys_changed=self._keys_changed,
                                 own_entries=own_entries,
                                 condition_reader=ConditionReader(store, self._condition_threads))
        snapshots = state_snapshots(store, applier, hlc, on_keys_changed=self._keys_changed)
        self._engine = self._build_engine(disk, machine, snapshots, store.applied_index)
        self._engine.on_fatal(self._fail)
        self._engine.on_role_change(self._log_role)
        self._encryption = EncryptionController(
            self._engine, store, applier, full_node_id=full_node_id(settings.raft_id), kek=kek,
            gate=settings.encryption_enabled, build_sha=__version__, on_fatal=self._fail,
            rotation=RotationSettings(Limits(settings.dek_max_writes), settings.dek_max_age,
                                      settings.encryption_rotate_on_startup),
            own_entries=own_entries)
        self._membership = MembershipController(
            self._engine, store, applier, self._encryption.operations,
            raft_address=str(settings.raft_address))
        self._flusher = Flusher(store, self._runner, on_fatal=self._fail,
                                compactor=Compactor(store, SystemClock().wall_ms),
                                interval_ms=settings.flush_interval_ms)
        self._kv = KeyValue(
            self._engine, store, hlc, self._encryption,
            opener=self._record_opener(applier),
            writable=self._write_refusal,
            max_value_bytes=settings.max_value_bytes,
            max_request_bytes=settings.max_value_bytes + REQUEST_SLACK_BYTES,
            prefetcher=self._prefetcher)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to. Raises `StopRequested` when that is asked for meanwhile."""
        working = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop_requested.wait())
        try:
            await asyncio.wait({working, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise StopRequested
            return working.result()
        finally:
            working.cancel()
            stop.cancel()

    def _keys_changed(self, index: int) -> None:
        hygiene.lock_memory()
        self._encryption.keys_changed(index)

    def _open_keys(self, disk: OsDisk, kek: Kek | None, store: Store) -> Applier:
        metrics = self._metrics
        applier = Applier(
            disk=disk, read_row=store.row, kek=kek, keystore=Keystore(),
            sidecar_path=self._settings.raft_data_dir / RELATIVE_PATH,
            full_node_id=full_node_id(self._settings.raft_id),
            on_unwrap=(partial(metrics.observe, "encryption_kek_unwrap_seconds")
                       if metrics else None))
        disk.make_directory(self._settings.raft_data_dir / RELATIVE_PATH.parent)
        applier.load()
        lock = hygiene.lock_memory()
        log.info("memory locked", locked_bytes=lock.locked_bytes, not_achieved=lock.problem)
        return applier

    def _record_opener(self, applier: Applier) -> Callable[[bytes, bytes], bytes]:
        recorder: Recorder = self._metrics or NullRecorder()

        def open_(store_key: bytes, record: bytes) -> bytes:
            try:
                return open_record(applier.keystore, store_key, record)
            except IntegrityError as error:
                reason = error.reason if isinstance(error, EnvelopeError) else "record"
                recorder.count("encryption_decrypt_failures_total", reason)
                raise

        return open_

    def _build_engine(self, disk: OsDisk, machine: KvStateMachine,
                      snapshots: SnapshotSource, applied_index: int) -> PySyncObjEngine:
        settings = self._settings
        members = settings.raft_join or settings.founding_members
        startup.require_cluster(settings, disk, applied_index)
        # --max-value-bytes limits what is proposed (`Coordinator`), not what is read: the log may
        # hold larger entries, written when it was higher, and so may other members send.
        links = TlsLinks(
            settings.raft_id, str(settings.raft_listen), max_entry_bytes=MAX_ENTRY_BYTES,
            dial_from=settings.raft_dial_from,
            tls=settings.tls)
        offload, read_ahead = ThreadOffload(), ThreadOffload("read-ahead")
        self._stops.push("log's thread", offload.close)
        self._stops.push("snapshots' thread", read_ahead.close)
        engine_settings = EngineSettings(
            node_id=settings.raft_id, path=settings.raft_data_dir / "raft",
            members=[Member(member.node_id, str(member.address)) for member in members],
            client_address=str(settings.address), raft_address=str(settings.raft_address),
            joining=bool(settings.raft_join), max_entry_bytes=MAX_ENTRY_BYTES,
            compact_entries=settings.snapshot_entries,
            compact_bytes=settings.snapshot_log_bytes,
            keep_entries=min(KEEP_ENTRIES, settings.snapshot_entries),
            segment_bytes=min(SEGMENT_BYTES, settings.snapshot_log_bytes // 4))
        metrics = self._metrics
        return PySyncObjEngine(
            engine_settings, machine, disk, links, offload=offload, cleanup=self._cleanup,
            read_ahead=read_ahead, snapshots=snapshots,
            on_sync=partial(metrics.observe, "raft_fsync_seconds") if metrics else None)

    async def _start_server(self, audit: AuditLog) -> None:
        settings = self._settings
        server = GrpcServer(
            settings.address.host, settings.address.port, kv=self._kv,
            encryption=self._encryption, membership=self._membership, engine=self._engine,
            tls=settings.tls, accept_loops=settings.accept_loops,
            max_connections=descriptors.for_clients(descriptors.limit()),
            front=settings.grpc_front, reflection=settings.grpc_reflection,
            max_value_bytes=settings.max_value_bytes, recorder=self._metrics, audit=audit,
            admin_names=settings.admin_names)
        self._stops.push("server",
                         lambda: server.stop(grace_s=0.0 if self._has_failed() else DRAIN_S))
        await server.start()

    async def _start_http(self, store: Store, applier: Applier) -> None:
        address, metrics = self._settings.metrics_address, self._metrics
        if address is None or metrics is None:
            return
        # Imported here: a node that serves no metrics does not pay for the library.
        from elastickv.server.http import HttpServer
        from elastickv.server.metric_sources import (
            encryption_source,
            raft_source,
            store_source,
        )

        metrics.add_source(raft_source(self._engine))
        metrics.add_source(store_source(store))
        metrics.add_source(encryption_source(lambda: applier.sidecar, self._encryption.budgets,
                                             lambda: store.dek_counts,
                                             lambda: self._encryption.proposer.last_hold_s))
        self._encryption.proposer.on_outcome = partial(metrics.count, "raft_proposals_total")
        server = HttpServer(address.host, address.port, metrics, self._engine,
                            self._write_problem)
        self._stops.push("http", server.stop)
        await server.start()

    def _write_refusal(self) -> ElasticKVError | None:
        """What this node, as the leader, refuses every write with for now."""
        return self._flusher.error or self._encryption.refusal()

    def _write_problem(self) -> str:
        if self._stop_requested.is_set():
            return "the node is stopping"
        return str(self._write_refusal() or "")

    def _log_role(self, role: Role, term: int) -> None:
        log.info("role changed", role=role.name, term=term,
                 leader=self._engine.status().leader_id)

    def _fail(self, error: BaseException) -> None:
        first = self._fatal is None
        if first:
            self._fatal = error = failure_of(error)
        self._stop_requested.set()
        if first and isinstance(error, RemovedFromCluster):
            log.warning("this node was removed from the cluster and stops", reason=str(error))
        elif first:
            log.error("node must stop", exc_info=error)

    def request_stop(self) -> None:
        """Begin an orderly stop; safe to call more than once."""
        self._stop_requested.set()

    async def run_until_stopped(self) -> ExitCode:
        """Serve until `request_stop` or a fatal error; then stop. Raises the fatal error."""
        await self._stop_requested.wait()
        error = await self.stop()
        if self._fatal is not None:
            raise self._fatal
        if error is not None:
            raise error
        return ExitCode.OK

    def _is_removed(self) -> bool:
        """A node that was removed is sound: it answers what it has accepted, and flushes."""
        return isinstance(self._fatal, RemovedFromCluster)

    def _has_failed(self) -> bool:
        return self._fatal is not None and not self._is_removed()

    async def stop(self) -> Exception | None:
        """Drain and close whatever was started, last first. A step that fails skips no other; the
        first error, or None."""
        error = await self._stops.take_all()
        log.info("node stopped", node=self._settings.raft_id)
        return error

    async def _flush_and_stop(self) -> None:
        # What a log that could not be closed in order holds is not known: the store must not be
        # ahead of it.
        flush = not self._has_failed() and "engine" not in self._stops.failed
        try:
            await self._flusher.stop(flush=flush)
        except DiskFull as error:
            log.warning("the last flush found no space: the next start applies again from the log",
                        error=str(error))


class _Stops:
    """What there is to stop: a stack of named steps. Each is taken, whatever became of others."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []
        self.failed: set[str] = set()
        """The steps that raised."""

    def push(self, name: str, step: Callable[[], object]) -> None:
        """`step` is taken before those that were pushed earlier; it may return an awaitable."""
        self._steps.append((name, step))

    async def take_all(self) -> Exception | None:
        """The first error of a step, or None."""
        first: Exception | None = None
        while self._steps:
            name, step = self._steps.pop()
            try:
                outcome = step()
                if isinstance(outcome, Awaitable):
                    await outcome
            except Exception as error:
                first = first or error
                self.failed.add(name)
                log.error("a step of the stop failed", step=name, exc_info=error)
        return first


def report_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's own report of what nobody handled, but for lost connections of which nobody wants
    to know any more: a dial that is given up at the moment at which it succeeds leaves a future
    with uvloop, in which the end of its TLS handshake is told."""
    if "future" in context and isinstance(context.get("exception"),
                                           ConnectionError | ssl.SSLError):
        log.debug("a connection was lost that was given up before")
        return
    loop.default_exception_handler(context)


async def _run(settings: NodeSettings) -> int:
    node = Node(settings)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_unhandled)
    # Not by the loop, which takes its handlers away before others can be set: a signal between the
    # two would end the process.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: loop.call_soon_threadsafe(node.request_stop))
    try:
        try:
            await node.start()
        except StopRequested:
            if (error := await node.stop()) is not None:
                raise error from None
            return int(ExitCode.OK)
        except BaseException:
            await node.stop()
            raise
        return int(await node.run_until_stopped())
    finally:
        # A second signal on the way out must not turn a clean stop into a death by signal.
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)


def run_node(settings: NodeSettings) -> int:
    """Run a node until SIGTERM or SIGINT; the exit code. Typed errors pass to the caller."""
    import uvloop

    logs.configure(settings.log_level, settings.log_format)
    if problem := hygiene.disable_core_dumps():
        log.warning("core dumps may be written", reason=problem)
    else:
        log.info("core dumps off")
    log.info("descriptors limited", limit=descriptors.raise_limit())
    log.info("settings", **config.describe(settings))
    if problem := config.unreachable_founder(settings):
        log.warning("other machines cannot reach this member", reason=problem)
    if settings.tls is not None \
            and (problem := uncovered_host(settings.tls, settings.address.host)):
        log.warning("clients may refuse this node", reason=problem)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_run(settings))
        except (ElasticKVError, OSError) as error:
            failure = failure_of(error)
            log.error("node failed", error=type(failure).__name__, detail=str(failure))
            logs.discard_stalled_stderr()
            raise failure from None
