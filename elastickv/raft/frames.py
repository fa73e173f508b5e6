"""What peers say to each other: the frame, and every message as a msgpack struct.

A frame on the wire is `length u32 (big endian) | body`; `length` counts the body and is bounded, so
random bytes end the connection at the first header. The body is one message in msgpack array form
whose first element is the message's tag. Nothing on the wire is ever unpickled.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from elastickv.errors import WireError

_LENGTH = struct.Struct(">I")
HEADER_BYTES: Final = 4
PROTOCOL_VERSION: Final = 1
SLACK_BYTES: Final = 1 << 20
"""How much larger than the largest entry a frame may be."""


class FrameDecoder:
    """Cuts a byte stream into frame bodies. Sans-IO: feed it what arrives."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are complete now. Raises `WireError` on a length over the maximum, once
        what came before it was returned: that may change the maximum."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        offset = 0
        while len(buffer) - offset >= HEADER_BYTES:
            (length,) = _LENGTH.unpack_from(buffer, offset)
            if not 0 < length <= self.max_bytes:
                if bodies:
                    break
                raise WireError(f"a frame of {length} bytes is outside 1 to {self.max_bytes}")
            end = offset + HEADER_BYTES + length
            if end > len(buffer):
                break
            bodies.append(bytes(buffer[offset + HEADER_BYTES:end]))
            offset = end
        if offset:
            del buffer[:offset]
        return bodies

    def holds_part(self) -> bool:
        """Whether what was fed last ends within a frame."""
        return bool(self._buffer)

    def has_more(self) -> bool:
        """Whether another length has come, of a frame that is not whole or was not looked at."""
        return len(self._buffer) >= HEADER_BYTES


def frame(body: bytes) -> bytes:
    """`body` behind its length."""
    return _LENGTH.pack(len(body)) + body


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of all messages."""


class PeerRecord(Message, frozen=True):
    """What one node remembers of another: its last boot (number and random id), the highest term
    in which it spoke, the last entry that it certainly had made durable (because it acknowledged it
    or, as a leader, committed it), and the last entry that it sent as a leader and that is durable
    at the one who remembers."""

    boot_epoch: int
    boot_id: int
    term: int
    acked_index: int
    acked_term: int
    sent_index: int
    sent_term: int


class Hello(Message, frozen=True, tag=1):
    """First on every connection, from both ends. `remembered` is what the sender knows of the
    receiver, None when nothing; `suspect` says that the sender knows itself to have lost data.
    `cluster_id` is reserved, and "": whoever has one is of another cluster."""

    version: int
    cluster_id: str
    node_id: str
    client_address: str
    boot_epoch: int
    boot_id: int
    term: int
    suspect: bool
    remembered: PeerRecord | None


class AppendEntries(Message, frozen=True, tag=2):
    """Log replication and heartbeat. `entries` is a blob of journal records; `sequence` grows with
    every message of this leader and comes back in the `Ack`."""

    term: int
    sequence: int
    commit_index: int
    previous_index: int
    previous_term: int
    entries: bytes


NO_SEQUENCE = 0


class Ack(Message, frozen=True, tag=3):
    """Answer to `AppendEntries` of `term`. Accepted: everything below `next_index` equals the
    leader's log and is durable here. Otherwise the leader must go back to `next_index`. Not
    `counted`: the sender has lost data and may not help to commit. With `NO_SEQUENCE` it answers
    nothing and is a sign of life: something of the leader is on its way in. Who does not know of
    that takes it for a rejection that is old news."""

    term: int
    sequence: int
    next_index: int
    accepted: bool
    counted: bool


class StaleTerm(Message, frozen=True, tag=4):
    """The receiver leads or asks in a term below `term`."""

    term: int


class RequestVote(Message, frozen=True, tag=5):
    """A candidate's request. `transfer` True: the leader itself asked for this election."""

    term: int
    last_index: int
    last_term: int
    transfer: bool


class Vote(Message, frozen=True, tag=6):
    """A granted vote in `term`; durable at the voter."""

    term: int


class PreVote(Message, frozen=True, tag=7):
    """Would you vote for me in `term`? Changes nothing at the receiver."""

    term: int
    round: int
    last_index: int
    last_term: int


class PreVoteReply(Message, frozen=True, tag=8):
    """`term` is the replier's own term."""

    term: int
    round: int
    granted: bool


class Probe(Message, frozen=True, tag=9):
    """ReadIndex: am I still your leader in `term`?"""

    term: int
    round: int


class ProbeAck(Message, frozen=True, tag=10):
    """Yes, in `term`."""

    term: int
    round: int


class ReadRequest(Message, frozen=True, tag=11):
    """A follower asks the leader for a read index."""

    request: int


class ReadReply(Message, frozen=True, tag=12):
    """The read index, or 0 when the receiver of the request does not lead."""

    request: int
    index: int


class TimeoutNow(Message, frozen=True, tag=13):
    """The leader of `term` hands over: start an election at once."""

    term: int


class Request(Message, frozen=True, tag=14):
    """A call of a registered method."""

    request: int
    method: str
    payload: bytes


class Response(Message, frozen=True, tag=15):
    """`error` is the class name of a typed error, "" for success."""

    request: int
    payload: bytes
    error: str
    message: str
    remedy: str


class SnapshotOffer(Message, frozen=True, tag=16):
    """The leader begins to stream a snapshot at (`index`, `last_term`), where the configuration of
    entry `members_index` was in force. `stream` names this attempt."""

    term: int
    stream: int
    index: int
    last_term: int
    members_index: int
    members: bytes


class SnapshotChunk(Message, frozen=True, tag=17):
    """The bytes at `offset` of a stream. `last` True: nothing follows."""

    term: int
    stream: int
    offset: int
    data: bytes
    last: bool


REFUSED_OFFSET = -1


class SnapshotAck(Message, frozen=True, tag=18):
    """`offset` bytes of the stream have been taken; `REFUSED_OFFSET`: the receiver refuses it.
    `done`: the snapshot is installed, the receiver's log begins behind it."""

    term: int
    stream: int
    offset: int
    done: bool


class Ping(Message, frozen=True, tag=19):
    """Keeps an idle connection known to be alive."""

    reply: bool


class Removed(Message, frozen=True, tag=20):
    """The receiver is not in the committed configuration of entry `index`."""

    index: int


AnyMessage = (
    Hello | AppendEntries | Ack | StaleTerm | RequestVote | Vote | PreVote | PreVoteReply | Probe
    | ProbeAck | ReadRequest | ReadReply | TimeoutNow | Request | Response | SnapshotOffer
    | SnapshotChunk | SnapshotAck | Ping | Removed
)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode_message(message: AnyMessage) -> bytes:
    """The body of a frame."""
    return _ENCODER.encode(message)


def decode_message(body: bytes) -> AnyMessage:
    """The message in a frame's body. Raises `WireError`."""
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise WireError(f"a peer sent {len(body)} bytes that are no message") from None
