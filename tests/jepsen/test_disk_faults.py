"""A node that ends of the first call that fails has had its fault."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jepsen import preload
from jepsen.cluster import Cluster
from jepsen.faults import NotAvailable, NotNow
from jepsen.faults.disks import IoError
from jepsen.network import Unsupported
from jepsen.processes import NodeProcess

Control = Callable[[object, int, str], None]


class OneNode:
    """A cluster of one process, which can be made to fail."""

    def __init__(self, directory: Path) -> None:
        self.nodes = ["n1"]
        self.process = NodeProcess("n1", ["sleep", "600"], dict(os.environ), directory / "n1.log",
                                   itertools.count().__next__)
        self.processes = {"n1": self.process}

    async def leader(self) -> str:
        return "n1"

    def preload_files(self, node: str) -> SimpleNamespace:
        return SimpleNamespace()


@pytest.fixture
async def one_node(tmp_path: Path) -> AsyncIterator[OneNode]:
    cluster = OneNode(tmp_path)
    await cluster.process.start()
    yield cluster
    await cluster.process.kill()


def ends(files: object, pid: int, command: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def ends_without_an_answer(files: object, pid: int, command: str) -> None:
    ends(files, pid, command)
    raise Unsupported("fiu-ctrl: no answer")


def does_not_listen(files: object, pid: int, command: str) -> None:
    raise Unsupported("fiu-ctrl: no answer")


@pytest.mark.parametrize("control", [ends, ends_without_an_answer])
async def test_a_node_that_ends_while_failures_are_enabled(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch, control: Control) -> None:
    monkeypatch.setattr(preload, "control_fiu", control)
    fault = IoError(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    while one_node.process.is_running:
        await asyncio.sleep(0.001)
    assert await fault.effect() == "it ended with -9"
    assert [end.asked_for for end in one_node.process.exits] == [True]


async def test_a_node_that_cannot_be_told_makes_the_fault_unavailable(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "control_fiu", does_not_listen)
    with pytest.raises(NotAvailable, match="no answer"):
        await IoError(cast("Cluster", one_node), random.Random(1)).inject()


async def test_a_node_that_is_down_already_has_no_fault(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "control_fiu", ends)
    await one_node.process.kill()
    with pytest.raises(NotNow, match="does not run"):
        await IoError(cast("Cluster", one_node), random.Random(1)).inject()


def test_a_program_that_hangs_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libfiu's pipe outlives its process, and then nobody reads it."""
    program = tmp_path / "fiu-ctrl"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o700)
    monkeypatch.setattr(preload.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(preload, "CONTROL_TIMEOUT_S", 0.1)
    files: Any = SimpleNamespace(fiu_pipe_prefix=tmp_path / "pipe")
    with pytest.raises(Unsupported, match="did not answer"):
        preload.control_fiu(files, os.getpid(), "enable name=posix/io/rw/pwrite")
