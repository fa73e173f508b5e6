"""`RaftEngine` on PySyncObj: puts the parts together and hands each event to the part it concerns.

Everything runs in one event loop. What an event leads to is up to the pump (`pump.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

from elastickv.durable import Disk
from elastickv.errors import (
    DiskFull,
    ElasticKVError,
    InvalidArgument,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    RemovedFromCluster,
    WireError,
)
from elastickv.logs import Seldom, get_logger
from elastickv.raft import frames
from elastickv.raft.applying import REGULAR_KIND, Applying
from elastickv.raft.calls import PeerCalls
from elastickv.raft.compaction import LogSize, compaction_target
from elastickv.raft.core import LEADER, Context
from elastickv.raft.elections import Elections
from elastickv.raft.engine import (
    EngineStatus,
    Member,
    PeerHandler,
    Role,
    SnapshotSource,
    StateMachine,
    Suffrage,
)
from elastickv.raft.follower import Follower
from elastickv.raft.frames import encode_message
from elastickv.raft.freshness import Freshness, quorum_contact
from elastickv.raft.install_marker import InstallMarker
from elastickv.raft.links import Links
from elastickv.raft.members import Members
from elastickv.raft.membership import (
    CONFIGURATION_KIND,
    ChangeContext,
    ChangeKind,
    MembershipChange,
    encode_members,
    plan_change,
    require_majority_up,
    require_own_address,
)
from elastickv.raft.offload import InlineOffload, Offload
from elastickv.raft.proposals import AppliedWaiters, Proposals
from elastickv.raft.pump import Pump
from elastickv.raft.pysyncobj_core import RaftCore
from elastickv.raft.pysyncobj_journal import JournalAdapter
from elastickv.raft.reads import Reads
from elastickv.raft.replication import Replication
from elastickv.raft.roles import Roles, may_serve, role_of
from elastickv.raft.settings import EngineSettings
from elastickv.raft.snapshot_receiver import SnapshotReceiver
from elastickv.raft.snapshot_sender import SnapshotSender
from elastickv.raft.storage import RaftStorage
from elastickv.raft.transfer import Transfer
from elastickv.raft.trust import Trust

log = get_logger("elastickv.raft")

_DISK_FULL_REPEAT_S = 60.0


class PySyncObjEngine:
    """One member of the Raft group; see `elastickv.raft.engine.RaftEngine` for the contract."""

    def __init__(self, settings: EngineSettings, state_machine: StateMachine, disk: Disk,
                 links: Links, *, offload: Offload | None = None,
                 cleanup: Offload | None = None,
                 read_ahead: Offload | None = None,
                 generator: random.Random | None = None,
                 snapshots: SnapshotSource | None = None,
                 on_sync: Callable[[float], None] | None = None) -> None:
        """`offload` runs fsyncs under load, `cleanup` deletes old segments of the log, `read_ahead`
        brings into memory what a snapshot is read from (default: inline, all of them), `generator`
        draws timeouts. Without `snapshots` the log is never compacted.
        `on_sync` is told the seconds that each fsync took, from its order to the moment when the
        loop learned of its end."""
        self.node_id = settings.node_id
        self._settings = settings
        self._machine = state_machine
        self._disk = disk
        self._links = links
        self._offload = offload or InlineOffload()
        self._cleanup = cleanup or InlineOffload()
        self._read_ahead = read_ahead or InlineOffload()
        self._generator = generator or random.Random()
        self._snapshots = snapshots
        self._client_addresses: dict[str, str] = {settings.node_id: settings.client_address}
        self._connected: set[str] = set()
        self._ignored: set[str] = set()
        self._roles = Roles()
        self._fatal_callbacks: list[Callable[[BaseException], None]] = []
        self._fatal_error: BaseException | None = None
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._housekeeping_at = 0.0
        self._on_sync = on_sync
        self._freshness = Freshness()
        self._disk_full_line = Seldom(_DISK_FULL_REPEAT_S)
        self._proposals = Proposals()
        self._waiters = AppliedWaiters()
        self._calls = PeerCalls(self.node_id, self._send, settings.max_entry_bytes,
                                self._is_member)

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._storage = RaftStorage(self._settings, self._disk, self._machine.applied_index,
                                    self._generator, self._cleanup, self._cleanup_failed)
        self._journal = self._storage.journal
        try:
            self._refuse_if_removed()
            self._refuse_if_moved()
        except BaseException:
            self._storage.close(sync=False)
            raise
        self._build()
        self._running = True
        try:
            await self._links.start(self)
        except BaseException:
            self._running = False
            self._storage.close(sync=False)
            raise
        self._members.changed()
        self._members.forget_others(self._core.applied_index())
        self._trust.started(self._loop.time())
        self._housekeeping_at = self._loop.time() + self._settings.housekeeping_s
        self._on_timer()

    def _refuse_if_removed(self) -> None:
        current = self._storage.membership.current
        applied_index = self._storage.applied_index_at_start
        if self._storage.has_joined(applied_index) and current.find(self.node_id) is None \
                and current.index <= applied_index:
            raise RemovedFromCluster(
                f"member {self.node_id} was removed from the cluster",
                remedy="it may join again with an empty data directory")

    def _refuse_if_moved(self) -> None:
        # One that has yet to join may have been told of a member that had its name before.
        if not self._settings.joining \
                or self._storage.has_joined(self._storage.applied_index_at_start):
            require_own_address(self._storage.membership.current, self.node_id,
                                self._settings.raft_address)

    def _build(self) -> None:
        storage, settings = self._storage, self._settings
        configuration = storage.membership.current
        self._core = RaftCore(
            settings, voters=configuration.ids(Suffrage.VOTER),
            learners=configuration.ids(Suffrage.LEARNER), journal=self._journal,
            adapter=JournalAdapter(self._journal, storage.hard_state),
            applied_index=storage.applied_index_at_start, hooks=self,
            generator=self._generator, now=self._loop.time)
        self._trust = Trust(settings, storage, self._core)
        self._context = Context(settings, self._journal, self._core, storage.membership,
                                self._loop.time, self._send_message, self._send,
                                self._links.drop, self._schedule, self._is_trusted,
                                self._trust.current_floor, self._connected)
        self._elections = Elections(self._context)
        self._transfer = Transfer(self._context)
        self._members = Members(self._context, storage, self._trust, self._calls,
                                self._transfer, self._links.set_peers, self._note_full_disk,
                                self._fail)
        self._follower = Follower(self._context, self._elections, self._members.changed,
                                  self._trust.caught_up, storage)
        self._sender = SnapshotSender(self._context, self._snapshots, self._snapshot_installed,
                                      read_ahead=self._read_ahead, fail=self._fail)
        self._receiver = SnapshotReceiver(self._context, self._snapshots, storage.marker,
                                          self._install_snapshot)
        self._replication = Replication(self._context, self._sender.begin, self._sender.cancel,
                                        storage.memory)
        self._reads = Reads(self._context, self._replication.announce_to)
        self._applying = Applying(self._context, self._machine, self._proposals, self._waiters,
                                  self._members.committed, self._note_full_disk)
        self._pump = Pump(
            self._context, self._roles, self._elections, self._follower, self._replication,
            self._reads, self._transfer, self._applying, self._waiters, offload=self._offload,
            flush_links=self._links.flush, is_active=self._takes_part,
            note_full_disk=self._note_full_disk, fail=self._fail, on_sync=self._on_sync)
        self._dispatch = self._message_table()

    async def stop(self) -> None:
        if not self._running:
            return
        if self._active and self._core.is_leading() and len(self._core.voters()) > 1:
            try:
                await self.transfer_leadership("", timeout_s=self._settings.election_min_s)
            except ElasticKVError as error:  # whatever the reason, the node stops all the same
                log.info("stopping while leading", node=self.node_id, reason=str(error))
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        self._pump.close()
        self._members.close()
        self._end_waits("this node is stopping")
        await self._calls.close()
        await self._links.stop()
        self._offload.close()
        self._cleanup.close()
        self._read_ahead.close()
        self._storage.close(sync=self._fatal_error is None)
        self._roles.announce_shutdown(self._core)

    def _end_waits(self, message: str) -> None:
        self._proposals.fail_all(message)
        self._waiters.fail_all(NoLeader(message))
        self._reads.close()
        self._sender.cancel_all()
        self._transfer.end()
        try:
            self._receiver.abort()
        except OSError as error:
            # It is never opened, and whoever stops must go on stopping.
            log.warning("a half-received snapshot was not deleted", node=self.node_id,
                        error=str(error))

    def _fail(self, error: BaseException) -> None:
        """Stop taking part and tell the owner, once. Nothing is retried."""
        if self._fatal_error is not None:
            return
        self._fatal_error = error
        for callback in self._fatal_callbacks:
            callback(error)
        self._drop_links()
        self._end_waits("this node has halted")
        log.error("raft halted", node=self.node_id, error=str(error), kind=type(error).__name__)

    def _drop_links(self) -> None:
        for peer_id in sorted(self._connected):
            self._links.drop(peer_id)

    # --- what comes by itself -----------------------------------------------------------------

    @property
    def _active(self) -> bool:
        return self._running and self._fatal_error is None

    def _takes_part(self) -> bool:
        return self._active and not self._receiver.is_cut_short

    def _schedule(self) -> None:
        self._pump.schedule()

    def _on_timer(self) -> None:
        if not self._active:
            return
        self._timer = self._loop.call_later(self._settings.tick_s, self._on_timer)
        now = self._loop.time()
        self._proposals.expire(now)
        self._waiters.expire(now)
        self._calls.expire(now)
        self._reads.repeat()
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + self._settings.housekeeping_s
            self._keep_house()
        self._schedule()

    def _keep_house(self) -> None:
        """Remember peers durably, compact, ask for the configuration. The disk's part is done
        beside the loop: a lone write waits for nothing but its own fsync."""
        try:
            self._resume_installation()
            self._receiver.expire()
            remember = self._storage.memory.begin_flush()
            if remember is not None:
                self._cleanup.submit(remember, self._remembered)
            self._compact()
            self._trust.write()
            self._storage.remember_joining(self._core.applied_index())
        except DiskFull as error:
            self._note_full_disk(error)
        except Exception as error:
            self._fail(error)
        self._members.ask()

    def _resume_installation(self) -> None:
        if not self._receiver.resume():
            return
        # Those who greeted meanwhile greet again; a node that had just been started waits for them.
        self._trust.started(self._loop.time())
        for peer_id in sorted(self._ignored):
            self._links.drop(peer_id)

    def _note_full_disk(self, error: DiskFull) -> None:
        """A leader without its first entry cannot lead: it does not know what was committed before
        it. Anything else is tried again, and nothing takes more space than it must until then."""
        if self._core.is_leading() and self._journal.last_term < self._core.term():
            self._core.follow_nobody()
        self._sender.pause(error)
        if self._disk_full_line.due(self._loop.time()):
            log.error("disk full", node=self.node_id, error=str(error))

    def _remembered(self, error: BaseException | None) -> None:
        if error is not None:
            self._cleanup_failed(error)

    def _cleanup_failed(self, error: BaseException) -> None:
        if isinstance(error, DiskFull):
            self._note_full_disk(error)
        elif self._active:
            self._fail(error)

    # --- hooks of the core --------------------------------------------------------------------

    def apply_committed(self) -> None:
        self._applying.apply_group()

    def heartbeat(self) -> None:
        self._replication.replicate(heartbeat=True)

    def state_changed(self, old: int, new: int) -> None:
        if old == LEADER:
            self._proposals.fail_all("this node lost the leadership before it was applied")
            self._reads.lost_leadership()
            self._sender.cancel_all()
            self._transfer.end()
        if new == LEADER:
            self._replication.lead()
            self._reads.gained_leadership()
        self._schedule()

    def ask_vote(self, peer_id: str, term: int, last_index: int, last_term: int) -> None:
        self._elections.ask_vote(peer_id, term, last_index, last_term)

    def give_vote(self, peer_id: str, term: int) -> None:
        self._elections.give_vote(peer_id, term)

    # --- proposals and reads ------------------------------------------------------------------

    def propose(self, payload: bytes, *, timeout_s: float) -> asyncio.Future[object]:
        future: asyncio.Future[object] = self._loop.create_future()
        try:
            self._require_leader()
            if len(payload) > self._settings.max_entry_bytes:
                raise InvalidArgument(
                    f"a log entry holds at most {self._settings.max_entry_bytes} bytes, not "
                    f"{len(payload)}")
            self._append(REGULAR_KIND + payload, future, timeout_s)
        except ElasticKVError as error:
            future.set_exception(error)
        return future

    def _append(self, command: bytes, future: asyncio.Future[object], timeout_s: float) -> int:
        if len(self._proposals) >= self._settings.max_pending:
            raise Overloaded(f"{self._settings.max_pending} proposals are under way",
                             remedy="retry later")
        try:
            index = self._core.append(command)
        except DiskFull as error:
            self._note_full_disk(error)
            raise
        except ElasticKVError:
            raise
        except Exception as error:
            # A failed fsync among others: the entry may or may not be in the log.
            self._fail(error)
            raise OutcomeUnknown("this node halted during the proposal") from error
        self._proposals.add(index, self._core.term(), future, self._loop.time() + timeout_s)
        self._pump.schedule_entries()
        return index

    def _require_active(self) -> None:
        if not self._active:
            raise NoLeader("this node has stopped taking part",
                           remedy="use another member") from self._fatal_error
        if self._receiver.is_cut_short:
            raise NoLeader("the disk of this node is full, and its log is behind its state",
                           remedy="free space on it, and use another member meanwhile")

    def _require_leader(self) -> None:
        self._require_active()
        if self._core.is_leading() and not self._transfer.active:
            return
        leader_id = self._core.leader_id()
        if self._core.is_leading():
            raise NoLeader("the leadership is being handed over", remedy="retry shortly")
        if not leader_id or leader_id == self.node_id:
            raise NoLeader("no leader is known", remedy="retry when a majority is up")
        raise NotLeader(leader_id=leader_id,
                        leader_address=self._client_addresses.get(leader_id, ""))

    async def read_index(self, *, timeout_s: float) -> int:
        self._require_active()
        return await self._reads.read_index(timeout_s)

    async def wait_applied(self, index: int, *, timeout_s: float) -> None:
        if index <= self._core.applied_index():
            return
        self._require_active()
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(index, future, self._loop.time() + timeout_s)
        self._schedule()
        await future

    # --- leadership and membership ------------------------------------------------------------

    async def transfer_leadership(self, target_id: str, *, timeout_s: float) -> None:
        self._require_leader()
        await self._transfer.run(target_id, timeout_s)

    def introduce(self, addresses: Mapping[str, str]) -> None:
        self._members.introduce(addresses)

    def require_possible(self, change: MembershipChange) -> None:
        self._plan_change(change)

    def _plan_change(self, change: MembershipChange) -> tuple[Member, ...]:
        self._require_leader()
        configuration = self._context.configuration
        members = plan_change(change, ChangeContext(
            configuration, self._core.commit_index(), self.is_leader(),
            self._core.match_index(change.node_id)))
        require_majority_up(configuration.members, members, self._answering(members))
        return members

    async def change_members(self, change: MembershipChange, *, timeout_s: float) -> int:
        command = CONFIGURATION_KIND + encode_members(self._plan_change(change))
        if change.kind is not ChangeKind.REMOVE:
            self._forget_durably()
        future: asyncio.Future[object] = self._loop.create_future()
        index = self._append(command, future, timeout_s)
        self._storage.membership.appended(index, command)
        self._members.changed()
        await future
        return index

    def _forget_durably(self) -> None:
        """A crash must not bring back what was remembered of a former member: who is added under
        its name would be a suspect, and there may be no leader without its vote. Raises `DiskFull`,
        `OutcomeUnknown`."""
        try:
            self._storage.memory.flush()
        except DiskFull as error:
            self._note_full_disk(error)
            raise
        except OSError as error:
            self._fail(error)
            raise OutcomeUnknown("this node halted before the proposal") from error

    def _answering(self, members: Sequence[Member]) -> set[str]:
        """Who of these answers: this node, members that did lately, and a newcomer, from whom
        whoever adds it has just heard."""
        known = self._context.configuration.find
        return {m.node_id for m in members
                if m.node_id == self.node_id or known(m.node_id) is None
                or self._context.answers(m.node_id)}

    # --- snapshots and compaction -------------------------------------------------------------

    def _compact(self) -> None:
        journal = self._journal
        if self._snapshots is None:
            return
        target = compaction_target(
            LogSize(journal.anchor_index, journal.last_index,
                    min(self._machine.durable_index, self._core.applied_index()),
                    journal.surplus_index(self._settings.compact_bytes),
                    journal.clear_index, self._sender.sent_index()),
            self._settings)
        if target:
            self._storage.compact_to(target)

    def _snapshot_installed(self, peer_id: str, index: int) -> None:
        self._core.set_next_index(peer_id, index + 1)
        self._replication.restart(peer_id)
        self._schedule()

    def _install_snapshot(self, marker: InstallMarker) -> None:
        self._storage.install(marker)
        self._core.install(marker.index)
        self._members.changed()
        self._members.forget_others(marker.index)
        self._waiters.advance(marker.index)

    # --- peers --------------------------------------------------------------------------------

    def _send(self, peer_id: str, body: bytes) -> bool:
        return peer_id in self._connected and self._links.send(peer_id, body)

    def _send_message(self, peer_id: str, message: frames.AnyMessage) -> bool:
        return self._send(peer_id, encode_message(message))

    def _is_member(self, peer_id: str) -> bool:
        return self._context.configuration.find(peer_id) is not None

    def _is_trusted(self) -> bool:
        return self._trust.may_vote(self._loop.time())

    def make_hello(self, peer_id: str) -> frames.Hello:
        return self._trust.hello(peer_id)

    def connected(self, peer_id: str, hello: frames.Hello) -> None:
        if not self._active:
            return
        if self._receiver.is_cut_short:
            # What it remembers of this node would be compared with a log that is gone.
            self._ignored.add(peer_id)
            return
        self._connected.add(peer_id)
        self._client_addresses[peer_id] = hello.client_address
        try:
            self._trust.greeted(peer_id, hello)
            if self._is_member(peer_id):
                self._core.connected(peer_id)
                if self._core.is_leading():
                    self._replication.connected(peer_id)
            self._members.tell_stranger(peer_id)
            self._members.met()
        except DiskFull as error:
            # It has to greet again, on another link.
            self._note_full_disk(error)
            self._links.drop(peer_id)
        except Exception as error:
            self._fail(error)
        self._schedule()

    def disconnected(self, peer_id: str) -> None:
        self._connected.discard(peer_id)
        self._ignored.discard(peer_id)
        if not self._running:
            return
        self._core.disconnected(peer_id)
        self._trust.lost_link(peer_id)
        self._calls.lost(peer_id)
        self._reads.lost_link(peer_id)
        self._follower.lost_link(peer_id)
        try:
            self._sender.cancel(peer_id)
            self._receiver.lost_link(peer_id)
        except Exception as error:
            self._fail(error)
        self._schedule()

    def receiving(self, peer_id: str) -> None:
        if not self._takes_part() or peer_id not in self._connected:
            return
        if self._core.is_leading():
            self._core.shows_life(peer_id)
        else:
            self._follower.receiving(peer_id)

    def received(self, peer_id: str, body: bytes) -> None:
        if not self._takes_part() or peer_id not in self._connected:
            return
        try:
            message = frames.decode_message(body)
            handler = self._dispatch.get(type(message))
            if handler is None:
                raise WireError(f"an unexpected {type(message).__name__} from {peer_id}")
            handler(peer_id, message)
            match message:
                case frames.Ack() if self._pump.handle_ack_now(peer_id):
                    return
                case frames.AppendEntries() if self._pump.handle_append_now():
                    return
        except WireError as error:
            log.warning("link dropped", peer=peer_id, error=str(error))
            self._links.drop(peer_id)
        except DiskFull as error:
            self._note_full_disk(error)
            if self._receiver.is_cut_short:
                self._drop_links()
        except Exception as error:
            self._fail(error)
        self._schedule()

    def _message_table(self) -> dict[type, Callable[..., None]]:
        """Who handles what. Whether the sender is a member is each handler's question: a leader or
        a candidate that is not in our configuration may be in a later one (Raft, section 6)."""
        return {
            frames.AppendEntries: self._on_append,
            frames.Ack: self._replication.on_ack,
            frames.StaleTerm: self._elections.on_stale_term,
            frames.RequestVote: self._on_request_vote,
            frames.Vote: self._on_vote,
            frames.PreVote: self._on_pre_vote,
            frames.PreVoteReply: self._elections.on_pre_vote_reply,
            frames.Probe: self._reads.on_probe,
            frames.ProbeAck: self._reads.on_probe_ack,
            frames.ReadRequest: self._reads.on_read_request,
            frames.ReadReply: self._reads.on_read_reply,
            frames.TimeoutNow: self._elections.on_timeout_now,
            frames.SnapshotOffer: self._receiver.on_offer,
            frames.SnapshotChunk: self._receiver.on_chunk,
            frames.SnapshotAck: self._sender.on_ack,
            frames.Removed: self._members.on_removed,
            frames.Request: self._calls.received_request,
            frames.Response: self._calls.received_response,
        }

    def _on_pre_vote(self, peer_id: str, message: frames.PreVote) -> None:
        self._members.tell_stranger(peer_id)
        self._elections.on_pre_vote(peer_id, message)

    def _on_request_vote(self, peer_id: str, message: frames.RequestVote) -> None:
        self._members.tell_stranger(peer_id)
        self._elections.on_request_vote(peer_id, message)

    def _on_append(self, peer_id: str, message: frames.AppendEntries) -> None:
        if not self._members.may_follow(peer_id, message.term):
            return
        self._follower.on_append(peer_id, message)
        if message.term == self._core.term():
            self._receiver.follows(peer_id, message.term)
            if self._follower.knows_leader_complete(message.term):
                self._freshness.heard(self._loop.time(), message.commit_index,
                                      self._core.applied_index())

    def _on_vote(self, peer_id: str, message: frames.Vote) -> None:
        if self._is_member(peer_id):
            self._storage.memory.spoke(peer_id, message.term)
        self._elections.on_vote(peer_id, message)

    # --- the rest of the protocol -------------------------------------------------------------

    async def call(self, node_id: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        return await self._calls.call(node_id, method, payload, timeout_s=timeout_s)

    def handle(self, method: str, handler: PeerHandler, *, members_only: bool = False) -> None:
        self._calls.handle(method, handler, members_only=members_only)

    def is_leader(self) -> bool:
        return self._active and may_serve(self._core)

    def members(self) -> Sequence[Member]:
        return [Member(m.node_id, m.address, m.suffrage,
                       self._client_addresses.get(m.node_id, ""))
                for m in sorted(self._context.configuration.members, key=lambda m: m.node_id)]

    def shed_clear_entries(self, index: int) -> None:
        self._journal.shed_clear_entries(index)

    def on_role_change(self, callback: Callable[[Role, int], None]) -> None:
        self._roles.subscribe(callback)

    def on_fatal(self, callback: Callable[[BaseException], None]) -> None:
        self._fatal_callbacks.append(callback)

    def state_age_s(self) -> float:
        now, core = self._loop.time(), self._core
        if self.is_leader():
            return now - quorum_contact(now, [core.last_response(voter) for voter in core.voters()
                                              if voter != self.node_id])
        return now - self._freshness.fresh_at(core.applied_index())

    def status(self) -> EngineStatus:
        core, journal, configuration = self._core, self._journal, self._context.configuration
        leader_id = core.leader_id()
        contact_s = self._loop.time() - self._elections.leader_contact
        return EngineStatus(
            node_id=self.node_id,
            role=role_of(core) if self._active else Role.SHUTDOWN,
            term=core.term(),
            leader_id=leader_id,
            leader_address=self._client_addresses.get(leader_id, ""),
            commit_index=core.commit_index(),
            applied_index=core.applied_index(),
            last_log_index=journal.last_index,
            last_snapshot_index=journal.anchor_index,
            durable_log_index=journal.durable_index,
            pending_proposals=len(self._proposals),
            peers=sum(1 for m in configuration.members if m.node_id != self.node_id),
            last_contact_ns=0 if core.is_leading()
            else int(contact_s * 1e9) if contact_s != float("inf") else -1,
            configuration_index=configuration.index,
            pending_configuration=configuration.index > core.commit_index(),
            log_bytes=journal.total_bytes,
            snapshot_sent_bytes=self._sender.sent_bytes,
            snapshot_received_bytes=self._receiver.received_bytes,
            snapshots_installed=self._receiver.installed_count,
        )
