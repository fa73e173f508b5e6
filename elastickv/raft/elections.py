"""Elections around the core: pre-votes, which requests to hear, when a vote may leave.

A voter stands for election. A vote is given by whoever is asked and knows a configuration, be it a
voter or not: who is asked is a voter in the candidate's configuration, which may be later than its
own, and its vote may be the one that is needed to commit that (Raft, section 6).
"""

from __future__ import annotations

from elastickv.raft import frames, rules
from elastickv.raft.core import Context
from elastickv.raft.prevote import PreVoteRound


class Elections:
    """One node's elections. The core decides nothing until a majority granted a pre-vote."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._round = PreVoteRound()
        # The term in which a majority granted a pre-vote for the next one, until the next tick.
        self._cleared_term: int | None = None
        self._transfer = False
        self._leader_contact = float("-inf")
        self._held_votes: list[tuple[int, int, str]] = []

    # --- before and after a tick --------------------------------------------------------------

    def before_tick(self) -> None:
        """Let an election deadline pass to the core only after a majority granted a pre-vote.
        Whoever gets no majority, or has no vote, learns all the same that its leader is silent."""
        core = self._context.core
        if not core.is_voter():
            self.cancel()
            if core.election_deadline() < self._context.now():
                self._note_silence()
                core.postpone_election()
            return
        if core.is_leading() or core.election_deadline() >= self._context.now() \
                or self._cleared_term == core.term():
            return
        self._note_silence()
        if core.transfer_requested() and self._context.trusted():
            self._transfer = True
            return
        core.postpone_election()
        journal = self._context.journal
        if self._context.trusted() \
                and (journal.last_term, journal.last_index) >= self._context.current_floor():
            self._begin_round()

    def _note_silence(self) -> None:
        # The deadline alone does not tell: one who is asked to take over has none left.
        if not self._hears_leader():
            self._context.core.leader_fell_silent()

    def after_tick(self) -> None:
        """What was cleared has been used."""
        self._cleared_term, self._transfer = None, False

    def _begin_round(self) -> None:
        core, journal = self._context.core, self._context.journal
        self._round.begin(self._context.node_id, core.term(), core.voters())
        if self._round.won:
            self._clear()
            return
        message = frames.PreVote(core.term() + 1, self._round.number, journal.last_index,
                                 journal.last_term)
        for peer_id in core.voters():
            self._context.send(peer_id, message)

    def _clear(self) -> None:
        self._context.core.elect_now()
        self._cleared_term = self._context.core.term()

    def heard_leader(self) -> None:
        """A message of a current leader arrived."""
        self._leader_contact = self._context.now()
        self.cancel()

    def hears(self, peer_id: str) -> bool:
        """Bytes of `peer_id` arrived, of a message that is not whole yet: whether that is a sign of
        life of who leads in this term, the first for a heartbeat's time. It keeps this node from
        an election like a heartbeat, and is nothing more."""
        core, now = self._context.core, self._context.now()
        if core.term_leader_id() != peer_id or core.transfer_requested() \
                or now - self._leader_contact < self._context.settings.heartbeat_s:
            return False
        self.heard_leader()
        core.postpone_election()
        return True

    def cancel(self) -> None:
        """A leader was heard or the term moved: grants on their way count for nothing."""
        self._round.cancel()
        self._cleared_term = None

    @property
    def leader_contact(self) -> float:
        """When a leader was last heard; -inf for never."""
        return self._leader_contact

    def _hears_leader(self) -> bool:
        return self._leader_contact > self._context.now() - self._context.settings.election_min_s

    # --- what others ask ----------------------------------------------------------------------

    def standing(self) -> rules.Standing:
        """How this node stands when asked for its vote."""
        context = self._context
        core, now = context.core, context.now()
        recently = now - context.settings.election_min_s
        answering = sum(1 for voter in core.voters()
                        if voter == context.node_id or core.last_sign(voter) > recently)
        leading = core.is_leading()
        # With a floor, this node judges candidates as if it still had what it lost.
        last_term, last_index = max((context.journal.last_term, context.journal.last_index),
                                    context.current_floor())
        return rules.Standing(
            term=core.term(), last_index=last_index, last_term=last_term,
            leads_with_quorum=leading and rules.has_majority(answering, len(core.voters())),
            heard_from_leader=not leading and self._hears_leader())

    def on_pre_vote(self, peer_id: str, message: frames.PreVote) -> None:
        core = self._context.core
        granted = self._context.trusted() and rules.grants_pre_vote(
            message.term, message.last_index, message.last_term, self.standing())
        self._context.send(peer_id, frames.PreVoteReply(core.term(), message.round, granted))

    def on_pre_vote_reply(self, peer_id: str, message: frames.PreVoteReply) -> None:
        if not message.granted:
            self.on_higher_term(message.term)
        elif self._round.reply(peer_id, message.round, self._context.core.term()):
            self._clear()

    def on_stale_term(self, peer_id: str, message: frames.StaleTerm) -> None:
        """A member lives in a later term and cannot follow; only a new election joins the two."""
        self.on_higher_term(message.term)

    def on_higher_term(self, term: int) -> None:
        """Somebody is in `term`: adopt it when it is above ours."""
        if term > self._context.core.term():
            self.cancel()
            self._context.core.step_down(term)

    def on_request_vote(self, peer_id: str, message: frames.RequestVote) -> None:
        if self._context.trusted() \
                and (message.last_term, message.last_index) >= self._context.current_floor() \
                and not rules.ignores_vote_request(message.transfer, self.standing()):
            self._context.core.receive_vote_request(peer_id, message.term, message.last_index,
                                                    message.last_term)

    def on_vote(self, peer_id: str, message: frames.Vote) -> None:
        self._context.core.receive_vote(peer_id, message.term)

    def on_timeout_now(self, peer_id: str, message: frames.TimeoutNow) -> None:
        if self._context.trusted():
            self._context.core.receive_timeout_now(peer_id, message.term)

    # --- votes on their way out ---------------------------------------------------------------

    def ask_vote(self, peer_id: str, term: int, last_index: int, last_term: int) -> None:
        """The core asks for a vote; its own term and vote are durable already."""
        self._context.send(peer_id, frames.RequestVote(term, last_index, last_term,
                                                       self._transfer))

    def give_vote(self, peer_id: str, term: int) -> None:
        """The core votes; the vote leaves once the log that it was judged by is durable."""
        self._held_votes.append((self._context.journal.last_index, term, peer_id))
        self.release_votes()

    def release_votes(self) -> None:
        """The log is durable further than before. A node that has become suspect since has spent
        its vote on itself."""
        if not self._held_votes:
            return
        if not self._context.trusted():
            self._held_votes.clear()
        durable_index = self._context.journal.durable_index
        ready = [vote for vote in self._held_votes if vote[0] <= durable_index]
        self._held_votes = [vote for vote in self._held_votes if vote[0] > durable_index]
        for _, term, peer_id in ready:
            if term == self._context.core.term():
                self._context.send(peer_id, frames.Vote(term))
