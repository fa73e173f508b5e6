"""elastickv.server.errors: every error class has one status, and says only what it may."""

from __future__ import annotations

import inspect
import io
import json

import grpc
import pytest

from elastickv import errors, logs
from elastickv.errors import (
    TRAILER_ERROR,
    TRAILER_LEADER,
    TRAILER_OUTCOME,
    ElasticKVError,
    InvalidArgument,
    NotLeader,
    Outcome,
    OutcomeUnknown,
)
from elastickv.server.errors import refusal_of, status_of
from elastickv.server.grpc_message import fitted

CLASSES = [value for value in vars(errors).values()
           if inspect.isclass(value) and issubclass(value, ElasticKVError)]


def an(error_class: type[ElasticKVError]) -> ElasticKVError:
    return error_class("message", remedy="do this") if error_class is not NotLeader else NotLeader()


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_every_error_class(error_class: type[ElasticKVError]) -> None:
    error = an(error_class)
    status = status_of(error)
    assert status.code is grpc.StatusCode[error_class.grpc_status]
    assert status.detail == str(error)
    assert dict(status.trailers) == {TRAILER_ERROR: error_class.__name__,
                                     TRAILER_OUTCOME: error_class.outcome.value}


@pytest.mark.parametrize(("error", "code"), [
    (errors.InvalidArgument("m"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ConditionFailed("m"), grpc.StatusCode.ABORTED),
    (errors.GateOff("m"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotBootstrapped("m"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.EncryptionConflict("m"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NoLeader("m"), grpc.StatusCode.UNAVAILABLE),
    (errors.Overloaded("m"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DiskFull("m"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded("m"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.OutcomeUnknown("m"), grpc.StatusCode.UNKNOWN),
    (errors.IntegrityError("m"), grpc.StatusCode.DATA_LOSS),
    (errors.Unimplemented("m"), grpc.StatusCode.UNIMPLEMENTED),
])
def test_what_the_issue_names(error: ElasticKVError, code: grpc.StatusCode) -> None:
    assert status_of(error).code is code


def test_only_an_unknown_outcome_is_told_as_unknown() -> None:
    told = {c for c in CLASSES
            if dict(status_of(an(c)).trailers)[TRAILER_OUTCOME] == Outcome.UNKNOWN.value}
    assert told == {OutcomeUnknown}


@pytest.mark.parametrize(("address", "told"), [
    ("127.0.0.1:5", "127.0.0.1:5"), ("", None), ("bücher:5", None)])
def test_the_leader_is_told_where_it_is_known(address: str, told: str | None) -> None:
    error = NotLeader(leader_id="n2", leader_address=address)
    assert dict(status_of(error).trailers).get(TRAILER_LEADER) == told


def test_a_long_detail_is_cut_to_what_fits_into_headers() -> None:
    assert status_of(InvalidArgument("€" * 2000)).detail == fitted("€" * 2000)


def test_a_defect_tells_the_caller_nothing_and_the_log_no_value() -> None:
    stream = io.StringIO()
    logs.configure("debug", stream=stream)
    try:
        raise KeyError(b"secret value")
    except KeyError as error:
        status = refusal_of(error, "/RawKV/RawPut")
    assert status.code is grpc.StatusCode.INTERNAL
    assert dict(status.trailers) == {TRAILER_OUTCOME: Outcome.UNKNOWN.value}
    assert "secret" not in status.detail
    assert "KeyError" not in status.detail
    line = json.loads(stream.getvalue())
    assert "secret" not in stream.getvalue()
    assert (line["error_type"], line["method"]) == ("KeyError", "/RawKV/RawPut")
    assert "test_a_defect" in line["source"][0]


def test_a_typed_error_is_not_logged() -> None:
    stream = io.StringIO()
    logs.configure("debug", stream=stream)
    refusal_of(InvalidArgument("key is empty"), "/RawKV/RawPut")
    assert stream.getvalue() == ""
