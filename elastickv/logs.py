"""Structured logs on stderr, one event per line, JSON or text.

Redaction rule: a `bytes` value is rendered as its length, and an object of unknown type as the name
of its type. User keys, values, wrapped DEKs and log payloads are all `bytes` in this code
base, so none of them can reach a log line through a field, at any level. Exceptions are logged by
type, message and source lines, without locals.

Logging never fails, and waits for nothing but a terminal that was stopped (Ctrl-S): a line that
cannot be written (a full disk, a pipe that nobody reads) is dropped, and how many were is said once
lines can be written again.
"""

from __future__ import annotations

import contextlib
import enum
import io
import logging
import math
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import PurePath
from typing import Any, TextIO


def _import_structlog() -> Any:
    """structlog without rich, which its development renderer would import: 6 MB and 0.3 s per node.

    A None entry in `sys.modules` makes `import rich` raise ImportError, which structlog expects.
    """
    if "structlog" in sys.modules or "rich" in sys.modules:
        import structlog
        return structlog
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog
    finally:
        del sys.modules["rich"]
    return structlog


structlog = _import_structlog()

_STDERR = 2

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG, "info": logging.INFO,
    "warning": logging.WARNING, "error": logging.ERROR,
}


def redact(value: object) -> object:
    """`value` as plain data, every bytes-like object in it replaced by its length."""
    match value:
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Mapping():
            return {str(redact(key)): redact(item) for key, item in value.items()}
        case tuple() | list() | set() | frozenset():
            return [redact(item) for item in value]
        case enum.Enum():
            return value.name
        case str() | int() | float() | None:
            return value
        case PurePath():
            return str(value)
        case BaseException():
            return f"{type(value).__name__}: {value}"
        case _:
            return f"<{type(value).__name__}>"


def redact_event(logger: object, method: str,
                 event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor: `redact` for every field."""
    for key, value in event.items():
        event[key] = redact(value)
    return event


def format_exception(logger: object, method: str,
                     event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor: `exc_info` becomes type, message and source lines, never locals."""
    info = event.pop("exc_info", None)
    error = sys.exception() if info is True else info
    if isinstance(error, BaseException):
        event["error"] = f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        event["traceback"] = [f"{frame.filename}:{frame.lineno} in {frame.name}"
                              for frame in frames]
    return event


class Seldom:
    """When something that keeps happening may be logged again: once in `every_s` seconds."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_at = -math.inf

    def due(self, now: float) -> bool:
        """Whether it is to be logged at `now` (seconds)."""
        if now < self._next_at:
            return False
        self._next_at = now + self._every_s
        return True


class LineOutput:
    """Writes lines to a stream, None = nowhere; one that cannot be written is dropped and counted.

    Past the stream's own buffer where it has a descriptor: what such a buffer cannot get rid of
    makes every later write fail, and the process's exit as well.

    Nor is a slow reader waited for: a line of up to `select.PIPE_BUF` bytes is written whole or
    dropped. What has no room of a longer one that was begun is kept, and written before any other
    line; those that come meanwhile are dropped. It is lost at the process's exit.
    """

    def __init__(self, stream: TextIO | None, notice: Callable[[int], str]) -> None:
        """`notice` is the line that says how many lines were dropped."""
        self._stream = stream
        self._notice = notice
        self._dropped = 0
        self._torn = False
        self._rest = b""
        # Lines come from every thread. A signal's handler may log in the middle of one.
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Write one line. Raises nothing."""
        with self._lock:
            try:
                if self._dropped:
                    self._put(self._notice(self._dropped))
                    self._dropped = 0
                self._put(text)
            except BlockingIOError:
                self._dropped += 1
            except (OSError, ValueError):
                self._dropped += 2 if self._rest else 1
                self._rest = b""
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back that could be written."""

    def _put(self, text: str) -> None:
        stream = self._stream
        if stream is None:
            return
        try:
            descriptor = stream.fileno()
        except io.UnsupportedOperation:
            stream.write(text)
            stream.flush()
            return
        if self._rest:
            self._rest = self._send(descriptor, self._rest)
            if self._rest:
                raise BlockingIOError
        # A line that was cut off must not swallow the next one.
        line = (("\n" if self._torn else "") + text).encode(errors="backslashreplace")
        rest = self._send(descriptor, line)
        if len(rest) == len(line):
            raise BlockingIOError
        self._rest = rest

    def _send(self, descriptor: int, content: bytes) -> bytes:
        """Write what has room; the rest. O_NONBLOCK would do, but it would hold for every process
        that shares the pipe."""
        room = select.poll()
        room.register(descriptor, select.POLLOUT)
        view = memoryview(content)
        with contextlib.suppress(BlockingIOError):  # another process took the room
            while view and room.poll(0):  # an error counts as room: the write tells it
                view = view[os.write(descriptor, view[:select.PIPE_BUF]):]
                self._torn = bool(view)
        return bytes(view)


def discard_stalled_stderr() -> None:
    """Let what is still written to stderr go nowhere if a write would wait for a reader: a process
    on its way out must come to its exit code."""
    room = select.poll()
    room.register(_STDERR, select.POLLOUT)
    if not room.poll(0):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDERR)
        os.close(nowhere)


def configure(level: str = "info", log_format: str = "json", *,
              stream: TextIO | None = None) -> None:
    """Set up logging for the process.

    `level` is one of `LEVELS`, `log_format` is `json` or `text`; lines go to `stream` (stderr).
    Libraries that use the standard `logging` module are shown from WARNING.
    """
    renderer = (structlog.processors.JSONRenderer() if log_format == "json"
                else structlog.dev.ConsoleRenderer(colors=False))
    processors = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        format_exception,
        redact_event,
        renderer,
    ]

    def notice(dropped: int) -> str:
        event: Any = {"module": __name__, "event": "log lines were dropped", "lines": dropped}
        for processor in processors:
            event = processor(None, "warning", event)
        return f"{event}\n"

    output = LineOutput(stream or sys.stderr, notice)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=output),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=max(LEVELS[level], logging.WARNING), stream=output, force=True,
                        format="%(asctime)s %(levelname)s %(name)s %(message)s")


def get_logger(name: str) -> Any:
    """A logger whose events carry `module=name`. Use: `log.info("event", field=value)`.

    It may be made at import time: the configuration is looked up when it is used.
    """
    return structlog.get_logger(module=name)
