"""elastickv.server.http: what a probe and a scraper see, over a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from memory_node import eventually
from prometheus_client.parser import text_string_to_metric_families

from elastickv.errors import BindFailed, NoLeader
from elastickv.metrics import Metrics, Sample
from elastickv.server import http
from elastickv.server.http import MAX_CONNECTIONS, HttpServer
from jepsen.network.ports import free_ports


class Quorum:
    """The part of an engine that /readyz asks."""

    def __init__(self) -> None:
        self.lost = False
        self.asked = 0

    async def read_index(self, *, timeout_s: float) -> int:
        self.asked += 1
        if self.lost:
            raise NoLeader("no leader is known", remedy="retry when a majority is up")
        return 7


class Served:
    """A running endpoint and what it looks at."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.quorum = Quorum()
        self.problem = ""
        self.port = free_ports(1)[0]
        self.server = self.another()

    def another(self) -> HttpServer:
        return HttpServer("127.0.0.1", self.port, self.metrics,
                          self.quorum,  # type: ignore[arg-type]
                          lambda: self.problem)

    async def get(self, path: str, method: str = "GET") -> tuple[int, str, str]:
        """Status, content type, body."""
        async with aiohttp.ClientSession() as session, \
                session.request(method, f"http://127.0.0.1:{self.port}{path}") as response:
            return response.status, response.headers.get("Content-Type", ""), await response.text()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    await served.server.start()
    yield served
    await served.server.stop()


async def test_livez_answers_whatever_the_cluster_does(served: Served) -> None:
    served.quorum.lost, served.problem = True, "the disk is full"
    status, _, body = await served.get("/livez")
    assert (status, body) == (200, "ok\n")
    assert served.quorum.asked == 0


async def test_readyz_asks_a_quorum(served: Served) -> None:
    assert (await served.get("/readyz"))[0] == 200
    assert served.quorum.asked == 1
    served.quorum.lost = True
    status, _, body = await served.get("/readyz")
    assert status == 503
    assert "no leader is known" in body
    served.quorum.lost = False
    assert (await served.get("/readyz"))[0] == 200


async def test_readyz_names_what_keeps_the_node_from_writing(served: Served) -> None:
    served.problem = "no space left to write the store"
    status, _, body = await served.get("/readyz")
    assert (status, body) == (503, "no space left to write the store\n")
    assert served.quorum.asked == 0


async def test_metrics_are_prometheus_text(served: Served) -> None:
    served.metrics.count("raft_proposals_total", "applied", amount=3)
    served.metrics.add_source(lambda: [Sample("raft_term", 4)])
    status, content_type, body = await served.get("/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    values = {sample.name: sample.value for family in text_string_to_metric_families(body)
              for sample in family.samples}
    assert values["elastickv_raft_proposals_total"] == 3
    assert values["elastickv_raft_term"] == 4


async def test_a_head_is_answered_without_a_body(served: Served) -> None:
    status, content_type, body = await served.get("/metrics", "HEAD")
    assert (status, body) == (200, "")
    assert content_type.startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 404), ("GET", "/metrics/x", 404), ("POST", "/readyz", 405), ("POST", "/", 404),
])
async def test_nothing_else_is_served(served: Served, method: str, path: str,
                                      status: int) -> None:
    assert (await served.get(path, method))[0] == status


async def test_a_taken_port_is_refused_and_named(served: Served) -> None:
    with pytest.raises(BindFailed, match=f"127.0.0.1:{served.port}") as caught:
        await served.another().start()
    assert "--metrics-address" in caught.value.remedy


async def test_stop_twice_frees_the_port(served: Served) -> None:
    await served.server.stop()
    await served.server.stop()
    again = served.another()
    await again.start()
    await again.stop()


async def test_the_oldest_connection_makes_room_for_a_new_one(served: Served) -> None:
    """Whoever holds the others, a probe is answered."""
    silent = [await asyncio.open_connection("127.0.0.1", served.port)
              for _ in range(MAX_CONNECTIONS + 8)]
    async with asyncio.timeout(10):
        for reader, _ in silent[:8]:
            assert await reader.read() == b""
        assert (await served.get("/livez"))[0] == 200
        assert await silent[8][0].read() == b""
    assert not any(reader.at_eof() for reader, _ in silent[9:])
    for _, writer in silent:
        writer.close()


async def test_a_crowd_that_comes_at_once_is_cut_down(served: Served) -> None:
    crowd = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", served.port)
                                   for _ in range(3 * MAX_CONNECTIONS)))

    def left() -> int:
        return sum(not reader.at_eof() for reader, _ in crowd)

    await eventually(lambda: left() == MAX_CONNECTIONS)
    assert (await served.get("/livez"))[0] == 200
    await eventually(lambda: left() == MAX_CONNECTIONS - 1)
    for _, writer in crowd:
        writer.close()


@pytest.mark.parametrize("said", [
    b"", b"GET /livez HTTP/1.1\r\n", b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n"],
    ids=["nothing", "half a request", "a request"])
async def test_an_idle_connection_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch,
                                            said: bytes) -> None:
    await served.server.stop()
    monkeypatch.setattr(http, "IDLE_TIMEOUT_S", 0.1)
    hasty = served.another()
    await hasty.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(said)
    async with asyncio.timeout(10):
        answer = await reader.read()
    assert answer.endswith(b"ok\n") == said.endswith(b"\r\n\r\n")
    writer.close()
    await hasty.stop()


async def test_a_peer_that_does_not_read_holds_up_no_stop(
        served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await served.server.stop()
    monkeypatch.setattr(http, "STOP_TIMEOUT_S", 0.1)
    served.problem = "x" * (1 << 20)
    hasty = served.another()
    await hasty.start()
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n" * 100)
        assert (await served.get("/readyz"))[0] == 503
        async with asyncio.timeout(20):
            await hasty.stop()
