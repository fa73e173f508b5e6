"""What is left when a majority is gone: the survivor's state, for who copies it."""

from __future__ import annotations

import signal

import pytest

from elastickv.errors import ElasticKVError
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster]


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
