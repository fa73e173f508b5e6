"""ReadIndex: one round of probes confirms the leadership for all reads that waited for it.

A read that arrives while a round is under way belongs to the next one: the quorum must have
answered a probe that was sent after the read arrived (Raft, section 8).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from elastickv.raft.rules import has_majority

Waiter = Callable[[int], None]
"""Called once with the read index, or with 0 when the leadership was lost."""


class _Queue:
    """Reads of what is under way, and those that came since, by ticket."""

    def __init__(self) -> None:
        self.number = 0
        self.active = False
        self._tickets = itertools.count()
        self._running: dict[int, Waiter] = {}
        self._waiting: dict[int, Waiter] = {}

    def add(self, waiter: Waiter) -> int:
        """A read that arrived now; its ticket."""
        ticket = next(self._tickets)
        self._waiting[ticket] = waiter
        return ticket

    def discard(self, ticket: int) -> None:
        """Nobody waits for this read any more. Otherwise a node that hears from no leader would
        remember every read that it was ever asked for."""
        self._waiting.pop(ticket, None)
        self._running.pop(ticket, None)

    @property
    def due(self) -> bool:
        """Whether something should begin."""
        return bool(self._waiting) and not self.active

    def _start(self) -> int:
        self.number += 1
        self.active = True
        self._running, self._waiting = self._waiting, {}
        return self.number

    def _finish(self, index: int) -> None:
        self.active = False
        finished, self._running = self._running, {}
        for waiter in finished.values():
            waiter(index)

    def _fail_all(self) -> None:
        self._running, self._waiting = self._running | self._waiting, {}
        self._finish(0)


class ReadRounds(_Queue):
    """Bookkeeping of a leader's rounds. Pure: the caller sends the probes."""

    def __init__(self) -> None:
        super().__init__()
        self._index = 0
        self._answered: set[str] = set()

    def begin(self, commit_index: int) -> int:
        """Begin a round for all waiting reads at `commit_index`; its number."""
        self._index = commit_index
        self._answered.clear()
        return self._start()

    def unanswered(self, voters: Sequence[str]) -> list[str]:
        """Voters that have not answered the running round."""
        return [voter for voter in voters if voter not in self._answered]

    def answer(self, voter: str, number: int, voters: Sequence[str]) -> None:
        """`voter` (perhaps this node) confirms round `number`; completes it on a majority."""
        if not self.active or number != self.number or voter not in voters:
            return
        self._answered.add(voter)
        if has_majority(len(self._answered), len(voters)):
            self._finish(self._index)

    def lose(self) -> None:
        """The leadership ended: every read fails."""
        self.number += 1
        self._fail_all()


class ReadForwarder(_Queue):
    """A follower's side: one request to the leader stands for all reads that waited for it. They
    all came before it was first sent: it may be sent again under its number, and whichever answer
    comes first counts."""

    def __init__(self) -> None:
        super().__init__()
        self.leader_id = ""
        self.refused = False

    def begin(self, leader_id: str) -> int:
        """Ask `leader_id` on behalf of all waiting reads; the request's number."""
        self.leader_id, self.refused = leader_id, False
        return self._start()

    def answer(self, leader_id: str, number: int, index: int) -> None:
        """The leader's answer. An `index` of 0 (it does not lead) is left to `retry`, so that the
        reads do not circle between two members that point at each other."""
        if not self.active or number != self.number or leader_id != self.leader_id:
            return
        if index == 0:
            self.refused = True
        else:
            self._finish(index)

    def lose(self) -> None:
        """This node stops: every read fails."""
        self._fail_all()

    def retry(self) -> None:
        """The leader changed, refused or the link broke: ask anew, whoever leads then."""
        self.active = False
        self._waiting = self._running | self._waiting
        self._running = {}
