"""One HTTP/2 connection that serves gRPC calls.

Only what a gRPC server needs: no push, no priorities, no upgrade. A peer that breaks the protocol
gets GOAWAY and the connection ends; everything that a peer can make this side keep is bounded:

    header block 64 KiB, decoded fields 64 KiB, of a call that is served 16 KiB
    one frame 64 KiB
    calls at a time MAX_CALLS                       request bytes kept, over all calls
    RST_STREAM of either side, PING, SETTINGS,
    empty DATA                                      by a budget that time and responses refill
    bytes of responses that wait for the peer

While the peer does not read, nothing more is read from it. One that reads and grants no window is
read from, since its next frame may grant some; a large response that finds too many bytes waiting
is replaced by `Overloaded`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc

from elastickv import audit, logs
from elastickv.errors import Overloaded
from elastickv.server.errors import CANCELLED, Status, refusal_of, status_of
from elastickv.server.h2 import wire
from elastickv.server.h2.budget import Budget, Watchdog
from elastickv.server.h2.head import Head, HeadReader, Table
from elastickv.server.h2.messages import BadMessage, Deframer, single_message
from elastickv.server.h2.reading import MAX_FRAME_BYTES, FrameReader
from elastickv.server.h2.sending import Outgoing, SendWindows
from elastickv.server.h2.wire import Code, ConnectionFailed
from elastickv.server.methods import Stream, Unary, parse_request, time_for_call

MAX_CALLS: Final = 1024
MAX_HEADER_LIST_BYTES: Final = 16_384
CONNECTION_WINDOW: Final = 64 << 20
STREAM_WINDOW: Final = 4 << 20
MAX_STREAMED_REQUESTS: Final = 64
MAX_STREAMED_REQUEST_BYTES: Final = 65_536
STREAM_GRACE_S: Final = 0.1
GOODBYE_S: Final = 0.5
"""How long the peer has to say that it knows of the end, and then to close the connection."""
LARGE_RESPONSE_BYTES: Final = 65_536
"""Only what was read is that large: what a write comes to is always told."""

_GREETING: Final = wire.settings_frame([
    (wire.SETTINGS_MAX_CONCURRENT_STREAMS, MAX_CALLS),
    (wire.SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW),
    (wire.SETTINGS_MAX_FRAME_SIZE, MAX_FRAME_BYTES),
    (wire.SETTINGS_MAX_HEADER_LIST_SIZE, MAX_HEADER_LIST_BYTES),
]) + wire.window_update(0, CONNECTION_WINDOW - wire.DEFAULT_WINDOW)
_PING: Final = wire.frame(wire.PING, 0, 0, b"elastick")
_GOODBYE: Final = b"goodbye!"
_NOT_ONE_MESSAGE: Final = "a unary request has exactly one message"
_STOPPING: Final = Status(grpc.StatusCode.UNAVAILABLE, "the node is stopping", ())

log = logs.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one connection, in bytes."""

    max_message_bytes: int
    max_buffered_bytes: int
    max_waiting_bytes: int


class Call:
    """One stream from its HEADERS to the end of its response."""

    __slots__ = ("began", "deframer", "ended", "head", "queue", "queued_bytes", "stream_id", "task",
                 "window")

    def __init__(self, stream_id: int, head: Head, ended: bool) -> None:
        self.stream_id = stream_id
        self.head = head
        self.window = STREAM_WINDOW  # what the peer may still send
        self.ended = ended  # by the peer
        self.began = False  # the response's HEADERS are out
        self.deframer: Deframer | None = None
        self.task: asyncio.Task[None] | None = None
        self.queue: asyncio.Queue[bytes | None] | None = None
        self.queued_bytes = 0


