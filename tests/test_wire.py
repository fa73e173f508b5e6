"""The entry codec: what encodes decodes back, and everything else is a WireError."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastickv import wire
from elastickv.errors import InvalidArgument, WireError
from elastickv.wire import (
    Bootstrap,
    HlcCeiling,
    Opcode,
    Registration,
    RegistryRow,
    Reservation,
    Rotation,
    RotationTag,
    WriteOp,
    WriteRequest,
    Writes,
    decode_entry,
    encode_entry,
    encode_writes,
)

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)
U64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
SHORT_BYTES = st.binary(max_size=80)

OPS = st.builds(WriteOp, st.sampled_from((wire.OP_PUT, wire.OP_DELETE)), SHORT_BYTES, SHORT_BYTES)
REQUESTS = st.builds(WriteRequest, U64, st.lists(OPS, max_size=4),
                     st.lists(st.tuples(SHORT_BYTES, U64), max_size=3))
ROWS = st.builds(RegistryRow, U32, U64, U16)
ENTRIES = st.one_of(
    st.builds(Writes, st.lists(REQUESTS, min_size=1, max_size=4)),
    st.builds(HlcCeiling, U64),
    st.builds(Registration, ROWS),
    st.builds(Bootstrap, U32, SHORT_BYTES, U32, SHORT_BYTES, st.lists(ROWS, max_size=4).map(tuple)),
    st.builds(Rotation, st.sampled_from(RotationTag), U32, st.integers(0, 255), SHORT_BYTES, ROWS),
    st.builds(Reservation, U32, U64, U16, U64))

ROW = RegistryRow(7, 0x1122_3344_5566_7788, 3)
SAMPLES = {
    "single": Writes([WriteRequest(5, [WriteOp(wire.OP_PUT, b"k", b"h" * 9 + b"value")], [])]),
    "single with condition": Writes([WriteRequest(
        5, [WriteOp(wire.OP_DELETE, b"k", b"h" * 9)], [(b"k", 4), (b"other", 0)])]),
    "batch": Writes([WriteRequest(5, [WriteOp(wire.OP_PUT, b"a", b"1")], []),
                     WriteRequest(6, [WriteOp(wire.OP_DELETE, b"b", b"2")], [(b"c", 1)])]),
    "hlc ceiling": HlcCeiling(1 << 60),
    "registration": Registration(ROW),
    "bootstrap": Bootstrap(1, b"s" * 60, 2, b"r" * 60, (ROW, ROW)),
    "rotate-dek": Rotation(RotationTag.ROTATE_DEK, 7, 1, b"w" * 60, ROW),
    "reservation": Reservation(7, 0x1122_3344_5566_7788, 3, 1 << 40),
    "cutover": Rotation(RotationTag.ENABLE_RAFT_ENVELOPE, 7, 2, b"", ROW),
}


@given(ENTRIES)
def test_every_entry_decodes_to_itself(entry: wire.Entry) -> None:
    encoded = encode_entry(entry)
    assert decode_entry(encoded) == entry
    assert encode_entry(decode_entry(encoded)) == encoded


@pytest.mark.parametrize("name", SAMPLES)
def test_an_entry_cut_at_any_byte_is_refused(name: str) -> None:
    encoded = encode_entry(SAMPLES[name])
    for length in range(len(encoded)):
        with pytest.raises(WireError):
            decode_entry(encoded[:length])


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("tail", [b"\x00", b"\x00" * 14, b"trailing"])
def test_trailing_bytes_are_refused(name: str, tail: bytes) -> None:
    with pytest.raises(WireError):
        decode_entry(encode_entry(SAMPLES[name]) + tail)


@settings(max_examples=300)
@given(st.binary(max_size=120), st.sampled_from([None, *Opcode]))
@example(b"", None)
@example(b"\xff" * 40, Opcode.BATCH)
def test_random_bytes_decode_canonically_or_not_at_all(tail: bytes, opcode: Opcode | None) -> None:
    data = tail if opcode is None else bytes((opcode, wire.WIRE_VERSION)) + tail
    try:
        entry = decode_entry(data)
    except WireError:
        return
    assert encode_entry(entry) == data


@given(ENTRIES, st.data())
def test_one_changed_byte_is_refused_or_reads_as_another_whole_entry(
        entry: wire.Entry, data: st.DataObject) -> None:
    encoded = bytearray(encode_entry(entry))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode_entry(bytes(encoded))
    except WireError:
        return
    assert changed != entry
    assert encode_entry(changed) == encoded


@pytest.mark.parametrize("opcode", [0x06, 0x08, 0x7F, 0xFF])
def test_an_unknown_opcode_is_refused(opcode: int) -> None:
    with pytest.raises(WireError, match=f"unknown opcode 0x{opcode:02x}"):
        decode_entry(bytes((opcode, wire.WIRE_VERSION)) + bytes(20))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("version", [0x00, 0x02, 0xFF])
def test_an_unknown_version_is_refused(name: str, version: int) -> None:
    encoded = bytearray(encode_entry(SAMPLES[name]))
    encoded[1] = version
    with pytest.raises(WireError, match="unknown version"):
        decode_entry(bytes(encoded))


@pytest.mark.parametrize("tag", [0x00, 0x06, 0x10, 0xFF])
def test_an_unknown_sub_tag_is_refused(tag: int) -> None:
    encoded = bytearray(encode_entry(SAMPLES["rotate-dek"]))
    encoded[2] = tag
    with pytest.raises(WireError, match=f"unknown sub-tag 0x{tag:02x}"):
        decode_entry(bytes(encoded))


def test_an_unknown_purpose_parses() -> None:
    """It is the applier's to refuse: the bytes are well formed."""
    entry = Rotation(RotationTag.ROTATE_DEK, 7, 0xFE, b"w" * 60, ROW)
    assert decode_entry(encode_entry(entry)) == entry


