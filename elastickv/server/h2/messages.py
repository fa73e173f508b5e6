"""gRPC messages out of the bytes of a stream. Pure.

    compressed(1) | length(4) | message(length) | compressed(1) | ...
"""

from __future__ import annotations

import grpc

PREFIX_BYTES = 5


class BadMessage(Exception):
    """The stream's bytes are not messages that this side takes."""

    def __init__(self, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Deframer:
    """Collects bytes and gives whole messages."""

    __slots__ = ("_buffer", "_max_message_bytes")

    def __init__(self, max_message_bytes: int) -> None:
        self._buffer = bytearray()
        self._max_message_bytes = max_message_bytes

    @property
    def buffered(self) -> int:
        """Bytes held back for a message that is not whole yet."""
        return len(self._buffer)

    def feed(self, content: bytes) -> list[bytes]:
        """The messages that are whole now. Raises `BadMessage`, as soon as a prefix announces one
        that is too large or compressed."""
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
            messages.append(bytes(buffer[start + PREFIX_BYTES:end]))
            start = end
        del buffer[:start]
        return messages

    def end(self) -> None:
        """The stream ended. Raises `BadMessage` in the middle of a message."""
        if self._buffer:
            raise BadMessage(grpc.StatusCode.INTERNAL, "the request ended within a message")


def check_prefix(compressed: int, length: int, max_message_bytes: int) -> None:
    """Raise `BadMessage` for a message that will not be taken."""
    if compressed:
        raise BadMessage(grpc.StatusCode.UNIMPLEMENTED if compressed == 1
                         else grpc.StatusCode.INTERNAL, "compressed messages are not taken")
    if length > max_message_bytes:
        # gRPC's own words, by which clients tell it from an overload.
        raise BadMessage(grpc.StatusCode.RESOURCE_EXHAUSTED,
                         f"message larger than max ({length} vs. {max_message_bytes})")


def single_message(content: bytes, max_message_bytes: int) -> bytes:
    """The one message of a unary request that came in one piece. Raises `BadMessage`."""
    if len(content) < PREFIX_BYTES:
        raise BadMessage(grpc.StatusCode.INTERNAL, "the request has no message")
    length = int.from_bytes(content[1:PREFIX_BYTES], "big")
    check_prefix(content[0], length, max_message_bytes)
    if len(content) != PREFIX_BYTES + length:
        raise BadMessage(grpc.StatusCode.INTERNAL, "a unary request has exactly one message")
    return content[PREFIX_BYTES:]
