"""elastickv.tls: mutual TLS on the client port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from memory_node import MemoryNode, running

from elastickv import certs
from elastickv.config import TlsFiles
from elastickv.errors import ConfigError
from elastickv.pb import service_pb2 as pb
from elastickv.pb import service_pb2_grpc as kv_grpc
from elastickv.server.grpc_server import FRONT_GRPC, FRONT_H2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    for authority in ("ours", "theirs"):
        certs.create_ca(directory / authority)
        certs.create_node(directory / authority, "n1")
        certs.create_client(directory / authority, "alice")
    return directory


def server_tls(directory: Path) -> TlsFiles:
    pair = certs.pair_paths(directory / "ours", "n1")
    return TlsFiles(pair.cert, pair.key, directory / "ours" / "ca.crt")


@pytest.fixture(params=[FRONT_GRPC, FRONT_H2])
def front(request: pytest.FixtureRequest) -> str:
    """Everything here holds for both fronts."""
    return str(request.param)


@pytest.fixture
async def node(directory: Path, front: str) -> AsyncIterator[MemoryNode]:
    node = MemoryNode(tls=server_tls(directory), front=front)
    async with running(node):
        yield node


def credentials(directory: Path, *, ca: str, identity: str) -> grpc.ChannelCredentials:
    pair = certs.pair_paths(directory / (identity or "ours"), "alice")
    key_and_cert = (pair.key.read_bytes(), pair.cert.read_bytes()) if identity else (None, None)
    return grpc.ssl_channel_credentials((directory / ca / "ca.crt").read_bytes(), *key_and_cert)


async def put(address: str, using: grpc.ChannelCredentials | None) -> bool:
    opened = (grpc.aio.secure_channel(address, using) if using
              else grpc.aio.insecure_channel(address))
    async with opened as channel:
        request = pb.RawPutRequest(key=b"k", value=b"v")
        return (await kv_grpc.RawKVStub(channel).RawPut(request, timeout=5)).success


async def test_a_client_of_our_authority_is_served(node: MemoryNode, directory: Path) -> None:
    assert await put(node.address, credentials(directory, ca="ours", identity="ours"))


@pytest.mark.parametrize(("ca", "identity"), [
    ("ours", ""), ("ours", "theirs"), ("theirs", "ours"), ("theirs", "theirs")],
    ids=["no certificate", "a foreign certificate", "it trusts another", "all foreign"])
async def test_anybody_else_is_not(node: MemoryNode, directory: Path, ca: str,
                                   identity: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await put(node.address, credentials(directory, ca=ca, identity=identity))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert node.kv.index == 0
    assert await put(node.address, credentials(directory, ca="ours", identity="ours"))


async def test_plain_text_is_not_served(node: MemoryNode) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await put(node.address, None)
    assert node.kv.index == 0


@pytest.mark.parametrize("damage", ["missing", "garbage", "other key"])
async def test_files_that_do_not_fit_refuse_to_start(directory: Path, tmp_path: Path,
                                                     damage: str, front: str) -> None:
    whole = server_tls(directory)
    key = {"missing": tmp_path / "none.key", "garbage": tmp_path / "bad.key",
           "other key": certs.pair_paths(directory / "theirs", "n1").key}[damage]
    (tmp_path / "bad.key").write_text("not a key")
    with pytest.raises(ConfigError, match=str(key)) as caught:
        await MemoryNode(tls=TlsFiles(whole.cert, key, whole.ca), front=front).start()
    assert "--tls-key" in caught.value.remedy
