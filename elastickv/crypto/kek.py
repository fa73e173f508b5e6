"""The key-encryption key (KEK): it wraps DEKs and does nothing else.

    wrapped DEK = nonce(12, random) | AES-256-GCM(KEK, DEK)(32) | tag(16), 60 bytes, no AAD
"""

from __future__ import annotations

import hmac
import os
from typing import Final, NoReturn, SupportsIndex

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from elastickv.crypto.envelope import NONCE_BYTES, TAG_BYTES
from elastickv.crypto.keystore import DEK_BYTES, KeyHandle, Purpose
from elastickv.errors import KekError

KEK_BYTES: Final = 32
WRAPPED_BYTES: Final = NONCE_BYTES + DEK_BYTES + TAG_BYTES


class Kek:
    """One KEK. `source` says where it came from, for messages; the bytes are not readable back."""

    __slots__ = ("_aead", "source")

    def __init__(self, key: bytes, source: str = "memory") -> None:
        """Raises `KekError` when `key` is not 32 bytes."""
        self.source: Final = source
        size = len(key)
        if size != KEK_BYTES:
            del key  # a traceback that shows locals must not show it
            raise KekError(f"the KEK from {source} has {size} bytes, must be {KEK_BYTES}",
                           remedy=f"supply exactly {KEK_BYTES} random bytes")
        self._aead: Final = AESGCM(key)

    def wrap(self, dek: bytes) -> bytes:
        """`dek` wrapped under a fresh random nonce, 60 bytes."""
        if len(dek) != DEK_BYTES:
            raise KekError(f"a DEK of {len(dek)} bytes cannot be wrapped, must be {DEK_BYTES}")
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, dek, None)

    def unwrap(self, wrapped: bytes) -> bytes:
        """The raw DEK; keep it local. Raises `KekError` when this KEK did not wrap it."""
        if len(wrapped) != WRAPPED_BYTES:
            raise KekError(f"a wrapped DEK of {len(wrapped)} bytes, must be {WRAPPED_BYTES}")
        try:
            return self._aead.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], None)
        except InvalidTag:
            raise KekError(f"the KEK from {self.source} does not unwrap a DEK",
                           remedy="start the node with the KEK that the cluster was"
                                  " bootstrapped with") from None

    def unwrap_handle(self, wrapped: bytes, key_id: int, purpose: Purpose) -> KeyHandle:
        """The DEK as a handle. Raises `KekError` as `unwrap` does."""
        return KeyHandle(key_id, purpose, self.unwrap(wrapped))

    def generate_wrapped_dek(self) -> bytes:
        """A new random DEK, wrapped, after a check that it unwraps to what was generated."""
        dek = os.urandom(DEK_BYTES)
        wrapped = self.wrap(dek)
        if not hmac.compare_digest(self.unwrap(wrapped), dek):
            raise KekError(f"the KEK from {self.source} does not unwrap what it wrapped")
        return wrapped

    def __repr__(self) -> str:
        return f"<Kek from {self.source}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a KEK cannot be copied or serialized")
