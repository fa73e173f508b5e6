"""The journal record and its checksum: pure bytes, no files.

One log entry is one record, on disk and on the wire alike (big endian):

    0        4        8                16               24               32
    +--------+--------+----------------+----------------+----------------+---------...
    | length | CRC32C | index          | term           | synced         | command
    +--------+--------+----------------+----------------+----------------+---------...

`length` counts the command only (at least 1 byte, its kind). The checksum covers everything but
itself, and begins with the salt of the file that the record is in (`segment.py`; none on the wire).
`synced` is the highest index that was durable when the record was written: a valid record
after a damaged one proves that the damaged one had been fsynced only if its `synced` says so.
Without it a power cut that kept a later page of one unsynced group would look like corruption.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from google_crc32c import extend, value

from elastickv.errors import InvalidArgument, WireError
from elastickv.raft.part_checksums import PartChecksums

_LENGTH = struct.Struct(">I")
_CHECKSUM = struct.Struct(">I")
_POSITION = struct.Struct(">QQQ")
_HEADER = struct.Struct(">IIQQQ")

HEADER_BYTES = _HEADER.size
_INDEX_OFFSET = _LENGTH.size + _CHECKSUM.size
_SMALLEST_BYTES = HEADER_BYTES + 1


class Record(NamedTuple):
    """A decoded record. The first three fields are in the order that PySyncObj stores."""

    command: bytes
    index: int  # type: ignore[assignment]
    term: int
    synced: int


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`."""
    return int(value(data))


def encode_header(index: int, term: int, command: bytes, synced: int, salt: int = 0) -> bytes:
    """The 32 bytes that go before `command`."""
    length = _LENGTH.pack(len(command))
    position = _POSITION.pack(index, term, synced)
    return length + _CHECKSUM.pack(extend(extend(salt, length + position), command)) + position


def encode(index: int, term: int, command: bytes, synced: int, salt: int = 0) -> bytes:
    """One whole record."""
    return encode_header(index, term, command, synced, salt) + command


def check_size(command: bytes, max_bytes: int) -> None:
    """Raises `InvalidArgument` naming the limit when `command` may not become a record."""
    if not 0 < len(command) <= max_bytes:
        raise InvalidArgument(f"a log entry holds 1 to {max_bytes} bytes, not {len(command)}",
                              remedy="write less in one batch")


def decode_at(data: bytes | memoryview, offset: int, max_bytes: int,
              salt: int = 0, parts: PartChecksums | None = None) -> tuple[Record, int] | None:
    """The record at `offset` and the offset after it; None when there is no whole valid one. With
    `parts`, those of `data`, that is told in a time that does not grow with the record."""
    start = offset + HEADER_BYTES
    if start > len(data):
        return None
    length, checksum, index, term, synced = _HEADER.unpack_from(data, offset)
    end = start + length
    if not 0 < length <= max_bytes or end > len(data):
        return None
    prefix = bytes(data[offset:offset + 4]) + bytes(data[offset + 8:start])
    salted = extend(salt, prefix)
    if parts is not None and parts.extend(salted, start, end) != checksum:
        return None
    command = bytes(data[start:end])
    if parts is None and extend(salted, command) != checksum:
        return None
    return Record(command, index, term, synced), end


def decode_all(data: bytes, max_bytes: int) -> list[Record]:
    """Every record of a wire blob. Raises `WireError` on the first that is damaged."""
    records: list[Record] = []
    offset = 0
    while offset < len(data):
        found = decode_at(data, offset, max_bytes)
        if found is None:
            raise WireError(f"entry {len(records)} of a replicated group is damaged")
        record, offset = found
        records.append(record)
    return records


def find_next(data: bytes, offset: int, expected_index: int, max_bytes: int,
              salt: int = 0, parts: PartChecksums | None = None) -> tuple[Record, int] | None:
    """The nearest valid record behind the damaged one at `offset`, whose index was to be
    `expected_index`, and the offset after it; None when nothing valid follows.

    The damaged length cannot be trusted, so this looks for eight bytes that are one of the indexes
    that may follow in `data`, where a header would hold them. A client may have chosen bytes that
    look like that everywhere, with any length before them: `parts`, those of `data`, bound what
    each costs.
    """
    parts = parts or PartChecksums(data)
    start = offset + 1 + _INDEX_OFFSET
    last_index = expected_index + (len(data) - offset) // _SMALLEST_BYTES
    pattern = re.compile(_between(expected_index.to_bytes(8, "big"), last_index.to_bytes(8, "big")),
                         re.DOTALL)
    while (match := pattern.search(data, start)) is not None:
        found = decode_at(data, match.start() - _INDEX_OFFSET, max_bytes, salt, parts)
        if found is not None:
            return found
        start = match.start() + 1
    return None


def _between(low: bytes, high: bytes) -> bytes:
    """What matches the strings from `low` to `high`, both of one length: whatever they begin with
    alike, and then the parts of the range in which the next byte is the lowest, between, or the
    highest."""
    count = len(low)
    if low == bytes(count) and high == b"\xff" * count:
        return b".{%d}" % count
    first, last = low[0], high[0]
    if first == last:
        return re.escape(low[:1]) + (_between(low[1:], high[1:]) if count > 1 else b"")
    if count == 1:
        return _any_of(first, last)
    parts = [re.escape(low[:1]) + _between(low[1:], b"\xff" * (count - 1)),
             re.escape(high[:1]) + _between(bytes(count - 1), high[1:])]
    if last - first > 1:
        parts.append(_any_of(first + 1, last - 1) + b".{%d}" % (count - 1))
    return b"(?:%s)" % b"|".join(parts)


def _any_of(first: int, last: int) -> bytes:
    return b"[%s-%s]" % (re.escape(bytes((first,))), re.escape(bytes((last,))))


def synced_behind(data: bytes, expected_index: int, max_bytes: int, salt: int = 0) -> int:
    """The highest `synced` of the valid records behind the damaged one at the start of `data`.

    0 when nothing valid follows. At `expected_index` or above, it proves that the damaged record
    had been durable.
    """
    synced = 0
    parts = PartChecksums(data)
    found = find_next(data, 0, expected_index, max_bytes, salt, parts)
    while found is not None:
        record, offset = found
        synced = max(synced, record.synced)
        found = decode_at(data, offset, max_bytes, salt) \
            or find_next(data, offset, record.index + 1, max_bytes, salt, parts)
    return synced
