"""A follower's side of replication: accept entries, acknowledge what is durable."""

from __future__ import annotations

from collections.abc import Callable

from elastickv.raft import frames, records, rules
from elastickv.raft.configuration_file import follow_log
from elastickv.raft.core import Context
from elastickv.raft.elections import Elections
from elastickv.raft.membership import CONFIGURATION_KIND
from elastickv.raft.storage import RaftStorage


class Follower:
    """What this node has verified to equal its leader's log, and what of it was acknowledged."""

    def __init__(self, context: Context, elections: Elections,
                 members_changed: Callable[[], None], caught_up: Callable[[], None],
                 storage: RaftStorage) -> None:
        """`caught_up` is called when the durable log holds everything committed so far."""
        self._context = context
        self._elections = elections
        self._members_changed = members_changed
        self._caught_up = caught_up
        self._storage = storage
        self._memory = storage.memory
        self._leader_id = ""
        self._term = 0
        self._match_index = 0
        self._sequence = 0
        self._acked_index = 0
        self._required_index = 0
        self._complete_term = 0

    def on_append(self, peer_id: str, message: frames.AppendEntries) -> None:
        """Raises `WireError` on damaged entries, `LogDiverged` if a committed one would change."""
        context, core, journal = self._context, self._context.core, self._context.journal
        if message.term < core.term():
            context.send(peer_id, frames.StaleTerm(core.term()))
            return
        if message.term == core.term() and core.is_leading():
            raise rules.LogDiverged(f"member {peer_id} leads in term {message.term} as well")
        entries = records.decode_all(message.entries, context.settings.max_command_bytes)
        plan = rules.plan_append(journal, core.commit_index(), message.previous_index,
                                 message.previous_term, entries, message.commit_index)
        if (message.term, peer_id) != (self._term, self._leader_id):
            self.restart(message.term, peer_id)
        self._elections.heard_leader()
        if plan.truncates:
            self._storage.truncating(plan.previous_index, core.commit_index())
        try:
            core.receive_append(peer_id, message, plan)
        finally:
            # Also when the disk filled up half-way: the membership follows the log as it is.
            self._follow_membership(plan)
        if not plan.accepted:
            context.send(peer_id, frames.Ack(message.term, message.sequence, plan.next_index,
                                             False, context.trusted()))
            return
        self._match_index = max(self._match_index, plan.match_index)
        self._remember_leader(peer_id, plan)
        self._sequence = message.sequence
        if (self._complete_term != message.term or self._required_index == 0) \
                and rules.shows_own_commit(journal, plan.commit_index, message.term):
            self._complete_term = message.term
            if self._required_index == 0 and plan.commit_index == message.commit_index:
                # The log up to the leader's commit index holds everything that was ever committed
                # under earlier leaders.
                self._required_index = message.commit_index
        self.acknowledge(always=not entries)

    def receiving(self, peer_id: str) -> None:
        """Bytes of `peer_id` arrived, of a message that is not whole yet. What its leader sent
        meanwhile waits behind that, and this node has nothing to acknowledge."""
        if self._elections.hears(peer_id):
            self._context.send(peer_id, frames.Ack(
                self._context.core.term(), frames.NO_SEQUENCE, 0, False, self._context.trusted()))

    def knows_leader_complete(self, term: int) -> bool:
        """Whether the leader of `term` is known to have committed an entry of its own: only then is
        its commit index that of everything that was ever committed."""
        return self._complete_term == term

    def _remember_leader(self, leader_id: str, plan: rules.AppendPlan) -> None:
        """The leader certainly has on its disk what it has committed."""
        journal = self._context.journal
        if plan.commit_index >= journal.anchor_index and self._may_remember(leader_id):
            self._memory.acknowledged(leader_id, plan.commit_index,
                                      journal.term_at(plan.commit_index))

    def _may_remember(self, leader_id: str) -> bool:
        """A leader that removed itself leads until it has applied that, and may be forgotten here
        by then."""
        return self._context.configuration.find(leader_id) is not None

    def restart(self, term: int, leader_id: str) -> None:
        """Another leader, term or link: nothing is verified yet."""
        self._term, self._leader_id = term, leader_id
        self._match_index = self._acked_index = self._required_index = 0

    def lost_link(self, peer_id: str) -> None:
        """The link with `peer_id` broke."""
        if peer_id == self._leader_id:
            self.restart(0, "")

    def acknowledge(self, *, always: bool = False) -> None:
        """Tell the leader how far its log is durable here, if that is news."""
        core = self._context.core
        if self._match_index == 0 or core.term_leader_id() != self._leader_id \
                or core.term() != self._term:
            return
        journal = self._context.journal
        index = rules.acknowledged_index(self._match_index, journal.durable_index)
        is_news = always or index > self._acked_index
        completes = 0 < self._required_index <= index
        if not is_news and not completes:
            return
        if index >= journal.anchor_index and self._may_remember(self._leader_id):
            # Only what is durable here: a floor that no voter's log reached would keep its node
            # from every election.
            self._memory.sent(self._leader_id, index, journal.term_at(index))
        if completes:
            self._caught_up()
        if is_news:
            self._acked_index = max(index, self._acked_index)
            self._context.send(self._leader_id, frames.Ack(
                self._term, self._sequence, index + 1, True, self._context.trusted()))

    def _follow_membership(self, plan: rules.AppendPlan) -> None:
        if plan.truncates or any(record.command[:1] == CONFIGURATION_KIND
                                 for record in plan.entries):
            # From the log, not from the plan: of that any part may not have happened.
            follow_log(self._context.membership, self._context.journal)
            self._members_changed()
