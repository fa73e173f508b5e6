"""`elastickv doctor` beside a node that starts: neither keeps the other from anything."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastickv import config, data_directory, startup
from elastickv.config import NodeSettings
from elastickv.durable import OsDisk
from elastickv.keys.guards import AlreadyRunning, FileSystemUnsafe


class Beside(OsDisk):
    """A disk that lets another process do all of its work between two steps of a probe."""

    def __init__(self, other: Callable[[], object]) -> None:
        self._other = other

    def read(self, path: Path) -> bytes:
        if path.name.startswith(".probe"):
            self._other()
        return super().read(path)


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    return config.resolve({
        "raft_id": "n1", "raft_bootstrap": "true", "insecure": "true",
        "raft_data_dir": str(tmp_path), "address": "127.0.0.1:1", "raft_address": "127.0.0.1:2"},
        {})


def test_an_examination_does_not_make_a_node_refuse_its_file_system(
        settings: NodeSettings) -> None:
    startup.require_file_system(settings,
                                Beside(lambda: startup.examine(settings, OsDisk())))
    assert OsDisk().list(settings.raft_data_dir) == []


def test_a_starting_node_does_not_make_an_examination_fail(settings: NodeSettings) -> None:
    facts = startup.examine(
        settings, Beside(lambda: startup.require_file_system(settings, OsDisk())))
    assert facts.file_system_problem is None
    assert OsDisk().list(settings.raft_data_dir) == []


def test_a_directory_that_cannot_be_reached_is_named_with_a_remedy(
        settings: NodeSettings) -> None:
    directory = settings.raft_data_dir / ("x" * 300)
    with pytest.raises(FileSystemUnsafe, match=r"x cannot be reached: ") as caught:
        startup.require_file_system(replace(settings, raft_data_dir=directory), OsDisk())
    assert "--raftDataDir" in caught.value.remedy


def hold(directory: Path, how: int) -> int:
    descriptor = os.open(directory / data_directory.LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, how)
    return descriptor


def test_a_node_outwaits_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [hold(tmp_path, fcntl.LOCK_SH)]
    monkeypatch.setattr(data_directory, "time",
                        SimpleNamespace(sleep=lambda _: os.close(looks.pop())))
    descriptor = data_directory.take(tmp_path)
    assert looks == []
    assert data_directory.look(tmp_path).in_use
    os.close(descriptor)
    assert not data_directory.look(tmp_path).problem


def test_a_node_does_not_wait_for_another_node(tmp_path: Path) -> None:
    descriptor = hold(tmp_path, fcntl.LOCK_EX)
    with pytest.raises(AlreadyRunning):
        data_directory.take(tmp_path)
    os.close(descriptor)
    os.close(data_directory.take(tmp_path))
