"""What real nodes answer to bad input, a closed gate, a missing quorum and damaged files."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from elastickv.errors import ExitCode
from elastickv.pb import encryption_admin_pb2 as ea
from elastickv.pb import service_pb2 as pb
from elastickv.pb.encryption_admin_pb2_grpc import EncryptionAdminStub
from elastickv.pb.service_pb2_grpc import RaftAdminStub, RawKVStub
from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.cluster

CODE = grpc.StatusCode
WIDE_EPOCH = 0x10000
WRITER = ea.WriterRegistryEntry(full_node_id=1, local_epoch=1)
TWIN = ea.WriterRegistryEntry(full_node_id=1 + (1 << 32), local_epoch=2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("single") / "cluster", size=1)
    try:
        await cluster.start()
        await cluster.encrypt()
        yield cluster
    finally:
        cluster.stop()


BAD_CALLS: dict[str, tuple[str, str, object, str]] = {
    "empty key": ("kv", "RawPut", pb.RawPutRequest(key=b"", value=b"v"), "480"),
    "long key": ("kv", "RawPut", pb.RawPutRequest(key=b"k" * 481, value=b"v"), "480"),
    "long key in get": ("kv", "RawGet", pb.RawGetRequest(key=b"k" * 481), "480"),
    "long value": ("kv", "RawPut", pb.RawPutRequest(key=b"k", value=bytes((8 << 20) + 1)),
                   str(8 << 20)),
    "long ttl": ("kv", "RawPut", pb.RawPutRequest(key=b"k", value=b"v", ttl_ms=(1 << 64) - 1),
                 str((1 << 63) - 1)),
    "scan limit 0": ("kv", "RawScanAt", pb.RawScanAtRequest(limit=0), "must be 1"),
    "scan limit below 0": ("kv", "RawScanAt", pb.RawScanAtRequest(limit=-5), "must be 1"),
    "empty batch": ("kv", "RawBatch", pb.RawBatchRequest(), "operation"),
    "bootstrap, wide epoch": ("enc", "BootstrapEncryption", ea.BootstrapEncryptionRequest(
        wrapped_storage_dek=bytes(60), wrapped_raft_dek=bytes(60), storage_dek_id=1,
        raft_dek_id=2, writer_batch=[ea.WriterRegistryEntry(
            full_node_id=1, local_epoch=WIDE_EPOCH)]), "0xffff"),
    "bootstrap, half filled": ("enc", "BootstrapEncryption", ea.BootstrapEncryptionRequest(
        storage_dek_id=1), "raft_dek_id"),
    "bootstrap, duplicate writers": ("enc", "BootstrapEncryption", ea.BootstrapEncryptionRequest(
        wrapped_storage_dek=bytes(60), wrapped_raft_dek=bytes(60), storage_dek_id=1,
        raft_dek_id=2, writer_batch=[WRITER, TWIN]), "twice"),
    "bootstrap, one id for both": ("enc", "BootstrapEncryption", ea.BootstrapEncryptionRequest(
        wrapped_storage_dek=bytes(60), wrapped_raft_dek=bytes(60), storage_dek_id=7,
        raft_dek_id=7, writer_batch=[WRITER]), "7"),
    "rotate, no purpose": ("enc", "RotateDEK", ea.RotateDEKRequest(), "purpose"),
    "rotate, half filled": ("enc", "RotateDEK", ea.RotateDEKRequest(
        purpose=ea.RotateDEKRequest.PURPOSE_RAFT, new_dek_id=9), "wrapped_new_dek"),
    "rotate, wide epoch": ("enc", "RotateDEK", ea.RotateDEKRequest(
        purpose=ea.RotateDEKRequest.PURPOSE_RAFT, new_dek_id=9, wrapped_new_dek=bytes(60),
        proposer_node_id=1, proposer_local_epoch=WIDE_EPOCH), "0xffff"),
    "register, DEK 0": ("enc", "RegisterEncryptionWriter", ea.RegisterEncryptionWriterRequest(
        dek_id=0, writers=[WRITER]), "dek_id"),
    "register, nobody": ("enc", "RegisterEncryptionWriter", ea.RegisterEncryptionWriterRequest(
        dek_id=1), "writers"),
    "register, duplicates": ("enc", "RegisterEncryptionWriter", ea.RegisterEncryptionWriterRequest(
        dek_id=1, writers=[WRITER, TWIN]), "twice"),
    "cutover, wide epoch": ("enc", "EnableRaftEnvelope", ea.EnableRaftEnvelopeRequest(
        proposer_node_id=1, proposer_local_epoch=WIDE_EPOCH), "0xffff"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
async def test_a_bad_request_is_invalid_argument_and_names_the_limit(
        node: Cluster, name: str) -> None:
    service, method, request, names = BAD_CALLS[name]
    options = [("grpc.max_send_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(node.endpoints[0], options) as channel:
        before = await RaftAdminStub(channel).Status(pb.RaftAdminStatusRequest())
        stub = RawKVStub(channel) if service == "kv" else EncryptionAdminStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request, timeout=10)
        assert caught.value.code() is CODE.INVALID_ARGUMENT, caught.value.details()
        assert names.lower() in (caught.value.details() or "").lower()
        after = await RaftAdminStub(channel).Status(pb.RaftAdminStatusRequest())
        assert after.last_log_index == before.last_log_index


MUTATIONS = {
    "BootstrapEncryption": ea.BootstrapEncryptionRequest(),
    "RotateDEK": ea.RotateDEKRequest(purpose=ea.RotateDEKRequest.PURPOSE_STORAGE),
    "RegisterEncryptionWriter": ea.RegisterEncryptionWriterRequest(dek_id=1, writers=[WRITER]),
    "EnableStorageEnvelope": ea.EnableStorageEnvelopeRequest(),
    "EnableRaftEnvelope": ea.EnableRaftEnvelopeRequest(),
}


async def test_a_closed_gate_proposes_nothing(one_plain_member: Cluster) -> None:
    async with grpc.aio.insecure_channel(one_plain_member.endpoints[0]) as channel:
        raft, stub = RaftAdminStub(channel), EncryptionAdminStub(channel)
        before = await raft.Status(pb.RaftAdminStatusRequest())
        for method, request in MUTATIONS.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(request, timeout=10)
            assert caught.value.code() is CODE.FAILED_PRECONDITION, method
            assert "--encryption-enabled" in (caught.value.details() or "")
        after = await raft.Status(pb.RaftAdminStatusRequest())
        assert after.last_log_index == before.last_log_index
        capability = await stub.GetCapability(ea.Empty())
        assert not capability.encryption_capable


async def test_without_a_quorum_calls_are_unavailable_within_the_deadline(
        tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.nodes["n1"].start()
        async with grpc.aio.insecure_channel(cluster.endpoints[0]) as channel:
            kv = RawKVStub(channel)
            for call in (kv.RawPut(pb.RawPutRequest(key=b"k", value=b"v"), timeout=10,
                                   wait_for_ready=True),
                         kv.RawPut(pb.RawPutRequest(key=b"k", value=b"v"), timeout=1),
                         kv.RawGet(pb.RawGetRequest(key=b"k"), timeout=1)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is CODE.UNAVAILABLE, caught.value.details()
    finally:
        cluster.stop()


@pytest.mark.slow
async def test_a_flipped_byte_is_refused_or_harmless_and_never_a_wrong_value(
        tmp_path: Path) -> None:
    """Any byte of the store, the journal, the hard state or the sidecar."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    cluster = Cluster(tmp_path / "cluster", size=1)
    node = cluster.nodes["n1"]
    expected = {b"key-%03d" % number: b"value-%03d" % number * 20 for number in range(200)}
    try:
        await cluster.start()
        await cluster.encrypt()
        async with cluster.client() as client:
            for key, value in expected.items():
                await client.put(key, value)
        node.kill(signal.SIGTERM)
        files = [path for path in node.directory.rglob("*")
                 if path.is_file() and path.name != "LOCK"
                 and not path.name.endswith("-lock")]
        refused = 0
        for path in files:
            for _ in range(3):
                refused += await _flip_and_start(cluster, path, generator, expected)
        assert refused > 0
    finally:
        cluster.stop()


