"""A node that ends of the first call that fails has had its fault."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jepsen import preload
from jepsen.cluster import Cluster
from jepsen.faults import NotAvailable, NotNow, Violation, disks
from jepsen.faults.disks import DiskFull, IoError
from jepsen.network import Unsupported
from jepsen.processes import NodeProcess

Control = Callable[[object, int, str], None]
SLEEPER = ("trap 'exit 10' TERM; trap 'exit 1' USR1; echo ready; "
           "while true; do sleep 0.01; done")


class OneNode:
    """A cluster of one process, which ends with exit code 10 when it is terminated, and with 1 by
    SIGUSR1. `log_index` is what it says of its log, None for no answer, and `other_log_index` what
    another member says."""

    options = SimpleNamespace(small_disk_mib=0)

    def __init__(self, directory: Path) -> None:
        self.nodes = ["n1"]
        self.process = NodeProcess("n1", ["sh", "-c", SLEEPER], dict(os.environ),
                                   directory / "n1.log", itertools.count().__next__)
        self.processes = {"n1": self.process}
        self.io_errors: set[str] = set()
        self.log_index: Iterator[int | None] = itertools.repeat(7)
        self.other_log_index: Iterator[int] = itertools.repeat(7)

    async def leader(self) -> str:
        return "n1"

    async def statuses(self) -> dict[str, Any]:
        said = {"n1": next(self.log_index), "n2": next(self.other_log_index)}
        return {node: SimpleNamespace(last_log_index=index) for node, index in said.items()
                if index is not None}

    async def restart(self, node: str) -> None:
        if not self.process.is_running:
            await self.process.start()

    def preload_files(self, node: str) -> SimpleNamespace:
        return SimpleNamespace()


@pytest.fixture
async def one_node(tmp_path: Path) -> AsyncIterator[OneNode]:
    cluster = OneNode(tmp_path)
    await cluster.process.start()
    while not (tmp_path / "n1.log").read_text():
        await asyncio.sleep(0.001)
    yield cluster
    await cluster.process.kill()


def ends(files: object, pid: int, command: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def ends_without_an_answer(files: object, pid: int, command: str) -> None:
    ends(files, pid, command)
    raise Unsupported("fiu-ctrl: no answer")


def ends_with_an_error(files: object, pid: int, command: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)


def crashes(files: object, pid: int, command: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSEGV)


def does_nothing(files: object, pid: int, command: str) -> None:
    return


def does_not_listen(files: object, pid: int, command: str) -> None:
    raise Unsupported("fiu-ctrl: no answer")


@pytest.mark.parametrize("control", [ends, ends_without_an_answer])
async def test_a_node_that_ends_while_failures_are_enabled(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch, control: Control) -> None:
    monkeypatch.setattr(preload, "control_fiu", control)
    fault = IoError(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    assert await fault.effect() == "it ended with 10"
    assert [end.asked_for for end in one_node.process.exits] == [True]
    assert one_node.io_errors == {"n1"}


async def test_a_node_that_crashes_under_io_errors_ended_by_itself(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "control_fiu", crashes)
    fault = IoError(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    assert await fault.effect() == "it ended with -11"
    assert [end.asked_for for end in one_node.process.exits] == [False]


async def test_a_node_that_is_about_to_end_is_waited_for(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "control_fiu", does_nothing)
    fault = IoError(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    asked = []

    async def statuses() -> dict[str, Any]:
        asked.append(True)
        if len(asked) == 3:
            ends(None, one_node.process.pid, "")
        return {}

    one_node.statuses = statuses  # type: ignore[method-assign]
    assert await fault.effect() == "it ended with 10"


@pytest.mark.parametrize(("log_index", "error", "message"), [
    pytest.param(itertools.count(7), Violation, "n1 runs on with I/O errors: its log grew 40 times",
                 id="it swallows them"),
    pytest.param(itertools.chain(range(7, 7 + 40), itertools.repeat(46)), NotNow,
                 "no call that mattered failed", id="too few calls to tell"),
    pytest.param(itertools.repeat(7), NotNow, "no call that mattered failed", id="nothing to do"),
    pytest.param(itertools.chain([7], itertools.repeat(7000)), NotNow,
                 "no call that mattered failed", id="many entries in one write"),
])
async def test_a_node_that_runs_on_under_io_errors(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch, log_index: Iterator[int],
        error: type[Exception], message: str) -> None:
    monkeypatch.setattr(preload, "control_fiu", does_nothing)
    monkeypatch.setattr(disks, "POLL_S", 0.001)
    monkeypatch.setattr(disks, "HALT_TIMEOUT_S", 60.0 if error is Violation else 0.3)
    one_node.log_index = log_index
    fault = IoError(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    with pytest.raises(error, match=message):
        await fault.effect()
    assert one_node.process.is_running


MANY = disks.ENTRIES_AT_MOST


@pytest.mark.parametrize(("log_index", "other_log_index", "error"), [
    pytest.param(itertools.repeat(None), itertools.count(7, MANY), Violation, id="it says nothing"),
    pytest.param(itertools.repeat(7), itertools.count(7, MANY), Violation, id="it stands still"),
    pytest.param(itertools.chain([7], itertools.repeat(8)), itertools.count(7, MANY), Violation,
                 id="it came to a stand"),
    pytest.param(itertools.repeat(None), itertools.repeat(7), NotNow, id="all stand still"),
    pytest.param(itertools.repeat(None), itertools.chain([7], itertools.repeat(6 + MANY)),
                 NotNow, id="too few entries to tell"),
    pytest.param(itertools.chain([7], itertools.repeat(7 + MANY)),
                 itertools.chain([7], itertools.repeat(7 + MANY)), NotNow, id="it follows"),
])
async def test_a_node_that_neither_ends_nor_follows_under_io_errors(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch, log_index: Iterator[int | None],
        other_log_index: Iterator[int], error: type[Exception]) -> None:
    monkeypatch.setattr(preload, "control_fiu", does_nothing)
    monkeypatch.setattr(disks, "POLL_S", 0.001)
    monkeypatch.setattr(disks, "HALT_TIMEOUT_S", 0.5)
    one_node.log_index, one_node.other_log_index = log_index, other_log_index
    fault = IoError(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    with pytest.raises(error, match="n1 neither ended nor followed" if error is Violation
                       else "no call that mattered failed"):
        await fault.effect()
    assert one_node.process.is_running


def test_that_nothing_fails_while_the_log_grows_is_practically_impossible() -> None:
    assert (1 - disks.FAILURE_PROBABILITY) ** (2 * disks.GROWTHS_AT_MOST) < 1 / 50_000_000


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


@pytest.mark.parametrize(("control", "code"), [(ends_with_an_error, 1), (ends, 10), (crashes, -11)])
async def test_a_node_that_ends_while_its_disk_is_full_ended_by_itself(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch, control: Control, code: int) -> None:
    monkeypatch.setattr(preload, "control_fiu", control)
    fault = DiskFull(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    await one_node.process.wait(60.0)
    assert await fault.effect() == f"it ended with {code}"
    assert [end.asked_for for end in one_node.process.exits] == [False]


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_disk_that_was_full_is_mended_in_the_process_that_it_failed(
        one_node: OneNode, monkeypatch: pytest.MonkeyPatch, is_restarted: bool) -> None:
    commands: list[tuple[int, str]] = []
    monkeypatch.setattr(preload, "control_fiu",
                        lambda files, pid, command: commands.append((pid, command.split()[0])))
    fault = DiskFull(cast("Cluster", one_node), random.Random(1))
    await fault.inject()
    first = one_node.process.pid
    if is_restarted:
        await one_node.process.kill()
        await one_node.restart("n1")
    await fault.heal()
    mended = 0 if is_restarted else len(disks.WRITING_CALLS)
    assert commands == [(first, "enable_random")] * len(disks.WRITING_CALLS) \
        + [(first, "disable")] * mended
    assert one_node.process.is_running


def test_a_program_that_hangs_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libfiu's pipe outlives its process, and then nobody reads it."""
    program = tmp_path / "fiu-ctrl"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o700)
    monkeypatch.setattr(preload.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(preload, "CONTROL_TIMEOUT_S", 0.1)
    with pytest.raises(Unsupported, match="did not answer"):
        preload.control_fiu(preload.PreloadFiles(tmp_path), os.getpid(),
                            "enable name=posix/io/rw/pwrite")
