"""Flow control of what this side sends: the peer's windows, and what waits for them. No I/O.

Most responses fit every window and never come here; the rest waits in `Outgoing` items and is sent
a frame at a time in turn, so that one large response does not hold up the others. Streams whose own
window is used up are kept apart: a peer that opens its windows a byte at a time costs no search.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from elastickv.server.h2 import wire
from elastickv.server.h2.wire import Code, ConnectionFailed


class Outgoing:
    """Bytes of one stream that wait for window. `tail` is a whole frame that ends the stream, b""
    while more may follow; `on_sent()` is for when everything is out."""

    __slots__ = ("content", "on_sent", "position", "stream_id", "tail")

    def __init__(self, stream_id: int, content: bytes, tail: bytes,
                 on_sent: Callable[[], None]) -> None:
        self.stream_id = stream_id
        self.content = memoryview(content)
        self.position = 0
        self.tail = tail
        self.on_sent = on_sent


class SendWindows:
    """What the peer lets us send, per stream and in all, and the items that wait for it."""

    def __init__(self) -> None:
        self.connection = wire.DEFAULT_WINDOW
        self.max_frame_bytes = wire.DEFAULT_MAX_FRAME_BYTES
        self._initial = wire.DEFAULT_WINDOW
        # Difference to the initial window, of streams that have one: a change of the initial
        # window then holds for every stream at once.
        self._offsets: dict[int, int] = {}
        # By stream: those that only the connection's window can hold back, and the others.
        self._ready: OrderedDict[int, Outgoing] = OrderedDict()
        self._blocked: dict[int, Outgoing] = {}
        self._all_changed = False
        self.waiting_bytes = 0

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._ready) + len(self._blocked)

    def of(self, stream_id: int) -> int:
        """The stream's window; it can be negative after the initial window has shrunk."""
        return self._initial + self._offsets.get(stream_id, 0)

    def take(self, stream_id: int, size: int) -> None:
        """`size` bytes of DATA were sent."""
        self.connection -= size
        self._offsets[stream_id] = self._offsets.get(stream_id, 0) - size

    def forget(self, stream_id: int) -> None:
        """The stream is over; what it still had to send is dropped."""
        self._offsets.pop(stream_id, None)
        item = self._ready.pop(stream_id, None) or self._blocked.pop(stream_id, None)
        if item is not None:
            self.waiting_bytes -= len(item.content) - item.position

    def grow(self, stream_id: int, increment: int) -> bool:
        """WINDOW_UPDATE of a stream (or 0, the connection); False when the stream's window
        overflows. Raises `ConnectionFailed` when the connection's does."""
        if stream_id == 0:
            self.connection += increment
            if self.connection > wire.MAX_WINDOW:
                raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "the connection window overflows")
            return True
        self._offsets[stream_id] = self._offsets.get(stream_id, 0) + increment
        self._unblock(stream_id)
        return self.of(stream_id) <= wire.MAX_WINDOW

    def set_initial(self, size: int) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE. Raises `ConnectionFailed` when a window overflows."""
        self._initial = size
        if self._offsets and max(self._offsets.values()) + size > wire.MAX_WINDOW:
            raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "a stream's window overflows")
        # Looked at in `pump`, once for any number of settings.
        self._all_changed = True

    def _unblock(self, stream_id: int) -> None:
        if stream_id in self._blocked and self.of(stream_id) > 0:
            self._ready[stream_id] = self._blocked.pop(stream_id)

    def add(self, item: Outgoing) -> None:
        """Let `item` wait behind the others; at most one of a stream at a time."""
        self.waiting_bytes += len(item.content)
        self._queue(item)

    def _queue(self, item: Outgoing) -> None:
        if self.of(item.stream_id) > 0:
            self._ready[item.stream_id] = item
        else:
            self._blocked[item.stream_id] = item

    def pump(self) -> tuple[list[bytes | memoryview], list[Outgoing]]:
        """The frames that may go now, streams taking turns, and the items that end with them. A
        frame may come in pieces: a view of a large response is no copy of it."""
        frames: list[bytes | memoryview] = []
        done: list[Outgoing] = []
        if self._all_changed:
            self._all_changed = False
            for stream_id in list(self._blocked):
                self._unblock(stream_id)
        while self._ready and self.connection > 0:
            _, item = self._ready.popitem(last=False)
            frames += self._next_frame(item)
            if item.position < len(item.content):
                self._queue(item)
                continue
            if item.tail:
                frames.append(item.tail)
            done.append(item)
        return frames, done

    def _next_frame(self, item: Outgoing) -> tuple[bytes | memoryview, ...]:
        rest = len(item.content) - item.position
        size = min(self.connection, self.of(item.stream_id), self.max_frame_bytes, rest)
        if size <= 0:
            return ()
        chunk = item.content[item.position:item.position + size]
        item.position += size
        self.waiting_bytes -= size
        self.take(item.stream_id, size)
        return wire.frame_header(wire.DATA, 0, item.stream_id, size), chunk
