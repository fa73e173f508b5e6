"""A node's key state for tests: an applier on a real directory, and the rows a store would hold."""

from __future__ import annotations

from pathlib import Path

from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import KeyHandle, Keystore
from elastickv.durable import OsDisk
from elastickv.keys.applier import Applier
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar
from elastickv.wire import Bootstrap, EncryptionEntry, RegistryRow, Rotation, RotationTag

KEK = Kek(bytes(range(32)), source="test")
OTHER_KEK = Kek(bytes(32), source="another test")
CREATED = "2026-01-02T03:04:05Z"

# One fixed wrapped form per key; DEKs named by what the tests use them for.
STORAGE_DEK, RAFT_DEK, THIRD_DEK, FOURTH_DEK = (bytes([n]) * 32 for n in (1, 2, 3, 4))
W_STORAGE, W_RAFT, W_THIRD, W_FOURTH = (
    KEK.wrap(dek) for dek in (STORAGE_DEK, RAFT_DEK, THIRD_DEK, FOURTH_DEK))
W_STORAGE_AGAIN = KEK.wrap(STORAGE_DEK)

STORAGE, RAFT, THIRD = 1, 2, 3
NODE_A, NODE_B = 0xAAAA_0000_0000_0011, 0xBBBB_0000_0000_0022
TWIN_OF_A = 0xCCCC_0000_0000_0011

State = tuple[Sidecar | None, bytes | None, tuple[tuple[int, KeyHandle | None], ...],
              dict[bytes, bytes]]


class KeyNode:
    """An applier with its directory and rows. `now` differs per node: it must decide nothing."""

    def __init__(self, directory: Path, *, kek: Kek | None = KEK, wired: bool = True,
                 created: str = CREATED) -> None:
        self.directory = directory
        self.path = directory / RELATIVE_PATH
        self.rows: dict[bytes, bytes] = {}
        self.kek = kek
        self.created = created
        self.applier = self.open(wired=wired)

    def open(self, *, wired: bool = True) -> Applier:
        return Applier(disk=OsDisk(), read_row=lambda key: self.rows.get(key), kek=self.kek,
                       keystore=Keystore() if wired else None,
                       sidecar_path=self.path if wired else None, now=lambda: self.created)

    def restart(self) -> None:
        """A new process on the same directory."""
        self.applier = self.open()
        self.applier.load()

    def apply(self, index: int, entry: EncryptionEntry) -> None:
        self.rows.update(self.applier.apply(index, entry))

    def file_bytes(self) -> bytes | None:
        return self.path.read_bytes() if self.path.exists() else None

    def state(self) -> State:
        """Everything an entry may change; handles compare by identity."""
        keystore = self.applier.keystore
        return (self.applier.sidecar, self.file_bytes(),
                tuple((key_id, keystore.get(key_id)) for key_id in keystore.ids()),
                dict(self.rows))


def bootstrap(*rows: RegistryRow, storage_id: int = STORAGE, wrapped_storage: bytes = W_STORAGE,
              raft_id: int = RAFT, wrapped_raft: bytes = W_RAFT) -> Bootstrap:
    return Bootstrap(storage_id, wrapped_storage, raft_id, wrapped_raft, rows)


def rotate(dek_id: int = THIRD, wrapped: bytes = W_THIRD, *, purpose: int = 1, node: int = NODE_A,
           epoch: int = 0, proposer_dek_id: int | None = None,
           tag: RotationTag = RotationTag.ROTATE_DEK) -> Rotation:
    registered = dek_id if proposer_dek_id is None else proposer_dek_id
    return Rotation(tag, dek_id, purpose, wrapped, RegistryRow(registered, node, epoch))


def storage_cutover(dek_id: int = STORAGE, *, wrapped: bytes = b"", purpose: int = 1,
                    node: int = NODE_A, epoch: int = 0,
                    proposer_dek_id: int | None = None) -> Rotation:
    return rotate(dek_id, wrapped, purpose=purpose, node=node, epoch=epoch,
                  proposer_dek_id=proposer_dek_id, tag=RotationTag.ENABLE_STORAGE_ENVELOPE)


def raft_cutover(dek_id: int = RAFT, *, wrapped: bytes = b"", purpose: int = 2,
                 node: int = NODE_A, epoch: int = 0,
                 proposer_dek_id: int | None = None) -> Rotation:
    return rotate(dek_id, wrapped, purpose=purpose, node=node, epoch=epoch,
                  proposer_dek_id=proposer_dek_id, tag=RotationTag.ENABLE_RAFT_ENVELOPE)
