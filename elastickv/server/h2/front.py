"""The listener of the HTTP/2 front."""

from __future__ import annotations

import asyncio

from elastickv.errors import BindFailed
from elastickv.server.h2.connection import H2Connection, Limits
from elastickv.server.h2.head import table_of
from elastickv.server.methods import Services
from elastickv.server.tls import ServerTls

BACKLOG = 1024
MIN_BUFFERED_BYTES = 64 << 20


class H2Front:
    """Serves a table of methods on one listening socket."""

    def __init__(self, services: Services, *, max_message_bytes: int) -> None:
        self._table = table_of(services)
        self._limits = Limits(max_message_bytes, max(MIN_BUFFERED_BYTES, 4 * max_message_bytes))
        self._server: asyncio.Server | None = None
        self._stopping = False
        self._connections: set[H2Connection] = set()
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    async def start(self, host: str, port: int, tls: ServerTls | None) -> int:
        """Serve on `host`; the port. Raises `BindFailed`, `ConfigError`."""
        context = tls.ssl_context() if tls is not None else None
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._connect, host, port, ssl=context, backlog=BACKLOG)
        except OSError as error:
            raise BindFailed(f"cannot listen on {host}:{port}: {error.strerror or error}",
                             remedy="stop what uses it, or choose another --address") from None
        return int(self._server.sockets[0].getsockname()[1])

    def _connect(self) -> H2Connection:
        return H2Connection(self._table, self._limits, self._opened, self._closed)

    def _opened(self, connection: H2Connection) -> None:
        self._connections.add(connection)
        self._all_gone.clear()
        if self._stopping:  # its TLS handshake outlived the listener
            connection.go_away()

    def _closed(self, connection: H2Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s` seconds."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.go_away()
        try:
            async with asyncio.timeout(grace_s):
                await self._all_gone.wait()
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
            await self._all_gone.wait()
