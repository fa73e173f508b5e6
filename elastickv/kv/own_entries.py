"""What this process put into the log and has not applied yet."""

from __future__ import annotations

from typing import NamedTuple

from elastickv.crypto.envelope import HEADER_BYTES
from elastickv.wire import Entry

MOST_ENTRIES = 8
"""More than are under way at once."""
MOST_ENTRY_BYTES = 2 << 20
"""Larger ones are not kept, since an entry that another leader's replaced stays until newer ones
push it out."""


class _Own(NamedTuple):
    payload: bytes
    is_sealed: bool
    entry: Entry


class OwnEntries:
    """The log entries that this process proposed last.

    A leader meets its own entries again when it applies them, and need neither decrypt nor decode
    what it has just encoded and encrypted: under one key, equal bytes open to one plaintext, and
    what an entry was encoded from is what it decodes to. Any other bytes are not known here.
    """

    def __init__(self) -> None:
        self._by_header: dict[bytes, _Own] = {}

    def add(self, payload: bytes, entry: Entry, *, is_sealed: bool) -> None:
        """`entry` goes into the log as `payload`: as it was encoded, or in a raft envelope."""
        if len(payload) > MOST_ENTRY_BYTES:
            return
        if len(self._by_header) >= MOST_ENTRIES:
            del self._by_header[next(iter(self._by_header))]
        # An envelope's header ends with the nonce, which no other entry under its key has; the
        # first bytes of a clear write hold its timestamp.
        self._by_header[payload[:HEADER_BYTES]] = _Own(payload, is_sealed, entry)

    def take(self, payload: bytes, *, is_sealed: bool) -> Entry | None:
        """What went into the log as exactly these bytes, once; None when that is not known.

        Whether the log holds an envelope there is the caller's to say: no bytes tell it.
        """
        header = payload[:HEADER_BYTES]
        known = self._by_header.get(header)
        if known is None or known.is_sealed is not is_sealed or known.payload != payload:
            return None
        del self._by_header[header]
        return known.entry
