"""The byte layout of a ciphertext, and what is authenticated with it.

    version(1) | flag(1) | key_id(4, BE) | nonce(12) | ciphertext | tag(16)

34 bytes over the plaintext. Version 1 is AES-256-GCM, version 2 AES-256-GCM-SIV. Flag bit 0: the
plaintext was Snappy-compressed before encryption; other bits are refused. key_id 0 is never a key.

The additional authenticated data (AAD) is not stored; both sides compute it:

    storage: version(1) | flag(1) | key_id(4) | value header(9) | store key
    raft:    'R'        | version(1) | key_id(4)

so a value moved to another key, version or header does not open. The raft AAD does not cover the
flag, hence a raft envelope must have flag 0.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from elastickv.errors import IntegrityError

VERSION_GCM: Final = 0x01
VERSION_GCM_SIV: Final = 0x02
VERSIONS: Final = (VERSION_GCM, VERSION_GCM_SIV)
FLAG_SNAPPY: Final = 0x01
KNOWN_FLAGS: Final = FLAG_SNAPPY

NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
PREFIX_BYTES: Final = 6
HEADER_BYTES: Final = PREFIX_BYTES + NONCE_BYTES
OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES
VALUE_HEADER_BYTES: Final = 9
MAX_KEY_ID: Final = 0xFFFF_FFFF

_PREFIX = struct.Struct(">BBI")
_RAFT_AAD = struct.Struct(">cBI")


class Failure(enum.StrEnum):
    """Why an envelope did not open; the label of the decrypt failure counter."""

    TRUNCATED = "truncated"
    VERSION = "version"
    FLAG = "flag"
    KEY_ID = "key-id"
    TAG = "tag"
    COMPRESSION = "compression"


class EnvelopeError(IntegrityError):
    """An envelope that does not open. `reason` is safe to log; the bytes are not in the message."""

    def __init__(self, reason: Failure, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Envelope(NamedTuple):
    """A parsed, not yet authenticated envelope; `body` is ciphertext + tag."""

    version: int
    flag: int
    key_id: int
    nonce: bytes
    body: bytes


def encode_prefix(version: int, flag: int, key_id: int) -> bytes:
    """`version | flag | key_id`: the first six bytes of an envelope and of the storage AAD."""
    return _PREFIX.pack(version, flag, key_id)


def parse_prefix(data: bytes) -> tuple[int, int, int]:
    """`(version, flag, key_id)` of an envelope, checked. Raises `EnvelopeError`."""
    if len(data) < OVERHEAD_BYTES:
        raise EnvelopeError(Failure.TRUNCATED,
                            f"an envelope of {len(data)} bytes; the least is {OVERHEAD_BYTES}")
    version, flag, key_id = _PREFIX.unpack_from(data, 0)
    if version not in VERSIONS:
        raise EnvelopeError(Failure.VERSION, f"unknown envelope version 0x{version:02x}")
    if flag & ~KNOWN_FLAGS:
        raise EnvelopeError(Failure.FLAG, f"unknown envelope flag bits 0x{flag:02x}")
    if key_id == 0:
        raise EnvelopeError(Failure.KEY_ID, "an envelope under key id 0, which is never a key")
    return version, flag, key_id


def parse_envelope(data: bytes) -> Envelope:
    """Split an envelope. Raises `EnvelopeError`; authenticates nothing."""
    version, flag, key_id = parse_prefix(data)
    return Envelope(version, flag, key_id, bytes(data[PREFIX_BYTES:HEADER_BYTES]),
                    bytes(data[HEADER_BYTES:]))


def encode_envelope(envelope: Envelope) -> bytes:
    """The inverse of `parse_envelope`."""
    version, flag, key_id, nonce, body = envelope
    return b"".join((encode_prefix(version, flag, key_id), nonce, body))


def storage_aad(version: int, flag: int, key_id: int, header: bytes, store_key: bytes) -> bytes:
    """`version(1) | flag(1) | key_id(4, BE) | value header(9) | store key`."""
    return b"".join((encode_prefix(version, flag, key_id), header, store_key))


def raft_aad(version: int, key_id: int) -> bytes:
    """`'R' | version(1) | key_id(4, BE)`."""
    return _RAFT_AAD.pack(b"R", version, key_id)
