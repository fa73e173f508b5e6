"""Metrics, liveness, readiness and the age of stale reads of real nodes."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastickv.metrics import CATALOGUE, PREFIX, Kind
from jepsen.network.ports import free_ports
from tests.cluster.cluster import Cluster, NodeProcess

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ONLY_IN_TROUBLE = {"encryption_decrypt_failures_total"}


class Watched(Cluster):
    """Three nodes that serve metrics."""

    def watch(self) -> None:
        self.http: dict[str, str] = {}
        for node, port in zip(self.nodes.values(), free_ports(len(self.nodes)), strict=True):
            self.http[node.node_id] = f"http://127.0.0.1:{port}"
            node.arguments += ["--metrics-address", f"127.0.0.1:{port}"]

    async def get(self, name: str, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, \
                session.get(self.http[name] + path) as response:
            return response.status, await response.text()

    async def values(self, name: str) -> dict[str, float]:
        """Every sample by name and label values."""
        status, text = await self.get(name, "/metrics")
        assert status == 200
        return {" ".join([sample.name, *sample.labels.values()]): sample.value
                for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Watched]:
    cluster = Watched(tmp_path / "cluster")
    cluster.watch()
    try:
        await cluster.start()
        yield cluster
    finally:
        cluster.stop()


async def test_what_an_operator_watches(cluster: Watched) -> None:
    leader = await cluster.leader()
    follower = next(name for name in cluster.nodes if name != leader)
    before = await cluster.values(leader)
    assert before["elastickv_encryption_active_dek_id storage"] == 0
    await cluster.encrypt()
    async with cluster.client(leader) as client:
        for number in range(20):
            await client.put(b"key-%d" % number, b"value")
            await client.get(b"key-%d" % number)
        dek_id = (await client.encryption.sidecar_state()).active_storage_id

    values = await cluster.values(leader)
    assert values["elastickv_raft_is_leader"] == 1
    assert values["elastickv_raft_applied_index"] > before["elastickv_raft_applied_index"]
    assert values["elastickv_raft_log_bytes"] > before["elastickv_raft_log_bytes"]
    assert values["elastickv_raft_fsync_seconds_count"] >= 20
    assert values["elastickv_raft_proposals_total applied"] >= 20
    assert values["elastickv_grpc_calls_total RawKV/RawPut OK"] == 20
    assert values["elastickv_grpc_call_seconds_count RawKV/RawGet"] >= 20
    assert values["elastickv_encryption_active_dek_id storage"] == dek_id
    require_wear(values, dek_id)
    assert (await cluster.values(follower))["elastickv_raft_is_leader"] == 0

    families = {name.split(" ")[0].removeprefix(PREFIX) for name in values}
    missing = {metric.name for metric in CATALOGUE
               if metric.name not in families and f"{metric.name}_count" not in families}
    assert missing <= ONLY_IN_TROUBLE, "a metric of the catalogue that nothing records"
    assert {metric.kind for metric in CATALOGUE} == set(Kind)


def require_wear(values: dict[str, float], dek_id: int) -> None:
    """What is shown of the storage DEK after 20 writes under it."""
    writes = values[f"elastickv_encryption_dek_writes {dek_id} storage"]
    assert writes >= 20
    assert values[f"elastickv_encryption_dek_writes_left {dek_id} storage"] == 2**32 - writes
    assert values[f"elastickv_encryption_dek_epoch {dek_id} storage"] >= 0
    assert 0 < values["elastickv_encryption_sidecar_index"] \
        <= values["elastickv_raft_applied_index"]
    assert values["elastickv_encryption_kek_unwrap_seconds_count"] >= 2


async def test_a_node_without_a_quorum_lives_and_is_not_ready(cluster: Watched) -> None:
    leader = await cluster.leader()
    follower = next(name for name in cluster.nodes if name != leader)
    async with cluster.client(follower) as client:
        await client.put(b"k", b"v")
        fresh = await client.get(b"k", stale=True)
        assert 0 <= fresh.stale_ms < 5_000
        assert (await client.get(b"k")).stale_ms == 0
    assert await cluster.get(follower, "/readyz") == (200, "ok\n")
    for name in cluster.nodes:
        if name != follower:
            cluster.nodes[name].kill(signal.SIGKILL)
    await until_not_ready(cluster, follower)
    assert await cluster.get(follower, "/livez") == (200, "ok\n")
    async with cluster.client(follower) as client:
        first = await client.get(b"k", stale=True)
        await asyncio.sleep(0.1)
        second = await client.get(b"k", stale=True)
        ages: list[int] = []
        await client.scan(stale=True, on_stale_ms=ages.append)
    assert ages[0] >= second.stale_ms
    assert first.value == second.value == b"v"
    assert second.stale_ms > first.stale_ms
    shown = await get_on_the_command_line(cluster.nodes[follower])
    assert shown["stale_ms"] >= second.stale_ms


async def until_not_ready(cluster: Watched, name: str) -> None:
    async with asyncio.timeout(30):
        while True:
            status, text = await cluster.get(name, "/readyz")
            if status == 503:
                assert text.strip(), "the reason is given"
                return
            await asyncio.sleep(0.1)


async def get_on_the_command_line(node: NodeProcess) -> dict[str, int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "elastickv", "client", "get", "k", "--stale", "--endpoints",
        node.address, "--insecure", "--output", "json", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    document: dict[str, int] = json.loads(out)
    return document
