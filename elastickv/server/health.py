"""`grpc.health.v1.Health`: one state per service, kept by whoever knows, watched by anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from grpc_health.v1 import health_pb2 as pb

from elastickv.errors import CallerError
from elastickv.server.methods import Methods, Stream, unary

SERVICE = "grpc.health.v1.Health"


class UnknownService(CallerError):
    """Health was asked about a service that this node does not have."""

    grpc_status = "NOT_FOUND"


class Health:
    """The health service. Serves nothing until `set` says so."""

    def __init__(self) -> None:
        self._states: dict[str, bool] = {}
        self._changed = asyncio.Event()

    def methods(self) -> Methods:
        """Methods by name."""
        return {
            "Check": unary(self.check, pb.HealthCheckRequest, pb.HealthCheckResponse),
            "Watch": Stream(self.watch, pb.HealthCheckRequest.FromString,
                            pb.HealthCheckResponse.SerializeToString),
        }

    def set(self, states: Mapping[str, bool]) -> None:
        """Replace the states: service name ("" = the whole node) to whether it serves."""
        if self._states != states:
            self._states = dict(states)
            self._changed.set()
            self._changed = asyncio.Event()

    async def check(self, request: pb.HealthCheckRequest,
                    timeout_s: float) -> pb.HealthCheckResponse:
        """Raises `UnknownService`."""
        status = self._status(request.service)
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
            raise UnknownService(f"there is no service {request.service[:100]!r}",
                                 remedy="ask for RawKV, EncryptionAdmin, RaftAdmin, or nothing")
        return pb.HealthCheckResponse(status=status)

    async def watch(self, requests: AsyncIterator[Any]
                    ) -> AsyncGenerator[pb.HealthCheckResponse, None]:
        """The state now, and again after every change."""
        service = ""
        async for request in requests:
            service = request.service
            break
        told: Any = None
        while True:
            changed = self._changed
            status = self._status(service)
            if status != told:
                told = status
                yield pb.HealthCheckResponse(status=status)
            await changed.wait()

    def _status(self, service: str) -> Any:
        serving = self._states.get(service)
        if serving is None:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        return pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
