"""What a request's headers ask for. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, cast

import grpc
import hpack

from elastickv.errors import (
    TRAILER_ERROR,
    TRAILER_OUTCOME,
    DeadlineExceeded,
    InvalidArgument,
    Outcome,
)
from elastickv.server.errors import Status, status_of
from elastickv.server.h2.messages import IDENTITY
from elastickv.server.h2.wire import Code, ConnectionFailed
from elastickv.server.methods import Services, Stream, Unary

MAX_HEADS_REMEMBERED: Final = 256
FIELD_OVERHEAD_BYTES: Final = 32
"""Of a field in the size of a header list (RFC 9113, 6.5.2)."""
MOST_DECODED: Final = 4
"""How many times the largest header list is decoded, so that only the call that goes over it is
refused, and not every call of its connection."""

_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

Table = Mapping[str, Unary | Stream]
"""Methods by path."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request: whom it calls, for how long, what its compressed messages are compressed with, and
    how large the message of a unary call may be. Exactly one of `method`, `refusal` and
    `http_status` says how it goes on. `waits`: whole messages of it take memory before they are
    parsed, since they have been decompressed or wait for their turn."""

    path: str
    method: Unary | Stream | None = None
    timeout_s: float | None = None
    refusal: Status | None = None
    http_status: int = 0
    encoding: str = IDENTITY
    max_message_bytes: int = 0
    waits: bool = False


def table_of(services: Services, *, max_message_bytes: int) -> dict[str, Unary | Stream]:
    """`/Service/Method` to method, which takes no more than the front."""
    return {f"/{service}/{name}": _bounded(method, max_message_bytes)
            for service, methods in services.items() for name, method in methods.items()}


def _bounded(method: Unary | Stream, max_message_bytes: int) -> Unary | Stream:
    if isinstance(method, Stream) or method.max_message_bytes <= max_message_bytes:
        return method
    return replace(method, max_message_bytes=max_message_bytes)


def parse_timeout(text: str) -> float | None:
    """Seconds of a `grpc-timeout`; None for text that is none."""
    match = _TIMEOUT.fullmatch(text)
    return int(match[1]) * _UNIT_S[match[2]] if match else None


def head_of(fields: Iterable[tuple[str, str]], table: Table) -> Head | None:
    """The request of decoded header fields; None when they are malformed (RFC 9113, 8.1.1)."""
    values: dict[str, str] = {}
    regular = False
    for name, value in fields:
        if name.startswith(":"):
            if regular or name in values:
                return None
        else:
            regular = True
            if name != name.lower() or name in ("connection", "transfer-encoding", "upgrade"):
                return None
        values[name] = value
    path = values.get(":path", "")
    if not {":method", ":scheme", ":path"} <= values.keys() or not path:
        return None
    if values[":method"] != "POST":
        return Head(path, http_status=405)
    if not values.get("content-type", "").startswith("application/grpc"):
        return Head(path, http_status=415)
    return _grpc_head(path, values, table)


def _grpc_head(path: str, values: Mapping[str, str], table: Table) -> Head:
    method = table.get(path)
    if method is None:
        return Head(path, refusal=Status(grpc.StatusCode.UNIMPLEMENTED,
                                         f"there is no method {path[:200]}", ()))
    encoding = values.get("grpc-encoding", IDENTITY)
    max_message_bytes, waits = 0, encoding != IDENTITY
    if isinstance(method, Unary):
        max_message_bytes, waits = method.max_message_bytes, waits or method.turns is not None
    timeout = values.get("grpc-timeout")
    timeout_s = parse_timeout(timeout) if timeout is not None else None
    if timeout is not None and timeout_s is None:
        return Head(path, refusal=Status(grpc.StatusCode.INTERNAL,
                                         "grpc-timeout is malformed", ()))
    if timeout_s == 0:
        return Head(path, refusal=status_of(DeadlineExceeded(
            "the deadline had passed when the call came", remedy="give it more time")))
    return Head(path, method, timeout_s, encoding=encoding, max_message_bytes=max_message_bytes,
                waits=waits)


def _too_large(path: str, size: int, max_header_list_bytes: int) -> Head:
    return Head(path, refusal=Status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"metadata larger than max ({size} vs. {max_header_list_bytes})",
        ((TRAILER_ERROR, InvalidArgument.__name__), (TRAILER_OUTCOME, Outcome.NOT_APPLIED.value))))


class HeadReader:
    """Turns header blocks into `Head`s and keeps the connection's HPACK state.

    A block is remembered while decoding it again would give the same. It would until some block
    changes the header table: by adding an entry, which then stands first, or by a size update,
    which stands at the beginning of a block (001xxxxx).
    """

    def __init__(self, table: Table, *, max_header_list_bytes: int) -> None:
        self._table = table
        self._max_header_list_bytes = max_header_list_bytes
        self._decoder = hpack.Decoder(max_header_list_size=MOST_DECODED * max_header_list_bytes)
        self._heads: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head | None:
        """The request of a block, refused where it has too many fields; None when they are
        malformed. Raises `ConnectionFailed` when it does not decode or has far too many: the state
        is lost then."""
        return self._heads.get(block) or self._decode(block)

    def _decode(self, block: bytes) -> Head | None:
        entries = self._decoder.header_table.dynamic_entries
        before = (len(entries), entries[0] if entries else None)
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "a header block is too large") from None
        except (hpack.HPACKError, IndexError):
            raise ConnectionFailed(Code.COMPRESSION_ERROR, "a header block does not decode") \
                from None
        # Any byte may stand in a value (RFC 9110, 5.5); what is compared here is ASCII.
        pairs = cast("list[tuple[bytes, bytes]]", fields)
        head = head_of(((name.decode("latin-1"), value.decode("latin-1"))
                        for name, value in pairs), self._table)
        size = sum(len(name) + len(value) + FIELD_OVERHEAD_BYTES for name, value in pairs)
        if head is not None and head.method is not None and size > self._max_header_list_bytes:
            head = _too_large(head.path, size, self._max_header_list_bytes)
        after = (len(entries), entries[0] if entries else None)
        resized = bool(block) and block[0] & 0xE0 == 0x20
        if before[0] != after[0] or before[1] is not after[1] or resized:
            self._heads.clear()
        elif head is not None and size <= self._max_header_list_bytes:
            if len(self._heads) >= MAX_HEADS_REMEMBERED:
                self._heads.clear()
            self._heads[block] = head
        return head
