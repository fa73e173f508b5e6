"""PySyncObj's state machine with its unsafe parts replaced, behind plain methods.

PySyncObj keeps: elections, whether to vote, acceptance of entries, the step-down of a leader
without a quorum. Replaced (each name is a private method of `SyncObj`, looked up on the instance,
hence overridable): the election timeout, adopting a term and a vote, when entries are sent, how
commits are counted, how entries are applied, membership parsing, compaction. Decided before it is
asked: whose vote counts. Done without it, where nothing else could come of them: an entry behind
the end of the log, an acknowledgement.

PySyncObj inspects every attribute in its constructor, so this class has methods, no properties.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.transport import Transport

from elastickv.raft import rules
from elastickv.raft.core import FOLLOWER, LEADER
from elastickv.raft.frames import AppendEntries
from elastickv.raft.journal import Journal
from elastickv.raft.pysyncobj_journal import JournalAdapter
from elastickv.raft.pysyncobj_seams import Now, PeerNode, install, peer_node, use_clock
from elastickv.raft.rules import AppendPlan
from elastickv.raft.settings import EngineSettings

_ELECT_NOW = -1.0
_NO_TERM = -1


class CoreHooks(Protocol):
    """What the core asks of its engine, always from within a call of the core."""

    def apply_committed(self) -> None:
        """The commit index may have moved: apply what may be applied."""
        ...

    def heartbeat(self) -> None:
        """Entries or a heartbeat are due to every peer."""
        ...

    def state_changed(self, old: int, new: int) -> None:
        """The role changed."""
        ...

    def ask_vote(self, peer_id: str, term: int, last_index: int, last_term: int) -> None:
        """Send a vote request."""
        ...

    def give_vote(self, peer_id: str, term: int) -> None:
        """Send a vote once the log behind it is durable."""
        ...


class CoreTransport(Transport):  # type: ignore[misc]
    """Takes PySyncObj's messages. Acknowledgements are the engine's own and are dropped here."""

    def __init__(self, hooks: CoreHooks) -> None:
        super().__init__(None, None, [])
        self._hooks = hooks

    def send(self, node: PeerNode, message: dict[str, Any]) -> bool:
        kind = message["type"]
        if kind == "request_vote":
            self._hooks.ask_vote(node.id, message["term"], message["last_log_index"],
                                 message["last_log_term"])
        elif kind == "response_vote":
            self._hooks.give_vote(node.id, message["term"])
        return True


def _library_configuration(settings: EngineSettings, adapter: JournalAdapter,
                           hooks: CoreHooks) -> SyncObjConf:
    return SyncObjConf(
        autoTick=False,
        raftMinTimeout=settings.election_min_s,
        raftMaxTimeout=settings.election_max_s,
        leaderFallbackTimeout=settings.leader_fallback_s,
        appendEntriesPeriod=settings.heartbeat_s,
        # For the library's transport, which is not used; but it asserts that it is no less.
        connectionTimeout=settings.election_max_s,
        appendEntriesUseBatch=False,
        dynamicMembershipChange=True,
        fullDumpFile=None,
        journalFile=adapter,
        onStateChanged=hooks.state_changed,
    )


class RaftCore(SyncObj):  # type: ignore[misc]
    """One member's Raft state. Every public method names the clock before it enters PySyncObj."""

    def __init__(self, settings: EngineSettings, *, voters: Sequence[str], learners: Sequence[str],
                 journal: Journal, adapter: JournalAdapter, applied_index: int, hooks: CoreHooks,
                 generator: random.Random, now: Now) -> None:
        install()
        use_clock(now)
        self._now = now
        self._generator = generator
        self._settings = settings
        self._journal = journal
        self._hooks = hooks
        # PySyncObj gives up by its own times. Here is when those had answered that have only shown
        # life since.
        self._answered_at: dict[PeerNode, float] = {}
        self._committed_index = applied_index
        self._voters_heard: set[str] = set()
        self._silent_term = _NO_TERM  # of the leader that has fallen silent
        super().__init__(peer_node(settings.node_id), [],
                         conf=_library_configuration(settings, adapter, hooks),
                         transport=CoreTransport(hooks))
        # PySyncObj has this node even when it is no voter: it would not vote without. Who may stand
        # for election is this class's question.
        self._SyncObj__otherNodes: set[PeerNode] = set()
        self._SyncObj__readonlyNodes: set[PeerNode] = set()
        self.set_members(voters, learners)
        self._SyncObj__raftLastApplied = applied_index
        self._SyncObj__raftCommitIndex = applied_index

    # --- replaced parts of PySyncObj ----------------------------------------------------------

    def _SyncObj__generateRaftTimeout(self) -> float:
        low, high = self._settings.election_min_s, self._settings.election_max_s
        return low + (high - low) * self._generator.random()

    def _SyncObj__setCurrentTerm(self, term: int, voted_for: str | None) -> None:
        """Durable before it is believed: a disk that refuses leaves the old term in force."""
        self._SyncObj__raftLog.setCurrentTerm(term, voted_for)
        self._SyncObj__raftCurrentTerm = term
        self._SyncObj__votedForNodeId = voted_for
        self._voters_heard.clear()

    def _SyncObj__getCurrentLogIndex(self) -> int:
        return self._journal.last_index

    def _SyncObj__getCurrentLogTerm(self) -> int:
        return self._journal.last_term

    def _SyncObj__applyLogEntries(self) -> bool:
        """Called in every tick, after elections and what `tick` keeps PySyncObj from counting."""
        if self.is_leading() and self._journal.last_index > self._committed_index:
            matches = self._SyncObj__raftMatchIndex
            self._committed_index = rules.committed_index(
                self._committed_index, self._journal.last_index, self._journal.durable_index,
                [matches[node] for node in self._SyncObj__otherNodes],
                self._is_voter, self._journal.term_at, self._SyncObj__raftCurrentTerm)
        self._SyncObj__raftCommitIndex = self._committed_index
        self._hooks.apply_committed()
        return False

    def _SyncObj__sendAppendEntries(self) -> None:
        self._SyncObj__newAppendEntriesTime = self._now() + self._settings.heartbeat_s
        self._hooks.heartbeat()

    def _SyncObj__onBecomeLeader(self) -> None:
        self._answered_at.clear()
        super()._SyncObj__onBecomeLeader()

    def _SyncObj__tryLogCompaction(self) -> None:
        """The engine compacts."""

    def _SyncObj__doApplyCommand(self, command: bytes) -> None:
        raise NotImplementedError("the engine applies entries")

    def _SyncObj__loadDumpFile(self, clearJournal: bool) -> None:
        raise NotImplementedError("the engine installs snapshots")

    def _SyncObj__parseChangeClusterRequest(self, command: bytes) -> None:
        """The engine follows the membership in its log; nothing is unpickled."""
        return

    # --- reading ------------------------------------------------------------------------------

    def role(self) -> int:
        return int(self._SyncObj__raftState)

    def is_leading(self) -> bool:
        return bool(self._SyncObj__raftState == LEADER)

    def term(self) -> int:
        return int(self._SyncObj__raftCurrentTerm)

    def commit_index(self) -> int:
        return self._committed_index

    def applied_index(self) -> int:
        return int(self._SyncObj__raftLastApplied)

    def noop_index(self) -> int:
        return self._SyncObj__noopIDx or 0

    def leader_id(self) -> str:
        leader = self._SyncObj__raftLeader
        is_heard = self._silent_term != self._SyncObj__raftCurrentTerm
        return leader.id if is_heard and leader is not None else ""

    def term_leader_id(self) -> str:
        leader = self._SyncObj__raftLeader
        return leader.id if leader is not None else ""

    def voters(self) -> list[str]:
        ids = [node.id for node in self._SyncObj__otherNodes]
        if self._is_voter:
            ids.append(self._settings.node_id)
        return sorted(ids)

    def is_voter(self) -> bool:
        return self._is_voter

    def election_deadline(self) -> float:
        return float(self._SyncObj__raftElectionDeadline)

    def transfer_requested(self) -> bool:
        return bool(self._SyncObj__transferInProgress)

    def next_index(self, peer_id: str) -> int:
        return int(self._SyncObj__raftNextIndex.get(peer_node(peer_id), 0))

    def match_index(self, peer_id: str) -> int:
        return int(self._SyncObj__raftMatchIndex.get(peer_node(peer_id), 0))

    def may_commit(self) -> bool:
        others, matches = self._SyncObj__otherNodes, self._SyncObj__raftMatchIndex
        return not others or max(matches[node] for node in others) > self._committed_index

    def last_response(self, peer_id: str) -> float:
        return self._answered_at.get(peer_node(peer_id), self.last_sign(peer_id))

    def last_sign(self, peer_id: str) -> float:
        return float(self._SyncObj__lastResponseTime.get(peer_node(peer_id), 0.0))

    # --- driving ------------------------------------------------------------------------------

    def tick(self) -> None:
        use_clock(self._now)
        # PySyncObj counts entry by entry, reads each from the disk, and begins anew in every tick.
        # At the end of the log there is nothing for it to count.
        self._SyncObj__raftCommitIndex = self._journal.last_index
        try:
            self._onTick(0)
        finally:
            self._SyncObj__raftCommitIndex = self._committed_index

    def commit(self) -> None:
        self._SyncObj__applyLogEntries()

    def append(self, command: bytes) -> int:
        index = self._journal.last_index + 1
        self._journal.append(index, self._SyncObj__raftCurrentTerm, command)
        return index

    def advance_applied(self, index: int) -> None:
        self._SyncObj__raftLastApplied = index

    def connected(self, peer_id: str) -> None:
        use_clock(self._now)
        self._SyncObj__onNodeConnected(peer_node(peer_id))

    def disconnected(self, peer_id: str) -> None:
        use_clock(self._now)
        self._SyncObj__onNodeDisconnected(peer_node(peer_id))

    def set_next_index(self, peer_id: str, index: int) -> None:
        self._SyncObj__raftNextIndex[peer_node(peer_id)] = index

    def set_match_index(self, peer_id: str, index: int) -> None:
        self._SyncObj__raftMatchIndex[peer_node(peer_id)] = index

    def postpone_election(self) -> None:
        self._SyncObj__raftElectionDeadline = self._now() + self._SyncObj__generateRaftTimeout()

    def leader_fell_silent(self) -> None:
        # Beside what PySyncObj keeps: who leads in a term stays true, and whose messages count.
        if not self.is_leading():
            self._silent_term = self._SyncObj__raftCurrentTerm

    def elect_now(self) -> None:
        self._SyncObj__raftElectionDeadline = _ELECT_NOW

    def step_down(self, term: int) -> None:
        use_clock(self._now)
        self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__raftLeader = None
        self.postpone_election()
        self._SyncObj__setState(FOLLOWER)

    def follow_nobody(self) -> None:
        use_clock(self._now)
        self._SyncObj__raftLeader = None
        self.postpone_election()
        self._SyncObj__setState(FOLLOWER)

    def spend_vote(self, term: int) -> None:
        self._SyncObj__setCurrentTerm(term, self._settings.node_id)
        self.follow_nobody()

    def heard_from(self, peer_id: str) -> None:
        node = peer_node(peer_id)
        self._SyncObj__lastResponseTime[node] = self._now()
        self._answered_at.pop(node, None)

    def shows_life(self, peer_id: str) -> None:
        node, signs = peer_node(peer_id), self._SyncObj__lastResponseTime
        if node in signs:
            self._answered_at.setdefault(node, signs[node])
            signs[node] = self._now()

    def install(self, index: int) -> None:
        self._SyncObj__raftLastApplied = index
        self._SyncObj__raftCommitIndex = index
        self._committed_index = index

    def set_members(self, voters: Sequence[str], learners: Sequence[str]) -> None:
        """The configuration in force changed. A learner is what PySyncObj calls a read-only node:
        it gets entries and counts for nothing."""
        own_id = self._settings.node_id
        others = {peer_node(node_id) for node_id in voters if node_id != own_id}
        readers = {peer_node(node_id) for node_id in learners if node_id != own_id}
        known = self._SyncObj__otherNodes | self._SyncObj__readonlyNodes
        for node in known - others - readers:
            self._SyncObj__raftNextIndex.pop(node, None)
            self._SyncObj__raftMatchIndex.pop(node, None)
            self._SyncObj__lastResponseTime.pop(node, None)
            self._answered_at.pop(node, None)
        for node in others | readers:
            self._SyncObj__raftNextIndex.setdefault(node, self._journal.last_index + 1)
            self._SyncObj__raftMatchIndex.setdefault(node, 0)
            self._SyncObj__lastResponseTime.setdefault(node, self._now())
        self._SyncObj__otherNodes = others
        self._SyncObj__readonlyNodes = readers
        self._is_voter = own_id in voters

    # --- messages -----------------------------------------------------------------------------

    def receive_append(self, peer_id: str, message: AppendEntries, plan: AppendPlan) -> None:
        """An `append_entries` of the current or a higher term, as `plan` trimmed it."""
        if plan.accepted and not plan.truncates and self._follows(peer_id, message.term):
            self._extend(plan)
        else:
            self._receive_append(peer_id, message, plan)

    def _follows(self, peer_id: str, term: int) -> bool:
        """Whether this node knows `peer_id` as the leader of its term already, and heard it
        lately."""
        return (term == self._SyncObj__raftCurrentTerm
                and self._SyncObj__raftState == FOLLOWER
                and self.leader_id() == peer_id
                and not self._SyncObj__transferInProgress)

    def _extend(self, plan: AppendPlan) -> None:
        """What PySyncObj would do when nothing changes but the end of the log and the commit
        index, without its search for where the logs meet, which `plan` knows."""
        self.postpone_election()
        self._SyncObj__leaderCommitIndex = plan.commit_index
        for record in plan.entries:
            self._journal.append(record.index, record.term, record.command)
        self._committed_index = max(self._committed_index, plan.commit_index)
        self._SyncObj__raftCommitIndex = self._committed_index

    def _receive_append(self, peer_id: str, message: AppendEntries, plan: AppendPlan) -> None:
        """Through PySyncObj. A rejected message names an entry that cannot exist, which is how it
        learns of the leader without touching the log."""
        use_clock(self._now)
        self._silent_term = _NO_TERM
        self._SyncObj__onMessageReceived(peer_node(peer_id), {
            "type": "append_entries",
            "term": message.term,
            "commit_index": plan.commit_index,
            "prevLogIdx": plan.previous_index if plan.accepted else self._journal.last_index + 1,
            "prevLogTerm": plan.previous_term,
            "entries": [(record.command, record.index, record.term) for record in plan.entries],
        })
        self._committed_index = max(self._committed_index, self._SyncObj__raftCommitIndex)
        self._SyncObj__raftCommitIndex = self._committed_index

    def receive_ack(self, peer_id: str, next_index: int, *, accepted: bool) -> None:
        """An acknowledgement or rejection of this leader's current term, which is what PySyncObj
        would make of it but for the rule at the end."""
        node = peer_node(peer_id)
        matches, next_indexes = self._SyncObj__raftMatchIndex, self._SyncObj__raftNextIndex
        before = after = next_indexes[node]
        match_index = matches[node]
        if not accepted:
            after = next_index
        elif match_index < next_index - 1:
            match_index = matches[node] = next_index - 1
            after = next_index
        next_indexes[node] = rules.next_index_after_ack(before, after, match_index,
                                                        accepted=accepted)
        self._SyncObj__lastResponseTime[node] = self._now()
        self._answered_at.pop(node, None)

    def receive_vote_request(self, peer_id: str, term: int, last_index: int,
                             last_term: int) -> None:
        use_clock(self._now)
        self._SyncObj__onMessageReceived(peer_node(peer_id), {
            "type": "request_vote",
            "term": term,
            "last_log_index": last_index,
            "last_log_term": last_term,
        })

    def receive_vote(self, peer_id: str, term: int) -> None:
        """A vote; each voter counts once per election."""
        use_clock(self._now)
        if not rules.counts_vote(peer_id, term, self.term(), set(self.voters()),
                                 self._voters_heard):
            return
        self._voters_heard.add(peer_id)
        self._SyncObj__onMessageReceived(peer_node(peer_id), {"type": "response_vote",
                                                             "term": term})

    def receive_timeout_now(self, peer_id: str, term: int) -> None:
        use_clock(self._now)
        self._SyncObj__onMessageReceived(peer_node(peer_id), {"type": "timeout_now", "term": term})
