"""How many nonces a DEK has spent: upper bounds that every replica holds. Pure.

Before a leader seals anything it *reserves* nonces with a log entry, and only when that entry is
applied may it count up to what it reserved. Whatever it then seals is covered, also what is never
committed, what is lost in a crash, and what only some other node's journal has seen. So the sum of
all reservations is never below the number of nonces ever made; it is above by at most one
reservation for each epoch in which a node led.

Rows live in the store beside the writer registry:

    key:   "!encryption|usage|" | dek_id(4, BE) | "|" | node_id16(2, BE)
    value: ended(8, BE) | local_epoch(2, BE) | reserved(8, BE)

`reserved` is the highest write_count that epoch `local_epoch` of the node may use; `ended` is the
sum over its earlier epochs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, NamedTuple

from elastickv.crypto.nonce import node_id16
from elastickv.errors import StoreCorrupt
from elastickv.wire import Reservation

USAGE_PREFIX: Final = b"!encryption|usage|"
MAX_COUNT: Final = 0xFFFF_FFFF_FFFF_FFFF
ROTATE_AT_PERCENT: Final = 90
MAX_BLOCK: Final = 65_536
BLOCKS_PER_LIMIT: Final = 256

# A writer looks at its own row several times for every entry, and the row changes rarely.
_REMEMBERED_ROWS = 64

_KEY_TAIL = struct.Struct(">IcH")
_VALUE = struct.Struct(">QHQ")


class Usage(NamedTuple):
    """A row's value."""

    ended: int
    local_epoch: int
    reserved: int

    @property
    def total(self) -> int:
        """Every nonce that this node can have made under the DEK."""
        return self.ended + self.reserved


@lru_cache(_REMEMBERED_ROWS)
def usage_key(dek_id: int, node_id: int) -> bytes:
    """The store key of a row; `node_id` is the 16-bit id."""
    return USAGE_PREFIX + _KEY_TAIL.pack(dek_id, b"|", node_id)


def usage_key_of(entry: Reservation) -> bytes:
    """The store key of the row that a reservation changes."""
    return usage_key(entry.dek_id, node_id16(entry.full_node_id))


def usage_prefix(dek_id: int) -> bytes:
    """What the keys of a DEK's rows begin with."""
    return USAGE_PREFIX + dek_id.to_bytes(4, "big") + b"|"


def encode_usage(usage: Usage) -> bytes:
    """The 18 bytes of a row."""
    return _VALUE.pack(*usage)


@lru_cache(_REMEMBERED_ROWS)
def decode_usage(value: bytes) -> Usage:
    """The inverse of `encode_usage`. Raises `StoreCorrupt`."""
    if len(value) != _VALUE.size:
        raise StoreCorrupt(f"a nonce usage row of {len(value)} bytes, must be {_VALUE.size}")
    return Usage(*_VALUE.unpack(value))


def apply_reservation(existing: bytes | None, entry: Reservation) -> tuple[bytes, bytes]:
    """The row `(key, value)` after a committed reservation.

    Never lowers a total, whatever order entries come in: a reservation of an epoch that has ended
    is added to what has ended. Sums stop at 2^64 - 1.
    """
    key = usage_key_of(entry)
    asked = Usage(0, entry.local_epoch, entry.count)
    if existing is None:
        return key, encode_usage(asked)
    usage = decode_usage(existing)
    if entry.local_epoch == usage.local_epoch:
        merged = usage._replace(reserved=max(usage.reserved, entry.count))
    elif entry.local_epoch > usage.local_epoch:
        merged = asked._replace(ended=min(usage.total, MAX_COUNT))
    else:
        merged = usage._replace(ended=min(usage.ended + entry.count, MAX_COUNT))
    return key, encode_usage(merged)


def total_usage(rows: Iterable[tuple[bytes, bytes]]) -> int:
    """The sum over a DEK's rows."""
    return sum(decode_usage(value).total for _, value in rows)


def totals_by_dek(rows: Iterable[tuple[bytes, bytes]]) -> dict[int, int]:
    """The sum over the rows of each DEK that has any."""
    totals: dict[int, int] = {}
    for key, value in rows:
        dek_id, _, _ = _KEY_TAIL.unpack_from(key, len(USAGE_PREFIX))
        totals[dek_id] = totals.get(dek_id, 0) + decode_usage(value).total
    return totals


class Limits(NamedTuple):
    """What follows from `--dek-max-writes`.

    `max_writes` is the most nonces that user writes may take under a DEK.
    """

    max_writes: int

    @property
    def block(self) -> int:
        """How many nonces a leader reserves at once when it needs no more than that."""
        return min(MAX_BLOCK, max(1, self.max_writes // BLOCKS_PER_LIMIT))

    def rotation_due(self, total: int) -> bool:
        """Whether a new DEK should be made."""
        return total * 100 >= self.max_writes * ROTATE_AT_PERCENT

    def left(self, total: int) -> int:
        """Writes left under a DEK."""
        return max(0, self.max_writes - total)


def reservation_target(limits: Limits, *, used: int, reserved: int, total: int, wanted: int,
                       beyond_limit: bool) -> int | None:
    """The count to reserve up to so that `wanted` more nonces are there, None when the limit does
    not allow them.

    `used` and `reserved` are of the present epoch, `total` is the DEK's. The last block before the
    limit is shortened to fit. Two things go beyond the limit, by no more than they need: entries of
    the cluster's own, above all the rotation that ends the shortage, and the first use of a DEK,
    because one group of writes may be larger than the limit and rotating again would not make it
    fit.
    """
    elsewhere = total - reserved
    least = used + wanted
    most = limits.max_writes - elsewhere
    if least <= most:
        return min(most, max(least, reserved + limits.block))
    return least if beyond_limit or (used == 0 and elsewhere == 0) else None
