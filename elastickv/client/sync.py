"""The blocking client: `Client` on an event loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from elastickv.client.aio import DEFAULT_TIMEOUT_S, SCAN_PAGE, Client, EncryptionCalls, RaftCalls
from elastickv.client.model import (
    BootstrapResult,
    Capability,
    Condition,
    CutoverResult,
    Delete,
    MemberEncryption,
    Pair,
    Purpose,
    Put,
    RaftMember,
    RaftStatus,
    ReadResult,
    RotateResult,
    SidecarState,
    Writer,
    WriteResult,
)
from elastickv.client.pool import claim_process, is_forked
from elastickv.config import TlsFiles
from elastickv.errors import ClientClosed, ForkedProcess

T = TypeVar("T")


class _Loop:
    """An event loop in a daemon thread. Both end with this object at the latest."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Reentrant, for a signal handler that interrupts the thread that holds it.
        self._entry = threading.RLock()
        # Taken for good by the one call that closes; nothing can come between test and set.
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="elastickv-client",
                                        daemon=True)
        self._thread.start()
        self._abandoned = weakref.finalize(self, _abandon, self._loop)
        self._abandoned.atexit = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; an interrupted caller cancels it. Raises `ClientClosed`,
        `ForkedProcess`."""
        try:
            claim_process()
        except ForkedProcess:
            work.close()
            raise
        with self._entry:
            try:
                if self._closing.locked():
                    raise RuntimeError
                future = asyncio.run_coroutine_threadsafe(work, self._loop)
                # What a loop has taken is done before it is closed.
                if self._loop.is_closed() and not future.done():
                    raise RuntimeError
            except RuntimeError:
                # asyncio's, too: a signal handler may have closed the loop since the test.
                work.close()
                raise ClientClosed("the client is closed") from None
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Do `last`, wait for the calls that other threads have under way, stop the loop and end
        the thread. Idempotent; nothing in a forked process, which has no such thread and whose copy
        of the lock may be held for ever."""
        if is_forked():
            if last is not None:
                last.close()
            return
        with self._entry:
            if not self._closing.acquire(blocking=False):
                if last is not None:
                    last.close()
                return
        self._abandoned.detach()
        asyncio.run_coroutine_threadsafe(_finish(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _abandon(loop: asyncio.AbstractEventLoop) -> None:
    """The end of a loop that nobody closed and nobody can use any more. Called by the garbage
    collector in any thread, so it takes no lock."""
    if is_forked():
        return
    loop.call_soon_threadsafe(loop.stop)
    warnings.warn("a SyncClient was not closed", ResourceWarning, stacklevel=2)


async def _finish(last: Coroutine[Any, Any, None] | None) -> None:
    under_way = asyncio.all_tasks() - {asyncio.current_task()}
    if last is not None:
        await last
    await asyncio.gather(*under_way, return_exceptions=True)


async def _open(endpoints: Sequence[str], tls: TlsFiles | None, timeout_s: float) -> Client:
    return Client(endpoints, tls=tls, timeout_s=timeout_s)


class SyncClient:
    """`Client` with blocking calls; safe to use from several threads. See `Client` for the rules.

    Use it as `with SyncClient([...]) as client:`.
    """

    def __init__(self, endpoints: Sequence[str], *, tls: TlsFiles | None = None,
                 timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Raises `ConfigError` for an address that is none and for unusable TLS files."""
        self._loop = _Loop()
        try:
            self._client = self._loop.run(_open(endpoints, tls, timeout_s))
        except BaseException:
            self._loop.close()
            raise
        self.encryption = SyncEncryptionCalls(self._loop, self._client.encryption)
        self.raft = SyncRaftCalls(self._loop, self._client.raft)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way in any thread, with an error, and disconnect. Idempotent."""
        self._loop.close(self._client.close())

    def put(self, key: bytes, value: bytes, *, ttl_ms: int = 0,
            timeout_s: float | None = None) -> WriteResult:
        """Write one key. `ttl_ms` 0 = never expires."""
        return self._loop.run(self._client.put(key, value, ttl_ms=ttl_ms, timeout_s=timeout_s))

    def get(self, key: bytes, *, ts: int = 0, stale: bool = False,
            timeout_s: float | None = None) -> ReadResult:
        """The version visible at `ts` (0 = latest). Linearizable unless `stale`."""
        return self._loop.run(self._client.get(key, ts=ts, stale=stale, timeout_s=timeout_s))

    def delete(self, key: bytes, *, timeout_s: float | None = None) -> WriteResult:
        """Remove one key."""
        return self._loop.run(self._client.delete(key, timeout_s=timeout_s))

    def batch(self, ops: Iterable[Put | Delete], *, conditions: Iterable[Condition] = (),
              timeout_s: float | None = None) -> WriteResult:
        """All of `ops` at one timestamp, or nothing. Raises `ConditionFailed`."""
        # Taken here: an iterable may use this client, or belong to the caller's thread.
        all_ops, all_conditions = list(ops), list(conditions)
        return self._loop.run(self._client.batch(all_ops, conditions=all_conditions,
                                                 timeout_s=timeout_s))

    def latest_commit_ts(self, key: bytes, *, timeout_s: float | None = None) -> tuple[int, bool]:
        """`(commit_ts, exists)` of the latest version."""
        return self._loop.run(self._client.latest_commit_ts(key, timeout_s=timeout_s))

    def scan(self, start: bytes = b"", end: bytes = b"", *, limit: int = SCAN_PAGE, ts: int = 0,
             reverse: bool = False, keys_only: bool = False, stale: bool = False,
             on_stale_ms: Callable[[int], object] | None = None,
             timeout_s: float | None = None) -> list[Pair]:
        """Up to `limit` pairs with start <= key < end (b"" = unbounded)."""
        ages: list[int] = []
        pairs = self._loop.run(self._client.scan(
            start, end, limit=limit, ts=ts, reverse=reverse, keys_only=keys_only, stale=stale,
            on_stale_ms=ages.append, timeout_s=timeout_s))
        _tell(on_stale_ms, ages)
        return pairs

    def scan_pages(self, start: bytes = b"", end: bytes = b"", *, page: int = SCAN_PAGE,
                   ts: int = 0, reverse: bool = False, keys_only: bool = False,
                   stale: bool = False,
                   on_stale_ms: Callable[[int], object] | None = None,
                   timeout_s: float | None = None) -> Iterator[list[Pair]]:
        """The whole range, page by page; see `Client.scan_pages`."""
        ages: list[int] = []
        pages = self._client.scan_pages(start, end, page=page, ts=ts, reverse=reverse,
                                        keys_only=keys_only, stale=stale,
                                        on_stale_ms=ages.append, timeout_s=timeout_s)
        while (pairs := self._loop.run(_next(pages.__anext__))) is not None:
            _tell(on_stale_ms, ages)
            yield pairs
        _tell(on_stale_ms, ages)


def _tell(on_stale_ms: Callable[[int], object] | None, ages: list[int]) -> None:
    """Empty `ages`, which came in the client's thread, in the caller's: a function of the caller's
    may use the client."""
    if on_stale_ms is not None:
        for stale_ms in ages:
            on_stale_ms(stale_ms)
    ages.clear()


async def _next(advance: Callable[[], Any]) -> list[Pair] | None:
    try:
        pairs: list[Pair] = await advance()
    except StopAsyncIteration:
        return None
    return pairs


class SyncEncryptionCalls:
    """`EncryptionCalls` with blocking calls."""

    def __init__(self, loop: _Loop, calls: EncryptionCalls) -> None:
        self._loop = loop
        self._calls = calls

    def capability(self, *, timeout_s: float | None = None) -> Capability:
        """What the member that answers says of itself."""
        return self._loop.run(self._calls.capability(timeout_s=timeout_s))

    def sidecar_state(self, *, timeout_s: float | None = None) -> SidecarState:
        """The sidecar of the member that answers."""
        return self._loop.run(self._calls.sidecar_state(timeout_s=timeout_s))

    def members(self, *, timeout_s: float | None = None) -> list[MemberEncryption]:
        """Every member's capability and sidecar, reachable or not."""
        return self._loop.run(self._calls.members(timeout_s=timeout_s))

    def bootstrap(self, *, wrapped_storage: bytes = b"", wrapped_raft: bytes = b"",
                  storage_dek_id: int = 0, raft_dek_id: int = 0, writers: Sequence[Writer] = (),
                  timeout_s: float | None = None) -> BootstrapResult:
        """Give the cluster its first DEKs."""
        return self._loop.run(self._calls.bootstrap(
            wrapped_storage=wrapped_storage, wrapped_raft=wrapped_raft,
            storage_dek_id=storage_dek_id, raft_dek_id=raft_dek_id, writers=writers,
            timeout_s=timeout_s))

    def rotate_dek(self, purpose: Purpose, *, wrapped: bytes = b"", new_dek_id: int = 0,
                   proposer_node_id: int = 0, proposer_local_epoch: int = 0,
                   timeout_s: float | None = None) -> RotateResult:
        """Make a new DEK active."""
        return self._loop.run(self._calls.rotate_dek(
            purpose, wrapped=wrapped, new_dek_id=new_dek_id, proposer_node_id=proposer_node_id,
            proposer_local_epoch=proposer_local_epoch, timeout_s=timeout_s))

    def register_writers(self, dek_id: int, writers: Sequence[Writer], *,
                         timeout_s: float | None = None) -> int:
        """Enter writers of a DEK into the registry; the log index."""
        return self._loop.run(self._calls.register_writers(dek_id, writers, timeout_s=timeout_s))

    def resync_sidecar(self, caller_full_node_id: int, *,
                       timeout_s: float | None = None) -> SidecarState:
        """The leader's keys, and the epochs that the registry holds for that node."""
        return self._loop.run(self._calls.resync_sidecar(caller_full_node_id, timeout_s=timeout_s))

    def enable_storage_envelope(self, *, proposer_node_id: int = 0, proposer_local_epoch: int = 0,
                                timeout_s: float | None = None) -> CutoverResult:
        """From now on values are ciphertext."""
        return self._loop.run(self._calls.enable_storage_envelope(
            proposer_node_id=proposer_node_id, proposer_local_epoch=proposer_local_epoch,
            timeout_s=timeout_s))

    def enable_raft_envelope(self, *, proposer_node_id: int = 0, proposer_local_epoch: int = 0,
                             timeout_s: float | None = None) -> CutoverResult:
        """From now on the log is ciphertext."""
        return self._loop.run(self._calls.enable_raft_envelope(
            proposer_node_id=proposer_node_id, proposer_local_epoch=proposer_local_epoch,
            timeout_s=timeout_s))


class SyncRaftCalls:
    """`RaftCalls` with blocking calls."""

    def __init__(self, loop: _Loop, calls: RaftCalls) -> None:
        self._loop = loop
        self._calls = calls

    def status(self, *, timeout_s: float | None = None) -> RaftStatus:
        """The counters of the member that answers."""
        return self._loop.run(self._calls.status(timeout_s=timeout_s))

    def members(self, *, timeout_s: float | None = None) -> list[RaftMember]:
        """The current configuration."""
        return self._loop.run(self._calls.members(timeout_s=timeout_s))

    def add_voter(self, node_id: str, address: str, *, previous_index: int = 0,
                  timeout_s: float | None = None) -> int:
        """Add a voting member at its raft address."""
        return self._loop.run(self._calls.add_voter(node_id, address, timeout_s=timeout_s,
                                                    previous_index=previous_index))

    def add_learner(self, node_id: str, address: str, *, previous_index: int = 0,
                    timeout_s: float | None = None) -> int:
        """Add a member that receives the log and does not vote."""
        return self._loop.run(self._calls.add_learner(node_id, address, timeout_s=timeout_s,
                                                      previous_index=previous_index))

    def promote_learner(self, node_id: str, *, previous_index: int = 0, min_applied_index: int = 0,
                        skip_min_applied_check: bool = False,
                        timeout_s: float | None = None) -> int:
        """Let a learner vote."""
        return self._loop.run(self._calls.promote_learner(
            node_id, previous_index=previous_index, min_applied_index=min_applied_index,
            skip_min_applied_check=skip_min_applied_check, timeout_s=timeout_s))

    def remove_server(self, node_id: str, *, previous_index: int = 0,
                      timeout_s: float | None = None) -> int:
        """Remove a member."""
        return self._loop.run(self._calls.remove_server(node_id, previous_index=previous_index,
                                                        timeout_s=timeout_s))

    def transfer_leadership(self, node_id: str = "", *, timeout_s: float | None = None) -> None:
        """Hand leadership to a member."""
        self._loop.run(self._calls.transfer_leadership(node_id, timeout_s=timeout_s))
