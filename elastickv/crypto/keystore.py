"""Keys behind handles, and the immutable set of them that a node holds.

A `KeyHandle` can seal and open; it cannot be printed, pickled or copied, and no attribute holds its
bytes. Two handles are compared through an HMAC under a key that lives only in this process, so that
neither the comparison's timing nor a leaked fingerprint says anything about a key.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import Final, NoReturn, SupportsIndex

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESGCMSIV

from elastickv.crypto.envelope import (
    FLAG_SNAPPY,
    MAX_KEY_ID,
    VERSIONS,
    encode_prefix,
    raft_aad,
)
from elastickv.errors import EncryptionConflict, InvalidArgument

DEK_BYTES: Final = 32
_FINGERPRINT_KEY: Final = os.urandom(32)

Aead = AESGCM | AESGCMSIV


class Purpose(enum.IntEnum):
    """What a DEK encrypts; the values of the wire and of the log entry."""

    STORAGE = 1
    RAFT = 2

    @property
    def label(self) -> str:
        """The spelling of the sidecar: "storage" or "raft"."""
        return self.name.lower()


class KeyHandle:
    """One DEK, usable but not readable.

    All tables are indexed by envelope version, with nothing at 0: `aead[version]` seals and opens;
    `value_prefix[version][flag]` and `raft_aad[version]` are bytes that the hot path would
    otherwise compute for every value.
    """

    __slots__ = ("_fingerprint", "aead", "key_id", "purpose", "raft_aad", "value_prefix")

    def __init__(self, key_id: int, purpose: Purpose, dek: bytes) -> None:
        """Raises `InvalidArgument` for a key id outside 1..2^32-1 or a DEK that is not 32 bytes."""
        self.key_id: Final = key_id
        self.purpose: Final = purpose
        size = len(dek)
        if not 1 <= key_id <= MAX_KEY_ID or size != DEK_BYTES:
            del dek  # a traceback that shows locals must not show it
            if size != DEK_BYTES:
                raise InvalidArgument(f"a DEK of {size} bytes, must be {DEK_BYTES}")
            raise InvalidArgument(f"key id {key_id} is not in 1..{MAX_KEY_ID}")
        self.aead: Final[tuple[Aead | None, ...]] = (None, AESGCM(dek), AESGCMSIV(dek))
        self.value_prefix: Final = ((), *(
            tuple(encode_prefix(version, flag, key_id) for flag in (0, FLAG_SNAPPY))
            for version in VERSIONS))
        self.raft_aad: Final = (b"", *(raft_aad(version, key_id) for version in VERSIONS))
        self._fingerprint = hmac.digest(_FINGERPRINT_KEY, dek, hashlib.sha256)

    def same_key(self, other: KeyHandle) -> bool:
        """Whether both hold the same bytes, whatever their ids and purposes."""
        return hmac.compare_digest(self._fingerprint, other._fingerprint)

    def __repr__(self) -> str:
        return f"<KeyHandle {self.key_id} {self.purpose.label}>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def _refuse(self) -> NoReturn:
        raise TypeError("a key handle cannot be copied or serialized")

    def __reduce__(self) -> NoReturn:
        self._refuse()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self._refuse()

    def __getstate__(self) -> NoReturn:
        self._refuse()

    def __copy__(self) -> NoReturn:
        self._refuse()

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse()


class Keystore:
    """An immutable set of keys. A change makes a new one, so a reader never sees half a change.

    No two ids stand for one key: nonces are counted per id, so one would be used twice under the
    same key bytes.
    """

    __slots__ = ("_handles", "_openers")

    def __init__(self, handles: Mapping[int, KeyHandle] | None = None) -> None:
        """Raises `EncryptionConflict` when two ids stand for one key."""
        self._handles: Final[dict[int, KeyHandle]] = dict(handles or {})
        self._openers: Final[dict[bytes, Aead]] = {}
        known: dict[bytes, int] = {}
        for key_id, handle in self._handles.items():
            if key_id != handle.key_id:
                raise InvalidArgument(f"key {handle.key_id} stored under id {key_id}")
            twin = known.setdefault(handle._fingerprint, key_id)
            if twin != key_id:
                raise EncryptionConflict(f"DEK {key_id} is the same key as DEK {twin}",
                                         remedy="use a newly generated key")
            for aead, prefixes in zip(handle.aead, handle.value_prefix, strict=True):
                if aead is not None:
                    self._openers[prefixes[0]] = aead

    def get(self, key_id: int) -> KeyHandle | None:
        """The key, or None when this node does not hold it."""
        return self._handles.get(key_id)

    def opener(self, prefix: bytes) -> Aead | None:
        """What opens an uncompressed value whose envelope starts with `prefix` (version, flag, key
        id); None for every other prefix, valid or not."""
        return self._openers.get(prefix)

    def ids(self) -> tuple[int, ...]:
        """All key ids, ascending."""
        return tuple(sorted(self._handles))

    def with_key(self, handle: KeyHandle) -> Keystore:
        """A keystore that also holds `handle`; the later purpose wins for a key already held.

        Raises `EncryptionConflict` when the id is taken by other key bytes, or the key by another
        id.
        """
        held = self._handles.get(handle.key_id)
        if held is not None:
            if not held.same_key(handle):
                raise EncryptionConflict(f"key id {handle.key_id} already stands for another key",
                                         remedy="use a new id")
            if held.purpose == handle.purpose:
                return self
        return Keystore({**self._handles, handle.key_id: handle})

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._handles

    def __repr__(self) -> str:
        return f"<Keystore ids={list(self.ids())}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a keystore cannot be copied or serialized")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a keystore cannot be copied or serialized")
