"""A cluster of real nodes for one run: files, processes, network, and the operator's calls.

    <run>/cluster/kek.key wrong.key certs/     keys and certificates
    <run>/cluster/<node>/                      data directories (mount points of small disks)
    <run>/logs/<node>.log                      what each node said, over all its starts
    <run>/taps/<node>.spool                    journal records (see `tap`)
    <run>/old-disks/<node>.<n>/                disks that were taken away
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from elastickv import certs
from elastickv.client import Client, RaftStatus, Role, TlsFiles
from elastickv.config import without_variables
from elastickv.crypto.kek_file import write_kek_file
from elastickv.errors import ElasticKVError, PeerError
from jepsen import preload
from jepsen.disk_audit import NodeDisk
from jepsen.network import Network
from jepsen.processes import Exit, NodeProcess, die_with_parent
from jepsen.tap import JournalTap

READY_TIMEOUT_S = 40.0
OPERATOR_TIMEOUT_S = 60.0
LEAD_TIMEOUT_S = 5.0
POLL_S = 0.1
DEFAULT_LAUNCHER = (sys.executable, "-m", "elastickv")
CLIENT_NAME = "jepsen"

T = TypeVar("T")


SHORT_LOG = ("--snapshot-entries", "300", "--snapshot-log-bytes", "1048576")
"""A log of some seconds: who was away for longer, or comes with an empty disk, is sent the state,
and segments are written over."""
MEMBER_FLAGS = (("--grpc-front", "h2"), ("--grpc-front", "grpc", "--flush-interval-ms", "100"))
"""Members take turns, so that every run has both fronts, and a store that is often being flushed
when its node is killed."""
SNAPSHOT_LINE = "snapshot installed"


class ClusterError(Exception):
    """The cluster did not do what it has to do; the message says what, and which logs to read."""


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What a run wants from its cluster.

    `launcher` is what starts a node, up to the word `node`. `small_disk_mib` mounts each data
    directory on a file system of that size (0 = no). `encrypted` bootstraps and cuts over before
    anything is written.
    """

    node_count: int = 3
    launcher: tuple[str, ...] = DEFAULT_LAUNCHER
    environment: dict[str, str] = field(default_factory=dict)
    node_flags: tuple[str, ...] = ()
    preloads: frozenset[preload.Preload] = frozenset()
    small_disk_mib: int = 0
    encrypted: bool = True


