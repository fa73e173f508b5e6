"""A lower limit on values concerns what is written from then on, never what the log holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastickv.errors import InvalidArgument
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster]

LARGE = bytes(4 << 20)


async def test_a_large_value_outlives_a_lower_limit(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", size=1)
    node = cluster.nodes["n1"]
    try:
        await cluster.start()
        async with cluster.client() as client:
            await client.put(b"large", LARGE)
        node.kill()  # only the log has it
        node.arguments += ["--max-value-bytes", "1024"]
        await cluster.start()
        async with cluster.client() as client:
            found = await client.get(b"large")
            assert found.value == LARGE
            with pytest.raises(InvalidArgument):
                await client.put(b"large", LARGE)
    finally:
        cluster.stop()