class H2Connection(asyncio.Protocol):
    """The server side of one connection. `on_opened(self)` is called once it is up (never where TLS
    fails), `on_closed(self)` once it is gone."""

    def __init__(self, table: Table, limits: Limits, on_opened: Callable[[H2Connection], None],
                 on_closed: Callable[[H2Connection], None]) -> None:
        self._limits = limits
        self._on_opened = on_opened
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Call] = {}
        self._last_stream_id = 0
        self._windows = SendWindows()
        self._receive_window = CONNECTION_WINDOW
        self._buffered = 0
        self._heads = HeadReader(table, max_header_list_bytes=MAX_HEADER_LIST_BYTES)
        self._out: list[bytes | memoryview] = []
        self._no_head_sent = True
        self._flush_scheduled = False
        self._written_bytes = 0
        self._pump_due = False
        self._write_paused = False
        self._going_away = False
        self._goodbye: asyncio.TimerHandle | None = None
        self._end: asyncio.TimerHandle | None = None
        self._budget = Budget(self._loop.time)
        self._watchdog: Watchdog | None = None
        self._reader = FrameReader(
            (self._on_data, self._misplaced, self._on_priority, self._on_rst_stream,
             self._on_settings, self._misplaced, self._on_ping, self._on_goaway,
             self._on_window_update, self._misplaced),
            on_headers=self._headers, on_nuisance=self._budget.spend)

    # --- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._watchdog = Watchdog(
            self._loop, greeted=lambda: self._reader.greeted, taken=self._taken_bytes,
            ping=self._ping, give_up=self.abort)
        self._send(_GREETING)
        self._on_opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._watchdog is not None:
            self._watchdog.stop()
        for timer in (self._goodbye, self._end):
            if timer is not None:
                timer.cancel()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if call.task is not None:
                call.task.cancel()
        self._on_closed(self)

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self._pump()

    def data_received(self, data: bytes) -> None:
        if self._watchdog is not None:
            self._watchdog.heard = True
        try:
            self._reader.feed(data)
        except ConnectionFailed as error:
            self._fail(error.code, error.reason)
        if self._pump_due:
            self._pump_due = False
            self._pump()

    def _ping(self) -> None:
        self._send(_PING)
        # Now: what goes out later would look as if the peer had taken something.
        self._flush()

    def _taken_bytes(self) -> int:
        """How many bytes have left for the peer."""
        transport = self._transport
        return self._written_bytes - (transport.get_write_buffer_size() if transport else 0)

    # --- sending --------------------------------------------------------------------------------

    def _send(self, content: bytes | memoryview) -> None:
        """Everything of one pass of the loop goes out in one write, unless `_flush` comes first."""
        self._out.append(content)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _send_head(self, content: bytes) -> None:
        """`_send` of what begins a response. The connection's first one says that this side keeps
        no header table: a peer that allows only a smaller one than usual waits to be told."""
        if self._no_head_sent:
            self._no_head_sent = False
            content = wire.without_table(content)
        self._send(content)

    def _flush(self) -> None:
        self._flush_scheduled = False
        out, self._out = self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            content = b"".join(out) if len(out) > 1 else out[0]
            self._written_bytes += len(content)
            self._transport.write(content)

    def _pump(self) -> None:
        if self._windows.waiting and not self._write_paused:
            frames, done = self._windows.pump()
            for content in frames:
                self._send(content)
            for item in done:
                item.on_sent()

    def _fail(self, code: Code, reason: str) -> None:
        """GOAWAY and the end."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        log.debug("connection refused", code=code.name, reason=reason)
        self._send(wire.goaway(self._last_stream_id, code, reason))
        self._flush()
        self._out.clear()
        transport.close()

    # --- HEADERS --------------------------------------------------------------------------------

    def _headers(self, stream_id: int, ended: bool, block: bytes) -> None:
        # Every block is decoded, also of streams that are refused: it changes the header table.
        head = self._heads.read(block)
        call = self._calls.get(stream_id)
        if call is not None:
            self._on_trailers(call, ended)
            return
        if stream_id <= self._last_stream_id:
            return  # of a call that is over; the peer did not know yet
        self._last_stream_id = stream_id
        if head is None:
            self._budget.spend()
            self._send(wire.rst_stream(stream_id, Code.PROTOCOL_ERROR))
        elif self._going_away or len(self._calls) >= MAX_CALLS:
            self._budget.spend()
            self._send(wire.rst_stream(stream_id, Code.REFUSED_STREAM))
        else:
            self._begin(Call(stream_id, head, ended))

    def _on_trailers(self, call: Call, ended: bool) -> None:
        """A second header block on a stream may only end it."""
        if call.ended or not ended:
            self._reset(call, Code.PROTOCOL_ERROR)
        else:
            self._end_request(call)

    def _begin(self, call: Call) -> None:
        head = call.head
        self._calls[call.stream_id] = call
        if head.method is None:
            self._refuse_head(call, head)
            return
        if isinstance(head.method, Stream):
            call.queue = asyncio.Queue()
            call.deframer = Deframer(
                min(self._limits.max_message_bytes, MAX_STREAMED_REQUEST_BYTES), head.encoding)
            call.task = self._loop.create_task(self._serve_stream(call, head.method, call.queue))
        if call.ended:
            self._end_request(call)

    def _refuse_head(self, call: Call, head: Head) -> None:
        if head.refusal is not None:
            self._refuse(call, head.refusal)
            return
        block = wire.literal(b":status", str(head.http_status).encode())
        self._send_head(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM,
                                   call.stream_id, block))
        self._finish(call)

    # --- DATA -----------------------------------------------------------------------------------

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_window -= size
        if self._receive_window < CONNECTION_WINDOW - (1 << 20):
            if self._receive_window < 0:
                raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "the connection window is exceeded")
            self._send(wire.window_update(0, CONNECTION_WINDOW - self._receive_window))
            self._receive_window = CONNECTION_WINDOW
        call = self._calls.get(stream_id)
        if call is None:
            if stream_id > self._last_stream_id or not stream_id & 1:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "DATA on an idle stream")
            return  # of a call that is over; the peer did not know yet
        ended = bool(flags & wire.END_STREAM)
        if call.ended:
            self._reset(call, Code.STREAM_CLOSED)
            return
        call.window -= size
        if call.window < 0:
            self._reset(call, Code.FLOW_CONTROL_ERROR)
            return
        if flags & wire.PADDED:
            payload = wire.unpadded(flags, payload)
        if not payload and not ended:
            self._budget.spend()
        if call.began and call.queue is None:
            call.ended = ended
            return  # the answer is on its way, whatever else comes
        try:
            if call.task is not None and call.queue is None:
                if payload:
                    # Whatever else is wrong with it tells nothing of the message that is served.
                    raise BadMessage(grpc.StatusCode.INTERNAL, _NOT_ONE_MESSAGE)
            elif ended and call.deframer is None:
                call.ended = True
                self._require_room_to_wait(call)
                self._start(call, single_message(
                    payload, call.head.max_message_bytes, call.head.encoding))
                return
            else:
                self._collect(call, payload)
        except BadMessage as error:
            self._refuse(call, error.status)
            return
        if ended:
            self._end_request(call)
        elif call.window < STREAM_WINDOW // 2:
            self._send(wire.window_update(stream_id, STREAM_WINDOW - call.window))
            call.window = STREAM_WINDOW

    def _require_room_to_wait(self, call: Call) -> None:
        if call.head.waits:
            self._require_room()

    def _require_room(self) -> None:
        """Raise `BadMessage` where too much is kept of other requests."""
        if self._buffered > self._limits.max_buffered_bytes:
            raise BadMessage(*status_of(Overloaded(
                "the connection's unfinished requests are too large",
                remedy="send fewer large requests at a time, or over more connections")))

    def _collect(self, call: Call, payload: bytes) -> None:
        """Keep a part of a request. Raises `BadMessage`."""
        self._require_room_to_wait(call)
        if call.deframer is None:
            call.deframer = Deframer(call.head.max_message_bytes, call.head.encoding)
        deframer = call.deframer
        self._buffered -= deframer.buffered
        try:
            messages = deframer.feed(payload)
        finally:
            self._buffered += deframer.buffered
        queue = call.queue
        if queue is not None:
            for message in messages:
                queue.put_nowait(message)
                self._count_queued(call, len(message))
        self._require_room()
        if queue is None:
            if messages:
                self._take_unary(call, messages)
        elif queue.qsize() > MAX_STREAMED_REQUESTS:
            raise BadMessage(grpc.StatusCode.RESOURCE_EXHAUSTED, "requests come too fast")

    def _count_queued(self, call: Call, size: int) -> None:
        """`size` more bytes wait for the call's method; they are fewer once it took some."""
        if call.stream_id in self._calls:  # or all of them were given up
            call.queued_bytes += size
            self._buffered += size

    def _take_unary(self, call: Call, messages: list[bytes]) -> None:
        if len(messages) > 1:
            raise BadMessage(grpc.StatusCode.INTERNAL, _NOT_ONE_MESSAGE)
        self._start(call, messages[0])

    def _end_request(self, call: Call) -> None:
        """END_STREAM of the peer."""
        call.ended = True
        if call.queue is not None:
            call.queue.put_nowait(None)
        try:
            if call.deframer is not None:
                call.deframer.end()
            if call.task is None:
                raise BadMessage(grpc.StatusCode.INTERNAL, "the request has no message")
        except BadMessage as error:
            self._refuse(call, error.status)

    # --- calls ----------------------------------------------------------------------------------

    def _start(self, call: Call, content: bytes) -> None:
        if call.head.waits:
            # Decompressed a thousand times what came over the wire, and many in one pass of the
            # loop.
            self._count_queued(call, len(content))
        call.task = self._loop.create_task(
            self._serve(call, cast(Unary, call.head.method), content))

    async def _serve(self, call: Call, method: Unary, content: bytes) -> None:
        head = call.head
        if method.names_caller:
            audit.caller.set(_caller_of(self._transport))
        try:
            if method.turns is not None:
                await method.turns.enter()
            request = parse_request(method.parse, content)
            del content
            if call.queued_bytes:
                self._count_queued(call, -call.queued_bytes)
            message = method.serialize(
                await method.call(request, time_for_call(head.timeout_s)))
        except asyncio.CancelledError:
            # By us, then the call is gone already; or below, and the caller must not wait for it.
            self._refuse(call, CANCELLED)
            raise
        except Exception as error:
            self._refuse(call, refusal_of(error, head.path))
        else:
            self._respond(call, message)

    async def _serve_stream(self, call: Call, method: Stream,
                            queue: asyncio.Queue[bytes | None]) -> None:
        async def requests() -> AsyncIterator[Any]:
            while (content := await queue.get()) is not None:
                self._count_queued(call, -len(content))
                yield parse_request(method.parse, content)

        self._send_head(wire.response_head(call.stream_id))
        call.began = True
        status = Status(grpc.StatusCode.OK, "", ())
        try:
            async with contextlib.aclosing(method.call(requests())) as responses:
                async for response in responses:
                    sent = asyncio.Event()
                    self._windows.add(Outgoing(
                        call.stream_id, wire.prefixed(method.serialize(response)), b"", sent.set))
                    self._pump()
                    await sent.wait()
        except Exception as error:
            status = refusal_of(error, call.head.path)
        self._refuse(call, status)

    def _respond(self, call: Call, message: bytes) -> None:
        """The response of a unary call: at once where it fits, else as the peer lets us."""
        stream_id = call.stream_id
        if stream_id not in self._calls:
            return
        windows = self._windows
        size = len(message) + 5
        if (size <= windows.connection and size <= windows.max_frame_bytes
                and size <= windows.of(stream_id) and not windows.waiting
                and not self._write_paused):
            windows.connection -= size
            send = self._send_head if self._no_head_sent else self._send
            send(wire.whole_response(stream_id, message))
            self._finish(call, size)
            if not self._calls or size > LARGE_RESPONSE_BYTES:
                # There is no other response that could share the write, or no need to: a write
                # tells whether the peer reads.
                self._flush()
            return
        if (size > LARGE_RESPONSE_BYTES
                and windows.waiting_bytes + size > self._limits.max_waiting_bytes):
            self._refuse(call, refusal_of(Overloaded(
                f"{windows.waiting_bytes} bytes of responses wait for this client to take them",
                remedy="take responses faster, or ask for less at a time"), call.head.path))
            return
        self._send_head(wire.response_head(stream_id))
        call.began = True
        tail = _trailers(stream_id, Status(grpc.StatusCode.OK, "", ()), began=True)
        self._windows.add(Outgoing(stream_id, wire.prefixed(message), tail,
                                   lambda: self._finish(call, size)))
        self._pump()
        if size > LARGE_RESPONSE_BYTES:
            self._flush()

    def _refuse(self, call: Call, status: Status) -> None:
        """The response ends with a status. Whatever still runs for the call is cancelled."""
        if call.stream_id not in self._calls:
            return
        self._send_head(_trailers(call.stream_id, status, began=call.began))
        self._finish(call)
        if call.task is not None and call.task is not asyncio.current_task():
            call.task.cancel()

    def _finish(self, call: Call, size: int = 0) -> None:
        """The response, a message of `size` bytes, is out; a peer that is still sending is told to
        stop."""
        if not call.ended:
            self._send(wire.rst_stream(call.stream_id, Code.NO_ERROR))
        self._budget.answered(size)
        self._drop(call)
        self._windows.forget(call.stream_id)
        self._close_if_done()

    def _drop(self, call: Call) -> None:
        self._calls.pop(call.stream_id, None)
        self._buffered -= call.queued_bytes
        if call.deframer is not None:
            self._buffered -= call.deframer.buffered

    def _reset(self, call: Call, code: Code | None) -> None:
        """End a call without a response; RST_STREAM unless the peer sent it. Raises
        `ConnectionFailed` when the peer makes this side do so all the time (CVE-2025-8671)."""
        if code is not None:
            self._budget.spend()
        self._drop(call)
        self._windows.forget(call.stream_id)
        if call.task is not None:
            call.task.cancel()
        if code is not None:
            self._send(wire.rst_stream(call.stream_id, code))
        self._close_if_done()

    # --- the other frames -----------------------------------------------------------------------

    def _on_priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._budget.spend()
        if stream_id == 0:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "PRIORITY has 5 bytes")

    def _on_rst_stream(self, flags: int, stream_id: int, payload: bytes) -> None:
        call = self._calls.get(stream_id)
        if call is None:
            self._budget.spend_on_reset()
        else:
            self._budget.spend()
        if len(payload) != 4:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes")
        if stream_id == 0 or stream_id > self._last_stream_id:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "RST_STREAM on an idle stream")
        if call is not None:
            self._reset(call, None)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._budget.spend()
        if stream_id:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & wire.ACK:
            if payload:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "an acknowledgement is empty")
            return
        # Of a setting that is there many times the last counts: applying one looks at every stream.
        settings = dict(wire.parse_settings(payload))
        if (size := settings.get(wire.SETTINGS_INITIAL_WINDOW_SIZE)) is not None:
            self._windows.set_initial(size)
        if (size := settings.get(wire.SETTINGS_MAX_FRAME_SIZE)) is not None:
            self._windows.max_frame_bytes = size
        self._send(wire.SETTINGS_ACK)
        self._pump_due = True

    def _misplaced(self, flags: int, stream_id: int, payload: bytes) -> None:
        """PUSH_PROMISE; HEADERS and CONTINUATION are the reader's."""
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "a client promises nothing")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._budget.spend_on_ping()
        if stream_id:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "PING has 8 bytes")
        if not flags & wire.ACK:
            self._send(wire.frame(wire.PING, wire.ACK, 0, payload))
        elif payload == _GOODBYE and self._goodbye is not None:
            self._refuse_new_calls()

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) < 8:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "GOAWAY is malformed")
        if self._goodbye is not None:
            self._refuse_new_calls()
        self._going_away = True
        self._close_if_done()

    def _on_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes")
        increment = int.from_bytes(payload, "big") & wire.STREAM_ID_MASK
        if stream_id > self._last_stream_id:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
        if increment == 0:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        if stream_id and stream_id not in self._calls:
            self._budget.spend_on_update()
            return  # of a call that is over
        if self._windows.grow(stream_id, increment):
            self._pump_due = True
        else:
            self._reset(self._calls[stream_id], Code.FLOW_CONTROL_ERROR)

    # --- ends -----------------------------------------------------------------------------------

    def go_away(self) -> None:
        """Take no new calls once the peer knows; close when the running ones are answered. Streams,
        which last as long as their callers like, are ended after a moment in which they can still
        tell something."""
        if self._goodbye is not None:
            return
        if self._going_away:  # said by the peer
            self._loop.call_later(STREAM_GRACE_S, self._end_streams)
            return
        # What the peer began before it knew is served: it could not tell whether a write that is
        # refused here was. Its answer to the PING comes after all of that (RFC 9113, 6.8).
        self._send(wire.goaway(wire.STREAM_ID_MASK, Code.NO_ERROR)
                   + wire.frame(wire.PING, 0, 0, _GOODBYE))
        self._goodbye = self._loop.call_later(GOODBYE_S, self._refuse_new_calls)
        self._loop.call_later(STREAM_GRACE_S, self._end_streams)

    def _refuse_new_calls(self) -> None:
        if self._going_away:
            return
        self._going_away = True
        self._send(wire.goaway(self._last_stream_id, Code.NO_ERROR))
        self._loop.call_later(STREAM_GRACE_S, self._end_streams)
        self._close_if_done()

    def _end_streams(self) -> None:
        for call in [call for call in self._calls.values() if call.queue is not None]:
            self._refuse(call, _STOPPING)

    def abort(self, reason: str = "") -> None:
        """Close now, whatever is unsent; running calls are cancelled."""
        if reason:
            log.debug("connection given up", reason=reason)
        if self._transport is not None:
            self._transport.abort()

    def _close_if_done(self) -> None:
        """The peer closes: then it has read everything. Were this side first, whatever still comes
        from the peer would make the kernel reset the connection, and answers could be lost."""
        if self._going_away and not self._calls and self._end is None \
                and self._transport is not None and not self._transport.is_closing():
            if self._out:
                self._flush()
            self._end = self._loop.call_later(GOODBYE_S, self._close)

    def _close(self) -> None:
        """Over TLS, closing waits for the peer to say that it closes, too."""
        if self._transport is not None:
            self._transport.close()
            self._end = self._loop.call_later(GOODBYE_S, self.abort)


def _caller_of(transport: asyncio.Transport | None) -> str:
    """The common name of the caller's certificate, or its address where it has none."""
    if transport is None:
        return ""
    certificate = transport.get_extra_info("peercert") or {}
    for name in certificate.get("subject", ()):
        for field, value in name:
            if field == "commonName":
                return str(value)
    host, port = (transport.get_extra_info("peername") or ("", 0))[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _trailers(stream_id: int, status: Status, *, began: bool) -> bytes:
    """The frame that ends a response; with the fields that begin one where none was begun."""
    block = wire.status_fields(status.code.value[0], status.detail, status.trailers)
    if not began:
        block = wire.STATUS_200 + wire.CONTENT_TYPE_GRPC + block
    return wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, stream_id, block)
