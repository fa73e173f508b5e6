"""gRPC messages out of the bytes of a stream. Pure.

    compressed(1) | length(4) | message(length) | compressed(1) | ...
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Final

import grpc

from elastickv.server.errors import Status
from elastickv.server.methods import too_large

PREFIX_BYTES = 5
IDENTITY: Final = "identity"
"""The `grpc-encoding` of a request that has none."""

# As zlib takes them: 16 more than the window's own stand for gzip's header and trailer.
_WINDOW_BITS: Final[Mapping[str, int]] = {"gzip": 31, "deflate": 15}
_ENCODINGS: Final = ",".join((IDENTITY, *_WINDOW_BITS))


class BadMessage(Exception):
    """The stream's bytes are not messages that this side takes."""

    def __init__(self, code: grpc.StatusCode, detail: str,
                 trailers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(detail)
        self.status = Status(code, detail, trailers)


class Deframer:
    """Collects bytes and gives whole messages."""

    __slots__ = ("_buffer", "_encoding", "_max_message_bytes")

    def __init__(self, max_message_bytes: int, encoding: str = IDENTITY) -> None:
        self._buffer = bytearray()
        self._encoding = encoding
        self._max_message_bytes = max_message_bytes

    @property
    def buffered(self) -> int:
        """Bytes held back for a message that is not whole yet."""
        return len(self._buffer)

    def feed(self, content: bytes) -> list[bytes]:
        """The messages that are whole now. Raises `BadMessage`, as soon as a prefix announces one
        that is too large."""
        self._buffer += content
        buffer = self._buffer
        messages: list[bytes] = []
        start = 0
        while len(buffer) - start >= PREFIX_BYTES:
            length = int.from_bytes(buffer[start + 1:start + PREFIX_BYTES], "big")
            check_prefix(buffer[start], length, self._max_message_bytes)
            end = start + PREFIX_BYTES + length
            if end > len(buffer):
                break
            message = bytes(buffer[start + PREFIX_BYTES:end])
            messages.append(decompressed(message, self._encoding, self._max_message_bytes)
                            if buffer[start] else message)
            start = end
        del buffer[:start]
        return messages

    def end(self) -> None:
        """The stream ended. Raises `BadMessage` in the middle of a message."""
        if self._buffer:
            raise BadMessage(grpc.StatusCode.INTERNAL, "the request ended within a message")


def check_prefix(compressed: int, length: int, max_message_bytes: int) -> None:
    """Raise `BadMessage` for a message that will not be taken."""
    if compressed > 1:
        raise BadMessage(grpc.StatusCode.INTERNAL, "a message has a malformed prefix")
    if length > max_message_bytes:
        raise BadMessage(grpc.StatusCode.RESOURCE_EXHAUSTED,
                         too_large(length, max_message_bytes))


def decompressed(message: bytes, encoding: str, max_message_bytes: int) -> bytes:
    """A compressed message of a request whose `grpc-encoding` is `encoding`. Raises `BadMessage`;
    never makes more than `max_message_bytes` + 1 of it."""
    if encoding == IDENTITY:
        raise BadMessage(grpc.StatusCode.INTERNAL, "a compressed message without a grpc-encoding")
    window_bits = _WINDOW_BITS.get(encoding)
    if window_bits is None:
        # The header is gRPC's (doc/compression.md): clients choose another encoding by it.
        raise BadMessage(grpc.StatusCode.UNIMPLEMENTED,
                         f"the grpc-encoding {encoding[:50]} is not known; there are {_ENCODINGS}",
                         (("grpc-accept-encoding", _ENCODINGS),))
    stream = zlib.decompressobj(window_bits)
    try:
        content = stream.decompress(message, max_message_bytes + 1)
    except zlib.error:
        raise BadMessage(grpc.StatusCode.INTERNAL, "a message does not decompress") from None
    if len(content) > max_message_bytes:
        raise BadMessage(grpc.StatusCode.RESOURCE_EXHAUSTED,
                         f"message larger than max (over {max_message_bytes}, decompressed)")
    if not stream.eof or stream.unused_data:
        raise BadMessage(grpc.StatusCode.INTERNAL, "a message does not decompress")
    return content


def single_message(content: bytes, max_message_bytes: int, encoding: str = IDENTITY) -> bytes:
    """The one message of a unary request that came in one piece. Raises `BadMessage`."""
    if len(content) < PREFIX_BYTES:
        raise BadMessage(grpc.StatusCode.INTERNAL, "the request has no message")
    length = int.from_bytes(content[1:PREFIX_BYTES], "big")
    check_prefix(content[0], length, max_message_bytes)
    if len(content) != PREFIX_BYTES + length:
        raise BadMessage(grpc.StatusCode.INTERNAL, "a unary request has exactly one message")
    message = content[PREFIX_BYTES:]
    return decompressed(message, encoding, max_message_bytes) if content[0] else message
