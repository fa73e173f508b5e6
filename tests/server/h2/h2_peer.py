"""An HTTP/2 client that says exactly what a test wants, well-formed or not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import hpack

from elastickv.server.h2 import wire

DEFAULT_FIELDS = {":method": "POST", ":scheme": "http", ":path": "/RawKV/RawPut",
                  ":authority": "h", "content-type": "application/grpc", "te": "trailers"}


@dataclass
class Frame:
    """One received frame."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


@dataclass
class Answer:
    """What came back on one stream."""

    fields: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    ended: bool = False

    @property
    def grpc_status(self) -> int:
        return int(self.fields["grpc-status"])


class H2Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self.answers: dict[int, Answer] = {}
        self.settings: dict[int, int] = {}
        self.goaway: int | None = None
        self.last_stream_ids: list[int] = []  # of every GOAWAY
        self.pings: list[bytes] = []
        self.window_updates: list[tuple[int, int]] = []

    @classmethod
    async def connect(cls, port: int, *, settings: Iterable[tuple[int, int]] = (),
                      greet: bool = True) -> H2Peer:
        peer = cls(*await asyncio.open_connection("127.0.0.1", port))
        settings = list(settings)
        for name, value in settings:
            if name == wire.SETTINGS_HEADER_TABLE_SIZE:
                peer._decoder.max_allowed_table_size = value
        if greet:
            peer.send(wire.PREFACE + wire.settings_frame(settings))
        return peer

    def send(self, content: bytes) -> None:
        self._writer.write(content)

    def block(self, fields: Iterable[tuple[str, str]] | None = None, **changed: str) -> bytes:
        """An encoded header block: the default request's, or of `fields`."""
        if fields is None:
            fields = {**DEFAULT_FIELDS, **changed}.items()
        return self._encoder.encode(list(fields))

    def headers(self, stream_id: int, *, flags: int = wire.END_HEADERS, path: str = "",
                **changed: str) -> None:
        if path:
            changed[":path"] = path
        self.send(wire.frame(wire.HEADERS, flags, stream_id, self.block(**changed)))

    def data(self, stream_id: int, content: bytes, *, end: bool = True) -> None:
        self.send(wire.frame(wire.DATA, wire.END_STREAM if end else 0, stream_id, content))

    def call(self, stream_id: int, path: str, message: bytes) -> None:
        """A whole unary request."""
        self.headers(stream_id, path=path)
        self.data(stream_id, wire.prefixed(message))

    async def frame(self) -> Frame | None:
        """The next frame, noted; None at the end of the connection."""
        try:
            async with asyncio.timeout(10):
                head = await self._reader.readexactly(wire.FRAME_HEADER_BYTES)
                high, low, kind, flags, stream_id = wire.FRAME_HEADER.unpack(head)
                payload = await self._reader.readexactly(high << 8 | low)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        received = Frame(kind, flags, stream_id, payload)
        self._note(received)
        return received

    def _note(self, received: Frame) -> None:
        payload = received.payload
        answer = self.answers.setdefault(received.stream_id, Answer())
        match received.kind:
            case wire.HEADERS:
                answer.fields.update(self._decoder.decode(payload))
                answer.ended = bool(received.flags & wire.END_STREAM)
            case wire.DATA:
                answer.data += payload
            case wire.RST_STREAM:
                answer.reset = int.from_bytes(payload, "big")
            case wire.GOAWAY:
                self.goaway = int.from_bytes(payload[4:8], "big")
                self.last_stream_ids.append(int.from_bytes(payload[:4], "big"))
            case wire.PING:
                self.pings.append(payload)
            case wire.WINDOW_UPDATE:
                self.window_updates.append((received.stream_id, int.from_bytes(payload, "big")))
            case wire.SETTINGS if not received.flags & wire.ACK:
                self.settings.update(wire.parse_settings(payload))

    async def answer(self, stream_id: int) -> Answer:
        """Read until the stream is over."""
        while True:
            answer = self.answers.setdefault(stream_id, Answer())
            if answer.ended or answer.reset is not None:
                return answer
            if await self.frame() is None:
                raise ConnectionError(f"closed before stream {stream_id} was answered")

    async def end(self) -> int | None:
        """Read until the connection is closed; the error code of GOAWAY."""
        while await self.frame() is not None:
            pass
        return self.goaway

    async def settle(self) -> None:
        """Return once the other side has handled everything sent so far: one round until it has
        started the calls, one until it has answered those that wait for nothing."""
        for _ in range(2):
            count = len(self.pings)
            self.send(wire.frame(wire.PING, 0, 0, b"settled?"))
            while len(self.pings) == count:
                if await self.frame() is None:
                    raise ConnectionError("closed")

    async def goodbyes(self, count: int) -> None:
        """Read until GOAWAY came so many times."""
        while len(self.last_stream_ids) < count:
            if await self.frame() is None:
                raise ConnectionError("closed")

    def knows(self) -> None:
        """Answer the PING that came with the first GOAWAY."""
        self.send(wire.frame(wire.PING, wire.ACK, 0, b"goodbye!"))

    def close(self) -> None:
        self._writer.transport.abort()
