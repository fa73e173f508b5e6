"""What leaves a node, checked as it leaves: votes, requests for votes, and read indexes.

A defect shows here long before its consequences do: a vote that is not on the disk yet is a breach
whether or not a crash follows.

* Only voters stand for election. Who votes knows a configuration, and with it who might remember
  more of the node than its disk does.
* A node votes once in a term, and term and vote are on its disk before a message reveals them.
* A vote leaves after the log that it was judged by is durable.
* A node asks for votes after a majority granted it a pre-vote, or the leader asked it to.
* A leader was elected by a majority of distinct voters, and counts nobody for what it knows from
  before; an acknowledgement counts in its own term only.
* A read index is not below what was committed anywhere when the read began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from elastickv.raft.checked_file import decode_checked
from elastickv.raft.engine import Suffrage
from elastickv.raft.frames import (
    Ack,
    PreVote,
    PreVoteReply,
    RequestVote,
    Vote,
    decode_message,
)
from elastickv.raft.hardstate import HardState, HardStateFile

if TYPE_CHECKING:
    from tests.sim.cluster import SimNode
    from tests.sim.invariants import Oracle

ACK_TAG = 3
SENT_TAGS = frozenset((5, 6, 7, 8))
"""Of the messages that this module looks at."""


class Promises:
    """Votes of all nodes in all terms."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._votes: dict[tuple[str, int], str] = {}
        self._rounds: dict[str, tuple[int, int, int]] = {}
        self._grants: dict[tuple[str, int, int], set[str]] = {}

    def watch(self, node: SimNode, links: Any, engine: Any) -> None:
        """See what a new process sends, and what its reads come to."""
        send = links.send

        def observed_send(peer_id: str, body: bytes) -> Any:
            if body[1] in SENT_TAGS:
                self.sending(node, peer_id, decode_message(body))
            return send(peer_id, body)

        links.send = observed_send
        read_index: Callable[..., Any] = engine.read_index

        async def observed_read(*, timeout_s: float) -> int:
            committed = self._oracle.last_committed
            index: int = await read_index(timeout_s=timeout_s)
            if index < committed:
                self._oracle.fail("reads see what was committed",
                                  f"{node.name} reads at {index}, {committed} was committed before")
            return index

        engine.read_index = observed_read

    def watch_core(self, node: SimNode) -> None:
        """See what a new process counts as a leader."""
        core = node.core
        receive_ack, received = core.receive_ack, node.engine.received
        acknowledged_term = 0

        def observed_received(peer_id: str, body: bytes) -> None:
            nonlocal acknowledged_term
            if body[1] == ACK_TAG and isinstance(message := decode_message(body), Ack):
                acknowledged_term = message.term
            received(peer_id, body)

        def observed_ack(peer_id: str, next_index: int, *, accepted: bool) -> None:
            if acknowledged_term != core.term():
                self._oracle.fail("match indexes are of this term",
                                  f"{node.name} counts an acknowledgement of term "
                                  f"{acknowledged_term} in term {core.term()}")
            receive_ack(peer_id, next_index, accepted=accepted)
            if accepted and node.core is core:
                self._oracle.counted(node, peer_id)

        node.engine.received = observed_received
        core.receive_ack = observed_ack

    def sending(self, node: SimNode, peer_id: str, message: object) -> None:
        """`node` sends one of the messages of an election."""
        match message:
            case Vote():
                if not voters_of(node):
                    self._oracle.fail("a vote follows a configuration",
                                      f"{node.name} votes for {peer_id} and knows none")
                self._voted(node, message.term, peer_id)
                self._require_durable_log(node)
            case RequestVote():
                if node.name not in voters_of(node):
                    self._oracle.fail("only voters stand", f"{node.name} asks {peer_id}")
                self._voted(node, message.term, node.name)
                if not message.transfer:
                    self._require_pre_votes(node, message.term)
            case PreVote():
                self._rounds[node.name] = (node.boots, message.round, message.term)
            case PreVoteReply() if message.granted:
                boots = self._oracle.nodes[peer_id].boots
                self._grants.setdefault((peer_id, boots, message.round), set()).add(node.name)

    def _voted(self, node: SimNode, term: int, candidate: str) -> None:
        known = self._votes.setdefault((node.name, term), candidate)
        if known != candidate:
            self._oracle.fail("one vote per term", f"{node.name} votes for {candidate} in term "
                                                   f"{term}, and did for {known}")
        path = node.engine._settings.path / "hardstate"
        state = msgspec.msgpack.decode(
            decode_checked(HardStateFile.KIND, node.medium.durable(str(path)), path),
            type=HardState)
        if state.term < term or (state.term == term and state.vote != candidate):
            self._oracle.fail("votes are durable",
                              f"{node.name} votes for {candidate} in term {term}, its disk holds "
                              f"{state.vote!r} in term {state.term}")

    def _require_durable_log(self, node: SimNode) -> None:
        """While it follows nobody, nothing can have been appended since the vote was judged."""
        journal = node.journal
        if not node.engine._core.term_leader_id() and journal.durable_index < journal.last_index:
            self._oracle.fail("votes are durable",
                              f"{node.name} votes with a log up to {journal.last_index}, durable "
                              f"up to {journal.durable_index}")

    def _require_pre_votes(self, node: SimNode, term: int) -> None:
        boots, number, asked_term = self._rounds.get(node.name, (0, 0, 0))
        granted = self._grants.get((node.name, boots, number), set()) | {node.name}
        if (boots, asked_term) != (node.boots, term) or not is_majority(granted, voters_of(node)):
            self._oracle.fail("no election without pre-votes",
                              f"{node.name} asks for votes, granted by {sorted(granted)} only")

    def elected(self, node: SimNode, term: int) -> None:
        """`node` begins to lead in `term`."""
        if voters_of(node) == [node.name]:
            self._voted(node, term, node.name)  # it asks nobody
        voted = {voter for (voter, of), candidate in self._votes.items()
                 if of == term and candidate == node.name}
        if not is_majority(voted, voters_of(node)):
            self._oracle.fail("leaders are elected",
                              f"{node.name} leads in term {term}, elected by {sorted(voted)}")
        core = node.engine._core
        counted = [peer for peer in voters_of(node)
                   if peer != node.name and core.match_index(peer)]
        if counted:
            self._oracle.fail("match indexes are of this term",
                              f"{node.name} begins to lead in term {term} and counts {counted}")


def voters_of(node: SimNode) -> list[str]:
    """The voters in the configuration that is in force at a node."""
    voters: list[str] = node.engine._context.configuration.ids(Suffrage.VOTER)
    return voters


def is_majority(names: set[str], voters: list[str]) -> bool:
    """Whether `names` holds a majority of `voters`."""
    return 2 * len(names & set(voters)) > len(voters)
