"""elastickv.server.errors: every error class has one status, and says only what it may."""

from __future__ import annotations

import inspect
import io
import json
import operator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from elastickv.server.errors import (
    DEFAULT_TIMEOUT_S,
    MAX_DETAIL_BYTES,
    refusal_of,
    status_of,
    time_for_call,
)
from elastickv.server.h2.wire import percent_encoded

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


@given(st.text() | st.text(min_size=MAX_DETAIL_BYTES // 12)
       | st.text("aé€𝄞%\ud800\n", min_size=MAX_DETAIL_BYTES // 12)
       | st.builds(operator.mul, st.text(min_size=1, max_size=10), st.integers(0, 5_000)))
def test_a_detail_fits_into_headers(message: str) -> None:
    detail = status_of(InvalidArgument(message)).detail
    assert len(percent_encoded(detail)) <= MAX_DETAIL_BYTES
    whole = message.encode("utf-8", "replace").decode()
    if len(percent_encoded(whole)) <= MAX_DETAIL_BYTES:
        assert detail == whole
    else:
        assert whole.startswith(detail.removesuffix("..."))
        assert detail.endswith("...")
        assert len(percent_encoded(detail)) > MAX_DETAIL_BYTES - 12


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


@pytest.mark.parametrize(("remaining_s", "given_s"), [
    (None, DEFAULT_TIMEOUT_S), (10.0, 9.9), (1.0, 0.9), (0.1, 0.09), (0.0, 0.0)])
def test_a_call_leaves_time_for_its_error(remaining_s: float | None, given_s: float) -> None:
    assert time_for_call(remaining_s) == pytest.approx(given_s)
