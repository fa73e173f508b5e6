"""elastickv.logs: one line per event, and no bytes in any of them."""

from __future__ import annotations

import dataclasses
import enum
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv import logs

SECRET = b"s3cret-value"


class Kind(enum.Enum):
    PUT = 0


class Holder(NamedTuple):
    key: bytes


@dataclasses.dataclass
class Opaque:
    value: bytes


@pytest.fixture
def lines() -> io.StringIO:
    stream = io.StringIO()
    logs.configure("debug", "json", stream=stream)
    return stream


@pytest.mark.parametrize("value", [
    SECRET, bytearray(SECRET), memoryview(SECRET), [SECRET], (SECRET,), {SECRET: 1}, {"k": SECRET},
    {"a": {"b": [SECRET]}}, {SECRET}, Holder(SECRET), Opaque(SECRET), [Opaque(SECRET)],
], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_bytes_never_reach_a_line(value: object, log_format: str) -> None:
    stream = io.StringIO()
    logs.configure("debug", log_format, stream=stream)
    logs.get_logger("test").info("event", value=value)
    assert "event" in stream.getvalue()
    assert "s3cret" not in stream.getvalue()
    assert SECRET.hex() not in stream.getvalue()


@pytest.mark.parametrize(("value", "shown"), [
    (SECRET, "<12 bytes>"), (7, 7), (None, None), (True, True), (1.5, 1.5), ("text", "text"),
    (Path("/a"), "/a"), (Kind.PUT, "PUT"), (ValueError("why"), "ValueError: why"),
    (Opaque(SECRET), "<Opaque>"), (Holder(SECRET), ["<12 bytes>"])])
def test_redact(value: object, shown: object) -> None:
    assert logs.redact(value) == shown


@given(st.recursive(st.binary() | st.text() | st.integers() | st.none(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_whatever_is_logged_becomes_plain_json(value: object) -> None:
    json.dumps(logs.redact(value))


def test_a_json_line_holds_the_fields(lines: io.StringIO) -> None:
    logs.get_logger("elastickv.x").warning("disk is slow", milliseconds=12)
    event = json.loads(lines.getvalue())
    assert event.pop("timestamp").endswith("Z")
    assert event == {"module": "elastickv.x", "event": "disk is slow", "level": "warning",
                     "milliseconds": 12}


def test_a_logger_made_before_the_configuration_follows_it() -> None:
    early = logs.get_logger("early")
    for log_format in ("text", "json"):
        stream = io.StringIO()
        logs.configure("info", log_format, stream=stream)
        early.info("event")
        early.debug("hidden")
        assert stream.getvalue().count("\n") == 1
        assert stream.getvalue().startswith("{") is (log_format == "json")


def test_a_newline_cannot_forge_a_second_event(lines: io.StringIO) -> None:
    logs.get_logger("x").info("event", text='a\n{"event": "forged"}')
    assert len(lines.getvalue().splitlines()) == 1


def test_exceptions_show_where_and_what_but_no_locals(lines: io.StringIO) -> None:
    def fail() -> None:
        local = SECRET.decode()
        raise ValueError("it broke") if local else AssertionError

    try:
        fail()
    except ValueError:
        logs.get_logger("x").exception("failed")
    event = json.loads(lines.getvalue())
    assert event["error"] == "ValueError: it broke"
    assert event["traceback"][-1].endswith("in fail")
    assert "s3cret" not in lines.getvalue()


@pytest.mark.parametrize(("level", "shown"), [
    ("debug", ["debug", "info", "warning", "error"]), ("info", ["info", "warning", "error"]),
    ("warning", ["warning", "error"]), ("error", ["error"])])
def test_levels(level: str, shown: list[str]) -> None:
    stream = io.StringIO()
    logs.configure(level, "json", stream=stream)
    log = logs.get_logger("x")
    for name in logs.LEVELS:
        getattr(log, name)("event")
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == shown


def test_structlog_is_loaded_without_rich() -> None:
    code = ("import sys, elastickv.logs; print('rich' in sys.modules); "
            "import rich; print(rich is not None)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
