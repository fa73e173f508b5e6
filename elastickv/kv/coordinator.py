"""Group commit and forwarding: many concurrent writes, few log entries.

Theory of operation. A write enters a queue with a future. A *pump* takes what has gathered and
makes one log entry of it, sealed and stamped at that moment, while at most `MAX_IN_FLIGHT` earlier
entries are under way; the wait for a slot is what lets groups form. When the slot frees, the
callers that were just answered get a moment to come back (`gathering`); a lone caller never waits
for company. On a follower the same pump sends the group to the leader instead. Each request of a
group has its own outcome and its own deadline: a caller that gives up delays nobody.

A request ends in exactly one of: a position; a deterministic rejection; a typed error that says
nothing was proposed; `OutcomeUnknown`. Requests that certainly were not proposed (no leader yet,
leader moved, plaintext refused by the storage cutover) go back into the queue until their deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from elastickv.clock import HybridLogicalClock
from elastickv.errors import (
    DeadlineExceeded,
    ElasticKVError,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    StorageEnvelopeRequired,
    Unreachable,
    WireError,
)
from elastickv.kv import forwarding
from elastickv.kv.api import MAX_TIMEOUT_S, Condition, Op, OpKind, WriteResult
from elastickv.kv.forwarding import WriteGroup, WriteGroupReply, WriteItem, WriteReply
from elastickv.kv.gathering import Gathering
from elastickv.kv.proposer import Proposer
from elastickv.kv.txn import (
    MAX_BATCH_OPS,
    PART_MEMORY_BYTES,
    Sealer,
    build_request,
    check_ops,
    log_bytes,
)
from elastickv.raft.engine import RaftEngine, Role
from elastickv.wire import HlcCeiling, Writes, encode_entry, encode_writes

MAX_IN_FLIGHT = 1
MAX_GROUP_BYTES = 1 << 20
MAX_GROUP_REQUESTS = 512
MAX_GROUP_PARTS = MAX_BATCH_OPS
"""Operations and conditions: as many as one request may have. A condition on a short key takes a
dozen bytes in the log and as long as others to judge, and every member's loop does nothing else
while it applies an entry: a megabyte of them would take longer than an election timeout."""
MAX_QUEUE_BYTES = 256 << 20
MAX_FORWARDS_IN_FLIGHT = 8
MAX_FORWARD_BYTES = 16 << 20
"""With so much on its way to the leader no other group follows: a link is dropped for what waits on
it."""
CEILING_WINDOW_MS = 1000
ENTRY_TIMEOUT_S = 30.0
REFUSED_RETRY_S = 0.02


class _Pending:
    """A write on its way: what was asked, who waits, and until when (loop time); `waits` while it
    is to be taken from the queue. `size` is what it takes in the log, `held_bytes` in memory."""

    __slots__ = ("conditions", "deadline", "future", "held_bytes", "ops", "size", "waits")

    def __init__(self, ops: Sequence[Op], conditions: Sequence[Condition], size: int,
                 deadline: float, future: asyncio.Future[WriteResult]) -> None:
        self.ops = ops
        self.conditions = conditions
        self.size = size
        self.held_bytes = size + PART_MEMORY_BYTES * (len(ops) + len(conditions))
        self.deadline = deadline
        self.future = future
        self.waits = False


class Coordinator:
    """The writes of one node.

    `sealer(count)` returns the function that makes the next `count` records, or None while this
    node may not seal that many; `writable()` returns the error that refuses all writes, or None.
    """

    def __init__(self, engine: RaftEngine, hlc: HybridLogicalClock, proposer: Proposer, *,
                 sealer: Callable[[int], Sealer | None],
                 writable: Callable[[], ElasticKVError | None], max_value_bytes: int,
                 max_request_bytes: int) -> None:
        self._engine = engine
        self._hlc = hlc
        self._proposer = proposer
        self._sealer = sealer
        self._writable = writable
        self._max_value_bytes = max_value_bytes
        self._max_request_bytes = max_request_bytes
        self._queue: deque[_Pending] = deque()
        self._queue_bytes = 0  # that those that wait hold
        self._withdrawn = 0  # how many in the queue do not
        self._groups_in_flight = 0
        self._forwards_in_flight = 0
        self._forward_bytes = 0
        self._pump_scheduled = False
        self._gathering = Gathering()
        self._gathering_timer: asyncio.TimerHandle | None = None
        self._forward_tasks: set[asyncio.Task[None]] = set()
        engine.handle(forwarding.METHOD_WRITE, self._serve_forwarded, members_only=True)
        engine.on_role_change(self._role_changed)
        proposer.on_change(self.wake)

    # --- writes ---------------------------------------------------------------------------------

    async def put(self, key: bytes, value: bytes, *, ttl_ms: int = 0,
                  timeout_s: float) -> WriteResult:
        return await self._write((Op(OpKind.PUT, key, value, ttl_ms),), (), timeout_s)

    async def delete(self, key: bytes, *, timeout_s: float) -> WriteResult:
        return await self._write((Op(OpKind.DELETE, key),), (), timeout_s)

    async def batch(self, ops: Sequence[Op], *, conditions: Sequence[Condition] = (),
                    timeout_s: float) -> WriteResult:
        return await self._write(ops, conditions, timeout_s)

    async def _write(self, ops: Sequence[Op], conditions: Sequence[Condition],
                     timeout_s: float) -> WriteResult:
        size = log_bytes(ops, conditions, check_ops(
            ops, conditions, max_value_bytes=self._max_value_bytes,
            max_request_bytes=self._max_request_bytes))
        loop = asyncio.get_running_loop()
        timeout_s = min(timeout_s, MAX_TIMEOUT_S)
        future: asyncio.Future[WriteResult] = loop.create_future()
        pending = _Pending(ops, conditions, size, loop.time() + timeout_s, future)
        if self._queue_bytes + pending.held_bytes > MAX_QUEUE_BYTES:
            raise Overloaded(f"{self._queue_bytes} bytes of writes are waiting",
                             remedy="retry with fewer concurrent writes")
        self._enqueue(pending)
        timer = loop.call_later(timeout_s, self._expire, pending)
        try:
            return await future
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise
        finally:
            timer.cancel()

    def _withdraw(self, pending: _Pending) -> bool:
        """Take a write out of the queue; False when it is not in there."""
        if not pending.waits:
            return False
        pending.waits = False
        pending.ops = pending.conditions = ()  # not counted any more, so not held either
        self._queue_bytes -= pending.held_bytes
        self._withdrawn += 1
        # Its place is passed over, or goes with many others: a search for each would take as long
        # as the queue is.
        if self._withdrawn > self._waiting():
            self._queue = deque(left for left in self._queue if left.waits)
            self._withdrawn = 0
        return True

    def _waiting(self) -> int:
        """How many writes are in the queue."""
        return len(self._queue) - self._withdrawn

    def _expire(self, pending: _Pending) -> None:
        if pending.future.done():
            return
        if not self._withdraw(pending):
            pending.future.set_exception(OutcomeUnknown(
                "the write was proposed and not decided within the deadline",
                remedy="read the key to learn the outcome"))
            return
        if self._engine.is_leader():
            pending.future.set_exception(DeadlineExceeded(
                "the leader did not get to the write within the deadline; nothing was written",
                remedy="retry with a longer timeout"))
            return
        pending.future.set_exception(NoLeader(
            "no leader took the write within the deadline; nothing was written",
            remedy="retry; check elastickv admin raft status if it persists"))

    def _enqueue(self, pending: _Pending, *, front: bool = False) -> None:
        self._insert(pending, front=front)
        self.wake()

    def _insert(self, pending: _Pending, *, front: bool) -> None:
        if front:
            self._queue.appendleft(pending)
        else:
            self._queue.append(pending)
        pending.waits = True
        self._queue_bytes += pending.held_bytes

    def wake(self) -> None:
        """Let the pump look again: a write came, a slot freed, a role or a writer changed."""
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _role_changed(self, role: Role, term: int) -> None:
        if role is Role.LEADER:
            self._hlc.lead()
        self._proposer.notify()

    def _pump(self) -> None:
        self._pump_scheduled = False
        while self._queue:
            sent = self._propose_group() if self._engine.is_leader() else self._forward_group()
            if not sent:
                return

    def _take_group(self) -> list[_Pending]:
        """The next requests, of `MAX_GROUP_BYTES` in the log and `MAX_GROUP_PARTS`, or one that is
        larger: only alone can a request turn out to be too large for an entry."""
        group: list[_Pending] = []
        size = parts = 0
        queue = self._queue
        while queue and len(group) < MAX_GROUP_REQUESTS:
            pending = queue[0]
            if not pending.waits:
                queue.popleft()
                self._withdrawn -= 1
                continue
            part_count = len(pending.ops) + len(pending.conditions)
            if group and (size + pending.size > MAX_GROUP_BYTES
                          or parts + part_count > MAX_GROUP_PARTS):
                break
            queue.popleft()
            pending.waits = False
            self._queue_bytes -= pending.held_bytes
            if pending.future.done():  # cancelled by its caller
                continue
            size += pending.size
            parts += part_count
            group.append(pending)
        return group

    def _requeue(self, group: Sequence[_Pending]) -> None:
        """Put back what was not proposed, and try again a little later: until a role change
        nothing says that the next attempt would fare better."""
        self._put_back(group)
        asyncio.get_running_loop().call_later(REFUSED_RETRY_S, self.wake)

    def _put_back(self, group: Sequence[_Pending]) -> None:
        """Requeue without a wake: whatever keeps the group from going wakes the pump itself."""
        for pending in reversed(group):
            if not pending.future.done():
                self._insert(pending, front=True)

    # --- the leader's side ----------------------------------------------------------------------

    def _propose_group(self) -> bool:
        if self._groups_in_flight >= MAX_IN_FLIGHT or self._wait_for_company():
            return False
        refusal = self._writable()
        if refusal is not None:
            # It is raised again and again, and would hold on to the frames, with what they were to
            # write, of all who were told.
            _reject(self._take_group(), refusal.with_traceback(None))
            return True
        if not self._proposer.ready or not self._raise_ceiling():
            return False
        group = self._take_group()
        if not group:
            return False
        try:
            seal = self._sealer(sum(len(pending.ops) for pending in group))
            if seal is None:
                self._put_back(group)
                return False
            entry = self._entry_of(group, seal)
            payload = encode_writes(entry.requests)
        except ElasticKVError as error:
            _reject(group, error)
            return bool(group)  # nothing of an empty one can go before the ceiling is raised
        future = self._proposer.submit(payload, timeout_s=ENTRY_TIMEOUT_S, entry=entry)
        if future is None:
            self._put_back(group)
            return False
        self._groups_in_flight += 1
        self._gathering.group_started(asyncio.get_running_loop().time())
        future.add_done_callback(lambda done: self._group_ended(group, done))
        return True

    def _entry_of(self, group: list[_Pending], seal: Sealer) -> Writes:
        """The entry of `group`, without those for which there is no timestamp yet: they are put
        back. Raises what a request of it deserves, with nothing proposed."""
        requests = []
        for pending in group:
            commit_ts = self._hlc.next()
            if commit_ts is None:  # only when one group outruns a whole window
                break
            requests.append(build_request(pending.ops, pending.conditions, commit_ts, seal))
        if len(requests) < len(group):
            self._requeue(group[len(requests):])
            del group[len(requests):]
        return Writes(requests)

    def _wait_for_company(self) -> bool:
        """Whether the queue is to wait; a timer then wakes the pump at the end of that."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting()
        fills_a_group = waiting >= MAX_GROUP_REQUESTS or self._queue_bytes >= MAX_GROUP_BYTES
        wait_s = self._gathering.wait_s(loop.time(), waiting)
        if wait_s > 0.0 and not fills_a_group:
            if self._gathering_timer is None:
                self._gathering_timer = loop.call_later(wait_s, self._gathered)
            return True
        if self._gathering_timer is not None:
            self._gathering_timer.cancel()
            self._gathering_timer = None
        return False

    def _gathered(self) -> None:
        self._gathering_timer = None
        self.wake()

    def _raise_ceiling(self) -> bool:
        """Keep the HLC's ceiling ahead. The raise precedes in the log whatever depends on it, so
        nothing waits for it: a write above the ceiling commits only if the raise did. False when
        no group can go now; what refuses the raise at once meets the next group in its place."""
        if not self._hlc.needs_raise(CEILING_WINDOW_MS):
            return True
        ceiling = self._hlc.raised_ceiling(CEILING_WINDOW_MS)
        future = self._proposer.submit(encode_entry(HlcCeiling(ceiling)),
                                       timeout_s=ENTRY_TIMEOUT_S)
        if future is None:
            return False
        if future.done() and (error := future.exception()) is not None:
            group = self._take_group()
            if isinstance(error, OutcomeUnknown):  # of the raise: the group was not proposed
                self._requeue(group)
            else:
                self._failed(group, error)
            return False
        self._hlc.observe_ceiling(ceiling)
        return True

    def _group_ended(self, group: Sequence[_Pending], done: asyncio.Future[object]) -> None:
        self._groups_in_flight -= 1
        if done.cancelled():
            error: BaseException | None = OutcomeUnknown("the node is stopping")
        else:
            error = done.exception()
        if error is not None:
            self._failed(group, error)
            return
        self._gathering.group_ended(asyncio.get_running_loop().time(), len(group),
                                    self._waiting())
        self.wake()
        outcomes = done.result()
        if not isinstance(outcomes, list):
            raise TypeError("a write entry must end in a list of outcomes")
        for pending, outcome in zip(group, outcomes, strict=True):
            future = pending.future
            if future.done():
                continue
            if isinstance(outcome, WriteResult):
                future.set_result(outcome)
            elif isinstance(outcome, StorageEnvelopeRequired):
                self._enqueue(pending, front=True)
            else:
                future.set_exception(outcome)

    def _failed(self, group: Sequence[_Pending], error: BaseException) -> None:
        if isinstance(error, NotLeader | NoLeader | Overloaded):
            self._requeue(group)
        else:
            _reject(group, error)
            self.wake()

    # --- the follower's side --------------------------------------------------------------------

    def _forward_group(self) -> bool:
        leader_id = self._engine.status().leader_id
        if not leader_id or leader_id == self._engine.node_id:
            return False  # woken when a leader is known; the deadline bounds the wait
        if self._forwards_in_flight >= MAX_FORWARDS_IN_FLIGHT \
                or self._forward_bytes >= MAX_FORWARD_BYTES:
            return False
        group = self._take_group()
        if not group:
            return False
        self._forwards_in_flight += 1
        self._forward_bytes += _size_of(group)
        task = asyncio.get_running_loop().create_task(self._forward(leader_id, group))
        self._forward_tasks.add(task)
        task.add_done_callback(self._forward_tasks.discard)
        return True

    async def _forward(self, leader_id: str, group: Sequence[_Pending]) -> None:
        remaining_s = max(p.deadline for p in group) - asyncio.get_running_loop().time()
        message = WriteGroup(max(1, int(remaining_s * 1000)),
                             [WriteItem(list(p.ops), list(p.conditions)) for p in group])
        try:
            reply = forwarding.decode(
                await self._engine.call(leader_id, forwarding.METHOD_WRITE,
                                        forwarding.encode(message), timeout_s=remaining_s),
                WriteGroupReply)
            if len(reply.replies) != len(group):
                raise WireError("not one answer for each write")
        except WireError:
            _reject(group, OutcomeUnknown(f"member {leader_id} gave an answer that does not parse",
                                          remedy="run the same version on every node"))
        except (Unreachable, NotLeader, NoLeader):
            self._requeue(group)
            return
        except ElasticKVError as error:
            _reject(group, error)
        else:
            self._finish_forward(group, reply)
        finally:
            self._forward_ended(group)
        self.wake()

    def _forward_ended(self, group: Sequence[_Pending]) -> None:
        self._forwards_in_flight -= 1
        self._forward_bytes -= _size_of(group)

    def _finish_forward(self, group: Sequence[_Pending], reply: WriteGroupReply) -> None:
        for pending, item in zip(group, reply.replies, strict=True):
            if pending.future.done():
                continue
            if item.error is None:
                pending.future.set_result(WriteResult(item.commit_index, item.commit_ts))
                continue
            error = forwarding.info_to_error(item.error)
            if isinstance(error, NotLeader | StorageEnvelopeRequired):
                self._enqueue(pending, front=True)
            else:
                pending.future.set_exception(error)

    async def _serve_forwarded(self, peer_id: str, method: str, payload: bytes) -> bytes:
        """The leader's answer to a follower's group. A non-leader refuses it whole, unproposed."""
        self._proposer.require_leader()
        message = forwarding.decode(payload, WriteGroup)
        timeout_s = message.timeout_ms / 1000
        outcomes = await asyncio.gather(
            *(self._write([Op(OpKind(kind), key, value, ttl_ms)
                           for kind, key, value, ttl_ms in item.ops],
                          [Condition(key, ts) for key, ts in item.conditions], timeout_s)
              for item in message.items), return_exceptions=True)
        return forwarding.encode(WriteGroupReply([_reply(outcome) for outcome in outcomes]))


def _size_of(group: Sequence[_Pending]) -> int:
    return sum(pending.size for pending in group)


def _reject(group: Sequence[_Pending], error: BaseException) -> None:
    for pending in group:
        if not pending.future.done():
            pending.future.set_exception(error)


def _reply(outcome: WriteResult | BaseException) -> WriteReply:
    if isinstance(outcome, WriteResult):
        return WriteReply(outcome.commit_index, outcome.commit_ts, None)
    if isinstance(outcome, ElasticKVError):
        return WriteReply(0, 0, forwarding.error_to_info(outcome))
    if isinstance(outcome, asyncio.CancelledError):
        return WriteReply(0, 0, forwarding.error_to_info(OutcomeUnknown("the leader is stopping")))
    raise outcome
