"""The one place where errors become gRPC statuses.

A status carries the error's message and remedy as its detail and three trailers, so that a client
can rebuild the typed error:

    elastickv-error     class name in `elastickv.errors`
    elastickv-outcome   "not-applied" or "unknown": what is known of a write that failed
    elastickv-leader    client address of the leader, where it is known

The table from error to status is the class attribute `grpc_status` of each error.
"""

from __future__ import annotations

import traceback
from typing import Final, NamedTuple

import grpc

from elastickv import logs
from elastickv.errors import (
    TRAILER_ERROR,
    TRAILER_LEADER,
    TRAILER_OUTCOME,
    ElasticKVError,
    NotLeader,
    Outcome,
)
from elastickv.server.grpc_message import fitted

log = logs.get_logger(__name__)


class Status(NamedTuple):
    """What goes over the wire for an error. Trailers are ASCII."""

    code: grpc.StatusCode
    detail: str
    trailers: tuple[tuple[str, str], ...]


CANCELLED: Final = Status(grpc.StatusCode.CANCELLED, "the call was cancelled on this node",
                          ((TRAILER_OUTCOME, Outcome.UNKNOWN.value),))
"""For a call whose work was cancelled below, as while the node stops."""


def status_of(error: BaseException) -> Status:
    """The gRPC status of an error. An unexpected one is INTERNAL and tells the caller nothing of
    what was in memory; whether a write took effect is then unknown."""
    if not isinstance(error, ElasticKVError):
        return Status(grpc.StatusCode.INTERNAL, "internal error; see the node's log",
                      ((TRAILER_OUTCOME, Outcome.UNKNOWN.value),))
    trailers = [(TRAILER_ERROR, type(error).__name__), (TRAILER_OUTCOME, error.outcome.value)]
    if isinstance(error, NotLeader) and error.leader_address.isascii() and error.leader_address:
        trailers.append((TRAILER_LEADER, error.leader_address))
    return Status(grpc.StatusCode[error.grpc_status], fitted(str(error)), tuple(trailers))


def refusal_of(error: BaseException, method: str) -> Status:
    """`status_of`, and a log line where the error is a defect.

    The line has the type and the source lines only: the message of an arbitrary exception can
    hold a key or a value.
    """
    if not isinstance(error, ElasticKVError):
        log.error("unexpected error in a call", method=method, error_type=type(error).__name__,
                  source=[f"{frame.filename}:{frame.lineno} in {frame.name}"
                          for frame in traceback.extract_tb(error.__traceback__)])
    return status_of(error)
