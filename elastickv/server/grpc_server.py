"""All gRPC services of one node on one client address: services, health, reflection, a front."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Collection

from elastickv.audit import AuditLog
from elastickv.config import TlsFiles
from elastickv.descriptors import MAX_CONNECTIONS
from elastickv.errors import BindFailed, ConfigError
from elastickv.kv.api import EncryptionApi, KvApi, MembershipApi
from elastickv.listening import bind_each
from elastickv.metrics import Recorder
from elastickv.raft.engine import RaftEngine
from elastickv.server import health
from elastickv.server.admin_service import EncryptionAdmin
from elastickv.server.aio_front import AioFront
from elastickv.server.audited import audited
from elastickv.server.authorized import authorized
from elastickv.server.h2.front import H2Front
from elastickv.server.health import Health
from elastickv.server.kv_service import RawKv, TransactionalKv
from elastickv.server.measure import measured
from elastickv.server.methods import Methods, Services, Stream
from elastickv.server.raft_admin import RaftAdmin

MESSAGE_SLACK_BYTES = 2 << 20
HEALTH_INTERVAL_S = 0.1
FRONT_GRPC = "grpc"
FRONT_H2 = "h2"
NEEDS_LEADER = ("", "RawKV", "TransactionalKV")
WITHOUT_LEADER = ("EncryptionAdmin", "RaftAdmin")


def probe_port(host: str, port: int) -> int:
    """The port to bind (a free one for 0). Raises `BindFailed` if the address is taken.

    SO_REUSEPORT would let a second node bind silently and take half of the calls, so the port is
    first tried without it.
    """
    try:
        probes = bind_each(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except OSError as error:
        raise BindFailed(f"cannot listen on {host}:{port}: {error.strerror}",
                         remedy="stop what uses it, or choose another --address") from None
    port = int(probes[0].getsockname()[1])
    for probe in probes:
        probe.close()
    return port


def services_of(kv: KvApi, encryption: EncryptionApi, membership: MembershipApi,
                engine: RaftEngine, states: Health, *, max_result_bytes: int,
                reflection: bool) -> Services:
    """Every method of a node by service name."""
    services: dict[str, Methods] = {
        "RawKV": RawKv(kv, max_result_bytes=max_result_bytes).methods(),
        "TransactionalKV": TransactionalKv(kv, max_result_bytes=max_result_bytes).methods(),
        "EncryptionAdmin": EncryptionAdmin(encryption).methods(),
        "RaftAdmin": RaftAdmin(engine, membership).methods(),
        health.SERVICE: states.methods(),
    }
    if reflection:
        services["grpc.reflection.v1alpha.ServerReflection"] = _reflection(list(services))
    return services


def _reflection(names: list[str]) -> Methods:
    # Imported here: it is off unless asked for.
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    servicer = reflection.aio.ReflectionServicer(  # type: ignore[attr-defined]
        service_names=[*names, reflection.SERVICE_NAME])
    return {"ServerReflectionInfo": Stream(
        lambda requests: servicer.ServerReflectionInfo(requests, None),
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString)}


def make_front(name: str, services: Services, *, accept_loops: int,
               max_message_bytes: int,
               max_connections: int = MAX_CONNECTIONS) -> AioFront | H2Front:
    """The front called `name`. Raises `ConfigError`."""
    if name == FRONT_H2:
        return H2Front(services, max_message_bytes=max_message_bytes,
                       max_connections=max_connections)
    if name == FRONT_GRPC:
        return AioFront(services, accept_loops=accept_loops, max_message_bytes=max_message_bytes,
                        max_connections=max_connections)
    raise ConfigError(f"there is no gRPC front {name!r}", remedy=f"use {FRONT_GRPC} or {FRONT_H2}")


class GrpcServer:
    """The servers of one node."""

    def __init__(self, host: str, port: int, *, kv: KvApi, encryption: EncryptionApi,
                 membership: MembershipApi, engine: RaftEngine, tls: TlsFiles | None,
                 accept_loops: int, reflection: bool, max_value_bytes: int,
                 max_connections: int = MAX_CONNECTIONS, front: str = FRONT_H2,
                 recorder: Recorder | None = None, audit: AuditLog | None = None,
                 admin_names: Collection[str] = ()) -> None:
        """`front` is `h2` (our own) or `grpc` (grpc.aio with `accept_loops` servers). Calls are
        recorded where there is a `recorder`, administrative ones in `audit`. With `admin_names`
        only callers with such a certificate may change what is administered."""
        self._host = host
        self._port = port
        self._tls = tls
        self._engine = engine
        self._health = Health()
        # A value a little over the limit must get as far as the error that names the limit.
        max_message_bytes = 2 * max_value_bytes + MESSAGE_SLACK_BYTES
        services = services_of(kv, encryption, membership, engine, self._health,
                               reflection=reflection, max_result_bytes=max_message_bytes)
        services = authorized(services, admin_names)
        if audit is not None:
            services = audited(services, audit)
        if recorder is not None:
            services = measured(services, recorder)
        self._front = make_front(front, services, accept_loops=accept_loops,
                                 max_message_bytes=max_message_bytes,
                                 max_connections=max_connections)
        self._health_task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The bound port."""
        return self._port

    async def start(self) -> None:
        """Bind and serve. Raises `BindFailed`, `ConfigError`."""
        self._set_health()
        self._port = await self._front.start(self._host, probe_port(self._host, self._port),
                                             self._tls)
        self._health_task = asyncio.create_task(self._follow_health())
        # The long-lived objects of start-up are out of the collector's way for good; calls make
        # garbage that reference counting frees.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 50, 100)

    def _set_health(self) -> None:
        """Client services need a leader, administration does not."""
        led = bool(self._engine.status().leader_id)
        self._health.set({**dict.fromkeys(NEEDS_LEADER, led),
                          **dict.fromkeys(WITHOUT_LEADER, True)})

    async def _follow_health(self) -> None:
        while True:
            self._set_health()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def stop(self, *, grace_s: float) -> None:
        """Take no new calls once the clients know; let running ones end within `grace_s`
        seconds."""
        if self._health_task is not None:
            self._health_task.cancel()
        self._health.set(dict.fromkeys((*NEEDS_LEADER, *WITHOUT_LEADER), False))
        await self._front.stop(grace_s)
