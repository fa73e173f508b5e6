"""A clock step counts once somebody was seen to look at its clock."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from jepsen import preload
from jepsen.cluster import Cluster
from jepsen.faults import NotAvailable, NotNow
from jepsen.faults.time import ClockSteps
from jepsen.preload import Preload, PreloadFiles
from jepsen.processes import NodeProcess


class OneNode:
    """A cluster of one process."""

    nodes = ("n1",)

    def __init__(self, directory: Path) -> None:
        self.processes = {"n1": NodeProcess("n1", ["sleep", "60"], {"PATH": os.defpath},
                                            directory / "n1.log", itertools.count().__next__)}
        self.files = PreloadFiles(directory / "control")
        self.files.prepare()

    def preload_files(self, node: str) -> PreloadFiles:
        return self.files


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OneNode]:
    monkeypatch.setattr(preload, "CLOCK_DELAY_S", 0.0)
    cluster = OneNode(tmp_path)
    await cluster.processes["n1"].start()
    yield cluster
    await cluster.processes["n1"].kill()


def told(monkeypatch: pytest.MonkeyPatch, answer: bool | None) -> None:
    """What the kernel tells of the node; it depends on who runs the tests."""
    def is_loaded(pid: int, library: Preload) -> bool | None:
        return answer

    monkeypatch.setattr(preload, "is_loaded", is_loaded)


def steps(cluster: OneNode) -> ClockSteps:
    return ClockSteps(cast("Cluster", cluster), random.Random(1))


async def test_a_library_that_was_seen_is_enough(cluster: OneNode,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, True)
    fault = steps(cluster)
    assert (await fault.inject()).startswith("n1 ")
    assert await fault.effect() == ""


async def test_a_node_without_the_library_has_no_steps(cluster: OneNode,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, False)
    with pytest.raises(NotAvailable, match="without libfaketime"):
        await steps(cluster).inject()


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_node_that_cannot_be_looked_into_must_look_at_its_clock(
        cluster: OneNode, monkeypatch: pytest.MonkeyPatch, is_running: bool) -> None:
    told(monkeypatch, None)
    if not is_running:
        await cluster.processes["n1"].kill()
    fault = steps(cluster)
    await fault.inject()
    with pytest.raises(NotNow, match="n1 was not seen to look at its clock"):
        await fault.effect()
    cluster.files.clock.read_text()
    if not cluster.files.clock_was_read():
        pytest.skip("the file system does not note reads")
    assert await fault.effect() == ""
