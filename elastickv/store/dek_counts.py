"""How many stored values each DEK holds: what keeps an old DEK from being retired. Pure.

A fact of each node's own store, kept in the meta table and changed in the very batch that adds or
removes the values:

    value: ( dek_id(4, BE) | count(8, BE) ) *, ascending ids, no count of 0

Every version that is kept counts. Values in the clear count under `PLAINTEXT`; tombstones are no
values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final

from elastickv.errors import StoreCorrupt
from elastickv.store.header import ENVELOPE_BITS, ENVELOPE_KEY_ID, TOMBSTONE_BIT

PLAINTEXT: Final = 0
"""Not a key: the id that stands for no key."""

DekCounts = Mapping[int, int]
"""`{dek_id: values}`."""

_ENTRY = struct.Struct(">IQ")


def dek_id_of(record: bytes) -> int | None:
    """The DEK that a record is sealed under, `PLAINTEXT`, or None for a tombstone."""
    flags = record[0]
    if flags & TOMBSTONE_BIT:
        return None
    return int.from_bytes(record[ENVELOPE_KEY_ID], "big") if flags & ENVELOPE_BITS else PLAINTEXT


def count_in(counts: dict[int, int], records: Iterable[bytes]) -> None:
    """Count records that are stored. As `dek_id_of` for each, with less to do for each."""
    plain = 0
    sealed: dict[bytes, int] = {}
    for record in records:
        flags = record[0]
        if flags == ENVELOPE_BITS:
            key_id = record[ENVELOPE_KEY_ID]
            sealed[key_id] = sealed.get(key_id, 0) + 1
        elif not flags & TOMBSTONE_BIT:
            plain += 1
    found = {int.from_bytes(key_id, "big"): count for key_id, count in sealed.items()}
    if plain:
        found[PLAINTEXT] = plain
    for dek_id, count in found.items():
        counts[dek_id] = counts.get(dek_id, 0) + count


def without(counts: DekCounts, removed: Iterable[int | None]) -> dict[int, int]:
    """The counts after values of these DEKs were removed."""
    left = dict(counts)
    for dek_id in removed:
        if dek_id is not None:
            left[dek_id] = left.get(dek_id, 0) - 1
    return {dek_id: count for dek_id, count in left.items() if count > 0}


def encode_counts(counts: DekCounts) -> bytes:
    """The fact's bytes."""
    return b"".join(_ENTRY.pack(*item) for item in sorted(counts.items()))


def decode_counts(data: bytes) -> dict[int, int]:
    """Inverse of `encode_counts`. Raises `StoreCorrupt`."""
    if len(data) % _ENTRY.size:
        raise StoreCorrupt("the store's counts of values have the wrong length")
    return dict(_ENTRY.iter_unpack(data))
