"""The one way into the log: seals entries after the raft cutover and keeps the cutover's barrier.

Barrier: the raft cutover's own entry is the last one in the clear. While it is
under way every other proposal waits, so that no entry above the cutover index can be clear. Entries
proposed before it need no separate drain: the log is ordered, so they have lower indexes and are
decided before it. The barrier therefore lasts one commit, however long a queue is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from elastickv.errors import (
    DeadlineExceeded,
    DiskFull,
    InvalidArgument,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    PeerError,
)
from elastickv.raft.engine import RaftEngine
from elastickv.wire import Entry

SETTLE_TIMEOUT_S = 60.0


OUTCOMES = ("applied", "rejected", "refused", "unknown")


def outcome_of(error: BaseException | None) -> str:
    """What became of a proposal: applied; rejected by every replica alike; refused before it was in
    the log; unknown."""
    if error is None:
        return "applied"
    if isinstance(error, NotLeader | NoLeader | Overloaded | DiskFull | InvalidArgument):
        return "refused"
    return "unknown" if isinstance(error, OutcomeUnknown) else "rejected"


class Seals(Protocol):
    """What the proposer needs of `kv.sealing.Sealing`."""

    def entry_ready(self, *, beyond_limit: bool = False) -> bool: ...

    def seal_entry(self, payload: bytes, *, beyond_limit: bool = False,
                   entry: Entry | None = None) -> bytes | None: ...


class NotSealable(PeerError):
    """This node may not seal an entry yet; certainly nothing was proposed."""


class Proposer:
    """Wraps `RaftEngine.propose` with sealing and the barrier.

    `beyond_limit`: the entry may be sealed beyond the limit of user writes, as one of the cluster's
    own (a key change).
    """

    def __init__(self, engine: RaftEngine, seals: Seals) -> None:
        self._engine = engine
        self._seals = seals
        self._open = True
        self._is_closed = False
        self._waiters: list[asyncio.Future[None]] = []
        self._listeners: list[Callable[[], None]] = []
        self.last_hold_s = 0.0
        self.on_outcome: Callable[[str], None] | None = None
        """Told the outcome of every proposal: one of `OUTCOMES`."""

    @property
    def held(self) -> bool:
        """True while the barrier holds proposals back."""
        return not self._open

    @property
    def ready(self) -> bool:
        """Whether `submit` would propose now; if not for want of a seal, work on it has begun."""
        return self._open and self._seals.entry_ready()

    def close(self) -> None:
        """Seal nothing any more: this node must stop."""
        self._open = False
        self._is_closed = True

    def require_leader(self) -> None:
        """Raise `NotLeader`, naming the leader where known, unless this node leads."""
        if not self._engine.is_leader():
            status = self._engine.status()
            raise NotLeader(leader_id=status.leader_id, leader_address=status.leader_address)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` at every `notify`. It must not propose at once."""
        self._listeners.append(listener)

    def notify(self) -> None:
        """Something that `submit` depends on changed: barrier, keys, writer confirmation, role."""
        for listener in self._listeners:
            listener()
        for waiter in self._waiters:
            _release(waiter)
        self._waiters.clear()

    async def wait_change(self, *, timeout_s: float) -> None:
        """Return at the next `notify`, or after `timeout_s` seconds."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        timer = loop.call_later(timeout_s, _release, waiter)
        try:
            await waiter
        finally:
            timer.cancel()

    def submit(self, payload: bytes, *, timeout_s: float, beyond_limit: bool = False,
               entry: Entry | None = None) -> asyncio.Future[object] | None:
        """Seal and propose now; None when held or when this node may not seal yet. `entry` is what
        `payload` was encoded from: with it, this node need not decode that when it applies it."""
        if not self._open:
            return None
        sealed = self._seals.seal_entry(payload, beyond_limit=beyond_limit, entry=entry)
        if sealed is None:
            return None
        return self._track(sealed, timeout_s)

    def submit_clear(self, payload: bytes, *, timeout_s: float) -> asyncio.Future[object]:
        """Propose without sealing: the raft cutover, and what `wire.CLEAR_OPCODES` names."""
        return self._track(payload, timeout_s)

    def _track(self, payload: bytes, timeout_s: float) -> asyncio.Future[object]:
        future = self._engine.propose(payload, timeout_s=timeout_s)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: asyncio.Future[object]) -> None:
        # The exception is retrieved here too: the proposer may have stopped listening.
        error = None if future.cancelled() else future.exception()
        if self.on_outcome is not None and not future.cancelled():
            self.on_outcome(outcome_of(error))

    async def settle(self) -> None:
        """Return once every entry in this node's log is applied or this node no longer leads.

        After an unknown outcome the entry may still be in the log; nothing that was validated
        against the applied state may be proposed before it is decided.
        """
        while self._engine.is_leader():
            target = self._engine.status().last_log_index
            if self._engine.status().applied_index >= target:
                return
            try:
                await self._engine.wait_applied(target, timeout_s=1.0)
                return
            except DeadlineExceeded:
                continue
            except PeerError:
                return

    async def wait_sealable(self, *, timeout_s: float) -> None:
        """Return once this node leads and may seal an entry of the cluster's own.

        Raises `NotLeader`, or `NotSealable` after `timeout_s` seconds. Call it without the lock
        that registrations need, or nobody can become a writer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            self.require_leader()
            if self._open and self._seals.entry_ready(beyond_limit=True):
                return
            remaining_s = deadline - loop.time()
            if remaining_s <= 0:
                raise NotSealable("the leader is not confirmed as a writer of the raft DEK yet",
                                  remedy="retry; look at elastickv admin encryption status")
            await self.wait_change(timeout_s=min(remaining_s, 0.1))

    async def propose_settled(self, payload: bytes, *, clear: bool = False,
                              then: Callable[[], None] | None = None) -> object:
        """Propose and stay until the outcome is decided, whatever the caller's deadline.

        The caller must hold the lock that covers its validation. `then()` runs when the entry is in
        the log and not yet decided. Raises `NotSealable`, or what the proposal ended in.
        """
        self.require_leader()
        future = (self.submit_clear(payload, timeout_s=SETTLE_TIMEOUT_S) if clear
                  else self.submit(payload, timeout_s=SETTLE_TIMEOUT_S, beyond_limit=True))
        if future is None:
            raise NotSealable("the leader may not seal an entry yet", remedy="retry")
        if then is not None:
            then()
        try:
            return await future
        except OutcomeUnknown:
            await self.settle()
            raise

    async def propose_behind_barrier(self, payload: bytes) -> object:
        """The raft cutover: hold everything else, propose in the clear, wait for apply.

        Cancelled, it leaves the barrier closed: the entry may yet be decided.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._open = False
        is_decided = True
        try:
            return await self.propose_settled(payload, clear=True)
        except asyncio.CancelledError:
            is_decided = False
            raise
        finally:
            if is_decided:
                self._open = not self._is_closed
                self.last_hold_s = loop.time() - started
                self.notify()


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
