"""Every log entry: one opcode table, one fail-closed codec.

An entry is `opcode(1) | payload`, and every payload starts with a version byte, `0x01`:

    0x00 SINGLE         one write request
    0x01 BATCH          several write requests that share an entry (group commit)
    0x02 HLC_CEILING    the timestamp below which a leader may issue
    0x03 REGISTRATION   one writer of one DEK
    0x04 BOOTSTRAP      the first two DEKs and their writers
    0x05 ROTATION       key changes and cutovers, told apart by a sub-tag
    0x06                reserved for encryption
    0x07 RESERVATION    how far a writer may count its nonces

0x03 to 0x05 are byte-compatible with the Go implementation (`tests/vectors`). Integers are
big-endian.

Decoding accepts exactly what encoding produces. An unknown opcode, version or sub-tag, a count that
the remaining bytes cannot hold, a short field and a trailing byte each raise `WireError`, so a node
that does not understand an entry stops and never skips a part of it. What the fields *mean* (is
this DEK known, is this purpose defined) is the applier's to judge, not the codec's.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from elastickv.errors import InvalidArgument, WireError

WIRE_VERSION: Final = 0x01
MAX_ENTRY_BYTES: Final = 64 * 1024 * 1024
MAX_KEY_LENGTH: Final = 0xFFFF
OP_PUT: Final = 0
OP_DELETE: Final = 1


class Opcode(enum.IntEnum):
    """The first byte of an entry."""

    SINGLE = 0x00
    BATCH = 0x01
    HLC_CEILING = 0x02
    REGISTRATION = 0x03
    BOOTSTRAP = 0x04
    ROTATION = 0x05
    RESERVATION = 0x07


CLEAR_OPCODES: Final = frozenset((Opcode.REGISTRATION, Opcode.RESERVATION))
"""Entries that may stand unsealed after the raft cutover: ids and counters that a process must have
committed before it may seal anything. None of them is an envelope version."""


class RotationTag(enum.IntEnum):
    """The sub-tag of a ROTATION entry."""

    ROTATE_DEK = 0x01
    REWRAP_DEKS = 0x02
    RETIRE_DEK = 0x03
    ENABLE_STORAGE_ENVELOPE = 0x04
    ENABLE_RAFT_ENVELOPE = 0x05


class WriteOp(NamedTuple):
    """One write. `kind` is `OP_PUT` or `OP_DELETE`; `record` is value header (9) + body, exactly as
    the store keeps it."""

    kind: int
    key: bytes
    record: bytes


class WriteRequest(NamedTuple):
    """One caller's atomic write. A condition is `(key, expected_commit_ts)`, 0 = absent."""

    commit_ts: int
    ops: list[WriteOp]
    conditions: list[tuple[bytes, int]]


class RegistryRow(NamedTuple):
    """One writer of one DEK: 64-bit node id and 16-bit nonce epoch."""

    dek_id: int
    full_node_id: int
    local_epoch: int


@dataclass(frozen=True, slots=True)
class Writes:
    """SINGLE or BATCH: requests in order, each judged by its own conditions."""

    requests: list[WriteRequest]


@dataclass(frozen=True, slots=True)
class HlcCeiling:
    """No timestamp at or above `ceiling_ts` is issued before a higher ceiling is committed."""

    ceiling_ts: int


