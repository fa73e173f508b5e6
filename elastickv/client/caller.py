"""One call over any number of members: rotation, leader following, safe retries, one deadline."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import grpc
from google.protobuf.message import EncodeError

from elastickv.client import failures
from elastickv.client.failures import NotReached
from elastickv.client.pool import Endpoint, Pool
from elastickv.client.rpcs import RequestT, ResponseT, Rpc
from elastickv.config import TlsFiles
from elastickv.errors import (
    ClientClosed,
    ConfigError,
    ElasticKVError,
    InvalidArgument,
    NotLeader,
    PeerError,
)

MAX_TIMEOUT_S = 1e9
"""What a deadline can be counted in; longer than anybody waits."""


class Caller:
    """Makes calls. Belongs to the event loop it was created on."""

    def __init__(self, endpoints: Sequence[str], tls: TlsFiles | None, timeout_s: float) -> None:
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(f"timeout_s is {timeout_s}", remedy="give a time above 0 seconds")
        self._pool = Pool(endpoints, tls)
        self._timeout_s = timeout_s
        self._closed = False

    async def call(self, rpc: Rpc[RequestT, ResponseT], request: Callable[[], RequestT],
                   timeout_s: float | None = None) -> ResponseT:
        """The response to what `request` makes, within `timeout_s` (default: the client's). Raises
        `elastickv.errors`: `InvalidArgument` for what does not fit its field; `ClientClosed` or,
        for a write under way, `OutcomeUnknown` when `close` is called."""
        try:
            content = request().SerializeToString()
        except ValueError as error:
            raise InvalidArgument(f"an argument does not fit its field: {error}",
                                  remedy="give a number or text within the field's limits"
                                  ) from None
        except EncodeError as error:
            raise InvalidArgument(f"the request cannot be sent: {error}",
                                  remedy="make it smaller") from None
        try:
            return await self._call(rpc, content, timeout_s)
        except grpc.aio.UsageError:
            if not self._closed:
                raise
            raise ClientClosed("the client was closed before this call was sent") from None
        except asyncio.CancelledError:
            # Of the call, by the channel's end; or of the caller's task, which is not ours to hide.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise failures.closed_during(write=rpc.write) from None

    async def _call(self, rpc: Rpc[RequestT, ResponseT], request: bytes,
                    timeout_s: float | None) -> ResponseT:
        now = asyncio.get_running_loop().time
        if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidArgument(f"timeout_s is {timeout_s}",
                                  remedy=f"give seconds above 0, up to {MAX_TIMEOUT_S:.0f}")
        deadline = now() + (self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        told: ElasticKVError | None = None  # by a member; says more than that time ran out
        while True:
            if self._closed:
                raise ClientClosed("the client is closed")
            endpoint = self._pool.current()
            try:
                return await self._attempt(endpoint, rpc, request, deadline - now())
            except ElasticKVError as error:
                attempt += 1
                if not failures.may_retry(error, write=rpc.write):
                    if isinstance(error, PeerError):
                        # A member that is frozen or cut off must not get the next write as well.
                        self._pool.advance(endpoint, unreachable=False)
                    raise
                if not isinstance(error, NotReached):
                    told = error
                pause_s = self._next_endpoint(endpoint, error, attempt)
                if now() + pause_s >= deadline:
                    raise told or await self._pool.unreachable() from None
            if pause_s:
                await asyncio.sleep(pause_s)

    async def _attempt(self, endpoint: Endpoint, rpc: Rpc[RequestT, ResponseT], request: bytes,
                       remaining_s: float) -> ResponseT:
        now = asyncio.get_running_loop().time
        started = now()
        known = len(self._pool)
        await endpoint.connect(failures.connect_timeout_s(remaining_s, known))
        limit_s = failures.attempt_timeout_s(remaining_s - (now() - started), known,
                                             write=rpc.write)
        if limit_s <= 0:
            raise NotReached(f"{endpoint.address}: no time was left to ask it")
        try:
            return await endpoint.call(rpc, request, limit_s)
        except grpc.aio.AioRpcError as error:
            failure = failures.failure_of(error, endpoint.address)
            raise failures.error_of(failure, write=rpc.write) from None

    def _next_endpoint(self, failed: Endpoint, error: ElasticKVError, attempt: int) -> float:
        """Choose whom to ask next; the pause before it in seconds."""
        known = len(self._pool)
        if not (isinstance(error, NotLeader) and error.leader_address != failed.address
                and self._pool.prefer(error.leader_address)):
            self._pool.advance(failed, unreachable=isinstance(error, NotReached))
        return failures.backoff_s(attempt, known, random.random())

    async def close(self) -> None:
        """End what is under way, with an error, and disconnect. Idempotent."""
        self._closed = True
        await self._pool.close()
