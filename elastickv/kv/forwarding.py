"""What one member asks another over the peer transport, as msgpack.

Requests and replies are msgspec structs in array form; a decode failure is a `WireError`. Errors
inside a reply travel as (class name, message, remedy) and come back as the same class.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from elastickv.errors import ElasticKVError, OutcomeUnknown, WireError
from elastickv.raft.calls import error_fields, error_from

METHOD_WRITE = "kv.write"
METHOD_CAPABILITY = "encryption.capability"
METHOD_REGISTER_SELF = "encryption.register_self"
METHOD_REPORT = "encryption.report"
METHOD_CAN_UNWRAP = "encryption.can_unwrap"
METHOD_ADMIN = "encryption.admin"

T = TypeVar("T")


class _Message(msgspec.Struct, array_like=True):
    """Base: positional encoding, so that names cost nothing on the wire."""


class WriteItem(_Message):
    """One request of a forwarded group: ops as (kind, key, value, ttl_ms), conditions as
    (key, commit_ts)."""

    ops: list[tuple[int, bytes, bytes, int]]
    conditions: list[tuple[bytes, int]]


class WriteGroup(_Message):
    """Requests that waited together on a follower. Each stands or falls alone."""

    timeout_ms: int
    items: list[WriteItem]


class ErrorInfo(_Message):
    """An error that crosses the transport."""

    name: str
    message: str
    remedy: str


class WriteReply(_Message):
    """One outcome: a position, or an error."""

    commit_index: int
    commit_ts: int
    error: ErrorInfo | None


class WriteGroupReply(_Message):
    """Outcomes in the order of the group."""

    replies: list[WriteReply]


class RegisterSelf(_Message):
    """A member asks the leader to commit its writer registration for one DEK."""

    dek_id: int
    full_node_id: int
    local_epoch: int


class RegisterReply(_Message):
    """`applied_index` 0 means refused: the registry already holds `last_seen_epoch` >= asked."""

    applied_index: int
    last_seen_epoch: int

    @property
    def accepted(self) -> bool:
        return self.applied_index != 0


class AdminCall(_Message):
    """An operation on keys for the leader, by name (`kv.key_operations`)."""

    operation: str
    arguments: msgspec.Raw


def encode(message: object) -> bytes:
    """msgpack bytes of a message."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes, message_type: type[T]) -> T:
    """Inverse of `encode`; raises `WireError`."""
    try:
        return msgspec.msgpack.decode(payload, type=message_type)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise WireError(f"a peer sent a malformed {message_type.__name__}",
                        remedy="run the same version on every node") from None


def decode_outcome(reply: bytes, message_type: type[T], remedy: str) -> T:
    """`decode` for the answer to an operation that the leader has carried out; raises
    `OutcomeUnknown`."""
    try:
        return decode(reply, message_type)
    except WireError:
        raise OutcomeUnknown("the leader gave an answer that does not parse; the operation may have"
                             " been carried out", remedy=remedy) from None


def error_to_info(error: ElasticKVError) -> ErrorInfo:
    """The transportable form of an error."""
    return ErrorInfo(*error_fields(error))


def info_to_error(info: ErrorInfo) -> ElasticKVError:
    """The same class again, or what `raft.calls.error_from` makes of one that is not known."""
    return error_from(info.name, info.message, info.remedy)
