"""Peer links over TCP: mutual TLS, or plain on loopback.

The member with the lower id dials; the other dials too when it has heard nothing for a while (a
joining node is not known to anybody yet). A new connection replaces the old one: the old one is
closed, and bytes that it still delivers are ignored, before anything of the new one is passed on.

Under TLS 1.3 a peer is its certificate: the id in its greeting must be one of the certificate's DNS
or URI names. The common name does not count, because a client's certificate has one too. Some tools
give a client's certificate the other names as well, so one with extended key usages must have the
server's among them. Anything unexpected ends that connection and nothing else.

Whoever has not greeted yet is a stranger, and needs no certificate to be one. There are few at a
time, so that they do not use up this node's descriptors, and the newest drives out the oldest, so
that they do not keep a member out.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

from elastickv.certs import allows_server
from elastickv.config import TlsFiles
from elastickv.errors import BindFailed, ConfigError, WireError
from elastickv.listening import Listener
from elastickv.logs import Seldom, get_logger
from elastickv.raft.frames import (
    PROTOCOL_VERSION,
    SLACK_BYTES,
    FrameDecoder,
    Hello,
    Ping,
    decode_message,
    encode_message,
    frame,
)
from elastickv.raft.links import LinkEvents
from elastickv.raft.name_lookup import NameLookup, ThreadedNameLookup
from elastickv.tls import link_context

log = get_logger("elastickv.raft.links")

REDIAL_S = 0.1
FALLBACK_DIAL_S = 1.0
DIAL_TIMEOUT_S = 2.0
MAX_GREETING_BYTES = 1 << 16
GREETING_TIMEOUT_S = 5.0
MAX_STRANGERS = 64
ACCEPTED_AT_ONCE = 16
"""Those that are driven out hold their descriptors for a few passes of the loop."""
WARN_EVERY_S = 60.0
PING_S = 0.5
SILENT_PINGS = 6
"""A link on which nothing arrived during this many pings is closed."""
QUEUE_BYTES = 64 << 20
"""What may wait on a link beside one message of the largest size: a peer that lets more wait does
not read."""
_PING_BODY = encode_message(Ping(reply=True))
_PONG_BODY = encode_message(Ping(reply=False))
_PING, _PONG = frame(_PING_BODY), frame(_PONG_BODY)


def certificate_names(certificate: Mapping[str, Any]) -> set[str]:
    """The node ids that a peer's certificate (as `getpeercert()` gives it) may speak for."""
    return {value for kind, value in certificate.get("subjectAltName", ())
            if kind in ("DNS", "URI")} - {"localhost"}


class _Connection(asyncio.Protocol):
    """One TCP connection: greeting, then frames both ways."""

    def __init__(self, owner: TlsLinks, peer_id: str) -> None:
        self._owner = owner
        self.peer_id = peer_id
        self.dialled = bool(peer_id)
        self.ready = False
        self.closed = False
        self.silent_pings = 0
        self.queue: list[bytes] = []
        self.settled = asyncio.Event()
        # Until it has greeted, nobody may make this node keep more than a greeting.
        self._decoder = FrameDecoder(MAX_GREETING_BYTES)
        self._transport: asyncio.Transport | None = None
        self._greeting_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.closed:
            self.abort()
            return
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._greeting_timer = asyncio.get_running_loop().call_later(GREETING_TIMEOUT_S,
                                                                     self.abort)
        self._owner.opened(self)
        if self._owner.secure and not (self._names() and self._may_be_a_node()):
            log.warning("link refused", peer=self.peer_id,
                        error="the peer's certificate is none of a node")
            self.abort()
            return
        if self.dialled:
            self._greet()

    def _greet(self) -> None:
        self.write(frame(encode_message(self._owner.events.make_hello(self.peer_id))))

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket."""
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    def write_queue(self) -> None:
        """Hand what waits in the queue to the socket."""
        queue, self.queue = self.queue, []
        if queue:
            self.write(queue[0] if len(queue) == 1 else b"".join(queue))

    def backlog(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def data_received(self, data: bytes) -> None:
        self.silent_pings = 0
        try:
            bodies = self._decoder.feed(data)
            while bodies:
                for body in bodies:
                    if self.closed:
                        return
                    if self.ready:
                        self._owner.deliver(self, body)
                    else:
                        self._receive_greeting(body)
                bodies = self._decoder.feed(b"") if self._decoder.has_more() else []
            if self._decoder.holds_part() and self.ready and not self.closed:
                self._owner.events.receiving(self.peer_id)
        except WireError as error:
            log.warning("link refused", peer=self.peer_id, error=str(error))
            self.abort()

    def _receive_greeting(self, body: bytes) -> None:
        hello = decode_message(body)
        if not isinstance(hello, Hello):
            raise WireError("the peer did not greet first")
        self._check(hello)
        if not self.dialled:
            self.peer_id = hello.node_id
            self._greet()
        if self._greeting_timer is not None:
            self._greeting_timer.cancel()
        self._decoder.max_bytes = self._owner.max_frame_bytes
        self._owner.greeted(self, hello)

    def _check(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise WireError(f"the peer speaks protocol version {hello.version}")
        if hello.node_id == self._owner.node_id:
            raise WireError("the peer has this node's own id")
        if self.dialled and hello.node_id != self.peer_id:
            raise WireError(f"the peer is {hello.node_id!r}, not {self.peer_id!r}")
        if hello.cluster_id:
            raise WireError("the peer belongs to another cluster")
        if self._owner.secure and hello.node_id not in self._names():
            raise WireError(f"the peer's certificate is not for {hello.node_id!r}")

    def _names(self) -> set[str]:
        if self._transport is None:
            return set()
        return certificate_names(self._transport.get_extra_info("peercert") or {})

    def _may_be_a_node(self) -> bool:
        if self._transport is None:
            return False
        certificate = self._transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return certificate is not None and allows_server(certificate)

    def connection_lost(self, error: Exception | None) -> None:
        if self._greeting_timer is not None:
            self._greeting_timer.cancel()
        self.closed = True
        self.settled.set()
        self._owner.lost(self)

    def abort(self) -> None:
        """Close without waiting; nothing more is delivered."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


