"""A connection's bytes into frames, HEADERS with their CONTINUATIONs into whole blocks. No I/O.

Handlers are called in the order of the frames and may raise `ConnectionFailed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from elastickv.server.h2 import wire
from elastickv.server.h2.wire import Code, ConnectionFailed

MAX_FRAME_BYTES: Final = 65_536
MAX_HEADER_BLOCK_BYTES: Final = 65_536

FrameHandler = Callable[[int, int, bytes], None]
"""`(flags, stream_id, payload)`."""


class FrameReader:
    """The receiving side of a connection.

    `handlers` by frame type; those of HEADERS and CONTINUATION are this class's own, and
    `on_headers(stream_id, ended, block)` gets each block. `on_nuisance()` is told of frames that
    carry nothing.
    """

    def __init__(self, handlers: Sequence[FrameHandler],
                 on_headers: Callable[[int, bool, bytes], None],
                 on_nuisance: Callable[[], None]) -> None:
        self._handlers = list(handlers)
        self._handlers[wire.HEADERS] = self._headers
        self._handlers[wire.CONTINUATION] = self._continuation
        self._on_headers = on_headers
        self._on_nuisance = on_nuisance
        self._rest = b""
        self._block: tuple[int, int, bytearray] | None = None  # stream id, flags, fragments
        self.greeted = False

    def feed(self, data: bytes) -> None:
        """Handle every frame that is whole now. Raises `ConnectionFailed`."""
        if self._rest:
            data = self._rest + data
        position = 0 if self.greeted else self._greet(data)
        if not self.greeted:
            self._rest = data
            return
        end = len(data)
        unpack, handlers = wire.FRAME_HEADER.unpack_from, self._handlers
        while end - position >= wire.FRAME_HEADER_BYTES:
            high, low, kind, flags, stream_id = unpack(data, position)
            length = high << 8 | low
            if length > MAX_FRAME_BYTES:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a frame is too large")
            start = position + wire.FRAME_HEADER_BYTES
            if start + length > end:
                break
            position = start + length
            if self._block is not None and kind != wire.CONTINUATION:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "a header block is interrupted")
            if kind < len(handlers):
                handlers[kind](flags, stream_id & wire.STREAM_ID_MASK, data[start:position])
            else:
                self._on_nuisance()
        self._rest = data[position:]

    def _greet(self, data: bytes) -> int:
        """Where the frames begin; 0 while the preface is not whole."""
        if not wire.PREFACE.startswith(data[:len(wire.PREFACE)]):
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "this port speaks HTTP/2")
        if len(data) < len(wire.PREFACE):
            return 0
        self.greeted = True
        return len(wire.PREFACE)

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id & 1 == 0:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a client's stream id is odd")
        if flags & (wire.PADDED | wire.PRIORITIZED):
            payload = wire.header_fragment(flags, stream_id, payload)
        if flags & wire.END_HEADERS:
            self._on_headers(stream_id, bool(flags & wire.END_STREAM), payload)
        else:
            self._block = (stream_id, flags, bytearray(payload))

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "CONTINUATION continues nothing")
        _, first_flags, block = self._block
        block += payload
        if len(block) > MAX_HEADER_BLOCK_BYTES:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "a header block is too large")
        if not payload:
            self._on_nuisance()
        if flags & wire.END_HEADERS:
            self._block = None
            self._on_headers(stream_id, bool(first_flags & wire.END_STREAM), bytes(block))
