"""One segment file of the journal, and its index.

A segment is a header and then records (`records.py`) with consecutive indexes (big endian):

    0      4         8               16              24     28       32
    +------+---------+---------------+---------------+------+--------+-----------------
    | EKJL | version | first index   | previous term | salt | CRC32C | record | record ...
    +------+---------+---------------+---------------+------+--------+-----------------

The header alone says where the log begins: the entry before `first index` had `previous term`.
Version 1 has no salt: its records are those of salt 0, from byte 28 on.

A segment may be written over another that compaction has dropped (a *spare*): that takes no new
blocks and frees none, which a file system may tell the disk about while fsyncs wait. What is left
of the other is behind the last record then. It cannot be taken for a record of this segment: its
records are those of committed entries, all below `first index`, and checksums begin with a salt,
which whoever chose the bytes of an entry does not know.

A sealed segment (one that is followed by another) has an index file beside it, which spares a
start from reading the segment. It is only a cache: without it the segment is read, and so is one
that no later record proves durable.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from pathlib import Path
from typing import NamedTuple

import msgspec

from elastickv.durable import Disk, DiskFile, Reservable
from elastickv.errors import JOIN_ANEW_REMEDY, JournalCorrupt
from elastickv.raft import records
from elastickv.raft.checked_file import decode_checked, encode_checked
from elastickv.raft.records import HEADER_BYTES, Record, crc32c

MAGIC = b"EKJL"
VERSION = 2
_HEADERS = {1: struct.Struct(">4sIQQ"), 2: struct.Struct(">4sIQQI")}
_VERSION = struct.Struct(">4xI")
_CHECKSUM = struct.Struct(">I")
HEADER_SIZE = _HEADERS[VERSION].size + _CHECKSUM.size
INDEX_KIND = b"EKJI"
LOG_SUFFIX, INDEX_SUFFIX, SPARE_SUFFIX = ".log", ".index", ".spare"
TEMPORARY_SUFFIX = ".tmp"
"""What `Disk.replace` leaves when it fails."""
SCAN_BYTES = 4 << 20
RESERVE_BYTES = 1 << 20
"""How much room is made at a time; a start finds the rest of it as zeros and cuts them."""
RESERVE_RECORD_BYTES = 32 << 10
"""Room is made for records up to this size. A lone small write waits less for its fsync then; for a
large one the file system's own commit matters little, and zeros would be written for every byte."""


class SegmentIndex(msgspec.Struct, array_like=True):
    """The index file of a sealed segment. `offsets` is packed native 32-bit, `runs` holds
    (first index, term) and `marked` the indexes of entries that a start must look at."""

    first_index: int
    previous_term: int
    size: int
    offsets: bytes
    runs: list[tuple[int, int]]
    marked: list[int]


class Tail(NamedTuple):
    """What a scan found behind the last good record. `damaged` False = the file ends there."""

    offset: int
    damaged: bool


def segment_name(first_index: int) -> str:
    """File name of the segment that begins with `first_index`; names sort like indexes."""
    return f"{first_index:020d}{LOG_SUFFIX}"


class SegmentHeader(NamedTuple):
    """What a segment begins with, and after how many bytes the records follow."""

    first_index: int
    previous_term: int
    salt: int
    size: int = HEADER_SIZE

    def encode(self) -> bytes:
        """The first bytes of a new segment."""
        body = _HEADERS[VERSION].pack(MAGIC, VERSION, self.first_index, self.previous_term,
                                      self.salt)
        return body + _CHECKSUM.pack(crc32c(body))

    @classmethod
    def decode(cls, data: bytes) -> SegmentHeader | None:
        """The header at the start of `data`; None when it is short or damaged."""
        if len(data) < _VERSION.size:
            return None
        version = _VERSION.unpack_from(data)[0]
        layout = _HEADERS.get(version)
        if layout is None or len(data) < layout.size + _CHECKSUM.size:
            return None
        body, checksum = data[:layout.size], data[layout.size:layout.size + _CHECKSUM.size]
        magic, _, first_index, previous_term, *salt = layout.unpack(body)
        if magic != MAGIC or _CHECKSUM.pack(crc32c(body)) != checksum:
            return None
        return cls(first_index, previous_term, salt[0] if salt else 0,
                   layout.size + _CHECKSUM.size)


