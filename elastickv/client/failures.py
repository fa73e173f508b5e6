"""What a failed call means, and whether it may be tried again. Pure.

A member answers with the class of its error and with what is known of a write's effect in trailers
(`elastickv-error`, `elastickv-outcome`, `elastickv-leader`). Without them (a lost connection, a
proxy, another implementation) only the status is left, and a write is of unknown outcome
unless that status cannot follow a proposal.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import grpc

from elastickv import errors
from elastickv.errors import (
    REMEDY_FOLLOWS,
    TRAILER_ERROR,
    TRAILER_LEADER,
    TRAILER_OUTCOME,
    ClientClosed,
    DeadlineExceeded,
    ElasticKVError,
    InvalidArgument,
    NotLeader,
    Outcome,
    OutcomeUnknown,
    PeerError,
    Unreachable,
)

CONNECT_TIMEOUT_S = 1.0
FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 0.5
MIN_READ_ATTEMPT_S = 0.25

_READ_FIRST = "read before you decide to write again"


class NotReached(Unreachable):
    """This client could not reach the member, or was not answered; no member said so."""


_CLASSES: Mapping[str, type[ElasticKVError]] = {
    name: value for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, ElasticKVError)}

# For answers without our trailers. These statuses are given before anything is proposed.
_BEFORE_PROPOSAL: Mapping[grpc.StatusCode, type[ElasticKVError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.FAILED_PRECONDITION: errors.OperatorError,
    grpc.StatusCode.UNAUTHENTICATED: errors.OperatorError,
    grpc.StatusCode.PERMISSION_DENIED: errors.OperatorError,
}
# gRPC's own words for a message that a side does not take. No request of that size was served.
_TOO_LARGE = "message larger than max"
# gRPC's own words at the choice of a connection, which is before a call is written. For a call that
# it has written it chooses again only where it knows that the member did not begin it.
_NOT_SENT = "failed to connect to all addresses"
_READ_FAILURES: Mapping[grpc.StatusCode, type[ElasticKVError]] = {
    grpc.StatusCode.UNAVAILABLE: NotReached,
    grpc.StatusCode.CANCELLED: NotReached,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.DATA_LOSS: errors.CorruptionError,
    grpc.StatusCode.ABORTED: errors.ConditionFailed,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that did not end in OK."""

    code: grpc.StatusCode
    detail: str
    address: str
    trailers: Mapping[str, str] = field(default_factory=dict)


def failure_of(error: grpc.aio.AioRpcError, address: str) -> Failure:
    """The parts of gRPC's own exception that matter here."""
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    trailers = {name: value for name, value in metadata if isinstance(value, str)}
    return Failure(error.code(), error.details() or "", address, trailers)


def error_of(failure: Failure, *, write: bool) -> ElasticKVError:
    """The typed error of a failed call."""
    name = failure.trailers.get(TRAILER_ERROR, "")
    outcome = failure.trailers.get(TRAILER_OUTCOME, "")
    message, _, remedy = failure.detail.partition(REMEDY_FOLLOWS)
    if outcome == Outcome.NOT_APPLIED.value or (outcome and not write):
        return _typed(name, failure, message, remedy)
    if outcome:
        return OutcomeUnknown(message, remedy=remedy or _READ_FIRST)
    certain = _BEFORE_PROPOSAL.get(failure.code)
    if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in failure.detail:
        certain = InvalidArgument
    elif failure.code is grpc.StatusCode.UNAVAILABLE and failure.detail.startswith(_NOT_SENT):
        certain = NotReached
    if certain is not None:
        return certain(_told(failure))
    if write:
        return OutcomeUnknown(f"the connection or the time ran out while the write was under way: "
                              f"{_told(failure)}", remedy=_READ_FIRST)
    return _READ_FAILURES.get(failure.code, ElasticKVError)(_told(failure))


def closed_during(*, write: bool) -> ElasticKVError:
    """The error of a call that was under way when its client was closed."""
    if write:
        return OutcomeUnknown("the client was closed while the write was under way",
                              remedy=_READ_FIRST)
    return ClientClosed("the client was closed while the call was under way")


def unparsed(address: str, *, write: bool) -> ElasticKVError:
    """The error of an answer that is no message of its method."""
    told = f"{address}: the answer does not parse"
    return OutcomeUnknown(told, remedy=_READ_FIRST) if write else errors.WireError(told)


def _typed(name: str, failure: Failure, message: str, remedy: str) -> ElasticKVError:
    if name == NotLeader.__name__:
        return NotLeader(message, leader_address=failure.trailers.get(TRAILER_LEADER, ""),
                         remedy=remedy)
    # A class that only newer members know still has its status.
    kind = (_CLASSES.get(name) or _BEFORE_PROPOSAL.get(failure.code)
            or _READ_FAILURES.get(failure.code) or ElasticKVError)
    return kind(message, remedy=remedy)


def _told(failure: Failure) -> str:
    return f"{failure.address}: {failure.code.name}: {failure.detail}"


def may_retry(error: ElasticKVError, *, write: bool) -> bool:
    """True when another attempt can help and cannot do harm: reads, and writes that certainly
    did not happen, where another member or a later moment may give another answer."""
    if not isinstance(error, PeerError):
        return False
    return not write or (error.outcome is Outcome.NOT_APPLIED
                         and not isinstance(error, DeadlineExceeded))


def backoff_s(attempt: int, endpoints: int, draw: float) -> float:
    """Pause before attempt number `attempt` (from 1), with jitter from `draw` in [0, 1).

    The first round over the other endpoints is at once; after each whole round the pause doubles.
    """
    if attempt < endpoints:
        return 0.0
    rounds = min(attempt // max(1, endpoints), 16)
    ceiling_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * float(1 << rounds))
    return ceiling_s * (0.5 + draw / 2)


def connect_timeout_s(remaining_s: float, endpoints: int) -> float:
    """How long connecting to one member may take: it leaves time to try another."""
    return min(remaining_s if endpoints < 2 else remaining_s / 2, CONNECT_TIMEOUT_S)


def attempt_timeout_s(remaining_s: float, endpoints: int, *, write: bool) -> float:
    """How long one attempt may take. A read leaves time to ask another member, so that one frozen
    member does not use up the deadline; a write cannot be asked twice and takes all."""
    if write or endpoints < 2:
        return remaining_s
    return min(remaining_s, max(remaining_s / 2, MIN_READ_ATTEMPT_S))
