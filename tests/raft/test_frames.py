"""The wire between peers: framing and messages."""

from __future__ import annotations

import pickle
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import WireError
from elastickv.raft import frames
from elastickv.raft.frames import FrameDecoder, decode_message, encode_message, frame

RECORD = frames.PeerRecord(1, 2, 3, 4, 5, 6, 7)
MESSAGES = [
    frames.Hello(1, "c", "n1", "h:1", 3, 77, 4, False, RECORD),
    frames.Hello(1, "", "n2", "", 1, 1, 0, True, None),
    frames.AppendEntries(1, 2, 3, 4, 5, b"blob"),
    frames.Ack(1, 2, 3, True, False),
    frames.StaleTerm(9),
    frames.RequestVote(1, 2, 3, True),
    frames.Vote(4),
    frames.PreVote(1, 2, 3, 4),
    frames.PreVoteReply(1, 2, False),
    frames.Probe(1, 2),
    frames.ProbeAck(1, 2),
    frames.ReadRequest(3),
    frames.ReadReply(3, 99),
    frames.TimeoutNow(4),
    frames.Request(1, "kv.write", b"\x00\xff"),
    frames.Response(1, b"", "NotLeader", "m", "r"),
    frames.SnapshotOffer(1, 2, 3, 4, 5, b"m"),
    frames.SnapshotChunk(1, 2, 3, b"data", True),
    frames.SnapshotAck(1, 2, -1, False),
    frames.Ping(True),
    frames.Removed(12),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_survives_encoding(message):
    assert decode_message(encode_message(message)) == message


def test_every_message_type_is_covered():
    assert {type(message) for message in MESSAGES} == set(frames.AnyMessage.__args__)


def test_tags_are_the_wire_and_never_change():
    tags = {kind.__name__: kind.__struct_config__.tag for kind in frames.AnyMessage.__args__}
    assert tags == {
        "Hello": 1, "AppendEntries": 2, "Ack": 3, "StaleTerm": 4, "RequestVote": 5, "Vote": 6,
        "PreVote": 7, "PreVoteReply": 8, "Probe": 9, "ProbeAck": 10, "ReadRequest": 11,
        "ReadReply": 12, "TimeoutNow": 13, "Request": 14, "Response": 15, "SnapshotOffer": 16,
        "SnapshotChunk": 17, "SnapshotAck": 18, "Ping": 19, "Removed": 20}


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", b"\x91\x63", b"\x91\x06", b"\x92\x06\xa1x",
                                  pickle.dumps({"type": "request_vote"}),
                                  encode_message(frames.Vote(4)) + b"\0"])
def test_what_is_no_message_is_refused(body):
    with pytest.raises(WireError):
        decode_message(body)


@given(st.binary(max_size=100))
def test_random_bytes_are_a_message_or_a_wire_error(body):
    try:
        message = decode_message(body)
    except WireError:
        return
    assert isinstance(message, frames.Message)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.data())
def test_frames_come_out_whole_however_the_bytes_arrive(bodies, data):
    stream = b"".join(frame(body) for body in bodies)
    ends = set(accumulate(len(frame(body)) for body in bodies))
    decoder = FrameDecoder(100)
    found, position = [], 0
    while position < len(stream):
        size = data.draw(st.integers(1, len(stream) - position))
        found += decoder.feed(stream[position:position + size])
        position += size
        assert decoder.holds_part() == (position not in ends)
    assert found == bodies


@pytest.mark.parametrize("header", [b"\x00\x00\x00\x00", b"\x00\x00\x00\x65", b"\xff\xff\xff\xff",
                                    b"GET "])
def test_length_outside_the_bounds_is_refused_at_the_header(header):
    with pytest.raises(WireError):
        FrameDecoder(100).feed(header)
