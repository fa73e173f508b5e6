"""The operations on keys that belong on the leader, and how a member asks for one.

An operation travels as its name and its arguments, a map. Arguments that are missing, unknown or of
another type are a `WireError`: nothing has been done then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, get_args

import msgspec

from elastickv.crypto.keystore import Purpose
from elastickv.errors import InvalidArgument
from elastickv.kv import forwarding
from elastickv.kv.api import WriterRow
from elastickv.kv.forwarding import AdminCall


class _Operation(msgspec.Struct, forbid_unknown_fields=True):
    """Base. `proposes`: it seals an entry; `seals_under`: what user writes are sealed under once it
    has taken effect."""

    name: ClassVar[str]
    proposes: ClassVar[bool] = True
    seals_under: ClassVar[Purpose | None] = None


class BootstrapKeys(_Operation):
    """The first DEKs. `storage_dek_id` 0: the leader makes everything."""

    name = "bootstrap"

    wrapped_storage: bytes
    wrapped_raft: bytes
    storage_dek_id: int
    raft_dek_id: int
    writers: list[WriterRow]


class RotateDek(_Operation, omit_defaults=True):
    """A new active DEK. `new_dek_id` 0: the leader makes it; `replaces` other than 0: only if that
    DEK is still the active one."""

    name = "rotate_dek"

    purpose: Purpose
    wrapped: bytes
    new_dek_id: int
    proposer_node_id: int
    proposer_local_epoch: int
    replaces: int = 0


class RegisterWriters(_Operation):
    """Rows of the registry."""

    name = "register_writers"
    proposes = False  # but registrations, which stay in the clear

    dek_id: int
    writers: list[WriterRow]


class _Cutover(_Operation):
    """`proposer_node_id` 0: the leader proposes it as itself."""

    proposer_node_id: int
    proposer_local_epoch: int


class EnableStorageEnvelope(_Cutover):
    """The storage cutover."""

    name = "enable_storage_envelope"
    seals_under = Purpose.STORAGE


class EnableRaftEnvelope(_Cutover):
    """The raft cutover."""

    name = "enable_raft_envelope"
    seals_under = Purpose.RAFT


class SidecarStateFor(_Operation):
    """The leader's key state, with the registry's epochs for a node."""

    name = "sidecar_state_for"
    proposes = False

    caller_full_node_id: int


KeyOperation = (BootstrapKeys | RotateDek | RegisterWriters | EnableStorageEnvelope
                | EnableRaftEnvelope | SidecarStateFor)

_BY_NAME: Final[Mapping[str, type[KeyOperation]]] = {
    operation.name: operation for operation in get_args(KeyOperation)}


def encode_call(operation: KeyOperation) -> bytes:
    """What asks the leader for `operation`."""
    return forwarding.encode(AdminCall(operation.name, msgspec.Raw(forwarding.encode(operation))))


def decode_call(payload: bytes) -> KeyOperation:
    """Inverse of `encode_call`; raises `WireError`, or `InvalidArgument` for an operation that this
    version does not know."""
    call = forwarding.decode(payload, AdminCall)
    known = _BY_NAME.get(call.operation)
    if known is None:
        raise InvalidArgument(f"unknown admin operation {call.operation!r}",
                              remedy="run the same version on every node")
    return forwarding.decode(call.arguments, known)
