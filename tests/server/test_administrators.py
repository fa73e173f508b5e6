"""--admin-names: who may change keys and membership, on both fronts with real certificates."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from memory_node import MemoryNode, running

from elastickv import certs
from elastickv.audit import AuditLog
from elastickv.client import Client
from elastickv.config import TlsFiles
from elastickv.errors import NotAuthorized
from elastickv.server.authorized import authorized
from elastickv.server.grpc_server import FRONT_GRPC, FRONT_H2, services_of
from elastickv.server.health import Health
from elastickv.server.methods import ADMINISTRATIVE

CHANGES = {
    "EncryptionAdmin": {"BootstrapEncryption", "RotateDEK", "RegisterEncryptionWriter",
                        "EnableStorageEnvelope", "EnableRaftEnvelope"},
    "RaftAdmin": {"AddVoter", "AddLearner", "PromoteLearner", "RemoveServer",
                  "TransferLeadership"},
}
METHODS = [f"{service}/{name}" for service, names in CHANGES.items() for name in sorted(names)]
READS = ["EncryptionAdmin/GetCapability", "EncryptionAdmin/GetSidecarState",
         "EncryptionAdmin/GetMemberStatus", "EncryptionAdmin/ResyncSidecar", "RaftAdmin/Status",
         "RaftAdmin/Configuration"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    certs.create_ca(directory)
    certs.create_node(directory, "n1")
    for name in ("alice", "bob"):
        certs.create_client(directory, name)
    return directory


@pytest.fixture(params=[FRONT_GRPC, FRONT_H2])
async def node(request: pytest.FixtureRequest, directory: Path,
               tmp_path: Path) -> AsyncIterator[MemoryNode]:
    pair = certs.pair_paths(directory, "n1")
    audit = AuditLog(tmp_path / "audit.log")
    node = MemoryNode(tls=TlsFiles(pair.cert, pair.key, directory / "ca.crt"),
                      front=request.param, audit=audit, admin_names=["alice", "carol"])
    async with running(node):
        yield node
    audit.close()


async def call(node: MemoryNode, directory: Path, name: str, method: str) -> grpc.StatusCode:
    """The status of an empty request with the certificate of `name`."""
    pair = certs.pair_paths(directory, name)
    credentials = grpc.ssl_channel_credentials(
        (directory / "ca.crt").read_bytes(), pair.key.read_bytes(), pair.cert.read_bytes())
    async with grpc.aio.secure_channel(node.address, credentials) as channel:
        try:
            await channel.unary_unary(f"/{method}")(b"", timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
async def test_only_an_administrator_changes_anything(
        node: MemoryNode, directory: Path, tmp_path: Path, method: str) -> None:
    assert await call(node, directory, "bob", method) is grpc.StatusCode.PERMISSION_DENIED
    assert await call(node, directory, "alice", method) is not grpc.StatusCode.PERMISSION_DENIED
    refused, passed = lines(tmp_path)
    assert (refused["who"], refused["what"], refused["result"]) == ("bob", method, "NotAuthorized")
    assert passed["who"] == "alice"
    assert passed["result"] != "NotAuthorized"


@pytest.mark.parametrize("method", [*READS, "RawKV/RawPut"])
async def test_everything_else_is_open_to_every_client(
        node: MemoryNode, directory: Path, method: str) -> None:
    assert await call(node, directory, "bob", method) is not grpc.StatusCode.PERMISSION_DENIED


async def test_the_refusal_is_typed_and_names_the_remedy(node: MemoryNode,
                                                         directory: Path) -> None:
    pair = certs.pair_paths(directory, "bob")
    async with Client([node.address], tls=TlsFiles(pair.cert, pair.key, directory / "ca.crt"),
                      timeout_s=5) as client:
        with pytest.raises(NotAuthorized, match="bob is no administrator") as caught:
            await client.encryption.bootstrap()
    assert "--admin-names" in caught.value.remedy




def test_a_method_is_open_only_where_that_was_decided() -> None:
    """So one that is added later is not."""
    node = MemoryNode()
    services = services_of(
        node.kv, node.encryption, node.engine, node.engine,  # type: ignore[arg-type]
        Health(), max_result_bytes=1, reflection=False)
    wrapped = authorized(services, ["alice"])
    assert {service: {name for name, method in methods.items()
                      if method is not services[service][name]}
            for service, methods in wrapped.items() if service in ADMINISTRATIVE} == CHANGES
    assert all(wrapped[service] == services[service] for service in services
               if service not in ADMINISTRATIVE)
    assert authorized(services, ()) is services
