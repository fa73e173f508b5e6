"""The rules of a write request: limits, and its form in the log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.clock import MAX_TIMESTAMP, pack_timestamp
from elastickv.crypto.keystore import KeyHandle, Purpose
from elastickv.errors import InvalidArgument
from elastickv.kv.api import MAX_TTL_MS, Condition, Op, OpKind
from elastickv.kv.txn import (
    MAX_BATCH_OPS,
    build_request,
    check_key,
    check_ops,
    expiry_ms,
    log_bytes,
)
from elastickv.store.header import HEADER_BYTES
from elastickv.store.values import plain_record, seal_record, tombstone_record
from elastickv.wire import encode_request

LIMITS = {"max_value_bytes": 100, "max_request_bytes": 250}


def put(key: bytes, value: bytes = b"v", ttl_ms: int = 0) -> Op:
    return Op(OpKind.PUT, key, value, ttl_ms)


@pytest.mark.parametrize(("ops", "conditions", "names"), [
    ([], [], "at least one operation"),
    ([put(b"")], [], "1 to 480"),
    ([put(b"k" * 481)], [], "1 to 480"),
    ([put(b"k", b"v" * 101)], [], "the limit is 100"),
    ([put(b"k", ttl_ms=-1)], [], "ttl_ms"),
    ([put(b"k", ttl_ms=(1 << 64) - 1)], [], str(MAX_TTL_MS)),
    ([put(b"k")], [Condition(b"", 1)], "condition key"),
    ([put(b"a", b"v" * 100), put(b"b", b"v" * 100), put(b"c", b"v" * 100)], [], "limit is 250"),
    ([put(b"k")] * (MAX_BATCH_OPS + 1), [], str(MAX_BATCH_OPS)),
], ids=["empty", "no key", "long key", "long value", "negative ttl", "long ttl",
        "condition", "request", "operations"])
def test_a_request_over_a_limit_is_refused_and_the_limit_named(
        ops: list[Op], conditions: list[Condition], names: str) -> None:
    with pytest.raises(InvalidArgument, match=names):
        check_ops(ops, conditions, **LIMITS)


@pytest.mark.parametrize("key", [b"k", b"k" * 480, b"\x00", b"\xff" * 480])
def test_keys_of_1_to_480_bytes_are_taken(key: bytes) -> None:
    check_key(key)
    assert check_ops([put(key, b"vv")], [], max_value_bytes=2, max_request_bytes=482) == \
        len(key) + 2


def test_expiry_counts_from_the_commit_timestamp() -> None:
    commit_ts = pack_timestamp(1_000, 7)
    assert expiry_ms(commit_ts, 0) == 0
    assert expiry_ms(commit_ts, 250) == 1_250


def test_the_longest_ttl_fits_a_value_header_at_any_commit_timestamp() -> None:
    check_ops([put(b"k", ttl_ms=MAX_TTL_MS)], [], **LIMITS)
    assert len(plain_record(b"", expiry_ms(MAX_TIMESTAMP, MAX_TTL_MS))) == HEADER_BYTES


def test_a_request_carries_sealed_records_tombstones_and_conditions() -> None:
    sealed: list[tuple[bytes, int, bytes, int]] = []

    def seal(key: bytes, commit_ts: int, value: bytes, expiry: int) -> bytes:
        sealed.append((key, commit_ts, value, expiry))
        return b"record of " + value

    commit_ts = pack_timestamp(5)
    request = build_request(
        [put(b"a", b"1", ttl_ms=10), Op(OpKind.DELETE, b"b")], [Condition(b"c", 9)], commit_ts,
        seal)
    assert request.commit_ts == commit_ts
    assert [(op.kind, op.key, op.record) for op in request.ops] == [
        (OpKind.PUT, b"a", b"record of 1"), (OpKind.DELETE, b"b", tombstone_record())]
    assert request.conditions == [(b"c", 9)]
    assert sealed == [(b"a", commit_ts, b"1", 15)]


def test_the_last_of_several_operations_on_one_key_wins() -> None:
    request = build_request([put(b"a", b"1"), put(b"b", b"2"), Op(OpKind.DELETE, b"a")], [], 1,
                            lambda key, ts, value, expiry: value)
    assert [(op.key, op.record) for op in request.ops] == [
        (b"a", tombstone_record()), (b"b", b"2")]


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=30), st.binary(max_size=60),
                          st.booleans()), min_size=1, max_size=5),
       st.lists(st.tuples(st.binary(min_size=1, max_size=30), st.integers(0, 9)), max_size=4))
def test_the_log_takes_no_more_than_was_reckoned(
        writes: list[tuple[bytes, bytes, bool]], expected: list[tuple[bytes, int]]) -> None:
    handle = KeyHandle(7, Purpose.STORAGE, bytes(32))
    ops = [Op(OpKind.DELETE, key) if gone else put(key, value) for key, value, gone in writes]
    conditions = [Condition(key, commit_ts) for key, commit_ts in expected]
    total = check_ops(ops, conditions, max_value_bytes=100, max_request_bytes=1000)
    request = build_request(
        ops, conditions, pack_timestamp(1), lambda key, ts, value, expiry: seal_record(
            handle, bytes(12), key, ts, value, expiry))
    assert len(encode_request(request)) + 4 <= log_bytes(ops, conditions, total)
