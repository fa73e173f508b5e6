"""Sealing and opening values and raft payloads.

Every failure to open is an `EnvelopeError` (an `IntegrityError`) raised `from None`: neither the
cause nor the message carries bytes of the value or the key. The nonce is the caller's (see
`crypto.nonce`); sealing two plaintexts under one nonce and key is forbidden.
"""

from __future__ import annotations

from typing import Final

import cramjam
from cryptography.exceptions import InvalidTag

from elastickv.crypto.envelope import (
    FLAG_SNAPPY,
    HEADER_BYTES,
    NONCE_BYTES,
    OVERHEAD_BYTES,
    PREFIX_BYTES,
    VALUE_HEADER_BYTES,
    VERSION_GCM,
    VERSIONS,
    EnvelopeError,
    Failure,
    parse_prefix,
)
from elastickv.crypto.keystore import Aead, KeyHandle, Keystore
from elastickv.errors import InvalidArgument

MAX_DECOMPRESSED_BYTES: Final = 64 * 1024 * 1024
_MAX_VARINT_BYTES = 5
_PREFIX_IN_RECORD = slice(VALUE_HEADER_BYTES, VALUE_HEADER_BYTES + PREFIX_BYTES)
_NONCE_IN_RECORD = slice(VALUE_HEADER_BYTES + PREFIX_BYTES, VALUE_HEADER_BYTES + HEADER_BYTES)
_BODY_IN_RECORD = slice(VALUE_HEADER_BYTES + HEADER_BYTES, None)


def _sealer(handle: KeyHandle, nonce: bytes, version: int) -> Aead:
    """The way of every seal, so that whoever watches nonces has one place to look."""
    if len(nonce) != NONCE_BYTES:
        raise InvalidArgument(f"a nonce of {len(nonce)} bytes, must be {NONCE_BYTES}")
    aead = handle.aead[version] if version in VERSIONS else None
    if aead is None:
        raise InvalidArgument(f"unknown envelope version {version}")
    return aead


def _wrong_header(header: bytes) -> InvalidArgument:
    return InvalidArgument(f"a value header of {len(header)} bytes, must be {VALUE_HEADER_BYTES}")


def _opener(keystore: Keystore, version: int, key_id: int) -> tuple[KeyHandle, Aead]:
    handle = keystore.get(key_id)
    if handle is None:
        raise EnvelopeError(Failure.KEY_ID, f"key id {key_id} is not held by this node")
    aead = handle.aead[version]
    if aead is None:
        raise EnvelopeError(Failure.VERSION, f"unknown envelope version 0x{version:02x}")
    return handle, aead


def seal_value(handle: KeyHandle, nonce: bytes, header: bytes, store_key: bytes, plaintext: bytes,
               *, version: int = VERSION_GCM, compress: bool = False) -> bytes:
    """The envelope of a value, bound to its 9-byte value header and its store key.

    `compress` sets flag bit 0 only where Snappy makes the value smaller. Raises `InvalidArgument`
    for a nonce or header of the wrong length or an unknown version.
    """
    aead = _sealer(handle, nonce, version)
    if len(header) != VALUE_HEADER_BYTES:
        raise _wrong_header(header)
    flag = 0
    if compress:
        packed = bytes(cramjam.snappy.compress_raw(plaintext))
        if len(packed) < len(plaintext):
            flag, plaintext = FLAG_SNAPPY, packed
    prefix = handle.value_prefix[version][flag]
    return b"".join((prefix, nonce, aead.encrypt(nonce, plaintext, prefix + header + store_key)))


def seal_record_value(handle: KeyHandle, nonce: bytes, header: bytes, store_key: bytes,
                      plaintext: bytes) -> bytes:
    """A value's header and its envelope: `header(9) | envelope`. As `seal_value`, without
    compression and with one copy less. Raises `InvalidArgument` as that does."""
    aead = _sealer(handle, nonce, VERSION_GCM)
    if len(header) != VALUE_HEADER_BYTES:
        raise _wrong_header(header)
    prefix = handle.value_prefix[VERSION_GCM][0]
    return b"".join((header, prefix, nonce,
                     aead.encrypt(nonce, plaintext, prefix + header + store_key)))


