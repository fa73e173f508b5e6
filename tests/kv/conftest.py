"""Clusters of whole nodes for the tests of the keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kv.key_cluster import KeyCluster, MakeCluster


@pytest.fixture
async def make_cluster(tmp_path: Path) -> AsyncIterator[MakeCluster]:
    """`await make_cluster(3, options={...})`: a started cluster, stopped afterwards."""
    made: list[KeyCluster] = []

    async def make(size: int = 1, **arguments: object) -> KeyCluster:
        cluster = KeyCluster(tmp_path / str(len(made)), size, **arguments)  # type: ignore[arg-type]
        made.append(cluster)
        await cluster.start()
        return cluster

    yield make
    for cluster in made:
        await cluster.stop()
