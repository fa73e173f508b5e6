"""HTTP/2 frames (RFC 9113) and the stateless part of HPACK (RFC 7541). Pure.

    length(3) | type(1) | flags(1) | reserved bit, stream id(31) | payload(length)

What this side sends never touches the peer's header table: every field is either in the static
table or a literal without indexing, so a response is a constant but for its stream id and message.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from typing import Final

from elastickv.server.grpc_message import percent_encoded

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER: Final = struct.Struct(">HBBBI")
FRAME_HEADER_BYTES: Final = 9
STREAM_ID_MASK: Final = 0x7FFF_FFFF
MAX_WINDOW: Final = 0x7FFF_FFFF
DEFAULT_WINDOW: Final = 65_535
DEFAULT_MAX_FRAME_BYTES: Final = 16_384

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9

END_STREAM, ACK = 0x1, 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20

SETTINGS_HEADER_TABLE_SIZE = 1
SETTINGS_ENABLE_PUSH = 2
SETTINGS_MAX_CONCURRENT_STREAMS = 3
SETTINGS_INITIAL_WINDOW_SIZE = 4
SETTINGS_MAX_FRAME_SIZE = 5
SETTINGS_MAX_HEADER_LIST_SIZE = 6


class Code(enum.IntEnum):
    """Error codes of GOAWAY and RST_STREAM."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionFailed(Exception):
    """The peer broke the protocol: GOAWAY with `code`, then close."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def frame_header(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    """What goes before a frame's payload of `length` bytes."""
    return FRAME_HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """One whole frame."""
    return frame_header(kind, flags, stream_id, len(payload)) + payload


def settings_frame(values: Iterable[tuple[int, int]]) -> bytes:
    """SETTINGS with `(id, value)` pairs."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in values))


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0, b"")


def window_update(stream_id: int, increment: int) -> bytes:
    """More bytes may be sent on a stream, or on the connection (0)."""
    return frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def rst_stream(stream_id: int, code: Code) -> bytes:
    """The end of one stream."""
    return frame(RST_STREAM, 0, stream_id, int(code).to_bytes(4, "big"))


def goaway(last_stream_id: int, code: Code, reason: str = "") -> bytes:
    """No stream above `last_stream_id` will be served."""
    return frame(GOAWAY, 0, 0, last_stream_id.to_bytes(4, "big") + int(code).to_bytes(4, "big")
                 + reason.encode()[:200])


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """The `(id, value)` pairs of a SETTINGS frame, in order. Raises `ConnectionFailed`."""
    if len(payload) % 6:
        raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "SETTINGS is no multiple of 6 bytes")
    pairs: list[tuple[int, int]] = list(struct.iter_unpack(">HI", payload))
    for name, value in pairs:
        if name == SETTINGS_INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "initial window is too large")
        if name == SETTINGS_MAX_FRAME_SIZE and not 16_384 <= value <= 16_777_215:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "maximum frame size is out of range")
        if name == SETTINGS_ENABLE_PUSH and value > 1:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
    return pairs


def unpadded(flags: int, payload: bytes) -> bytes:
    """The payload of DATA or HEADERS without its padding. Raises `ConnectionFailed`."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[1:len(payload) - payload[0]]


def header_fragment(flags: int, stream_id: int, payload: bytes) -> bytes:
    """The header block fragment of a HEADERS frame. Raises `ConnectionFailed`."""
    fragment = unpadded(flags, payload)
    if flags & PRIORITIZED:
        if len(fragment) < 5:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "HEADERS without its priority")
        if int.from_bytes(fragment[:4], "big") & STREAM_ID_MASK == stream_id:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a stream depends on itself")
        fragment = fragment[5:]
    return fragment


# --- HPACK, what needs no table -----------------------------------------------------------------


def hpack_length(value: int) -> bytes:
    """An integer with a 7-bit prefix whose high bit (Huffman) is 0."""
    if value < 0x7F:
        return bytes((value,))
    value -= 0x7F
    encoded = bytearray((0x7F,))
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def literal(name: bytes, value: bytes) -> bytes:
    """A header field as a literal without indexing, with a literal name."""
    return b"\0" + hpack_length(len(name)) + name + hpack_length(len(value)) + value


# `:status: 200` is entry 8 of the static table, `:status` alone too; `content-type` is entry 31.
STATUS_200: Final = b"\x88"
CONTENT_TYPE_GRPC: Final = b"\x0f\x10\x10application/grpc"
STATUS_OK_TRAILER: Final = literal(b"grpc-status", b"0")

_HEAD: Final = FRAME_HEADER.pack(
    0, len(STATUS_200 + CONTENT_TYPE_GRPC), HEADERS, END_HEADERS, 0)[:5]
_TAIL: Final = FRAME_HEADER.pack(
    0, len(STATUS_OK_TRAILER), HEADERS, END_HEADERS | END_STREAM, 0)[:5]


def response_head(stream_id: int) -> bytes:
    """The HEADERS frame that begins every response with a message."""
    return _HEAD + stream_id.to_bytes(4, "big") + STATUS_200 + CONTENT_TYPE_GRPC


def without_table(frames: bytes) -> bytes:
    """The same frames, of which the first is HEADERS: its block begins with a dynamic table size
    update to 0."""
    length = int.from_bytes(frames[:3], "big") + 1
    return (length.to_bytes(3, "big") + frames[3:FRAME_HEADER_BYTES] + b"\x20"
            + frames[FRAME_HEADER_BYTES:])


def whole_response(stream_id: int, message: bytes) -> bytes:
    """HEADERS, one DATA frame with one message, and the trailers of success.

    The message must fit the peer's maximum frame size with its 5-byte prefix
    `compressed(1) = 0 | length(4)`.
    """
    size = len(message)
    stream = stream_id.to_bytes(4, "big")
    return b"".join((
        _HEAD, stream, STATUS_200, CONTENT_TYPE_GRPC,
        (size + 5).to_bytes(3, "big"), b"\0\0", stream, b"\0", size.to_bytes(4, "big"), message,
        _TAIL, stream, STATUS_OK_TRAILER))


def prefixed(message: bytes) -> bytes:
    """A gRPC message as it goes into DATA: `compressed(1) = 0 | length(4) | message`."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def status_fields(code: int, detail: str, trailers: Iterable[tuple[str, str]]) -> bytes:
    """The header block of a gRPC status, without the fields that begin a response."""
    block = literal(b"grpc-status", str(code).encode())
    if detail:
        block += literal(b"grpc-message", percent_encoded(detail))
    for name, value in trailers:
        block += literal(name.encode("ascii"), value.encode("ascii"))
    return block
