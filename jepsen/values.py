"""Values as written by the workloads: a secret marker, then the payload as JSON.

The marker is 16 random bytes as hexadecimal digits, drawn per run. It makes every written value
findable on a disk, and a value without one is something that no client ever wrote. Runs that begin
in the clear write with a second marker until both cutovers are confirmed, because what was written
before may lie on the disks in plaintext.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable

from jepsen.history import Value


class Codec:
    """Encodes payloads under the marker of the moment. `is_sealed` says whether both cutovers are
    confirmed."""

    def __init__(self, is_sealed: Callable[[], bool]) -> None:
        self._clear_marker = secrets.token_hex(16).encode()
        self.sealed_marker = secrets.token_hex(16).encode()
        self._is_sealed = is_sealed

    def encode(self, payload: Value) -> bytes:
        """The bytes to write."""
        marker = self.sealed_marker if self._is_sealed() else self._clear_marker
        return marker + b"|" + json.dumps(payload, separators=(",", ":")).encode()

    def decode(self, data: bytes) -> Value:
        """The payload; for bytes that no client wrote, a text that names them by their digest."""
        marker, _, payload = data.partition(b"|")
        if marker in (self._clear_marker, self.sealed_marker):
            try:
                return json.loads(payload)
            except ValueError:
                pass
        return f"foreign value of {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"
