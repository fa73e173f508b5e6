"""How old this member's applied state may be, for reads that do not ask a quorum.

A follower that has applied what its leader had committed at a contact was up to date at that
contact, and may have fallen behind since: its age is the time since the latest such contact. A new
leader does not know what is committed before an entry of its own term is: contacts before that do
not count. A leader's age is the time since a majority last answered it. Transit times are not
counted, and for one leader fallback time an isolated leader can keep a follower that only it
reaches feeling fresh.
"""

from __future__ import annotations

from collections.abc import Sequence

NEVER = float("-inf")


def quorum_contact(now: float, others: Sequence[float]) -> float:
    """When a majority was last in contact with a leader that last heard the other voters at
    `others` (-inf = never); `now` for the only voter."""
    needed = (len(others) + 1) // 2  # of the others, to be a majority together with the leader
    return sorted(others, reverse=True)[needed - 1] if needed else now


class Freshness:
    """What a follower knows about the age of its own state. Times are loop times in seconds."""

    def __init__(self) -> None:
        self._fresh_at = NEVER
        self._heard_at = NEVER
        self._wanted_index = 0

    def heard(self, now: float, leader_commit_index: int, applied_index: int) -> None:
        """A message of the current leader, which had committed up to `leader_commit_index`, with an
        entry of its own term among that."""
        self._advance(applied_index)
        if self._heard_at == NEVER:
            # A later contact never replaces one that waits: under steady load, state always
            # trails the newest contact a little and would never count as fresh.
            self._heard_at, self._wanted_index = now, leader_commit_index
            self._advance(applied_index)

    def _advance(self, applied_index: int) -> None:
        if self._heard_at != NEVER and applied_index >= self._wanted_index:
            self._fresh_at, self._heard_at = max(self._fresh_at, self._heard_at), NEVER

    def fresh_at(self, applied_index: int) -> float:
        """The latest time at which this member is known to have had everything; -inf = never."""
        self._advance(applied_index)
        return self._fresh_at
