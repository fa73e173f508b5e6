"""Sealing and opening: both versions, compression, and every way an envelope can be wrong."""

from __future__ import annotations

import cramjam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.crypto import cipher
from elastickv.crypto.cipher import (
    open_raft,
    open_record_value,
    open_value,
    seal_raft,
    seal_record_value,
    seal_value,
)
from elastickv.crypto.envelope import (
    FLAG_SNAPPY,
    OVERHEAD_BYTES,
    VERSION_GCM,
    VERSION_GCM_SIV,
    VERSIONS,
    EnvelopeError,
    Failure,
    encode_prefix,
)
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.errors import InvalidArgument

HANDLE = KeyHandle(7, Purpose.STORAGE, bytes(range(32)))
KEYSTORE = Keystore({7: HANDLE})
NONCE = bytes(range(12))
HEADER = b"\x02" + bytes(8)
STORE_KEY = b"user-key\x00\x01"
COMPRESSIBLE = b"abcdefgh" * 200


def flips(data: bytes) -> list[bytes]:
    return [data[:i] + bytes((data[i] ^ bit,)) + data[i + 1:]
            for i in range(len(data)) for bit in (0x01, 0x80)]


@given(plaintext=st.binary(max_size=300), store_key=st.binary(max_size=40),
       header=st.binary(min_size=9, max_size=9), nonce=st.binary(min_size=12, max_size=12),
       version=st.sampled_from(VERSIONS), compress=st.booleans())
def test_a_value_opens_to_what_was_sealed(plaintext: bytes, store_key: bytes, header: bytes,
                                          nonce: bytes, version: int, compress: bool) -> None:
    sealed = seal_value(HANDLE, nonce, header, store_key, plaintext, version=version,
                        compress=compress)
    assert sealed[0] == version
    assert len(sealed) <= len(plaintext) + OVERHEAD_BYTES
    assert open_value(KEYSTORE, header, store_key, sealed) == plaintext


@given(payload=st.binary(max_size=300), version=st.sampled_from(VERSIONS))
def test_a_log_entry_opens_to_what_was_sealed(payload: bytes, version: int) -> None:
    assert open_raft(KEYSTORE, seal_raft(HANDLE, NONCE, payload, version)) == payload


@pytest.mark.parametrize("version", VERSIONS)
def test_any_flipped_bit_of_a_value_is_an_integrity_error(version: int) -> None:
    sealed = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, COMPRESSIBLE, version=version,
                        compress=True)
    for changed in flips(sealed):
        with pytest.raises(EnvelopeError):
            open_value(KEYSTORE, HEADER, STORE_KEY, changed)


@pytest.mark.parametrize("version", VERSIONS)
def test_any_flipped_bit_of_a_log_entry_is_an_integrity_error(version: int) -> None:
    for changed in flips(seal_raft(HANDLE, NONCE, b"payload", version)):
        with pytest.raises(EnvelopeError):
            open_raft(KEYSTORE, changed)


@pytest.mark.parametrize(("header", "store_key"), [
    pytest.param(HEADER, b"another-key\x00\x01", id="moved to another key"),
    pytest.param(b"\x03" + bytes(8), STORE_KEY, id="tombstone bit set"),
    pytest.param(b"\x02\x01" + bytes(7), STORE_KEY, id="expiry changed"),
    pytest.param(HEADER + STORE_KEY[:1], STORE_KEY[1:] + b"\x00", id="boundary moved"),
])
def test_a_value_opens_only_in_its_place(header: bytes, store_key: bytes) -> None:
    sealed = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, b"value")
    with pytest.raises(EnvelopeError) as caught:
        open_value(KEYSTORE, header, store_key, sealed)
    assert caught.value.reason is Failure.TAG


def test_a_value_of_one_version_does_not_open_as_the_other() -> None:
    sealed = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, b"value", version=VERSION_GCM)
    with pytest.raises(EnvelopeError):
        open_value(KEYSTORE, HEADER, STORE_KEY, bytes((VERSION_GCM_SIV,)) + sealed[1:])


def test_a_value_is_no_log_entry_and_the_reverse() -> None:
    with pytest.raises(EnvelopeError):
        open_raft(KEYSTORE, seal_value(HANDLE, NONCE, HEADER, STORE_KEY, b"value"))
    with pytest.raises(EnvelopeError):
        open_value(KEYSTORE, HEADER, STORE_KEY, seal_raft(HANDLE, NONCE, b"value"))


def test_an_unknown_key_id_is_named() -> None:
    sealed = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, b"value")
    with pytest.raises(EnvelopeError, match="key id 7") as caught:
        open_value(Keystore(), HEADER, STORE_KEY, sealed)
    assert caught.value.reason is Failure.KEY_ID
    with pytest.raises(EnvelopeError, match="key id 7"):
        open_raft(Keystore(), seal_raft(HANDLE, NONCE, b"payload"))


def test_another_key_under_the_same_id_does_not_open() -> None:
    other = Keystore({7: KeyHandle(7, Purpose.STORAGE, bytes(32))})
    with pytest.raises(EnvelopeError):
        open_value(other, HEADER, STORE_KEY, seal_value(HANDLE, NONCE, HEADER, STORE_KEY, b"v"))


def test_a_raft_envelope_with_a_flag_is_refused_although_it_authenticates() -> None:
    sealed = seal_raft(HANDLE, NONCE, b"payload")
    with pytest.raises(EnvelopeError) as caught:
        open_raft(KEYSTORE, sealed[:1] + bytes((FLAG_SNAPPY,)) + sealed[2:])
    assert caught.value.reason is Failure.FLAG


