"""What the engine's parts see of the Raft state machine and of each other.

`pysyncobj_core.RaftCore` is the implementation; nothing here knows the library behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastickv.raft.frames import AnyMessage, AppendEntries
from elastickv.raft.journal import Journal
from elastickv.raft.membership import Configuration, MembershipLog
from elastickv.raft.rules import AppendPlan
from elastickv.raft.settings import EngineSettings

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2


class Core(Protocol):
    """One member's Raft state: terms, votes, elections, match and commit indexes."""

    def role(self) -> int:
        """FOLLOWER, CANDIDATE or LEADER."""
        ...

    def is_leading(self) -> bool: ...

    def term(self) -> int: ...

    def commit_index(self) -> int: ...

    def applied_index(self) -> int: ...

    def noop_index(self) -> int:
        """The first entry of this leader's term; 0 before this process ever led."""
        ...

    def leader_id(self) -> str:
        """Who leads; "" when no leader is known, or it has fallen silent."""
        ...

    def term_leader_id(self) -> str:
        """Who leads in this term, silent or not; "" when that is not known."""
        ...

    def voters(self) -> list[str]:
        """Ids of the voting members in force, sorted."""
        ...

    def is_voter(self) -> bool:
        """Whether this node is a voter in the configuration in force here: only then does it
        stand for election."""
        ...

    def election_deadline(self) -> float: ...

    def transfer_requested(self) -> bool:
        """The leader asked this node to start an election at once."""
        ...

    def next_index(self, peer_id: str) -> int: ...

    def match_index(self, peer_id: str) -> int: ...

    def may_commit(self) -> bool:
        """Whether some other voter acknowledged more than is committed, or there is none."""
        ...

    def last_response(self, peer_id: str) -> float: ...

    def last_sign(self, peer_id: str) -> float:
        """When it last answered or showed life: whether this leader has to give up, and others may
        stand for election, goes by that."""
        ...

    def set_next_index(self, peer_id: str, index: int) -> None: ...

    def set_match_index(self, peer_id: str, index: int) -> None: ...

    def connected(self, peer_id: str) -> None:
        """There is a link with `peer_id`."""
        ...

    def heard_from(self, peer_id: str) -> None:
        """A follower answered in the current term."""
        ...

    def shows_life(self, peer_id: str) -> None:
        """Bytes go to or come from a member that cannot answer before they are through."""
        ...

    def postpone_election(self) -> None:
        """No election for another random timeout."""
        ...

    def leader_fell_silent(self) -> None:
        """Nothing was heard of the leader for an election timeout, unless this node leads: none is
        known until its next entries or heartbeat."""
        ...

    def elect_now(self) -> None:
        """The next tick starts an election."""
        ...

    def step_down(self, term: int) -> None:
        """Adopt `term` and follow nobody yet."""
        ...

    def follow_nobody(self) -> None:
        """Give up the leadership within the term."""
        ...

    def spend_vote(self, term: int) -> None:
        """Adopt `term` with this node's vote spent, without standing for election."""
        ...

    def tick(self) -> None:
        """Elections, commit counting, apply, heartbeats: whatever is due."""
        ...

    def commit(self) -> None:
        """Count acknowledgements and apply what they commit: of a tick, that alone."""
        ...

    def advance_applied(self, index: int) -> None:
        """Entries up to `index` have been applied."""
        ...

    def append(self, command: bytes) -> int:
        """Append to this leader's log; the index."""
        ...

    def receive_append(self, peer_id: str, message: AppendEntries, plan: AppendPlan) -> None: ...

    def receive_ack(self, peer_id: str, next_index: int, *, accepted: bool) -> None: ...

    def receive_vote_request(self, peer_id: str, term: int, last_index: int,
                             last_term: int) -> None: ...

    def receive_vote(self, peer_id: str, term: int) -> None: ...

    def receive_timeout_now(self, peer_id: str, term: int) -> None: ...

    def set_members(self, voters: Sequence[str], learners: Sequence[str]) -> None:
        """The configuration in force changed."""
        ...

    def install(self, index: int) -> None:
        """The log was reset behind `index`, which is applied."""
        ...


@dataclass(slots=True)
class Context:
    """What the parts of one engine share. `trusted` is False while this node must neither vote nor
    be counted; `current_floor` is (term, index) that a candidate's log must reach, and may raise
    `DiskFull`; `drop` closes the link with a peer."""

    settings: EngineSettings
    journal: Journal
    core: Core
    membership: MembershipLog
    now: Callable[[], float]
    send: Callable[[str, AnyMessage], bool]
    send_body: Callable[[str, bytes], bool]
    drop: Callable[[str], None]
    schedule: Callable[[], None]
    trusted: Callable[[], bool]
    current_floor: Callable[[], tuple[int, int]]
    connected: set[str]

    @property
    def node_id(self) -> str:
        """This node."""
        return self.settings.node_id

    @property
    def configuration(self) -> Configuration:
        """The configuration in force."""
        return self.membership.current

    def answers(self, peer_id: str) -> bool:
        """Whether this leader has heard from a member within an election timeout."""
        return (peer_id in self.connected and self.now() - self.core.last_response(peer_id)
                <= self.settings.election_max_s)
