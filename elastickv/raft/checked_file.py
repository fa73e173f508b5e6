"""Small durable records: one file each, replaced whole (`Disk.replace`).

    0      4        8        12
    +------+--------+--------+------------------+
    | kind | length | CRC32C | msgpack body ... |     big endian
    +------+--------+--------+------------------+

The checksum covers kind and body. A damaged record is never treated as an absent one: forgetting a
vote can elect two leaders in one term, so `JournalCorrupt` refuses the start.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TypeVar

import msgspec

from elastickv.durable import Disk
from elastickv.errors import JOIN_ANEW_REMEDY, JournalCorrupt
from elastickv.raft.records import crc32c

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
