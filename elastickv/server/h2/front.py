"""The listener of the HTTP/2 front."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from elastickv import logs
from elastickv.config import TlsFiles
from elastickv.descriptors import MAX_CONNECTIONS
from elastickv.errors import BindFailed
from elastickv.listening import Listener
from elastickv.server.h2.connection import H2Connection, Limits
from elastickv.server.h2.head import table_of
from elastickv.server.methods import Services
from elastickv.tls import listener_context

MIN_BUFFERED_BYTES = 64 << 20
MIN_WAITING_BYTES = 256 << 20
ACCEPTED_AT_ONCE = 32
"""In one pass of the loop: a TLS handshake costs it about a millisecond."""
MAX_ENDING = 64
"""Of handshakes in one pass of the loop: their descriptors are free in the next."""
TLS_TIMEOUT_S = 10.0
WARN_EVERY_S = 60.0

log = logs.get_logger(__name__)


class _Handshake:
    """A connection that is not up yet."""

    __slots__ = ("begun", "socket", "task")

    def __init__(self, accepted: socket.socket,
                 shake_hands: Callable[[_Handshake], Coroutine[Any, Any, None]]) -> None:
        self.socket = accepted
        self.begun = False  # the loop owns the socket
        self.task = asyncio.get_running_loop().create_task(shake_hands(self))

    def end(self) -> None:
        """Close it."""
        self.task.cancel()
        if not self.begun:
            self.socket.close()


class H2Front:
    """Serves a table of methods on one port, at most `max_connections` at a time. Handshakes count:
    they hold descriptors like any other connection, and anybody can begin one. So the oldest one,
    which had the most time, makes room for a newcomer; a client that is served never does."""

    def __init__(self, services: Services, *, max_message_bytes: int,
                 max_connections: int = MAX_CONNECTIONS) -> None:
        self._table = table_of(services, max_message_bytes=max_message_bytes)
        self._limits = Limits(max_message_bytes, max(MIN_BUFFERED_BYTES, 4 * max_message_bytes),
                              max(MIN_WAITING_BYTES, 4 * max_message_bytes))
        self._max_connections = max_connections
        self._listener = Listener(self._accepted, at_once=ACCEPTED_AT_ONCE)
        self._context: ssl.SSLContext | None = None
        self._warning = logs.Seldom(WARN_EVERY_S)
        self._stopping = False
        self._handshakes: dict[H2Connection, _Handshake] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._connections: set[H2Connection] = set()
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    async def start(self, host: str, port: int, tls: TlsFiles | None) -> int:
        """Serve on `host`; the port. Raises `BindFailed`, `ConfigError`."""
        self._context = listener_context(tls) if tls is not None else None
        try:
            return await self._listener.open(host, port)
        except OSError as error:
            raise BindFailed(f"cannot listen on {host}:{port}: {error.strerror or error}",
                             remedy="stop what uses it, or choose another --address") from None

    def _accepted(self, accepted: socket.socket) -> None:
        if len(self._handshakes) + len(self._connections) >= self._max_connections:
            self._warn()
            if not self._make_room():
                accepted.close()
                return
        connection = H2Connection(self._table, self._limits, self._opened, self._closed)
        self._handshakes[connection] = _Handshake(
            accepted, partial(self._shake_hands, connection))

    def _make_room(self) -> bool:
        """Give up the oldest handshake, if there is one. Without TLS a connection is up at once."""
        if self._context is None or not self._handshakes or len(self._ending) >= MAX_ENDING:
            return False
        handshake = self._handshakes.pop(next(iter(self._handshakes)))
        handshake.end()
        self._ending.add(handshake.task)
        handshake.task.add_done_callback(self._ending.discard)
        return True

    def _warn(self) -> None:
        if self._warning.due(asyncio.get_running_loop().time()):
            log.warning("client connections are closed: there are too many",
                        handshakes=len(self._handshakes), connections=len(self._connections))

    async def _shake_hands(self, connection: H2Connection, handshake: _Handshake) -> None:
        handshake.begun = True
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, handshake.socket, ssl=self._context,
                ssl_handshake_timeout=None if self._context is None else TLS_TIMEOUT_S)
        except OSError as error:  # ssl.SSLError is one
            log.debug("handshake failed", error=type(error).__name__, reason=str(error))
        finally:
            self._handshakes.pop(connection, None)

    def _opened(self, connection: H2Connection) -> None:
        self._handshakes.pop(connection, None)
        self._connections.add(connection)
        self._all_gone.clear()
        if self._stopping:  # it was on its way when the listener closed
            connection.go_away()

    def _closed(self, connection: H2Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()

    async def stop(self, grace_s: float) -> None:
        """Take no new calls once the clients know; let running ones end within `grace_s`
        seconds."""
        self._stopping = True
        self._listener.close()
        for handshake in list(self._handshakes.values()):
            handshake.end()
        for connection in list(self._connections):
            connection.go_away()
        try:
            async with asyncio.timeout(grace_s):
                await self._all_gone.wait()
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
            await self._all_gone.wait()
