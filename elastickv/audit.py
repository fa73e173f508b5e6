"""The audit log: one JSON object a line for every administrative call that this node received.

    {"time": <RFC 3339, UTC, milliseconds>, "who": <certificate CN, or peer address>,
     "what": "<Service>/<Method>", "target": <member that a membership call names, or "">,
     "key_ids": [<DEK id>, ...], "result": "ok" | <error class>, "applied_index": <index, 0 = none>}

A line is appended with one write, after the call has ended. The file is created owner-only and is
opened again when its path no longer leads to it, so it is rotated by renaming it. Nothing here
is given key bytes: ids are integers, and a result is a class name, never a message.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from elastickv import logs
from elastickv.errors import ConfigError

RESULT_OK: Final = "ok"

caller: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("caller", default="")
"""Who made the call that runs in this context; set by a front for methods that are audited."""

log = logs.get_logger(__name__)


def utc_now() -> str:
    """RFC 3339 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line_of(fields: Mapping[str, Any]) -> bytes:
    """One line of the file. JSON escapes line ends, so no field can forge a second line."""
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


# A pipe that nobody reads refuses the line then: the node would wait for it, and do nothing else.
_FLAGS: Final = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the audit log {path} cannot be opened: {error.strerror}",
                       remedy="give --audit-log a file that the node may write")


def require_usable(path: Path, data_directory: Path) -> None:
    """Raise the `ConfigError` of `AuditLog(path)`, with nothing made. A node makes its data
    directory first."""
    try:
        try:
            os.close(os.open(path, _FLAGS))
        except FileNotFoundError:
            directory = path.parent
            if directory.exists() or directory.absolute() != data_directory.absolute():
                # Raises as making the file would.
                os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                if not os.access(directory, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    except OSError as error:
        raise _unusable(path, error) from None


class AuditLog:
    """The file at `path`, for appending."""

    def __init__(self, path: Path, *, now: Callable[[], str] = utc_now) -> None:
        """Opens the file. Raises `ConfigError` when it cannot be opened."""
        self._path = path
        self._now = now
        try:
            self._descriptor = self._open()
        except OSError as error:
            raise _unusable(path, error) from None

    def _open(self) -> int:
        descriptor = os.open(self._path, _FLAGS | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            # A line that a full disk or a crash cut off must not swallow the next one.
            self._torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def record(self, *, what: str, target: str, key_ids: list[int], result: str,
               applied_index: int) -> None:
        """Append a line for the call that runs in this context. A line that cannot be written is
        logged as an error with all its fields; the call goes on."""
        fields = {"time": self._now(), "who": caller.get(), "what": what, "target": target,
                  "key_ids": key_ids, "result": result, "applied_index": applied_index}
        try:
            self._follow_path()
            self._append(line_of(fields))
        except OSError as error:
            log.error("the audit log cannot be written", path=self._path,
                      reason=error.strerror or str(error), line=fields)

    def _follow_path(self) -> None:
        """Open the file anew after a rename or a removal."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                return
        fresh = self._open()
        os.close(self._descriptor)
        self._descriptor = fresh

    def _append(self, line: bytes) -> None:
        content = b"\n" + line if self._torn else line
        written = os.write(self._descriptor, content)
        self._torn = written != len(content)
        if self._torn:
            raise OSError(0, f"only {written} of {len(content)} bytes were written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