def _not_authentic(key_id: int) -> EnvelopeError:
    return EnvelopeError(Failure.TAG, f"a value under key id {key_id} does not authenticate")


def open_value(keystore: Keystore, header: bytes, store_key: bytes, envelope: bytes) -> bytes:
    """The plaintext of a value. Raises `EnvelopeError` when it does not authenticate under exactly
    this value header and store key, or its key is not held."""
    version, flag, key_id = parse_prefix(envelope)
    _, aead = _opener(keystore, version, key_id)
    try:
        plaintext = aead.decrypt(envelope[PREFIX_BYTES:HEADER_BYTES], envelope[HEADER_BYTES:],
                                 envelope[:PREFIX_BYTES] + header + store_key)
    except InvalidTag:
        raise _not_authentic(key_id) from None
    return _decompress(plaintext, key_id) if flag & FLAG_SNAPPY else plaintext


def open_record_value(keystore: Keystore, store_key: bytes, record: bytes) -> bytes:
    """The plaintext of a value behind its header: `header(9) | envelope`. As `open_value`, which
    judges everything but the common case: a known key, no compression, every field at its place.
    """
    prefix = record[_PREFIX_IN_RECORD]
    aead = keystore.opener(prefix)
    if aead is None or len(record) < VALUE_HEADER_BYTES + OVERHEAD_BYTES:
        return open_value(keystore, record[:VALUE_HEADER_BYTES], store_key,
                          record[VALUE_HEADER_BYTES:])
    try:
        return aead.decrypt(record[_NONCE_IN_RECORD], record[_BODY_IN_RECORD],
                            prefix + record[:VALUE_HEADER_BYTES] + store_key)
    except InvalidTag:
        raise _not_authentic(int.from_bytes(prefix[2:], "big")) from None


def seal_raft(handle: KeyHandle, nonce: bytes, payload: bytes, version: int = VERSION_GCM) -> bytes:
    """The envelope of a log entry. Raises `InvalidArgument` as `seal_value` does."""
    aead = _sealer(handle, nonce, version)
    return b"".join((handle.value_prefix[version][0], nonce,
                     aead.encrypt(nonce, payload, handle.raft_aad[version])))


def open_raft(keystore: Keystore, envelope: bytes) -> bytes:
    """The log entry in a raft envelope. Raises `EnvelopeError`, also for any flag bit: the raft AAD
    does not authenticate the flag."""
    version, flag, key_id = parse_prefix(envelope)
    if flag:
        raise EnvelopeError(Failure.FLAG, f"a raft envelope with flag bits 0x{flag:02x}")
    handle, aead = _opener(keystore, version, key_id)
    try:
        return aead.decrypt(envelope[PREFIX_BYTES:HEADER_BYTES], envelope[HEADER_BYTES:],
                            handle.raft_aad[version])
    except InvalidTag:
        raise EnvelopeError(
            Failure.TAG, f"a log entry under key id {key_id} does not authenticate") from None


def _declared_length(block: bytes) -> int:
    """The uncompressed length at the start of a raw Snappy block, -1 if it is malformed.

    A little-endian base-128 number of at most five bytes (Snappy format description, section 1).
    """
    length = 0
    for index, byte in enumerate(block[:_MAX_VARINT_BYTES]):
        length |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return length
    return -1


def _decompress(block: bytes, key_id: int) -> bytes:
    # The length is checked first: the decompressor allocates what the block declares.
    length = _declared_length(block)
    if not 0 <= length <= MAX_DECOMPRESSED_BYTES:
        raise EnvelopeError(Failure.COMPRESSION,
                            f"a value under key id {key_id} declares a bad decompressed size")
    try:
        plaintext = bytes(cramjam.snappy.decompress_raw(block))
    except cramjam.DecompressionError:
        raise EnvelopeError(
            Failure.COMPRESSION, f"a value under key id {key_id} does not decompress") from None
    if len(plaintext) != length:
        raise EnvelopeError(Failure.COMPRESSION,
                            f"a value under key id {key_id} decompresses to another size")
    return plaintext
