"""Clusters of real engines in one process: real journal, real TLS links, in-memory state."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from elastickv.certs import create_ca, create_node, pair_paths
from elastickv.config import TlsFiles
from elastickv.durable import Disk, OsDisk
from elastickv.raft.engine import Entry, Member, Role
from elastickv.raft.offload import ThreadOffload
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.settings import EngineSettings
from elastickv.raft.tls_links import TlsLinks
from jepsen.network.ports import free_address

sys.path.insert(0, str(Path(__file__).parent))

TIMEOUT_S = 10.0

# Elections are quicker than by default; a leader bears the pauses of a busy machine.
FAST = {"election_min_s": 0.4, "election_max_s": 0.8, "leader_fallback_s": 3.0,
        "heartbeat_s": 0.05}


async def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait for a condition; fail the test when it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


class ListMachine:
    """Remembers what was applied; the list outlives the engine, like a store on a disk."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.refuse: dict[bytes, Exception] = {}

    @property
    def applied_index(self) -> int:
        return self.entries[-1].index if self.entries else 0

    @property
    def durable_index(self) -> int:
        return self.applied_index

    def may_apply(self) -> bool:
        return True

    def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        for entry in entries:
            if entry.payload in self.refuse:
                raise self.refuse[entry.payload]
        for entry in entries:
            if self.entries and entry.index != self.applied_index + 1:
                raise AssertionError(f"{entry.index} applied after {self.applied_index}")
            self.entries.append(entry)
        return [entry.payload.upper() for entry in entries]

    def payloads(self) -> list[bytes]:
        """The user payloads, in order."""
        return [entry.payload for entry in self.entries if entry.payload]


class Node:
    """One member: an engine that can be stopped, killed and started again on the same disk."""

    def __init__(self, member: Member, members: Sequence[Member], path: Path,
                 tls: TlsFiles | None, overrides: dict[str, object]) -> None:
        self.member = member
        self.members = members
        self.path = path
        self.tls = tls
        self.overrides = overrides
        self.disk: Disk = OsDisk()
        self.machine = ListMachine()
        self.fatal: list[BaseException] = []
        self.roles: list[tuple[Role, int]] = []
        self.engine: PySyncObjEngine = self._new_engine()

    def _new_engine(self) -> PySyncObjEngine:
        settings = EngineSettings(self.member.node_id, self.members, self.path,
                                  client_address=f"client-of-{self.member.node_id}",
                                  **self.overrides)  # type: ignore[arg-type]
        self.links = TlsLinks(self.member.node_id, self.member.address, tls=self.tls,
                              max_entry_bytes=settings.max_entry_bytes)
        engine = PySyncObjEngine(settings, self.machine, self.disk, self.links,
                                 offload=ThreadOffload())
        engine.on_fatal(self.fatal.append)
        engine.on_role_change(lambda role, term: self.roles.append((role, term)))
        return engine

    async def restart(self) -> None:
        """Start anew what was stopped."""
        self.engine = self._new_engine()
        await self.engine.start()


class Cluster:
    """Several nodes on loopback."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    async def start(self) -> None:
        for node in self.nodes:
            await node.engine.start()

    async def leader(self) -> Node:
        """Wait for a leader that may serve."""
        await wait_until(lambda: any(node.engine.is_leader() for node in self.nodes))
        return next(node for node in self.nodes if node.engine.is_leader())

    async def followers(self) -> list[Node]:
        leader = await self.leader()
        return [node for node in self.nodes if node is not leader]

    async def applied_everywhere(self) -> None:
        """Wait until every running node applied what the leader committed."""
        leader = await self.leader()
        index = await leader.engine.read_index(timeout_s=TIMEOUT_S)
        for node in self.nodes:
            if node.engine.status().role is not Role.SHUTDOWN:
                await node.engine.wait_applied(index, timeout_s=TIMEOUT_S)

    async def stop(self) -> None:
        await asyncio.gather(*(node.engine.stop() for node in self.nodes))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a CA and node certificates for n1 to n5."""
    directory = tmp_path_factory.mktemp("certs")
    create_ca(directory)
    for number in range(1, 6):
        create_node(directory, f"n{number}")
    return directory


def tls_files(directory: Path, node_id: str) -> TlsFiles:
    pair = pair_paths(directory, node_id)
    return TlsFiles(pair.cert, pair.key, pair_paths(directory, "ca").cert)


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    """`await until(condition)`."""
    return wait_until


MakeCluster = Callable[..., Cluster]


@pytest.fixture
async def make_cluster(tmp_path: Path, certificates: Path) -> AsyncIterator[MakeCluster]:
    """Makes clusters (not started) and stops them afterwards."""
    made: list[Cluster] = []

    def make(size: int = 3, *, tls: bool = True, **overrides: object) -> Cluster:
        members = [Member(f"n{number}", free_address()) for number in range(1, size + 1)]
        cluster = Cluster([
            Node(member, members, tmp_path / f"{len(made)}-{member.node_id}",
                 tls_files(certificates, member.node_id) if tls else None, FAST | overrides)
            for member in members])
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        await cluster.stop()
