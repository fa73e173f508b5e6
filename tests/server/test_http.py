"""elastickv.server.http: what a probe and a scraper see, over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastickv.errors import BindFailed, NoLeader
from elastickv.metrics import Metrics, Sample
from elastickv.server.http import HttpServer
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


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 404), ("GET", "/metrics/x", 404), ("POST", "/readyz", 405),
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
