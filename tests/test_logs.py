"""elastickv.logs: one line per event, and no bytes in any of them."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

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


@pytest.fixture
def restored() -> Iterator[None]:
    """Logging goes to stderr again after a test that sent it elsewhere."""
    yield
    logs.configure()


def broken_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk() -> TextIO:
    return open("/dev/full", "w")


def closed_file() -> TextIO:
    with open(os.devnull, "w") as stream:
        return stream


UNWRITABLE = [broken_pipe, full_disk, closed_file]


@pytest.mark.parametrize("make", UNWRITABLE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_line_that_cannot_be_written_is_nobodys_failure(
        make: Callable[[], TextIO], log_format: str, restored: None) -> None:
    stream = make()
    logs.configure("debug", log_format, stream=stream)
    logs.get_logger("x").error("event", value=1)
    logging.getLogger("library").error("event")
    with contextlib.suppress(OSError):
        stream.close()


def test_a_process_without_stderr_logs_nothing(monkeypatch: pytest.MonkeyPatch,
                                               restored: None) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    logs.configure()
    logs.get_logger("x").error("event")
    monkeypatch.undo()


class FailingStream(io.StringIO):
    """Refuses lines while `error` is set."""

    error: Exception | None = None

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   BrokenPipeError(), ValueError("I/O operation on closed file")],
                         ids=lambda error: type(error).__name__)
def test_dropped_lines_are_counted_once_lines_can_be_written(error: Exception,
                                                             restored: None) -> None:
    stream = FailingStream()
    logs.configure("info", "json", stream=stream)
    log = logs.get_logger("x")
    stream.error = error
    for _ in range(3):
        log.info("lost")
    stream.error = None
    log.info("first")
    log.info("second")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["log lines were dropped", "first", "second"]
    assert (events[0]["lines"], events[0]["level"]) == (3, "warning")


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path, restored: None) -> None:
    """RLIMIT_FSIZE stands in for a disk that fills up in the middle of a line."""
    path = tmp_path / "log"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with path.open("w") as stream:
        logs.configure("info", "json", stream=stream)
        log = logs.get_logger("x")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, old[1]))
            log.info("cut")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        log.info("whole")
    cut, *rest = path.read_text().splitlines()
    assert len(cut) == 20
    assert [json.loads(line)["event"] for line in rest] == ["log lines were dropped", "whole"]


@pytest.fixture
def pipe(restored: None) -> Iterator[tuple[int, TextIO]]:
    """A pipe of two pages with both ends open: what reads, and what logs go to."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
    with os.fdopen(writer, "w") as stream:
        logs.configure("info", "json", stream=stream)
        yield reader, stream
        with contextlib.suppress(OSError):
            os.close(reader)


def events_in(content: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in content.splitlines()]


def test_a_reader_that_does_not_read_holds_up_nobody(pipe: tuple[int, TextIO]) -> None:
    reader, _ = pipe
    log = logs.get_logger("x")
    for number in range(200):
        log.info("event", number=number, text="x" * 1000)
    read = events_in(os.read(reader, 1 << 20))
    assert [event["number"] for event in read] == [*range(len(read))]
    assert 0 < len(read) < 10
    log.info("first")
    dropped, first = events_in(os.read(reader, 1 << 20))
    assert (dropped["event"], dropped["lines"]) == ("log lines were dropped", 200 - len(read))
    assert first["event"] == "first"


def test_a_long_line_goes_on_where_the_reader_goes_on(pipe: tuple[int, TextIO]) -> None:
    reader, _ = pipe
    log = logs.get_logger("x")
    log.info("long", text="x" * 20_000)
    read = b""
    for number in range(2):
        log.info("while it waits", number=number)
        read += os.read(reader, 1 << 20)
    log.info("last")
    long, dropped, last = events_in(read + os.read(reader, 1 << 20))
    assert (long["event"], long["text"]) == ("long", "x" * 20_000)
    assert (dropped["event"], dropped["lines"]) == ("log lines were dropped", 2)
    assert last["event"] == "last"


def test_a_long_line_whose_reader_leaves_is_nobodys_failure(pipe: tuple[int, TextIO],
                                                            tmp_path: Path) -> None:
    reader, stream = pipe
    log = logs.get_logger("x")
    log.info("long", text="x" * 20_000)
    os.close(reader)
    log.info("unread")
    path = tmp_path / "log"
    with path.open("w") as other:  # the stream's descriptor leads elsewhere, as after a rotation
        os.dup2(other.fileno(), stream.fileno())
    log.info("last")
    dropped, last = events_in(path.read_bytes().strip())
    assert (dropped["event"], dropped["lines"]) == ("log lines were dropped", 2)
    assert last["event"] == "last"


def test_what_keeps_happening_is_logged_once_in_a_while() -> None:
    seldom = logs.Seldom(60.0)
    assert [now for now in (-5.0, 0.0, 54.9, 55.0, 56.0, 200.0) if seldom.due(now)] == [
        -5.0, 55.0, 200.0]
