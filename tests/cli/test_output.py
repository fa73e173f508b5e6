"""elastickv.cli.output: JSON for programs, tables for people, no raw control characters."""

from __future__ import annotations

import base64
import enum
import json
import sys
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.cli import output


class Colour(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: bytes


@pytest.mark.parametrize(("value", "expected"), [
    (b"\x00\xff", "AP8="), (b"", ""), (Colour.RED, "red"), (Point(1, b"a"), {"x": 1, "y": "YQ=="}),
    ({1: [b"a", None]}, {"1": ["YQ==", None]}), (2 ** 64 - 1, 2 ** 64 - 1), (True, True),
    ((1, 2), [1, 2]),
])
def test_json(value: object, expected: object) -> None:
    assert json.loads(output.to_json(value)) == expected


@pytest.mark.parametrize(("content", "text"), [
    (b"hello", "hello"), (b"", ""), (b"\x00", None), (b"\xff", None), (b"a\nb", None)])
def test_text_of(content: bytes, text: str | None) -> None:
    assert output.text_of(content) == text


@given(st.binary(max_size=30))
def test_bytes_are_shown_without_loss_or_control_characters(value: bytes) -> None:
    shown = output.display_bytes(value)
    assert shown.isprintable()
    if shown.encode() != value:
        assert base64.b64decode(shown.removeprefix("base64:")) == value


def test_text_that_looks_like_base64_is_not_ambiguous() -> None:
    assert output.display_bytes(b"base64:AA==") != "base64:AA=="


@pytest.mark.parametrize(("value", "expected"), [
    (None, "-"), (True, "yes"), (False, "no"), ([], "-"), ([1, b"a"], "1, a"), (Colour.RED, "red"),
    (b"k\n", "base64:awo="), ("text", "text")])
def test_cells(value: object, expected: str) -> None:
    assert output.cell(value) == expected


def test_a_piped_table_is_tab_separated(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([{"id": "n1", "note": "two\nlines"}, {"id": "n2"}])
    assert capsys.readouterr().out == "id\tnote\nn1\ttwo lines\nn2\t-\n"


def test_a_piped_table_changes_no_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    """What was printed can be given back."""
    output.print_table([{"key": " lead", "value": "x  y "}])
    assert capsys.readouterr().out == "key\tvalue\n lead\tx  y \n"


def test_columns_select_and_order(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([{"a": 1, "b": 2, "c": 3}], ["c", "a"])
    assert capsys.readouterr().out == "c\ta\n3\t1\n"


def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("TERM", "xterm")


def test_a_table_that_fits_is_boxed(monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    narrow_terminal(monkeypatch)
    output.print_table([{"id": "n1", "note": "x" * 17}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0]) == 26
    assert any("n1" in line and "x" * 17 in line for line in lines)


def test_a_table_that_is_too_wide_becomes_records(monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    narrow_terminal(monkeypatch)
    output.print_table([{"id": "n1", "log_end": "x" * 30}, {"id": "n2"}])
    assert capsys.readouterr().out == \
        f"id       n1\nlog end  {'x' * 30}\n\nid       n2\nlog end  -\n"


def test_fields_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_fields({"id": "n1", "commit_index": 7})
    assert capsys.readouterr().out == "id            n1\ncommit index  7\n"


@pytest.mark.parametrize(("document", "expected"), [
    ([{"a": 1}], "a\n1\n"), ({"a": 1}, "a  1\n"), (b"value", "value\n"), (7, "7\n")])
def test_emit_by_shape(document: object, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.emit(document, output.TABLE)
    assert capsys.readouterr().out == expected


def test_emit_json_goes_to_stdout_and_progress_to_stderr(
        capsys: pytest.CaptureFixture[str]) -> None:
    output.progress("working")
    output.emit({"a": b"x"}, output.JSON)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": "eA=="}
    assert captured.err == "working\n"
