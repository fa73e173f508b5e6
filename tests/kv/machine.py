"""One replica of the state machine on a real store and a real applier, and shortcuts for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from elastickv.clock import FakeClock, HybridLogicalClock, pack_timestamp
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.crypto.nonce import NonceFactory
from elastickv.durable import OsDisk
from elastickv.errors import DiskFull
from elastickv.keys.applier import Applier
from elastickv.kv.api import OpKind
from elastickv.kv.fsm import KvStateMachine
from elastickv.raft.engine import Entry
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store
from elastickv.store.values import open_record, plain_record, seal_record
from elastickv.wire import (
    Bootstrap,
    RegistryRow,
    Rotation,
    RotationTag,
    WriteOp,
    WriteRequest,
    encode_entry,
    encode_writes,
)

KEK = Kek(bytes(range(32)))
STORAGE_DEK, RAFT_DEK, NODE = 11, 22, 0x1234
NOW_MS = 1_000_000


class SmallDisk(OsDisk):
    """A disk for the sidecar that can be full."""

    room: float = math.inf
    """How often the file can be replaced before the disk is full."""

    def replace(self, path: Path, data: bytes) -> None:
        if not self.room:
            raise DiskFull(f"no space left to write {path}")
        self.room -= 1
        super().replace(path, data)


@dataclass
class Machine:
    """One replica and the shortcuts that the tests speak in."""

    directory: Path
    full_node_id: int = 0
    changed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        disk = self.disk = SmallDisk()
        self.backend = MemoryBackend(OsDisk(), self.directory / "store")
        self.store = Store.open(self.backend)
        self.applier = Applier(disk=disk, read_row=self.store.row, kek=KEK, keystore=Keystore(),
                               sidecar_path=self.directory / "keys.json",
                               full_node_id=self.full_node_id)
        self.applier.load()
        self.hlc = HybridLogicalClock(FakeClock(wall_ms=NOW_MS))
        self.fsm = KvStateMachine(self.store, self.applier, self.hlc,
                                  on_keys_changed=self.changed.append)
        self.nonces = NonceFactory(1, 1)

    def apply(self, payload: bytes, index: int = 0) -> object:
        index = index or self.store.applied_index + 1
        return self.fsm.apply([Entry(index, 1, payload)])[0]

    def write(self, *requests: WriteRequest) -> list[object]:
        outcomes = self.apply(encode_writes(requests))
        assert isinstance(outcomes, list)
        return outcomes

    def handle(self, dek_id: int) -> KeyHandle:
        handle = self.applier.keystore.get(dek_id)
        assert handle is not None
        return handle

    def sealed(self, key: bytes, commit_ts: int, value: bytes) -> WriteRequest:
        record = seal_record(self.handle(STORAGE_DEK), self.nonces.next(), key, commit_ts, value)
        return WriteRequest(commit_ts, [WriteOp(OpKind.PUT, key, record)], [])

    def value(self, key: bytes) -> bytes | None:
        version = self.store.get(key, (1 << 64) - 1, NOW_MS)
        return version and open_record(self.applier.keystore, version.store_key, version.record)

    def bootstrap(self) -> None:
        self.apply(encode_entry(Bootstrap(
            STORAGE_DEK, KEK.generate_wrapped_dek(), RAFT_DEK, KEK.generate_wrapped_dek(),
            (RegistryRow(STORAGE_DEK, NODE, 0), RegistryRow(RAFT_DEK, NODE, 0)))))

    def cut_over(self, tag: RotationTag, dek_id: int, purpose: Purpose) -> None:
        self.apply(encode_entry(Rotation(tag, dek_id, purpose, b"",
                                         RegistryRow(dek_id, NODE, 0))))

    def enable_storage(self) -> None:
        self.cut_over(RotationTag.ENABLE_STORAGE_ENVELOPE, STORAGE_DEK, Purpose.STORAGE)

    def enable_raft(self) -> None:
        self.cut_over(RotationTag.ENABLE_RAFT_ENVELOPE, RAFT_DEK, Purpose.RAFT)

    def fingerprint(self) -> tuple[object, ...]:
        path = self.directory / "keys.json"
        return (self.store.applied_index, self.store.rows(), self.value(b"k"),
                path.read_bytes() if path.exists() else None, self.applier.keystore.ids())


def ts(step: int) -> int:
    return pack_timestamp(NOW_MS, step)


def plain(key: bytes, commit_ts: int, value: bytes,
          conditions: list[tuple[bytes, int]] | None = None) -> WriteRequest:
    return WriteRequest(commit_ts, [WriteOp(OpKind.PUT, key, plain_record(value))],
                        conditions or [])
