"""The value header: the 9 bytes in front of every stored value.

    byte  0      bit 0       tombstone
                 bits 1-2    encryption state: 00 plaintext, 01 envelope, 10 and 11 refused
                 bits 3-7    must be 0
    bytes 1-8    expiry, milliseconds since the Unix epoch, little-endian u64, 0 = never

A *record* is header + body; the body is plaintext or an envelope, as the header says. The header is
part of the storage AAD, so that under an envelope none of its bits can be changed unnoticed.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from elastickv.errors import IntegrityError

HEADER_BYTES = 9
TOMBSTONE_BIT = 0x01
STATE_SHIFT = 1
MAX_FLAGS = 0x03
"""The highest legal byte 0: with bit 2 and the upper bits 0, only bits 0 and 1 are left."""

MAX_EXPIRY_MS = (1 << 64) - 1
NEVER = bytes(8)


class EncryptionState(enum.IntEnum):
    """What the body is. Read from the header, never guessed from the body."""

    PLAINTEXT = 0
    ENVELOPE = 1


STATE_MASK = 0b11 << STATE_SHIFT
PLAINTEXT_BITS = EncryptionState.PLAINTEXT << STATE_SHIFT
ENVELOPE_BITS = EncryptionState.ENVELOPE << STATE_SHIFT
ENVELOPE_KEY_ID = slice(HEADER_BYTES + 2, HEADER_BYTES + 6)
"""Where a record with an envelope has its key id: the envelope's version and flag come before."""


LASTING_HEADERS = frozenset((bytes((PLAINTEXT_BITS,)) + NEVER, bytes((ENVELOPE_BITS,)) + NEVER))
"""The headers of values that are there at any time."""


class ValueHeader(NamedTuple):
    """A parsed header; `expiry_ms` 0 = never."""

    tombstone: bool
    state: EncryptionState
    expiry_ms: int


def encode_header(*, tombstone: bool = False, state: EncryptionState = EncryptionState.PLAINTEXT,
                  expiry_ms: int = 0) -> bytes:
    """The 9 bytes. Raises `ValueError` when `expiry_ms` does not fit 64 bits."""
    if not 0 <= expiry_ms <= MAX_EXPIRY_MS:
        raise ValueError(f"expiry_ms {expiry_ms} does not fit 64 bits")
    flags = (TOMBSTONE_BIT if tombstone else 0) | (state << STATE_SHIFT)
    return bytes((flags,)) + expiry_ms.to_bytes(8, "little")


def parse_header(record: bytes) -> ValueHeader:
    """The header at the start of `record`.

    Raises `IntegrityError` when it is short, names an unknown encryption state, or sets a reserved
    bit.
    """
    check_record(record)
    flags = record[0]
    return ValueHeader(bool(flags & TOMBSTONE_BIT), EncryptionState(flags >> STATE_SHIFT),
                       int.from_bytes(record[1:HEADER_BYTES], "little"))


def check_record(record: bytes) -> None:
    """Raise `IntegrityError` unless `record` starts with a legal header."""
    if len(record) < HEADER_BYTES:
        raise IntegrityError(f"a stored record of {len(record)} bytes is shorter than its header")
    if record[0] > MAX_FLAGS:
        raise IntegrityError(f"a stored record has an illegal header byte {record[0]:#04x}")
