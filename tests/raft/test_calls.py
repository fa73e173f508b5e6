"""Calls between peers: what crosses the wire, and every way a call can end."""

from __future__ import annotations

import asyncio

import pytest

from elastickv.errors import (
    ConditionFailed,
    ElasticKVError,
    IntegrityError,
    InvalidArgument,
    NotLeader,
    OutcomeUnknown,
    PeerError,
    Unreachable,
)
from elastickv.kv.proposer import NotSealable
from elastickv.raft.calls import PeerCalls, error_fields, error_from
from elastickv.raft.frames import Request, Response, decode_message


@pytest.mark.parametrize("error", [
    ConditionFailed("a", remedy="b"), IntegrityError("c"), NotLeader(leader_id="n2"),
    OutcomeUnknown("d", remedy="e")], ids=lambda error: type(error).__name__)
def test_typed_error_comes_back_as_itself(error):
    again = error_from(*error_fields(error))
    assert type(again) is type(error)
    assert (again.message, again.remedy) == (error.message, error.remedy)


@pytest.mark.parametrize("name", ["NoSuchError", "Outcome", "annotations", "ExitCode", "__name__"])
def test_unknown_name_becomes_an_unknown_outcome(name):
    assert type(error_from(name, "m", "")) is OutcomeUnknown


def test_a_class_of_the_nodes_own_comes_back_as_the_nearest_one_that_all_know():
    again = error_from(*error_fields(NotSealable("not yet", remedy="retry")))
    assert type(again) is PeerError
    assert (again.message, again.remedy) == ("not yet", "retry")


def test_unexpected_error_tells_only_its_class():
    assert error_fields(ValueError("a value")) == ("OutcomeUnknown",
                                                   "the peer failed with ValueError", "")


class Wire:
    def __init__(self) -> None:
        self.sent: list[tuple[str, Request | Response]] = []
        self.up = True

    def send(self, peer_id: str, body: bytes) -> bool:
        if self.up:
            self.sent.append((peer_id, decode_message(body)))
        return self.up


async def begun(calls: PeerCalls, wire: Wire) -> tuple[asyncio.Task[bytes], Request]:
    task = asyncio.ensure_future(calls.call("n2", "m", b"p", timeout_s=5))
    await asyncio.sleep(0)
    request = wire.sent[-1][1]
    assert isinstance(request, Request)
    return task, request


async def test_answer_completes_the_call():
    wire = Wire()
    calls = PeerCalls("n1", wire.send, 100, lambda peer_id: True)
    task, request = await begun(calls, wire)
    calls.received_response("n3", Response(request.request, b"forged", "", "", ""))
    calls.received_response("n2", Response(request.request + 1, b"other", "", "", ""))
    calls.received_response("n2", Response(request.request, b"reply", "", "", ""))
    calls.received_response("n2", Response(request.request, b"again", "", "", ""))
    assert await task == b"reply"


async def test_error_completes_the_call():
    wire = Wire()
    calls = PeerCalls("n1", wire.send, 100, lambda peer_id: True)
    task, request = await begun(calls, wire)
    calls.received_response("n2", Response(request.request, b"", "ConditionFailed", "no", "do"))
    with pytest.raises(ConditionFailed, match="no"):
        await task


@pytest.mark.parametrize("end", ["lost", "expire", "close"])
async def test_call_without_an_answer_is_unknown(end):
    wire = Wire()
    calls = PeerCalls("n1", wire.send, 100, lambda peer_id: True)
    task, _ = await begun(calls, wire)
    if end == "lost":
        calls.lost("n3")
        assert not task.done()
        calls.lost("n2")
    elif end == "expire":
        calls.expire(asyncio.get_running_loop().time() + 4)
        await asyncio.sleep(0)
        assert not task.done()
        calls.expire(asyncio.get_running_loop().time() + 6)
    else:
        await calls.close()
    with pytest.raises(OutcomeUnknown):
        await task


async def test_call_that_was_never_sent_is_unreachable():
    wire = Wire()
    wire.up = False
    calls = PeerCalls("n1", wire.send, 100, lambda peer_id: True)
    with pytest.raises(Unreachable):
        await calls.call("n2", "m", b"", timeout_s=5)


@pytest.mark.parametrize(("size", "allowed"), [(100, True), (101, False)])
async def test_payload_limit_both_ways(size, allowed):
    wire = Wire()
    calls = PeerCalls("n1", wire.send, 100, lambda peer_id: True)

    async def big(peer_id: str, method: str, payload: bytes) -> bytes:
        return bytes(size)

    calls.handle("big", big)
    calls.received_request("n2", Request(1, "big", b""))
    while not wire.sent:
        await asyncio.sleep(0)
    response = wire.sent[0][1]
    assert isinstance(response, Response)
    assert (response.error == "") is allowed
    if not allowed:
        with pytest.raises(InvalidArgument, match="100 bytes"):
            await calls.call("n2", "m", bytes(size), timeout_s=5)


async def test_handlers_run_side_by_side_and_their_errors_are_typed():
    wire = Wire()
    calls = PeerCalls("n1", wire.send, 100, lambda peer_id: True)
    gate = asyncio.Event()

    async def slow(peer_id: str, method: str, payload: bytes) -> bytes:
        await gate.wait()
        return b"slow"

    async def refuse(peer_id: str, method: str, payload: bytes) -> bytes:
        raise ElasticKVError("refused")

    calls.handle("slow", slow)
    calls.handle("refuse", refuse)
    calls.received_request("n2", Request(1, "slow", b""))
    calls.received_request("n2", Request(2, "refuse", b""))
    calls.received_request("n2", Request(3, "absent", b""))
    while len(wire.sent) < 2:
        await asyncio.sleep(0)
    gate.set()
    while len(wire.sent) < 3:
        await asyncio.sleep(0)
    assert [(r.request, r.error) for _, r in wire.sent if isinstance(r, Response)] == [
        (2, "ElasticKVError"), (3, "PeerError"), (1, "")]


@pytest.mark.parametrize("lost", ["n2", "n3"])
async def test_answer_does_not_leave_on_another_link(lost):
    """The process behind the next link may have begun to count anew."""
    wire = Wire()
    calls = PeerCalls("n1", wire.send, 100, lambda peer_id: True)

    async def reply(peer_id: str, method: str, payload: bytes) -> bytes:
        return payload

    calls.handle("m", reply)
    calls.received_request("n2", Request(1, "m", b"old"))
    calls.lost(lost)
    calls.received_request("n2", Request(1, "m", b"new"))
    await asyncio.gather(*calls._tasks)
    answers = [response.payload for _, response in wire.sent if isinstance(response, Response)]
    assert answers == ([b"new"] if lost == "n2" else [b"old", b"new"])
