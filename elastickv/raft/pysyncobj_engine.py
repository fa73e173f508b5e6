"""`RaftEngine` on PySyncObj: the event-driven shell around `RaftCore`.

Everything runs in one event loop. Whatever happens (a message, a proposal, a finished fsync, the
20 ms timer) asks for one `_pump`, which runs PySyncObj's tick, sends, syncs and flushes once for
all that happened since. The fsync runs inline while little waits for it and in a thread otherwise.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from elastickv.durable import Disk
from elastickv.errors import (
    ApplyHalted,
    DeadlineExceeded,
    DiskFull,
    InvalidArgument,
    JournalCorrupt,
    NoLeader,
    NotLeader,
    Overloaded,
    WireError,
)
from elastickv.raft import frames, records, rules
from elastickv.raft.calls import PeerCalls
from elastickv.raft.engine import (
    EngineStatus,
    Entry,
    Member,
    PeerHandler,
    Role,
    SnapshotSource,
    StateMachine,
    Suffrage,
)
from elastickv.raft.frames import encode_message
from elastickv.raft.hardstate import HardStateFile
from elastickv.raft.journal import FIRST_ANCHOR_INDEX, Journal
from elastickv.raft.links import Links
from elastickv.raft.offload import InlineOffload, Offload
from elastickv.raft.prevote import PreVoteRound
from elastickv.raft.proposals import AppliedWaiters, Proposals
from elastickv.raft.pysyncobj_core import CANDIDATE, FOLLOWER, LEADER, RaftCore
from elastickv.raft.pysyncobj_journal import JournalAdapter
from elastickv.raft.readindex import ReadForwarder, ReadRounds
from elastickv.raft.replication import Replication
from elastickv.raft.settings import EngineSettings

log = structlog.get_logger("elastickv.raft")

REGULAR_KIND = b"\x00"
_ROLES = {FOLLOWER: Role.FOLLOWER, CANDIDATE: Role.CANDIDATE, LEADER: Role.LEADER}
_REBUILD = "restore this node from a backup, or remove it and join it anew"


class PySyncObjEngine:
    """One member of the Raft group; see `elastickv.raft.engine.RaftEngine` for the contract."""

    def __init__(self, settings: EngineSettings, state_machine: StateMachine, disk: Disk,
                 links: Links, *, offload: Offload | None = None,
                 generator: random.Random | None = None,
                 snapshots: SnapshotSource | None = None) -> None:
        """`offload` runs fsyncs under load (default: inline); `generator` draws election timeouts."""
        self.node_id = settings.node_id
        self._settings = settings
        self._machine = state_machine
        self._disk = disk
        self._links = links
        self._offload = offload or InlineOffload()
        self._generator = generator or random.Random()
        self._snapshots = snapshots
        self._members: dict[str, Member] = {m.node_id: m for m in settings.members}
        self._client_addresses: dict[str, str] = {settings.node_id: settings.client_address}
        self._connected: set[str] = set()
        self._role_callbacks: list[Callable[[Role, int], None]] = []
        self._fatal_callbacks: list[Callable[[BaseException], None]] = []
        self._announced: tuple[Role, int] = (Role.UNKNOWN, 0)
        self._fatal_error: BaseException | None = None
        self._running = False
        self._pump_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._sync_running = False
        self._disk_full = False
        self._proposals = Proposals()
        self._waiters = AppliedWaiters()
        self._rounds = ReadRounds()
        self._forwarder = ReadForwarder()
        self._forwarded_at = 0.0
        self._round_at = 0.0
        self._prevote = PreVoteRound()
        self._election_cleared = False
        self._transfer_election = False
        self._leader_contact = float("-inf")
        self._leader_known = ""
        self._match_index = 0
        self._match_sequence = 0
        self._acked_index = 0
        self._held_votes: list[tuple[int, int, str]] = []
        self._transferring = False
        self._calls = PeerCalls(self.node_id, self._send, settings.max_entry_bytes)
        self._dispatch: dict[type, Callable[..., None]] = {}
        self._register_messages()

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._open_log()
        await self._links.start(self)
        self._running = True
        self._links.set_peers(self._peer_addresses())
        self._waiters.advance(self._machine.applied_index)
        self._on_timer()

    def _open_log(self) -> None:
        settings = self._settings
        self._disk.make_directory(settings.path)
        self._hard_state = HardStateFile(self._disk, settings.path / "hardstate")
        self._journal = Journal(self._disk, settings.path / "log",
                                segment_bytes=settings.segment_bytes,
                                max_command_bytes=settings.max_entry_bytes + 1,
                                cache_bytes=settings.cache_bytes)
        if not self._hard_state.existed and self._journal.last_index > FIRST_ANCHOR_INDEX:
            raise JournalCorrupt(f"{settings.path} holds a log but no term and vote",
                                 remedy=_REBUILD)
        applied = max(self._machine.applied_index, FIRST_ANCHOR_INDEX)
        if not self._journal.anchor_index <= applied <= self._journal.last_index:
            raise JournalCorrupt(
                f"the state is at entry {applied}, the log holds {self._journal.anchor_index + 1} "
                f"to {self._journal.last_index}", remedy=_REBUILD)
        self._hard_state.begin_boot()
        adapter = JournalAdapter(self._journal, self._hard_state, applied)
        voters = [m.node_id for m in self._members.values() if m.suffrage is Suffrage.VOTER]
        self._core = RaftCore(settings, voters=voters, journal=self._journal, adapter=adapter,
                              applied_index=applied, hooks=self, generator=self._generator,
                              now=self._loop.time)
        self._replication = Replication(settings, self._journal, self._core, self._send,
                                        self._peer_needs_snapshot)

    async def stop(self) -> None:
        if not self._running:
            return
        if self._fatal_error is None and self._core.is_leading():
            await self._hand_over(self._settings.election_min_s)
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        self._end_waits("this node is stopping")
        await self._calls.close()
        await self._links.stop()
        self._offload.close()
        if self._fatal_error is None and self._journal.needs_sync:
            self._journal.sync()
        self._journal.close()
        self._announce(Role.SHUTDOWN)

    def _end_waits(self, message: str) -> None:
        self._proposals.fail_all(message)
        self._waiters.fail_all(NoLeader(message))
        self._rounds.lose()
        self._forwarder.lose()

    def _fail(self, error: BaseException) -> None:
        """Stop taking part, tell the owner once. Nothing is retried."""
        if self._fatal_error is not None:
            return
        self._fatal_error = error
        log.error("raft halted", node=self.node_id, error=str(error), kind=type(error).__name__)
        for peer_id in list(self._connected):
            self._links.drop(peer_id)
        self._end_waits("this node has halted")
        for callback in self._fatal_callbacks:
            callback(error)

    # --- the pump -----------------------------------------------------------------------------

    @property
    def _active(self) -> bool:
        return self._running and self._fatal_error is None

    def _schedule(self) -> None:
        if not self._pump_scheduled and self._active:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def _on_timer(self) -> None:
        if not self._active:
            return
        self._timer = self._loop.call_later(self._settings.tick_s, self._on_timer)
        now = self._loop.time()
        self._proposals.expire(now)
        self._waiters.expire(now)
        self._calls.expire(now)
        self._repeat_reads(now)
        self._schedule()

    def _pump(self) -> None:
        self._pump_scheduled = False
        if not self._active:
            return
        try:
            self._hold_back_election()
            self._core.tick()
            self._election_cleared = self._transfer_election = False
            if self._core.is_leading():
                self._replication.replicate(self._connected_members(), heartbeat=False)
            self._advance_reads()
            self._links.flush()
            self._start_sync()
            self._links.flush()
            self._announce_role()
        except Exception as error:
            self._fail(error)

    def _connected_members(self) -> list[str]:
        return [peer_id for peer_id in self._members if peer_id in self._connected]

    # --- durability ---------------------------------------------------------------------------

    def _start_sync(self) -> None:
        if self._sync_running or not self._journal.needs_sync:
            return
        job, ticket = self._journal.begin_sync()
        self._sync_running = True
        if self._journal.unsynced_bytes <= self._settings.inline_sync_bytes:
            InlineOffload().submit(job, partial(self._synced, ticket))
        else:
            self._offload.submit(job, partial(self._synced, ticket))

    def _synced(self, ticket: tuple[int, int], error: BaseException | None) -> None:
        self._sync_running = False
        if self._fatal_error is not None:
            return
        if error is not None:
            # After a failed fsync the kernel may have dropped the pages: never retried.
            self._fail(error)
            return
        self._journal.finish_sync(ticket)
        self._acknowledge()
        self._release_votes()
        self._schedule()

    def _acknowledge(self, *, always: bool = False) -> None:
        """Tell the leader how far its log is durable here."""
        leader_id = self._core.leader_id()
        if self._match_index == 0 or leader_id in ("", self.node_id):
            return
        index = rules.acknowledged_index(self._match_index, self._journal.durable_index)
        if always or index > self._acked_index:
            self._acked_index = max(index, self._acked_index)
            self._send(leader_id, encode_message(frames.Ack(
                self._core.term(), self._match_sequence, index + 1, True)))

    def _release_votes(self) -> None:
        ready = [vote for vote in self._held_votes if vote[0] <= self._journal.durable_index]
        if ready:
            self._held_votes = [vote for vote in self._held_votes if vote not in ready]
        for _, term, peer_id in ready:
            if term == self._core.term():
                self._send(peer_id, encode_message(frames.Vote(term)))

    # --- hooks of the core --------------------------------------------------------------------

    def apply_committed(self) -> None:
        """Pass committed, durable entries to the state machine, one bounded group at a time."""
        low = self._core.applied_index() + 1
        high = min(self._core.commit_index(), self._journal.durable_index,
                   low + self._settings.apply_group_entries - 1)
        if high < low:
            return
        group = [Entry(index, term, command[1:] if command[:1] == REGULAR_KIND else b"")
                 for command, index, term in
                 self._journal.entries(low, high, self._settings.apply_group_bytes)]
        try:
            results = self._machine.apply(group)
        except Exception as error:
            if isinstance(error, ApplyHalted):
                raise
            raise ApplyHalted(f"entries {low} to {group[-1].index} cannot be applied: {error}",
                              remedy="see the log of this node") from error
        self._core.advance_applied(group[-1].index)
        self._proposals.applied(group, results)
        self._waiters.advance(group[-1].index)
        if group[-1].index < self._core.commit_index():
            self._schedule()

    def heartbeat(self) -> None:
        self._replication.replicate(self._connected_members(), heartbeat=True)

    def state_changed(self, old: int, new: int) -> None:
        if old == LEADER:
            self._proposals.fail_all("this node lost the leadership before it was applied")
            self._rounds.lose()
        if new == LEADER:
            self._replication.lead()
            self._forwarder.retry()
            self._transferring = False
        self._schedule()

    def ask_vote(self, peer_id: str, term: int, last_index: int, last_term: int) -> None:
        self._send(peer_id, encode_message(frames.RequestVote(term, last_index, last_term,
                                                              self._transfer_election)))

    def give_vote(self, peer_id: str, term: int) -> None:
        self._held_votes.append((self._journal.last_index, term, peer_id))
        self._release_votes()
        self._schedule()

    def _announce_role(self) -> None:
        """Tell the owner of a change; LEADER only once it is safe to serve."""
        if self.is_leader() or not self._core.is_leading():
            self._announce(_ROLES[self._core.role()])

    def _announce(self, role: Role) -> None:
        announcement = (role, self._core.term())
        if announcement == self._announced:
            return
        self._announced = announcement
        for callback in self._role_callbacks:
            callback(*announcement)

    # --- elections ----------------------------------------------------------------------------

    def _hold_back_election(self) -> None:
        """Let an election deadline pass to PySyncObj only after a majority granted a pre-vote."""
        core = self._core
        if core.is_leading() or not core.may_vote():
            return
        if core.election_deadline() >= self._loop.time() or self._election_cleared:
            return
        if core.transfer_requested():
            self._transfer_election = True
            return
        core.postpone_election()
        self._prevote.begin(self.node_id, core.term(), core.voters())
        if self._prevote.won:
            core.elect_now()
            self._election_cleared = True
            return
        body = encode_message(frames.PreVote(core.term() + 1, self._prevote.number,
                                             self._journal.last_index, self._journal.last_term))
        for peer_id in core.voters():
            self._send(peer_id, body)

    def _standing(self) -> rules.Standing:
        now = self._loop.time()
        settings = self._settings
        core = self._core
        answering = 1 + sum(
            1 for peer_id in core.voters()
            if peer_id != self.node_id and now - core.last_response(peer_id)
            < settings.election_min_s)
        return rules.Standing(
            term=core.term(), last_index=self._journal.last_index,
            last_term=self._journal.last_term,
            leads_with_quorum=core.is_leading()
            and rules.has_majority(answering, len(core.voters())),
            heard_from_leader=not core.is_leading()
            and now - self._leader_contact < settings.election_min_s)

    def _on_pre_vote(self, peer_id: str, message: frames.PreVote) -> None:
        granted = self._core.may_vote() and rules.grants_pre_vote(
            message.term, message.last_index, message.last_term, self._standing())
        self._send(peer_id, encode_message(frames.PreVoteReply(self._core.term(), message.round,
                                                               granted)))

    def _on_pre_vote_reply(self, peer_id: str, message: frames.PreVoteReply) -> None:
        if not message.granted:
            if message.term > self._core.term():
                self._adopt_term(message.term)
            return
        if self._prevote.reply(peer_id, message.round, self._core.term()):
            self._core.elect_now()
            self._election_cleared = True

    def _on_request_vote(self, peer_id: str, message: frames.RequestVote) -> None:
        if not rules.ignores_vote_request(message.transfer, self._standing()):
            self._core.receive_vote_request(peer_id, message.term, message.last_index,
                                            message.last_term)

    def _on_vote(self, peer_id: str, message: frames.Vote) -> None:
        self._core.receive_vote(peer_id, message.term)

    def _on_timeout_now(self, peer_id: str, message: frames.TimeoutNow) -> None:
        self._core.receive_timeout_now(peer_id, message.term)

    def _on_stale_term(self, peer_id: str, message: frames.StaleTerm) -> None:
        if message.term > self._core.term():
            self._adopt_term(message.term)

    def _adopt_term(self, term: int) -> None:
        self._prevote.cancel()
        self._election_cleared = False
        self._core.step_down(term)

    # --- replication --------------------------------------------------------------------------

    def _on_append(self, peer_id: str, message: frames.AppendEntries) -> None:
        core = self._core
        if message.term < core.term():
            self._send(peer_id, encode_message(frames.StaleTerm(core.term())))
            return
        if message.term == core.term() and core.is_leading():
            raise rules.LogDiverged(f"member {peer_id} leads in term {message.term} as well")
        entries = records.decode_all(message.entries, self._settings.max_entry_bytes + 1)
        plan = rules.plan_append(self._journal, core.commit_index(), message.previous_index,
                                 message.previous_term, entries, message.commit_index)
        if message.term > core.term() or peer_id != self._leader_known:
            self._match_index = self._acked_index = 0
            self._leader_known = peer_id
        self._leader_contact = self._loop.time()
        self._prevote.cancel()
        self._election_cleared = False
        core.receive_append(peer_id, message, plan)
        if plan.accepted:
            self._match_index = max(self._match_index, plan.match_index)
            self._match_sequence = message.sequence
            self._acknowledge(always=not entries)
        else:
            self._send(peer_id, encode_message(frames.Ack(message.term, message.sequence,
                                                          plan.next_index, False)))

    def _on_ack(self, peer_id: str, message: frames.Ack) -> None:
        core = self._core
        if not core.is_leading() or message.term != core.term() \
                or peer_id not in self._members:
            return
        if message.next_index - 1 > self._journal.last_index:
            raise rules.LogDiverged(f"member {peer_id} acknowledges entry {message.next_index - 1}, "
                                    f"the log of its leader ends at {self._journal.last_index}")
        progress = self._replication.progress(peer_id)
        if not message.accepted and message.sequence < progress.min_sequence:
            return
        core.receive_ack(peer_id, message.next_index, accepted=message.accepted)
        if message.accepted:
            progress.acknowledged(message.next_index - 1)
        else:
            self._replication.restart(peer_id)

    def _peer_needs_snapshot(self, peer_id: str) -> None:
        """The peer is behind the start of the log."""

    # --- reads --------------------------------------------------------------------------------

    async def read_index(self, *, timeout_s: float) -> int:
        self._require_active()
        deadline = self._loop.time() + timeout_s
        while True:
            future: asyncio.Future[int] = self._loop.create_future()
            waiter = partial(_resolve, future)
            if self._core.is_leading():
                self._rounds.add(waiter)
            else:
                self._forwarder.add(waiter)
            self._schedule()
            handle = self._loop.call_at(deadline, _resolve, future, -1)
            try:
                index = await future
            finally:
                handle.cancel()
            if index > 0:
                return index
            self._require_active()
            if index < 0:
                if self._core.leader_id():
                    raise DeadlineExceeded("the leader was not confirmed in time")
                raise NoLeader("no leader is known", remedy="retry when a majority is up")

    def _advance_reads(self) -> None:
        core = self._core
        if core.is_leading():
            if self._rounds.due and core.commit_index() >= core.noop_index():
                self._round_at = self._loop.time()
                number = self._rounds.begin(core.commit_index())
                self._send_probes(number)
                self._rounds.answer(self.node_id, number, core.voters())
        elif self._forwarder.due and core.leader_id() in self._connected:
            self._forwarded_at = self._loop.time()
            number = self._forwarder.begin(core.leader_id())
            self._send(core.leader_id(), encode_message(frames.ReadRequest(number)))

    def _send_probes(self, number: int) -> None:
        body = encode_message(frames.Probe(self._core.term(), number))
        for peer_id in self._rounds.unanswered(self._core.voters()):
            if peer_id != self.node_id:
                self._send(peer_id, body)

    def _repeat_reads(self, now: float) -> None:
        """Probes and requests may have been lost with a link."""
        if self._rounds.active and now - self._round_at >= self._settings.heartbeat_s:
            self._round_at = now
            self._send_probes(self._rounds.number)
        if self._forwarder.active and now - self._forwarded_at >= self._settings.heartbeat_s:
            self._forwarder.retry()

    def _on_probe(self, peer_id: str, message: frames.Probe) -> None:
        core = self._core
        if message.term == core.term() and core.leader_id() == peer_id and core.may_vote():
            self._send(peer_id, encode_message(frames.ProbeAck(message.term, message.round)))

    def _on_probe_ack(self, peer_id: str, message: frames.ProbeAck) -> None:
        if self._core.is_leading() and message.term == self._core.term():
            self._rounds.answer(peer_id, message.round, self._core.voters())

    def _on_read_request(self, peer_id: str, message: frames.ReadRequest) -> None:
        if self._core.is_leading():
            self._rounds.add(partial(self._reply_read, peer_id, message.request))
        else:
            self._reply_read(peer_id, message.request, 0)

    def _reply_read(self, peer_id: str, request: int, index: int) -> None:
        self._send(peer_id, encode_message(frames.ReadReply(request, index)))

    def _on_read_reply(self, peer_id: str, message: frames.ReadReply) -> None:
        self._forwarder.answer(peer_id, message.request, message.index)

    async def wait_applied(self, index: int, *, timeout_s: float) -> None:
        if index <= self._machine.applied_index or index <= self._core.applied_index():
            return
        self._require_active()
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(index, future, self._loop.time() + timeout_s)
        await future

    # --- proposals ----------------------------------------------------------------------------

    def propose(self, payload: bytes, *, timeout_s: float) -> Awaitable[object]:
        future: asyncio.Future[object] = self._loop.create_future()
        try:
            self._append(payload, future, timeout_s)
        except Exception as error:
            future.set_exception(error)
        return future

    def _append(self, payload: bytes, future: asyncio.Future[object], timeout_s: float) -> None:
        self._require_active()
        core = self._core
        if not core.is_leading() or self._transferring:
            raise self._not_leader()
        if len(payload) > self._settings.max_entry_bytes:
            raise InvalidArgument(f"a log entry holds at most {self._settings.max_entry_bytes} "
                                  f"bytes, not {len(payload)}")
        if len(self._proposals) >= self._settings.max_pending:
            raise Overloaded(f"{self._settings.max_pending} proposals are under way",
                             remedy="retry later")
        index = core.append(REGULAR_KIND + payload)
        self._proposals.add(index, core.term(), future, self._loop.time() + timeout_s)
        self._schedule()

    def _not_leader(self) -> NotLeader | NoLeader:
        leader_id = self._core.leader_id()
        if not leader_id or leader_id == self.node_id:
            return NoLeader("no leader is known", remedy="retry when a majority is up")
        return NotLeader(leader_id=leader_id,
                         leader_address=self._client_addresses.get(leader_id, ""))

    def _require_active(self) -> None:
        if not self._active:
            raise NoLeader("this node has stopped taking part",
                           remedy="use another member") from self._fatal_error

    async def _hand_over(self, timeout_s: float) -> None:
        """Ask the most complete follower to take over; give up quietly."""
        core = self._core
        best = max((peer_id for peer_id in core.voters() if peer_id in self._connected),
                   key=core.match_index, default="")
        if not best:
            return
        self._transferring = True
        deadline = self._loop.time() + timeout_s
        asked = False
        while core.is_leading() and self._loop.time() < deadline:
            if not asked and core.match_index(best) == self._journal.last_index:
                asked = True
                self._send(best, encode_message(frames.TimeoutNow(core.term())))
            await asyncio.sleep(self._settings.tick_s / 4)

    # --- peers --------------------------------------------------------------------------------

    def _send(self, peer_id: str, body: bytes) -> bool:
        if peer_id == self.node_id or peer_id not in self._connected:
            return False
        return self._links.send(peer_id, body)

    def _peer_addresses(self) -> dict[str, str]:
        return {m.node_id: m.address for m in self._members.values() if m.node_id != self.node_id}

    def make_hello(self, peer_id: str) -> frames.Hello:
        return frames.Hello(frames.PROTOCOL_VERSION, self._settings.cluster_id, self.node_id,
                            self._settings.client_address, self._settings.address,
                            self._hard_state.state.boot_epoch, self._journal.last_index, None)

    def connected(self, peer_id: str, hello: frames.Hello) -> None:
        if not self._active:
            return
        self._connected.add(peer_id)
        self._client_addresses[peer_id] = hello.client_address
        if peer_id in self._members:
            self._core.connected(peer_id)
            if self._core.is_leading():
                match_index = self._core.match_index(peer_id) or self._journal.last_index
                self._core.set_next_index(peer_id, match_index + 1)
                self._replication.restart(peer_id)
        self._schedule()

    def disconnected(self, peer_id: str) -> None:
        self._connected.discard(peer_id)
        if not self._running:
            return
        self._core.disconnected(peer_id)
        self._calls.lost(peer_id)
        if self._forwarder.leader_id == peer_id:
            self._forwarder.retry()
        if self._leader_known == peer_id:
            # What the leader believes of us starts anew with the next link.
            self._leader_known = ""
        self._schedule()

    def received(self, peer_id: str, body: bytes) -> None:
        if not self._active or peer_id not in self._connected:
            return
        try:
            message = frames.decode_message(body)
            handler = self._dispatch.get(type(message))
            if handler is None:
                raise WireError(f"an unexpected {type(message).__name__} from {peer_id}")
            handler(peer_id, message)
        except WireError as error:
            log.warning("link dropped", peer=peer_id, error=str(error))
            self._links.drop(peer_id)
        except DiskFull as error:
            if not self._disk_full:
                self._disk_full = True
                log.error("disk full", node=self.node_id, error=str(error))
        except Exception as error:
            self._fail(error)
        self._schedule()

    def _register_messages(self) -> None:
        table: dict[type, Callable[..., None]] = {
            frames.AppendEntries: self._on_append,
            frames.Ack: self._on_ack,
            frames.StaleTerm: self._on_stale_term,
            frames.RequestVote: self._on_request_vote,
            frames.Vote: self._on_vote,
            frames.PreVote: self._on_pre_vote,
            frames.PreVoteReply: self._on_pre_vote_reply,
            frames.Probe: self._on_probe,
            frames.ProbeAck: self._on_probe_ack,
            frames.TimeoutNow: self._on_timeout_now,
        }
        self._dispatch = {kind: partial(self._from_member, handler)
                          for kind, handler in table.items()}
        self._dispatch[frames.ReadRequest] = self._on_read_request
        self._dispatch[frames.ReadReply] = self._on_read_reply
        self._dispatch[frames.Request] = self._calls.received_request
        self._dispatch[frames.Response] = self._calls.received_response

    def _from_member(self, handler: Callable[..., None], peer_id: str,
                     message: frames.AnyMessage) -> None:
        if peer_id in self._members:
            handler(peer_id, message)

    # --- the rest of the protocol -------------------------------------------------------------

    async def call(self, node_id: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        return await self._calls.call(node_id, method, payload, timeout_s=timeout_s)

    def handle(self, method: str, handler: PeerHandler) -> None:
        self._calls.handle(method, handler)

    def is_leader(self) -> bool:
        return (self._active and self._core.is_leading()
                and self._core.applied_index() >= self._core.noop_index())

    def members(self) -> Sequence[Member]:
        return [Member(m.node_id, m.address, m.suffrage,
                       self._client_addresses.get(m.node_id, ""))
                for m in sorted(self._members.values(), key=lambda m: m.node_id)]

    def on_role_change(self, callback: Callable[[Role, int], None]) -> None:
        self._role_callbacks.append(callback)

    def on_fatal(self, callback: Callable[[BaseException], None]) -> None:
        self._fatal_callbacks.append(callback)

    def status(self) -> EngineStatus:
        core, journal = self._core, self._journal
        leader_id = core.leader_id()
        leading = core.is_leading()
        contact = 0.0 if leading else max(0.0, self._loop.time() - self._leader_contact)
        return EngineStatus(
            node_id=self.node_id,
            role=_ROLES[core.role()] if self._active else Role.SHUTDOWN,
            term=core.term(),
            leader_id=leader_id,
            leader_address=self._client_addresses.get(leader_id, ""),
            commit_index=core.commit_index(),
            applied_index=core.applied_index(),
            last_log_index=journal.last_index,
            last_snapshot_index=journal.anchor_index,
            first_log_index=journal.anchor_index + 1,
            durable_log_index=journal.durable_index,
            pending_proposals=len(self._proposals),
            peers=len(self._members) - 1,
            last_contact_ns=int(contact * 1e9) if contact != float("inf") else -1,
            configuration_index=0,
            pending_configuration=False,
            ready=self._active and bool(leader_id) and core.applied_index() >= min(
                core.commit_index(), journal.durable_index),
        )


def _resolve(future: asyncio.Future[int], index: int) -> None:
    if not future.done():
        future.set_result(index)
