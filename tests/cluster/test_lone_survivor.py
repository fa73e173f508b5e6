"""What is left when a majority is gone: the survivor's state, for who copies it, and its word of
who leads."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from elastickv.errors import TRAILER_ERROR, ElasticKVError
from elastickv.pb import service_pb2 as pb
from elastickv.pb.service_pb2_grpc import RawKVStub
from tests.cluster.cluster import READY_TIMEOUT_S, Cluster

pytestmark = [pytest.mark.cluster]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_what_a_survivor_has_can_be_listed(cluster: Cluster) -> None:
    data = {b"key%d" % number: b"value%d" % number for number in range(7)}
    async with cluster.client("n1") as client:
        for key, value in data.items():
            await client.put(key, value)
        assert (await client.get(b"key6")).exists  # n1 has applied it
    for lost in ("n2", "n3"):
        cluster.nodes[lost].kill(signal.SIGKILL)
    async with cluster.client("n1") as client:
        with pytest.raises(ElasticKVError):
            await client.scan(timeout_s=0.5)
        pages = [page async for page in client.scan_pages(page=3, stale=True)]
    assert {pair.key: pair.value for page in pages for pair in page} == data


async def comes_to(channel: grpc.aio.Channel, status: int) -> None:
    """Wait until the health of the whole node is `status`."""
    health = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(READY_TIMEOUT_S):
        while (await health.Check(health_pb2.HealthCheckRequest())).status != status:
            await asyncio.sleep(0.05)


async def refusal(channel: grpc.aio.Channel) -> tuple[grpc.StatusCode, str]:
    """The status and the error's class that a linearizable read ends in."""
    kv = RawKVStub(channel)
    while True:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await kv.RawGet(pb.RawGetRequest(key=b"k"), timeout=2.0)
        trailers = dict(caught.value.trailing_metadata() or ())
        if trailers:  # otherwise this side's own time was up before the answer came
            return caught.value.code(), trailers[TRAILER_ERROR]


async def leaders_named(address: str) -> dict[str, str | None]:
    """The leader in each row of `admin raft status`; None of a member that does not answer."""
    shell = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "elastickv", "admin", "raft", "status", "--output", "json",
        "--endpoints", address, "--insecure", stdout=asyncio.subprocess.PIPE)
    output, _ = await shell.communicate()
    assert shell.returncode == 0
    return {row["member"]: row["leader"] for row in json.loads(output)}


@pytest.mark.parametrize("was_leader", [False, True], ids=["follower", "leader"])
async def test_a_survivor_names_no_leader_until_there_is_one_again(cluster: Cluster,
                                                                   was_leader: bool) -> None:
    async with cluster.client() as client:
        await client.put(b"k", b"v")
    leader = await cluster.leader()
    followers = sorted(set(cluster.nodes) - {leader})
    survivor, back, gone = [leader, *followers] if was_leader else [*followers, leader]
    address = cluster.nodes[survivor].address
    for lost in (back, gone):
        cluster.nodes[lost].kill(signal.SIGKILL)
    async with grpc.aio.insecure_channel(address) as channel:
        await comes_to(channel, NOT_SERVING)
        assert await refusal(channel) == (grpc.StatusCode.UNAVAILABLE, "NoLeader")
        assert await leaders_named(address) == {survivor: "", back: None, gone: None}

        await cluster.start(back)
        await comes_to(channel, SERVING)
        async with cluster.client(survivor) as client:
            await client.put(b"k", b"w")
            assert (await client.get(b"k")).value == b"w"
        agreed = [{survivor: each, back: each, gone: None} for each in (survivor, back)]
        async with asyncio.timeout(READY_TIMEOUT_S):
            while await leaders_named(address) not in agreed:
                await asyncio.sleep(0.05)
