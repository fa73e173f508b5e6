"""The one way into the log: seals entries after the raft cutover and keeps the cutover's barrier.

Barrier (DESIGN section 5): the raft cutover's own entry is the last one in the clear. While it is
under way every other proposal waits, so that no entry above the cutover index can be clear.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from elastickv.errors import DeadlineExceeded, NotLeader, OutcomeUnknown, PeerError
from elastickv.raft.engine import RaftEngine

SETTLE_TIMEOUT_S = 60.0


class Proposer:
    """Wraps `RaftEngine.propose` with sealing and the barrier.

    `seal(payload)` returns the payload as it goes into the log: unchanged before the raft cutover,
    a raft envelope after it, None when this node may not seal yet (its writer is not confirmed).
    """

    def __init__(self, engine: RaftEngine, seal: Callable[[bytes], bytes | None]) -> None:
        self._engine = engine
        self._seal = seal
        self._in_flight = 0
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._open = True
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def in_flight(self) -> int:
        """Entries proposed and not ended."""
        return self._in_flight

    @property
    def held(self) -> bool:
        """True while the barrier holds proposals back."""
        return not self._open

    def require_leader(self) -> None:
        """Raise `NotLeader`, naming the leader where known, unless this node leads."""
        if not self._engine.is_leader():
            status = self._engine.status()
            raise NotLeader(leader_id=status.leader_id, leader_address=status.leader_address)

    def notify(self) -> None:
        """Something that `submit` depends on changed: barrier, writer confirmation, role."""
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

    def submit(self, payload: bytes, *, timeout_s: float) -> asyncio.Future[object] | None:
        """Seal and propose now; None when held or when this node may not seal yet."""
        if not self._open:
            return None
        sealed = self._seal(payload)
        if sealed is None:
            return None
        return self._track(sealed, timeout_s)

    def submit_clear(self, payload: bytes, *, timeout_s: float) -> asyncio.Future[object]:
        """Propose without sealing: writer registrations and the raft cutover only."""
        return self._track(payload, timeout_s)

    def _track(self, payload: bytes, timeout_s: float) -> asyncio.Future[object]:
        future = asyncio.ensure_future(self._engine.propose(payload, timeout_s=timeout_s))
        self._in_flight += 1
        self._idle.clear()
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: asyncio.Future[object]) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()
        if not future.cancelled():
            future.exception()  # Retrieved here too: the proposer may have stopped listening.

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

    async def propose_settled(self, payload: bytes, *, clear: bool = False) -> object:
        """Propose and stay until the outcome is decided, whatever the caller's deadline.

        The caller must hold the lock that covers its validation. Raises what the proposal ended in.
        """
        while True:
            self.require_leader()
            future = (self.submit_clear(payload, timeout_s=SETTLE_TIMEOUT_S) if clear
                      else self.submit(payload, timeout_s=SETTLE_TIMEOUT_S))
            if future is not None:
                break
            await self.wait_change(timeout_s=0.1)
        try:
            return await future
        except OutcomeUnknown:
            await self.settle()
            raise

    async def propose_behind_barrier(self, payload: bytes) -> object:
        """The raft cutover: hold everything else, drain, propose in the clear, wait for apply."""
        self._open = False
        try:
            await self._idle.wait()
            return await self.propose_settled(payload, clear=True)
        finally:
            self._open = True
            self.notify()


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
