"""elastickv.server.h2.messages: gRPC messages out of a stream's bytes."""

from __future__ import annotations

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
    (b"\x01\0\0\0\x01a", grpc.StatusCode.UNIMPLEMENTED),
    (b"\x02\0\0\0\x01a", grpc.StatusCode.INTERNAL),
    (prefixed(bytes(LIMIT + 1)), grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_requests_that_are_refused(content: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(BadMessage) as caught:
        single_message(content, LIMIT)
    assert caught.value.code is code


@pytest.mark.parametrize(("prefix", "code"), [
    (b"\x01\0\0\0\x01", grpc.StatusCode.UNIMPLEMENTED),
    (b"\0\0\0\x03\xe9", grpc.StatusCode.RESOURCE_EXHAUSTED),
    (b"\0\xff\xff\xff\xff", grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_a_prefix_is_enough_to_refuse(prefix: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(BadMessage) as caught:
        Deframer(LIMIT).feed(prefix)
    assert caught.value.code is code


@pytest.mark.parametrize("content", [b"\0", b"\0\0\0\0", b"\0\0\0\0\x02a"])
def test_an_end_within_a_message(content: bytes) -> None:
    deframer = Deframer(LIMIT)
    assert deframer.feed(content) == []
    assert deframer.buffered == len(content)
    with pytest.raises(BadMessage):
        deframer.end()
