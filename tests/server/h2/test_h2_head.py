"""elastickv.server.h2.head: what a request's headers ask for."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import hpack
import pytest
from h2_peer import DEFAULT_FIELDS
from hypothesis import given
from hypothesis import strategies as st

from elastickv.server.h2.head import (
    MAX_HEADS_REMEMBERED,
    Head,
    HeadReader,
    head_of,
    parse_timeout,
    table_of,
)
from elastickv.server.h2.wire import CONTENT_TYPE_GRPC, Code, ConnectionFailed, literal
from elastickv.server.methods import AS_FRONT, SMALL_MESSAGE_BYTES, Unary


async def never(request: Any, timeout_s: float) -> Any:
    raise NotImplementedError


METHOD = Unary(never, bytes, bytes)
TABLE = table_of({"RawKV": {"RawPut": METHOD}}, max_message_bytes=SMALL_MESSAGE_BYTES)


def fields(**changed: str | None) -> list[tuple[str, str]]:
    """The default request with fields changed, or removed by None."""
    return [(name, value) for name, value in {**DEFAULT_FIELDS, **changed}.items()
            if value is not None]


@pytest.mark.parametrize(("text", "timeout_s"), [
    ("1H", 3600), ("2M", 120), ("3S", 3), ("1500m", 1.5), ("1u", 1e-6), ("1n", 1e-9),
    ("99999999S", 99_999_999), ("0S", 0)])
def test_timeouts(text: str, timeout_s: float) -> None:
    assert parse_timeout(text) == pytest.approx(timeout_s)


@pytest.mark.parametrize("text", ["", "S", "1", "1s", "-1S", "1.5S", "123456789S", "1S ", "²S"])
def test_timeouts_that_are_none(text: str) -> None:
    assert parse_timeout(text) is None


def test_a_request() -> None:
    head = head_of(fields(**{"grpc-timeout": "2S", "x-any": "thing"}), TABLE)
    assert head == Head("/RawKV/RawPut", METHOD, 2.0, max_message_bytes=SMALL_MESSAGE_BYTES)


@pytest.mark.parametrize(("front", "method", "expected"), [
    (10, 20, 10), (20, 10, 10), (10, AS_FRONT, 10)])
def test_a_method_takes_no_larger_message_than_the_front(front: int, method: int,
                                                         expected: int) -> None:
    table = table_of({"RawKV": {"RawPut": Unary(never, bytes, bytes, method)}},
                     max_message_bytes=front)
    head = head_of(fields(), table)
    assert head is not None
    assert head.max_message_bytes == expected


@pytest.mark.parametrize(("changed", "code"), [
    ({":path": "/RawKV/Nothing"}, grpc.StatusCode.UNIMPLEMENTED),
    ({":path": "/"}, grpc.StatusCode.UNIMPLEMENTED),
    ({"grpc-timeout": "soon"}, grpc.StatusCode.INTERNAL),
    ({"grpc-timeout": "0S"}, grpc.StatusCode.DEADLINE_EXCEEDED),
])
def test_requests_that_are_refused(changed: dict[str, str], code: grpc.StatusCode) -> None:
    head = head_of(fields(**changed), TABLE)
    assert head is not None
    assert head.method is None
    assert head.refusal is not None
    assert head.refusal.code is code


@pytest.mark.parametrize(("changed", "status"), [
    ({":method": "GET"}, 405), ({"content-type": "text/html"}, 415), ({"content-type": None}, 415)])
def test_requests_that_are_not_grpc(changed: dict[str, str | None], status: int) -> None:
    head = head_of(fields(**changed), TABLE)
    assert head is not None
    assert (head.method, head.refusal, head.http_status) == (None, None, status)


@pytest.mark.parametrize("malformed", [
    [], fields(**{":path": None}), fields(**{":path": ""}), fields(**{":method": None}),
    fields(**{":scheme": None}), [*fields(), (":path", "/RawKV/RawPut")],
    [("te", "trailers"), *fields()], [*fields(), ("X-Upper", "case")],
    [*fields(), ("connection", "close")], [*fields(), ("transfer-encoding", "chunked")]])
def test_malformed_requests(malformed: list[tuple[str, str]]) -> None:
    assert head_of(malformed, TABLE) is None


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12))))
def test_any_fields_are_judged(pairs: list[tuple[str, str]]) -> None:
    head = head_of([*fields(), *pairs], TABLE)
    assert head is None or head.path == "/RawKV/RawPut"


# --- the connection's HPACK state ------------------------------------------------------------


def reader() -> HeadReader:
    return HeadReader(TABLE, max_header_list_bytes=16_384)


def test_a_remembered_block_means_the_same_again() -> None:
    encoder, ours = hpack.Encoder(), reader()
    first = ours.read(encoder.encode(fields()))
    again = encoder.encode(fields())
    assert ours.read(again) == first
    assert ours.read(again) is ours.read(again), "remembered"


def test_a_block_is_forgotten_when_its_indexes_move() -> None:
    """The same bytes mean other fields once the table has changed."""
    encoder, ours, plain = hpack.Encoder(), reader(), hpack.Decoder()
    blocks = []
    for number in range(60):
        for _ in range(2):
            changed = {"grpc-timeout": f"{number % 7 + 1}S", f"x-{number % 11}": "v" * number}
            blocks.append(encoder.encode(fields(**changed)))
    for block in blocks:
        expected = dict(plain.decode(block))
        head = ours.read(block)
        assert head is not None
        assert head.timeout_s == parse_timeout(expected["grpc-timeout"])


def test_a_table_size_update_forgets_too() -> None:
    encoder, ours, plain = hpack.Encoder(), reader(), hpack.Decoder()
    for size in (4096, 0, 4096, 100, 4096):
        encoder.header_table_size = size
        for number in range(4):
            block = encoder.encode(fields(**{"grpc-timeout": f"{number % 2 + 1}S"}))
            expected = dict(plain.decode(block))
            head = ours.read(block)
            assert head is not None
            assert head.timeout_s == parse_timeout(expected["grpc-timeout"])


def test_what_is_remembered_is_bounded() -> None:
    """Literals without indexing change no table, so that every such block could be remembered."""
    ours = reader()
    path = b"/RawKV/RawPut"
    start = b"\x83\x86\x04" + bytes([len(path)]) + path + CONTENT_TYPE_GRPC
    for number in range(3 * MAX_HEADS_REMEMBERED):
        block = start + literal(b"x", b"%d" % number)
        assert ours.read(block) is ours.read(block), "remembered"
    assert len(ours._heads) <= MAX_HEADS_REMEMBERED


@pytest.mark.parametrize("block", [
    b"\x80", b"\xff\xff\xff\xff\xff\xff\xff", b"\x00\x05ab", b"\x40", b"\xc0",
    b"\x3f\xff\xff\xff\xff\xff"])
def test_blocks_that_do_not_decode(block: bytes) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        reader().read(block)
    assert caught.value.code is Code.COMPRESSION_ERROR


def test_a_value_may_hold_any_byte() -> None:
    block = (b"\x83\x86\x04\x0d/RawKV/RawPut" + CONTENT_TYPE_GRPC
             + literal(b"user-agent", b"caf\xe9"))
    assert reader().read(block) == head_of(fields(), TABLE)


def test_too_many_fields_are_refused_and_the_next_request_is_not() -> None:
    encoder, ours = hpack.Encoder(), reader()
    size = sum(len(name) + len(value) + 32 for name, value in fields())
    fits = encoder.encode([*fields(), ("x", "v" * (16_384 - size - 33))])
    assert ours.read(fits) == head_of(fields(), TABLE)
    head = ours.read(encoder.encode([*fields(), ("x", "v" * (16_384 - size - 32))]))
    assert head is not None
    assert head.refusal is not None
    assert head.refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert head.refusal.detail == "metadata larger than max (16385 vs. 16384)"
    assert head.method is None
    assert ours.read(encoder.encode(fields())) == head_of(fields(), TABLE)


def test_what_is_too_large_is_not_remembered() -> None:
    ours = reader()
    path = b"/RawKV/RawPut"
    start = b"\x83\x86\x04" + bytes([len(path)]) + path + CONTENT_TYPE_GRPC
    for size in (16_000, 17_000):
        assert ours.read(start + literal(b"x", bytes(size))) is not None
    assert [head.method for head in ours._heads.values()] == [METHOD]


def test_far_too_many_fields_end_the_connection() -> None:
    block = hpack.Encoder().encode([*fields(), ("x", "v" * 66_000)])
    with pytest.raises(ConnectionFailed) as caught:
        reader().read(block)
    assert caught.value.code is Code.ENHANCE_YOUR_CALM


@given(st.binary(max_size=60))
def test_any_block_decodes_or_is_refused(block: bytes) -> None:
    with contextlib.suppress(ConnectionFailed):
        reader().read(block)