async def _flip_and_start(cluster: Cluster, path: Path, generator: random.Random,
                          expected: dict[bytes, bytes]) -> bool:
    """Damage one byte, start, compare, repair. True if the node refused to start."""
    node = cluster.nodes["n1"]
    backup = {each: each.read_bytes() for each in node.directory.rglob("*") if each.is_file()}
    original = backup[path]
    used = max(1, len(original.rstrip(b"\0")))
    offset = generator.randrange(used)
    where = f"{path.name} at {offset} of {len(original)}"
    damaged = bytearray(original)
    damaged[offset] ^= 1 << generator.randrange(8)
    path.write_bytes(damaged)
    try:
        try:
            await cluster.start()
        except RuntimeError:
            run = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-m", "elastickv", "node", *node.arguments],
                capture_output=True, timeout=20, check=False)
            node.process = None
            assert run.returncode in (ExitCode.CORRUPTION, ExitCode.STARTUP_REFUSED), \
                f"{where}: exit {run.returncode}: {run.stderr[-1500:]!r}"
            return True
        async with cluster.client() as client:
            for key, value in expected.items():
                found = await client.get(key)
                assert found.value == value, f"{where}: {key!r} has a wrong value"
        node.kill(signal.SIGTERM)
        return False
    finally:
        if node.process is not None:
            node.kill()
        for each in list(node.directory.rglob("*")):
            if each.is_file() and each not in backup:
                each.unlink()
        for each, content in backup.items():
            each.write_bytes(content)
