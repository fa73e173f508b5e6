"""/metrics, /livez and /readyz over plain HTTP, in the node's own loop.

    /livez   200 while the loop runs: restart the process if it stays away
    /readyz  200 when a linearizable read would be answered now and nothing keeps the node from
             taking writes, else 503 and the reason
    /metrics Prometheus text

Nothing served here is secret: counters and ids only. Bind it to loopback or to a monitoring
network. Whoever reaches the port holds at most `MAX_CONNECTIONS` descriptors, and keeps nobody else
from an answer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web

from elastickv.errors import BindFailed, ElasticKVError
from elastickv.listening import bind_each
from elastickv.metrics import Metrics
from elastickv.raft.engine import RaftEngine

MAX_CONNECTIONS: Final = 64
IDLE_TIMEOUT_S = 10.0
READY_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 2 * READY_TIMEOUT_S

Page = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _BoundedServer(web.Server):
    """Ends its oldest connection for one too many: a probe that finds the port occupied would have
    a healthy node restarted."""

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        made = [each.transport for each in self.connections
                if each.transport is not None and not each.transport.is_closing()]
        if len(made) > MAX_CONNECTIONS:
            made[0].abort()


class HttpServer:
    """The HTTP endpoint of one node. `problem()` is "" or why the node takes no writes."""

    def __init__(self, host: str, port: int, metrics: Metrics, engine: RaftEngine,
                 problem: Callable[[], str]) -> None:
        self._host = host
        self._port = port
        self._metrics = metrics
        self._engine = engine
        self._problem = problem
        self._pages: Mapping[str, Page] = {
            "/metrics": self._serve_metrics, "/livez": self._serve_live,
            "/readyz": self._serve_ready}
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        """Bind and serve. Raises `BindFailed`."""
        # A connection on which no request was ever whole counts as idle.
        server = _BoundedServer(self._serve, keepalive_timeout=IDLE_TIMEOUT_S, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=STOP_TIMEOUT_S)
        await self._runner.setup()
        try:
            addresses = await asyncio.get_running_loop().getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM)
            for bound in bind_each(addresses):
                await web.SockSite(self._runner, bound).start()
        except OSError as error:
            raise BindFailed(f"cannot listen on {self._host}:{self._port}: {error.strerror}",
                             remedy="choose another --metrics-address") from None

    async def stop(self) -> None:
        """Close. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        page = self._pages.get(request.path)
        if page is None:
            raise web.HTTPNotFound
        if request.method not in ("GET", "HEAD"):
            raise web.HTTPMethodNotAllowed(request.method, ("GET", "HEAD"))
        return await page(request)

    async def _serve_metrics(self, request: web.BaseRequest) -> web.Response:
        return web.Response(body=self._metrics.render(),
                            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _serve_live(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text="ok\n")

    async def _serve_ready(self, request: web.BaseRequest) -> web.Response:
        problem = self._problem()
        if not problem:
            try:
                await self._engine.read_index(timeout_s=READY_TIMEOUT_S)
            except ElasticKVError as error:
                problem = str(error)
        if problem:
            return web.Response(text=problem + "\n", status=503)
        return web.Response(text="ok\n")
