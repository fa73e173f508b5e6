"""elastickv.errors: every class has a valid gRPC status, a documented exit code and a branch."""

from __future__ import annotations

import inspect

import grpc
import pytest

from elastickv import errors
from elastickv.errors import ElasticKVError, ExitCode, Outcome

BRANCHES = (errors.CallerError, errors.PeerError, errors.OperatorError, errors.CorruptionError)
CLASSES = [value for value in vars(errors).values()
           if inspect.isclass(value) and issubclass(value, ElasticKVError)]


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_class(error_class: type[ElasticKVError]) -> None:
    assert error_class.grpc_status in grpc.StatusCode.__members__
    assert error_class.grpc_status != "OK"
    assert error_class.exit_code in ExitCode
    assert error_class.exit_code is not ExitCode.OK
    assert error_class.__doc__
    if error_class is not ElasticKVError:
        assert sum(issubclass(error_class, branch) for branch in BRANCHES) == 1


def test_only_an_unknown_outcome_may_have_had_an_effect() -> None:
    assert [c for c in CLASSES if c.outcome is Outcome.UNKNOWN] == [errors.OutcomeUnknown]


def test_an_unknown_outcome_shares_its_status_with_nothing_else() -> None:
    status = errors.OutcomeUnknown.grpc_status
    assert [c for c in CLASSES if c.grpc_status == status] == [errors.OutcomeUnknown]


def test_damaged_bytes_are_data_loss() -> None:
    damaged = [c for c in CLASSES if issubclass(c, errors.CorruptionError)
               and not issubclass(c, errors.ApplyHalted)]
    assert {c.grpc_status for c in damaged} == {"DATA_LOSS"}


def test_everything_that_halts_apply_exits_with_one_code() -> None:
    halting = [c for c in CLASSES if issubclass(c, errors.ApplyHalted)]
    assert {c.exit_code for c in halting} == {ExitCode.APPLY_HALTED}


def test_exit_codes_are_distinct_and_fit_a_process_status() -> None:
    codes = [int(code) for code in ExitCode.__members__.values()]
    assert len(codes) == len(set(codes))
    assert all(0 <= code < 126 for code in codes)


@pytest.mark.parametrize(("error", "text"), [
    (errors.InvalidArgument("key is empty"), "key is empty"),
    (errors.DiskFull("no space", remedy="free some"), "no space. Remedy: free some"),
    (errors.NotLeader(), "this node is not the leader. Remedy: retry shortly"),
    (errors.NotLeader("m", remedy="add it again"), "m. Remedy: add it again"),
    (errors.NotLeader("m", remedy=""), "m"),
    (errors.NotLeader(leader_id="n2", leader_address="h:1"),
     "this node is not the leader. Remedy: retry on the leader"),
])
def test_text(error: ElasticKVError, text: str) -> None:
    assert str(error) == text


def test_not_leader_names_the_leader() -> None:
    error = errors.NotLeader(leader_id="n2", leader_address="127.0.0.1:50052")
    assert (error.leader_id, error.leader_address) == ("n2", "127.0.0.1:50052")
