"""Pre-vote: would a majority elect this node? Asked before the term is raised, so that a node that
cannot reach a quorum disturbs nobody (Ongaro, Consensus: Bridging Theory and Practice, 9.6)."""

from __future__ import annotations

from collections.abc import Sequence

from elastickv.raft.rules import has_majority


class PreVoteRound:
    """The bookkeeping of one node's rounds. Pure."""

    def __init__(self) -> None:
        self.number = 0
        self.won = False
        self._term = 0
        self._voters: frozenset[str] = frozenset()
        self._granted: set[str] = set()

    def begin(self, node_id: str, term: int, voters: Sequence[str]) -> None:
        """A new round for an election in `term + 1`; the node grants itself."""
        self.number += 1
        self._term = term
        self._voters = frozenset(voters)
        self._granted = {node_id} & self._voters
        self.won = has_majority(len(self._granted), len(self._voters))

    def reply(self, voter: str, number: int, term: int) -> bool:
        """A grant arrived while this node is in `term`; True when it completes the majority."""
        if number != self.number or term != self._term or self.won or voter not in self._voters:
            return False
        self._granted.add(voter)
        self.won = has_majority(len(self._granted), len(self._voters))
        return self.won

    def cancel(self) -> None:
        """A leader was heard or the term moved: late grants count for nothing."""
        self.number += 1
        self.won = False
