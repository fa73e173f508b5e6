"""/metrics, /livez and /readyz over plain HTTP, in the node's own loop.

    /livez   200 while the loop runs: restart the process if it stays away
    /readyz  200 when a linearizable read would be answered now and nothing keeps the node from
             taking writes, else 503 and the reason
    /metrics Prometheus text

Nothing served here is secret: counters and ids only. Bind it to loopback or to a monitoring
network.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from elastickv.errors import BindFailed, ElasticKVError
from elastickv.metrics import Metrics
from elastickv.raft.engine import RaftEngine

READY_TIMEOUT_S = 1.0


class HttpServer:
    """The HTTP endpoint of one node. `problem()` is "" or why the node takes no writes."""

    def __init__(self, host: str, port: int, metrics: Metrics, engine: RaftEngine,
                 problem: Callable[[], str]) -> None:
        self._host = host
        self._port = port
        self._metrics = metrics
        self._engine = engine
        self._problem = problem
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Bind and serve. Raises `BindFailed`."""
        application = web.Application()
        application.router.add_get("/metrics", self._serve_metrics)
        application.router.add_get("/livez", self._serve_live)
        application.router.add_get("/readyz", self._serve_ready)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            raise BindFailed(f"cannot listen on {self._host}:{self._port}: {error.strerror}",
                             remedy="choose another --metrics-address") from None

    async def stop(self) -> None:
        """Close. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(),
                            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _serve_live(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _serve_ready(self, request: web.Request) -> web.Response:
        problem = self._problem()
        if not problem:
            try:
                await self._engine.read_index(timeout_s=READY_TIMEOUT_S)
            except ElasticKVError as error:
                problem = str(error)
        if problem:
            return web.Response(text=problem + "\n", status=503)
        return web.Response(text="ok\n")
