"""elastickv.server.grpc_server over real sockets: services, statuses, limits, hostile bytes."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from memory_node import MAX_VALUE_BYTES, MemoryNode, eventually, running

from elastickv import errors
from elastickv.crypto.nonce import full_node_id
from elastickv.errors import BindFailed, ConfigError, ElasticKVError
from elastickv.kv.api import MAX_KEY_BYTES
from elastickv.kv.turns import Turns
from elastickv.pb import encryption_admin_pb2 as admin_pb
from elastickv.pb import encryption_admin_pb2_grpc as admin_grpc
from elastickv.pb import service_pb2 as pb
from elastickv.pb import service_pb2_grpc as kv_grpc
from elastickv.server.grpc_server import FRONT_GRPC, FRONT_H2
from elastickv.server.methods import SMALL_MESSAGE_BYTES

KEY_LIMIT = str(MAX_KEY_BYTES)
VALUE_LIMIT = str(MAX_VALUE_BYTES)


@pytest.fixture(params=[FRONT_GRPC, FRONT_H2])
def front(request: pytest.FixtureRequest) -> str:
    """Everything here holds for both fronts."""
    return str(request.param)


@pytest.fixture
async def node(front: str) -> AsyncIterator[MemoryNode]:
    node = MemoryNode(reflection=True, front=front)
    async with running(node):
        yield node


@pytest.fixture
async def channel(node: MemoryNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(node.address) as channel:
        yield channel


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def trailers(error: grpc.aio.AioRpcError) -> Mapping[str, Any]:
    # Metadata is a mapping to dict() in some versions of grpcio and pairs to all of them.
    return dict(tuple(error.trailing_metadata()))


# --- the services ----------------------------------------------------------------------------


async def test_raw_kv(channel: grpc.aio.Channel) -> None:
    kv = kv_grpc.RawKVStub(channel)
    put = await kv.RawPut(pb.RawPutRequest(key=b"a", value=b"1"))
    assert put.success
    assert put.commit_index == 1
    got = await kv.RawGet(pb.RawGetRequest(key=b"a"))
    assert (got.value, got.exists, got.commit_ts) == (b"1", True, put.commit_ts)
    latest = await kv.RawLatestCommitTS(pb.RawLatestCommitTSRequest(key=b"a"))
    assert (latest.ts, latest.exists) == (put.commit_ts, True)
    deleted = await kv.RawDelete(pb.RawDeleteRequest(key=b"a"))
    assert deleted.success
    assert deleted.commit_ts > put.commit_ts
    gone = await kv.RawGet(pb.RawGetRequest(key=b"a"))
    assert (gone.value, gone.exists, gone.commit_ts) == (b"", False, 0)
    then = await kv.RawGet(pb.RawGetRequest(key=b"a", ts=put.commit_ts))
    assert (then.value, then.exists) == (b"1", True)


async def test_a_stale_read_is_asked_for_as_one_and_says_how_old_it_is(
        node: MemoryNode, channel: grpc.aio.Channel) -> None:
    kv = kv_grpc.RawKVStub(channel)
    node.kv.stale_ms = 1234
    stale_ages = [(await kv.RawGet(pb.RawGetRequest(key=b"a", stale=True))).stale_ms,
                  (await kv.RawScanAt(pb.RawScanAtRequest(limit=1, stale=True))).stale_ms]
    assert stale_ages == [1234, 1234]
    ages = [(await kv.RawGet(pb.RawGetRequest(key=b"a"))).stale_ms,
            (await kv.RawScanAt(pb.RawScanAtRequest(limit=1))).stale_ms]
    assert ages == [0, 0]
    assert node.faults.before == ["stale read", "stale read", "read", "read"]


async def test_batch_and_scan(channel: grpc.aio.Channel) -> None:
    kv = kv_grpc.RawKVStub(channel)
    done = await kv.RawBatch(pb.RawBatchRequest(
        ops=[pb.RawBatchOp(key=bytes([65 + n]), value=b"v%d" % n) for n in range(5)],
        conditions=[pb.RawBatchCondition(key=b"A", commit_ts=0)]))
    assert done.commit_ts
    pairs = await kv.RawScanAt(pb.RawScanAtRequest(start_key=b"B", end_key=b"E", limit=2))
    assert [(pair.key, pair.value) for pair in pairs.kv] == [(b"B", b"v1"), (b"C", b"v2")]
    keys = await kv.RawScanAt(pb.RawScanAtRequest(limit=9, reverse=True, keys_only=True))
    assert [(pair.key, pair.value) for pair in keys.kv] == [(k, b"") for k in
                                                            (b"E", b"D", b"C", b"B", b"A")]
    again = await failure(kv.RawBatch(pb.RawBatchRequest(
        ops=[pb.RawBatchOp(key=b"A", value=b"x")],
        conditions=[pb.RawBatchCondition(key=b"A", commit_ts=0)])))
    assert again.code() is grpc.StatusCode.ABORTED
    assert (await kv.RawGet(pb.RawGetRequest(key=b"A"))).value == b"v0"


async def test_transactional_kv(channel: grpc.aio.Channel) -> None:
    kv = kv_grpc.TransactionalKVStub(channel)
    assert (await kv.Put(pb.PutRequest(key=b"a", value=b"1"))).success
    assert (await kv.Get(pb.GetRequest(key=b"a"))).value == b"1"
    scanned = await kv.Scan(pb.ScanRequest(limit=5))
    assert [(kv_pair.key, kv_pair.value) for kv_pair in scanned.kv] == [(b"a", b"1")]
    assert (await kv.Delete(pb.DeleteRequest(key=b"a"))).success
    assert (await kv.Get(pb.GetRequest(key=b"a"))).value == b""


@pytest.mark.parametrize(("method", "request_message"), [
    ("PreWrite", pb.PreWriteRequest()), ("Commit", pb.CommitRequest()),
    ("Rollback", pb.RollbackRequest())])
async def test_multi_request_transactions_are_not_served(
        channel: grpc.aio.Channel, method: str, request_message: object) -> None:
    error = await failure(getattr(kv_grpc.TransactionalKVStub(channel), method)(request_message))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "RawBatch" in error.details()


async def test_encryption_admin(node: MemoryNode, channel: grpc.aio.Channel) -> None:
    admin = admin_grpc.EncryptionAdminStub(channel)
    report = await admin.GetCapability(admin_pb.Empty())
    assert (report.encryption_capable, report.full_node_id) == (True, full_node_id("n1"))
    made = await admin.BootstrapEncryption(admin_pb.BootstrapEncryptionRequest())
    assert (made.applied_index, made.storage_dek_id, made.raft_dek_id) == (1, 1, 2)
    rotated = await admin.RotateDEK(admin_pb.RotateDEKRequest(
        purpose=admin_pb.RotateDEKRequest.PURPOSE_STORAGE))
    assert rotated.new_dek_id == 3
    registered = await admin.RegisterEncryptionWriter(admin_pb.RegisterEncryptionWriterRequest(
        dek_id=3, writers=[admin_pb.WriterRegistryEntry(full_node_id=9, local_epoch=1)]))
    assert registered.applied_index == 3
    storage = await admin.EnableStorageEnvelope(admin_pb.EnableStorageEnvelopeRequest())
    assert [v.full_node_id for v in storage.capability_summary] == [full_node_id("n1")]
    raft = await admin.EnableRaftEnvelope(admin_pb.EnableRaftEnvelopeRequest())
    assert not raft.was_already_active
    assert (await admin.EnableRaftEnvelope(
        admin_pb.EnableRaftEnvelopeRequest())).was_already_active
    state = await admin.GetSidecarState(admin_pb.Empty())
    assert (state.active_storage_id, state.active_raft_id) == (3, 2)
    assert (state.storage_envelope_active, state.raft_envelope_cutover_index) == (True, 5)
    resync = await admin.ResyncSidecar(admin_pb.ResyncSidecarRequest(caller_full_node_id=1))
    assert set(resync.wrapped_deks_by_id) == {1, 2, 3}
    members = (await admin.GetMemberStatus(admin_pb.Empty())).members
    assert [(member.node_id, member.reachable, member.HasField("sidecar"))
            for member in members] == [("n1", True, True), ("gone", False, False)]
    assert node.encryption.proposals == ["bootstrap", "rotate storage", "register 1 under 3",
                                         "enable storage", "enable raft"]


async def test_raft_admin(node: MemoryNode, channel: grpc.aio.Channel) -> None:
    raft = kv_grpc.RaftAdminStub(channel)
    status = await raft.Status(pb.RaftAdminStatusRequest())
    assert status.state == pb.RAFT_ADMIN_STATE_LEADER
    assert (status.leader_id, status.node_id, status.term) == ("n1", "n1", 3)
    assert (status.commit_index, status.applied_index, status.fsm_pending) == (20, 18, 2)
    added = await raft.AddLearner(pb.RaftAdminAddLearnerRequest(
        id="n2", address="127.0.0.1:2", previous_index=1))
    assert added.index == 2
    stale = await failure(raft.AddVoter(pb.RaftAdminAddVoterRequest(
        id="n3", address="127.0.0.1:3", previous_index=1)))
    assert stale.code() is grpc.StatusCode.FAILED_PRECONDITION
    await raft.PromoteLearner(pb.RaftAdminPromoteLearnerRequest(id="n2"))
    servers = (await raft.Configuration(pb.RaftAdminConfigurationRequest())).servers
    assert [(server.id, server.suffrage, server.client_address) for server in servers] == [
        ("n1", "voter", node.address), ("n2", "voter", "")]
    await raft.TransferLeadership(pb.RaftAdminTransferLeadershipRequest(target_id="n2"))
    assert (await raft.Status(pb.RaftAdminStatusRequest())).state == pb.RAFT_ADMIN_STATE_FOLLOWER
    assert (await raft.RemoveServer(pb.RaftAdminRemoveServerRequest(id="n2"))).index == 4


# --- errors ----------------------------------------------------------------------------------

FROM_BELOW: dict[str, tuple[ElasticKVError, grpc.StatusCode]] = {
    "no leader": (errors.NoLeader("nobody leads"), grpc.StatusCode.UNAVAILABLE),
    "not the leader": (errors.NotLeader(leader_id="n2", leader_address="127.0.0.1:7"),
                       grpc.StatusCode.UNAVAILABLE),
    "queue full": (errors.Overloaded("too much"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "disk full": (errors.DiskFull("no space", remedy="free some"),
                  grpc.StatusCode.RESOURCE_EXHAUSTED),
    "unknown outcome": (errors.OutcomeUnknown("who knows"), grpc.StatusCode.UNKNOWN),
    "integrity": (errors.IntegrityError("does not open"), grpc.StatusCode.DATA_LOSS),
    "condition": (errors.ConditionFailed("no"), grpc.StatusCode.ABORTED),
    "time": (errors.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
}


@pytest.mark.parametrize("name", FROM_BELOW)
async def test_errors_from_below(node: MemoryNode, channel: grpc.aio.Channel, name: str) -> None:
    error, code = FROM_BELOW[name]
    node.faults.errors.append(error)
    caught = await failure(kv_grpc.RawKVStub(channel).RawPut(pb.RawPutRequest(key=b"a")))
    assert (caught.code(), caught.details()) == (code, str(error))
    told = trailers(caught)
    assert told["elastickv-error"] == type(error).__name__
    assert told["elastickv-outcome"] == error.outcome.value
    assert told.get("elastickv-leader") == getattr(error, "leader_address", None)


@pytest.mark.parametrize("message", ["x" * 10_000, "é" * 10_000, "𝄞" * 10_000, "%" * 10_000,
                                     "a file named \ud800"],
                         ids=["ascii", "2 bytes", "4 bytes", "percent signs", "no UTF-8"])
async def test_an_error_is_told_whatever_its_text(node: MemoryNode, channel: grpc.aio.Channel,
                                                  message: str) -> None:
    node.faults.errors.append(errors.DiskFull(message))
    kv = kv_grpc.RawKVStub(channel)
    caught = await failure(kv.RawPut(pb.RawPutRequest(key=b"a")))
    assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers(caught)["elastickv-error"] == "DiskFull"
    assert caught.details()[:300] == message.replace("\ud800", "?")[:300]
    assert (await kv.RawPut(pb.RawPutRequest(key=b"a"))).success


async def test_a_defect_is_internal_and_the_next_call_works(
        node: MemoryNode, channel: grpc.aio.Channel) -> None:
    node.faults.errors.append(ZeroDivisionError("with a secret"))
    kv = kv_grpc.RawKVStub(channel)
    caught = await failure(kv.RawPut(pb.RawPutRequest(key=b"a")))
    assert caught.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.details()
    assert trailers(caught)["elastickv-outcome"] == "unknown"
    assert (await kv.RawPut(pb.RawPutRequest(key=b"a"))).success


async def test_a_call_that_is_cancelled_below_ends_at_once(
        node: MemoryNode, channel: grpc.aio.Channel) -> None:
    node.faults.errors.append(asyncio.CancelledError())
    caught = await failure(kv_grpc.RawKVStub(channel).RawPut(pb.RawPutRequest(key=b"a"),
                                                             timeout=60))
    assert caught.code() is grpc.StatusCode.CANCELLED
    assert trailers(caught)["elastickv-outcome"] == "unknown"


BAD_REQUESTS: dict[str, tuple[str, object, str]] = {
    "put, empty key": ("RawPut", pb.RawPutRequest(value=b"v"), KEY_LIMIT),
    "put, long key": ("RawPut", pb.RawPutRequest(key=b"k" * 481, value=b"v"), KEY_LIMIT),
    "put, large value": ("RawPut", pb.RawPutRequest(key=b"k", value=bytes(MAX_VALUE_BYTES + 1)),
                         VALUE_LIMIT),
    "put, value of twice the limit": (
        "RawPut", pb.RawPutRequest(key=b"k", value=bytes(2 * MAX_VALUE_BYTES)), VALUE_LIMIT),
    "get, empty key": ("RawGet", pb.RawGetRequest(), KEY_LIMIT),
    "get, long key": ("RawGet", pb.RawGetRequest(key=b"k" * 481), KEY_LIMIT),
    "delete, empty key": ("RawDelete", pb.RawDeleteRequest(), KEY_LIMIT),
    "latest, long key": ("RawLatestCommitTS", pb.RawLatestCommitTSRequest(key=b"k" * 481),
                         KEY_LIMIT),
    "scan, no limit": ("RawScanAt", pb.RawScanAtRequest(), "1 to 100000"),
    "scan, negative limit": ("RawScanAt", pb.RawScanAtRequest(limit=-1), "1 to 100000"),
    "scan, huge limit": ("RawScanAt", pb.RawScanAtRequest(limit=1 << 40), "1 to 100000"),
    "batch, empty": ("RawBatch", pb.RawBatchRequest(), "at least one"),
    "batch, empty key": ("RawBatch", pb.RawBatchRequest(ops=[pb.RawBatchOp(value=b"v")]),
                         KEY_LIMIT),
    "batch, too many": ("RawBatch", pb.RawBatchRequest(ops=[pb.RawBatchOp(key=b"k")] * 10_001),
                        "10000"),
    "batch, too large": ("RawBatch", pb.RawBatchRequest(
        ops=[pb.RawBatchOp(key=b"k", value=bytes(MAX_VALUE_BYTES))] * 5), "limit"),
    "batch, long condition": ("RawBatch", pb.RawBatchRequest(
        ops=[pb.RawBatchOp(key=b"k")],
        conditions=[pb.RawBatchCondition(key=b"k" * 481)]), KEY_LIMIT),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_requests_name_the_limit(node: MemoryNode, channel: grpc.aio.Channel,
                                           name: str) -> None:
    method, message, named = BAD_REQUESTS[name]
    caught = await failure(getattr(kv_grpc.RawKVStub(channel), method)(message))
    assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in caught.details()
    assert node.kv.index == 0


async def test_limits_are_inclusive(channel: grpc.aio.Channel) -> None:
    kv = kv_grpc.RawKVStub(channel)
    key, value = b"k" * MAX_KEY_BYTES, bytes(MAX_VALUE_BYTES)
    assert (await kv.RawPut(pb.RawPutRequest(key=key, value=value))).success
    assert (await kv.RawGet(pb.RawGetRequest(key=key))).value == value


async def test_a_scan_that_fits_no_response_is_refused(channel: grpc.aio.Channel) -> None:
    kv = kv_grpc.RawKVStub(channel)
    for number in range(40):
        await kv.RawPut(pb.RawPutRequest(key=b"%03d" % number, value=bytes(MAX_VALUE_BYTES)))
    caught = await failure(kv.RawScanAt(pb.RawScanAtRequest(limit=40)))
    assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailers(caught)["elastickv-error"] == "ResultTooLarge"
    assert len((await kv.RawScanAt(pb.RawScanAtRequest(limit=30))).kv) == 30


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_client_may_compress(channel: grpc.aio.Channel,
                                     compression: grpc.Compression) -> None:
    kv = kv_grpc.RawKVStub(channel)
    value = bytes(MAX_VALUE_BYTES)
    await kv.RawPut(pb.RawPutRequest(key=b"k", value=value), compression=compression)
    got = await kv.RawGet(pb.RawGetRequest(key=b"k"), compression=compression)
    assert got.value == value


async def test_an_oversized_message_is_refused_and_the_node_goes_on(
        node: MemoryNode, channel: grpc.aio.Channel) -> None:
    kv = kv_grpc.RawKVStub(channel)
    caught = await failure(kv.RawPut(pb.RawPutRequest(key=b"k", value=bytes(16 << 20))))
    assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "message larger than max" in str(caught.details())  # by this, clients know its cause
    assert node.kv.index == 0
    assert (await kv.RawPut(pb.RawPutRequest(key=b"k", value=b"v"))).success


@pytest.mark.parametrize("size", [20_000, 50_000])
async def test_too_much_metadata_ends_the_call_alone(node: MemoryNode, channel: grpc.aio.Channel,
                                                     size: int) -> None:
    kv = kv_grpc.RawKVStub(channel)
    node.faults.hold = asyncio.Event()
    under_way = kv.RawPut(pb.RawPutRequest(key=b"k", value=b"v"))
    await eventually(lambda: node.faults.before == ["write"])
    caught = await failure(kv.RawPut(
        pb.RawPutRequest(key=b"other", value=b"v"),
        metadata=[(f"x-{number}", "v" * 1000) for number in range(size // 1000)]))
    assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "metadata" in str(caught.details())
    node.faults.hold.set()
    assert (await under_way).success
    assert node.kv.index == 1


@pytest.mark.parametrize("method", ["PreWrite", "Commit", "Rollback"])
async def test_what_is_not_served_is_not_parsed(channel: grpc.aio.Channel, method: str) -> None:
    """A megabyte may hold half a million parts."""
    caught = await failure(channel.unary_unary(f"/TransactionalKV/{method}")(b"no message"))
    assert caught.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_batches_take_turns_and_nothing_else_waits_for_one(
        node: MemoryNode, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one pass of the loop would keep it from everything else for as long as all take."""
    turn = asyncio.Event()

    async def enter(turns: Turns) -> None:
        await turn.wait()

    monkeypatch.setattr(Turns, "enter", enter)
    kv = kv_grpc.RawKVStub(channel)
    batch = asyncio.ensure_future(kv.RawBatch(pb.RawBatchRequest(
        ops=[pb.RawBatchOp(key=b"k", value=b"v")])))
    malformed = asyncio.ensure_future(failure(channel.unary_unary("/RawKV/RawBatch")(b"none")))
    assert (await kv.RawPut(pb.RawPutRequest(key=b"other", value=b"v"))).success
    assert not batch.done()
    assert not malformed.done()
    turn.set()
    assert (await batch).commit_index == 2
    assert (await malformed).code() is grpc.StatusCode.INVALID_ARGUMENT