@dataclass(frozen=True, slots=True)
class Registration:
    """A writer announces the epoch of its nonces."""

    row: RegistryRow


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The cluster's first DEKs, wrapped under the KEK, and the writers that start under them."""

    storage_dek_id: int
    wrapped_storage: bytes
    raft_dek_id: int
    wrapped_raft: bytes
    rows: tuple[RegistryRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Rotation:
    """A key change or a cutover. `purpose` is the raw byte; 1 storage, 2 raft."""

    tag: RotationTag
    dek_id: int
    purpose: int
    wrapped: bytes
    proposer: RegistryRow


@dataclass(frozen=True, slots=True)
class Reservation:
    """A writer may use write counts up to `count` in nonces of its epoch `local_epoch`."""

    dek_id: int
    full_node_id: int
    local_epoch: int
    count: int


Entry = Writes | HlcCeiling | Registration | Bootstrap | Rotation | Reservation
EncryptionEntry = Registration | Bootstrap | Rotation

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_REQUEST_HEAD = struct.Struct(">QH")
_OP_HEAD = struct.Struct(">BH")
_ROW = struct.Struct(">IQH")
_REGISTRATION = struct.Struct(">BIQH")
_ID_AND_LENGTH = struct.Struct(">II")
_ROTATION_HEAD = struct.Struct(">BBIBI")
_RESERVATION = struct.Struct(">BIQHQ")

_SINGLE_PREFIX = bytes((Opcode.SINGLE, WIRE_VERSION))
_BATCH_PREFIX = bytes((Opcode.BATCH, WIRE_VERSION))
_MIN_OP_BYTES = _OP_HEAD.size + _U32.size
_MIN_CONDITION_BYTES = _U16.size + _U64.size
_MIN_REQUEST_BYTES = _REQUEST_HEAD.size + _U32.size


# --- writes ----------------------------------------------------------------------------------


def encode_request(request: WriteRequest) -> bytes:
    """One write request.

        commit_ts(8) | condition count(2) | conditions | op count(4) | ops
        condition:  key length(2) | key | expected commit_ts(8), 0 = absent
        op:         kind(1) 0 put, 1 delete | key length(2) | key | record length(4) | record

    Raises `InvalidArgument` for a field that does not fit.
    """
    commit_ts, ops, conditions = request
    pack_op, pack_length = _OP_HEAD.pack, _U32.pack
    try:
        parts = [_REQUEST_HEAD.pack(commit_ts, len(conditions))]
        for key, expected in conditions:
            parts += (_U16.pack(len(key)), key, _U64.pack(expected))
        parts.append(pack_length(len(ops)))
        for kind, key, record in ops:
            if kind > OP_DELETE:
                raise InvalidArgument(f"unknown write kind {kind}")
            parts += (pack_op(kind, len(key)), key, pack_length(len(record)), record)
    except struct.error:
        raise InvalidArgument(
            f"a write request has a field out of range (key up to {MAX_KEY_LENGTH} bytes,"
            " 65535 conditions)") from None
    return b"".join(parts)


def encode_writes(requests: Sequence[WriteRequest]) -> bytes:
    """The entry that carries `requests`: SINGLE for one, BATCH for more.

        SINGLE: 0x00 | 0x01 | request
        BATCH:  0x01 | 0x01 | count(4) | count x ( length(4) | request )

    Raises `InvalidArgument` when empty or larger than `MAX_ENTRY_BYTES`.
    """
    encoded = [encode_request(request) for request in requests]
    if not encoded:
        raise InvalidArgument("an entry needs at least one write request")
    if len(encoded) == 1:
        entry = _SINGLE_PREFIX + encoded[0]
    else:
        parts = [_BATCH_PREFIX, _U32.pack(len(encoded))]
        for request in encoded:
            parts += (_U32.pack(len(request)), request)
        entry = b"".join(parts)
    if len(entry) > MAX_ENTRY_BYTES:
        raise InvalidArgument(
            f"a log entry of {len(entry)} bytes exceeds the limit of {MAX_ENTRY_BYTES}")
    return entry


def _short(what: str) -> WireError:
    return WireError(f"{what}: the entry ends too early")


def _check_count(what: str, count: int, least: int, remaining: int) -> None:
    """Refuse a count that cannot fit before anything is allocated for it."""
    if count * least > remaining:
        raise WireError(f"{what}: a count of {count} does not fit in {remaining} bytes")


def _decode_conditions(data: bytes, offset: int,
                       count: int) -> tuple[list[tuple[bytes, int]], int]:
    conditions: list[tuple[bytes, int]] = []
    for _ in range(count):
        (key_length,) = _U16.unpack_from(data, offset)
        key_end = offset + 2 + key_length
        (expected,) = _U64.unpack_from(data, key_end)
        conditions.append((data[offset + 2:key_end], expected))
        offset = key_end + 8
    return conditions, offset


def _decode_request(data: bytes, offset: int, end: int) -> WriteRequest:
    """The request that fills `data[offset:end]` exactly.

    Offsets only grow, so the last comparison also refuses every length that pointed past `end`;
    reading past `data` itself is a `struct.error`, which `decode_entry` turns into a `WireError`.
    """
    commit_ts, condition_count = _REQUEST_HEAD.unpack_from(data, offset)
    conditions: list[tuple[bytes, int]] = []
    offset += 10
    if condition_count:
        _check_count("condition", condition_count, _MIN_CONDITION_BYTES, end - offset)
        conditions, offset = _decode_conditions(data, offset, condition_count)
    (op_count,) = _U32.unpack_from(data, offset)
    offset += 4
    _check_count("op", op_count, _MIN_OP_BYTES, end - offset)
    ops: list[WriteOp] = []
    unpack_head, unpack_length = _OP_HEAD.unpack_from, _U32.unpack_from
    new = tuple.__new__
    for _ in range(op_count):
        kind, key_length = unpack_head(data, offset)
        key_end = offset + 3 + key_length
        (record_length,) = unpack_length(data, key_end)
        record_end = key_end + 4 + record_length
        if kind > OP_DELETE:
            raise WireError(f"op: unknown kind 0x{kind:02x}")
        ops.append(new(WriteOp, (kind, data[offset + 3:key_end], data[key_end + 4:record_end])))
        offset = record_end
    if offset != end:
        raise WireError("write request: it does not end where its lengths say")
    return new(WriteRequest, (commit_ts, ops, conditions))


def _decode_single(data: bytes) -> Writes:
    return Writes([_decode_request(data, 2, len(data))])


def _decode_batch(data: bytes) -> Writes:
    end = len(data)
    if end < 6:
        raise _short("batch")
    (count,) = _U32.unpack_from(data, 2)
    if count < 2:
        raise WireError(f"batch: a count of {count}; one request is a SINGLE entry")
    offset = 6
    _check_count("batch", count, _U32.size + _MIN_REQUEST_BYTES, end - offset)
    requests: list[WriteRequest] = []
    for _ in range(count):
        if offset + 4 > end:
            raise _short("batch")
        (length,) = _U32.unpack_from(data, offset)
        offset += 4
        if offset + length > end:
            raise _short("batch")
        requests.append(_decode_request(data, offset, offset + length))
        offset += length
    if offset != end:
        raise WireError(f"batch: {end - offset} trailing bytes")
    return Writes(requests)


# --- clock -----------------------------------------------------------------------------------


def _encode_hlc_ceiling(entry: HlcCeiling) -> bytes:
    """`version(1) | ceiling_ts(8)`."""
    return _VERSION_BYTE + _pack(_U64, entry.ceiling_ts)


def _decode_hlc_ceiling(data: bytes) -> HlcCeiling:
    if len(data) != 10:
        raise WireError(f"HLC ceiling: {len(data)} bytes, must be 10")
    return HlcCeiling(_U64.unpack_from(data, 2)[0])


# --- encryption ------------------------------------------------------------------------------

_VERSION_BYTE = bytes((WIRE_VERSION,))


def _pack(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error:
        raise InvalidArgument(f"a field of {values} is out of range for its width") from None


def _check_version(what: str, payload: bytes) -> None:
    if not payload:
        raise _short(what)
    if payload[0] != WIRE_VERSION:
        raise WireError(f"{what}: unknown version 0x{payload[0]:02x}")


def encode_registration_payload(entry: Registration) -> bytes:
    """A REGISTRATION after its opcode.

        version(1) | dek_id(4) | full_node_id(8) | local_epoch(2)

    Raises `InvalidArgument` for a field that does not fit.
    """
    return _pack(_REGISTRATION, WIRE_VERSION, *entry.row)


def decode_registration_payload(payload: bytes) -> Registration:
    """The inverse of `encode_registration_payload`. Raises `WireError`."""
    _check_version("registration", payload)
    if len(payload) != _REGISTRATION.size:
        raise WireError(f"registration: {len(payload)} bytes, must be {_REGISTRATION.size}")
    return Registration(RegistryRow(*_ROW.unpack_from(payload, 1)))


def encode_bootstrap_payload(entry: Bootstrap) -> bytes:
    """A BOOTSTRAP after its opcode.

        version(1)
        storage dek_id(4) | length(4) | wrapped storage DEK
        raft dek_id(4)    | length(4) | wrapped raft DEK
        count(4) | count x ( dek_id(4) | full_node_id(8) | local_epoch(2) )

    Raises `InvalidArgument` for a field that does not fit.
    """
    return b"".join((
        _VERSION_BYTE,
        _pack(_ID_AND_LENGTH, entry.storage_dek_id, len(entry.wrapped_storage)),
        entry.wrapped_storage,
        _pack(_ID_AND_LENGTH, entry.raft_dek_id, len(entry.wrapped_raft)),
        entry.wrapped_raft,
        _pack(_U32, len(entry.rows)),
        *(_pack(_ROW, *row) for row in entry.rows)))


def _read_wrapped(payload: bytes, offset: int, what: str) -> tuple[int, bytes, int]:
    if offset + _ID_AND_LENGTH.size > len(payload):
        raise _short(what)
    dek_id, length = _ID_AND_LENGTH.unpack_from(payload, offset)
    offset += _ID_AND_LENGTH.size
    if offset + length > len(payload):
        raise _short(what)
    return dek_id, payload[offset:offset + length], offset + length


def decode_bootstrap_payload(payload: bytes) -> Bootstrap:
    """The inverse of `encode_bootstrap_payload`. Raises `WireError`."""
    _check_version("bootstrap", payload)
    storage_dek_id, wrapped_storage, offset = _read_wrapped(payload, 1, "bootstrap storage DEK")
    raft_dek_id, wrapped_raft, offset = _read_wrapped(payload, offset, "bootstrap raft DEK")
    if offset + 4 > len(payload):
        raise _short("bootstrap writers")
    (count,) = _U32.unpack_from(payload, offset)
    offset += 4
    if count * _ROW.size != len(payload) - offset:
        raise WireError(f"bootstrap: {count} writers do not fill {len(payload) - offset} bytes")
    rows = tuple(RegistryRow(*fields) for fields in _ROW.iter_unpack(payload[offset:]))
    return Bootstrap(storage_dek_id, wrapped_storage, raft_dek_id, wrapped_raft, rows)


def encode_rotation_payload(entry: Rotation) -> bytes:
    """A ROTATION after its opcode.

        version(1) | sub-tag(1) | dek_id(4) | purpose(1) | length(4) | wrapped DEK
        proposer: dek_id(4) | full_node_id(8) | local_epoch(2)

    The wrapped DEK of a cutover is empty. Raises `InvalidArgument` for a field that does not fit.
    """
    return b"".join((
        _pack(_ROTATION_HEAD, WIRE_VERSION, entry.tag, entry.dek_id, entry.purpose,
              len(entry.wrapped)),
        entry.wrapped,
        _pack(_ROW, *entry.proposer)))


def decode_rotation_payload(payload: bytes) -> Rotation:
    """The inverse of `encode_rotation_payload`. Raises `WireError`, also for an unknown sub-tag."""
    _check_version("rotation", payload)
    if len(payload) < _ROTATION_HEAD.size:
        raise _short("rotation")
    _, tag, dek_id, purpose, length = _ROTATION_HEAD.unpack_from(payload, 0)
    try:
        known_tag = RotationTag(tag)
    except ValueError:
        raise WireError(f"rotation: unknown sub-tag 0x{tag:02x}") from None
    row_offset = _ROTATION_HEAD.size + length
    if len(payload) != row_offset + _ROW.size:
        raise WireError(f"rotation: {len(payload)} bytes, must be {row_offset + _ROW.size}")
    return Rotation(known_tag, dek_id, purpose, payload[_ROTATION_HEAD.size:row_offset],
                    RegistryRow(*_ROW.unpack_from(payload, row_offset)))


def _encode_reservation(entry: Reservation) -> bytes:
    """`version(1) | dek_id(4) | full_node_id(8) | local_epoch(2) | count(8)`."""
    return _pack(_RESERVATION, WIRE_VERSION, entry.dek_id, entry.full_node_id, entry.local_epoch,
                 entry.count)


def _decode_reservation(data: bytes) -> Reservation:
    if len(data) != 1 + _RESERVATION.size:
        raise WireError(f"reservation: {len(data)} bytes, must be {1 + _RESERVATION.size}")
    return Reservation(*_RESERVATION.unpack_from(data, 1)[1:])


# --- the table -------------------------------------------------------------------------------

_DECODERS: dict[int, Callable[[bytes], Entry]] = {
    Opcode.SINGLE: _decode_single,
    Opcode.BATCH: _decode_batch,
    Opcode.HLC_CEILING: _decode_hlc_ceiling,
    Opcode.REGISTRATION: lambda data: decode_registration_payload(data[1:]),
    Opcode.BOOTSTRAP: lambda data: decode_bootstrap_payload(data[1:]),
    Opcode.ROTATION: lambda data: decode_rotation_payload(data[1:]),
    Opcode.RESERVATION: _decode_reservation,
}

_ENCODERS: dict[type[Any], tuple[Opcode, Callable[[Any], bytes]]] = {
    HlcCeiling: (Opcode.HLC_CEILING, _encode_hlc_ceiling),
    Registration: (Opcode.REGISTRATION, encode_registration_payload),
    Bootstrap: (Opcode.BOOTSTRAP, encode_bootstrap_payload),
    Rotation: (Opcode.ROTATION, encode_rotation_payload),
    Reservation: (Opcode.RESERVATION, _encode_reservation),
}


def encode_entry(entry: Entry) -> bytes:
    """The whole entry, opcode included. Raises `InvalidArgument` for a field out of range."""
    if isinstance(entry, Writes):
        return encode_writes(entry.requests)
    opcode, encode = _ENCODERS[type(entry)]
    return bytes((opcode,)) + encode(entry)


def decode_entry(data: bytes) -> Entry:
    """The entry in `data`, whole. Raises `WireError` for bytes `encode_entry` would not write."""
    if not data:
        raise WireError("an empty entry has no opcode")
    if len(data) > MAX_ENTRY_BYTES:
        raise WireError(f"an entry of {len(data)} bytes exceeds the limit of {MAX_ENTRY_BYTES}")
    decode = _DECODERS.get(data[0])
    if decode is None:
        raise WireError(f"unknown opcode 0x{data[0]:02x}")
    if len(data) < 2:
        raise _short("entry")
    if data[1] != WIRE_VERSION:
        raise WireError(f"opcode 0x{data[0]:02x}: unknown version 0x{data[1]:02x}")
    try:
        return decode(data)
    except struct.error:
        raise _short("entry") from None
