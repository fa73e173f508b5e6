"""Checksums of stored values, and totals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import StoreCorrupt
from elastickv.store.records import (
    CRC_BYTES,
    Totals,
    checksum_fits,
    crc32c,
    protect,
    protect_all,
    reveal,
    reveal_all,
)
from elastickv.store.tables import Table


def test_crc32c_is_the_castagnoli_polynomial() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's CRC-32C


@given(st.sampled_from(Table), st.binary(max_size=40), st.binary(max_size=200))
def test_round_trip(table: Table, key: bytes, value: bytes) -> None:
    stored = protect(table, key, value)
    assert len(stored) == len(value) + CRC_BYTES
    assert reveal(table, key, stored) == value
    assert list(reveal_all(table, [(key, stored)])) == [(key, value)]


@given(st.binary(min_size=1, max_size=40), st.binary(max_size=200), st.data())
def test_every_flipped_bit_is_found(key: bytes, value: bytes, data: st.DataObject) -> None:
    stored = bytearray(protect(Table.MVCC, key, value))
    bit = data.draw(st.integers(0, 8 * len(stored) - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StoreCorrupt, match="checksum"):
        reveal(Table.MVCC, key, bytes(stored))
    with pytest.raises(StoreCorrupt, match="checksum"):
        list(reveal_all(Table.MVCC, [(key, bytes(stored))]))


def test_a_value_belongs_to_its_key_and_table() -> None:
    stored = protect(Table.ROWS, b"key", b"value")
    assert checksum_fits(Table.ROWS, b"key", stored)
    assert not checksum_fits(Table.ROWS, b"kez", stored)
    assert not checksum_fits(Table.META, b"key", stored)


@pytest.mark.parametrize("stored", [b"", b"\x00", b"abc"])
def test_values_shorter_than_a_checksum(stored: bytes) -> None:
    with pytest.raises(StoreCorrupt):
        reveal(Table.META, b"key", stored)


def test_totals_follow_additions_and_removals() -> None:
    items = [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]
    totals = Totals()
    stored = dict(protect_all(Table.MVCC, items, totals))
    assert totals.count == 3
    totals.remove(stored[b"b"])
    expected = Totals()
    expected.add(protect(Table.MVCC, b"c", b"3"))
    expected.add(protect(Table.MVCC, b"a", b"1"))
    assert totals == expected
    assert Totals.decode(totals.encode()) == totals


def test_totals_of_equal_size_differ_by_content() -> None:
    one, other = Totals(), Totals()
    one.add(protect(Table.ROWS, b"k", b"old"))
    other.add(protect(Table.ROWS, b"k", b"new"))
    assert one != other


def test_totals_do_not_parse_from_another_length() -> None:
    with pytest.raises(StoreCorrupt):
        Totals.decode(bytes(23))
