"""Connections to the client port are counted from their first packet, in both fronts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from memory_node import MemoryNode, eventually, running

from elastickv import certs, listening
from elastickv.config import TlsFiles
from elastickv.listening import Listener
from elastickv.pb import service_pb2 as pb
from elastickv.pb import service_pb2_grpc as kv_grpc
from elastickv.server.grpc_server import FRONT_GRPC, FRONT_H2
from elastickv.server.h2 import front as h2_front

LIMIT = 8


def make_tls(tmp_path: Path) -> TlsFiles:
    certs.create_ca(tmp_path)
    certs.create_node(tmp_path, "n1")
    certs.create_client(tmp_path, "alice")
    pair = certs.pair_paths(tmp_path, "n1")
    return TlsFiles(pair.cert, pair.key, tmp_path / "ca.crt")


def alice(tls: TlsFiles) -> certs.CertificatePair:
    return certs.pair_paths(tls.ca.parent, "alice")


async def get(address: str, tls: TlsFiles | None) -> None:
    if tls is None:
        opened = grpc.aio.insecure_channel(address)
    else:
        pair = alice(tls)
        opened = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(
            tls.ca.read_bytes(), pair.key.read_bytes(), pair.cert.read_bytes()))
    async with opened as channel:
        await kv_grpc.RawKVStub(channel).RawGet(pb.RawGetRequest(key=b"k"), timeout=10)


class Silent:
    """A connection on which nothing is ever said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._ended = asyncio.create_task(self._read(reader))

    @property
    def ended(self) -> bool:
        """By the other side."""
        return self._ended.done()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while await reader.read(1000):
                pass
        except ConnectionError:
            pass

    def close(self) -> None:
        self._ended.cancel()
        self.writer.transport.abort()


@pytest.mark.parametrize(("front", "with_tls"), [
    pytest.param(FRONT_GRPC, False, id="grpc, plain"),
    pytest.param(FRONT_GRPC, True, id="grpc, handshakes"),
    pytest.param(FRONT_H2, False, id="h2, plain"),
])
async def test_those_beyond_the_limit_are_closed_and_the_others_served(
        tmp_path: Path, front: str, with_tls: bool) -> None:
    tls = make_tls(tmp_path) if with_tls else None
    node = MemoryNode(front=front, tls=tls, accept_loops=1, max_connections=LIMIT)
    async with running(node):
        silent = [Silent(*await asyncio.open_connection("127.0.0.1", node.server.port))
                  for _ in range(3 * LIMIT)]
        await eventually(lambda: sum(not each.ended for each in silent) == LIMIT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(node.address, tls)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        for each in silent:
            each.close()
        for _ in range(3 * LIMIT):  # one after the other: what is over does not count
            await eventually_served(node, tls)


async def test_a_handshake_makes_room_and_a_client_that_is_served_does_not(
        tmp_path: Path) -> None:
    tls = make_tls(tmp_path)
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(alice(tls).cert, alice(tls).key)
    context.set_alpn_protocols(["h2"])
    node = MemoryNode(front=FRONT_H2, tls=tls, max_connections=LIMIT)
    async with running(node):
        shaking = [Silent(*await asyncio.open_connection("127.0.0.1", node.server.port))
                   for _ in range(LIMIT)]
        clients = []
        for oldest in shaking:
            clients.append(Silent(*await asyncio.open_connection(
                "127.0.0.1", node.server.port, ssl=context)))
            await eventually(lambda oldest=oldest: oldest.ended)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(node.address, tls)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not any(each.ended for each in clients)
        for each in (*shaking, *clients):
            each.close()
        for _ in range(3 * LIMIT):
            await eventually_served(node, tls)


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize(("at_once", "kept"), [
    pytest.param(64, range(2 * LIMIT, 3 * LIMIT), id="the newest are kept"),
    pytest.param(2, range(2, 2 + LIMIT), id="few descriptors are given up at once"),
    pytest.param(0, range(LIMIT), id="none is"),
])
async def test_handshakes_that_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            at_once: int, kept: range) -> None:
    """They are accepted in one pass of the loop: no handshake has begun when the next comes."""
    monkeypatch.setattr(h2_front, "MAX_ENDING", at_once)
    node = MemoryNode(front=FRONT_H2, tls=make_tls(tmp_path), max_connections=LIMIT)
    async with running(node):
        crowd = [socket.create_connection(("127.0.0.1", node.server.port))
                 for _ in range(3 * LIMIT)]
        front = node.server._front
        assert isinstance(front, h2_front.H2Front)
        await eventually(lambda: len(front._handshakes) == LIMIT and not front._ending)
        assert [number for number, each in enumerate(crowd) if is_open(each)] == [*kept]
        for each in crowd:
            each.close()
        await eventually(lambda: not front._handshakes)


