"""What this node durably remembers of its peers, so that a disk from the past is found out.

Raft assumes that a node never forgets. A node whose disk was put back from an old copy does: it may
vote twice in a term, or count again towards an entry that it lost. It cannot notice alone, but its
peers can: each remembers the peer's last boot, its last acknowledged entry and the highest term in
which it spoke, and says so in its greeting. A node that finds itself behind any of these is
*suspect*: it takes entries, but it neither votes nor is counted until it has caught up with a
leader.

One case cannot be told from an ordinary crash: a leader that had sent entries and comes back
without them may have lost them before its fsync, or it may have committed them. It only gets a
*floor*: until its log reaches the entry that a voter has from it, it does not stand for election
and votes for nobody whose log does not reach it. That voter's log does, so it can be elected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from elastickv.durable import Disk
from elastickv.raft.checked_file import encode_checked, load_checked
from elastickv.raft.frames import PeerRecord
from elastickv.raft.replaced import NOTHING_REPLACED, LogEnd, ReplacedTail

FILE_NAME = "peers"
KIND = b"EKPM"
NOTHING = PeerRecord(0, 0, 0, 0, 0, 0, 0)


class Position(NamedTuple):
    """What a node has: its boot, its term, the end of its durable log, and what that lacks because
    a leader replaced it."""

    boot_epoch: int
    boot_id: int
    term: int
    last_index: int
    last_term: int
    replaced: ReplacedTail = NOTHING_REPLACED

    def lacks(self, term: int, index: int) -> bool:
        """Whether an entry that this node had is lost. The log is compared as in an election:
        what a later leader replaced was not lost."""
        end, entry = LogEnd(self.last_term, self.last_index), LogEnd(term, index)
        return entry > end and not self.replaced.explains(end, entry)


def what_was_lost(remembered: PeerRecord, own: Position, *, boots: bool = True,
                  entries: bool = True) -> str:
    """Why a node at `own` must have lost data that a peer remembers; "" when all is well. Without
    `boots` or `entries` what the peer remembers of these tells nothing."""
    if boots and is_past_boot(remembered, own):
        return f"a peer saw boot {remembered.boot_epoch} of this node, which now boots as " \
               f"{own.boot_epoch}"
    if (term := known_term(remembered)) > own.term:
        return f"a peer knows of this node in term {term}, its own term is {own.term}"
    if entries and own.lacks(remembered.acked_term, remembered.acked_index):
        return f"a peer has this node's acknowledgement of entry {remembered.acked_index}, its " \
               f"log ends at {own.last_index}"
    return ""


def known_term(remembered: PeerRecord) -> int:
    """The highest term that a node certainly had on its disk: it spoke in it, or had an entry of
    it. A leader speaks in none; the term of what it sent was there before it led."""
    return max(remembered.term, remembered.acked_term, remembered.sent_term)


def is_past_boot(remembered: PeerRecord, own: Position) -> bool:
    """Whether a peer saw a later boot of a node than that at `own`, or another of its number."""
    return remembered.boot_epoch > own.boot_epoch or (
        remembered.boot_epoch == own.boot_epoch and remembered.boot_id != own.boot_id)


def missing_floor(remembered: PeerRecord, own: Position) -> tuple[int, int] | None:
    """(term, index) of the last entry that a node at `own` had sent as a leader and does not have
    any more; None when it has all."""
    sent = remembered.sent_term, remembered.sent_index
    return sent if own.lacks(*sent) else None


class PeerMemory:
    """The records, in memory at once and on the disk soon.

    `begin_flush` gives a job for any thread; everything else is the loop's. A job may run beside a
    write that the loop cannot put off: they exclude each other, and a job that comes after a newer
    write does nothing.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path
        self._records: dict[str, PeerRecord] = \
            load_checked(disk, path, KIND, dict[str, PeerRecord]) or {}
        # (term, index), ahead of the records: they move with every entry, and nobody looks.
        self._sent = {peer_id: (record.sent_term, record.sent_index)
                      for peer_id, record in self._records.items()}
        self._acked = {peer_id: (record.acked_term, record.acked_index)
                       for peer_id, record in self._records.items()}
        self._lock = threading.Lock()
        # Every change counts up; what is written lags behind.
        self._version = 0
        self._written_version = 0

    def of(self, peer_id: str) -> PeerRecord | None:
        """What is remembered of `peer_id`, None for a stranger."""
        self._merge_positions()
        return self._records.get(peer_id)

    def peers(self) -> list[str]:
        """Everybody of whom something is remembered."""
        return sorted(self._records.keys() | self._sent.keys() | self._acked.keys())

    def booted(self, peer_id: str, boot_epoch: int, boot_id: int, term: int) -> None:
        """A peer greeted with a boot that is new here. Durable on return; raises `DiskFull` with
        nothing of it remembered, so that it is as new when the peer greets again."""
        self._merge_positions()
        record = self._records.get(peer_id, NOTHING)
        self._write({**self._records, peer_id: msgspec.structs.replace(
            record, boot_epoch=boot_epoch, boot_id=boot_id, term=max(term, record.term))})

    def spoke(self, peer_id: str, term: int) -> None:
        """A peer voted or acknowledged in `term`."""
        record = self._records.get(peer_id, NOTHING)
        if term > record.term:
            self._records[peer_id] = msgspec.structs.replace(record, term=term)
            self._version += 1

    def sent(self, peer_id: str, index: int, term: int) -> None:
        """A leader sent the entry at `index`, which has `term` and is durable here."""
        if (term, index) > self._sent.get(peer_id, (0, 0)):
            self._sent[peer_id] = (term, index)
            self._version += 1

    def acknowledged(self, peer_id: str, index: int, term: int) -> None:
        """A peer certainly had the entry at `index`, which has `term`, on its disk."""
        if (term, index) > self._acked.get(peer_id, (0, 0)):
            self._acked[peer_id] = (term, index)
            self._version += 1

    def forget(self, peer_id: str) -> None:
        """The peer is no member any more; one that joins under its name begins anew."""
        self._merge_positions()
        self._sent.pop(peer_id, None)
        self._acked.pop(peer_id, None)
        if self._records.pop(peer_id, None) is not None:
            self._version += 1

    def _merge_positions(self) -> None:
        """Bring the records up to date with what was sent and acknowledged."""
        for peer_id in self._sent.keys() | self._acked.keys():
            (sent_term, sent_index) = self._sent.get(peer_id, (0, 0))
            (acked_term, acked_index) = self._acked.get(peer_id, (0, 0))
            self._records[peer_id] = msgspec.structs.replace(
                self._records.get(peer_id, NOTHING), sent_index=sent_index, sent_term=sent_term,
                acked_index=acked_index, acked_term=acked_term)

    def begin_flush(self) -> Callable[[], None] | None:
        """What makes everything durable, for any thread; None when nothing has changed. When it
        fails, what it did not write is as new as before."""
        if self._written_version == self._version:
            return None
        self._merge_positions()
        return self._job(self._records)

    def flush(self) -> None:
        """Make everything durable now."""
        if (job := self.begin_flush()) is not None:
            job()

    def _write(self, records: dict[str, PeerRecord]) -> None:
        self._version += 1
        self._job(records)()
        self._records = records

    def _job(self, records: dict[str, PeerRecord]) -> Callable[[], None]:
        return partial(self._replace, self._version,
                       encode_checked(KIND, msgspec.msgpack.encode(records)))

    def _replace(self, version: int, data: bytes) -> None:
        with self._lock:
            if version > self._written_version:
                self._disk.replace(self._path, data)
                self._written_version = version