SMALL_METHODS = ["RawKV/RawGet", "RawKV/RawScanAt",
                 "EncryptionAdmin/RegisterEncryptionWriter", "RaftAdmin/AddVoter",
                 "grpc.health.v1.Health/Check"]


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
@pytest.mark.parametrize("method", SMALL_METHODS)
async def test_a_method_without_a_value_takes_small_requests_only(
        channel: grpc.aio.Channel, method: str, compression: grpc.Compression) -> None:
    """Zeros are no message: a request that is parsed ends as one that does not parse."""
    call = channel.unary_unary(f"/{method}")
    refused = await failure(call(bytes(SMALL_MESSAGE_BYTES + 1), compression=compression))
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "message larger than max" in str(refused.details())
    parsed = await failure(call(bytes(SMALL_MESSAGE_BYTES), compression=compression))
    assert parsed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a message" in str(parsed.details())


@pytest.mark.parametrize(("method", "message"), [
    ("RawKV/RawPut", pb.RawPutRequest(key=b"k", value=bytes(2 * SMALL_MESSAGE_BYTES))),
    ("RawKV/RawBatch", pb.RawBatchRequest(
        ops=[pb.RawBatchOp(key=b"k", value=bytes(2 * SMALL_MESSAGE_BYTES))])),
    ("TransactionalKV/Put", pb.PutRequest(key=b"k", value=bytes(2 * SMALL_MESSAGE_BYTES))),
], ids=["put", "batch", "transactional put"])
async def test_a_method_with_a_value_gets_as_far_as_the_values_limit(
        channel: grpc.aio.Channel, method: str, message: Any) -> None:
    refused = await failure(channel.unary_unary(f"/{method}")(message.SerializeToString()))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert VALUE_LIMIT in refused.details()


