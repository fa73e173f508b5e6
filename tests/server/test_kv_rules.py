"""elastickv.server.kv_service: the limits of a request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_node import Faults, MemoryKv

from elastickv.errors import InvalidArgument
from elastickv.kv.api import PAIR_OVERHEAD_BYTES, Op, OpKind, result_too_large
from elastickv.kv.txn import MAX_BATCH_OPS
from elastickv.pb import service_pb2 as pb
from elastickv.server import kv_service
from elastickv.server.kv_service import (
    MAX_SCAN_LIMIT,
    RawKv,
    check_scan_limit,
    field_count,
    op_of,
    parse_batch,
)


@pytest.mark.parametrize("limit", [1, 2, MAX_SCAN_LIMIT])
def test_scan_limits_that_are_served(limit: int) -> None:
    assert check_scan_limit(limit) == limit


@pytest.mark.parametrize("limit", [0, -1, -(1 << 63), MAX_SCAN_LIMIT + 1, 1 << 63])
def test_scan_limits_that_are_refused(limit: int) -> None:
    with pytest.raises(InvalidArgument, match=f"1 to {MAX_SCAN_LIMIT}"):
        check_scan_limit(limit)


@pytest.mark.parametrize(("fitting", "keys_only", "remedy"), [
    (7, False, "scan in pages of at most 7 pairs, or scan with keys_only"),
    (7, True, "scan in pages of at most 7 pairs"),
    (0, False, "scan with keys_only"),
], ids=["some-fit", "keys-only", "none-fits"])
def test_a_result_that_is_too_large_says_what_fits(fitting: int, keys_only: bool,
                                                   remedy: str) -> None:
    error = result_too_large(1_000, fitting, keys_only=keys_only)
    assert "1000 bytes" in error.message
    assert error.remedy == remedy


def test_the_overhead_of_a_pair_is_an_upper_bound() -> None:
    for key, value in ((b"", b""), (b"k" * 480, b"v" * (8 << 20))):
        pair = pb.RawKVPair(key=key, value=value)
        size = pb.RawScanAtResponse(kv=[pair]).ByteSize()
        assert size <= len(key) + len(value) + PAIR_OVERHEAD_BYTES


@pytest.mark.parametrize(("message", "op"), [
    (pb.RawBatchOp(key=b"k", value=b"v", ttl_ms=5), Op(OpKind.PUT, b"k", b"v", 5)),
    (pb.RawBatchOp(kind=pb.RawBatchOp.DELETE, key=b"k"), Op(OpKind.DELETE, b"k")),
])
def test_batch_operations(message: pb.RawBatchOp, op: Op) -> None:
    assert op_of(message) == op


@pytest.mark.parametrize("message", [
    pb.RawBatchOp(kind=2, key=b"k"),  # type: ignore[arg-type]
    pb.RawBatchOp(kind=pb.RawBatchOp.DELETE, key=b"k", value=b"v"),
    pb.RawBatchOp(kind=pb.RawBatchOp.DELETE, key=b"k", ttl_ms=1),
])
def test_batch_operations_that_are_refused(message: pb.RawBatchOp) -> None:
    with pytest.raises(InvalidArgument):
        op_of(message)


@pytest.mark.parametrize(("ops", "conditions"), [
    (300_000, 0), (MAX_BATCH_OPS, 1), (1, MAX_BATCH_OPS)],
    ids=["operations", "one condition too many", "conditions"])
async def test_a_batch_is_counted_before_anything_is_made_of_it(
        monkeypatch: pytest.MonkeyPatch, ops: int, conditions: int) -> None:
    made: list[object] = []
    monkeypatch.setattr(kv_service, "op_of", made.append)
    monkeypatch.setattr(kv_service, "Condition", lambda *fields: made.append(fields))
    request = pb.RawBatchRequest.FromString(b"\x0a\x00" * ops + b"\x12\x00" * conditions)
    assert (len(request.ops), len(request.conditions)) == (ops, conditions)
    service = RawKv(MemoryKv(Faults()), max_result_bytes=1)
    with pytest.raises(InvalidArgument, match=f"{ops + conditions} operations.*{MAX_BATCH_OPS}"):
        await service.batch(request, 1.0)
    assert made == []


FIELDS: dict[str, tuple[bytes, int]] = {
    "none": (b"", 0),
    "an empty operation": (b"\x0a\x00", 1),
    "an operation and a condition": (b"\x0a\x03\x12\x01k\x12\x00", 2),
    "a number": (b"\x18\xff\x01\x0a\x00", 2),
    "fixed numbers": (b"\x19" + bytes(8) + b"\x1d" + bytes(4) + b"\x0a\x00", 3),
    "a group": (b"\x1b\x0a\x00\x1c\x0a\x00", 4),
    "a tag and a length that are longer than they need be": (
        b"\x8a\x80\x00\x81\x80\x00k\x0a\x00", 2),
    "what ends too early": (b"\x0a\x00\x0a\x05k", 2),
    "a number without an end": (b"\x0a\x00" + b"\xff" * 11, 1),
}


@pytest.mark.parametrize(("content", "count"), FIELDS.values(), ids=FIELDS)
def test_the_fields_of_a_message_are_counted(content: bytes, count: int) -> None:
    assert field_count(content, 9) == count
    assert field_count(content, 1) == min(count, 1)


@given(st.lists(st.binary(max_size=300)), st.lists(st.binary(max_size=300)))
def test_every_operation_and_condition_of_a_batch_is_counted(ops: list[bytes],
                                                             conditions: list[bytes]) -> None:
    request = pb.RawBatchRequest(ops=[pb.RawBatchOp(key=key) for key in ops],
                                 conditions=[pb.RawBatchCondition(key=key) for key in conditions])
    assert field_count(request.SerializeToString(), 1 << 20) == len(ops) + len(conditions)


def test_a_batch_of_too_many_operations_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take 40 times its size of memory, and an election timeout of the loop."""
    most = b"\x0a\x00" * MAX_BATCH_OPS
    padding = b"\x12\x80\x80\x20" + bytes(1 << 19)  # one condition, which is not well-formed
    assert len(padding) > kv_service.COUNTED_BYTES
    assert len(parse_batch(most).ops) == MAX_BATCH_OPS
    assert field_count(padding, 9) == 1
    with pytest.raises(InvalidArgument, match=str(MAX_BATCH_OPS)):
        parse_batch(most + padding)
    parsed: list[bytes] = []
    monkeypatch.setattr(kv_service, "pb", SimpleNamespace(
        RawBatchRequest=SimpleNamespace(FromString=parsed.append)))
    with pytest.raises(InvalidArgument):
        parse_batch(b"\x0a\x00" * (9 << 20))
    assert parsed == []
