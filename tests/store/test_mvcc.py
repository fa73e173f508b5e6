"""The MVCC key codec and visibility."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastickv.clock import MAX_TIMESTAMP
from elastickv.errors import IntegrityError, InvalidArgument, StoreCorrupt
from elastickv.store.header import MAX_EXPIRY_MS, EncryptionState, encode_header
from elastickv.store.mvcc import (
    GROUP_BYTES,
    MAX_STORE_KEY_BYTES,
    MAX_USER_KEY_BYTES,
    decode_store_key,
    encode_store_key,
    key_prefix,
    scan_bound,
    time_left_ms,
    visible,
)

LMDB_LONGEST_KEY = 511

# Short keys over few, extreme bytes make prefixes and equal groups likely; the lengths around a
# group's end are where an encoding by groups goes wrong.
extreme_bytes = st.sampled_from([0x00, 0x01, 0x19, 0x7F, 0xFE, 0xFF])
user_keys = st.one_of(
    st.lists(extreme_bytes, min_size=1, max_size=6).map(bytes),
    st.builds(lambda byte, size: bytes([byte]) * size, extreme_bytes,
              st.sampled_from([GROUP_BYTES - 1, GROUP_BYTES, GROUP_BYTES + 1, 2 * GROUP_BYTES,
                               2 * GROUP_BYTES + 1, MAX_USER_KEY_BYTES - 1, MAX_USER_KEY_BYTES])),
    st.binary(min_size=1, max_size=MAX_USER_KEY_BYTES),
)
timestamps = st.one_of(st.integers(0, MAX_TIMESTAMP), st.sampled_from([0, 1, MAX_TIMESTAMP]))
versions = st.tuples(user_keys, timestamps)


@given(versions)
@example((b"\x00" * MAX_USER_KEY_BYTES, 0))
@example((b"\xff" * MAX_USER_KEY_BYTES, MAX_TIMESTAMP))
def test_round_trip_within_lmdb_limits(version: tuple[bytes, int]) -> None:
    store_key = encode_store_key(*version)
    assert decode_store_key(store_key) == version
    assert len(store_key) <= MAX_STORE_KEY_BYTES <= LMDB_LONGEST_KEY


@given(versions, versions)
@example((b"a", 5), (b"a\x00", 5))
@example((b"a" * GROUP_BYTES, 5), (b"a" * GROUP_BYTES + b"\x00", 5))
def test_order_is_key_ascending_then_timestamp_descending(
        left: tuple[bytes, int], right: tuple[bytes, int]) -> None:
    expected = (left[0], -left[1]) < (right[0], -right[1])
    assert (encode_store_key(*left) < encode_store_key(*right)) is expected


@given(st.lists(user_keys, min_size=2, max_size=2, unique=True), timestamps, timestamps)
def test_prefix_belongs_to_one_key(keys: list[bytes], ts: int, other_ts: int) -> None:
    assert encode_store_key(keys[0], ts).startswith(key_prefix(keys[0]))
    assert not encode_store_key(keys[1], other_ts).startswith(key_prefix(keys[0]))


@given(st.binary(max_size=MAX_USER_KEY_BYTES + 30), versions)
def test_scan_bound_splits_exactly(bound: bytes, version: tuple[bytes, int]) -> None:
    assert (scan_bound(bound) <= encode_store_key(*version)) is (bound <= version[0])
    assert len(scan_bound(bound)) <= LMDB_LONGEST_KEY


@given(st.binary(min_size=MAX_USER_KEY_BYTES + 1, max_size=MAX_USER_KEY_BYTES + 30), timestamps)
def test_scan_bound_longer_than_any_key(bound: bytes, ts: int) -> None:
    neighbour = bound[:MAX_USER_KEY_BYTES]
    assert encode_store_key(neighbour, ts) < scan_bound(bound)


@pytest.mark.parametrize("size", [0, MAX_USER_KEY_BYTES + 1])
def test_key_length_limits_are_named(size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"1-{MAX_USER_KEY_BYTES}"):
        encode_store_key(bytes(size), 1)


def mutated(store_key: bytes, position: int, byte: int) -> bytes:
    return store_key[:position] + bytes([byte]) + store_key[position + 1:]


SHORT = encode_store_key(b"abc", 7)
LONG = encode_store_key(b"x" * (GROUP_BYTES + 2), 7)


@pytest.mark.parametrize("store_key", [
    b"", SHORT[:-1], SHORT + b"\x00", LONG[1:], bytes(len(SHORT)),
    mutated(SHORT, GROUP_BYTES, 0), mutated(SHORT, GROUP_BYTES, GROUP_BYTES + 1),
    mutated(SHORT, GROUP_BYTES, 2), mutated(SHORT, 10, 1), mutated(LONG, GROUP_BYTES, GROUP_BYTES),
    mutated(LONG, 2 * GROUP_BYTES + 1, GROUP_BYTES + 1), mutated(LONG, 2 * GROUP_BYTES, 1),
    LONG * 20,
], ids=["empty", "short", "long", "shifted", "zeros", "marker-zero", "marker-more-in-last-group",
        "marker-too-small", "padding", "last-marker-in-first-group", "more-marker-in-last-group",
        "padding-in-last-group", "over-the-limit"])
def test_malformed_store_keys_are_refused(store_key: bytes) -> None:
    with pytest.raises(StoreCorrupt):
        decode_store_key(store_key)


@pytest.mark.parametrize(("header", "now_ms", "expected"), [
    (encode_header(), 0, True),
    (encode_header(tombstone=True), 0, False),
    (encode_header(expiry_ms=100), 99, True),
    (encode_header(expiry_ms=100), 100, False),
    (encode_header(expiry_ms=100), 101, False),
    (encode_header(tombstone=True, expiry_ms=100), 1, False),
], ids=["value", "tombstone", "before-expiry", "at-expiry", "after-expiry", "expiring-tombstone"])
def test_visibility(header: bytes, now_ms: int, expected: bool) -> None:
    assert visible(header, now_ms) is expected
    assert visible(header + b"body", now_ms) is expected


@pytest.mark.parametrize(("expiry_ms", "now_ms", "left_ms"), [
    (0, 99, 0), (100, 99, 1), (MAX_EXPIRY_MS, 1, MAX_EXPIRY_MS - 1)])
def test_what_a_value_has_left(expiry_ms: int, now_ms: int, left_ms: int) -> None:
    for state in EncryptionState:
        record = encode_header(state=state, expiry_ms=expiry_ms) + b"body"
        assert time_left_ms(record, now_ms) == left_ms


def test_visibility_of_an_illegal_header_is_an_error() -> None:
    with pytest.raises(IntegrityError):
        visible(b"\x04" + bytes(8), 0)