async def test_an_error_comes_before_the_callers_own_deadline(
        node: MemoryNode, channel: grpc.aio.Channel) -> None:
    node.faults.hold = asyncio.Event()
    caught = await failure(kv_grpc.RawKVStub(channel).RawPut(pb.RawPutRequest(key=b"a"),
                                                             timeout=0.5))
    assert trailers(caught)["elastickv-error"] == "DeadlineExceeded"


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    for path in ("/RawKV/RawNothing", "/NoService/RawPut"):
        caught = await failure(channel.unary_unary(path)(b""))
        assert caught.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_that_does_not_parse_changes_nothing(
        node: MemoryNode, channel: grpc.aio.Channel) -> None:
    caught = await failure(channel.unary_unary("/RawKV/RawPut")(b"\xff\xff\xff\xff"))
    assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert node.kv.index == 0


# --- health and reflection -------------------------------------------------------------------


async def test_health_follows_the_leader(node: MemoryNode, channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)

    async def states() -> dict[str, int]:
        return {name: (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
                for name in ("", "RawKV", "TransactionalKV", "EncryptionAdmin", "RaftAdmin")}

    up = health_pb2.HealthCheckResponse.SERVING
    down = health_pb2.HealthCheckResponse.NOT_SERVING
    assert set((await states()).values()) == {up}
    watch = health.Watch(health_pb2.HealthCheckRequest(service="RawKV"))
    assert (await watch.read()).status == up
    node.engine.leader_id = ""
    assert (await watch.read()).status == down
    assert await states() == {"": down, "RawKV": down, "TransactionalKV": down,
                              "EncryptionAdmin": up, "RaftAdmin": up}
    node.engine.leader_id = "n1"
    assert (await watch.read()).status == up
    watch.cancel()


async def test_health_of_an_unknown_service(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="Nothing")
    assert (await failure(health.Check(request))).code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(request)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def services_by_reflection(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        return sorted(ProtoReflectionDescriptorDatabase(channel).get_services())


async def test_reflection(node: MemoryNode) -> None:
    services = await asyncio.to_thread(services_by_reflection, node.address)
    assert services == ["EncryptionAdmin", "RaftAdmin", "RawKV", "TransactionalKV",
                        "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]


async def test_reflection_is_off_by_default(front: str) -> None:
    node = MemoryNode(front=front)
    async with running(node):
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(services_by_reflection, node.address)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- sockets ---------------------------------------------------------------------------------

GARBAGE = {
    "zeros": bytes(4096),
    "an HTTP/1 request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "a preface and a huge frame": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
    "a preface and noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.Random(1).randbytes(4096),
    "noise": random.Random(2).randbytes(65536),
}


async def said_goodbye(address: str, content: bytes) -> None:
    """Send bytes; return when the server has ended the connection."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(10):
            writer.write(content)
            await writer.drain()
            while await reader.read(65536):
                pass
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize("name", GARBAGE)
async def test_random_bytes_end_the_connection_and_the_node_goes_on(
        node: MemoryNode, channel: grpc.aio.Channel, name: str) -> None:
    kv = kv_grpc.RawKVStub(channel)
    await kv.RawPut(pb.RawPutRequest(key=b"before", value=b"1"))
    await said_goodbye(node.address, GARBAGE[name])
    assert (await kv.RawGet(pb.RawGetRequest(key=b"before"))).value == b"1"
    async with grpc.aio.insecure_channel(node.address) as another:
        assert (await kv_grpc.RawKVStub(another).RawPut(pb.RawPutRequest(key=b"after"))).success


async def test_a_port_in_use_is_refused_though_it_could_be_shared(node: MemoryNode,
                                                                  front: str) -> None:
    with pytest.raises(BindFailed, match=str(node.server.port)):
        await MemoryNode("n2", port=node.server.port, front=front).start()


async def test_a_port_of_a_plain_listener_is_refused(front: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(BindFailed):
            await MemoryNode(port=other.getsockname()[1], front=front).start()


def test_there_are_two_fronts() -> None:
    with pytest.raises(ConfigError, match="carrier pigeon"):
        MemoryNode(front="carrier pigeon")


async def test_a_stopped_server_frees_its_port_and_lets_calls_end(front: str) -> None:
    node = MemoryNode(front=front)
    node.faults.hold = asyncio.Event()
    await node.start()
    port = node.server.port
    async with grpc.aio.insecure_channel(node.address) as channel:
        call = kv_grpc.RawKVStub(channel).RawPut(pb.RawPutRequest(key=b"a"), timeout=10)
        answer = asyncio.ensure_future(call)
        await eventually(lambda: node.faults.before == ["write"])
        stopping = asyncio.create_task(node.server.stop(grace_s=10))
        node.faults.hold.set()
        assert (await answer).success
        await stopping
    again = MemoryNode(port=port, front=front)
    async with running(again):
        assert again.server.port == port


async def test_many_connections_share_the_accept_loops(node: MemoryNode) -> None:
    async def one(number: int) -> bool:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(node.address, options=options) as channel:
            request = pb.RawPutRequest(key=b"%d" % number, value=b"v")
            return (await kv_grpc.RawKVStub(channel).RawPut(request)).success

    assert all(await asyncio.gather(*(one(number) for number in range(24))))
    assert node.kv.index == 24
