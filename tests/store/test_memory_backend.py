"""The memory backend's image: damage, and power cuts at every step of a write."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.durable import OsDisk
from elastickv.errors import StoreCorrupt
from elastickv.store.memory_backend import MemoryBackend, SortedTable, decode_image, encode_image
from elastickv.store.mvcc_store import Store
from elastickv.store.tables import Table
from elastickv.store.values import plain_record
from tests.store.conftest import LATEST


class PowerCut(Exception):
    """The power went while a step was under way."""


class CuttingDisk(OsDisk):
    """Loses power at the `cut_at`-th step of whole-file writes: before the rename the old file
    stays, after it the new one is there."""

    def __init__(self) -> None:
        self.cut_at = 0
        self.step = 0

    def _step(self) -> None:
        self.step += 1
        if self.step == self.cut_at:
            raise PowerCut

    def replace(self, path: Path, data: bytes) -> None:
        self._step()
        super().replace(path, data)
        self._step()


@given(st.dictionaries(st.sampled_from(Table), st.dictionaries(st.binary(max_size=5),
                                                                st.binary(max_size=9))))
def test_image_round_trip(content: dict[Table, dict[bytes, bytes]]) -> None:
    tables = {table: SortedTable(content.get(table, {})) for table in Table}
    decoded = decode_image(encode_image(tables))
    assert {t: decoded[t].values for t in Table} == {t: tables[t].values for t in Table}
    assert all(decoded[table].keys == sorted(tables[table].values) for table in Table)


@given(st.data())
def test_a_damaged_image_is_refused(data: st.DataObject) -> None:
    tables = {table: SortedTable({b"key": b"value"}) for table in Table}
    image = bytearray(encode_image(tables))
    bit = data.draw(st.integers(0, 8 * len(image) - 1))
    image[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StoreCorrupt):
        decode_image(bytes(image))


@given(st.data())
def test_a_cut_image_is_refused(data: st.DataObject) -> None:
    image = encode_image({table: SortedTable({b"key": b"value"}) for table in Table})
    with pytest.raises(StoreCorrupt):
        decode_image(image[:data.draw(st.integers(0, len(image) - 1))])


@pytest.mark.parametrize("cut_at", range(1, 9))
def test_a_power_cut_at_each_step_of_each_flush(tmp_path: Path, cut_at: int) -> None:
    """Whatever is on the disk afterwards plus the log from its index on is the whole state."""
    disk = CuttingDisk()
    store = Store.open(MemoryBackend(disk, tmp_path))
    log = [(index, [(b"k%d" % (index % 3), index, plain_record(b"%d" % index))])
           for index in range(1, 9)]
    disk.cut_at = cut_at
    with contextlib.suppress(PowerCut):
        for index, writes in log:
            store.apply_group(index, writes)
            if index % 2 == 0:
                store.flush_now()
    promised = store.durable_index
    assert promised < 8
    store = Store.open(MemoryBackend(OsDisk(), tmp_path))
    assert store.applied_index >= promised
    for index, writes in log[store.applied_index:]:
        store.apply_group(index, writes)
    assert [(key, version.record) for key, version in store.scan(b"", b"", 9, LATEST, 0)] == [
        (b"k0", plain_record(b"6")), (b"k1", plain_record(b"7")), (b"k2", plain_record(b"8"))]
