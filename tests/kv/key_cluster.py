"""Whole nodes below the servers, on real engines and links in one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from elastickv.clock import HybridLogicalClock, SystemClock
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore, Purpose
from elastickv.crypto.nonce import full_node_id
from elastickv.durable import OsDisk
from elastickv.errors import MembershipConflict
from elastickv.keys.applier import Applier
from elastickv.keys.registry import WRITERS_PREFIX
from elastickv.keys.sidecar import Sidecar
from elastickv.keys.usage import Limits
from elastickv.kv.encryption import EncryptionController
from elastickv.kv.fsm import KvStateMachine
from elastickv.kv.key_value import KeyValue
from elastickv.kv.rotation import RotationSettings
from elastickv.raft.engine import Member
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.settings import EngineSettings
from elastickv.raft.tls_links import TlsLinks
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store
from elastickv.store.values import open_record
from jepsen.network.ports import free_address

TIMEOUT_S = 20.0
KEK_BYTES = bytes(range(32))
DEFAULT = RotationSettings(Limits(1 << 32))


async def until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Return when `condition()` holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


class Node:
    """One node's parts, as `elastickv.node` puts them together."""

    def __init__(self, member: Member, members: list[Member], directory: Path, *,
                 kek: bytes = KEK_BYTES, gate: bool = True,
                 rotation: RotationSettings = DEFAULT) -> None:
        disk = OsDisk()
        self.node_id = member.node_id
        self.full_id = full_node_id(member.node_id)
        self.store = Store.open(MemoryBackend(disk, directory / "store"))
        self.applier = Applier(disk=disk, read_row=self.store.row, kek=Kek(kek),
                               keystore=Keystore(), sidecar_path=directory / "keys.json",
                               full_node_id=self.full_id)
        self.applier.load()
        hlc = HybridLogicalClock(SystemClock(), last=self.store.max_commit_ts)
        machine = KvStateMachine(
            self.store, self.applier, hlc,
            on_keys_changed=lambda index: self.encryption.keys_changed(index))
        settings = EngineSettings(member.node_id, members, directory / "raft", election_min_s=0.15,
                                  election_max_s=0.3, heartbeat_s=0.03)
        links = TlsLinks(member.node_id, member.address, tls=None,
                         max_entry_bytes=settings.max_entry_bytes)
        self.engine = PySyncObjEngine(settings, machine, disk, links)
        self.fatal: list[BaseException] = []
        self.engine.on_fatal(self.fatal.append)
        self.encryption = EncryptionController(
            self.engine, self.store, self.applier, full_node_id=self.full_id, kek=Kek(kek),
            gate=gate, build_sha="test", on_fatal=self.fatal.append, rotation=rotation)
        self.kv = KeyValue(
            self.engine, self.store, hlc, self.encryption,
            opener=lambda key, record: open_record(self.applier.keystore, key, record),
            writable=self.encryption.refusal, max_value_bytes=1 << 20, max_request_bytes=2 << 20)

    async def start(self, *, encryption: bool = True) -> None:
        await self.engine.start()
        if encryption:
            self.encryption.start()

    async def stop(self) -> None:
        self.encryption.stop()
        await self.engine.stop()
        if self.store.dirty:
            self.store.flush_now()
        self.store.close()

    @property
    def sidecar(self) -> Sidecar:
        sidecar = self.applier.sidecar
        assert sidecar is not None
        return sidecar

    def active(self, purpose: Purpose) -> int:
        return self.sidecar.active(purpose)

    def nonces_made(self, dek_id: int) -> int:
        """How many this process has made under a DEK."""
        factory = self.encryption.writers.nonces(dek_id)
        return factory.count if factory is not None else 0

    def writer_rows(self) -> list[tuple[bytes, bytes]]:
        return self.store.rows(WRITERS_PREFIX)

    async def bootstrap(self) -> None:
        await self.encryption.bootstrap(
            wrapped_storage=b"", wrapped_raft=b"", storage_dek_id=0, raft_dek_id=0, writers=[],
            timeout_s=TIMEOUT_S)

    async def encrypt(self) -> None:
        """Bootstrap and both cutovers."""
        await self.bootstrap()
        for enable in (self.encryption.enable_storage_envelope,
                       self.encryption.enable_raft_envelope):
            await enable(proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)

    async def rotate(self, purpose: Purpose = Purpose.STORAGE) -> int:
        """The new DEK's id."""
        result = await self.encryption.rotate_dek(
            purpose=purpose, wrapped=b"", new_dek_id=0, proposer_node_id=0,
            proposer_local_epoch=0, timeout_s=TIMEOUT_S)
        return result.new_dek_id

    async def put(self, key: bytes, value: bytes = b"v") -> None:
        await self.kv.put(key, value, timeout_s=TIMEOUT_S)


class KeyCluster:
    """Nodes n1 to n`size` on one machine. `options` go to `Node`, by node id where given so."""

    def __init__(self, directory: Path, size: int = 1, *, names: list[str] | None = None,
                 options: dict[str, object] | None = None,
                 by_node: dict[str, dict[str, object]] | None = None) -> None:
        self.directory = directory
        self.members = [Member(name, free_address())
                        for name in names or [f"n{i + 1}" for i in range(size)]]
        self.options = options or {}
        self.by_node = by_node or {}
        self.nodes: dict[str, Node] = {}
        for member in self.members:
            self.make(member.node_id)

    def make(self, node_id: str) -> Node:
        """A new process of a node, not started."""
        member = next(member for member in self.members if member.node_id == node_id)
        options = self.options | self.by_node.get(node_id, {})
        directory = self.directory / node_id
        directory.mkdir(parents=True, exist_ok=True)
        node = Node(member, self.members, directory, **options)  # type: ignore[arg-type]
        self.nodes[node_id] = node
        return node

    async def start(self) -> None:
        for node in self.nodes.values():
            await node.start()
        await self.leader()

    async def leader(self) -> Node:
        await until(lambda: any(node.engine.is_leader() for node in self.nodes.values()))
        return next(node for node in self.nodes.values() if node.engine.is_leader())

    async def hand_over(self, node_id: str) -> None:
        """Have a member lead, as soon as the leader has an answer from it: right after a start, or
        where the machine is slow, it may have none."""
        async with asyncio.timeout(TIMEOUT_S):
            while (leader := await self.leader()).node_id != node_id:
                with contextlib.suppress(MembershipConflict):
                    await leader.engine.transfer_leadership(node_id, timeout_s=TIMEOUT_S)
                    return
                await asyncio.sleep(0.01)

    async def restart(self, node_id: str) -> Node:
        await self.nodes[node_id].stop()
        node = self.make(node_id)
        await node.start()
        return node

    async def settled(self) -> None:
        """Every node has applied what the leader has, and is a writer of the active DEKs."""
        leader = await self.leader()
        index = await leader.engine.read_index(timeout_s=TIMEOUT_S)
        for node in self.nodes.values():
            await node.engine.wait_applied(index, timeout_s=TIMEOUT_S)
        await until(lambda: all(node.encryption.writers.epoch(node.active(purpose))
                                for node in self.nodes.values() for purpose in Purpose))

    async def stop(self) -> None:
        await asyncio.gather(*(node.stop() for node in self.nodes.values()))


MakeCluster = Callable[..., Awaitable[KeyCluster]]
