"""Entries that a leader proposed itself and need neither decrypt nor decode."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.crypto.cipher import seal_raft
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.errors import IntegrityError, WireError
from elastickv.kv.api import Condition, Op, OpKind
from elastickv.kv.fsm import read_payload
from elastickv.kv.own_entries import MOST_ENTRIES, MOST_ENTRY_BYTES, OwnEntries
from elastickv.kv.txn import build_request
from elastickv.store.values import plain_record
from elastickv.wire import OP_PUT, WriteOp, WriteRequest, Writes, decode_entry, encode_writes

HANDLE = KeyHandle(7, Purpose.RAFT, bytes(range(32)))


def writes(value: bytes) -> Writes:
    return Writes([WriteRequest(9, [WriteOp(OP_PUT, b"key", plain_record(value, 0))], [])])


def clear(value: bytes) -> bytes:
    return encode_writes(writes(value).requests)


def sealed(payload: bytes, nonce: int = 1) -> bytes:
    return seal_raft(HANDLE, nonce.to_bytes(12, "big"), payload)


VALUE = clear(b"value")
SEALED = sealed(VALUE)


def test_an_own_entry_is_known_once() -> None:
    own = OwnEntries()
    own.add(SEALED, writes(b"value"), is_sealed=True)
    assert own.take(SEALED, is_sealed=True) == writes(b"value")
    assert own.take(SEALED, is_sealed=True) is None


@pytest.mark.parametrize("is_sealed", [True, False])
def test_what_it_was_encoded_from_is_not_decoded(is_sealed: bool) -> None:
    own, entry = OwnEntries(), writes(b"value")
    payload = SEALED if is_sealed else VALUE
    own.add(payload, entry, is_sealed=is_sealed)
    assert own.take(payload, is_sealed=is_sealed) is entry


@pytest.mark.parametrize("other", [
    pytest.param(SEALED[:-1] + bytes((SEALED[-1] ^ 1,)), id="another tag"),
    pytest.param(SEALED[:-1], id="cut"),
    pytest.param(SEALED + b"\0", id="longer"),
    pytest.param(sealed(clear(b"other")), id="another text under the same nonce"),
    pytest.param(sealed(VALUE, nonce=2), id="another nonce"),
    pytest.param(b"", id="nothing"),
])
def test_other_bytes_are_not_known(other: bytes) -> None:
    own = OwnEntries()
    own.add(SEALED, writes(b"value"), is_sealed=True)
    assert own.take(other, is_sealed=True) is None
    assert own.take(SEALED, is_sealed=True) == writes(b"value")


@pytest.mark.parametrize(("payload", "is_sealed"), [(SEALED, False), (VALUE, True)])
def test_it_is_not_known_in_the_other_form(payload: bytes, is_sealed: bool) -> None:
    own = OwnEntries()
    own.add(payload, writes(b"value"), is_sealed=not is_sealed)
    assert own.take(payload, is_sealed=is_sealed) is None


def test_the_oldest_are_forgotten() -> None:
    own = OwnEntries()
    payloads = [sealed(VALUE, nonce) for nonce in range(MOST_ENTRIES + 1)]
    for payload in payloads:
        own.add(payload, writes(b"value"), is_sealed=True)
    assert own.take(payloads[0], is_sealed=True) is None
    assert all(own.take(payload, is_sealed=True) == writes(b"value") for payload in payloads[1:])


def test_large_ones_are_not_kept() -> None:
    own = OwnEntries()
    large = writes(bytes(MOST_ENTRY_BYTES))
    payload = sealed(encode_writes(large.requests))
    own.add(payload, large, is_sealed=True)
    assert own.take(payload, is_sealed=True) is None


def test_only_what_is_not_its_own_is_decrypted() -> None:
    """The keystore is empty: what comes out without an error was not decrypted."""
    own = OwnEntries()
    own.add(SEALED, writes(b"value"), is_sealed=True)
    assert read_payload(SEALED, 9, 7, Keystore(), own) == writes(b"value")
    with pytest.raises(IntegrityError):
        read_payload(SEALED, 9, 7, Keystore(), own)


def test_up_to_the_cutover_nothing_is_taken_for_an_envelope() -> None:
    own = OwnEntries()
    own.add(SEALED, writes(b"value"), is_sealed=True)
    with pytest.raises(WireError):
        read_payload(SEALED, 7, 7, Keystore(), own)


def test_above_the_cutover_an_own_entry_in_the_clear_is_refused_like_any_other() -> None:
    own = OwnEntries()
    own.add(VALUE, writes(b"value"), is_sealed=False)
    with pytest.raises(IntegrityError):
        read_payload(VALUE, 9, 7, Keystore(), own)
    assert read_payload(VALUE, 7, 7, Keystore(), own) == writes(b"value")


KEYS = st.binary(min_size=1, max_size=480)
PUTS = st.builds(Op, st.just(OpKind.PUT), KEYS, st.binary(max_size=50), st.integers(0, 1000))
DELETES = st.builds(Op, st.just(OpKind.DELETE), KEYS)
OPS = st.lists(PUTS | DELETES, min_size=1, max_size=5)
CONDITIONS = st.lists(st.builds(Condition, KEYS, st.integers(0, (1 << 64) - 1)), max_size=3)


@given(st.lists(st.tuples(OPS, CONDITIONS, st.integers(1 << 20, (1 << 64) - 1)),
                min_size=1, max_size=4))
def test_what_a_leader_applies_is_what_the_others_decode(
        requests: list[tuple[list[Op], list[Condition], int]]) -> None:
    built = Writes([
        build_request(ops, conditions, commit_ts,
                      lambda key, ts, value, expiry_ms: plain_record(value, expiry_ms))
        for ops, conditions, commit_ts in requests])
    assert decode_entry(encode_writes(built.requests)) == built
