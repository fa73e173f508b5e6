"""Taps on the shipped code, in place for the duration of one run.

The code under test is not changed: the taps see what it seals, appends and logs, and give it
randomness from the run's seed where it would ask the operating system.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import elastickv.crypto.cipher as cipher
import elastickv.crypto.kek as kek_module
import elastickv.kv.leader_ops as leader_ops
import elastickv.raft.storage as storage_module
from elastickv import startup
from elastickv.crypto.kek import Kek
from elastickv.raft.journal import Journal
from elastickv.raft.segment import Segment

KEK = Kek(bytes(range(32)), source="simulation")
SALT_SEED = 1


class Taps(Protocol):
    """Who listens."""

    def sealed(self, purpose: str, key_id: int, nonce: bytes) -> None: ...

    def appended(self, journal: Journal, index: int, term: int, previous_term: int,
                 command: bytes) -> None: ...

    def truncating(self, journal: Journal, index: int) -> None: ...

    def truncated(self, journal: Journal) -> None: ...

    def cutting_tail(self) -> None: ...

    def compacting(self, index: int) -> None: ...

    def opened(self, journal: Journal) -> None: ...

    def logged(self, event: str, fields: dict[str, Any]) -> None: ...


class _Entropy:
    """Stands in for the `os` and `secrets` modules where they are asked for random bytes."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def urandom(self, size: int) -> bytes:
        return self._generator.randbytes(size)

    def randbits(self, bits: int) -> int:
        return self._generator.getrandbits(bits)


class _KekProvider:
    """The KEK of every node, without a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Kek:
        return KEK


class _Log:
    """A structured logger that keeps its lines in the trace."""

    def __init__(self, taps: Taps) -> None:
        self._taps = taps

    def _line(self, event: str, **fields: Any) -> None:
        self._taps.logged(event, fields)

    debug = info = warning = error = exception = critical = _line

    def bind(self, **fields: Any) -> _Log:
        return self


def observed_journal(taps: Taps) -> type[Journal]:
    """A journal that tells of every change, before it relies on its own code for it."""

    class ObservedJournal(Journal):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, generator=random.Random(SALT_SEED), **options)
            taps.opened(self)

        def append(self, index: int, term: int, command: bytes) -> None:
            previous_term = self.last_term
            super().append(index, term, command)
            taps.appended(self, index, term, previous_term, command)

        def truncate_from(self, index: int) -> None:
            taps.truncating(self, index)
            super().truncate_from(index)
            taps.truncated(self)

        def compact_to(self, index: int) -> bool:
            taps.compacting(index)
            return super().compact_to(index)

        def _cut_tail(self, segment: Segment, offset: int, synced: int = 0) -> int:
            proven = super()._cut_tail(segment, offset, synced)
            taps.cutting_tail()
            return proven

    return ObservedJournal


@contextlib.contextmanager
def installed(taps: Taps, generator: random.Random) -> Iterator[None]:
    """Put every tap in place, and take it away at the end."""
    real_sealer = cipher._sealer

    def tapped_sealer(handle: Any, nonce: bytes, version: int) -> Any:
        taps.sealed(handle.purpose.label, handle.key_id, nonce)
        return real_sealer(handle, nonce, version)

    entropy = _Entropy(generator)
    log = _Log(taps)
    replacements: list[tuple[object, str, object]] = [
        (cipher, "_sealer", tapped_sealer),
        (kek_module, "os", entropy),
        (leader_ops, "secrets", entropy),
        (startup, "FileKekProvider", _KekProvider),
        (storage_module, "Journal", observed_journal(taps)),
    ]
    replacements += [(module, "log", log) for name, module in sorted(sys.modules.items())
                     if name.startswith("elastickv.") and hasattr(module, "log")]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
