"""What happened in a run: counters always, every event on demand, and one hash of all events."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

MAX_FIELD_CHARS = 200


class Trace:
    """Events in order. Passive: a run does the same with and without one."""

    def __init__(self, now: Callable[[], float], *, hashed: bool = False,
                 echo: Callable[[str], None] | None = None) -> None:
        """`hashed` keeps a hash of every event; `echo` gets every event as a line."""
        self.counters: Counter[str] = Counter()
        self._now = now
        self._hash = hashlib.blake2b(digest_size=16) if hashed else None
        self._echo = echo
        self.is_on = hashed or echo is not None

    def add(self, *fields: object) -> None:
        """One event."""
        if not self.is_on:
            return
        line = f"{self._now():.9f} " + " ".join(
            field.hex() if isinstance(field, bytes) else str(field) for field in fields)
        if self._hash is not None:
            self._hash.update(line.encode())
        if self._echo is not None:
            self._echo(line[:MAX_FIELD_CHARS])

    def count(self, name: str, amount: int = 1) -> None:
        """Count something that the report shows."""
        self.counters[name] += amount
        self.add("count", name)

    def digest(self) -> str:
        """The hash of all events so far."""
        return self._hash.hexdigest() if self._hash is not None else ""
