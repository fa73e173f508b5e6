"""elastickv.server.h2 over real sockets: what no gRPC library says, and large or slow peers."""

from __future__ import annotations

import asyncio
import gzip
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2
from h2_peer import H2Peer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_node import MAX_VALUE_BYTES, MemoryNode, eventually, running

from elastickv.kv.turns import Turns
from elastickv.pb import service_pb2 as pb
from elastickv.server.grpc_server import FRONT_H2
from elastickv.server.h2 import budget, connection, wire
from elastickv.server.h2.budget import MAX_NUISANCES
from elastickv.server.h2.connection import (
    CONNECTION_WINDOW,
    MAX_CALLS,
    MAX_HEADER_LIST_BYTES,
    MAX_STREAMED_REQUEST_BYTES,
    MAX_STREAMED_REQUESTS,
    STREAM_WINDOW,
)
from elastickv.server.h2.reading import MAX_FRAME_BYTES, MAX_HEADER_BLOCK_BYTES
from elastickv.server.h2.sending import SendWindows
from elastickv.server.h2.wire import Code

PUT = pb.RawPutRequest(key=b"k", value=b"v").SerializeToString()
GET = pb.RawGetRequest(key=b"k").SerializeToString()


@pytest.fixture
async def node() -> AsyncIterator[MemoryNode]:
    node = MemoryNode(front=FRONT_H2)
    async with running(node):
        yield node


@pytest.fixture
async def peer(node: MemoryNode) -> AsyncIterator[H2Peer]:
    peer = await H2Peer.connect(node.server.port)
    yield peer
    peer.close()


async def still_serves(node: MemoryNode) -> None:
    """Another connection gets its answer."""
    peer = await H2Peer.connect(node.server.port)
    peer.call(1, "/RawKV/RawGet", GET)
    assert (await peer.answer(1)).grpc_status == 0
    peer.close()


# --- calls -----------------------------------------------------------------------------------


async def test_a_call(peer: H2Peer, node: MemoryNode) -> None:
    peer.call(1, "/RawKV/RawPut", PUT)
    answer = await peer.answer(1)
    assert answer.fields == {":status": "200", "content-type": "application/grpc",
                             "grpc-status": "0"}
    assert pb.RawPutResponse.FromString(answer.data[5:]).success
    assert answer.reset is None
    assert peer.settings == {
        wire.SETTINGS_MAX_CONCURRENT_STREAMS: MAX_CALLS,
        wire.SETTINGS_INITIAL_WINDOW_SIZE: STREAM_WINDOW,
        wire.SETTINGS_MAX_FRAME_SIZE: MAX_FRAME_BYTES,
        wire.SETTINGS_MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_BYTES}


async def test_a_call_byte_by_byte(node: MemoryNode) -> None:
    peer = await H2Peer.connect(node.server.port, greet=False)
    block = peer.block(**{":path": "/RawKV/RawPut"})
    content = (wire.PREFACE + wire.settings_frame([])
               + wire.frame(wire.HEADERS, wire.END_HEADERS, 1, block)
               + wire.frame(wire.DATA, wire.END_STREAM, 1, wire.prefixed(PUT)))
    for byte in content:
        peer.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await peer.answer(1)).grpc_status == 0
    peer.close()


async def test_a_call_in_every_shape_that_is_allowed(peer: H2Peer, node: MemoryNode) -> None:
    block = peer.block(**{":path": "/RawKV/RawPut"})
    message = wire.prefixed(PUT)
    priority = b"\0\0\0\0\x10"
    # HEADERS with padding and priority, DATA with padding, END_STREAM on an empty frame.
    peer.send(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.PADDED | wire.PRIORITIZED, 1,
                         b"\x03" + priority + block + b"---"))
    peer.send(wire.frame(wire.DATA, wire.PADDED, 1, b"\x02" + message[:3] + b"--"))
    peer.send(wire.frame(wire.DATA, 0, 1, message[3:]))
    peer.send(wire.frame(wire.DATA, wire.END_STREAM, 1, b""))
    # A header block in three parts, and trailers that end the request.
    block = peer.block(**{":path": "/RawKV/RawPut"})
    peer.send(wire.frame(wire.HEADERS, 0, 3, block[:2]))
    peer.send(wire.frame(wire.CONTINUATION, 0, 3, block[2:3]))
    peer.send(wire.frame(wire.CONTINUATION, wire.END_HEADERS, 3, block[3:]))
    peer.send(wire.frame(wire.PRIORITY, 0, 3, priority))
    peer.send(wire.frame(77, 0xFF, 3, b"of a type that nobody knows"))
    peer.data(3, message, end=False)
    peer.send(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 3,
                         peer.block([("x-trailer", "1")])))
    for stream_id in (1, 3):
        assert (await peer.answer(stream_id)).grpc_status == 0
    assert node.kv.index == 2


