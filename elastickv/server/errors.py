"""The one place where errors become gRPC statuses.

A status carries the error's message and remedy as its detail and three trailers, so that a client
can rebuild the typed error:

    elastickv-error     class name in `elastickv.errors`
    elastickv-outcome   "not-applied" or "unknown": what is known of a write that failed
    elastickv-leader    client address of the leader, where it is known
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import grpc

from elastickv import logs
from elastickv.errors import ElasticKVError, NotLeader, Outcome

TRAILER_ERROR = "elastickv-error"
TRAILER_OUTCOME = "elastickv-outcome"
TRAILER_LEADER = "elastickv-leader"

DEFAULT_TIMEOUT_S = 10.0
_REPLY_MARGIN = 0.1

log = logs.get_logger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")

Method = Callable[[Request, float], Awaitable[Response]]
"""`(request, timeout_s) -> response`: a service method without gRPC in it."""


class Status(NamedTuple):
    """What goes over the wire for an error."""

    code: grpc.StatusCode
    detail: str
    trailers: tuple[tuple[str, str], ...]


def status_of(error: BaseException) -> Status:
    """The gRPC status of an error. An unexpected one is INTERNAL and tells the caller nothing of
    what was in memory; whether a write took effect is then unknown."""
    if not isinstance(error, ElasticKVError):
        return Status(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}); see the "
                      "node's log", ((TRAILER_OUTCOME, Outcome.UNKNOWN.value),))
    trailers = [(TRAILER_ERROR, type(error).__name__), (TRAILER_OUTCOME, error.outcome.value)]
    if isinstance(error, NotLeader) and error.leader_address:
        trailers.append((TRAILER_LEADER, error.leader_address))
    return Status(grpc.StatusCode[error.grpc_status], str(error), tuple(trailers))


def timeout_of(context: grpc.aio.ServicerContext[Any, Any]) -> float:
    """Seconds that the call may take, less a margin in which a typed error still reaches the
    caller before its own deadline."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None:
        return DEFAULT_TIMEOUT_S
    return remaining_s - min(_REPLY_MARGIN, remaining_s * _REPLY_MARGIN)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """End the call with the status of `error`."""
    if not isinstance(error, ElasticKVError):
        log.error("unexpected error in a call", exc_info=error)
    status = status_of(error)
    await context.abort(status.code, status.detail, status.trailers)


def unary(method: Method[Request, Response], request_type: Any,
          response_type: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """A gRPC handler around a service method."""

    async def handle(request: Request,
                     context: grpc.aio.ServicerContext[Any, Any]) -> Response:
        try:
            return await method(request, timeout_of(context))
        except Exception as error:
            await abort(context, error)

    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=request_type.FromString,
        response_serializer=response_type.SerializeToString)
