"""Records, pairing, validation and the JSON-lines form."""

from __future__ import annotations

from pathlib import Path

import pytest

from jepsen.history import (
    HistoryError,
    Kind,
    Record,
    Recorder,
    normalise,
    open_history,
    pair,
    parse_line,
    read_history,
    validate,
    write_history,
)


def record(kind: str, process: int, time_ns: int, f: str = "write", key: str | None = "k",
           value: object = None) -> Record:
    return Record(Kind(kind), process, time_ns, f, key, value)


def test_pairs_each_invocation_with_its_completion() -> None:
    operations = pair([record("invoke", 0, 1, value=1), record("invoke", 1, 2, "read"),
                       record("ok", 1, 3, "read", value=[1, [2]]), record("info", 0, 4)])
    write, read = operations
    assert (write.kind, write.invoked, write.completed, write.argument) == (Kind.INFO, 0, None, 1)
    assert (read.kind, read.invoked, read.completed, read.result) == (Kind.OK, 1, 2, (1, (2,)))
    assert write.completed_ns == 4


def test_an_invocation_without_completion_stays_open() -> None:
    (operation,) = pair([record("invoke", 0, 1)])
    assert operation.kind is Kind.INFO
    assert operation.completed is None


@pytest.mark.parametrize(("records", "message"), [
    ([record("ok", 0, 1)], "without an invocation"),
    ([record("invoke", 0, 1), record("invoke", 0, 2)], "already busy"),
    ([record("invoke", 0, 2), record("ok", 0, 1)], "time goes back"),
    ([record("invoke", 0, 1), record("ok", 0, 2, f="read")], "completes write"),
    ([record("invoke", 0, 1), record("ok", 0, 2, key="other")], "completes write"),
    ([record("invoke", 0, 1), record("ok", 0, 2), record("ok", 0, 3)], "without an invocation"),
], ids=["orphan", "busy", "time", "function", "key", "twice"])
def test_contradictions_are_refused(records: list[Record], message: str) -> None:
    with pytest.raises(HistoryError, match=message):
        validate(records)


def test_a_history_survives_its_file(tmp_path: Path) -> None:
    now = iter(range(10))
    with open_history(tmp_path / "live.jsonl") as file:
        recorder = Recorder(lambda: next(now), file)
        recorder.add(Kind.INVOKE, 0, "cas", "k", [None, "a"])
        recorder.add(Kind.FAIL, 0, "cas", "k", [None, "a"], error="ConditionFailed")
        # A run that is killed closes nothing.
        assert read_history(tmp_path / "live.jsonl") == recorder.records
    write_history(tmp_path / "whole.jsonl", recorder.records)
    assert read_history(tmp_path / "whole.jsonl") == recorder.records


TORN = '{"kind":"ok","process":0,"ti'


@pytest.mark.parametrize(("tail", "told"), [("", []), (TORN, [TORN])], ids=["whole", "torn"])
def test_a_last_line_that_is_torn_is_left_out(tmp_path: Path, tail: str, told: list[str]) -> None:
    one = record("invoke", 0, 1)
    path = tmp_path / "history.jsonl"
    path.write_text(one.to_json() + "\n" + tail)
    said: list[str] = []
    assert read_history(path, said.append) == [one]
    assert said == told


@pytest.mark.parametrize("text", [TORN + "\n", TORN + "\n{one}\n", "{one}\n" + TORN + "\n"],
                         ids=["alone", "first", "last, with its end"])
def test_any_other_damaged_line_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(text.replace("{one}", record("invoke", 0, 1).to_json()))
    with pytest.raises(HistoryError):
        read_history(path, lambda line: None)


def test_a_torn_line_that_nobody_is_told_of_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(TORN)
    with pytest.raises(HistoryError):
        read_history(path)


@pytest.mark.parametrize("line", ["", "{}", "[]", "not json", '{"kind": "maybe"}',
                                  '{"kind": "ok", "process": "x", "time_ns": 1, "f": "read"}',
                                  '{"kind": "ok", "process": 1.5, "time_ns": 1, "f": "read"}',
                                  '{"kind": "ok", "process": 1, "time_ns": 1e999, "f": "read"}',
                                  '{"kind": "ok", "process": 1, "time_ns": 1, "f": "read", '
                                  '"key": true}',
                                  '{"kind": "ok", "process": 1, "time_ns": 1, "f": "read", '
                                  '"value": ' + 100_000 * "[" + 100_000 * "]" + "}"])
def test_a_damaged_line_is_refused(line: str) -> None:
    with pytest.raises(HistoryError):
        parse_line(line)


def test_an_error_may_be_null() -> None:
    line = '{"kind": "ok", "process": 1, "time_ns": 1, "f": "read", "error": null}'
    assert parse_line(line).error == ""


def test_normalise_makes_values_comparable() -> None:
    assert normalise([1, [2, {"b": [3], "a": None}]]) == (1, (2, (("a", None), ("b", (3,)))))
    assert normalise([True, False]) == normalise([True, False])
    assert normalise([True]) not in {normalise([1]), normalise([False]), normalise(["true"])}
    assert normalise([False]) != normalise([0])
    assert repr(normalise([True, False])) == "(true, false)"