class Segment:
    """An open segment: where each record lies. Payloads stay on the disk."""

    def __init__(self, disk: Disk, path: Path, file: DiskFile, header: SegmentHeader) -> None:
        self._disk = disk
        self.path = path
        self.file = file
        self.first_index = header.first_index
        self.previous_term = header.previous_term
        self.salt = header.salt
        self.offsets = array("I")
        self.runs: list[tuple[int, int]] = []
        self.marked: list[int] = []
        self.size = self._header_size = header.size
        self.is_scanned = False
        self._reserved_end = 0
        self._reservable = file if isinstance(file, Reservable) else None

    @property
    def last_index(self) -> int:
        """Index of the last record; `first_index - 1` when there is none."""
        return self.first_index + len(self.offsets) - 1

    @property
    def last_term(self) -> int:
        """Term of the last record, or of the entry before the segment."""
        return self.runs[-1][1] if self.runs else self.previous_term

    @property
    def index_path(self) -> Path:
        """The index file beside the segment."""
        return self.path.with_suffix(INDEX_SUFFIX)

    @classmethod
    def create(cls, disk: Disk, directory: Path, header: SegmentHeader) -> Segment:
        """A new, empty segment, durable on return. Neither a crash nor a full disk leaves its name
        without its header: behind other segments that would look like damage.

        Raises `DiskFull` without effect.
        """
        path = directory / segment_name(header.first_index)
        disk.replace(path, header.encode())
        return cls(disk, path, disk.open_append(path), header)

    @classmethod
    def create_over(cls, disk: Disk, spare: Path, header: SegmentHeader) -> Segment:
        """A new, empty segment in the file of a dropped one, durable on return.

        Raises `FileNotFoundError` if the spare is gone, `DiskFull` without effect.
        """
        path = spare.with_name(segment_name(header.first_index))
        segment = cls(disk, path, disk.reuse(spare, path, header.encode()), header)
        segment._reserved_end = segment.size  # there is room behind it, which sealing must cut
        return segment

    def append(self, record: bytes) -> None:
        """Write one record at the end. Raises `DiskFull` without effect."""
        if self._reservable is not None and len(record) <= RESERVE_RECORD_BYTES \
                and self.size + len(record) > self._reserved_end:
            self._reservable.reserve(len(record) + RESERVE_BYTES)
            self._reserved_end = self.size + len(record) + RESERVE_BYTES
        self.file.append(record)

    def note(self, index: int, term: int, length: int, marked: bool) -> None:
        """Account for a record of `length` command bytes that was written at the end."""
        self.offsets.append(self.size)
        self.size += HEADER_BYTES + length
        if term != self.last_term or not self.runs:
            self.runs.append((index, term))
        if marked:
            self.marked.append(index)

    def read(self, index: int, count: int, max_bytes: int) -> list[Record]:
        """Records from `index` on, up to `count` and about `max_bytes`, but at least one.

        Raises `JournalCorrupt` when one does not match its checksum.
        """
        position = index - self.first_index
        start = self.offsets[position]
        stop = min(position + count, len(self.offsets))
        end_position = position + 1
        while end_position < stop and self._end_of(end_position) - start <= max_bytes:
            end_position += 1
        data = self.file.pread(self._end_of(end_position - 1) - start, start)
        found: list[Record] = []
        offset = 0
        for wanted in range(index, index + end_position - position):
            decoded = records.decode_at(data, offset, len(data), self.salt)
            if decoded is None or decoded[0].index != wanted:
                raise JournalCorrupt(f"{self.path}: entry {wanted} is damaged",
                                     remedy=JOIN_ANEW_REMEDY)
            found.append(decoded[0])
            offset = decoded[1]
        return found

    def _end_of(self, position: int) -> int:
        following = position + 1
        return self.offsets[following] if following < len(self.offsets) else self.size

    def truncate_from(self, index: int) -> None:
        """Durably drop `index` and everything behind it."""
        self._disk.remove(self.index_path)
        position = index - self.first_index
        self.size = self.offsets[position]
        del self.offsets[position:]
        self.runs = [run for run in self.runs if run[0] < index]
        self.marked = [marked for marked in self.marked if marked < index]
        self._reserved_end = 0
        self.file.truncate(self.size)
        self.file.sync()

    def seal(self) -> None:
        """Make the segment durable and write its index file; nothing is appended afterwards."""
        # Room that was made, or what an append left that found the disk full.
        self.file.truncate(self.size)
        self.file.sync()
        body = SegmentIndex(self.first_index, self.previous_term, self.size,
                            self.offsets.tobytes(), self.runs, self.marked)
        self._disk.replace(self.index_path,
                           encode_checked(INDEX_KIND, msgspec.msgpack.encode(body)))

    def load_index(self) -> bool:
        """Fill this segment from its index file; False when there is no usable one."""
        try:
            data = self._disk.read(self.index_path)
            index = msgspec.msgpack.decode(decode_checked(INDEX_KIND, data, self.index_path),
                                           type=SegmentIndex)
        except (FileNotFoundError, JournalCorrupt, msgspec.MsgspecError, UnicodeDecodeError):
            return False
        if (index.first_index, index.size) != (self.first_index, self.file.size()):
            return False
        self.offsets.frombytes(index.offsets)
        self.runs = index.runs
        self.marked = index.marked
        self.size = index.size
        return True

    def scan(self, max_command_bytes: int, marked_kind: bytes) -> Tail:
        """Read the records and note each, whatever an index file told of them; stops at the first
        that is not the next good one."""
        self.offsets, self.runs, self.marked = array("I"), [], []
        self.size = self._header_size
        self.is_scanned = True
        end = self.file.size()
        while self.size < end:
            base = self.size
            self._scan_window(self.file.pread(SCAN_BYTES, base), max_command_bytes, marked_kind)
            if self.size == base:
                window = self.file.pread(HEADER_BYTES + max_command_bytes, base)
                self._scan_window(window, max_command_bytes, marked_kind)
            if self.size == base:
                return Tail(base, True)
        return Tail(end, False)

    def _scan_window(self, window: bytes, max_command_bytes: int, marked_kind: bytes) -> None:
        """Note the records that begin `window`, which was read at the current end."""
        offset = 0
        while (found := records.decode_at(window, offset, max_command_bytes,
                                          self.salt)) is not None:
            record, offset = found
            if record.index != self.last_index + 1 or record.term < self.last_term:
                return
            self.note(record.index, record.term, len(record.command),
                      record.command[:1] == marked_kind)

    def cut(self, offset: int) -> None:
        """Drop what is behind `offset`, where a scan ended; durable with `make_tail_durable`."""
        self._disk.remove(self.index_path)
        self.file.truncate(offset)

    def make_tail_durable(self, synced: int) -> None:
        """Make durable what a start has read; up to entry `synced` it is known to be."""
        position = min(synced, self.last_index) - self.first_index
        self.file.rewrite(self.offsets[position] if position >= 0 else 0)
        self.file.sync()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self.file.close()

    def remove(self) -> None:
        """Close and delete the segment."""
        self.close()
        self.delete_files()

    def delete_files(self) -> None:
        """Delete a closed segment or the spare that it has become, the index first. In any thread;
        idempotent."""
        self._disk.remove(self.index_path)
        self._disk.remove(self.path)
        self._disk.remove(self.spare_path)

    @property
    def spare_path(self) -> Path:
        """Where the segment's file is once it holds nothing that counts."""
        return self.path.with_suffix(SPARE_SUFFIX)

    def make_spare(self) -> None:
        """Delete a closed segment, and keep its file for another. In any thread; nothing when
        `delete_files` was quicker."""
        self._disk.remove(self.index_path)
        with contextlib.suppress(FileNotFoundError):
            self._disk.rename(self.path, self.spare_path)
