"""elastickv.server.h2.wire: frames and stateless HPACK, checked against the hpack library."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.server.h2 import wire
from elastickv.server.h2.wire import Code, ConnectionFailed

STREAM_IDS = st.integers(0, wire.STREAM_ID_MASK)
NAMES = st.text(st.characters(min_codepoint=0x61, max_codepoint=0x7A), min_size=1, max_size=300)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20_000)


def split(content: bytes) -> list[tuple[int, int, int, bytes]]:
    """`(type, flags, stream id, payload)` of every frame, by the letter of RFC 9113."""
    frames = []
    while content:
        length = int.from_bytes(content[:3], "big")
        frames.append((content[3], content[4], int.from_bytes(content[5:9], "big"),
                       content[9:9 + length]))
        content = content[9 + length:]
    return frames


@given(st.integers(0, 9), st.integers(0, 255), STREAM_IDS, st.binary(max_size=100_000))
def test_a_frame(kind: int, flags: int, stream_id: int, payload: bytes) -> None:
    assert split(wire.frame(kind, flags, stream_id, payload)) == [(kind, flags, stream_id, payload)]


@given(NAMES, VALUES)
def test_a_literal_decodes_and_leaves_the_table_alone(name: str, value: str) -> None:
    decoder = hpack.Decoder(max_header_list_size=1 << 20)
    decoded = decoder.decode(wire.literal(name.encode(), value.encode()))
    assert [tuple(pair) for pair in decoded] == [(name, value)]
    assert len(decoder.header_table.dynamic_entries) == 0


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 16_510, 16_511, 1 << 20])
def test_lengths_at_their_edges(length: int) -> None:
    decoder = hpack.Decoder(max_header_list_size=1 << 22)
    assert decoder.decode(wire.literal(b"n", b"v" * length))[0][1] == "v" * length


@given(STREAM_IDS, st.binary(max_size=70_000))
def test_a_whole_response(stream_id: int, message: bytes) -> None:
    head, data, trailers = split(wire.whole_response(stream_id, message))
    decoder = hpack.Decoder()
    assert head[:3] == (wire.HEADERS, wire.END_HEADERS, stream_id)
    assert [tuple(f) for f in decoder.decode(head[3])] == [
        (":status", "200"), ("content-type", "application/grpc")]
    assert data == (wire.DATA, 0, stream_id, wire.prefixed(message))
    assert trailers[:3] == (wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, stream_id)
    assert [tuple(f) for f in decoder.decode(trailers[3])] == [("grpc-status", "0")]


def test_a_response_head_is_that_of_a_whole_response() -> None:
    assert wire.whole_response(7, b"m").startswith(wire.response_head(7))


@pytest.mark.parametrize("size", [0, 1, 0xFE, 0xFF, 0x100, 0xFFFF])
def test_a_block_that_drops_the_table(size: int) -> None:
    rest = wire.frame(wire.DATA, 0, 5, b"d")
    head, data = split(wire.without_table(wire.frame(wire.HEADERS, 4, 5, bytes(size)) + rest))
    assert head == (wire.HEADERS, 4, 5, b"\x20" + bytes(size))
    assert data == (wire.DATA, 0, 5, b"d")


@given(st.lists(st.tuples(st.sampled_from([1, 3, 6, 99]), st.integers(0, 0xFFFF_FFFF))))
def test_settings(pairs: list[tuple[int, int]]) -> None:
    assert wire.parse_settings(split(wire.settings_frame(pairs))[0][3]) == pairs


@pytest.mark.parametrize(("payload", "code"), [
    (b"\0" * 5, Code.FRAME_SIZE_ERROR),
    (b"\x00\x04\x80\x00\x00\x00", Code.FLOW_CONTROL_ERROR),
    (b"\x00\x05\x00\x00\x3f\xff", Code.PROTOCOL_ERROR),
    (b"\x00\x05\x01\x00\x00\x00", Code.PROTOCOL_ERROR),
    (b"\x00\x02\x00\x00\x00\x02", Code.PROTOCOL_ERROR)])
def test_settings_that_are_refused(payload: bytes, code: Code) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        wire.parse_settings(payload)
    assert caught.value.code is code


@pytest.mark.parametrize(("flags", "payload", "content"), [
    (0, b"\x01ab", b"\x01ab"), (wire.PADDED, b"\x00ab", b"ab"), (wire.PADDED, b"\x02ab--", b"ab"),
    (wire.PADDED, b"\x01-", b""), (wire.PADDED, b"\x00", b"")])
def test_padding(flags: int, payload: bytes, content: bytes) -> None:
    assert wire.unpadded(flags, payload) == content


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x03ab"])
def test_padding_longer_than_its_frame(payload: bytes) -> None:
    with pytest.raises(ConnectionFailed):
        wire.unpadded(wire.PADDED, payload)


@pytest.mark.parametrize(("flags", "payload", "fragment"), [
    (0, b"block", b"block"),
    (wire.PRIORITIZED, b"\0\0\0\x05\x10block", b"block"),
    (wire.PRIORITIZED | wire.PADDED, b"\x02\x80\0\0\x05\x10block--", b"block")])
def test_header_fragments(flags: int, payload: bytes, fragment: bytes) -> None:
    assert wire.header_fragment(flags, 1, payload) == fragment


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\x05", b"\0\0\0\x01\x10block",
                                     b"\x80\0\0\x01\x10block"])
def test_header_fragments_that_are_refused(payload: bytes) -> None:
    with pytest.raises(ConnectionFailed):
        wire.header_fragment(wire.PRIORITIZED, 1, payload)
