"""Real `elastickv node` processes on loopback, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elastickv.client import Client
from elastickv.crypto.kek_file import write_kek_file
from elastickv.errors import ElasticKVError
from jepsen.network.ports import free_ports

READY_TIMEOUT_S = 30.0


@dataclass
class NodeProcess:
    """One node: how it is started, and its process while it runs."""

    node_id: str
    address: str
    raft_address: str
    directory: Path
    arguments: list[str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """Everything that it wrote to stderr and stdout."""
        return (self.directory.parent / f"{self.node_id}.log").read_text()

    def start(self) -> None:
        """Start the process; does not wait."""
        with (self.directory.parent / f"{self.node_id}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "elastickv", "node", *self.arguments],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def kill(self, kind: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal, wait, and return the exit code."""
        if self.process is None:
            raise RuntimeError(f"{self.node_id} does not run")
        self.process.send_signal(kind)
        code = self.process.wait(timeout=30)
        self.process = None
        return code


@dataclass
class Cluster:
    """`size` nodes under one directory, in plain text on loopback."""

    directory: Path
    size: int = 3
    encryption: bool = True
    extra: Sequence[str] = ()
    nodes: dict[str, NodeProcess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        ports = free_ports(2 * self.size)
        names = [f"n{number}" for number in range(1, self.size + 1)]
        members = ",".join(f"{name}=127.0.0.1:{ports[self.size + i]}"
                           for i, name in enumerate(names))
        kek = self.directory / "kek"
        if self.encryption:
            write_kek_file(kek)
        for i, name in enumerate(names):
            self._define(name, ports[i], ports[self.size + i],
                         ["--raftBootstrapMembers", members],
                         kek if self.encryption else None)

    def _define(self, name: str, port: int, raft_port: int, cluster: list[str],
                kek: Path | None) -> NodeProcess:
        address, raft = f"127.0.0.1:{port}", f"127.0.0.1:{raft_port}"
        arguments = ["--raftId", name, "--address", address, "--raftAddress", raft,
                     "--raftDataDir", str(self.directory / name), *cluster, "--insecure",
                     "--accept-loops", "2", *self.extra]
        if kek is not None:
            arguments += ["--kekFile", str(kek), "--encryption-enabled"]
        node = NodeProcess(name, address, raft, self.directory / name, arguments)
        self.nodes[name] = node
        return node

    def newcomer(self, name: str, *via: str, kek: str = "kek") -> NodeProcess:
        """A node that joins through the named members. `kek` "" = none, else a file beside the
        node directories, made if it is not there."""
        port, raft_port = free_ports(2)
        path = self.directory / kek if kek else None
        if path is not None and not path.exists():
            write_kek_file(path)
        join = ",".join(f"{each}={self.nodes[each].raft_address}" for each in via)
        return self._define(name, port, raft_port, ["--raftJoin", join], path)

    @property
    def endpoints(self) -> list[str]:
        return [node.address for node in self.nodes.values()]

    def client(self, *names: str, timeout_s: float = 10.0) -> Client:
        """A client of the named nodes (default: all)."""
        return Client([self.nodes[name].address for name in names or self.nodes],
                      timeout_s=timeout_s)

    async def start(self, *names: str) -> None:
        """Start the named nodes (default: all) and wait until each knows a leader."""
        for name in names or self.nodes:
            self.nodes[name].start()
        for name in names or self.nodes:
            await self.ready(name)

    async def ready(self, name: str) -> None:
        """Wait until a node has applied everything that a linearizable read needs."""
        node = self.nodes[name]
        async with asyncio.timeout(READY_TIMEOUT_S), self.client(name, timeout_s=1.0) as client:
            while True:
                if node.process is not None and (code := node.process.poll()) is not None:
                    raise RuntimeError(f"{name} ended with {code}: {node.log[-2000:]}")
                try:
                    await client.get(b"ready?")
                except ElasticKVError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def leader(self) -> str:
        """The id of the node that leads."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                for name, node in self.nodes.items():
                    if node.process is None:
                        continue
                    async with self.client(name, timeout_s=1.0) as client:
                        try:
                            status = await client.raft.status()
                        except ElasticKVError:
                            continue
                        if status.role.name == "LEADER":
                            return name
                await asyncio.sleep(0.05)

    async def encrypt(self) -> None:
        """Bootstrap and both cutovers."""
        async with self.client() as client:
            await client.encryption.bootstrap()
            await client.encryption.enable_storage_envelope()
            await client.encryption.enable_raft_envelope()

    async def logged(self, name: str, text: str) -> None:
        """Wait until a node has logged `text`."""
        node = self.nodes[name]
        async with asyncio.timeout(READY_TIMEOUT_S):
            while text not in node.log:
                if node.process is None or node.process.poll() is not None:
                    raise RuntimeError(f"{name} does not run: {node.log[-2000:]}")
                await asyncio.sleep(0.05)

    async def exit_code(self, name: str, timeout_s: float = READY_TIMEOUT_S) -> int:
        """The exit code of a node that ends by itself."""
        process = self.nodes[name].process
        if process is None:
            raise RuntimeError(f"{name} does not run")
        code = await asyncio.to_thread(process.wait, timeout_s)
        self.nodes[name].process = None
        return code

    def stop(self) -> None:
        """Kill whatever runs."""
        for node in self.nodes.values():
            if node.process is not None:
                node.kill()

    def files(self) -> list[Path]:
        """Every file of every node, logs included, the KEK excluded."""
        found = []
        for root, _, names in os.walk(self.directory):
            found += [Path(root) / name for name in names if name != "kek"]
        return found

    def holds_bytes(self, needle: bytes) -> list[Path]:
        """Files in which `needle` occurs. One that a running node deletes meanwhile is none."""
        found = []
        for path in self.files():
            with contextlib.suppress(FileNotFoundError):
                if needle in path.read_bytes():
                    found.append(path)
        return found
