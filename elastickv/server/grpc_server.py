"""The gRPC server: several accept loops on one port, health, optional reflection, mutual TLS.

`grpc.aio` accepts one call per completion-queue round trip, so one server object tops out well
below what the rest of the node can do; several of them share the port through SO_REUSEPORT and the
kernel spreads connections over them. Handlers are registered as generic ones:
`add_registered_method_handlers` would make every accept wait on one future per method.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from elastickv.errors import BindFailed, ConfigError
from elastickv.kv.api import EncryptionApi, KvApi
from elastickv.raft.engine import RaftEngine
from elastickv.server.admin_service import EncryptionAdmin
from elastickv.server.kv_service import Handlers, RawKv, TransactionalKv
from elastickv.server.raft_admin import RaftAdmin

MESSAGE_SLACK_BYTES = 2 << 20
HEALTH_SERVICE = "grpc.health.v1.Health"

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 1),
    ("grpc.http2.bdp_probe", 0),  # its pings cost a tenth of the throughput on loopback
    ("grpc.max_concurrent_streams", 4096),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files: this server's certificate and key, and the CA that clients must be signed by."""

    cert: Path
    key: Path
    ca: Path

    def credentials(self) -> grpc.ServerCredentials:
        """Mutual TLS. Raises `ConfigError` when a file cannot be read."""
        try:
            pairs = [(self.key.read_bytes(), self.cert.read_bytes())]
            return grpc.ssl_server_credentials(pairs, self.ca.read_bytes(),
                                               require_client_auth=True)
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}",
                              remedy="check --tls-cert, --tls-key and --tls-ca") from None


def probe_port(host: str, port: int) -> None:
    """Raise `BindFailed` if the address is taken. SO_REUSEPORT would let a second node bind
    silently and steal half of the calls, so the port is first tried without it."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise BindFailed(f"cannot listen on {host}:{port}: {error.strerror}",
                         remedy="stop what uses it, or choose another --address") from None


def merge_handlers(services: dict[str, Handlers]) -> list[grpc.GenericRpcHandler[Any, Any]]:
    """One generic handler per service."""
    return [grpc.method_handlers_generic_handler(name, handlers)
            for name, handlers in services.items()]


class GrpcServer:
    """All services of one node on one client address."""

    def __init__(self, host: str, port: int, *, kv: KvApi, encryption: EncryptionApi,
                 engine: RaftEngine, tls: ServerTls | None, accept_loops: int, reflection: bool,
                 max_value_bytes: int) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._accept_loops = accept_loops
        self._reflection = reflection
        self._max_message_bytes = max_value_bytes + MESSAGE_SLACK_BYTES
        self._engine = engine
        self._services: dict[str, Handlers] = {
            "RawKV": RawKv(kv).handlers(),
            "TransactionalKV": TransactionalKv(kv).handlers(),
            "EncryptionAdmin": EncryptionAdmin(encryption).handlers(),
            "RaftAdmin": RaftAdmin(engine).handlers(),
        }
        self._health = health_aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self._health_task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The bound port."""
        return self._port

    async def start(self) -> None:
        """Bind and serve. Raises `BindFailed`, `ConfigError`."""
        credentials = self._tls.credentials() if self._tls is not None else None
        probe_port(self._host, self._port)
        self._services[HEALTH_SERVICE] = self._health_handlers()
        options = [*OPTIONS, ("grpc.max_receive_message_length", self._max_message_bytes),
                   ("grpc.max_send_message_length", 4 * self._max_message_bytes)]
        for _ in range(self._accept_loops):
            server = grpc.aio.server(options=options)
            server.add_generic_rpc_handlers(merge_handlers(self._services))
            if self._reflection:
                self._add_reflection(server)
            self._bind(server, credentials)
            self._servers.append(server)
        for server in self._servers:
            await server.start()
        self._health_task = asyncio.create_task(self._follow_health())
        # The long-lived objects of start-up are out of the collector's way for good; calls make
        # garbage that reference counting frees.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 50, 100)

    def _bind(self, server: grpc.aio.Server,
              credentials: grpc.ServerCredentials | None) -> None:
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{self._port}"
        try:
            self._port = (server.add_secure_port(address, credentials) if credentials is not None
                          else server.add_insecure_port(address))
        except RuntimeError:
            raise BindFailed(f"cannot listen on {address}",
                             remedy="check --address and the TLS files") from None

    def _health_handlers(self) -> Handlers:
        return {
            "Check": grpc.unary_unary_rpc_method_handler(
                self._health.Check,
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self._health.Watch,
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString),
        }

    def _add_reflection(self, server: grpc.aio.Server) -> None:
        from grpc_reflection.v1alpha import reflection

        names = [*self._services, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)

    async def _follow_health(self) -> None:
        """Keep the health of each service: client services need a leader, admin ones do not."""
        states: dict[str, bool] = {}
        while True:
            led = bool(self._engine.status().leader_id)
            wanted = {"": led, "RawKV": led, "TransactionalKV": led, "EncryptionAdmin": True,
                      "RaftAdmin": True}
            for name, serving in wanted.items():
                if states.get(name) != serving:
                    states[name] = serving
                    await self._health.set(name, (
                        health_pb2.HealthCheckResponse.SERVING if serving
                        else health_pb2.HealthCheckResponse.NOT_SERVING))
            await asyncio.sleep(0.1)

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s` seconds."""
        if self._health_task is not None:
            self._health_task.cancel()
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        self._servers.clear()
