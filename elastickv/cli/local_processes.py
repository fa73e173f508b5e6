"""The processes and files behind `elastickv local-cluster`.

Everything lives under one directory:

    cluster.json          how many nodes and which ports; fixed by the first run
    kek.key               the key-encryption key, owner-only
    certs/                authority, one certificate per node, one for the client `admin`
    client.env            variables that point `elastickv client` and `admin` at the cluster
    n1/ n2/ ...           data directories; each with its node.log
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from elastickv import certs
from elastickv.cli import exit_codes
from elastickv.config import TlsFiles, without_variables
from elastickv.crypto.kek_file import write_kek_file
from elastickv.durable import OsDisk
from elastickv.errors import BindFailed, ConfigError, StartupRefused

HOST = "127.0.0.1"
CLIENT_NAME = "admin"
STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 5

_PR_SET_PDEATHSIG = 1

@dataclass(frozen=True, slots=True)
class Shape:
    """What the first run fixes: the membership in the log holds these addresses."""

    nodes: int
    client_port: int
    raft_port: int


@dataclass(frozen=True, slots=True)
class LocalNode:
    """One node: its id, its two loopback ports, and where its files are."""

    node_id: str
    client_port: int
    raft_port: int
    directory: Path

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return f"{HOST}:{self.client_port}"

    @property
    def log_path(self) -> Path:
        """Where its stderr goes."""
        return self.directory / "node.log"


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a local cluster."""

    root: Path
    shape: Shape

    @property
    def nodes(self) -> tuple[LocalNode, ...]:
        return tuple(
            LocalNode(f"n{number}", self.shape.client_port + number - 1,
                      self.shape.raft_port + number - 1, self.root / f"n{number}")
            for number in range(1, self.shape.nodes + 1))

    @property
    def kek_file(self) -> Path:
        return self.root / "kek.key"

    @property
    def client_env(self) -> Path:
        return self.root / "client.env"

    @property
    def members(self) -> list[tuple[str, str]]:
        """(id, client address) of every node."""
        return [(node.node_id, node.address) for node in self.nodes]

    def tls(self, name: str) -> TlsFiles:
        """The certificate files of a node or of the client."""
        pair = certs.pair_paths(self.root / "certs", name)
        return TlsFiles(pair.cert, pair.key, self.root / "certs" / "ca.crt")


