"""elastickv.client.Client when members fail: rotation, leader following, unknown outcomes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import EncodeError
from memory_node import MemoryNode, eventually, running
from proxy import Proxy, proxied

from elastickv.client import Client, Put, pool
from elastickv.client.caller import Caller
from elastickv.client.failures import CONNECT_TIMEOUT_S
from elastickv.client.rpcs import Rpc
from elastickv.errors import (
    ClientClosed,
    DeadlineExceeded,
    InvalidArgument,
    NoLeader,
    NotLeader,
    OperatorError,
    OutcomeUnknown,
    Overloaded,
    Unreachable,
    WireError,
)
from elastickv.pb import service_pb2 as pb
from elastickv.server.h2 import wire


@pytest.fixture
async def nodes() -> AsyncIterator[list[MemoryNode]]:
    nodes = [MemoryNode(f"n{number}", accept_loops=1) for number in (1, 2, 3)]
    async with running(*nodes):
        yield nodes


@pytest.fixture
async def proxies(nodes: list[MemoryNode]) -> AsyncIterator[list[Proxy]]:
    async with proxied(*(node.server.port for node in nodes)) as proxies:
        yield proxies


def asked(nodes: list[MemoryNode]) -> list[int]:
    """How many calls each node has seen."""
    return [len(node.faults.before) for node in nodes]


async def test_calls_stay_with_the_member_that_answers(nodes: list[MemoryNode]) -> None:
    async with Client([node.address for node in nodes]) as client:
        for _ in range(5):
            await client.put(b"k", b"v")
    assert asked(nodes) == [5, 0, 0]


@pytest.mark.parametrize("write", [True, False])
async def test_a_member_that_is_down_is_passed_over(nodes: list[MemoryNode],
                                                    proxies: list[Proxy], write: bool) -> None:
    await proxies[0].refuse()
    async with Client([proxy.address for proxy in proxies]) as client:
        await (client.put(b"k", b"v") if write else client.get(b"k"))
        await client.get(b"k")
    assert asked(nodes) == [0, 2, 0]


@pytest.mark.parametrize("error", [NoLeader("m"), Overloaded("m"), NotLeader("m")],
                         ids=lambda error: type(error).__name__)
async def test_a_write_that_certainly_did_not_happen_is_tried_elsewhere(
        nodes: list[MemoryNode], error: Exception) -> None:
    nodes[0].faults.errors.append(error)
    async with Client([node.address for node in nodes]) as client:
        await client.put(b"k", b"v")
    assert [node.kv.index for node in nodes] == [0, 1, 0]


async def test_the_leader_hint_is_followed_and_remembered(nodes: list[MemoryNode]) -> None:
    nodes[0].faults.errors.append(NotLeader(leader_id="n3", leader_address=nodes[2].address))
    async with Client([node.address for node in nodes]) as client:
        await client.put(b"k", b"v")
        await client.put(b"k", b"v")
    assert asked(nodes) == [1, 0, 2]


async def test_a_leader_outside_the_list_is_followed(nodes: list[MemoryNode]) -> None:
    nodes[0].faults.errors.append(NotLeader(leader_id="n2", leader_address=nodes[1].address))
    async with Client([nodes[0].address]) as client:
        await client.put(b"k", b"v")
    assert asked(nodes) == [1, 1, 0]


@pytest.mark.parametrize("hint", ["", "not an address", "127.0.0.1:1"])
async def test_a_useless_hint_does_no_harm(nodes: list[MemoryNode], hint: str) -> None:
    nodes[0].faults.errors.append(NotLeader(leader_id="x", leader_address=hint))
    async with Client([node.address for node in nodes]) as client:
        await client.put(b"k", b"v")
    assert sum(node.kv.index for node in nodes) == 1


@pytest.mark.parametrize("error", [OutcomeUnknown("m"), ZeroDivisionError()],
                         ids=lambda error: type(error).__name__)
async def test_a_write_of_unknown_outcome_is_not_repeated(nodes: list[MemoryNode],
                                                          error: Exception) -> None:
    nodes[0].faults.errors.append(error)
    async with Client([node.address for node in nodes]) as client:
        with pytest.raises(OutcomeUnknown):
            await client.put(b"k", b"v")
    assert asked(nodes) == [1, 0, 0]


async def test_a_connection_lost_during_a_write_is_an_unknown_outcome(
        nodes: list[MemoryNode], proxies: list[Proxy]) -> None:
    nodes[0].faults.hold = asyncio.Event()
    async with Client([proxy.address for proxy in proxies]) as client:
        put = asyncio.create_task(client.put(b"k", b"v"))
        await eventually(lambda: asked(nodes) == [1, 0, 0])
        await proxies[0].refuse()
        with pytest.raises(OutcomeUnknown, match=proxies[0].address) as caught:
            await put
    assert "read" in caught.value.remedy
    assert asked(nodes) == [1, 0, 0]


async def test_a_connection_lost_during_a_read_is_tried_elsewhere(
        nodes: list[MemoryNode], proxies: list[Proxy]) -> None:
    nodes[0].faults.hold = asyncio.Event()
    async with Client([proxy.address for proxy in proxies]) as client:
        get = asyncio.create_task(client.get(b"k"))
        await eventually(lambda: asked(nodes) == [1, 0, 0])
        await proxies[0].refuse()
        assert not (await get).exists
    assert asked(nodes) == [1, 1, 0]


async def test_a_frozen_member_leaves_a_read_time_to_ask_another(
        nodes: list[MemoryNode], proxies: list[Proxy]) -> None:
    async with Client([proxy.address for proxy in proxies], timeout_s=2) as client:
        await client.get(b"k")
        proxies[0].freeze()
        assert not (await client.get(b"k")).exists
    assert asked(nodes) == [1, 1, 0]


@pytest.mark.parametrize("write", [True, False])
async def test_a_member_that_never_answers_leaves_time_to_connect_to_another(
        nodes: list[MemoryNode], proxies: list[Proxy], write: bool) -> None:
    """Also when the whole time is shorter than a connection may take otherwise."""
    proxies[0].freeze()
    async with Client([proxy.address for proxy in proxies],
                      timeout_s=CONNECT_TIMEOUT_S * 0.9) as client:
        await (client.put(b"k", b"v") if write else client.get(b"k"))
    assert asked(nodes) == [0, 1, 0]


async def test_a_frozen_member_makes_a_write_unknown(nodes: list[MemoryNode],
                                                     proxies: list[Proxy]) -> None:
    async with Client([proxy.address for proxy in proxies]) as client:
        await client.get(b"k")
        proxies[0].freeze()
        with pytest.raises(OutcomeUnknown):
            await client.put(b"k", b"v", timeout_s=0.3)
        await client.put(b"k", b"v")
    assert asked(nodes) == [1, 1, 0]


@pytest.mark.parametrize(("error", "of_write"), [
    pytest.param(OutcomeUnknown("m"), OutcomeUnknown, id="unknown"),
    pytest.param(DeadlineExceeded("m"), DeadlineExceeded, id="not proposed in time"),
    pytest.param(ZeroDivisionError(), OutcomeUnknown, id="defect"),
])
async def test_the_write_after_one_that_is_not_repeated_goes_elsewhere(
        nodes: list[MemoryNode], error: Exception, of_write: type[Exception]) -> None:
    nodes[0].faults.errors.append(error)
    async with Client([node.address for node in nodes]) as client:
        with pytest.raises(of_write):
            await client.put(b"k", b"v")
        await client.put(b"k", b"v")
    assert asked(nodes) == [1, 1, 0]


async def test_a_frozen_connection_is_given_up(nodes: list[MemoryNode], proxies: list[Proxy],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The times as they are, but shorter by a factor, so that this need not last half a minute."""
    monkeypatch.setattr(pool, "OPTIONS", tuple(
        (name, value // 20 if "keepalive" in name or "ping" in name else value)
        for name, value in pool.OPTIONS))
    async with Client([proxies[0].address], timeout_s=30) as client:
        await client.get(b"k")
        proxies[0].freeze()
        with pytest.raises(OutcomeUnknown, match="UNAVAILABLE"):
            await client.put(b"k", b"v")


async def test_nobody_there() -> None:
    async with proxied(1, 1) as dead:
        for proxy in dead:
            await proxy.refuse()
        async with Client([proxy.address for proxy in dead], timeout_s=0.4) as client:
            for call in (client.put(b"k", b"v"), client.get(b"k")):
                with pytest.raises(Unreachable) as caught:
                    await call
                for proxy in dead:
                    assert proxy.address in str(caught.value)
                assert "refused" in str(caught.value)


async def test_no_leader_until_the_deadline(nodes: list[MemoryNode]) -> None:
    for node in nodes:
        node.faults.errors.extend(NoLeader("nobody leads") for _ in range(1000))
    async with Client([node.address for node in nodes], timeout_s=0.5) as client:
        with pytest.raises(NoLeader, match="nobody leads"):
            await client.put(b"k", b"v")
    assert all(count > 1 for count in asked(nodes))
    assert sum(asked(nodes)) < 100, "attempts are spaced"


async def test_a_member_that_comes_back_is_found_within_the_call(
        nodes: list[MemoryNode], proxies: list[Proxy]) -> None:
    async with Client([proxies[0].address], timeout_s=20) as client:
        await client.put(b"k", b"v")
        await proxies[0].refuse()
        with pytest.raises(Unreachable):  # the loss has been noticed
            await client.get(b"k", timeout_s=0.2)
        put = asyncio.create_task(client.put(b"k", b"w"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(put), 0.2)
        await proxies[0].start()
        await put
    assert nodes[0].kv.index == 2


async def test_an_error_of_the_caller_is_not_retried(nodes: list[MemoryNode]) -> None:
    async with Client([node.address for node in nodes]) as client:
        with pytest.raises(InvalidArgument):
            await client.put(b"", b"v")
    assert asked(nodes) == [0, 0, 0]


async def test_reads_end_at_the_deadline_too(nodes: list[MemoryNode]) -> None:
    nodes[0].faults.hold = asyncio.Event()
    async with Client([nodes[0].address], timeout_s=0.3) as client:
        with pytest.raises(DeadlineExceeded):
            await client.get(b"k")


async def test_a_cancelled_call_ends_at_once(nodes: list[MemoryNode]) -> None:
    nodes[0].faults.hold = asyncio.Event()
    async with Client([nodes[0].address], timeout_s=60) as client:
        put = asyncio.create_task(client.put(b"k", b"v"))
        await eventually(lambda: asked(nodes) == [1, 0, 0])
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put


async def test_many_calls_over_a_failing_member(nodes: list[MemoryNode],
                                                proxies: list[Proxy]) -> None:
    """Every call ends in one clear way, and what was acknowledged was applied once."""
    async with Client([proxy.address for proxy in proxies], timeout_s=10) as client:
        async def put(number: int) -> bool | None:
            try:
                await client.put(b"%d" % number, b"v")
            except OutcomeUnknown:
                return None
            return True

        puts = [asyncio.create_task(put(number)) for number in range(200)]
        await eventually(lambda: asked(nodes)[0] > 20)
        await proxies[0].refuse()
        outcomes = await asyncio.gather(*puts)
        applied = sum(node.kv.index for node in nodes)
        certain = outcomes.count(True)
        assert certain <= applied <= certain + outcomes.count(None)
        # Reads are retried, so that the write after one does not meet the lost connection: when no
        # put was under way at the cut, nobody has noticed it yet.
        await client.get(b"0")
        await client.put(b"after", b"v")


@pytest.mark.parametrize(("last_stream_id", "count"), [(0, 1), (0, 4), (1, 1)],
                         ids=["not begun", "not begun, large", "perhaps begun"])
async def test_a_write_that_a_stopping_member_did_not_begin_is_sent_to_another(
        nodes: list[MemoryNode], last_stream_id: int, count: int) -> None:
    """The member listens no more, and answers the first call with GOAWAY alone."""
    values = [Put(b"%d" % number, bytes(65_530)) for number in range(count)]
    calls: list[int] = []
    listeners: list[asyncio.Server] = []

    async def stopping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.settings_frame([]))
        await reader.readexactly(len(wire.PREFACE))
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while head := await reader.readexactly(wire.FRAME_HEADER_BYTES):
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                if head[3] == wire.SETTINGS and not head[4] & wire.ACK:
                    writer.write(wire.SETTINGS_ACK)
                elif head[3] == wire.HEADERS:
                    calls.append(int.from_bytes(head[5:], "big"))
                    listeners[0].close()
                    writer.write(wire.goaway(last_stream_id, wire.Code.NO_ERROR))
                    if last_stream_id:
                        break
        writer.close()

    listeners.append(await asyncio.start_server(stopping, "127.0.0.1", 0))
    address = f"127.0.0.1:{listeners[0].sockets[0].getsockname()[1]}"
    async with Client([address, nodes[1].address]) as client:
        if last_stream_id:
            with pytest.raises(OutcomeUnknown):
                await client.batch(values)
        else:
            await client.batch(values)
    assert calls == [1]
    assert nodes[1].kv.index == (0 if last_stream_id else 1)


# --- a server that is not ours ---------------------------------------------------------------


async def scripted(answer: Callable[[grpc.aio.ServicerContext[Any, Any]], Any],
                   seen: list[str], content: bytes = b"") -> tuple[grpc.aio.Server, str]:
    """A server whose every RawKV method ends as `answer` says, without our trailers, or answers
    `content`."""
    def handler(name: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            seen.append(name)
            await answer(context)
            return content

        return grpc.unary_unary_rpc_method_handler(handle)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(
        "RawKV", {name: handler(name) for name in ("RawPut", "RawGet")})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize(("code", "of_write", "writes_seen"), [
    (grpc.StatusCode.UNAVAILABLE, OutcomeUnknown, 1),
    (grpc.StatusCode.UNKNOWN, OutcomeUnknown, 1),
    (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgument, 1),
    (grpc.StatusCode.FAILED_PRECONDITION, OperatorError, 1),
])
async def test_a_status_without_trailers(code: grpc.StatusCode, of_write: type[Exception],
                                         writes_seen: int) -> None:
    seen: list[str] = []
    server, address = await scripted(lambda context: context.abort(code, "no trailers"), seen)
    async with Client([address], timeout_s=1) as client:
        with pytest.raises(of_write):
            await client.put(b"k", b"v")
    assert seen.count("RawPut") == writes_seen
    await server.stop(0)


async def test_an_unavailable_read_without_trailers_is_retried() -> None:
    seen: list[str] = []

    async def third_time_lucky(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if len(seen) < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later")

    server, address = await scripted(third_time_lucky, seen)
    async with Client([address], timeout_s=10) as client:
        assert not (await client.get(b"k")).exists
    assert seen == ["RawGet"] * 3
    await server.stop(0)


async def answers(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Without an error."""


async def test_an_answer_that_does_not_parse() -> None:
    seen: list[str] = []
    server, address = await scripted(answers, seen, content=b"\xff\xff\xff")
    async with Client([address]) as client:
        with pytest.raises(OutcomeUnknown, match="does not parse") as of_write:
            await client.put(b"k", b"v")
        with pytest.raises(WireError, match="does not parse") as of_read:
            await client.get(b"k")
    assert address in str(of_write.value)
    assert address in str(of_read.value)
    assert seen == ["RawPut", "RawGet"]
    await server.stop(0)


class Unserializable:
    """A message of more than 2 GiB, but small."""

    def SerializeToString(self) -> bytes:
        raise EncodeError("Failed to serialize proto")


async def test_a_request_that_cannot_be_serialized_is_not_sent(nodes: list[MemoryNode]) -> None:
    rpc = Rpc("/RawKV/RawPut", Unserializable, pb.RawPutResponse.FromString, write=True)
    caller = Caller([nodes[0].address], None, 5.0)
    with pytest.raises(InvalidArgument, match="cannot be sent"):
        await caller.call(rpc, Unserializable)
    await caller.close()
    assert asked(nodes) == [0, 0, 0]


# --- a client that is closed -----------------------------------------------------------------


@pytest.mark.parametrize("write", [True, False])
async def test_a_call_under_way_ends_when_the_client_is_closed(nodes: list[MemoryNode],
                                                               write: bool) -> None:
    nodes[0].faults.hold = asyncio.Event()
    client = Client([nodes[0].address])
    call = asyncio.ensure_future(client.put(b"k", b"v") if write else client.get(b"k"))
    await eventually(lambda: asked(nodes)[0] == 1)
    await client.close()
    with pytest.raises(OutcomeUnknown if write else ClientClosed):
        await call
    nodes[0].faults.hold.set()


@pytest.mark.parametrize("frozen", [True, False], ids=["no answer", "refused"])
async def test_a_write_that_was_not_sent_when_the_client_was_closed_is_certain(
        nodes: list[MemoryNode], proxies: list[Proxy], frozen: bool) -> None:
    if frozen:
        proxies[0].freeze()
    else:
        await proxies[0].refuse()
    client = Client([proxies[0].address])
    call = asyncio.ensure_future(client.put(b"k", b"v"))
    await asyncio.sleep(0)
    if frozen:
        await eventually(lambda: proxies[0].connections > 0)
    await client.close()
    with pytest.raises(ClientClosed):
        await call
    with pytest.raises(ClientClosed):
        await client.put(b"k", b"v")
    assert asked(nodes) == [0, 0, 0]


async def test_closing_does_not_hide_that_the_caller_was_cancelled(nodes: list[MemoryNode]) -> None:
    nodes[0].faults.hold = asyncio.Event()
    client = Client([nodes[0].address])
    call = asyncio.ensure_future(client.put(b"k", b"v"))
    await eventually(lambda: asked(nodes)[0] == 1)
    call.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await call
    nodes[0].faults.hold.set()


async def test_what_a_member_said_is_told_rather_than_that_it_was_reached(
        nodes: list[MemoryNode]) -> None:
    """That it cannot reach its leader is no matter of endpoints and certificates."""
    nodes[0].faults.errors.extend(
        Unreachable("there is no link to member n1") for _ in range(1000))
    async with Client([nodes[0].address]) as client:
        with pytest.raises(Unreachable, match="no link to member n1"):
            await client.put(b"k", b"v", timeout_s=0.4)
