"""What Raft must never forget: term, vote, boot epoch, and what was found out about this disk."""

from __future__ import annotations

from pathlib import Path

import msgspec

from elastickv.durable import Disk
from elastickv.raft.checked_file import encode_checked, load_checked
from elastickv.raft.replaced import NOTHING_REPLACED, ReplacedTail

FILE_NAME = "hardstate"


class HardState(msgspec.Struct, frozen=True, array_like=True):
    """What Raft must never forget. `vote` is "" for none; `boot_epoch` counts starts from 1;
    `suspect`: this node has lost data and has not yet caught up with a leader. The floor is the
    entry below which nobody may be elected with this node's help, (0, 0) for none. `replaced`:
    what a leader had this node drop of its log. `joined`: it has been a member. `node_id`: whose
    directory this is, "" when it was written before that was remembered."""

    term: int
    vote: str
    boot_epoch: int
    suspect: bool = False
    floor_term: int = 0
    floor_index: int = 0
    replaced: ReplacedTail = NOTHING_REPLACED
    joined: bool = False
    node_id: str = ""


def owner_of(disk: Disk, raft_directory: Path) -> str:
    """Whose directory it is; "" when nothing is known. Raises `JournalCorrupt`."""
    return HardStateFile(disk, raft_directory / FILE_NAME).state.node_id


class HardStateFile:
    """The node's `HardState`, durable before any message that reveals it leaves."""

    KIND = b"EKHS"

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path
        self.state = load_checked(disk, path, self.KIND, HardState) or HardState(0, "", 0)
        self.existed = self.state.boot_epoch > 0

    def _save(self, state: HardState) -> None:
        self._disk.replace(self._path, encode_checked(self.KIND, msgspec.msgpack.encode(state)))
        self.state = state

    def begin_boot(self, node_id: str = "") -> int:
        """Count this start, durably, as one of `node_id`; the new boot epoch."""
        self._save(msgspec.structs.replace(self.state, boot_epoch=self.state.boot_epoch + 1,
                                           node_id=node_id or self.state.node_id))
        return self.state.boot_epoch

    def set_term(self, term: int, vote: str) -> None:
        """Durably adopt `term` and `vote`; a no-op when they are what is stored."""
        if (term, vote) != (self.state.term, self.state.vote):
            self._save(msgspec.structs.replace(self.state, term=term, vote=vote))

    def lost_data(self, term: int, vote: str, boot_epoch: int) -> None:
        """Durably remember that this node must not be trusted, that its vote of `term` is spent and
        that its boots count on from at least `boot_epoch`: all of it, or nothing."""
        self._save(msgspec.structs.replace(
            self.state, suspect=True, term=term, vote=vote,
            boot_epoch=max(boot_epoch, self.state.boot_epoch)))

    def regained_data(self) -> None:
        """Durably remember that this node may be trusted."""
        if self.state.suspect:
            self._save(msgspec.structs.replace(self.state, suspect=False))

    def set_floor(self, term: int, index: int) -> None:
        """Durably remember the floor."""
        if (term, index) != (self.state.floor_term, self.state.floor_index):
            self._save(msgspec.structs.replace(self.state, floor_term=term, floor_index=index))

    def set_replaced(self, replaced: ReplacedTail) -> None:
        """Durably remember what was dropped of the log, before it is."""
        if replaced != self.state.replaced:
            self._save(msgspec.structs.replace(self.state, replaced=replaced))

    def set_joined(self) -> None:
        """Durably remember that this node has been a member."""
        if not self.state.joined:
            self._save(msgspec.structs.replace(self.state, joined=True))

    def raise_boot(self, boot_epoch: int) -> None:
        """Durably count on from at least `boot_epoch`: a peer saw higher boots than this disk."""
        if boot_epoch > self.state.boot_epoch:
            self._save(msgspec.structs.replace(self.state, boot_epoch=boot_epoch))
