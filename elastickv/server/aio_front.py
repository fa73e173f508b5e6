"""The grpc.aio front: several server objects on one port.

`grpc.aio` accepts one call per completion-queue round trip, so one server object tops out well
below what the rest of the node can do; several of them share the port through SO_REUSEPORT and the
kernel spreads connections over them. Handlers are registered as generic ones:
`add_registered_method_handlers` would make every accept wait on one future per method. There are
no interceptors and no context calls on the hot path: each costs a share of the rate.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc

from elastickv import audit
from elastickv.config import TlsFiles
from elastickv.errors import BindFailed
from elastickv.server.errors import CANCELLED, refusal_of
from elastickv.server.methods import (
    Services,
    Stream,
    Unary,
    parse_request,
    time_for_call,
    too_large,
)
from elastickv.tls import listener_context

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 1),
    ("grpc.http2.bdp_probe", 0),  # its pings cost a tenth of the throughput on loopback
    ("grpc.max_concurrent_streams", 4096),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # the one that counts, where gRPC knows it
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
)


def caller_of(context: Context) -> str:
    """The common name of the caller's certificate, or its address where it has none."""
    names = context.auth_context().get("x509_common_name")
    if names:
        return next(iter(names)).decode(errors="replace")
    return unquote(context.peer()).partition(":")[2]


def unary_handler(name: str, method: Unary) -> Handler:
    """A gRPC handler around a `Unary`."""
    call, parse, names_caller = method.call, method.parse, method.names_caller
    turns = method.turns
    max_message_bytes = method.max_message_bytes

    async def handle(content: bytes, context: Context) -> Any:
        if len(content) > max_message_bytes:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED,
                                too_large(len(content), max_message_bytes))
        if names_caller:
            audit.caller.set(caller_of(context))
        try:
            if turns is not None:
                await turns.enter()
            return await call(parse_request(parse, content),
                              time_for_call(context.time_remaining()))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the caller has gone
            status = CANCELLED
        except Exception as error:
            status = refusal_of(error, name)
        return await context.abort(status.code, status.detail, status.trailers)

    return grpc.unary_unary_rpc_method_handler(handle, response_serializer=method.serialize)


def stream_handler(method: Stream) -> Handler:
    """A gRPC handler around a `Stream`."""
    call = method.call

    async def handle(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for response in call(requests):
            yield response

    return grpc.stream_stream_rpc_method_handler(
        handle, request_deserializer=method.parse, response_serializer=method.serialize)


def generic_handlers(services: Services) -> list[grpc.GenericRpcHandler[Any, Any]]:
    """One generic handler per service."""
    return [
        grpc.method_handlers_generic_handler(service, {
            name: unary_handler(f"/{service}/{name}", method) if isinstance(method, Unary)
            else stream_handler(method)
            for name, method in methods.items()})
        for service, methods in services.items()]


class AioFront:
    """Serves a table of methods over grpc.aio, each server at most its share of `max_connections`
    at a time. Handshakes count."""

    def __init__(self, services: Services, *, accept_loops: int, max_message_bytes: int,
                 max_connections: int) -> None:
        self._services = services
        self._accept_loops = accept_loops
        self._options = [*OPTIONS, ("grpc.max_receive_message_length", max_message_bytes),
                         ("grpc.max_send_message_length", -1),
                         ("grpc.max_allowed_incoming_connections",
                          max(1, max_connections // accept_loops))]
        self._servers: list[grpc.aio.Server] = []

    async def start(self, host: str, port: int, tls: TlsFiles | None) -> int:
        """Serve on `host`; the port. Raises `BindFailed`, `ConfigError`."""
        credentials = _credentials(tls) if tls is not None else None
        for _ in range(self._accept_loops):
            server = grpc.aio.server(options=self._options)
            server.add_generic_rpc_handlers(generic_handlers(self._services))
            port = _bind(server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                         credentials)
            self._servers.append(server)
        for server in self._servers:
            await server.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s` seconds."""
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.stop(grace_s) for server in servers))


def _credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """grpc.aio accepts any bytes and fails later without a reason, so the files are checked first.
    It offers no way to refuse sessions that are taken up again. Raises `ConfigError`."""
    listener_context(files)
    return grpc.ssl_server_credentials([(files.key.read_bytes(), files.cert.read_bytes())],
                                       files.ca.read_bytes(), require_client_auth=True)


def _bind(server: grpc.aio.Server, address: str,
          credentials: grpc.ServerCredentials | None) -> int:
    try:
        port = (server.add_secure_port(address, credentials) if credentials is not None
                else server.add_insecure_port(address))
    except RuntimeError:
        port = 0
    if not port:
        raise BindFailed(f"cannot listen on {address}",
                         remedy="check --address, and what else listens there")
    return port
