"""Values as written by the workloads: a secret marker, some filler, then the payload as JSON.

    marker(32) | "|" | filler | "|" | payload

The marker is 16 random bytes as hexadecimal digits, drawn per run. It makes every written value
findable on a disk, and a value without one is something that no client ever wrote. Runs that begin
in the clear write with a second marker until both cutovers are confirmed, because what was written
before may lie on the disks in plaintext.

The filler makes values of different sizes, so that the log is rolled and dropped while a run lasts.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from itertools import cycle

from jepsen.history import Value

FILLER_SIZES = (0, 60, 700, 250)
"""Bytes of filler, in turns."""


class Codec:
    """Encodes payloads under the marker of the moment. `is_sealed` says whether both cutovers are
    confirmed."""

    def __init__(self, is_sealed: Callable[[], bool]) -> None:
        self._clear_marker = secrets.token_hex(16).encode()
        self.sealed_marker = secrets.token_hex(16).encode()
        self._is_sealed = is_sealed
        self._filler = secrets.token_hex(max(FILLER_SIZES) // 2).encode()
        self._sizes = cycle(FILLER_SIZES)

    def encode(self, payload: Value) -> bytes:
        """The bytes to write."""
        marker = self.sealed_marker if self._is_sealed() else self._clear_marker
        return b"|".join((marker, self._filler[:next(self._sizes)],
                          json.dumps(payload, separators=(",", ":")).encode()))

    def decode(self, data: bytes) -> Value:
        """The payload; for bytes that no client wrote, a text that names them by their digest."""
        marker, _, rest = data.partition(b"|")
        filler, _, payload = rest.partition(b"|")
        if marker in (self._clear_marker, self.sealed_marker) and self._filler.startswith(filler):
            try:
                return json.loads(payload)
            except ValueError:
                pass
        return f"foreign value of {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"
