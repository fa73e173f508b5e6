"""The checksum that LMDB pages lack: every stored value ends with the CRC32C of its place and
content.

    value (n) | CRC32C( table name | key | value ) (4, little-endian)

The table name and the key are covered, so a value that turns up under another key does not pass. A
CRC32C over data that ends with its own little-endian CRC32C is a constant, so checking is one pass
over the stored bytes without cutting them first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import google_crc32c

from elastickv.errors import JOIN_ANEW_REMEDY, StoreCorrupt
from elastickv.store.tables import Found, Item, Table

CRC_BYTES = 4

_RESIDUE = 0x48674BC7
_SEEDS = {table: google_crc32c.value(table.value.encode()) for table in Table}
_extend = google_crc32c.extend


@dataclass(slots=True)
class Totals:
    """Entry count and sum of checksums of one table: what a full walk of it must add up to.

    A lost, doubled or stale entry has a checksum of its own that fits, but changes these.
    """

    count: int = 0
    checksum_sum: int = 0

    def copy(self) -> Totals:
        return Totals(self.count, self.checksum_sum)

    def add(self, stored: bytes) -> None:
        """Count a stored value in."""
        self.count += 1
        self.checksum_sum += int.from_bytes(stored[-CRC_BYTES:], "little")

    def remove(self, stored: bytes) -> None:
        """Count a stored value out."""
        self.count -= 1
        self.checksum_sum -= int.from_bytes(stored[-CRC_BYTES:], "little")

    def encode(self) -> bytes:
        """`count (8, BE) | sum (16, BE)`."""
        return self.count.to_bytes(8, "big") + self.checksum_sum.to_bytes(16, "big")

    @classmethod
    def decode(cls, data: bytes) -> Totals:
        if len(data) != 24:
            raise StoreCorrupt("a table's totals have the wrong length")
        return cls(int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big"))


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of `data`."""
    return int(google_crc32c.value(data))


def protect(table: Table, key: bytes, value: bytes) -> bytes:
    """The stored form of `value` under `key`."""
    checksum: int = _extend(_extend(_SEEDS[table], key), value)
    return value + checksum.to_bytes(CRC_BYTES, "little")


def protect_all(table: Table, items: Iterable[Item], totals: Totals) -> Iterator[Item]:
    """`protect` for many new entries, counted into `totals`."""
    seed = _SEEDS[table]
    extend = _extend
    for key, value in items:
        checksum = extend(extend(seed, key), value)
        totals.count += 1
        totals.checksum_sum += checksum
        yield key, value + checksum.to_bytes(CRC_BYTES, "little")


def checksum_fits(table: Table, key: bytes, stored: bytes) -> bool:
    """Whether `stored` is the stored form of some value under `key`."""
    residue: int = _extend(_extend(_SEEDS[table], key), stored)
    return residue == _RESIDUE and len(stored) >= CRC_BYTES


def reveal(table: Table, key: bytes, stored: bytes) -> bytes:
    """The value in its stored form. Raises `StoreCorrupt` when the checksum does not fit."""
    if _extend(_extend(_SEEDS[table], key), stored) != _RESIDUE or len(stored) < CRC_BYTES:
        raise StoreCorrupt(f"an entry of table {table} fails its checksum",
                           remedy=JOIN_ANEW_REMEDY)
    return stored[:-CRC_BYTES]


def reveal_all(table: Table, entries: Iterable[Item]) -> Iterator[Item]:
    """`reveal` for many entries."""
    seed = _SEEDS[table]
    extend = _extend
    for key, stored in entries:
        if extend(extend(seed, key), stored) != _RESIDUE:
            reveal(table, key, stored)
        yield key, stored[:-CRC_BYTES]


def reveal_found(table: Table, entries: Iterable[Found]) -> Iterator[Found]:
    """`reveal` for each that was found."""
    seed = _SEEDS[table]
    extend = _extend
    for key, stored in entries:
        if stored is None:
            yield key, None
            continue
        if extend(extend(seed, key), stored) != _RESIDUE:
            reveal(table, key, stored)
        yield key, stored[:-CRC_BYTES]
