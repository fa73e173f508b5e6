"""Records: sealing on the way in, opening on the way out. The only place where the two meet.

The storage AAD binds an envelope to its header and its store key (hence to the user key and the
commit timestamp); `elastickv.crypto.cipher` builds it. See `elastickv.store.header` for the layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastickv.crypto.cipher import open_record_value, seal_record_value
from elastickv.errors import IntegrityError
from elastickv.store.header import HEADER_BYTES, EncryptionState, check_record, encode_header
from elastickv.store.mvcc import encode_store_key

if TYPE_CHECKING:
    from elastickv.crypto.keystore import KeyHandle, Keystore

_PLAINTEXT_NEVER = encode_header()
_ENVELOPE_NEVER = encode_header(state=EncryptionState.ENVELOPE)
_TOMBSTONE = encode_header(tombstone=True)

_PLAINTEXT_FLAGS = _PLAINTEXT_NEVER[0]
_ENVELOPE_FLAGS = _ENVELOPE_NEVER[0]


def plain_record(plaintext: bytes, expiry_ms: int = 0) -> bytes:
    """A record in the clear, for a cluster before its storage cutover."""
    header = encode_header(expiry_ms=expiry_ms) if expiry_ms else _PLAINTEXT_NEVER
    return header + plaintext


def tombstone_record() -> bytes:
    """The record of a deletion: a header alone."""
    return _TOMBSTONE


def seal_record(handle: KeyHandle, nonce: bytes, user_key: bytes, commit_ts: int, plaintext: bytes,
                expiry_ms: int = 0) -> bytes:
    """A sealed record for the version of `user_key` at `commit_ts`. The nonce is spent."""
    header = (encode_header(state=EncryptionState.ENVELOPE, expiry_ms=expiry_ms) if expiry_ms
              else _ENVELOPE_NEVER)
    return seal_record_value(handle, nonce, header, encode_store_key(user_key, commit_ts),
                             plaintext)


def open_record(keystore: Keystore | None, store_key: bytes, record: bytes) -> bytes:
    """The plaintext of a record read under `store_key`.

    Raises `IntegrityError` when the header is illegal, the record is a tombstone, no key is at
    hand, or the envelope does not authenticate.
    """
    if len(record) >= HEADER_BYTES and record[0] == _ENVELOPE_FLAGS:
        if keystore is None:
            raise IntegrityError("a stored value is sealed and this node holds no keys",
                                 remedy="start the node with --kekFile and --encryption-enabled")
        return open_record_value(keystore, store_key, record)
    check_record(record)
    if record[0] == _PLAINTEXT_FLAGS:
        return record[HEADER_BYTES:]
    raise IntegrityError("a tombstone holds no value")