def test_compression_is_used_only_where_it_helps() -> None:
    small = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, COMPRESSIBLE, compress=True)
    assert small[1] == FLAG_SNAPPY
    assert len(small) < len(COMPRESSIBLE)
    plain = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, bytes(range(64)), compress=True)
    assert plain == seal_value(HANDLE, NONCE, HEADER, STORE_KEY, bytes(range(64)))


def seal_block(block: bytes) -> bytes:
    """An authentic envelope whose body claims to be Snappy."""
    prefix = encode_prefix(VERSION_GCM, FLAG_SNAPPY, HANDLE.key_id)
    aead = HANDLE.aead[VERSION_GCM]
    if aead is None:
        raise TypeError("version 1 has a cipher")
    return prefix + NONCE + aead.encrypt(NONCE, block, prefix + HEADER + STORE_KEY)


@pytest.mark.parametrize("block", [
    pytest.param(b"", id="empty"),
    pytest.param(b"\xff" * 8, id="endless length"),
    pytest.param(b"\x80", id="cut length"),
    pytest.param(b"\xff\xff\xff\xff\x0f" + b"\x00", id="4 GiB declared"),
    pytest.param(b"\x08\x1cabc", id="literal cut short"),
    pytest.param(b"\x04\x01\x00", id="copy before the start"),
    pytest.param(bytes(cramjam.snappy.compress_raw(COMPRESSIBLE))[:-1], id="cut block"),
])
def test_a_bad_compressed_block_is_an_integrity_error(block: bytes) -> None:
    with pytest.raises(EnvelopeError) as caught:
        open_value(KEYSTORE, HEADER, STORE_KEY, seal_block(block))
    assert caught.value.reason is Failure.COMPRESSION


def test_a_block_may_not_expand_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, COMPRESSIBLE, compress=True)
    monkeypatch.setattr(cipher, "MAX_DECOMPRESSED_BYTES", len(COMPRESSIBLE) - 1)
    with pytest.raises(EnvelopeError) as caught:
        open_value(KEYSTORE, HEADER, STORE_KEY, sealed)
    assert caught.value.reason is Failure.COMPRESSION


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_random_compressed_blocks_never_raise_another_error(block: bytes) -> None:
    try:
        open_value(KEYSTORE, HEADER, STORE_KEY, seal_block(block))
    except EnvelopeError as error:
        assert error.reason is Failure.COMPRESSION  # noqa: PT017 - either outcome is allowed


@pytest.mark.parametrize("data", [b"", b"\x01", bytes(33), bytes(34), b"\x01\x00\x00\x00\x00\x07"])
def test_short_and_empty_envelopes_are_refused(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        open_value(KEYSTORE, HEADER, STORE_KEY, data)
    with pytest.raises(EnvelopeError):
        open_raft(KEYSTORE, data)


@pytest.mark.parametrize("length", [0, 11, 13, 24])
def test_a_nonce_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(InvalidArgument):
        seal_value(HANDLE, bytes(length), HEADER, STORE_KEY, b"value")
    with pytest.raises(InvalidArgument):
        seal_record_value(HANDLE, bytes(length), HEADER, STORE_KEY, b"value")
    with pytest.raises(InvalidArgument):
        seal_raft(HANDLE, bytes(length), b"value")


@pytest.mark.parametrize("version", [-1, 0, 3, 255])
def test_an_unknown_version_is_not_written(version: int) -> None:
    with pytest.raises(InvalidArgument):
        seal_value(HANDLE, NONCE, HEADER, STORE_KEY, b"value", version=version)
    with pytest.raises(InvalidArgument):
        seal_raft(HANDLE, NONCE, b"value", version)


def test_a_header_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        seal_value(HANDLE, NONCE, bytes(8), STORE_KEY, b"value")
    with pytest.raises(InvalidArgument):
        seal_record_value(HANDLE, NONCE, bytes(8), STORE_KEY, b"value")


def test_a_failure_tells_nothing_of_value_or_key() -> None:
    sealed = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, b"do-not-print-this")
    with pytest.raises(EnvelopeError) as caught:
        open_value(KEYSTORE, HEADER, b"elsewhere", sealed)
    assert "do-not-print-this" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def outcome(open_it, *arguments: object) -> object:
    """The plaintext, or why there is none."""
    try:
        return open_it(*arguments)
    except EnvelopeError as error:
        return error.reason, error.message


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("compress", [False, True])
def test_a_record_opens_exactly_as_its_parts_do(version, compress):
    sealed = seal_value(HANDLE, NONCE, HEADER, STORE_KEY, COMPRESSIBLE[:64], version=version,
                        compress=compress)
    record = HEADER + sealed
    candidates = [record, record + b"\x00", *flips(record),
                  *(record[:length] for length in range(len(HEADER), len(record)))]
    for candidate in candidates:
        assert outcome(open_record_value, KEYSTORE, STORE_KEY, candidate) == outcome(
            open_value, KEYSTORE, candidate[:9], STORE_KEY, candidate[9:])
    assert open_record_value(KEYSTORE, STORE_KEY, record) == COMPRESSIBLE[:64]
    assert outcome(open_record_value, KEYSTORE, STORE_KEY + b"x", record)[0] is Failure.TAG
    assert outcome(open_record_value, Keystore(), STORE_KEY, record)[0] is Failure.KEY_ID
