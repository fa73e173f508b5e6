"""Calls between peers: requests matched with responses, typed errors carried across.

An error travels as (class name, message, remedy). It comes back as the same class of
`elastickv.errors`; a name that is not there leaves open what was done, hence `OutcomeUnknown`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from elastickv import errors
from elastickv.errors import (
    ElasticKVError,
    InvalidArgument,
    NotLeader,
    OutcomeUnknown,
    PeerError,
    Unreachable,
)
from elastickv.raft.answers import Answers
from elastickv.raft.engine import PeerHandler
from elastickv.raft.frames import Request, Response, encode_message

Send = Callable[[str, bytes], bool]


def error_fields(error: BaseException) -> tuple[str, str, str]:
    """What crosses the wire for `error`: its nearest class that every node knows. An unexpected one
    tells nothing but its class, and not how far the call had come."""
    if isinstance(error, ElasticKVError):
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return known.__name__, error.message, error.remedy
    return OutcomeUnknown.__name__, f"the peer failed with {type(error).__name__}", ""


def error_from(name: str, message: str, remedy: str) -> ElasticKVError:
    """The error that `error_fields` described; of unknown outcome when only newer nodes know it."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, ElasticKVError):
        return kind(message, remedy=remedy)
    return OutcomeUnknown(message, remedy=remedy)


@dataclass(slots=True)
class _Pending:
    peer_id: str
    future: asyncio.Future[bytes]
    deadline: float


class PeerCalls:
    """Both sides of the calls of one node."""

    def __init__(self, node_id: str, send: Send, max_payload_bytes: int,
                 is_member: Callable[[str], bool]) -> None:
        """`is_member` judges by the configuration in force here."""
        self._node_id = node_id
        self._is_member = is_member
        self._send = send
        self._max_payload_bytes = max_payload_bytes
        self._handlers: dict[str, tuple[PeerHandler, bool]] = {}
        self._pending: dict[int, _Pending] = {}
        self._last_request = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers = Answers(send)

    def handle(self, method: str, handler: PeerHandler, *, members_only: bool = False) -> None:
        """See `RaftEngine.handle`; the latest registration wins."""
        self._handlers[method] = handler, members_only

    async def call(self, peer_id: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        """See `RaftEngine.call`."""
        if len(payload) > self._max_payload_bytes:
            raise InvalidArgument(f"a call carries at most {self._max_payload_bytes} bytes, "
                                  f"not {len(payload)}")
        if peer_id == self._node_id:
            return await self._run_handler(peer_id, method, payload)
        loop = asyncio.get_running_loop()
        self._last_request += 1
        request = self._last_request
        if not self._send(peer_id, encode_message(Request(request, method, payload))):
            raise Unreachable(f"there is no link to member {peer_id}",
                              remedy="check that it runs and that its raft address is right")
        future: asyncio.Future[bytes] = loop.create_future()
        self._pending[request] = _Pending(peer_id, future, loop.time() + timeout_s)
        try:
            return await future
        finally:
            self._pending.pop(request, None)

    def expire(self, now: float) -> None:
        """Fail what is past its deadline."""
        for pending in [p for p in self._pending.values() if p.deadline <= now]:
            self._fail(pending, f"member {pending.peer_id} did not answer in time")

    def lost(self, peer_id: str) -> None:
        """The link with `peer_id` broke: its open calls may or may not have run."""
        self._answers.lost(peer_id)
        for pending in [p for p in self._pending.values() if p.peer_id == peer_id]:
            self._fail(pending, f"the link with member {peer_id} broke during a call")

    @staticmethod
    def _fail(pending: _Pending, message: str) -> None:
        if not pending.future.done():
            pending.future.set_exception(OutcomeUnknown(message))

    def received_response(self, peer_id: str, response: Response) -> None:
        """Complete the call that `response` answers, if it still waits."""
        pending = self._pending.get(response.request)
        if pending is None or pending.peer_id != peer_id or pending.future.done():
            return
        if response.error:
            pending.future.set_exception(error_from(response.error, response.message,
                                                    response.remedy))
        else:
            pending.future.set_result(response.payload)

    def received_request(self, peer_id: str, request: Request) -> None:
        """Run the handler in a task of its own and send what it returns or raises."""
        task = asyncio.get_running_loop().create_task(
            self._serve(peer_id, request, self._answers.to(peer_id)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer_id: str, request: Request,
                     answer: Callable[[bytes], None]) -> None:
        try:
            payload = await self._run_handler(peer_id, request.method, request.payload)
            if len(payload) > self._max_payload_bytes:
                raise OutcomeUnknown(f"the reply to {request.method} exceeds "
                                     f"{self._max_payload_bytes} bytes")
            response = Response(request.request, payload, "", "", "")
        except Exception as error:
            response = Response(request.request, b"", *error_fields(error))
        answer(encode_message(response))

    async def _run_handler(self, peer_id: str, method: str, payload: bytes) -> bytes:
        served = self._handlers.get(method)
        if served is None:
            raise PeerError(f"member {self._node_id} does not serve {method}",
                            remedy="run the same version on all members")
        handler, members_only = served
        if members_only and not self._is_member(peer_id):
            # Who was only just removed, or added by another leader, looks for its leader again.
            raise NotLeader(f"member {self._node_id} does not serve {method} to {peer_id}: "
                            f"{peer_id} is no member in its configuration",
                            remedy="retry shortly; a node that was removed has to be added again")
        return await handler(peer_id, method, payload)

    async def close(self) -> None:
        """Fail open calls and cancel running handlers."""
        for pending in list(self._pending.values()):
            self._fail(pending, "this node is stopping")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
