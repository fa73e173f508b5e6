"""Where a listener listens, and how many it accepts at once."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

from elastickv.listening import Listener, bind_each
from jepsen.network.ports import free_ports

ADDRESSES = {socket.AF_INET6: ("::1", 0, 0, 0), socket.AF_INET: ("127.0.0.1", 0)}


def drop(accepted: socket.socket) -> None:
    accepted.close()


class WithoutIpv6(socket.socket):
    """The kernel has no IPv6."""

    def __init__(self, family: int, kind: int) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, kind)


class WithIpv6Disabled(socket.socket):
    """The kernel has IPv6, and no interface has an address."""

    def bind(self, address: object) -> None:
        if self.family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        super().bind(address)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "problem"), [
    (WithoutIpv6, errno.EAFNOSUPPORT), (WithIpv6Disabled, errno.EADDRNOTAVAIL)])
async def test_a_host_is_listened_on_where_the_machine_can(
        monkeypatch: pytest.MonkeyPatch, kind: type[socket.socket], problem: int) -> None:
    """A name may have an IPv6 address that the machine cannot use."""
    families = [socket.AF_INET6]

    async def resolve(*arguments: object, **options: object) -> list[tuple[object, ...]]:
        return [(family, socket.SOCK_STREAM, 6, "", ADDRESSES[family]) for family in families]

    monkeypatch.setattr("elastickv.listening.socket.socket", kind)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    with pytest.raises(OSError, match=os.strerror(problem)):
        await Listener(drop).open("localhost", 0)
    families.append(socket.AF_INET)
    listener = Listener(drop)
    assert await listener.open("localhost", 0) > 0
    listener.close()


def test_a_taken_address_frees_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = free_ports(1)[0]
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
                     for port in (free, taken.getsockname()[1])]
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            bind_each(addresses)
        (bound,) = bind_each(addresses[:1])
        assert bound.getsockname()[1] == free
        bound.close()


async def test_an_address_that_is_in_use_is_no_address_that_is_missing() -> None:
    first, second = Listener(drop), Listener(drop)
    port = await first.open("127.0.0.1", 0)
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        await second.open("127.0.0.1", port)
    first.close()


async def test_every_address_is_listened_on_without_a_host() -> None:
    listener = Listener(drop)
    port = await listener.open("", 0)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    listener.close()


async def test_no_more_than_so_many_are_accepted_at_once() -> None:
    loop = asyncio.get_running_loop()
    passes: list[int] = []
    current = [0]

    def end_pass() -> None:
        passes.append(current[0])
        current[0] = 0

    def accept(accepted: socket.socket) -> None:
        accepted.close()
        if not current[0]:
            loop.call_soon(end_pass)
        current[0] += 1

    listener = Listener(accept, at_once=3)
    port = await listener.open("127.0.0.1", 0)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(7)]
    async with asyncio.timeout(20):
        while sum(passes) < len(clients):
            await asyncio.sleep(0)
    assert max(passes) <= 3
    for client in clients:
        client.close()
    listener.close()
