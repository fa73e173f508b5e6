"""Shared by every test: bounded hypothesis runs, an environment without stray settings, and
clusters of real processes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

# Timing is not what these tests are about, and a shared machine must not fail them.
settings.register_profile("default", deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

_KEPT_VARIABLES = {"ELASTICKV_VECTORS"}


@pytest.fixture(autouse=True)
def no_stray_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own ELASTICKV_ variables must not reach a node that a test starts."""
    for name in list(os.environ):
        if name.startswith("ELASTICKV_") and name not in _KEPT_VARIABLES:
            monkeypatch.delenv(name)


@pytest.fixture
def cluster_type() -> type[Cluster]:
    """What `cluster` is made of; a module may have its own."""
    # Imported here: most tests do without the client library.
    from tests.cluster.cluster import Cluster

    return Cluster


@pytest.fixture
async def cluster(tmp_path: Path, cluster_type: type[Cluster]) -> AsyncIterator[Cluster]:
    """Three nodes that run, with both cutovers behind them."""
    cluster = cluster_type(tmp_path / "cluster")
    try:
        await cluster.start()
        await cluster.encrypt()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def one_member(tmp_path: Path, cluster_type: type[Cluster]) -> Iterator[Cluster]:
    """A cluster of one that was never started."""
    cluster = cluster_type(tmp_path / "cluster", size=1)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
async def one_plain_member(tmp_path: Path,
                           cluster_type: type[Cluster]) -> AsyncIterator[Cluster]:
    """A cluster of one that runs without encryption."""
    cluster = cluster_type(tmp_path / "cluster", size=1, encryption=False)
    try:
        await cluster.start()
        yield cluster
    finally:
        cluster.stop()
