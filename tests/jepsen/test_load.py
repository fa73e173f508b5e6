"""A run in which nobody did anything has shown nothing."""

from __future__ import annotations

import pytest

from jepsen.history import Kind, Record, pair
from jepsen.load import check_load
from jepsen.nemesis import Window
from jepsen.verdict import Validity
from jepsen.workloads.register import unread_keys

SECOND = 1_000_000_000


def reads(*seconds: float, kind: Kind = Kind.OK) -> list[Record]:
    """One read at each time, each by a process of its own."""
    return [record for process, at in enumerate(seconds) for record in (
        Record(Kind.INVOKE, process, int(at * SECOND), "read", "k"),
        Record(kind, process, int(at * SECOND) + 1, "read", "k", 1))]


@pytest.mark.parametrize(("records", "rate", "end_s", "doubt"), [
    (reads(1, 2, 3, 4, 5, 6), 10.0, 10.0, ""),
    (reads(1, 2, 3, 4), 10.0, 10.0, "4 operations succeeded"),
    (reads(1, 2, 3, 4, 5, 6, kind=Kind.FAIL), 10.0, 10.0, "0 operations succeeded"),
    (reads(11, 12, 13, 14, 15, 16), 10.0, 10.0, "0 operations succeeded"),
    (reads(1), 0.001, 10.0, ""), ([], 0.001, 10.0, "0 operations succeeded"),
    (reads(1), 10.0, 0.0, "0 operations succeeded")],
    ids=["enough", "too few", "all failed", "all later", "few asked for", "none", "no load"])
def test_load(records: list[Record], rate: float, end_s: float, doubt: str) -> None:
    verdict = check_load(pair(records), [], 0, int(end_s * SECOND), rate)
    assert verdict.validity is (Validity.UNKNOWN if doubt else Validity.VALID)
    assert any(doubt in problem for problem in verdict.problems) or not doubt


@pytest.mark.parametrize(("window", "tested"), [
    (Window("cut", 2 * SECOND, "", 5 * SECOND), True),
    (Window("cut", 7 * SECOND, "", 9 * SECOND), False),
    (Window("cut", 7 * SECOND, "", int(7.2 * SECOND)), True),
    (Window("rotate", 7 * SECOND, "", 9 * SECOND, is_brief=True), True)],
    ids=["with clients", "without", "too short to tell", "an operator's call"])
def test_a_fault_that_no_client_met(window: Window, tested: bool) -> None:
    verdict = check_load(pair(reads(1, 3, 6)), [window], 0, 10 * SECOND, 1.0)
    assert verdict.is_valid is tested


def test_what_was_written_last_must_have_been_read() -> None:
    history = [
        Record(Kind.INVOKE, 0, 1, "write", "a", 1), Record(Kind.OK, 0, 2, "write", "a", 1),
        Record(Kind.INVOKE, 0, 3, "read", "a"), Record(Kind.OK, 0, 4, "read", "a", 1),
        Record(Kind.INVOKE, 0, 5, "cas", "b", [1, 2]), Record(Kind.OK, 0, 6, "cas", "b"),
        Record(Kind.INVOKE, 1, 7, "read", "b"), Record(Kind.FAIL, 1, 8, "read", "b"),
        Record(Kind.INVOKE, 1, 9, "read", "c"), Record(Kind.INVOKE, 0, 10, "delete", "c"),
        Record(Kind.OK, 0, 11, "delete", "c"), Record(Kind.OK, 1, 12, "read", "c", None)]
    assert unread_keys(pair(history)) == ["b", "c"]
