"""The envelope layout, byte for byte, and what is refused before any key is touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.crypto import envelope
from elastickv.crypto.envelope import Envelope, EnvelopeError, Failure
from elastickv.errors import IntegrityError

ENVELOPES = st.builds(
    Envelope, st.sampled_from(envelope.VERSIONS), st.sampled_from((0, envelope.FLAG_SNAPPY)),
    st.integers(1, envelope.MAX_KEY_ID), st.binary(min_size=12, max_size=12),
    st.binary(min_size=16, max_size=200))


def test_the_layout() -> None:
    encoded = envelope.encode_envelope(Envelope(1, 1, 0x0A0B0C0D, b"N" * 12, b"C" * 3 + b"T" * 16))
    assert encoded == b"\x01\x01\x0a\x0b\x0c\x0d" + b"N" * 12 + b"CCC" + b"T" * 16
    assert len(encoded) - 3 == envelope.OVERHEAD_BYTES == 34


def test_the_storage_aad() -> None:
    assert envelope.storage_aad(1, 0, 7, b"H" * 9, b"key") == b"\x01\x00\x00\x00\x00\x07" \
        + b"H" * 9 + b"key"


def test_the_raft_aad() -> None:
    assert envelope.raft_aad(1, 7) == b"R\x01\x00\x00\x00\x07"


@given(ENVELOPES)
def test_an_envelope_parses_to_itself(value: Envelope) -> None:
    assert envelope.parse_envelope(envelope.encode_envelope(value)) == value


@given(st.binary(max_size=80))
def test_random_bytes_parse_canonically_or_not_at_all(data: bytes) -> None:
    try:
        parsed = envelope.parse_envelope(data)
    except IntegrityError:
        return
    assert envelope.encode_envelope(parsed) == data


GOOD = envelope.encode_envelope(Envelope(1, 0, 7, bytes(12), bytes(16)))


def test_an_envelope_shorter_than_the_overhead_is_truncated() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(EnvelopeError) as caught:
            envelope.parse_envelope(GOOD[:length])
        assert caught.value.reason is Failure.TRUNCATED


@pytest.mark.parametrize(("changed", "reason"), [
    pytest.param(b"\x00" + GOOD[1:], Failure.VERSION, id="version 0"),
    pytest.param(b"\x03" + GOOD[1:], Failure.VERSION, id="version 3"),
    pytest.param(b"\x01\x02" + GOOD[2:], Failure.FLAG, id="flag bit 1"),
    pytest.param(b"\x01\x81" + GOOD[2:], Failure.FLAG, id="flag bit 7"),
    pytest.param(b"\x01\x00" + bytes(4) + GOOD[6:], Failure.KEY_ID, id="key id 0"),
])
def test_what_is_unknown_is_refused(changed: bytes, reason: Failure) -> None:
    with pytest.raises(EnvelopeError) as caught:
        envelope.parse_envelope(changed)
    assert caught.value.reason is reason
