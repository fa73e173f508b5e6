"""Errors of calls, and what nodes say in their logs: what faults explain, and what nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastickv import errors
from jepsen.call_errors import UNDISTURBING, check_errors
from jepsen.faults import FAULTS
from jepsen.history import Kind, Operation, Record, pair
from jepsen.node_logs import check_logs, tracebacks
from jepsen.verdict import Validity
from jepsen.workloads import WORKLOADS
from jepsen.workloads.bank import ACCOUNTS


def ended(*names: str) -> list[Operation]:
    """One read for each error."""
    records: list[Record] = []
    for process, name in enumerate(names):
        records.append(Record(Kind.INVOKE, process, len(records), "read", "k"))
        records.append(Record(Kind.FAIL, process, len(records), "read", "k", None, name))
    return pair(records)


@pytest.mark.parametrize(("names", "faults", "validity"), [
    pytest.param(["ConditionFailed", "Unreachable", "NotReached", "NoLeader", "NotLeader",
                  "DeadlineExceeded", "OutcomeUnknown", "Overloaded"], ["kill-one"],
                 Validity.VALID, id="a member that is away"),
    pytest.param(["ConditionFailed"], [], Validity.VALID, id="a condition that did not hold"),
    pytest.param(["OutcomeUnknown"], [], Validity.UNKNOWN, id="an outage for no reason"),
    pytest.param(["NoLeader"], sorted(UNDISTURBING), Validity.UNKNOWN,
                 id="an outage under operators' calls"),
    pytest.param(["NoLeader"], ["rotate-raft", "transfer"], Validity.VALID,
                 id="an outage while the lead moves"),
    pytest.param([], [], Validity.VALID, id="no error"),
    pytest.param([""], [], Validity.VALID, id="a history without names"),
    pytest.param(["DiskFull"], ["kill-one", "disk-full"], Validity.VALID, id="a full disk"),
    pytest.param(["DiskFailed"], ["io-error"], Validity.VALID, id="a disk that fails"),
    pytest.param(["DiskFailed"], ["disk-full"], Validity.UNKNOWN, id="a disk that only was full"),
    pytest.param(["DiskFull"], ["kill-one"], Validity.UNKNOWN, id="a full disk without reason"),
    pytest.param(["IntegrityError"], ["disk-full"], Validity.INVALID, id="a damaged value"),
    pytest.param(["ApplyHalted"], [], Validity.INVALID, id="an entry that cannot be applied"),
    pytest.param(["CorruptionError"], [], Validity.INVALID, id="damage without a class of its own"),
    pytest.param(["ResultTooLarge"], [], Validity.UNKNOWN, id="a request that is wrong"),
    pytest.param(["StorageEnvelopeRequired"], [], Validity.UNKNOWN, id="what callers never see"),
    pytest.param(["ElasticKVError"], [], Validity.UNKNOWN, id="an internal error"),
    pytest.param(["CancelledError"], [], Validity.UNKNOWN, id="the harness's own"),
    pytest.param(["CancelledError", "IntegrityError"], [], Validity.INVALID, id="the worst of two"),
])
def test_errors(names: list[str], faults: list[str], validity: Validity) -> None:
    verdict = check_errors(ended(*names), faults)
    assert verdict.validity is validity
    assert len(verdict.problems) == (validity is not Validity.VALID)


@pytest.mark.parametrize("name", [
    name for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.CorruptionError)])
def test_every_kind_of_damage_is_a_violation(name: str) -> None:
    verdict = check_errors(ended("Unreachable", name, name), list(WORKLOADS))
    assert verdict.validity is Validity.INVALID
    assert f"{name}: 2, the first: process 1 read" in verdict.problems[0]


def test_what_interrupts_nobody_is_a_package() -> None:
    assert set(FAULTS) > UNDISTURBING
    assert all(FAULTS[name].is_brief for name in UNDISTURBING)


def test_an_operation_that_is_still_open_has_no_error() -> None:
    assert check_errors(pair([Record(Kind.INVOKE, 0, 0, "read", "k")]), []).is_valid


def test_a_bank_whose_last_reads_are_damaged() -> None:
    records: list[Record] = []
    opening = {account: [100, 0] for account in ACCOUNTS}
    for number in range(51):
        argument = [ACCOUNTS[0], ACCOUNTS[1], 0]
        records.append(Record(Kind.INVOKE, 0, len(records), "transfer", None, argument))
        records.append(Record(Kind.OK, 0, len(records), "transfer", None, argument))
        if number == 0:
            seen = {**opening, ACCOUNTS[0]: [100, 1], ACCOUNTS[1]: [100, 1]}
            records.append(Record(Kind.INVOKE, 1, len(records), "read"))
            records.append(Record(Kind.OK, 1, len(records), "read", None, seen))
    for _ in range(12):
        records.append(Record(Kind.INVOKE, 1, len(records), "read"))
        records.append(Record(Kind.FAIL, 1, len(records), "read", None, None, "IntegrityError"))
    assert WORKLOADS["bank"]().check(records).validity is Validity.UNKNOWN
    assert check_errors(pair(records), []).validity is Validity.INVALID


IO_ERROR = """{"event": "node stopped"}
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    main()
OSError: [Errno 5] Input/output error
{"event": "node started"}
"""
INDENTED = """  Traceback (most recent call last):
    File "a.py", line 1, in <module>
  KeyError: 3
"""


@pytest.mark.parametrize(("text", "io_errors", "validity"), [
    pytest.param('{"event": "node started"}\n', [], Validity.VALID, id="nothing special"),
    pytest.param("", [], Validity.UNKNOWN, id="nothing at all"),
    pytest.param(IO_ERROR, ["n1"], Validity.INVALID, id="a traceback, though a disk failed"),
    pytest.param(INDENTED, [], Validity.INVALID, id="a traceback in another line"),
    pytest.param('{"event": "unexpected error in a call"}\n', [], Validity.INVALID,
                 id="an error in a call"),
    pytest.param('{"event": "unexpected error in a call"}\n', ["n1"], Validity.VALID,
                 id="an error in a call on a disk that failed"),
])
def test_logs(tmp_path: Path, text: str, io_errors: list[str], validity: Validity) -> None:
    log = tmp_path / "n1.log"
    log.write_text(text)
    verdict = check_logs({"n1": log}, io_errors)
    assert verdict.validity is validity
    assert (len(verdict.problems) == 1) == (validity is not Validity.VALID)


def test_a_traceback_is_named_by_its_error() -> None:
    assert list(tracebacks(IO_ERROR.splitlines())) == [(2, "OSError: [Errno 5] Input/output error")]
    assert list(tracebacks(INDENTED.splitlines())) == [(1, "KeyError: 3")]
    assert list(tracebacks(IO_ERROR.splitlines()[:4])) == [(2, "")]
