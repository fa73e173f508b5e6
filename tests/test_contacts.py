"""A damaged contact book is as good as none."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastickv.contacts import FILE_NAME, Contact, load, store
from elastickv.durable import OsDisk

CONTACTS = [Contact("n1", "127.0.0.1:1"), Contact("n2", "")]


def test_round_trip(tmp_path: Path) -> None:
    store(OsDisk(), tmp_path, CONTACTS)
    assert load(OsDisk(), tmp_path) == CONTACTS


def test_no_file_is_no_contacts(tmp_path: Path) -> None:
    assert load(OsDisk(), tmp_path) == []


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_is_survived(tmp_path: Path, bit: int) -> None:
    store(OsDisk(), tmp_path, CONTACTS)
    path = tmp_path / FILE_NAME
    original = path.read_bytes()
    for offset in range(len(original)):
        damaged = bytearray(original)
        damaged[offset] ^= 1 << bit
        path.write_bytes(damaged)
        assert len(load(OsDisk(), tmp_path)) in (0, 2)