async def test_a_crowd_is_accepted_over_several_passes_of_the_loop(tmp_path: Path) -> None:
    """In between the node does other things, such as heartbeats."""
    node = MemoryNode(front=FRONT_H2, tls=make_tls(tmp_path))
    async with running(node):
        front = node.server._front
        assert isinstance(front, h2_front.H2Front)
        crowd = [socket.create_connection(("127.0.0.1", node.server.port))
                 for _ in range(3 * h2_front.ACCEPTED_AT_ONCE)]
        counts = [0]
        async with asyncio.timeout(10):
            while counts[-1] < len(crowd):
                await asyncio.sleep(0)
                counts.append(len(front._handshakes))
        assert max(after - before for before, after in pairwise(counts)) \
            == h2_front.ACCEPTED_AT_ONCE
        for each in crowd:
            each.close()


def is_open(sock: socket.socket) -> bool:
    """The other side has not closed it."""
    try:
        return bool(sock.recv(1, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


async def eventually_served(node: MemoryNode, tls: TlsFiles | None) -> None:
    """Until the server has noticed that earlier connections are gone."""
    async with asyncio.timeout(20):
        while True:
            try:
                await get(node.address, tls)
            except grpc.aio.AioRpcError:
                continue
            return


async def test_a_handshake_that_never_ends_is_given_up(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_front, "TLS_TIMEOUT_S", 0.1)
    tls = make_tls(tmp_path)
    node = MemoryNode(front=FRONT_H2, tls=tls, max_connections=LIMIT)
    async with running(node):
        silent = [Silent(*await asyncio.open_connection("127.0.0.1", node.server.port))
                  for _ in range(LIMIT)]
        await eventually(lambda: all(each.ended for each in silent))
        await get(node.address, tls)


async def test_a_stop_ends_handshakes(tmp_path: Path) -> None:
    node = MemoryNode(front=FRONT_H2, tls=make_tls(tmp_path), max_connections=1)
    await node.start()
    first = Silent(*await asyncio.open_connection("127.0.0.1", node.server.port))
    second = Silent(*await asyncio.open_connection("127.0.0.1", node.server.port))
    await eventually(lambda: first.ended)
    assert not second.ended
    await node.stop()
    await eventually(lambda: second.ended)


async def test_a_process_without_descriptors_accepts_later(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "PAUSE_S", 0.01)
    accepted: list[socket.socket] = []
    tries = 0

    class Counted(Listener):
        def _resume(self, sock: socket.socket) -> None:
            nonlocal tries
            tries += 1
            super()._resume(sock)

    listener = Counted(accepted.append)
    port = await listener.open("127.0.0.1", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, hard))
        try:
            fill = []
            with contextlib.suppress(OSError):
                while True:  # below the client's there may be free ones
                    fill.append(os.dup(client.fileno()))
            client.connect(("127.0.0.1", port))
            await eventually(lambda: tries >= 3)
            assert not accepted
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in fill:
                os.close(descriptor)
        await eventually(lambda: bool(accepted))
    accepted[0].close()
    listener.close()
