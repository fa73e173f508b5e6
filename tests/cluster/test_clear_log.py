"""Entries that were in the clear before the raft cutover leave the disk with their segments."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MARK = b"in-the-clear-before-the-cutover-"
COMPACTING = ["--snapshot-entries", "20", "--snapshot-log-bytes", str(1 << 20)]
VALUE = MARK + bytes(16 << 10)
TIMEOUT_S = 30


def log_files(cluster: Cluster, kind: str = "") -> dict[int, bytes]:
    """The logs' files by inode; they come and go meanwhile."""
    found = {}
    for path in cluster.files():
        if path.parent.name == "log" and path.name.endswith(kind):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                found[os.fstat(file.fileno()).st_ino] = file.read()
    return found


def first_index(cluster: Cluster) -> int:
    """Where the log begins that goes back furthest."""
    return min(int(path.stem) for path in cluster.files() if path.suffix == ".log"
               and path.parent.name == "log")


def in_the_clear(cluster: Cluster) -> bool:
    return any(MARK in content for content in log_files(cluster).values())


async def test_nothing_in_the_clear_is_left_in_the_files_of_later_segments(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", extra=COMPACTING)
    try:
        await cluster.start()
        async with cluster.client() as client, asyncio.timeout(TIMEOUT_S):
            while not log_files(cluster, ".spare"):
                await client.put(b"key", VALUE)
        assert in_the_clear(cluster)
        await cluster.encrypt()
        async with cluster.client() as client, asyncio.timeout(TIMEOUT_S):
            # A follower may not have applied the cutover yet.
            while not (cutover := (await client.encryption.sidecar_state()
                                   ).raft_envelope_cutover_index):
                await asyncio.sleep(0.01)
            while first_index(cluster) <= cutover:
                await client.put(b"key", VALUE)
            # The files of the clear segments wait for nothing more to be written.
            while in_the_clear(cluster):
                await asyncio.sleep(0.1)
            spares = log_files(cluster, ".spare").keys()
            while not spares & log_files(cluster, ".log").keys():
                await client.put(b"key", VALUE)
                spares |= log_files(cluster, ".spare").keys()
        assert not in_the_clear(cluster)
    finally:
        cluster.stop()


async def test_a_small_log_sheds_what_was_in_the_clear(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        await cluster.start()
        async with cluster.client() as client:
            await client.put(b"key", VALUE)
            assert in_the_clear(cluster)
            await cluster.encrypt()
            await client.put(b"key", VALUE)
            async with asyncio.timeout(TIMEOUT_S):
                while in_the_clear(cluster):
                    await asyncio.sleep(0.1)
            assert await client.get(b"key")
    finally:
        cluster.stop()
