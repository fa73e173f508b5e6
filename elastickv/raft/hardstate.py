"""Small durable records: term, vote and boot epoch; the membership; what is known of peers.

Every record is one file, replaced whole (`Disk.replace`), with the layout (big endian)

    0      4        8        12
    +------+--------+--------+------------------+
    | kind | length | CRC32C | msgpack body ... |
    +------+--------+--------+------------------+

A damaged record is never treated as an absent one: forgetting a vote can elect two leaders in one
term, so `JournalCorrupt` refuses the start.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TypeVar

import msgspec

from elastickv.durable import Disk
from elastickv.errors import JOIN_ANEW_REMEDY, JournalCorrupt
from elastickv.raft.records import crc32c
from elastickv.raft.replaced import NOTHING_REPLACED, ReplacedTail

FILE_NAME = "hardstate"
_HEADER = struct.Struct(">4sII")
T = TypeVar("T")


def encode_checked(kind: bytes, body: bytes) -> bytes:
    """`body` behind its kind, length and checksum."""
    return _HEADER.pack(kind, len(body), crc32c(kind + body)) + body


def decode_checked(kind: bytes, data: bytes, path: Path) -> bytes:
    """The body of a checked record. Raises `JournalCorrupt` naming `path`."""
    if len(data) >= _HEADER.size:
        found, length, checksum = _HEADER.unpack_from(data)
        body = data[_HEADER.size:]
        if found == kind and length == len(body) and crc32c(kind + body) == checksum:
            return body
    raise JournalCorrupt(f"{path} is damaged", remedy=JOIN_ANEW_REMEDY)


def load_checked(disk: Disk, path: Path, kind: bytes, body_type: type[T]) -> T | None:
    """The record at `path`, None when the file is absent. Raises `JournalCorrupt`."""
    try:
        data = disk.read(path)
    except FileNotFoundError:
        return None
    body = decode_checked(kind, data, path)
    try:
        return msgspec.msgpack.decode(body, type=body_type)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise JournalCorrupt(f"{path} does not parse",
                             remedy="it was written by a newer version, or by something else"
                             ) from None


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

    def set_suspect(self, suspect: bool) -> None:
        """Durably remember that this node must not be trusted, or that it may be again."""
        if suspect != self.state.suspect:
            self._save(msgspec.structs.replace(self.state, suspect=suspect))

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