def prepare(root: Path, wanted: Shape) -> tuple[Layout, list[str]]:
    """Make what is missing under `root`; the layout, and a line for each thing that was made.

    Raises `ConfigError` when `root` was made for another number of nodes or other ports, or cannot
    be made or written.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data: {root} cannot be made: {error.strerror}",
                          remedy="choose another directory") from None
    try:
        return _fill(root, wanted)
    except OSError as error:
        raise _unusable(root, error) from None


def _unusable(root: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--data: {error.filename or root} cannot be used: {error.strerror}",
                       remedy="make it readable and writable for this user, or choose another "
                              "directory")


def _fill(root: Path, wanted: Shape) -> tuple[Layout, list[str]]:
    layout = Layout(root, wanted)
    made: list[str] = []
    _fix_shape(root / "cluster.json", wanted)
    if not layout.kek_file.exists():
        write_kek_file(layout.kek_file)
        made.append(f"key-encryption key {layout.kek_file}")
    directory = root / "certs"
    if not certs.pair_paths(directory, certs.CA_NAME).cert.exists():
        certs.create_ca(directory)
        made.append(f"certificate authority {directory / 'ca.crt'}")
    for node in layout.nodes:
        node.directory.mkdir(mode=0o700, exist_ok=True)
        if not certs.pair_paths(directory, node.node_id).cert.exists():
            made.append(f"certificate {certs.create_node(directory, node.node_id).cert}")
    if not certs.pair_paths(directory, CLIENT_NAME).cert.exists():
        made.append(f"certificate {certs.create_client(directory, CLIENT_NAME).cert}")
    layout.client_env.write_bytes(os.fsencode(client_environment(layout)))
    return layout, made


def _fix_shape(path: Path, wanted: Shape) -> None:
    try:
        found = Shape(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        # Whole or not at all: what a full disk cuts off could not be read again.
        OsDisk().replace(path, json.dumps(asdict(wanted)).encode() + b"\n")
        return
    except (ValueError, TypeError):
        raise ConfigError(f"{path} cannot be read", remedy="choose another --data") from None
    if found != wanted:
        raise ConfigError(
            f"{path.parent} holds a cluster of {found.nodes} node(s) on ports "
            f"{found.client_port} and {found.raft_port} upward, not the one asked for",
            remedy=f"start that one again (make run NODES={found.nodes}), or use another "
                   "directory (make run DATA=./other)")


def client_environment(layout: Layout) -> str:
    """Shell lines that point the client commands at this cluster."""
    tls = layout.tls(CLIENT_NAME)
    variables = {
        "ELASTICKV_ENDPOINTS": ",".join(node.address for node in layout.nodes),
        "ELASTICKV_TLS_CA": str(tls.ca.resolve()),
        "ELASTICKV_TLS_CERT": str(tls.cert.resolve()),
        "ELASTICKV_TLS_KEY": str(tls.key.resolve()),
    }
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def check_ports(layout: Layout) -> None:
    """Raise `BindFailed` that names the first port somebody else listens on, or `ConfigError` when
    two nodes would share one."""
    ports = [port for node in layout.nodes for port in (node.client_port, node.raft_port)]
    if len(set(ports)) < len(ports):
        raise ConfigError("the client ports and the raft ports overlap",
                          remedy="choose --client-port and --raft-port further apart")
    for node in layout.nodes:
        for port in (node.client_port, node.raft_port):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                # As servers do: connections of an earlier run in TIME_WAIT are no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                    raise BindFailed(
                        f"port {port} for {node.node_id} is in use",
                        remedy="stop whatever listens there (is another local cluster running?)"
                               " or choose --client-port and --raft-port") from None


def node_command(layout: Layout, node: LocalNode) -> list[str]:
    """The command line of one node."""
    tls = layout.tls(node.node_id)
    members = ",".join(f"{other.node_id}={HOST}:{other.raft_port}" for other in layout.nodes)
    return [
        sys.executable, "-m", "elastickv", "node",
        "--raftId", node.node_id,
        "--address", node.address,
        "--raftAddress", f"{HOST}:{node.raft_port}",
        "--raftDataDir", str(node.directory),
        "--raftBootstrapMembers", members,
        "--kekFile", str(layout.kek_file),
        "--encryption-enabled",
        "--tls-cert", str(tls.cert), "--tls-key", str(tls.key), "--tls-ca", str(tls.ca),
    ]


def _die_with_parent() -> None:
    """In the child: get SIGTERM when the parent is gone, so that kill -9 leaves no orphan."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class NodeProcess:
    """One running node."""

    def __init__(self, layout: Layout, node: LocalNode) -> None:
        self.node = node
        with node.log_path.open("ab") as log:
            # Its own session: Ctrl-C must reach the nodes as our SIGTERM, in our order.
            self._process = subprocess.Popen(
                node_command(layout, node), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=without_variables(os.environ), start_new_session=True,
                preexec_fn=_die_with_parent)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def wait_or_kill(self, timeout_s: float) -> int:
        """The exit code; kill -9 after `timeout_s`."""
        try:
            return self._process.wait(timeout=max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def log_tail(self) -> str:
        """The last lines of its log."""
        text = self.node.log_path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])

    def describe_exit(self) -> str:
        """One line on how it ended and where to look."""
        code = self._process.poll()
        if code is None:
            return f"{self.node.node_id} is running"
        return (f"{self.node.node_id} ended with exit code {code} ({exit_codes.meaning(code)}); "
                f"see {self.node.log_path}")


def start_all(layout: Layout) -> list[NodeProcess]:
    """Start every node."""
    check_ports(layout)
    try:
        return [NodeProcess(layout, node) for node in layout.nodes]
    except OSError as error:
        raise _unusable(layout.root, error) from None


def stop_all(processes: Sequence[NodeProcess]) -> dict[str, int]:
    """SIGTERM to all, wait, kill what does not end; exit codes by node id."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    return {process.node.node_id: process.wait_or_kill(deadline - time.monotonic())
            for process in processes}


def require_alive(processes: Sequence[NodeProcess]) -> None:
    """Raise `StartupRefused` with the end of the log when a node has ended."""
    for process in processes:
        if process.exit_code() is not None:
            raise StartupRefused(f"{process.describe_exit()}\n{process.log_tail()}")


def exits(processes: Sequence[NodeProcess]) -> Iterator[NodeProcess]:
    """Each process as it ends, until none is left."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            if process.exit_code() is not None:
                yield process
                continue
            selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, process)
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(key.fd)
                os.close(key.fd)
                key.data.exit_code()
                yield key.data
