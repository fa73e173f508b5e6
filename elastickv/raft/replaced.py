"""Entries that this node has dropped because a leader replaced them: nothing of them was lost.

A peer may remember that this node acknowledged one of them. Until what replaces it is durable, the
end of the log is behind that acknowledgement, exactly as if a disk had lost it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from elastickv.raft.rules import LogView


class LogEnd(NamedTuple):
    """The term and the index of a log's last entry, compared as in an election."""

    term: int
    index: int  # type: ignore[assignment]


class ReplacedTail(msgspec.Struct, frozen=True, array_like=True):
    """`runs` of entries (term, first index, last index) that were dropped, and the end of what was
    kept: whoever lost some of that has lost data all the same."""

    kept: tuple[int, int] = (0, 0)
    runs: tuple[tuple[int, int, int], ...] = ()

    def explains(self, end: LogEnd, missing: LogEnd) -> bool:
        """Whether a log that ends at `end` lacks `missing` since it was replaced."""
        return end >= self.kept and any(
            term == missing.term and first <= missing.index <= last
            for term, first, last in self.runs)

    def is_obsolete(self, committed: LogEnd) -> bool:
        """Whether a log that is durable and committed up to `committed` needs the explanation no
        more: it will never hold less. What is only durable may be replaced in its turn."""
        return all((term, last) <= committed for term, _, last in self.runs)


NOTHING_REPLACED = ReplacedTail()


def replaced_tail(log: LogView, kept: LogEnd, known: ReplacedTail,
                  committed: LogEnd) -> ReplacedTail:
    """`known`, while it is needed, and what of `log` is behind `kept`.

    An entry's term and index tell it from every other (Raft, log matching), so that nothing that a
    later leader puts in its place is taken for it.
    """
    runs: list[tuple[int, int, int]] = []
    index = log.last_index
    while index > log.anchor_index and (log.term_at(index), index) > kept:
        term = log.term_at(index)
        first = max(log.first_index_of_term(index), log.anchor_index + 1,
                    kept.index + 1 if term == kept.term else 0)
        runs.append((term, first, index))
        index = first - 1
    if known.is_obsolete(committed):
        return ReplacedTail(kept, tuple(runs)) if runs else NOTHING_REPLACED
    return ReplacedTail(min(known.kept, kept), (*runs, *known.runs))
