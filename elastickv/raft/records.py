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
from collections.abc import Iterator
from typing import NamedTuple

from google_crc32c import extend, value

from elastickv.errors import InvalidArgument, WireError

_LENGTH = struct.Struct(">I")
_CHECKSUM = struct.Struct(">I")
_POSITION = struct.Struct(">QQQ")
_HEADER = struct.Struct(">IIQQQ")

HEADER_BYTES = _HEADER.size
_INDEX_OFFSET = _LENGTH.size + _CHECKSUM.size
LOOKAHEAD_INDEXES = 64
"""How many following indexes `find_next` looks for behind a damaged record."""


class Record(NamedTuple):
    """A decoded record. The first three fields are in the order that PySyncObj stores."""

    command: bytes
    index: int  # type: ignore[assignment]
    term: int
    synced: int


def crc32c(data: bytes, crc: int = 0) -> int:
    """CRC-32C of `data`, continuing from `crc`."""
    return int(extend(crc, data)) if crc else int(value(data))


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
              salt: int = 0) -> tuple[Record, int] | None:
    """The record at `offset` and the offset after it; None when there is no whole valid one."""
    start = offset + HEADER_BYTES
    if start > len(data):
        return None
    length, checksum, index, term, synced = _HEADER.unpack_from(data, offset)
    end = start + length
    if not 0 < length <= max_bytes or end > len(data):
        return None
    command = bytes(data[start:end])
    prefix = bytes(data[offset:offset + 4]) + bytes(data[offset + 8:start])
    if extend(extend(salt, prefix), command) != checksum:
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
              salt: int = 0) -> tuple[Record, int] | None:
    """The nearest valid record behind the damaged one at `offset`, whose index was to be
    `expected_index`, and the offset after it; None when nothing valid follows.

    The damaged length cannot be trusted, so this looks for the eight bytes of the following indexes
    where a header would hold them.
    """
    nearest: tuple[Record, int] | None = None
    end = len(data)
    for pattern in _indexes_from(expected_index):
        match = pattern.search(data, offset + 1 + _INDEX_OFFSET, end)
        while match is not None:
            start = match.start() - _INDEX_OFFSET
            found = decode_at(data, start, max_bytes, salt)
            if found is not None:
                nearest, end = found, match.start()
                break
            match = pattern.search(data, match.start() + 1, end)
    return nearest


def _indexes_from(first: int) -> Iterator[re.Pattern[bytes]]:
    """What matches the eight bytes of `first` and the indexes behind it, up to
    `LOOKAHEAD_INDEXES`. They begin alike, so that one pass, or two, find all of them."""
    end = first + LOOKAHEAD_INDEXES
    while first < end:
        last = min(end - 1, first | 0xFF)
        yield re.compile(b"%s[%s-%s]" % (re.escape(first.to_bytes(8, "big")[:-1]),
                                         re.escape(bytes((first & 0xFF,))),
                                         re.escape(bytes((last & 0xFF,)))))
        first = last + 1


def synced_behind(data: bytes, expected_index: int, max_bytes: int, salt: int = 0) -> int:
    """The highest `synced` of the valid records behind the damaged one at the start of `data`.

    0 when nothing valid follows. At `expected_index` or above, it proves that the damaged record
    had been durable.
    """
    synced = 0
    found = find_next(data, 0, expected_index, max_bytes, salt)
    while found is not None:
        record, offset = found
        synced = max(synced, record.synced)
        found = decode_at(data, offset, max_bytes, salt) \
            or find_next(data, offset, record.index + 1, max_bytes, salt)
    return synced
