"""What this process sealed into the log and has not applied yet."""

from __future__ import annotations

from elastickv.crypto.envelope import HEADER_BYTES

MOST_ENTRIES = 8
"""More than are under way at once."""
MOST_ENTRY_BYTES = 2 << 20
"""Larger ones are not kept, since an entry that another leader's replaced stays until newer ones
push it out."""


class OwnEntries:
    """The clear form of the log entries that this process sealed last.

    A leader meets its own entries again when it applies them, and need not decrypt what it has just
    encrypted: under one key, equal bytes open to one plaintext. Any other bytes are not known here.
    """

    def __init__(self) -> None:
        self._by_header: dict[bytes, tuple[bytes, bytes]] = {}

    def add(self, sealed: bytes, clear: bytes) -> None:
        """`clear` was sealed into the raft envelope `sealed`."""
        if len(clear) > MOST_ENTRY_BYTES:
            return
        if len(self._by_header) >= MOST_ENTRIES:
            del self._by_header[next(iter(self._by_header))]
        # The header ends with the nonce, which no other entry under its key has.
        self._by_header[sealed[:HEADER_BYTES]] = sealed, clear

    def take(self, sealed: bytes) -> bytes | None:
        """What was sealed into exactly these bytes, once; None when it is not known."""
        header = sealed[:HEADER_BYTES]
        known = self._by_header.get(header)
        if known is None or known[0] != sealed:
            return None
        del self._by_header[header]
        return known[1]
