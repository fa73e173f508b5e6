"""The journal as PySyncObj wants to see it: a list of (command, index, term), plus term and vote.

Position 0 is the anchor, the entry before the first record. Its command is never looked at by
PySyncObj beyond its kind, so a no-op stands in for it.
"""

from __future__ import annotations

from typing import Any, overload

from elastickv.raft.hardstate import HardStateFile
from elastickv.raft.journal import Journal, LogEntry

NO_OP_COMMAND = b"\x01"
UNBOUNDED_BYTES = 1 << 62


class JournalAdapter:
    """PySyncObj's `Journal` interface over `Journal` and `HardStateFile`."""

    def __init__(self, journal: Journal, hard_state: HardStateFile) -> None:
        self._journal = journal
        self._hard_state = hard_state

    def __len__(self) -> int:
        return len(self._journal) + 1

    def _anchor(self) -> LogEntry:
        return NO_OP_COMMAND, self._journal.anchor_index, self._journal.anchor_term

    @overload
    def __getitem__(self, item: int) -> LogEntry: ...

    @overload
    def __getitem__(self, item: slice) -> list[LogEntry]: ...

    def __getitem__(self, item: int | slice) -> LogEntry | list[LogEntry]:
        count = len(self)
        anchor_index = self._journal.anchor_index
        if isinstance(item, slice):
            start, stop, _ = item.indices(count)
            if start >= stop:
                return []
            found = [self._anchor()] if start == 0 else []
            low, high = anchor_index + max(start, 1), anchor_index + stop - 1
            if low <= high:
                found += self._journal.entries(low, high, UNBOUNDED_BYTES)
            return found
        position = item + count if item < 0 else item
        if not 0 <= position < count:
            raise IndexError(item)
        return self._anchor() if position == 0 else self._journal.entry(anchor_index + position)

    def add(self, command: bytes, index: int, term: int) -> None:
        self._journal.append(index, term, command)

    def deleteEntriesFrom(self, position: int) -> None:
        self._journal.truncate_from(self._journal.anchor_index + position)

    def deleteEntriesTo(self, position: int) -> None:
        raise NotImplementedError("the engine compacts")

    def clear(self) -> None:
        raise NotImplementedError("a log is reset by the snapshot installer only")

    def setRaftCommitIndex(self, index: int) -> None:
        """The core keeps it."""

    def getRaftCommitIndex(self) -> int:
        """Read once, when PySyncObj is made; the core sets its own before that is used."""
        return self._journal.anchor_index

    def setCurrentTerm(self, term: int, vote: str | None) -> None:
        self._hard_state.set_term(term, vote or "")

    def getCurrentTerm(self) -> int:
        return self._hard_state.state.term

    def getVotedForNodeId(self) -> str | None:
        return self._hard_state.state.vote or None

    def onOneSecondTimer(self) -> None:
        """Nothing is deferred."""

    def _destroy(self) -> None:
        """The engine closes the journal."""


def create_journal(adapter: Any = None) -> JournalAdapter:
    """Replaces `pysyncobj.syncobj.createJournal`: the configuration carries the adapter itself."""
    if not isinstance(adapter, JournalAdapter):
        raise TypeError("journalFile must be a JournalAdapter")
    return adapter