class TlsLinks:
    """`Links` over TCP. `tls` None is plain text, for loopback only (the caller checks that).

    `dial_from` is the host that its own connections come from; "" lets the system choose.
    `make_listener`, `names` and the loop's `create_connection` and `connect_accepted_socket` are
    all that it asks of the network.
    """

    def __init__(self, node_id: str, listen_address: str, *, tls: TlsFiles | None,
                 max_entry_bytes: int, dial_from: str = "",
                 generator: random.Random | None = None,
                 make_listener: type[Listener] = Listener,
                 names: NameLookup | None = None) -> None:
        self.node_id = node_id
        self.secure = tls is not None
        self.max_frame_bytes = max_entry_bytes + SLACK_BYTES
        self._max_backlog_bytes = QUEUE_BYTES + self.max_frame_bytes
        self._listen_address = listen_address
        self._dial_from = (dial_from, 0) if dial_from else None
        self._server_context = link_context(tls, server=True) if tls else None
        self._client_context = link_context(tls, server=False) if tls else None
        self._generator = generator or random.Random()
        self._names = names or ThreadedNameLookup()
        self._addresses: dict[str, str] = {}
        self._current: dict[str, _Connection] = {}
        # Dictionaries for their order: a set of connections has another in every process.
        self._open: dict[_Connection, None] = {}
        self._dirty: dict[_Connection, None] = {}
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._silent_since: dict[str, float] = {}
        self._complained: set[str] = set()
        self._listener = make_listener(self._accepted, at_once=ACCEPTED_AT_ONCE)
        self._strangers: dict[_Connection, socket.socket] = {}
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._warning = Seldom(WARN_EVERY_S)
        self._flush_scheduled = False
        self._stopped = False
        self.port = 0

    # --- Links --------------------------------------------------------------------------------

    async def start(self, events: LinkEvents) -> None:
        self.events = events
        self._loop = asyncio.get_running_loop()
        host, port = split_address(self._listen_address)
        try:
            self.port = await self._listener.open(host, port)
        except OSError as error:
            raise BindFailed(f"cannot listen on {self._listen_address} ({error.strerror})",
                             remedy="check --raftAddress and --raft-listen-address") from None
        self._repeat(REDIAL_S, self._redial)
        self._repeat(PING_S, self._ping)

    def _repeat(self, period_s: float, work: Callable[[], None]) -> None:
        def run() -> None:
            if not self._stopped:
                work()
                self._loop.call_later(period_s * (0.9 + 0.2 * self._generator.random()), run)

        self._loop.call_soon(run)

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._listener.close()
        for task in list(self._dialling.values()):
            task.cancel()
        self.flush()
        for connection in list(self._strangers):
            self._drive_out(connection)
        for connection in list(self._open):
            connection.abort()
        await asyncio.gather(*self._dialling.values(), *self._handshakes, return_exceptions=True)

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        self._addresses = {peer: address for peer, address in addresses.items()
                           if peer != self.node_id}
        now = self._loop.time()
        for peer_id in self._addresses:
            self._silent_since.setdefault(peer_id, now)

    def send(self, peer_id: str, body: bytes) -> bool:
        connection = self._current.get(peer_id)
        if connection is None:
            return False
        if connection.backlog() > self._max_backlog_bytes:
            log.warning("link dropped", peer=peer_id, error="the peer does not read")
            self._loop.call_soon(connection.abort)
            return False
        connection.queue.append(frame(body))
        self._dirty[connection] = None
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self.flush)
        return True

    def flush(self) -> None:
        self._flush_scheduled = False
        if not self._dirty:
            return
        dirty, self._dirty = self._dirty, {}
        for connection in dirty:
            connection.write_queue()

    def drop(self, peer_id: str) -> None:
        connection = self._current.get(peer_id)
        if connection is not None:
            # A member that leaves hands its leadership over just before it halts.
            connection.write_queue()
            connection.closed = True
            self._loop.call_soon(connection.abort)

    # --- connections --------------------------------------------------------------------------

    def _accepted(self, accepted: socket.socket) -> None:
        if len(self._strangers) >= MAX_STRANGERS:
            self._drive_out(next(iter(self._strangers)))
            self._warn()
        connection = _Connection(self, "")
        self._strangers[connection] = accepted
        handshake = self._loop.create_task(self._shake_hands(connection, accepted))
        self._handshakes[handshake] = None
        handshake.add_done_callback(self._handshakes.pop)

    def _warn(self) -> None:
        if self._warning.due(self._loop.time()):
            log.warning("links are closed before they have greeted: there are too many",
                        strangers=len(self._strangers))

    async def _shake_hands(self, connection: _Connection, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # ssl.SSLError is one
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=self._server_context,
                ssl_handshake_timeout=GREETING_TIMEOUT_S if self.secure else None)
        if connection not in self._open:
            self._strangers.pop(connection, None)

    def _drive_out(self, connection: _Connection) -> None:
        """End a connection that has not greeted, wherever it is: while hands are shaken only the
        socket can be reached, and whoever shakes them closes it."""
        accepted = self._strangers.pop(connection)
        connection.abort()
        with contextlib.suppress(OSError):
            accepted.shutdown(socket.SHUT_RDWR)

    def opened(self, connection: _Connection) -> None:
        """A TCP (and TLS) connection stands; it has not greeted yet."""
        self._open[connection] = None
        if self._stopped:
            connection.abort()

    def greeted(self, connection: _Connection, hello: Hello) -> None:
        """The newest connection of a peer wins; the old one ends before it is announced."""
        old = self._current.get(connection.peer_id)
        if old is not None:
            old.abort()
            self._forget(old)
        connection.ready = True
        connection.settled.set()
        self._strangers.pop(connection, None)
        self._complained.discard(connection.peer_id)
        self._current[connection.peer_id] = connection
        self.events.connected(connection.peer_id, hello)

    def deliver(self, connection: _Connection, body: bytes) -> None:
        """One body from a current connection."""
        if body == _PING_BODY:
            connection.write(_PONG)
        elif body != _PONG_BODY:
            self.events.received(connection.peer_id, body)

    def lost(self, connection: _Connection) -> None:
        """The connection is gone."""
        self._open.pop(connection, None)
        self._strangers.pop(connection, None)
        self._dirty.pop(connection, None)
        if self._current.get(connection.peer_id) is connection:
            self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        del self._current[connection.peer_id]
        self._dirty.pop(connection, None)
        self._silent_since[connection.peer_id] = self._loop.time()
        self.events.disconnected(connection.peer_id)

    # --- dialling and pinging -----------------------------------------------------------------

    def _redial(self) -> None:
        now = self._loop.time()
        for peer_id, address in self._addresses.items():
            if peer_id in self._current or peer_id in self._dialling:
                continue
            if self.node_id < peer_id \
                    or now - self._silent_since.get(peer_id, 0.0) > FALLBACK_DIAL_S:
                self._dialling[peer_id] = self._loop.create_task(self._dial(peer_id, address))

    async def _dial(self, peer_id: str, address: str) -> None:
        connection = _Connection(self, peer_id)
        try:
            host, port = split_address(address)
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await self._connect(connection, host, port)
                self._silent_since[peer_id] = self._loop.time()
                await connection.settled.wait()
        except (OSError, ConfigError) as error:  # TimeoutError and ssl.SSLError among them
            connection.abort()
            self._complain(peer_id, address, error)
        except asyncio.CancelledError:
            connection.abort()
        finally:
            self._dialling.pop(peer_id, None)

    async def _connect(self, connection: _Connection, host: str, port: int) -> None:
        """Raises the last address's `OSError`."""
        *others, last = await self._names.addresses(host)
        for address in others:
            with contextlib.suppress(OSError):
                await self._connect_to(connection, host, address, port)
                return
        await self._connect_to(connection, host, last, port)

    async def _connect_to(self, connection: _Connection, host: str, address: str,
                          port: int) -> None:
        await self._loop.create_connection(
            lambda: connection, address, port, ssl=self._client_context,
            server_hostname=host if self.secure else None, local_addr=self._dial_from)

    def _complain(self, peer_id: str, address: str, error: Exception) -> None:
        """Once per peer until it is connected: the next attempt is only 100 ms away."""
        if peer_id not in self._complained:
            self._complained.add(peer_id)
            log.warning("peer not reached", peer=peer_id, address=address,
                        error=str(error) or type(error).__name__)

    def _ping(self) -> None:
        """Counts pings, not seconds: a process that was stopped must not blame its peers."""
        for connection in list(self._current.values()):
            connection.silent_pings += 1
            if connection.silent_pings > SILENT_PINGS:
                connection.abort()
            else:
                connection.write(_PING)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` as a pair. Raises `ConfigError`."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():
        raise ConfigError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)
