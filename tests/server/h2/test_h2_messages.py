"""elastickv.server.h2.messages: gRPC messages out of a stream's bytes."""

from __future__ import annotations

import zlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.server.h2.messages import BadMessage, Deframer, single_message
from elastickv.server.h2.wire import prefixed

LIMIT = 1000
MESSAGES = st.lists(st.binary(max_size=60), max_size=6)


@given(MESSAGES, st.lists(st.integers(1, 20), min_size=1))
def test_any_fragmentation_gives_the_same_messages(messages: list[bytes],
                                                   sizes: list[int]) -> None:
    content = b"".join(map(prefixed, messages))
    deframer, found = Deframer(LIMIT), []
    turn = 0
    while content:
        size = sizes[turn % len(sizes)]
        found += deframer.feed(content[:size])
        content = content[size:]
        turn += 1
    deframer.end()
    assert found == messages
    assert deframer.buffered == 0


@given(st.binary(max_size=LIMIT))
def test_a_single_message(message: bytes) -> None:
    assert single_message(prefixed(message), LIMIT) == message


@pytest.mark.parametrize(("content", "code"), [
    (b"", grpc.StatusCode.INTERNAL),
    (b"\0\0\0\0", grpc.StatusCode.INTERNAL),
    (b"\0\0\0\0\x02a", grpc.StatusCode.INTERNAL),
    (b"\0\0\0\0\x00a", grpc.StatusCode.INTERNAL),
    (prefixed(b"a") * 2, grpc.StatusCode.INTERNAL),
    (b"\x01\0\0\0\x01a", grpc.StatusCode.INTERNAL),
    (b"\x02\0\0\0\x01a", grpc.StatusCode.INTERNAL),
    (prefixed(bytes(LIMIT + 1)), grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_requests_that_are_refused(content: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(BadMessage) as caught:
        single_message(content, LIMIT)
    assert caught.value.status.code is code


@pytest.mark.parametrize(("prefix", "code"), [
    (b"\x02\0\0\0\x01", grpc.StatusCode.INTERNAL),
    (b"\0\0\0\x03\xe9", grpc.StatusCode.RESOURCE_EXHAUSTED),
    (b"\0\xff\xff\xff\xff", grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_a_prefix_is_enough_to_refuse(prefix: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(BadMessage) as caught:
        Deframer(LIMIT).feed(prefix)
    assert caught.value.status.code is code


@pytest.mark.parametrize("content", [b"\0", b"\0\0\0\0", b"\0\0\0\0\x02a"])
def test_an_end_within_a_message(content: bytes) -> None:
    deframer = Deframer(LIMIT)
    assert deframer.feed(content) == []
    assert deframer.buffered == len(content)
    with pytest.raises(BadMessage):
        deframer.end()


def packed(message: bytes, encoding: str) -> bytes:
    """`message` as a client sends it that compresses."""
    engine = zlib.compressobj(wbits={"gzip": 31, "deflate": 15}[encoding])
    content = engine.compress(message) + engine.flush()
    return b"\x01" + len(content).to_bytes(4, "big") + content


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@given(message=st.binary(max_size=LIMIT), cut=st.integers(0, LIMIT))
def test_a_compressed_message(encoding: str, message: bytes, cut: int) -> None:
    content = packed(message, encoding)
    assert single_message(content, 2 * LIMIT, encoding) == message
    deframer = Deframer(2 * LIMIT, encoding)
    assert deframer.feed(content[:cut]) + deframer.feed(content[cut:]) == [message]


GZIP = packed(bytes(LIMIT), "gzip")


def with_length(compressed: bytes) -> bytes:
    return b"\x01" + len(compressed).to_bytes(4, "big") + compressed


@pytest.mark.parametrize(("content", "encoding", "code"), [
    pytest.param(GZIP, "identity", grpc.StatusCode.INTERNAL, id="not announced"),
    pytest.param(GZIP, "br", grpc.StatusCode.UNIMPLEMENTED, id="unknown"),
    pytest.param(GZIP, "deflate", grpc.StatusCode.INTERNAL, id="announced as another"),
    pytest.param(with_length(GZIP[5:-1]), "gzip", grpc.StatusCode.INTERNAL, id="cut"),
    pytest.param(with_length(GZIP[5:] + b"a"), "gzip", grpc.StatusCode.INTERNAL, id="trailing"),
    pytest.param(with_length(GZIP[5:-8] + bytes(8)), "gzip", grpc.StatusCode.INTERNAL,
                 id="wrong checksum"),
    pytest.param(packed(bytes(LIMIT + 1), "gzip"), "gzip", grpc.StatusCode.RESOURCE_EXHAUSTED,
                 id="one byte too much"),
    pytest.param(packed(bytes(500_000), "gzip"), "gzip", grpc.StatusCode.RESOURCE_EXHAUSTED,
                 id="a bomb"),
])
def test_what_does_not_decompress(content: bytes, encoding: str, code: grpc.StatusCode) -> None:
    with pytest.raises(BadMessage) as caught:
        single_message(content, LIMIT, encoding)
    assert caught.value.status.code is code
    with pytest.raises(BadMessage):
        Deframer(LIMIT, encoding).feed(content)
