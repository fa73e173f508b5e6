"""Keys and values on a command line: bytes in both directions. Pure, apart from `read_value` and
`stdin`.

A key or a value is its UTF-8 text, or `base64:...`, which is also how unprintable ones are shown,
so that what was printed can be pasted back.
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from elastickv.cli.output import ENCODED, text_of
from elastickv.client import Condition, Delete, Put
from elastickv.errors import ConfigError, InvalidArgument

STDIN = "-"
_LONGEST_TS = 20
"""Digits of the largest 64-bit number."""


def parse_bytes(text: str, what: str) -> bytes:
    """The bytes that `text` stands for. Bytes of the command line that are no UTF-8 stay as they
    are. Raises `InvalidArgument` for bad base64."""
    if not text.startswith(ENCODED):
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise InvalidArgument(f"{what}: the text holds half of a UTF-16 pair",
                                  remedy="give such bytes as base64:...") from None
    return _decode_base64(text[len(ENCODED):], what)


def _decode_base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"{what} is not valid base64",
                              remedy="give text, or base64: and standard base64") from None


def described(name: str, value: bytes) -> dict[str, object]:
    """JSON fields of some bytes: base64 always, text where it is printable."""
    return {name: value, f"{name}_text": text_of(value)}


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key above every key that starts with `prefix`; b"" = there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b""


def read_value(argument: str | None, path: Path | None) -> bytes:
    """The value from the argument, a file, or stdin (`-`). Raises `ConfigError`."""
    if (argument is None) == (path is None):
        raise ConfigError("give the value either as an argument or with --value-file",
                          remedy="for example: elastickv client put greeting hello")
    if path is not None and str(path) != STDIN:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"--value-file: cannot read {path}: {error.strerror}",
                              remedy="name a readable file") from None
    if path is not None or argument == STDIN:
        try:
            return stdin().read()
        except OSError as error:
            raise ConfigError(f"cannot read the value from stdin: {error.strerror}",
                              remedy="name a readable file") from None
    return parse_bytes(argument or "", "the value")


def stdin() -> BinaryIO:
    """stdin as bytes, which no locale decodes. Raises `ConfigError`."""
    # None in a process that was started without one.
    if sys.stdin is None:
        raise ConfigError("stdin is closed", remedy="name a file instead of -")
    return sys.stdin.buffer


def parse_conditions(texts: Sequence[str]) -> list[Condition]:
    """`KEY=COMMIT_TS` each; the last `=` counts, so that a key may hold some."""
    conditions = []
    for text in texts:
        key, equals, commit_ts = text.rpartition("=")
        if not equals or not commit_ts.isascii() or not commit_ts.isdigit() \
                or len(commit_ts) > _LONGEST_TS or int(commit_ts) >= 1 << 64:
            raise ConfigError(f"--if: {text!r} is not <key>=<commit ts>",
                              remedy="take commit_ts_text of `get --output json`; 0 = absent")
        conditions.append(Condition(parse_bytes(key, "--if"), int(commit_ts)))
    return conditions


def parse_operations(words: Sequence[str]) -> list[Put | Delete]:
    """`put KEY VALUE` and `delete KEY`, one after the other."""
    ops: list[Put | Delete] = []
    rest = iter(words)
    for word in rest:
        wanted = {"put": 2, "delete": 1}.get(word)
        if wanted is None:
            raise ConfigError(f"{word!r} is neither put nor delete",
                              remedy="for example: batch put a 1 put b 2 delete c")
        arguments = [parse_bytes(text, word) for _, text in zip(range(wanted), rest, strict=False)]
        if len(arguments) < wanted:
            raise ConfigError(f"{word} needs {wanted} argument(s)",
                              remedy="for example: batch put a 1 put b 2 delete c")
        ops.append(Put(arguments[0], arguments[1]) if word == "put" else Delete(arguments[0]))
    return ops


def parse_lines(lines: Iterable[str]) -> Iterator[Put | Delete]:
    """JSON lines: `{"op": "put", "key": "a", "value": "1", "ttl_ms": 0}`, `{"op": "delete", "key":
    "a"}`. Empty lines are skipped. Raises `InvalidArgument` that names the line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidArgument(f"line {number} is not JSON", remedy="mend that line") from None
        yield _operation(document, f"line {number}")


def _operation(document: Any, where: str) -> Put | Delete:
    match document:
        case {"op": "put", "key": str(key), "value": str(value), **rest}:
            ttl_ms = rest.pop("ttl_ms", 0)
            if not rest and type(ttl_ms) is int and 0 <= ttl_ms < 1 << 63:
                return Put(parse_bytes(key, where), parse_bytes(value, where), ttl_ms)
        case {"op": "delete", "key": str(key), **rest} if not rest:
            return Delete(parse_bytes(key, where))
    raise InvalidArgument(
        f"{where} is not an operation",
        remedy='give {"op": "put", "key": "...", "value": "..."} (and ttl_ms), or '
               '{"op": "delete", "key": "..."}')
