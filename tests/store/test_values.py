"""Sealing and opening records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.crypto.cipher import seal_value
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.errors import IntegrityError, InvalidArgument
from elastickv.store.header import HEADER_BYTES, EncryptionState, encode_header, parse_header
from elastickv.store.mvcc import encode_store_key
from elastickv.store.values import open_record, plain_record, seal_record, tombstone_record

HANDLE = KeyHandle(7, Purpose.STORAGE, bytes(range(32)))
KEYSTORE = Keystore({7: HANDLE})
NONCE = bytes(range(12))
STORE_KEY = encode_store_key(b"key", 5)


def sealed(plaintext: bytes = b"secret value", expiry_ms: int = 0) -> bytes:
    return seal_record(HANDLE, NONCE, b"key", 5, plaintext, expiry_ms)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1), st.sampled_from([1, 2]), st.booleans())
def test_sealed_round_trip(plaintext: bytes, expiry_ms: int, version: int, compress: bool) -> None:
    """Also what another version or a compressing node wrote."""
    header_bytes = encode_header(state=EncryptionState.ENVELOPE, expiry_ms=expiry_ms)
    record = header_bytes + seal_value(HANDLE, NONCE, header_bytes, STORE_KEY, plaintext,
                                       version=version, compress=compress)
    if version == 1 and not compress:
        assert record == seal_record(HANDLE, NONCE, b"key", 5, plaintext, expiry_ms)
    header = parse_header(record)
    assert (header.tombstone, header.state, header.expiry_ms) == (
        False, EncryptionState.ENVELOPE, expiry_ms)
    assert open_record(KEYSTORE, STORE_KEY, record) == plaintext


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_plain_round_trip_needs_no_keys(plaintext: bytes, expiry_ms: int) -> None:
    record = plain_record(plaintext, expiry_ms)
    assert parse_header(record).expiry_ms == expiry_ms
    assert open_record(None, STORE_KEY, record) == plaintext


def test_a_nonce_of_the_wrong_length_seals_nothing() -> None:
    with pytest.raises(InvalidArgument, match="nonce of 11 bytes"):
        seal_record(HANDLE, NONCE[1:], b"key", 5, b"value")


def test_a_sealed_record_holds_no_plaintext() -> None:
    plaintext = b"a value that must not be found"
    assert plaintext not in sealed(plaintext)
    assert plaintext in plain_record(plaintext)


@given(st.integers(0, 8 * len(sealed()) - 1))
def test_every_flipped_bit_of_a_sealed_record_is_an_error(bit: int) -> None:
    record = bytearray(sealed())
    record[bit // 8] ^= 1 << bit % 8
    if record[0] == 0:
        # The header now says "plaintext": nothing is guessed, the envelope's bytes are the value.
        # The store's checksum is what refuses this record before it gets here.
        assert open_record(KEYSTORE, STORE_KEY, bytes(record)) == sealed()[HEADER_BYTES:]
        return
    with pytest.raises(IntegrityError):
        open_record(KEYSTORE, STORE_KEY, bytes(record))


@pytest.mark.parametrize("store_key", [
    encode_store_key(b"key", 6), encode_store_key(b"kez", 5), encode_store_key(b"key\x00", 5), b"",
], ids=["other-timestamp", "other-key", "longer-key", "none"])
def test_a_record_opens_only_in_its_place(store_key: bytes) -> None:
    with pytest.raises(IntegrityError):
        open_record(KEYSTORE, store_key, sealed())


def test_a_record_opens_only_under_its_header() -> None:
    moved = encode_header(state=EncryptionState.ENVELOPE, expiry_ms=9) + sealed()[HEADER_BYTES:]
    with pytest.raises(IntegrityError):
        open_record(KEYSTORE, STORE_KEY, moved)


@pytest.mark.parametrize(("keystore", "record"), [
    (None, sealed()), (Keystore(), sealed()), (KEYSTORE, sealed()[:HEADER_BYTES]),
    (KEYSTORE, sealed()[:-1]), (KEYSTORE, b"\x04" + bytes(8)), (KEYSTORE, b"\x00" * 8),
    (KEYSTORE, tombstone_record()), (KEYSTORE, b""),
], ids=["no-keystore", "unknown-key", "no-envelope", "cut", "unknown-state", "short", "tombstone",
        "empty"])
def test_what_does_not_open_is_an_error(keystore: Keystore | None, record: bytes) -> None:
    with pytest.raises(IntegrityError):
        open_record(keystore, STORE_KEY, record)


def test_errors_do_not_show_values() -> None:
    record = seal_record(HANDLE, NONCE, b"key", 5, b"do-not-show")
    with pytest.raises(IntegrityError) as caught:
        open_record(KEYSTORE, encode_store_key(b"key", 6), record)
    assert b"do-not-show" not in str(caught.value).encode()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