class Cluster:
    """Starts, breaks, mends and questions the nodes. Belongs to one event loop."""

    def __init__(self, directory: Path, network: Network, options: ClusterOptions,
                 now_ns: Callable[[], int]) -> None:
        # Absolute: nodes run in directories of their own.
        self.directory = directory.absolute()
        self.network = network
        self.options = options
        self.nodes = [f"n{number}" for number in range(1, options.node_count + 1)]
        self.processes: dict[str, NodeProcess] = {}
        self.old_disks: list[NodeDisk] = []
        self.sealed = False
        """True once both cutovers are confirmed: from then on no written value may be readable."""
        self._now_ns = now_ns
        self.io_errors: set[str] = set()
        """Nodes whose disks were made to fail with EIO."""
        self._clients: dict[str, Client] = {}
        self._mounts: list[Path] = []
        self.tap = JournalTap({node: self.data_directory(node) for node in self.nodes},
                              self.directory / "taps")

    # --- files --------------------------------------------------------------------------------

    @property
    def _files(self) -> Path:
        return self.directory / "cluster"

    @property
    def kek_file(self) -> Path:
        return self._files / "kek.key"

    @property
    def wrong_kek_file(self) -> Path:
        """A well-formed KEK that is not the cluster's."""
        return self._files / "wrong.key"

    def data_directory(self, node: str) -> Path:
        return self.directory / "cluster" / node

    def log_path(self, node: str) -> Path:
        return self.directory / "logs" / f"{node}.log"

    def scratch_directory(self, node: str) -> Path:
        """Where `node` runs and where its temporary files go, so that the audit of plaintext sees
        what it leaves behind."""
        return self._files / f"{node}.tmp"

    @property
    def disks(self) -> list[NodeDisk]:
        """Every data directory, present and past, for the audits."""
        return [*self.present_disks, *self.old_disks]

    @property
    def present_disks(self) -> list[NodeDisk]:
        return [NodeDisk(node, self.data_directory(node)) for node in self.nodes]

    def _tls(self, name: str) -> TlsFiles:
        pair = certs.pair_paths(self._files / "certs", name)
        return TlsFiles(pair.cert, pair.key, self._files / "certs" / "ca.crt")

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make everything, start every node, and wait until all are ready. Raises `ClusterError`,
        or `Unsupported` where the machine lacks something that was asked for."""
        await self.network.start(self.nodes)
        self._make_files()
        for node in self.nodes:
            environment = {**without_variables(os.environ),
                           "TMPDIR": str(self.scratch_directory(node)),
                           **self.options.environment,
                           **preload.environment(self.options.preloads, self.preload_files(node))}
            self.processes[node] = NodeProcess(node, self.command(node), environment,
                                               self.log_path(node), self._now_ns,
                                               directory=self.scratch_directory(node))
        self.tap.start()
        for node in self.nodes:
            await self.processes[node].start()
        await self.wait_ready()
        if self.options.encrypted:
            await self.encrypt()

    def _make_files(self) -> None:
        (self.directory / "logs").mkdir(parents=True)
        self._files.mkdir()
        directory = self._files / "certs"
        certs.create_ca(directory)
        for node in self.nodes:
            host = self.network.raft_listen_address(node).rpartition(":")[0]
            certs.create_node(directory, node, hosts=[host])
            self.data_directory(node).mkdir(mode=0o700)
            self.scratch_directory(node).mkdir()
            self.preload_files(node).prepare()
            if self.options.small_disk_mib:
                preload.mount_small_disk(self.data_directory(node), self.options.small_disk_mib)
                self._mounts.append(self.data_directory(node))
        certs.create_client(directory, CLIENT_NAME)
        write_kek_file(self.kek_file)
        write_kek_file(self.wrong_kek_file)

    def preload_files(self, node: str) -> preload.PreloadFiles:
        """Where the preloaded libraries of `node` are told what to do."""
        return preload.PreloadFiles(self._files / f"{node}.control")

    def command(self, node: str, kek_file: Path | None = None) -> list[str]:
        """The command line of `node` as a founding member."""
        return self._command(node, kek_file or self.kek_file, [
            "--raftBootstrapMembers", self._addresses(self.nodes)])

    def joining_command(self, node: str) -> list[str]:
        """The command line of `node` with an empty disk, joining the cluster that there is."""
        return self._command(node, self.kek_file, [
            "--raftJoin", self._addresses(self.others([node]))])

    def _addresses(self, nodes: Sequence[str]) -> str:
        return ",".join(f"{node}={self.network.raft_address(node)}" for node in nodes)

    def _command(self, node: str, kek_file: Path, origin: Sequence[str]) -> list[str]:
        tls = self._tls(node)
        return [
            *self.network.launch_prefix(node), *die_with_parent(), *self.options.launcher, "node",
            "--raftId", node, "--address", self.network.client_address(node),
            "--raftAddress", self.network.raft_address(node),
            "--raft-listen-address", self.network.raft_listen_address(node),
            "--raftDataDir", str(self.data_directory(node)), *origin,
            "--kekFile", str(kek_file), "--encryption-enabled", *SHORT_LOG,
            *MEMBER_FLAGS[self.nodes.index(node) % len(MEMBER_FLAGS)],
            "--tls-cert", str(tls.cert), "--tls-key", str(tls.key), "--tls-ca", str(tls.ca),
            *self.options.node_flags]

    async def stop(self) -> dict[str, int | None]:
        """Stop every node in an orderly way; their exit codes. The data stays."""
        await self.close_clients()
        codes = await asyncio.gather(*(process.stop() for process in self.processes.values()))
        return dict(zip(self.processes, codes, strict=True))

    async def close(self) -> None:
        """Kill what still runs and take everything down but the files, whatever of it fails.
        Idempotent."""
        # In reverse: what is entered last is done first.
        async with contextlib.AsyncExitStack() as steps:
            if preload.Preload.FAKETIME in self.options.preloads:
                steps.callback(preload.remove_shared, [
                    pid for process in self.processes.values() for pid in process.pids])
            while self._mounts:
                steps.callback(preload.keep_and_unmount, self._mounts.pop())
            steps.push_async_callback(self.network.stop)
            steps.push_async_callback(asyncio.to_thread, self.tap.stop)
            for process in self.processes.values():
                if process.is_running:
                    steps.push_async_callback(process.kill)
            steps.push_async_callback(self.close_clients)

    async def restart(self, node: str) -> None:
        """Start `node` again if it does not run."""
        if not self.processes[node].is_running:
            await self.processes[node].start()

    def take_disk_away(self, node: str) -> Path:
        """Move the data of a stopped node aside, where the audits find it; the data directory is
        empty afterwards. Returns where the data is."""
        target = self.copy_disk(node)
        for child in self.data_directory(node).iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        self.tap.forget(node)
        return target

    def copy_disk(self, node: str) -> Path:
        """Copy the data of a stopped node aside."""
        self.tap.poll(node)
        target = self.directory / "old-disks" / f"{node}.{len(self.old_disks) + 1}"
        shutil.copytree(self.data_directory(node), target,
                        ignore=shutil.ignore_patterns(preload.BALLAST))
        self.old_disks.append(NodeDisk(target.name, target))
        return target

    def put_disk_back(self, node: str, old: Path) -> None:
        """Give a stopped node the disk at `old`; what it has is kept aside."""
        self.take_disk_away(node)
        shutil.copytree(old, self.data_directory(node), dirs_exist_ok=True)

    def pids(self) -> dict[str, int]:
        """The process of each node that runs. For any thread."""
        return {node: process.pids[-1] for node, process in list(self.processes.items())
                if process.is_running and process.pids}

    def snapshots_installed(self) -> dict[str, int]:
        """How often each node took the state from another one, by the logs."""
        return {node: process.log_path.read_bytes().count(b'"%b"' % SNAPSHOT_LINE.encode())
                for node, process in self.processes.items()}

    # --- questions ----------------------------------------------------------------------------

    def new_client(self, first: str, timeout_s: float) -> Client:
        """A client that asks `first` first."""
        position = self.nodes.index(first)
        order = self.nodes[position:] + self.nodes[:position]
        return Client([self.network.client_address(node) for node in order],
                      tls=self._tls(CLIENT_NAME), timeout_s=timeout_s)

    def pinned_client(self, node: str, timeout_s: float) -> Client:
        """A client that asks nobody but `node`."""
        return Client([self.network.client_address(node)], tls=self._tls(CLIENT_NAME),
                      timeout_s=timeout_s)

    def admin(self, node: str) -> Client:
        """The harness's own pinned client of `node`."""
        if node not in self._clients:
            self._clients[node] = self.pinned_client(node, timeout_s=3.0)
        return self._clients[node]

    async def close_clients(self) -> None:
        """Disconnect the clients of `admin`."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()

    async def statuses(self, timeout_s: float = 1.0) -> dict[str, RaftStatus]:
        """The status of every node that answers."""
        async def ask(node: str) -> RaftStatus | None:
            if not self.processes[node].is_running or self.processes[node].is_frozen:
                return None
            try:
                return await self.admin(node).raft.status(timeout_s=timeout_s)
            except ElasticKVError:
                return None

        answers = await asyncio.gather(*map(ask, self.nodes))
        return {node: answer for node, answer in zip(self.nodes, answers, strict=True)
                if answer is not None}

    async def leader(self) -> str | None:
        """The node that leads in the highest term, if any says so."""
        leaders = {node: status for node, status in (await self.statuses()).items()
                   if status.role == Role.LEADER}
        return max(leaders, key=lambda node: leaders[node].term, default=None)

    async def let_lead(self, node: str, timeout_s: float = LEAD_TIMEOUT_S) -> bool:
        """Hand the leadership to `node`; whether it took it."""
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_s
        while await self.leader() != node:
            if now() > deadline:
                return False
            with contextlib.suppress(ElasticKVError):
                await self.admin(node).raft.transfer_leadership(node)
            await asyncio.sleep(POLL_S)
        return True

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every node answers a linearizable read and all have applied as much as the one that
        had applied most. Raises `ClusterError`."""
        async def reads(node: str) -> None:
            await self.admin(node).get(b"ready?", timeout_s=2.0)

        async def caught_up(target: int) -> None:
            statuses = await self.statuses()
            behind = [node for node in self.nodes
                      if node not in statuses or statuses[node].applied_index < target]
            if behind:
                raise PeerError(f"{', '.join(behind)} did not catch up to {target}")

        deadline = asyncio.get_running_loop().time() + timeout_s
        for node in self.nodes:
            await self._eventually(f"{node} to answer a read", partial(reads, node), deadline)
        target = max((status.applied_index for status in (await self.statuses()).values()),
                     default=0)
        await self._eventually("every node to catch up", partial(caught_up, target), deadline)

    async def _eventually(self, what: str, attempt: Callable[[], Awaitable[T]],
                          deadline: float) -> T:
        """`attempt`, again and again while it raises a `PeerError`, until `deadline`."""
        now = asyncio.get_running_loop().time
        while True:
            gone = [node for node, process in self.processes.items() if not process.is_running]
            if gone:
                codes = {node: self.processes[node].exits[-1].code for node in gone}
                raise ClusterError(f"waiting for {what}: ended with exit codes {codes}")
            try:
                return await attempt()
            except PeerError as error:
                if now() > deadline:
                    raise ClusterError(f"waited too long for {what}: {error}") from None
            await asyncio.sleep(POLL_S)

    async def encrypt(self) -> None:
        """Bootstrap encryption, unless it was done, and enable both envelopes. Raises
        `ClusterError`."""
        deadline = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        operator = self.new_client(self.nodes[0], timeout_s=10.0)

        async def bootstrap() -> None:
            if not (await operator.encryption.sidecar_state()).active_storage_id:
                await operator.encryption.bootstrap()

        try:
            for what, call in (("bootstrap", bootstrap),
                               ("storage cutover", operator.encryption.enable_storage_envelope),
                               ("raft cutover", operator.encryption.enable_raft_envelope)):
                await self._eventually(what, call, deadline)
        finally:
            await operator.close()
        self.sealed = True

    async def command_of_operator(self, node: str, *arguments: str) -> tuple[int, str]:
        """Run `elastickv ARGUMENTS` against the other members, where `node` runs; its exit code and
        output."""
        tls = self._tls(CLIENT_NAME)
        endpoints = ",".join(self.network.client_address(other) for other in self.others([node]))
        process = await asyncio.create_subprocess_exec(
            *self.network.launch_prefix(node), *die_with_parent(), *DEFAULT_LAUNCHER, *arguments,
            "--endpoints", endpoints, "--tls-cert", str(tls.cert), "--tls-key", str(tls.key),
            "--tls-ca", str(tls.ca), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        try:
            async with asyncio.timeout(OPERATOR_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return -signal.SIGKILL, f"it had not ended after {OPERATOR_TIMEOUT_S:g} s"
        return process.returncode or 0, output.decode(errors="replace").strip()

    def exits(self) -> list[Exit]:
        """Every end of a process, in order."""
        return sorted((end for process in self.processes.values() for end in process.exits),
                      key=lambda end: end.time_ns)

    def minority(self) -> int:
        """How many nodes may be lost at once."""
        return (len(self.nodes) - 1) // 2

    def others(self, nodes: Iterable[str]) -> Sequence[str]:
        """Every node but `nodes`."""
        excluded = set(nodes)
        return [node for node in self.nodes if node not in excluded]
