"""The ports of elastickv.server are opened on every address of a host that the machine has."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

import grpc
import pytest
from memory_node import MemoryNode, OneMemberEngine, running

from elastickv.errors import BindFailed
from elastickv.metrics import Metrics
from elastickv.pb import service_pb2 as pb
from elastickv.pb import service_pb2_grpc as kv_grpc
from elastickv.server.grpc_server import FRONT_GRPC, FRONT_H2
from elastickv.server.http import HttpServer
from jepsen.network.ports import free_ports

NOT_HERE = f"{os.strerror(errno.EAFNOSUPPORT)}|{os.strerror(errno.EADDRNOTAVAIL)}"


class NoIpv6(socket.socket):
    """The kernel has none."""

    def __init__(self, family: int = -1, *arguments: Any, **options: Any) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *arguments, **options)


class Ipv6Disabled(socket.socket):
    """The kernel has it, and no address of it, not even ::1: so it is in most containers."""

    def bind(self, address: Any) -> None:
        if self.family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        super().bind(address)


@pytest.fixture(params=[NoIpv6, Ipv6Disabled], ids=lambda lack: lack.__name__)
def families(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those in which every name has an address, on a machine without IPv6."""
    families: list[int] = [socket.AF_INET6, socket.AF_INET]
    loopback = {socket.AF_INET6: "::1", socket.AF_INET: "127.0.0.1"}

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> list[tuple[Any, ...]]:
        return [(family, socket.SOCK_STREAM, 6, "", (loopback[family], port))
                for family in families]

    monkeypatch.setattr(socket, "socket", request.param)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return families


@pytest.mark.parametrize("front", [FRONT_H2, FRONT_GRPC])
async def test_a_node_is_served_on_a_host_where_the_machine_can(families: list[int],
                                                                front: str) -> None:
    node = MemoryNode(front=front)
    node.server._host = "localhost"
    async with running(node), grpc.aio.insecure_channel(node.address) as channel:
        await kv_grpc.RawKVStub(channel).RawGet(pb.RawGetRequest(key=b"k"), timeout=10)
    families.remove(socket.AF_INET)
    node = MemoryNode(front=front)
    node.server._host = "localhost"
    with pytest.raises(BindFailed, match=NOT_HERE):
        await node.start()


async def test_metrics_are_served_on_a_host_where_the_machine_can(families: list[int]) -> None:
    port = free_ports(1)[0]
    server = HttpServer("localhost", port, Metrics(), OneMemberEngine("n1"),  # type: ignore[arg-type]
                        lambda: "")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /livez HTTP/1.0\r\n\r\n")
    assert (await reader.read()).endswith(b"ok\n")
    writer.close()
    await server.stop()
    families.remove(socket.AF_INET)
    with pytest.raises(BindFailed, match=NOT_HERE):
        await server.start()
    await server.stop()