HUGE = b"\xff\xff\xff\xff"


@pytest.mark.parametrize("data", [
    pytest.param(b"\x01\x01" + HUGE, id="batch count"),
    pytest.param(b"\x00\x01" + bytes(8) + b"\xff\xff" + bytes(20), id="condition count"),
    pytest.param(b"\x00\x01" + bytes(10) + HUGE, id="op count"),
    pytest.param(b"\x00\x01" + bytes(10) + struct.pack(">IBHI", 1, 0, 0, 0xFFFF_FFFF),
                 id="record length"),
    pytest.param(b"\x01\x01" + struct.pack(">I", 2) + HUGE + bytes(30), id="request length"),
    pytest.param(b"\x04\x01" + bytes(4) + HUGE, id="wrapped length"),
    pytest.param(b"\x04\x01" + bytes(16) + HUGE, id="writer count"),
    pytest.param(b"\x05\x01\x01" + bytes(5) + HUGE, id="rotation wrapped length"),
])
def test_a_count_beyond_the_bytes_is_refused_without_allocating(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_entry(data)


def test_an_unknown_write_kind_is_refused() -> None:
    encoded = bytearray(encode_entry(SAMPLES["single"]))
    assert encoded[16] == wire.OP_PUT
    encoded[16] = 2
    with pytest.raises(WireError, match="unknown kind"):
        decode_entry(bytes(encoded))


def test_one_request_has_one_encoding() -> None:
    request = wire.encode_request(WriteRequest(1, [], []))
    as_batch = b"\x01\x01" + struct.pack(">II", 1, len(request)) + request
    with pytest.raises(WireError, match="count of 1"):
        decode_entry(as_batch)


def test_the_layout_of_a_single_entry() -> None:
    entry = encode_writes([WriteRequest(0x0102, [WriteOp(0, b"key", b"record")], [(b"c", 9)])])
    assert entry.hex(" ") == (
        "00 01 00 00 00 00 00 00 01 02 00 01"
        " 00 01 63 00 00 00 00 00 00 00 09"
        " 00 00 00 01 00 00 03 6b 65 79 00 00 00 06 72 65 63 6f 72 64")


def test_the_layout_of_a_hlc_ceiling() -> None:
    assert encode_entry(HlcCeiling(0x0102)).hex(" ") == "02 01 00 00 00 00 00 00 01 02"


@pytest.mark.parametrize("entry", [
    pytest.param(HlcCeiling(1 << 64), id="ceiling"),
    pytest.param(HlcCeiling(-1), id="negative"),
    pytest.param(Registration(RegistryRow(1, 1, 0x1_0000)), id="epoch"),
    pytest.param(Registration(RegistryRow(1 << 32, 1, 1)), id="dek id"),
    pytest.param(Rotation(RotationTag.ROTATE_DEK, 1, 256, b"", ROW), id="purpose"),
    pytest.param(Writes([]), id="no request"),
    pytest.param(Writes([WriteRequest(1 << 64, [], [])]), id="commit timestamp"),
    pytest.param(Writes([WriteRequest(1, [WriteOp(0, b"k" * 0x1_0000, b"")], [])]), id="key"),
    pytest.param(Writes([WriteRequest(1, [WriteOp(2, b"k", b"")], [])]), id="kind"),
    pytest.param(Writes([WriteRequest(1, [], [(b"k", -1)])]), id="condition"),
])
def test_a_field_out_of_range_does_not_encode(entry: wire.Entry) -> None:
    with pytest.raises(InvalidArgument):
        encode_entry(entry)


def test_an_entry_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    request = WriteRequest(1, [WriteOp(0, b"k", bytes(200))], [])
    entry = encode_writes([request])
    monkeypatch.setattr(wire, "MAX_ENTRY_BYTES", len(entry))
    assert decode_entry(encode_writes([request])) == Writes([request])
    monkeypatch.setattr(wire, "MAX_ENTRY_BYTES", len(entry) - 1)
    with pytest.raises(InvalidArgument, match="exceeds the limit"):
        encode_writes([request])
    with pytest.raises(WireError, match="exceeds the limit"):
        decode_entry(entry)


def test_a_parse_error_shows_no_bytes_of_the_entry() -> None:
    secret = b"do-not-print-this-value"
    entry = encode_writes([WriteRequest(1, [WriteOp(0, secret, secret)], [])])
    with pytest.raises(WireError) as caught:
        decode_entry(entry + b"!")
    assert secret.decode() not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
