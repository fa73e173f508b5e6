"""Values as written by the workloads: a secret marker, some filler, then the payload as JSON.

    marker(32) | "|" | filler | "|" | payload

The marker is 16 random bytes as hexadecimal digits, drawn per run. It makes every written value
findable on a disk, and a value without one is something that no client ever wrote. Runs that begin
in the clear write with a second marker until both cutovers are confirmed, because what was written
before may lie on the disks in plaintext.

The filler makes values of different sizes, so that the log is rolled and dropped while a run lasts.
It repeats another such secret: a piece of a value is findable, too.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple

from jepsen.history import Value

FILLER_SIZES = (0, 60, 700, 250)
"""Bytes of filler, in turns."""


class _Secrets(NamedTuple):
    """What values are marked with, and what fills them."""

    marker: bytes
    filler_unit: bytes

    def filler(self, size: int) -> bytes:
        """`size` bytes of filler."""
        return (self.filler_unit * (size // len(self.filler_unit) + 1))[:size]


def _draw() -> _Secrets:
    return _Secrets(secrets.token_hex(16).encode(), secrets.token_hex(16).encode())


class Codec:
    """Encodes payloads under the marker of the moment. `is_sealed` says whether both cutovers are
    confirmed; `sealed_count` counts the values that were encoded since."""

    def __init__(self, is_sealed: Callable[[], bool]) -> None:
        self._clear, self._sealed = _draw(), _draw()
        self._is_sealed = is_sealed
        self._sizes = cycle(FILLER_SIZES)
        self.sealed_count = 0

    @property
    def sealed_secrets(self) -> Sequence[bytes]:
        """What must be in no file."""
        return tuple(self._sealed)

    def encode(self, payload: Value) -> bytes:
        """The bytes to write."""
        chosen = self._clear
        if self._is_sealed():
            chosen = self._sealed
            self.sealed_count += 1
        return b"|".join((chosen.marker, chosen.filler(next(self._sizes)),
                          json.dumps(payload, separators=(",", ":")).encode()))

    def decode(self, data: bytes) -> Value:
        """The payload; for bytes that no client wrote, a text that names them by their digest."""
        marker, _, rest = data.partition(b"|")
        filler, _, payload = rest.partition(b"|")
        for known in (self._clear, self._sealed):
            if marker == known.marker and filler == known.filler(len(filler)):
                try:
                    return json.loads(payload)
                except ValueError:
                    break
        return f"foreign value of {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"
