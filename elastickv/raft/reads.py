"""Linearizable reads: the shell around `readindex.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from elastickv.errors import DeadlineExceeded, NoLeader
from elastickv.raft import frames
from elastickv.raft.answers import Answers
from elastickv.raft.core import Context
from elastickv.raft.readindex import ReadForwarder, ReadRounds

_TIMED_OUT = -1


class Reads:
    """One node's read indexes: rounds of probes as a leader, requests as a follower."""

    def __init__(self, context: Context, announce_to: Callable[[str], None]) -> None:
        """`announce_to(peer_id)` tells a peer what is committed, if it does not know."""
        self._context = context
        self._announce_to = announce_to
        self._rounds = ReadRounds()
        self._forwarder = ReadForwarder()
        self._round_at = 0.0
        self._forwarded_at = 0.0
        self._closed = False
        self._answers = Answers(context.send)

    async def read_index(self, timeout_s: float) -> int:
        """See `RaftEngine.read_index`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            if self._closed:
                raise NoLeader("this node has stopped taking part", remedy="use another member")
            future: asyncio.Future[int] = loop.create_future()
            queue = self._rounds if self._context.core.is_leading() else self._forwarder
            ticket = queue.add(partial(_resolve, future))
            self._context.schedule()
            timer = loop.call_at(deadline, _resolve, future, _TIMED_OUT)
            try:
                index = await future
            finally:
                timer.cancel()
                queue.discard(ticket)
            if index > 0:
                return index
            if index == _TIMED_OUT:
                if self._context.core.leader_id():
                    raise DeadlineExceeded("the leader was not confirmed in time")
                raise NoLeader("no leader is known", remedy="retry when a majority is up")

    def advance(self) -> None:
        """Begin a round, or ask the leader, when reads wait."""
        core = self._context.core
        if core.is_leading():
            if self._rounds.due and core.commit_index() >= core.noop_index():
                number = self._rounds.begin(core.commit_index())
                self._send_probes(number)
                self._rounds.answer(self._context.node_id, number, core.voters())
        elif self._forwarder.due and core.leader_id() in self._context.connected:
            self._forwarded_at = self._context.now()
            number = self._forwarder.begin(core.leader_id())
            self._context.send(core.leader_id(), frames.ReadRequest(number))

    def _send_probes(self, number: int) -> None:
        self._round_at = self._context.now()
        message = frames.Probe(self._context.core.term(), number)
        for peer_id in self._rounds.unanswered(self._context.core.voters()):
            if peer_id != self._context.node_id:
                self._context.send(peer_id, message)

    def repeat(self) -> None:
        """Probes and requests may have been lost with a link: send them again after a while."""
        patience = self._context.now() - self._context.settings.heartbeat_s
        if self._rounds.active and self._round_at <= patience:
            self._send_probes(self._rounds.number)
        if self._forwarder.active and self._forwarded_at <= patience:
            self._ask_again()

    def _ask_again(self) -> None:
        """The same request of the same leader: with another number, an answer that takes longer
        than this node's patience would never be the one to the latest."""
        forwarder, leader_id = self._forwarder, self._context.core.leader_id()
        if forwarder.refused or leader_id != forwarder.leader_id:
            forwarder.retry()
        else:
            self._forwarded_at = self._context.now()
            self._context.send(leader_id, frames.ReadRequest(forwarder.number))

    def lost_leadership(self) -> None:
        """Reads of this leader's rounds ask the next leader."""
        self._rounds.lose()

    def lost_link(self, peer_id: str) -> None:
        """The link with `peer_id` broke."""
        self._answers.lost(peer_id)
        if self._forwarder.leader_id == peer_id:
            self._forwarder.retry()

    def gained_leadership(self) -> None:
        """Reads that waited for another leader are this node's own now."""
        self._forwarder.lose()

    def close(self) -> None:
        """Every read fails."""
        self._closed = True
        self._rounds.lose()
        self._forwarder.lose()

    # --- messages -----------------------------------------------------------------------------

    def on_probe(self, peer_id: str, message: frames.Probe) -> None:
        core = self._context.core
        if message.term == core.term() and core.term_leader_id() == peer_id \
                and self._context.trusted():
            self._context.send(peer_id, frames.ProbeAck(message.term, message.round))

    def on_probe_ack(self, peer_id: str, message: frames.ProbeAck) -> None:
        core = self._context.core
        if core.is_leading() and message.term == core.term():
            self._rounds.answer(peer_id, message.round, core.voters())

    def on_read_request(self, peer_id: str, message: frames.ReadRequest) -> None:
        answer = self._answers.to(peer_id)

        def reply(index: int) -> None:
            if index:
                # First on the same link: otherwise the peer would wait for it to apply `index`.
                self._announce_to(peer_id)
            answer(frames.ReadReply(message.request, index))

        if self._context.core.is_leading():
            self._rounds.add(reply)
        else:
            reply(0)

    def on_read_reply(self, peer_id: str, message: frames.ReadReply) -> None:
        self._forwarder.answer(peer_id, message.request, message.index)


def _resolve(future: asyncio.Future[int], index: int) -> None:
    if not future.done():
        future.set_result(index)
