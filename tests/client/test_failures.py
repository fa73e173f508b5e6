"""elastickv.client.failures: what a failed call means, and whether it may be tried again."""

from __future__ import annotations

import inspect

import grpc
import pytest

from elastickv import errors
from elastickv.client.failures import (
    CONNECT_TIMEOUT_S,
    MAX_BACKOFF_S,
    MIN_READ_ATTEMPT_S,
    Failure,
    NotReached,
    attempt_timeout_s,
    backoff_s,
    connect_timeout_s,
    error_of,
    may_retry,
)
from elastickv.errors import (
    ConditionFailed,
    CorruptionError,
    DeadlineExceeded,
    ElasticKVError,
    GateOff,
    InvalidArgument,
    NoLeader,
    NotLeader,
    OperatorError,
    Outcome,
    OutcomeUnknown,
    Overloaded,
    Unimplemented,
    Unreachable,
)
from elastickv.server.errors import status_of

Code = grpc.StatusCode
CLASSES = [value for value in vars(errors).values()
           if inspect.isclass(value) and issubclass(value, ElasticKVError)]


def told(error: ElasticKVError) -> Failure:
    """What a client sees when a server raises `error`."""
    status = status_of(error)
    return Failure(status.code, status.detail, "h:1", dict(status.trailers))


def bare(code: grpc.StatusCode) -> Failure:
    return Failure(code, "detail", "h:1")


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
@pytest.mark.parametrize("write", [True, False])
def test_every_error_survives_the_wire(error_class: type[ElasticKVError], write: bool) -> None:
    error = error_class("message", remedy="do this")
    rebuilt = error_of(told(error), write=write)
    assert type(rebuilt) is error_class
    assert str(rebuilt) == str(error)
    assert rebuilt.message == "message"


def test_a_leader_hint_survives_the_wire() -> None:
    error = error_of(told(NotLeader(leader_id="n2", leader_address="10.0.0.2:5")), write=True)
    assert isinstance(error, NotLeader)
    assert error.leader_address == "10.0.0.2:5"


def test_a_class_that_only_a_newer_member_knows_keeps_its_meaning() -> None:
    trailers = {errors.TRAILER_ERROR: "NewKind", errors.TRAILER_OUTCOME: "not-applied"}
    newer = Failure(Code.INVALID_ARGUMENT, "m", "h:1", trailers)
    assert type(error_of(newer, write=True)) is InvalidArgument
    unheard_of = Failure(Code.INTERNAL, "m", "h:1", trailers)
    assert error_of(unheard_of, write=True).outcome is Outcome.NOT_APPLIED


def test_a_defect_in_a_write_is_an_unknown_outcome() -> None:
    failure = Failure(Code.INTERNAL, "internal error", "h:1",
                      {errors.TRAILER_OUTCOME: "unknown"})
    assert type(error_of(failure, write=True)) is OutcomeUnknown
    assert type(error_of(failure, write=False)) is ElasticKVError


WITHOUT_TRAILERS: dict[grpc.StatusCode, tuple[type[ElasticKVError], type[ElasticKVError]]] = {
    # status: (of a write, of a read)
    Code.CANCELLED: (OutcomeUnknown, NotReached),
    Code.UNKNOWN: (OutcomeUnknown, ElasticKVError),
    Code.INVALID_ARGUMENT: (InvalidArgument, InvalidArgument),
    Code.DEADLINE_EXCEEDED: (OutcomeUnknown, DeadlineExceeded),
    Code.NOT_FOUND: (OutcomeUnknown, ElasticKVError),
    Code.ALREADY_EXISTS: (OutcomeUnknown, ElasticKVError),
    Code.PERMISSION_DENIED: (OperatorError, OperatorError),
    Code.UNAUTHENTICATED: (OperatorError, OperatorError),
    Code.RESOURCE_EXHAUSTED: (OutcomeUnknown, Overloaded),
    Code.FAILED_PRECONDITION: (OperatorError, OperatorError),
    Code.ABORTED: (OutcomeUnknown, ConditionFailed),
    Code.OUT_OF_RANGE: (InvalidArgument, InvalidArgument),
    Code.UNIMPLEMENTED: (Unimplemented, Unimplemented),
    Code.INTERNAL: (OutcomeUnknown, ElasticKVError),
    Code.UNAVAILABLE: (OutcomeUnknown, NotReached),
    Code.DATA_LOSS: (OutcomeUnknown, CorruptionError),
}


def test_the_table_covers_every_status() -> None:
    assert set(WITHOUT_TRAILERS) == set(Code) - {Code.OK}


