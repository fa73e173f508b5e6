"""What a node says that cannot take the leader's key state over at its start: what to do about it,
not that no leader answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from memory_node import MemoryNode, running

from elastickv import config, contacts, resync
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import full_node_id
from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, ElasticKVError
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.guards import (
    WRONG_KEK_REMEDY,
    EpochExhausted,
    Facts,
    KekDoesNotUnwrap,
    SidecarBehindLog,
)
from elastickv.keys.provenance import Recorded
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar, SidecarKey
from elastickv.kv.api import SidecarState
from elastickv.startup import Gathered
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store

KEK = Kek(bytes(range(32)))
WRAPPED = {1: KEK.generate_wrapped_dek(), 2: KEK.generate_wrapped_dek()}
LEADERS = SidecarState(WRAPPED, 1, 2, False, 0, 9, sidecar_index=5,
                       purposes_by_id={1: int(Purpose.STORAGE), 2: int(Purpose.RAFT)})


class FullDisk(OsDisk):
    """A disk that takes no sidecar."""

    def replace(self, path: Path, data: bytes) -> None:
        if path.name == RELATIVE_PATH.name:
            raise DiskFull(f"no space left to write {path}", remedy="free space")
        super().replace(path, data)


@dataclass
class Case:
    """A node without a sidecar, and a leader that has one."""

    leader: MemoryNode
    directory: Path
    kek: Kek = KEK
    disk: OsDisk = field(default_factory=OsDisk)
    sidecar: Sidecar | None = None
    stored: Sidecar | None = None

    @property
    def path(self) -> Path:
        return self.directory / RELATIVE_PATH

    async def repair(self) -> bool:
        contacts.store(OsDisk(), self.directory, [contacts.Contact("n2", self.leader.address)])
        if self.sidecar is not None:
            sidecar_file.store(OsDisk(), self.path, self.sidecar)
        facts = Facts(full_node_id=full_node_id("n1"), encryption_enabled=True,
                      kek_configured=True, sidecar=self.sidecar,
                      recorded=Recorded(9, 5, 0, self.stored))
        settings = config.resolve({
            "raft_id": "n1", "raft_bootstrap": "true", "insecure": "true",
            "raft_data_dir": str(self.directory), "address": "127.0.0.1:1",
            "raft_address": "127.0.0.1:2"}, {})
        store = Store.open(MemoryBackend(OsDisk(), self.directory / "store"))
        return await resync.repair(settings, self.disk, store, Gathered(facts, self.kek))


@pytest.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    node = MemoryNode("n2")
    node.encryption.state = LEADERS
    async with running(node):
        yield Case(node, tmp_path)


async def test_the_leaders_keys_are_taken_over(case: Case) -> None:
    assert await case.repair()
    taken = sidecar_file.load(OsDisk(), case.path)
    assert taken is not None
    assert {dek_id: key.wrapped for dek_id, key in taken.keys.items()} == WRAPPED


def another_kek(case: Case) -> None:
    case.kek = Kek(bytes(32))


def used_up_epochs(case: Case) -> None:
    case.sidecar = Sidecar(4, False, 0, 0, 1, 2, {
        1: SidecarKey(Purpose.STORAGE, WRAPPED[1], "", 0xFFFF),
        2: SidecarKey(Purpose.RAFT, WRAPPED[2], "", 1)})


def another_key_under_the_same_id(case: Case) -> None:
    case.sidecar = Sidecar(4, False, 0, 0, 1, 2, {
        1: SidecarKey(Purpose.STORAGE, KEK.generate_wrapped_dek(), "", 1),
        2: SidecarKey(Purpose.RAFT, WRAPPED[2], "", 1)})


def no_keys_on_the_leader(case: Case) -> None:
    case.leader.encryption.state = SidecarState({}, 0, 0, False, 0, 0)


def a_directory_in_the_way(case: Case) -> None:
    case.path.mkdir(parents=True)


def full_disk(case: Case) -> None:
    case.disk = FullDisk()


@pytest.mark.parametrize(("spoil", "kind", "words", "remedy"), [
    (another_kek, KekDoesNotUnwrap, "does not unwrap", WRONG_KEK_REMEDY),
    (used_up_epochs, EpochExhausted, "cannot be taken over: this node has used every epoch",
     "first run elastickv admin encryption rotate-dek"),
    (another_key_under_the_same_id, SidecarBehindLog, "cannot be taken over: DEK 1 is another key",
     "move it away"),
    (no_keys_on_the_leader, SidecarBehindLog, "cannot be taken over: the leader has no keys",
     "check that the endpoints"),
    (a_directory_in_the_way, SidecarBehindLog, "is a directory", "move it away"),
    (full_disk, DiskFull, "no space left", "free space"),
], ids=["another KEK", "used-up epochs", "another key under the same id", "no keys on the leader",
        "a directory in the way", "a full disk"])
async def test_what_the_leader_answered_is_told(
        case: Case, spoil: Callable[[Case], None], kind: type[ElasticKVError], words: str,
        remedy: str) -> None:
    spoil(case)
    with pytest.raises(kind) as caught:
        await case.repair()
    assert words in caught.value.message
    assert remedy in caught.value.remedy
    assert "could not be asked" not in caught.value.message


async def test_a_leader_that_does_not_answer_is_told_with_the_command(
        case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "LEADER_TIMEOUT_S", 0.2)
    await case.leader.server.stop(grace_s=0)
    with pytest.raises(SidecarBehindLog, match="the leader could not be asked") as caught:
        await case.repair()
    assert "resync-sidecar --raftId n1" in caught.value.remedy
    assert "away" not in caught.value.remedy


def state_at(index: int, epoch: int = 1) -> Sidecar:
    return Sidecar(index, False, 0, 0, 1, 2, {
        1: SidecarKey(Purpose.STORAGE, WRAPPED[1], "", epoch),
        2: SidecarKey(Purpose.RAFT, WRAPPED[2], "", 1)})


@pytest.mark.parametrize(("epoch", "kind", "words"), [
    (1, SidecarBehindLog, "keys.json away and start"), (0xFFFF, EpochExhausted, "")])
async def test_a_node_without_which_there_is_no_leader_is_told_of_its_stores_copy(
        case: Case, monkeypatch: pytest.MonkeyPatch, epoch: int, kind: type[ElasticKVError],
        words: str) -> None:
    """As in a cluster of one, where no leader will ever answer."""
    monkeypatch.setattr(resync, "LEADER_TIMEOUT_S", 0.2)
    await case.leader.server.stop(grace_s=0)
    case.sidecar, case.stored = state_at(4, epoch), state_at(5, epoch)
    with pytest.raises(kind) as caught:
        await case.repair()
    assert words in caught.value.remedy
    assert ("away" in caught.value.remedy) is bool(words)
    assert sidecar_file.load(OsDisk(), case.path) == case.sidecar
    case.path.unlink()
    case.sidecar = None
    if words:
        await case.repair()
        assert sidecar_file.load(OsDisk(), case.path) == case.stored