async def test_many_calls_at_once_are_answered_out_of_order(peer: H2Peer,
                                                            node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    streams = range(1, 401, 2)
    for stream_id in streams:
        peer.call(stream_id, "/RawKV/RawPut", PUT)
    peer.call(401, "/RaftAdmin/Status", b"")
    assert (await peer.answer(401)).grpc_status == 0
    node.faults.hold.set()
    for stream_id in streams:
        assert (await peer.answer(stream_id)).grpc_status == 0
    assert node.kv.index == 200


@pytest.mark.parametrize("size", [0, 100, 4096])
@pytest.mark.parametrize(("changed", "window", "fields"), [
    ({}, wire.DEFAULT_WINDOW, {"grpc-status": "0"}),
    ({}, 1, {"grpc-status": "0"}),
    ({":path": "/RawKV/RawNothing"}, wire.DEFAULT_WINDOW, {"grpc-status": "12"}),
    ({":path": "/grpc.health.v1.Health/Watch"}, wire.DEFAULT_WINDOW, {":status": "200"}),
    ({":method": "GET"}, wire.DEFAULT_WINDOW, {":status": "405"}),
], ids=["answered", "answered slowly", "refused", "a stream", "no gRPC"])
async def test_the_first_response_says_that_no_header_table_is_kept(
        node: MemoryNode, size: int, changed: dict[str, str], window: int,
        fields: dict[str, str]) -> None:
    peer = await H2Peer.connect(node.server.port, settings=[
        (wire.SETTINGS_HEADER_TABLE_SIZE, size), (wire.SETTINGS_INITIAL_WINDOW_SIZE, window)])
    for stream_id in (1, 3):
        peer.headers(stream_id, **{":path": "/RawKV/RawGet", **changed})
        peer.data(stream_id, wire.prefixed(GET))
        await peer.settle()
        if window == 1:
            peer.send(wire.window_update(stream_id, 1000))
            await peer.settle()
        assert fields.items() <= peer.answers[stream_id].fields.items()
    assert peer._decoder.header_table.maxsize == 0
    peer.close()


async def test_a_timeout_reaches_the_method(peer: H2Peer, node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    peer.headers(1, path="/RawKV/RawPut", **{"grpc-timeout": "100m"})
    peer.data(1, wire.prefixed(PUT))
    answer = await peer.answer(1)
    assert answer.fields["elastickv-error"] == "DeadlineExceeded"


async def test_a_reset_cancels_the_call(peer: H2Peer, node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    peer.call(1, "/RawKV/RawPut", PUT)
    await eventually(lambda: node.faults.before == ["write"])
    peer.send(wire.rst_stream(1, Code.CANCEL))
    await peer.settle()
    node.faults.hold.set()
    peer.call(3, "/RawKV/RawGet", GET)
    answer = await peer.answer(3)
    assert not pb.RawGetResponse.FromString(answer.data[5:]).exists
    assert 1 not in peer.answers


async def test_a_lost_connection_cancels_its_calls(peer: H2Peer, node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    peer.call(1, "/RawKV/RawPut", PUT)
    await eventually(lambda: node.faults.before == ["write"])
    peer.close()
    await still_hold_nothing(node)
    node.faults.hold.set()
    await still_serves(node)
    assert node.kv.index == 0


async def still_hold_nothing(node: MemoryNode) -> None:
    """The server has noticed that its connections are gone."""
    front = node.server._front
    await eventually(lambda: not front._connections)  # type: ignore[union-attr]


# --- requests that are refused ---------------------------------------------------------------

REFUSED: dict[str, tuple[bytes, bool, grpc.StatusCode]] = {
    "no message": (b"", True, grpc.StatusCode.INTERNAL),
    "half a prefix": (b"\0\0", True, grpc.StatusCode.INTERNAL),
    "half a message": (wire.prefixed(PUT)[:-1], True, grpc.StatusCode.INTERNAL),
    "two messages": (wire.prefixed(PUT) * 2, True, grpc.StatusCode.INTERNAL),
    "two messages, more to come": (wire.prefixed(PUT) * 2, False, grpc.StatusCode.INTERNAL),
    "compressed": (b"\x01" + wire.prefixed(PUT)[1:], True, grpc.StatusCode.INTERNAL),
    "announced as too large": (b"\0\x7f\xff\xff\xff", False, grpc.StatusCode.RESOURCE_EXHAUSTED),
    "not a message": (wire.prefixed(b"\xff\xff\xff"), True, grpc.StatusCode.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_requests_that_are_refused(peer: H2Peer, node: MemoryNode, name: str) -> None:
    content, end, code = REFUSED[name]
    peer.headers(1)
    peer.data(1, content, end=end)
    answer = await peer.answer(1)
    assert answer.grpc_status == code.value[0]
    assert node.kv.index == 0
    if not end:
        await peer.settle()
        assert answer.reset == Code.NO_ERROR
        peer.data(1, b"what was under way")
    peer.call(3, "/RawKV/RawPut", PUT)
    assert (await peer.answer(3)).grpc_status == 0


async def test_an_unknown_encoding_names_the_known_ones(peer: H2Peer, node: MemoryNode) -> None:
    peer.headers(1, **{"grpc-encoding": "br"})
    peer.data(1, b"\x01" + wire.prefixed(PUT)[1:])
    answer = await peer.answer(1)
    assert answer.grpc_status == grpc.StatusCode.UNIMPLEMENTED.value[0]
    assert answer.fields["grpc-accept-encoding"] == "identity,gzip,deflate"
    assert node.kv.index == 0


@pytest.mark.parametrize(("changed", "status"), [
    ({":method": "GET"}, "405"), ({"content-type": "text/plain"}, "415")])
async def test_what_is_not_grpc_gets_an_http_status(peer: H2Peer, changed: dict[str, str],
                                                    status: str) -> None:
    peer.headers(1, flags=wire.END_HEADERS | wire.END_STREAM, **changed)
    assert (await peer.answer(1)).fields == {":status": status}


async def test_malformed_fields_reset_the_stream(peer: H2Peer) -> None:
    block = peer.block([(":path", "/RawKV/RawPut"), (":path", "/RawKV/RawPut")])
    peer.send(wire.frame(wire.HEADERS, wire.END_HEADERS, 1, block))
    assert (await peer.answer(1)).reset == Code.PROTOCOL_ERROR
    peer.call(3, "/RawKV/RawGet", GET)
    assert (await peer.answer(3)).grpc_status == 0


async def test_more_calls_than_allowed_are_refused_and_may_be_retried(peer: H2Peer,
                                                                      node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    for number in range(MAX_CALLS + 3):
        peer.call(2 * number + 1, "/RawKV/RawPut", PUT)
    for number in range(MAX_CALLS, MAX_CALLS + 3):
        assert (await peer.answer(2 * number + 1)).reset == Code.REFUSED_STREAM
    node.faults.hold.set()
    assert (await peer.answer(1)).grpc_status == 0


async def test_a_stream_that_goes_on_after_its_end_is_reset(peer: H2Peer,
                                                            node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    peer.call(1, "/RawKV/RawPut", PUT)
    peer.data(1, b"more")
    assert (await peer.answer(1)).reset == Code.STREAM_CLOSED
    assert node.kv.index == 0


async def test_trailers_that_end_nothing_reset_the_stream(peer: H2Peer) -> None:
    peer.headers(1)
    peer.headers(1)
    assert (await peer.answer(1)).reset == Code.PROTOCOL_ERROR


# --- flow control ----------------------------------------------------------------------------


async def test_a_large_request(peer: H2Peer, node: MemoryNode) -> None:
    request = pb.RawPutRequest(key=b"k", value=bytes(MAX_VALUE_BYTES)).SerializeToString()
    content = wire.prefixed(request)
    peer.headers(1)
    for start in range(0, len(content), 10_000):
        peer.data(1, content[start:start + 10_000], end=start + 10_000 >= len(content))
    assert (await peer.answer(1)).grpc_status == 0


async def test_windows_are_given_back(peer: H2Peer) -> None:
    """More than the connection's window passes over one connection."""
    chunk = bytes(MAX_FRAME_BYTES)
    total, stream_id = 0, 1
    window = CONNECTION_WINDOW
    while total < CONNECTION_WINDOW + (8 << 20):
        peer.headers(stream_id)
        for _ in range(16):
            peer.data(stream_id, b"\0\0\x10\x00\x00" + chunk[5:] if _ == 0 else chunk, end=False)
        peer.send(wire.rst_stream(stream_id, Code.CANCEL))
        total += 16 * MAX_FRAME_BYTES
        stream_id += 2
        await peer.settle()
        window = CONNECTION_WINDOW - total + sum(
            increment for stream, increment in peer.window_updates if stream == 0) \
            - (CONNECTION_WINDOW - wire.DEFAULT_WINDOW)
        assert window > CONNECTION_WINDOW // 2


async def test_a_peer_that_exceeds_the_streams_window(peer: H2Peer) -> None:
    peer.headers(1)
    # The prefix announces a message within the limit, so that only the window is at fault.
    peer.data(1, b"\0\0\x1f\xff\xff", end=False)
    await peer.settle()
    for _ in range(STREAM_WINDOW // MAX_FRAME_BYTES + 1):
        peer.send(wire.frame(wire.DATA, 0, 1, bytes(MAX_FRAME_BYTES)))
    answer = await peer.answer(1)
    assert answer.reset is not None or answer.grpc_status != 0


async def put_value(node: MemoryNode, size: int) -> bytes:
    value = random.Random(size).randbytes(size)
    await node.kv.put(b"k", value, timeout_s=1)
    return value


@pytest.mark.parametrize("window", [0, 1, 1_000, 65_535, 1 << 20])
async def test_a_response_respects_the_streams_window(node: MemoryNode, window: int) -> None:
    value = await put_value(node, MAX_VALUE_BYTES)
    peer = await H2Peer.connect(node.server.port,
                                settings=[(wire.SETTINGS_INITIAL_WINDOW_SIZE, window)])
    peer.send(wire.window_update(0, 1 << 20))
    peer.call(1, "/RawKV/RawGet", GET)
    await peer.settle()
    answer = peer.answers[1]
    assert answer.ended == (window > MAX_VALUE_BYTES + 100)
    assert answer.ended or len(answer.data) == window
    granted = window
    while not answer.ended:
        peer.send(wire.window_update(1, 7_000))
        granted += 7_000
        await peer.settle()
        assert len(answer.data) <= granted
    assert pb.RawGetResponse.FromString(answer.data[5:]).value == value
    peer.close()


async def test_a_response_respects_the_connections_window(node: MemoryNode,
                                                          peer: H2Peer) -> None:
    value = await put_value(node, 30_000)
    for stream_id in (1, 3, 5):
        peer.call(stream_id, "/RawKV/RawGet", GET)
    await peer.settle()
    received = sum(len(answer.data) for answer in peer.answers.values())
    assert received == wire.DEFAULT_WINDOW
    peer.send(wire.window_update(0, 100_000))
    for stream_id in (1, 3, 5):
        answer = await peer.answer(stream_id)
        assert pb.RawGetResponse.FromString(answer.data[5:]).value == value


async def test_a_reset_drops_what_is_still_to_be_sent(node: MemoryNode, peer: H2Peer) -> None:
    await put_value(node, MAX_VALUE_BYTES)
    peer.call(1, "/RawKV/RawGet", GET)
    peer.call(3, "/RawKV/RawGet", GET)
    await peer.settle()
    peer.send(wire.rst_stream(1, Code.CANCEL))
    await peer.settle()
    before = len(peer.answers[1].data)
    peer.send(wire.window_update(0, 1 << 20))
    peer.send(wire.window_update(3, 1 << 20))
    assert (await peer.answer(3)).grpc_status == 0
    assert len(peer.answers[1].data) == before


async def test_responses_that_wait_count_as_calls(node: MemoryNode) -> None:
    """A peer that grants no window cannot make us keep more than MAX_CALLS responses."""
    await put_value(node, 1_000)
    peer = await H2Peer.connect(node.server.port,
                                settings=[(wire.SETTINGS_INITIAL_WINDOW_SIZE, 0)])
    for number in range(MAX_CALLS + 1):
        peer.call(2 * number + 1, "/RawKV/RawGet", GET)
        if number == MAX_CALLS - 1:
            await peer.settle()
    assert (await peer.answer(2 * MAX_CALLS + 1)).reset == Code.REFUSED_STREAM
    peer.send(wire.window_update(0, 1 << 22))
    peer.send(wire.settings_frame([(wire.SETTINGS_INITIAL_WINDOW_SIZE, 65_535)]))
    for number in range(MAX_CALLS):
        assert (await peer.answer(2 * number + 1)).grpc_status == 0
    peer.close()


@pytest.mark.parametrize("window", [0, wire.MAX_WINDOW], ids=["no window", "it does not read"])
async def test_responses_that_wait_are_bounded_in_bytes(node: MemoryNode, window: int) -> None:
    """Large ones beyond the limit are refused, and told so; what a write comes to is not."""
    front = node.server._front
    limit = 32 << 20
    front._limits = replace(front._limits, max_waiting_bytes=limit)  # type: ignore[union-attr]
    for number in range(20):
        await node.kv.put(b"%d" % number, bytes(MAX_VALUE_BYTES), timeout_s=1)
    scan = pb.RawScanAtRequest(limit=20).SerializeToString()
    size = 20 * MAX_VALUE_BYTES
    peer = await H2Peer.connect(node.server.port, settings=[
        (wire.SETTINGS_INITIAL_WINDOW_SIZE, window), (wire.SETTINGS_MAX_FRAME_SIZE, (1 << 24) - 1)])
    peer.send(wire.window_update(0, wire.MAX_WINDOW - wire.DEFAULT_WINDOW))
    node.faults.hold = asyncio.Event()
    scans = range(1, 400, 2)
    for stream_id in scans:
        peer.call(stream_id, "/RawKV/RawScanAt", scan)
    peer.call(401, "/RawKV/RawPut", PUT)
    await eventually(lambda: len(node.faults.before) == 20 + len(scans) + 1)
    connection = next(iter(front._connections))  # type: ignore[union-attr]
    node.faults.hold.set()
    await eventually(lambda: all(call.began for call in connection._calls.values()))
    unread = connection._transport.get_write_buffer_size() + connection._windows.waiting_bytes
    assert limit // 2 < unread < 2 * limit + size
    peer.send(wire.settings_frame([(wire.SETTINGS_INITIAL_WINDOW_SIZE, wire.MAX_WINDOW)]))
    answers = [await peer.answer(stream_id) for stream_id in scans]
    served = sum(len(answer.data) > size for answer in answers)
    refused = [answer for answer in answers if not answer.data]
    assert served + len(refused) == len(answers)
    assert limit // (2 * size) < served < 3 * limit // size
    assert {answer.fields["elastickv-error"] for answer in refused} == {"Overloaded"}
    assert (await peer.answer(401)).grpc_status == 0
    assert connection._windows.waiting_bytes == 0
    peer.close()


async def test_a_window_that_overflows_resets_the_stream(node: MemoryNode, peer: H2Peer) -> None:
    node.faults.hold = asyncio.Event()
    peer.call(1, "/RawKV/RawPut", PUT)
    peer.send(wire.window_update(1, wire.MAX_WINDOW))
    assert (await peer.answer(1)).reset == Code.FLOW_CONTROL_ERROR


async def test_a_peer_that_does_not_read_is_not_read_from(node: MemoryNode) -> None:
    value = await put_value(node, MAX_VALUE_BYTES)
    peer = await H2Peer.connect(
        node.server.port, settings=[(wire.SETTINGS_INITIAL_WINDOW_SIZE, wire.MAX_WINDOW)])
    peer.send(wire.window_update(0, wire.MAX_WINDOW - wire.DEFAULT_WINDOW))
    calls = 600
    for number in range(calls):
        peer.call(2 * number + 1, "/RawKV/RawGet", GET)
    connection = next(iter(node.server._front._connections))  # type: ignore[union-attr]
    await eventually(lambda: connection._write_paused)
    for number in range(calls):
        answer = await peer.answer(2 * number + 1)
        assert len(answer.data) > len(value)
    peer.close()


@pytest.mark.parametrize(("size", "window"), [
    (100, wire.DEFAULT_WINDOW), (16_384, wire.DEFAULT_WINDOW), (MAX_VALUE_BYTES, 1 << 20),
    (MAX_VALUE_BYTES, 40_000)])
async def test_a_peer_that_reads_what_it_asked_for_is_kept(
        node: MemoryNode, monkeypatch: pytest.MonkeyPatch, size: int, window: int) -> None:
    """It grants a window for what it has read; by then the call may be over."""
    monkeypatch.setattr(budget, "MAX_NUISANCES", 20)
    monkeypatch.setattr(budget, "NUISANCES_PER_S", 0)
    await put_value(node, size)
    peer = await H2Peer.connect(node.server.port,
                                settings=[(wire.SETTINGS_INITIAL_WINDOW_SIZE, window)])
    peer.send(wire.window_update(0, 1 << 30))
    for stream_id in range(1, 201, 2):
        peer.call(stream_id, "/RawKV/RawGet", GET)
        if window < size:
            peer.send(wire.window_update(stream_id, size))
        answer = await peer.answer(stream_id)
        assert answer.grpc_status == 0
        for _ in range(len(answer.data) // 16_383):
            peer.send(wire.window_update(stream_id, 16_383))
    peer.close()


async def test_a_peer_that_resets_what_is_answered_is_kept(
        node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gRPC for Node.js did for years, and whoever closes a stream there by hand."""
    monkeypatch.setattr(budget, "MAX_NUISANCES", 20)
    monkeypatch.setattr(budget, "NUISANCES_PER_S", 0)
    peer = await H2Peer.connect(node.server.port)
    for stream_id in range(1, 201, 2):
        peer.call(stream_id, "/RawKV/RawGet" if stream_id % 4 == 1 else "/RawKV/Nothing", GET)
        await peer.answer(stream_id)
        peer.send(wire.rst_stream(stream_id, Code.NO_ERROR))
    await peer.settle()
    peer.send(wire.rst_stream(1, Code.NO_ERROR) * 21)
    assert await peer.end() == Code.ENHANCE_YOUR_CALM


async def test_a_flood_of_window_updates_for_a_call_that_is_over(node: MemoryNode,
                                                                 peer: H2Peer) -> None:
    peer.call(1, "/RawKV/RawGet", GET)
    await peer.answer(1)
    peer.send(wire.window_update(1, 1) * (2 * MAX_NUISANCES))
    assert await peer.end() == Code.ENHANCE_YOUR_CALM
    await still_serves(node)


async def test_of_a_setting_that_is_repeated_the_last_counts(
        node: MemoryNode, peer: H2Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []
    set_initial = SendWindows.set_initial

    def counted(self: SendWindows, size: int) -> None:
        applied.append(size)
        set_initial(self, size)

    monkeypatch.setattr(SendWindows, "set_initial", counted)
    peer.send(wire.settings_frame(
        [(wire.SETTINGS_INITIAL_WINDOW_SIZE, size) for size in range(10_000)]))
    await peer.settle()
    assert applied == [9_999]


# --- connections that are ended ----------------------------------------------------------------


def frames(*parts: bytes) -> Callable[[H2Peer], bytes]:
    return lambda peer: b"".join(parts)


def begun(peer: H2Peer) -> bytes:
    """A request whose DATA is to come, on stream 1."""
    return wire.frame(wire.HEADERS, wire.END_HEADERS, 1, peer.block())


def flood(peer: H2Peer, then: Callable[[int], bytes]) -> bytes:
    """Calls without end, each followed by what makes the server reset it."""
    return b"".join(
        wire.frame(wire.HEADERS, wire.END_HEADERS, stream_id, peer.block()) + then(stream_id)
        for stream_id in range(1, 3 * MAX_NUISANCES, 2))


VIOLATIONS: dict[str, tuple[Callable[[H2Peer], bytes], Code]] = {
    "a frame that is too large": (
        frames(b"\x01\x00\x01" + b"\0\0" + bytes(4)), Code.FRAME_SIZE_ERROR),
    "DATA on stream 0": (frames(wire.frame(wire.DATA, 0, 0, b"x")), Code.PROTOCOL_ERROR),
    "DATA on an idle stream": (frames(wire.frame(wire.DATA, 0, 1, b"x")), Code.PROTOCOL_ERROR),
    "padding that is too long": (
        lambda peer: begun(peer) + wire.frame(wire.DATA, wire.PADDED, 1, b"\x09x"),
        Code.PROTOCOL_ERROR),
    "HEADERS on an even stream": (
        lambda peer: wire.frame(wire.HEADERS, wire.END_HEADERS, 2, peer.block()),
        Code.PROTOCOL_ERROR),
    "HEADERS on stream 0": (
        lambda peer: wire.frame(wire.HEADERS, wire.END_HEADERS, 0, peer.block()),
        Code.PROTOCOL_ERROR),
    "HEADERS that do not decode": (
        frames(wire.frame(wire.HEADERS, wire.END_HEADERS, 1, b"\xff\xff\xff\xff")),
        Code.COMPRESSION_ERROR),
    "a header block that is interrupted": (
        lambda peer: wire.frame(wire.HEADERS, 0, 1, peer.block()) + wire.SETTINGS_ACK,
        Code.PROTOCOL_ERROR),
    "a header block continued on another stream": (
        lambda peer: wire.frame(wire.HEADERS, 0, 1, peer.block())
        + wire.frame(wire.CONTINUATION, wire.END_HEADERS, 3, b""), Code.PROTOCOL_ERROR),
    "CONTINUATION of nothing": (
        frames(wire.frame(wire.CONTINUATION, wire.END_HEADERS, 1, b"")), Code.PROTOCOL_ERROR),
    "a header block without end": (
        frames(wire.frame(wire.HEADERS, 0, 1, b""),
               *[wire.frame(wire.CONTINUATION, 0, 1, bytes(16_000))] * (
                   MAX_HEADER_BLOCK_BYTES // 16_000 + 1)), Code.ENHANCE_YOUR_CALM),
    "a stream that depends on itself": (
        lambda peer: wire.frame(wire.HEADERS, wire.END_HEADERS | wire.PRIORITIZED, 1,
                                b"\0\0\0\x01\x10" + peer.block()), Code.PROTOCOL_ERROR),
    "PRIORITY on stream 0": (
        frames(wire.frame(wire.PRIORITY, 0, 0, bytes(5))), Code.PROTOCOL_ERROR),
    "PRIORITY of 4 bytes": (
        frames(wire.frame(wire.PRIORITY, 0, 1, bytes(4))), Code.FRAME_SIZE_ERROR),
    "RST_STREAM on an idle stream": (frames(wire.rst_stream(1, Code.CANCEL)), Code.PROTOCOL_ERROR),
    "RST_STREAM on stream 0": (frames(wire.rst_stream(0, Code.CANCEL)), Code.PROTOCOL_ERROR),
    "RST_STREAM of 3 bytes": (
        frames(wire.frame(wire.RST_STREAM, 0, 1, bytes(3))), Code.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (frames(wire.frame(wire.SETTINGS, 0, 1, b"")), Code.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes": (
        frames(wire.frame(wire.SETTINGS, 0, 0, bytes(5))), Code.FRAME_SIZE_ERROR),
    "an acknowledgement with content": (
        frames(wire.frame(wire.SETTINGS, wire.ACK, 0, bytes(6))), Code.FRAME_SIZE_ERROR),
    "an initial window that is too large": (
        frames(wire.settings_frame([(wire.SETTINGS_INITIAL_WINDOW_SIZE, 1 << 31)])),
        Code.FLOW_CONTROL_ERROR),
    "PUSH_PROMISE": (frames(wire.frame(wire.PUSH_PROMISE, 4, 1, bytes(8))), Code.PROTOCOL_ERROR),
    "PING on a stream": (frames(wire.frame(wire.PING, 0, 1, bytes(8))), Code.PROTOCOL_ERROR),
    "PING of 7 bytes": (frames(wire.frame(wire.PING, 0, 0, bytes(7))), Code.FRAME_SIZE_ERROR),
    "GOAWAY of 7 bytes": (frames(wire.frame(wire.GOAWAY, 0, 0, bytes(7))), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE of 3 bytes": (
        frames(wire.frame(wire.WINDOW_UPDATE, 0, 0, bytes(3))), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE by nothing": (frames(wire.window_update(0, 0)), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE on an idle stream": (frames(wire.window_update(1, 1)), Code.PROTOCOL_ERROR),
    "a connection window that overflows": (
        frames(wire.window_update(0, wire.MAX_WINDOW)), Code.FLOW_CONTROL_ERROR),
    "a flood of PING": (
        frames(wire.frame(wire.PING, 0, 0, bytes(8)) * (2 * MAX_NUISANCES)),
        Code.ENHANCE_YOUR_CALM),
    "a flood of SETTINGS": (
        frames(wire.settings_frame([]) * (2 * MAX_NUISANCES)), Code.ENHANCE_YOUR_CALM),
    "a flood of empty DATA": (
        lambda peer: begun(peer) + wire.frame(wire.DATA, 0, 1, b"") * (2 * MAX_NUISANCES),
        Code.ENHANCE_YOUR_CALM),
    "a flood of empty CONTINUATION": (
        lambda peer: wire.frame(wire.HEADERS, 0, 1, peer.block())
        + wire.frame(wire.CONTINUATION, 0, 1, b"") * (2 * MAX_NUISANCES), Code.ENHANCE_YOUR_CALM),
    "resets that the peer provokes by DATA": (
        lambda peer: flood(peer, lambda stream_id: wire.frame(
            wire.DATA, wire.END_STREAM, stream_id, wire.prefixed(PUT))
            + wire.frame(wire.DATA, 0, stream_id, b"")), Code.ENHANCE_YOUR_CALM),
    "resets that the peer provokes by HEADERS": (
        lambda peer: flood(peer, lambda stream_id: wire.frame(
            wire.HEADERS, wire.END_HEADERS, stream_id, peer.block())), Code.ENHANCE_YOUR_CALM),
    "resets that the peer provokes by windows": (
        lambda peer: flood(peer, lambda stream_id: wire.window_update(stream_id, wire.MAX_WINDOW)),
        Code.ENHANCE_YOUR_CALM),
    "rapid resets": (
        lambda peer: b"".join(
            wire.frame(wire.HEADERS, wire.END_HEADERS, 2 * n + 1, peer.block())
            + wire.rst_stream(2 * n + 1, Code.CANCEL) for n in range(2 * MAX_NUISANCES)),
        Code.ENHANCE_YOUR_CALM),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_violations_end_the_connection_and_say_why(node: MemoryNode, peer: H2Peer,
                                                         name: str) -> None:
    content, code = VIOLATIONS[name]
    peer.send(content(peer))
    assert await peer.end() == code
    await still_serves(node)


async def test_unfinished_requests_are_bounded(node: MemoryNode, peer: H2Peer) -> None:
    limit = node.server._front._limits.max_buffered_bytes  # type: ignore[union-attr]
    message = b"\0\0\x1f\xff\xff" + bytes(MAX_FRAME_BYTES - 5)
    parts = 24
    needed = limit // (parts * MAX_FRAME_BYTES) + 2
    for number in range(needed):
        peer.headers(2 * number + 1)
        for part in range(parts):
            peer.data(2 * number + 1, message if part == 0 else bytes(MAX_FRAME_BYTES), end=False)
        await peer.settle()
    refused = [answer.fields for answer in peer.answers.values() if answer.ended]
    assert refused
    for fields in refused:
        assert fields["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert (fields["elastickv-error"], fields["elastickv-outcome"]) == (
            "Overloaded", "not-applied")
    await still_serves(node)


@pytest.mark.parametrize(("encoding", "rest"), [
    ("identity", wire.prefixed(bytes(200))[:150]), ("identity", b"\0\x7f\xff\xff\xff"),
    ("br", b"\x01" + wire.prefixed(PUT)[1:]), ("identity", wire.prefixed(PUT))],
    ids=["goes on", "too large", "unknown encoding", "another"])
async def test_what_follows_a_request_that_is_served_tells_nothing_of_its_outcome(
        node: MemoryNode, encoding: str, rest: bytes) -> None:
    """Other statuses of these would say that certainly nothing was written."""
    front = node.server._front
    front._limits = replace(front._limits, max_buffered_bytes=100)  # type: ignore[union-attr]
    peer = await H2Peer.connect(node.server.port)
    node.faults.hold = asyncio.Event()
    peer.headers(1, **{"grpc-encoding": encoding})
    peer.data(1, wire.prefixed(PUT), end=False)
    await eventually(lambda: node.faults.before == ["write"])
    peer.data(1, rest, end=False)
    answer = await peer.answer(1)
    assert answer.grpc_status == grpc.StatusCode.INTERNAL.value[0]
    assert not any(name.startswith("elastickv-") for name in answer.fields)
    peer.close()


async def test_compressed_requests_of_one_pass_of_the_loop_are_bounded(node: MemoryNode) -> None:
    """A little on the wire can be a lot in memory before the first of them is served."""
    front = node.server._front
    request = pb.RawPutRequest(key=b"k", value=bytes(MAX_VALUE_BYTES)).SerializeToString()
    front._limits = replace(  # type: ignore[union-attr]
        front._limits, max_buffered_bytes=3 * len(request))  # type: ignore[union-attr]
    peer = await H2Peer.connect(node.server.port)
    message = gzip.compress(request)
    compressed = b"\x01" + len(message).to_bytes(4, "big") + message
    whole = [(wire.END_STREAM, compressed)]
    cut = [(0, compressed[:9]), (wire.END_STREAM, compressed[9:])]
    peer.send(b"".join(
        wire.frame(wire.HEADERS, wire.END_HEADERS, stream_id,
                   peer.block(**{"grpc-encoding": "gzip"}))
        + b"".join(wire.frame(wire.DATA, flags, stream_id, content)
                   for flags, content in (whole if stream_id % 4 == 1 else cut))
        for stream_id in range(1, 32, 2)))
    answers = [await peer.answer(stream_id) for stream_id in range(1, 32, 2)]
    refused = [answer for answer in answers if answer.grpc_status]
    assert len(answers) - len(refused) == node.kv.index == 4  # the last one goes over the limit
    for answer in refused:
        assert answer.grpc_status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert answer.fields["elastickv-outcome"] == "not-applied"
    peer.headers(33, **{"grpc-encoding": "gzip"})
    peer.data(33, compressed)
    assert (await peer.answer(33)).grpc_status == 0
    connection = next(iter(front._connections))  # type: ignore[union-attr]
    assert connection._buffered == 0
    peer.close()


async def test_batches_that_wait_for_their_turn_are_bounded(
        node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = asyncio.Event()

    async def enter(turns: Turns) -> None:
        await turn.wait()

    monkeypatch.setattr(Turns, "enter", enter)
    front = node.server._front
    request = pb.RawBatchRequest(
        ops=[pb.RawBatchOp(key=b"k", value=bytes(10_000))]).SerializeToString()
    front._limits = replace(  # type: ignore[union-attr]
        front._limits, max_buffered_bytes=3 * len(request))  # type: ignore[union-attr]
    peer = await H2Peer.connect(node.server.port)
    for stream_id in range(1, 32, 2):
        peer.headers(stream_id, path="/RawKV/RawBatch")
        peer.data(stream_id, wire.prefixed(request))
    for stream_id in range(9, 32, 2):
        answer = await peer.answer(stream_id)
        assert answer.grpc_status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert answer.fields["elastickv-outcome"] == "not-applied"
    turn.set()
    for stream_id in range(1, 8, 2):
        assert (await peer.answer(stream_id)).grpc_status == 0
    connection = next(iter(front._connections))  # type: ignore[union-attr]
    assert connection._buffered == 0
    peer.close()


async def test_a_request_that_is_served_may_end_when_there_is_no_room(node: MemoryNode) -> None:
    front = node.server._front
    front._limits = replace(front._limits, max_buffered_bytes=100)  # type: ignore[union-attr]
    peer = await H2Peer.connect(node.server.port)
    node.faults.hold = asyncio.Event()
    message = gzip.compress(PUT)
    peer.headers(1, **{"grpc-encoding": "gzip"})
    peer.data(1, b"\x01" + len(message).to_bytes(4, "big") + message, end=False)
    await eventually(lambda: node.faults.before == ["write"])
    connection = next(iter(front._connections))  # type: ignore[union-attr]
    connection._buffered += 101
    peer.data(1, b"")
    await peer.settle()
    node.faults.hold.set()
    assert (await peer.answer(1)).grpc_status == 0
    peer.close()


async def test_a_compressed_request_that_is_reset_at_once_leaves_nothing(node: MemoryNode,
                                                                         peer: H2Peer) -> None:
    message = gzip.compress(PUT)
    peer.headers(1, **{"grpc-encoding": "gzip"})
    peer.data(1, b"\x01" + len(message).to_bytes(4, "big") + message)
    peer.send(wire.rst_stream(1, Code.CANCEL))
    await peer.settle()
    connection = next(iter(node.server._front._connections))  # type: ignore[union-attr]
    assert connection._buffered == 0
    assert node.kv.index == 0


def watch_message(size: int) -> bytes:
    """A compressed request of a health watch, with its prefix: `size` bytes of service name."""
    message = gzip.compress(health_pb2.HealthCheckRequest(service="x" * size).SerializeToString())
    return b"\x01" + len(message).to_bytes(4, "big") + message


async def test_requests_that_a_stream_does_not_take_are_bounded(node: MemoryNode,
                                                                peer: H2Peer) -> None:
    """A watch reads one request. The rest counts until the stream is over."""
    size = MAX_STREAMED_REQUEST_BYTES - 100
    streams = range(1, 2 * ((64 << 20) // (size * MAX_STREAMED_REQUESTS) + 1) + 1, 2)
    for stream_id in streams:
        peer.headers(stream_id, path="/grpc.health.v1.Health/Watch", **{"grpc-encoding": "gzip"})
        peer.data(stream_id, watch_message(size), end=False)
        await peer.settle()
        peer.data(stream_id, watch_message(size) * MAX_STREAMED_REQUESTS, end=False)
    connection = next(iter(node.server._front._connections))  # type: ignore[union-attr]
    refused = await peer.answer(streams[-1])
    assert refused.grpc_status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert 0 < connection._buffered <= 64 << 20
    for stream_id in streams[:-1]:
        assert not peer.answers[stream_id].ended
        peer.send(wire.rst_stream(stream_id, Code.CANCEL))
    await peer.settle()
    assert connection._buffered == 0


@pytest.mark.parametrize(("size", "count"), [
    (MAX_STREAMED_REQUEST_BYTES + 1, 1), (1, MAX_STREAMED_REQUESTS + 2)],
    ids=["too large", "too many"])
async def test_requests_that_a_stream_does_not_get(node: MemoryNode, peer: H2Peer, size: int,
                                                   count: int) -> None:
    peer.headers(1, path="/grpc.health.v1.Health/Watch", **{"grpc-encoding": "gzip"})
    peer.data(1, watch_message(size) * count, end=False)
    assert (await peer.answer(1)).grpc_status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    connection = next(iter(node.server._front._connections))  # type: ignore[union-attr]
    assert connection._buffered == 0


async def test_a_peer_that_leaves_gets_its_answers_first(node: MemoryNode, peer: H2Peer) -> None:
    node.faults.hold = asyncio.Event()
    peer.call(1, "/RawKV/RawPut", PUT)
    await eventually(lambda: node.faults.before == ["write"])
    peer.send(wire.goaway(0, Code.NO_ERROR))
    node.faults.hold.set()
    assert (await peer.answer(1)).grpc_status == 0
    assert await peer.end() is None


async def stopping(node: MemoryNode, peer: H2Peer) -> asyncio.Task[None]:
    """The stop of the node's server, as far as the first GOAWAY."""
    task = asyncio.create_task(node.server.stop(grace_s=60))
    await peer.goodbyes(1)
    return task


async def test_a_stopping_server_answers_and_says_goodbye(peer: H2Peer, node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    peer.call(1, "/RawKV/RawPut", PUT)
    await eventually(lambda: node.faults.before == ["write"])
    stop = await stopping(node, peer)
    peer.call(3, "/RawKV/RawPut", PUT)
    peer.knows()
    peer.call(5, "/RawKV/RawPut", PUT)
    await peer.goodbyes(2)
    assert peer.last_stream_ids == [wire.STREAM_ID_MASK, 3]
    assert (await peer.answer(5)).reset == Code.REFUSED_STREAM
    node.faults.hold.set()
    assert (await peer.answer(1)).grpc_status == 0
    assert (await peer.answer(3)).grpc_status == 0
    assert await peer.end() == Code.NO_ERROR
    await stop
    assert node.kv.index == 2


async def test_a_peer_that_does_not_say_that_it_knows_is_refused_new_calls(
        peer: H2Peer, node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "GOODBYE_S", 0.01)
    await peer.settle()
    stop = await stopping(node, peer)
    await peer.goodbyes(2)
    assert peer.last_stream_ids == [wire.STREAM_ID_MASK, 0]
    assert await peer.end() == Code.NO_ERROR
    await stop


async def test_a_stopping_server_reads_until_the_peer_closes(
        peer: H2Peer, node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "GOODBYE_S", 60)
    await peer.settle()
    stop = await stopping(node, peer)
    peer.knows()
    await peer.goodbyes(2)
    await peer.settle()
    assert not stop.done()
    peer.close()
    async with asyncio.timeout(10):
        await stop


async def test_a_stopping_server_ends_the_streams_of_a_peer_that_has_said_goodbye(
        peer: H2Peer, node: MemoryNode) -> None:
    peer.call(1, "/grpc.health.v1.Health/Watch", b"")
    peer.send(wire.goaway(0, Code.NO_ERROR))
    await peer.settle()
    async with asyncio.timeout(10):
        await node.server.stop(grace_s=60)
    assert (await peer.answer(1)).grpc_status == grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.mark.parametrize("late", [False, True], ids=["before", "between the two GOAWAYs"])
async def test_a_stopping_server_does_not_wait_for_streams(peer: H2Peer, node: MemoryNode,
                                                           late: bool) -> None:
    """A health watch would last for ever; it hears that the node stops and is ended."""
    await peer.settle()
    if not late:
        peer.call(1, "/grpc.health.v1.Health/Watch", b"")
        await peer.settle()
        assert peer.answers[1].data[5:] == b"\x08\x01"
    stop = await stopping(node, peer)
    if late:
        peer.call(1, "/grpc.health.v1.Health/Watch", b"")
    peer.knows()
    answer = await peer.answer(1)
    assert late or answer.data[12:] == b"\x08\x02"
    assert answer.grpc_status == grpc.StatusCode.UNAVAILABLE.value[0]
    assert await peer.end() == Code.NO_ERROR
    assert peer.last_stream_ids == [wire.STREAM_ID_MASK, 1]
    await stop


async def test_a_stopping_server_does_not_wait_for_ever(peer: H2Peer, node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    peer.call(1, "/RawKV/RawPut", PUT)
    await eventually(lambda: node.faults.before == ["write"])
    await node.server.stop(grace_s=0.05)
    assert await peer.end() == Code.NO_ERROR
    assert node.kv.index == 0


# --- anything at all -------------------------------------------------------------------------

ANY_FRAME = st.builds(
    wire.frame, st.integers(0, 11), st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 5]),
    st.binary(max_size=40))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANY_FRAME, max_size=12), st.binary(max_size=30))
async def test_any_frames_are_answered_or_refused(frames_of_any_kind: list[bytes],
                                                  noise: bytes) -> None:
    """Whatever comes, no exception escapes: the connection answers, or is ended with a reason."""
    raised: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    node = MemoryNode(front=FRONT_H2)
    async with running(node):
        peer = await H2Peer.connect(node.server.port)
        peer.send(begun(peer) + b"".join(frames_of_any_kind) + noise)
        peer.send(wire.frame(wire.PING, 0, 0, b"settled?"))
        while await peer.frame() is not None:
            if b"settled?" in peer.pings:
                break
            if noise:
                peer.close()
        peer.close()
        await still_serves(node)
    assert raised == []


# --- silence ---------------------------------------------------------------------------------


async def test_a_peer_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel takes the PING that asks for a sign of life; that is none."""
    for name in ("HANDSHAKE_TIMEOUT_S", "PING_AFTER_S", "PING_TIMEOUT_S"):
        monkeypatch.setattr(budget, name, 0.1)
    node = MemoryNode(front=FRONT_H2)
    async with running(node):
        peer = await H2Peer.connect(node.server.port)
        async with asyncio.timeout(10):
            await peer.end()
        assert peer.pings == [b"elastick"]
