"""The two systems under test behind one interface: their calls, and a cluster of each."""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from bodies import key_of
from processes import ServerProcess, wait_until
from tls import Pki, TlsProxy

from jepsen.network.ports import HOST, free_ports

NODES = 3
MEMBERS = tuple(f"n{node}" for node in range(NODES))
PRELOAD_BATCH = 250
WRITE_ATTEMPTS = 5
PRELOAD_PARALLEL = 16
CALL_TIMEOUT_S = 30.0
# etcd reads its whole store when it starts, several GB and perhaps not in the page cache.
START_TIMEOUT_S = 600.0
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),
                   ("grpc.initial_reconnect_backoff_ms", 50),
                   ("grpc.min_reconnect_backoff_ms", 50),
                   ("grpc.max_reconnect_backoff_ms", 200),
                   ("grpc.use_local_subchannel_pool", 1))


class Cluster(ABC):
    """Three members on loopback under `directory`. Data survives `stop` and a new `start`."""

    name: str
    put_path: str
    get_path: str
    batch_path: str
    scan_path: str
    counted: re.Pattern[str]
    """In a member's metrics, a line with ended calls for keys: their status and how many."""

    def __init__(self, directory: Path, *, tls: bool = False) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        ports = free_ports(2 * NODES)
        self.client_ports = ports[:NODES]
        self.peer_ports = ports[NODES:]
        self.processes: list[ServerProcess] = []
        self._channels: dict[int, grpc.Channel] = {}
        self.pki = Pki(directory / "certs", MEMBERS) if tls else None
        self._proxy = TlsProxy(self.pki, directory, self.client_ports) if self.pki else None
        self._proxy_process: ServerProcess | None = None
        self._metrics_ports: list[int] = []

    # --- what differs ---

    @abstractmethod
    def command(self, node: int) -> list[str]:
        """The command line of member `node` (0, 1, 2)."""

    @abstractmethod
    def put_message(self, key: bytes, value: bytes) -> bytes:
        """A serialized put."""

    @abstractmethod
    def get_message(self, key: bytes) -> bytes:
        """A serialized linearizable read of one key."""

    @abstractmethod
    def batch_message(self, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
        """A serialized atomic write of all pairs."""

    @abstractmethod
    def scan_message(self, start: bytes, end: bytes, limit: int) -> bytes:
        """A serialized linearizable range read."""

    @abstractmethod
    def values_in(self, path: str, response: bytes) -> list[bytes]:
        """The values that a response of `get_path` or `scan_path` carries. Raises `ValueError` when
        a response of `put_path` or `batch_path` does not report success."""

    @abstractmethod
    def is_leader(self, node: int) -> bool:
        """Whether member `node` leads and can serve; False when it does not answer."""

    def after_first_start(self) -> None:  # noqa: B027
        """What a new cluster needs before it is measured; nothing unless a system says so."""

    # --- what is common ---

    def start(self) -> float:
        """Start all members; the seconds until one leads and a read succeeds on it."""
        first = not (self.directory / "started").exists()
        self.processes = [self._spawn(node) for node in range(NODES)]
        if self._proxy is not None:
            self._proxy_process = ServerProcess(self._proxy.command(),
                                                self.directory / "haproxy.log")
        seconds = wait_until(self._serves, self.processes, timeout_s=START_TIMEOUT_S,
                             what=f"{self.name} leads")
        if first:
            self.after_first_start()
            (self.directory / "started").touch()
        return seconds

    def settle(self) -> None:
        """Wait until every member takes part and what they do after a start has ended, so that a
        rate is not that of the first seconds, or of two members: elastickv audits a large store in
        a process beside each node."""
        wait_until(lambda: all(self.answers(node) for node in range(NODES)), self.processes,
                   timeout_s=START_TIMEOUT_S, what=f"all members of {self.name} answer")
        wait_until(lambda: not any(process.has_children() for process in self.processes),
                   self.processes, timeout_s=300, what=f"{self.name} is at rest")

    def require_members(self) -> None:
        """Raise `ClusterFailed` when a member has ended."""
        for process in self.processes:
            process.check()

    def _spawn(self, node: int) -> ServerProcess:
        return ServerProcess(self.command(node), self.directory / f"node{node}.log")

    def restart_node(self, node: int) -> None:
        """Start a member that was killed."""
        self.processes[node] = self._spawn(node)

    def stop(self) -> None:
        """Stop all members; data stays."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        for process in self.processes:
            process.stop()
        self.processes = []
        if self._proxy_process is not None:
            self._proxy_process.kill()

    def keep(self) -> None:
        """Put aside what the members hold, for `restore`; the cluster is stopped."""
        self._kept.mkdir()
        for directory in self.data:
            directory.rename(self._kept / directory.name)

    def clear(self) -> None:
        """Delete what the members hold, and free the memory that it takes; the cluster is
        stopped."""
        for directory in self.data:
            shutil.rmtree(directory, ignore_errors=True)

    def restore(self) -> None:
        """Give the members a copy of what was kept, on the disk and in the page cache; the cluster
        is stopped."""
        self.clear()
        for directory in self.data:
            shutil.copytree(self._kept / directory.name, directory)
        # Nobody's writes are to compete with this, and only clean pages can be dropped.
        os.sync()
        for file in self._kept.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def data(self) -> list[Path]:
        """The data directories of the members."""
        return [self.directory / member for member in MEMBERS]

    @property
    def _kept(self) -> Path:
        return self.directory / "kept"

    def remove(self) -> None:
        """Stop, and delete the data."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
        os.sync()  # whoever comes next is not to wait until gigabytes are freed

    def _serves(self) -> bool:
        leader = self.find_leader()
        return leader is not None and self.answers(leader)

    def answers(self, node: int) -> bool:
        """Whether a linearizable read through member `node` succeeds: it is in touch with the
        leader and has caught up."""
        try:
            self.call(node, self.get_path, self.get_message(key_of(0)), timeout_s=2.0)
        except grpc.RpcError:
            return False
        return True

    def find_leader(self) -> int | None:
        """The member that leads, or None."""
        return next((node for node in range(NODES) if self.is_leader(node)), None)

    def leader(self) -> int:
        """The member that leads; waits for an election to end."""
        wait_until(lambda: self.find_leader() is not None, [], timeout_s=30,
                   what=f"{self.name} leads")
        found = self.find_leader()
        return found if found is not None else self.leader()

    def channel(self, node: int) -> grpc.Channel:
        if node not in self._channels:
            address = f"{HOST}:{self.client_ports[node]}"
            self._channels[node] = (
                grpc.insecure_channel(address, options=CHANNEL_OPTIONS) if self.pki is None else
                grpc.secure_channel(address, self.pki.channel_credentials(),
                                    options=CHANNEL_OPTIONS))
        return self._channels[node]

    def call(self, node: int, path: str, message: bytes, *,
             timeout_s: float = CALL_TIMEOUT_S) -> bytes:
        """One call with a ready message. Raises `grpc.RpcError` unless its gRPC status is OK."""
        method = self.channel(node).unary_unary(path, request_serializer=None,
                                                response_deserializer=None)
        response: bytes = method(message, timeout=timeout_s)
        return response

    def metrics(self, node: int) -> str:
        """What member `node` serves as its metrics."""
        url = f"http://{HOST}:{self._metrics_ports[node]}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text: str = response.read().decode()
        return text

    def ended_calls(self, node: int) -> Mapping[str, int] | None:
        """How many calls for keys member `node` has ended, by gRPC status; None when it does not
        count them."""
        return calls_by_status(self.metrics(node), self.counted) if self._metrics_ports else None

    def load_url(self, node: int) -> str:
        """Where the load generator reaches member `node`."""
        ports = self.client_ports if self._proxy is None else self._proxy.ports
        return f"http://{HOST}:{ports[node]}"

    def cpu_s(self) -> float:
        """Processor time of all members so far."""
        return sum(process.cpu_s() for process in self.processes)

    def write(self, pairs: Sequence[tuple[bytes, bytes]], leader: int | None = None) -> None:
        """Write an atomic batch through the member that led a while ago. Where that fails, because
        another one leads, write it again: nothing is measured, and it changes nothing. Raises
        `grpc.RpcError` when none of `WRITE_ATTEMPTS` succeeds."""
        message = self.batch_message(pairs)
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            node = leader if leader is not None and attempt == 1 else self.leader()
            try:
                self.values_in(self.batch_path,
                               self.call(node, self.batch_path, message, timeout_s=60.0))
                return
            except grpc.RpcError as error:
                if attempt == WRITE_ATTEMPTS:
                    raise
                print(f"{self.name}: a batch is written again: {error.details()}",
                      file=sys.stderr, flush=True)

    def preload(self, keys: int, value: bytes) -> None:
        """Write keys 0..keys-1 in atomic batches."""
        leader = self.leader()

        def write(first: int) -> None:
            self.write([(key_of(number), value)
                        for number in range(first, min(first + PRELOAD_BATCH, keys))], leader)

        with ThreadPoolExecutor(PRELOAD_PARALLEL) as executor:
            for _ in executor.map(write, range(0, keys, PRELOAD_BATCH)):
                pass


def calls_by_status(metrics: str, counted: re.Pattern[str]) -> Mapping[str, int]:
    """The sums of what `counted` finds in a member's metrics."""
    counts: Counter[str] = Counter()
    for status, count in counted.findall(metrics):
        counts[status] += int(float(count))
    return counts


class EtcdCluster(Cluster):
    """etcd with its defaults, and limits raised where the load would hit them."""

    name = "etcd"
    put_path = "/etcdserverpb.KV/Put"
    get_path = "/etcdserverpb.KV/Range"
    batch_path = "/etcdserverpb.KV/Txn"
    scan_path = "/etcdserverpb.KV/Range"
    counted = re.compile(r'^grpc_server_handled_total\{grpc_code="(\w+)",grpc_method="\w+",'
                         r'grpc_service="etcdserverpb\.KV",[^}]*\} (\S+)$', re.MULTILINE)

    def __init__(self, directory: Path, *, tls: bool = False) -> None:
        super().__init__(directory, tls=tls)
        self._metrics_ports = free_ports(NODES)
        self._pb = grpc.protos("etcd.proto")

    def command(self, node: int) -> list[str]:
        scheme = "https" if self.pki else "http"
        client = f"{scheme}://{HOST}:{self.client_ports[node]}"
        peer = f"{scheme}://{HOST}:{self.peer_ports[node]}"
        name = MEMBERS[node]
        members = ",".join(f"{other}={scheme}://{HOST}:{port}"
                           for other, port in zip(MEMBERS, self.peer_ports, strict=True))
        return ["etcd", "--name", name, "--data-dir", str(self.directory / name),
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", members, "--initial-cluster-state", "new",
                "--quota-backend-bytes", str(64 << 30), "--max-txn-ops", "1000",
                "--listen-metrics-urls", f"http://{HOST}:{self._metrics_ports[node]}",
                "--logger", "zap", "--log-level", "error", *self._tls_flags(name)]

    def _tls_flags(self, name: str) -> list[str]:
        if self.pki is None:
            return []
        return [flag for side in ("", "peer-") for flag in (
            f"--{side}cert-file", self.pki.cert(name), f"--{side}key-file", self.pki.key(name),
            f"--{side}trusted-ca-file", self.pki.ca, f"--{side}client-cert-auth")]

    def put_message(self, key: bytes, value: bytes) -> bytes:
        return self._pb.PutRequest(key=key, value=value).SerializeToString()

    def get_message(self, key: bytes) -> bytes:
        return self._pb.RangeRequest(key=key).SerializeToString()

    def batch_message(self, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
        request = self._pb.TxnRequest()
        for key, value in pairs:
            put = request.success.add().request_put
            put.key = key
            put.value = value
        return request.SerializeToString()

    def scan_message(self, start: bytes, end: bytes, limit: int) -> bytes:
        return self._pb.RangeRequest(key=start, range_end=end, limit=limit).SerializeToString()

    def values_in(self, path: str, response: bytes) -> list[bytes]:
        if path == self.get_path:
            return [pair.value for pair in self._pb.RangeResponse.FromString(response).kvs]
        if path == self.batch_path:
            if not self._pb.TxnResponse.FromString(response).succeeded:
                raise ValueError("the transaction did not succeed")
        elif self._pb.PutResponse.FromString(response).header.revision == 0:
            raise ValueError("the put has no revision")
        return []

    def is_leader(self, node: int) -> bool:
        try:
            status = self._pb.StatusResponse.FromString(
                self.call(node, "/etcdserverpb.Maintenance/Status", b"", timeout_s=1.0))
        except grpc.RpcError:
            return False
        return bool(status.leader) and status.leader == status.header.member_id


class ElasticKVCluster(Cluster):
    """elastickv nodes; encrypted (storage and Raft cut over) or not at all."""

    put_path = "/RawKV/RawPut"
    get_path = "/RawKV/RawGet"
    batch_path = "/RawKV/RawBatch"
    scan_path = "/RawKV/RawScanAt"
    counted = re.compile(r'^elastickv_grpc_calls_total\{method="RawKV/\w+",status="(\w+)"\} '
                         r'(\S+)$', re.MULTILINE)
    front = "h2"

    def __init__(self, directory: Path, *, tls: bool = False, encrypted: bool = True,
                 raft_envelope: bool = True, metrics: bool = False,
                 flags: Sequence[str] = ()) -> None:
        """`raft_envelope=False` leaves the second cutover to `enable_raft_envelope`. With
        `metrics` members count their calls, which is work that is measured as well."""
        super().__init__(directory, tls=tls)
        self._raft_envelope = raft_envelope
        self._metrics_ports = free_ports(NODES) if metrics else []
        from elastickv.crypto.kek_file import write_kek_file
        from elastickv.pb import encryption_admin_pb2, service_pb2

        self.name = "elastickv" if encrypted else "elastickv, not encrypted"
        self._pb = service_pb2
        self._admin_pb = encryption_admin_pb2
        self._encrypted = encrypted
        self._flags = list(flags)
        self._kek = directory / "kek.key"
        if encrypted and not self._kek.exists():
            write_kek_file(self._kek)

    def command(self, node: int) -> list[str]:
        name = MEMBERS[node]
        members = ",".join(f"{other}={HOST}:{port}"
                           for other, port in zip(MEMBERS, self.peer_ports, strict=True))
        transport = ["--insecure"] if self.pki is None else [
            "--tls-cert", self.pki.cert(name), "--tls-key", self.pki.key(name),
            "--tls-ca", self.pki.ca]
        keys = ["--kekFile", str(self._kek), "--encryption-enabled"] if self._encrypted else []
        return [sys.executable, "-m", "elastickv", "node", "--raftId", name,
                "--address", f"{HOST}:{self.client_ports[node]}",
                "--raftAddress", f"{HOST}:{self.peer_ports[node]}",
                "--raftDataDir", str(self.directory / name),
                "--raftBootstrapMembers", members, "--log-level", "warning",
                "--grpc-front", self.front, *transport, *keys, *self._metrics_flags(node),
                *self._flags]

    def over_aio(self) -> ElasticKVCluster | None:
        """The same cluster, data and ports over grpc.aio; None when this one is already."""
        if self.front == "grpc":
            return None
        other = self._again()
        other.front = "grpc"
        return other

    def with_metrics(self) -> ElasticKVCluster:
        """The same cluster, data and ports with members that count their calls."""
        other = self._again()
        other._metrics_ports = free_ports(NODES)
        return other

    def _again(self) -> ElasticKVCluster:
        """The same cluster, which is stopped."""
        other = copy.copy(self)
        other._channels = {}
        return other

    def _metrics_flags(self, node: int) -> list[str]:
        return (["--metrics-address", f"{HOST}:{self._metrics_ports[node]}"]
                if self._metrics_ports else [])

    def after_first_start(self) -> None:
        if not self._encrypted:
            return
        # The cutovers ask every member whether it is capable.
        wait_until(lambda: all(self.answers(node) for node in range(NODES)), self.processes,
                   timeout_s=60, what="all members answer")
        leader = self.leader()
        for method in ("BootstrapEncryption", "EnableStorageEnvelope"):
            self.call(leader, f"/EncryptionAdmin/{method}", b"")
        if self._raft_envelope:
            self.enable_raft_envelope()

    def enable_raft_envelope(self) -> None:
        """The raft cutover."""
        self.call(self.leader(), "/EncryptionAdmin/EnableRaftEnvelope", b"")

    def rotate_dek(self, *, raft: bool = False) -> None:
        """A new storage DEK, or a new raft DEK."""
        request = self._admin_pb.RotateDEKRequest
        message = request(purpose=request.PURPOSE_RAFT if raft else request.PURPOSE_STORAGE)
        self.call(self.leader(), "/EncryptionAdmin/RotateDEK", message.SerializeToString())

    def transfer_leadership(self) -> None:
        """Hand leadership to another member; returns when that member leads."""
        self.call(self.leader(), "/RaftAdmin/TransferLeadership", b"")
        self.leader()

    def last_snapshot_index(self) -> int:
        """Up to where the leader's log is compacted."""
        status = self.call(self.leader(), "/RaftAdmin/Status", b"")
        return self._pb.RaftAdminStatusResponse.FromString(status).last_snapshot_index

    def put_message(self, key: bytes, value: bytes) -> bytes:
        return self._pb.RawPutRequest(key=key, value=value).SerializeToString()

    def get_message(self, key: bytes) -> bytes:
        return self._pb.RawGetRequest(key=key).SerializeToString()

    def batch_message(self, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
        request = self._pb.RawBatchRequest()
        for key, value in pairs:
            operation = request.ops.add()
            operation.key = key
            operation.value = value
        return request.SerializeToString()

    def scan_message(self, start: bytes, end: bytes, limit: int) -> bytes:
        return self._pb.RawScanAtRequest(start_key=start, end_key=end,
                                         limit=limit).SerializeToString()

    def values_in(self, path: str, response: bytes) -> list[bytes]:
        if path == self.get_path:
            found = self._pb.RawGetResponse.FromString(response)
            return [found.value] if found.exists else []
        if path == self.scan_path:
            return [pair.value for pair in self._pb.RawScanAtResponse.FromString(response).kv]
        kind = self._pb.RawPutResponse if path == self.put_path else self._pb.RawBatchResponse
        if kind.FromString(response).commit_index == 0:
            raise ValueError("the write has no commit index")
        return []

    def is_leader(self, node: int) -> bool:
        try:
            status = self._pb.RaftAdminStatusResponse.FromString(
                self.call(node, "/RaftAdmin/Status", b"", timeout_s=1.0))
        except grpc.RpcError:
            return False
        return bool(status.state == self._pb.RAFT_ADMIN_STATE_LEADER)


