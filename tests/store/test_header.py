"""The value header."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import IntegrityError
from elastickv.store.header import (
    HEADER_BYTES,
    MAX_EXPIRY_MS,
    EncryptionState,
    ValueHeader,
    check_record,
    encode_header,
    parse_header,
)


@pytest.mark.parametrize(("header", "encoded"), [
    (ValueHeader(False, EncryptionState.PLAINTEXT, 0), "00" + "00" * 8),
    (ValueHeader(True, EncryptionState.PLAINTEXT, 0), "01" + "00" * 8),
    (ValueHeader(False, EncryptionState.ENVELOPE, 0), "02" + "00" * 8),
    (ValueHeader(False, EncryptionState.ENVELOPE, 1), "02" + "01" + "00" * 7),
    (ValueHeader(False, EncryptionState.PLAINTEXT, 0x0102), "00" + "0201" + "00" * 6),
    (ValueHeader(False, EncryptionState.PLAINTEXT, MAX_EXPIRY_MS), "00" + "ff" * 8),
], ids=["plain", "tombstone", "envelope", "expiry-one", "expiry-little-endian", "expiry-highest"])
def test_layout(header: ValueHeader, encoded: str) -> None:
    data = encode_header(tombstone=header.tombstone, state=header.state, expiry_ms=header.expiry_ms)
    assert data.hex() == encoded
    assert parse_header(data + b"body") == header


@given(st.booleans(), st.sampled_from(EncryptionState), st.integers(0, MAX_EXPIRY_MS))
def test_round_trip(tombstone: bool, state: EncryptionState, expiry_ms: int) -> None:
    data = encode_header(tombstone=tombstone, state=state, expiry_ms=expiry_ms)
    assert len(data) == HEADER_BYTES
    assert parse_header(data) == ValueHeader(tombstone, state, expiry_ms)


@pytest.mark.parametrize("flags", [0x04, 0x05, 0x06, 0x08, 0x10, 0x80, 0xFF])
def test_unknown_states_and_reserved_bits_are_refused(flags: int) -> None:
    with pytest.raises(IntegrityError, match="illegal header byte"):
        parse_header(bytes([flags]) + bytes(8))


@pytest.mark.parametrize("size", range(HEADER_BYTES))
def test_short_records_are_refused(size: int) -> None:
    with pytest.raises(IntegrityError, match="shorter than its header"):
        check_record(bytes(size))


@pytest.mark.parametrize("expiry_ms", [-1, MAX_EXPIRY_MS + 1])
def test_expiry_must_fit(expiry_ms: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode_header(expiry_ms=expiry_ms)
