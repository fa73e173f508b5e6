"""The writer registry: which node writes under which DEK, and with which nonce epochs.

Rows live in the replicated store, outside MVCC:

    key:   "!encryption|writers|" | dek_id(4, BE) | "|" | node_id16(2, BE)
    value: full_node_id(8, BE) | first_seen_epoch(2, BE) | last_seen_epoch(2, BE)

The key holds the 16-bit id because that is what a nonce holds: two nodes that share it would repeat
each other's nonces, and the value's full id shows it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from elastickv.crypto.nonce import node_id16
from elastickv.errors import EntryRejected, EpochRollback, NodeIdCollision, StoreCorrupt
from elastickv.wire import RegistryRow

WRITERS_PREFIX: Final = b"!encryption|writers|"

ReadRow = Callable[[bytes], bytes | None]
"""Reads a row of the store."""

_KEY_TAIL = struct.Struct(">IcH")
_VALUE = struct.Struct(">QHH")
_SEPARATOR = b"|"


class WriterRecord(NamedTuple):
    """A row's value."""

    full_node_id: int
    first_seen_epoch: int
    last_seen_epoch: int


def row_key(dek_id: int, node_id: int) -> bytes:
    """The store key of a writer; `node_id` is the 16-bit id."""
    return WRITERS_PREFIX + _KEY_TAIL.pack(dek_id, _SEPARATOR, node_id)


def writers_prefix(dek_id: int) -> bytes:
    """What the keys of all rows of one DEK begin with."""
    return WRITERS_PREFIX + dek_id.to_bytes(4, "big")


def decode_row_key(key: bytes) -> tuple[int, int]:
    """`(dek_id, node_id16)`. Raises `StoreCorrupt` for any other key."""
    if len(key) != len(WRITERS_PREFIX) + _KEY_TAIL.size or not key.startswith(WRITERS_PREFIX):
        raise StoreCorrupt("a writer registry key does not parse")
    dek_id, separator, node_id = _KEY_TAIL.unpack_from(key, len(WRITERS_PREFIX))
    if separator != _SEPARATOR:
        raise StoreCorrupt("a writer registry key does not parse")
    return dek_id, node_id


def encode_row_value(record: WriterRecord) -> bytes:
    """The 12 bytes of a row."""
    return _VALUE.pack(*record)


def decode_row_value(value: bytes) -> WriterRecord:
    """The inverse of `encode_row_value`. Raises `StoreCorrupt`."""
    if len(value) != _VALUE.size:
        raise StoreCorrupt(f"a writer registry row of {len(value)} bytes, must be {_VALUE.size}")
    return WriterRecord(*_VALUE.unpack(value))


def find_writer(read_row: ReadRow, dek_id: int, full_node_id: int) -> WriterRecord | None:
    """The row that stands where a node's does: its own, or that of another node with the same
    16-bit id."""
    value = read_row(row_key(dek_id, node_id16(full_node_id)))
    return decode_row_value(value) if value is not None else None


def own_epochs(rows: Iterable[tuple[bytes, bytes]], full_node_id: int) -> dict[int, int]:
    """`{dek_id: last seen epoch}` of one node in store rows; rows of others are ignored."""
    epochs: dict[int, int] = {}
    for key, value in rows:
        if not key.startswith(WRITERS_PREFIX):
            continue
        dek_id, short = decode_row_key(key)
        if short == node_id16(full_node_id):
            record = decode_row_value(value)
            if record.full_node_id == full_node_id:
                epochs[dek_id] = record.last_seen_epoch
    return epochs


def decide(existing: bytes | None, row: RegistryRow) -> WriterRecord | None:
    """What a registration writes over the row that stands at its key: a record for a new writer
    (case 1) or a higher epoch (case 2); None for the same epoch, as after a replay (case 2i).

    Raises `EpochRollback` (case 3: same node, lower epoch), `NodeIdCollision` (case 4: another
    node), `EntryRejected` for DEK id 0, or `StoreCorrupt` when the row does not parse.
    """
    if row.dek_id == 0:
        raise EntryRejected("a writer registration for DEK id 0, which is never a key")
    if existing is None:
        return WriterRecord(row.full_node_id, row.local_epoch, row.local_epoch)
    record = decode_row_value(existing)
    if record.full_node_id != row.full_node_id:
        raise NodeIdCollision(
            f"nodes {record.full_node_id:#x} and {row.full_node_id:#x} share the 16-bit id"
            f" {node_id16(row.full_node_id):#06x} under DEK {row.dek_id}",
            remedy="give one of them another --raftId")
    if row.local_epoch < record.last_seen_epoch:
        raise EpochRollback(
            f"node {row.full_node_id:#x} announced epoch {row.local_epoch} under DEK"
            f" {row.dek_id}; the registry has seen {record.last_seen_epoch}",
            remedy="restart that node, which takes a higher epoch")
    if row.local_epoch == record.last_seen_epoch:
        return None
    return record._replace(last_seen_epoch=row.local_epoch)
