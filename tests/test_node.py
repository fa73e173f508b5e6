"""elastickv.node: a whole node in this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from elastickv import config, hygiene
from elastickv.client import Client, Purpose
from elastickv.crypto.kek_file import write_kek_file
from elastickv.errors import DekExhausted, NotCapable
from elastickv.hygiene import MemoryLock
from elastickv.node import Node, report_unhandled
from jepsen.network.ports import free_ports

TIMEOUT_S = 20.0
MAX_WRITES = 100


@contextlib.asynccontextmanager
async def running(node: Node) -> AsyncIterator[None]:
    try:
        await node.start()
        yield
    finally:
        await node.stop()


@pytest.mark.parametrize(("error", "is_reported"), [
    (ConnectionResetError(), False), (ssl.SSLError(), False), (OSError("a disk"), True),
    (ValueError("a defect"), True)])
async def test_only_the_loss_of_what_was_given_up_is_passed_over(
        caplog: pytest.LogCaptureFixture, error: Exception, is_reported: bool) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_unhandled)
    loop.create_future().set_exception(error)
    gc.collect()
    assert ("never retrieved" in caplog.text) is is_reported
    loop.call_exception_handler({"message": "a callback failed", "exception": error})
    assert "a callback failed" in caplog.text


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.NodeSettings:
    """Of a cluster of one, encrypted, whose DEKs last for `MAX_WRITES` writes."""
    # It would lock the memory of all tests.
    monkeypatch.setattr(hygiene, "lock_memory", lambda: MemoryLock(0, "not in tests"))
    kek = tmp_path / "kek"
    write_kek_file(kek)
    client, raft, http = (f"127.0.0.1:{port}" for port in free_ports(3))
    return config.resolve({
        "raft_id": "n1", "address": client, "raft_address": raft, "metrics_address": http,
        "raft_data_dir": str(tmp_path / "data"), "raft_bootstrap": "true", "insecure": "true",
        "kek_file": str(kek), "encryption_enabled": "true", "dek_max_writes": str(MAX_WRITES)}, {})


async def readiness(settings: config.NodeSettings) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, \
            session.get(f"http://{settings.metrics_address}/readyz") as response:
        return response.status, await response.text()


async def put_many(client: Client, count: int) -> None:
    for number in range(count):
        await client.put(b"%d" % number, b"v")


async def test_a_leader_that_refuses_writes_is_not_ready(settings: config.NodeSettings,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(wrapped: object) -> None:
        raise NotCapable("a member stands in the way")

    node = Node(settings)
    async with running(node), Client([str(settings.address)], timeout_s=TIMEOUT_S) as client:
        await client.encryption.bootstrap()
        await client.encryption.enable_storage_envelope()
        assert await readiness(settings) == (200, "ok\n")
        with monkeypatch.context() as patch:
            patch.setattr(node._encryption.members, "require_unwraps", refuse)
            with pytest.raises(DekExhausted) as caught:
                await put_many(client, 2 * MAX_WRITES)
            status, text = await readiness(settings)
        assert status == 503
        assert caught.value.message in text
        assert "rotate-dek --purpose storage" in text
        await client.encryption.rotate_dek(Purpose.STORAGE)
        await client.put(b"k", b"v")
        assert await readiness(settings) == (200, "ok\n")