@pytest.mark.parametrize("code", WITHOUT_TRAILERS, ids=lambda code: code.name)
def test_a_status_without_trailers(code: grpc.StatusCode) -> None:
    of_write, of_read = WITHOUT_TRAILERS[code]
    assert type(error_of(bare(code), write=True)) is of_write
    assert type(error_of(bare(code), write=False)) is of_read
    for write in (True, False):
        assert "h:1" in str(error_of(bare(code), write=write))


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("detail", [
    "CLIENT: Sent message larger than max (9 vs. 8)",
    "SERVER: Received message larger than max (9 vs. 8)",
    "message larger than max (9 vs. 8)",
])
def test_a_message_that_the_transport_does_not_take_is_the_callers_mistake(
        detail: str, write: bool) -> None:
    failure = Failure(Code.RESOURCE_EXHAUSTED, detail, "h:1")
    assert type(error_of(failure, write=write)) is InvalidArgument


NO_CONNECTION = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: refused"
NOT_SENT: dict[str, tuple[Failure, type[ElasticKVError]]] = {
    "no connection": (Failure(Code.UNAVAILABLE, NO_CONNECTION, "h:1"), NotReached),
    "said of another's connection": (
        Failure(Code.UNAVAILABLE, f"upstream: {NO_CONNECTION}", "h:1"), OutcomeUnknown),
    "with another status": (Failure(Code.UNKNOWN, NO_CONNECTION, "h:1"), OutcomeUnknown),
    "the member says otherwise": (
        Failure(Code.UNAVAILABLE, NO_CONNECTION, "h:1", {errors.TRAILER_OUTCOME: "unknown"}),
        OutcomeUnknown),
    "lost afterwards": (Failure(Code.UNAVAILABLE, "Socket closed", "h:1"), OutcomeUnknown),
}


@pytest.mark.parametrize("name", NOT_SENT)
def test_a_write_for_which_no_connection_was_made_is_certain(name: str) -> None:
    failure, kind = NOT_SENT[name]
    error = error_of(failure, write=True)
    assert type(error) is kind
    assert may_retry(error, write=True) is (kind is NotReached)


@pytest.mark.parametrize(("error", "read", "write"), [
    (NoLeader("m"), True, True),
    (NotLeader("m"), True, True),
    (Unreachable("m"), True, True),
    (Overloaded("m"), True, True),
    (DeadlineExceeded("m"), True, False),
    (OutcomeUnknown("m"), True, False),
    (InvalidArgument("m"), False, False),
    (ConditionFailed("m"), False, False),
    (GateOff("m"), False, False),
    (CorruptionError("m"), False, False),
    (ElasticKVError("m"), False, False),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")
def test_what_may_be_retried(error: ElasticKVError, read: bool, write: bool) -> None:
    assert (may_retry(error, write=False), may_retry(error, write=True)) == (read, write)


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_a_write_of_unknown_outcome_is_never_retried(error_class: type[ElasticKVError]) -> None:
    error = error_class("m")
    if error.outcome is Outcome.UNKNOWN:
        assert not may_retry(error, write=True)


def test_the_first_round_over_the_members_does_not_wait() -> None:
    assert [backoff_s(attempt, 3, 0.0) for attempt in (1, 2)] == [0.0, 0.0]
    assert backoff_s(3, 3, 0.0) > 0


@pytest.mark.parametrize("endpoints", [1, 3])
def test_pauses_grow_to_a_ceiling(endpoints: int) -> None:
    longest = [backoff_s(attempt * endpoints, endpoints, 0.999_999) for attempt in range(1, 40)]
    assert longest == sorted(longest)
    assert longest[-1] == pytest.approx(MAX_BACKOFF_S, rel=1e-3)
    assert backoff_s(10**9, endpoints, 0.0) == pytest.approx(MAX_BACKOFF_S / 2)


@pytest.mark.parametrize(("remaining_s", "endpoints", "write", "given_s"), [
    (5.0, 3, True, 5.0),
    (5.0, 1, False, 5.0),
    (5.0, 3, False, 2.5),
    (0.3, 3, False, MIN_READ_ATTEMPT_S),
    (0.1, 3, False, 0.1),
    (-1.0, 3, False, -1.0),
])
def test_how_long_an_attempt_may_take(remaining_s: float, endpoints: int, write: bool,
                                      given_s: float) -> None:
    assert attempt_timeout_s(remaining_s, endpoints, write=write) == given_s


@pytest.mark.parametrize(("remaining_s", "endpoints", "given_s"), [
    (5.0, 3, CONNECT_TIMEOUT_S),
    (5.0, 1, CONNECT_TIMEOUT_S),
    (0.6, 1, 0.6),
    (0.6, 2, 0.3),
    (0.0, 2, 0.0),
])
def test_how_long_connecting_may_take(remaining_s: float, endpoints: int, given_s: float) -> None:
    assert connect_timeout_s(remaining_s, endpoints) == given_s
