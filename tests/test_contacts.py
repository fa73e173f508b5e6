"""A damaged contact book is as good as none."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from elastickv.contacts import FILE_NAME, Contact, ContactBook, load, store
from elastickv.durable import OsDisk
from elastickv.errors import DiskFull
from elastickv.raft.engine import Member

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


class FailingDisk(OsDisk):
    """Refuses to replace a file while `error` is set."""

    error: Exception | None = None

    def replace(self, path: Path, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        super().replace(path, data)


@pytest.mark.parametrize("error", [DiskFull("no space left"), OSError(errno.EIO, "I/O error")],
                         ids=lambda error: type(error).__name__)
async def test_a_disk_that_refuses_is_tried_again_and_ends_nothing(tmp_path: Path,
                                                                   error: Exception) -> None:
    disk = FailingDisk()
    disk.error = error
    book = ContactBook(disk, tmp_path, lambda: [Member("n2", "127.0.0.1:2",
                                                       client_address="127.0.0.1:1")])
    book.note()
    book.start()
    book.stop()
    assert load(disk, tmp_path) == []
    disk.error = None
    book.note()
    assert load(disk, tmp_path) == [Contact("n2", "127.0.0.1:1")]
