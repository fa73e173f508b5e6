"""Segments written over dropped ones: which files are used again, and what is left in them."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from test_journal import (
    FIRST,
    SMALL_SEGMENT,
    Stepwise,
    compact,
    contents,
    filled,
    open_journal,
    segments,
)

from elastickv.durable import PAGE_BYTES, OsDisk
from elastickv.errors import DiskFull, JournalCorrupt
from elastickv.raft import records
from elastickv.raft.journal import MOST_SPARES, Journal
from elastickv.raft.segment import HEADER_SIZE, MAGIC, Segment, SegmentHeader, segment_name


class NoSalt:
    """A generator that draws zeros: the checksums are those of a record on the wire."""

    def getrandbits(self, bits: int) -> int:
        return 0


def spares(path: Path) -> list[Path]:
    return sorted(path.glob("*.spare"))


def full() -> Segment:
    raise DiskFull("no space")


def extend_to(journal: Journal, index: int) -> None:
    while journal.last_index < index:
        journal.append(journal.last_index + 1, 1, b"\x00later %d" % (journal.last_index + 1))
    journal.sync()


def test_later_segments_are_written_over_dropped_ones(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    compact(journal, 40)
    inodes = [spare.stat().st_ino for spare in spares(tmp_path)]
    assert len(inodes) == MOST_SPARES
    names = segments(tmp_path)
    extend_to(journal, 100)
    assert not spares(tmp_path)
    new = [path for path in segments(tmp_path) if path not in names]
    assert [path.stat().st_ino for path in new[:MOST_SPARES]] == inodes
    kept = contents(journal)
    journal.close()
    for path in new[:-1]:
        assert SMALL_SEGMENT <= path.stat().st_size < 2 * SMALL_SEGMENT
    assert contents(open_journal(tmp_path)) == kept
    for path in tmp_path.glob("*.index"):
        path.unlink()
    assert contents(open_journal(tmp_path)) == kept


def reused(path: Path, command: bytes, **options: object) -> tuple[Journal, Path]:
    """A log whose last segment is empty, in the file of one that held `command` once."""
    journal = open_journal(path, segment_bytes=HEADER_SIZE + 1, **options)
    journal.append(FIRST, 1, command)
    while len(segments(path)) < 3:
        journal.append(journal.last_index + 1, 1, b"\x00x")
    journal.sync()
    compact(journal, journal.last_index)
    assert spares(path)[0].stat().st_size > HEADER_SIZE + len(command)
    journal._roll()
    journal._segment_bytes = 1 << 20  # what follows stays in this one
    return journal, segments(path)[-1]


@pytest.mark.parametrize("length", [1, 2, 50, 200])
def test_what_is_left_of_the_older_segment_is_no_part_of_the_log(tmp_path, length):
    journal, newest = reused(tmp_path, b"\x00" + bytes(range(256)) * 4)
    journal.append(journal.last_index + 1, 1, b"\x00" + b"n" * length)
    journal.sync()
    kept = contents(journal)
    crashed = newest.read_bytes()
    assert len(crashed) > 1000
    journal.close()
    newest.write_bytes(crashed)
    assert contents(open_journal(tmp_path)) == kept
    assert newest.stat().st_size == HEADER_SIZE + records.HEADER_BYTES + 1 + length


@pytest.mark.parametrize(("options", "last_index"), [({}, 5), ({"generator": NoSalt()}, 6)],
                         ids=["with salt", "without"])
def test_bytes_that_a_client_chose_are_never_taken_for_a_record(tmp_path, options, last_index):
    """The end of the new segment falls on the start of a record that an older entry brought, and on
    the end of a page, of which nothing old is left. Only the salt, which the client does not know,
    keeps it from being the next entry."""
    forged = records.encode(6, 1, b"\x00forged", 5)
    command = b"\x00" + b"n" * (PAGE_BYTES - HEADER_SIZE - records.HEADER_BYTES - 1)
    journal, newest = reused(tmp_path, command + forged, **options)
    journal.append(5, 1, command)
    journal.sync()
    crashed = newest.read_bytes()
    assert crashed[PAGE_BYTES:].startswith(forged)
    journal.close()
    newest.write_bytes(crashed)
    assert open_journal(tmp_path).last_index == last_index


def test_damage_before_a_durable_record_is_found_in_a_reused_segment(tmp_path):
    journal, newest = reused(tmp_path, b"\x00" + bytes(1000))
    for _ in range(3):
        journal.append(journal.last_index + 1, 1, b"\x00new")
        journal.sync()
    crashed = bytearray(newest.read_bytes())
    journal.close()
    crashed[HEADER_SIZE + records.HEADER_BYTES + 2] ^= 1
    newest.write_bytes(crashed)
    with pytest.raises(JournalCorrupt, match="is damaged"):
        open_journal(tmp_path)


def test_what_was_in_the_log_when_reuse_was_forbidden_goes_with_its_files(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    compact(journal, 20)
    assert spares(tmp_path)
    journal.shed_clear_entries(0)
    assert not spares(tmp_path)
    last = journal.last_index
    extend_to(journal, 100)
    compact(journal, last)
    assert not spares(tmp_path)
    compact(journal, 100)
    assert len(spares(tmp_path)) == MOST_SPARES
    assert all(int(path.stem) > last for path in spares(tmp_path))


def test_a_segment_begins_behind_the_entries_in_the_clear(tmp_path):
    journal = filled(tmp_path, 10)
    last = journal.last_index
    assert journal.clear_index == journal.anchor_index
    journal.shed_clear_entries(last - 3)
    assert journal.clear_index == last
    extend_to(journal, last + 5)
    assert [int(path.stem) for path in segments(tmp_path)] == [FIRST, last + 1]
    assert journal.clear_index == last
    journal.close()
    again = open_journal(tmp_path)
    again.shed_clear_entries(last - 3)
    extend_to(again, last + 10)
    assert len(segments(tmp_path)) == 2
    assert again.clear_index == last
    compact(again, again.clear_index)
    assert again.anchor_index == again.clear_index == last


def test_entries_to_come_may_be_in_the_clear(tmp_path):
    journal = filled(tmp_path, 10, segment_bytes=SMALL_SEGMENT)
    journal.shed_clear_entries(70)
    extend_to(journal, 100)
    assert 71 in [int(path.stem) for path in segments(tmp_path)]
    assert journal.clear_index == 70


def test_a_full_disk_leaves_the_beginning_of_a_segment_to_the_next_entry(tmp_path, monkeypatch):
    journal = filled(tmp_path, 10)
    last = journal.last_index
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_roll", full)
        journal.shed_clear_entries(last)
        with pytest.raises(DiskFull):
            journal.append(last + 1, 1, b"\x00later")
    assert (journal.last_index, journal.clear_index) == (last, journal.anchor_index)
    extend_to(journal, last + 1)
    assert journal.clear_index == last


def test_nothing_behind_a_snapshot_is_in_the_clear(tmp_path):
    journal = filled(tmp_path, 10)
    journal.shed_clear_entries(journal.last_index)
    journal.reset(1000, 4)
    assert journal.clear_index == journal.anchor_index == 1000


def assert_reuse_behind(journal: Journal, path: Path, index: int) -> None:
    """As the log goes on, segments become spares that begin behind `index`, and no others."""
    extend_to(journal, index + 80)
    compact(journal, index)
    assert not spares(path)
    compact(journal, index + 80)
    assert spares(path)
    assert all(int(spare.stem) > index for spare in spares(path))


def test_reuse_can_be_forbidden_for_entries_to_come(tmp_path):
    journal = filled(tmp_path, 10, segment_bytes=SMALL_SEGMENT)
    journal.shed_clear_entries(70)
    assert_reuse_behind(journal, tmp_path, 70)


def test_a_file_that_is_becoming_a_spare_when_reuse_is_forbidden_is_deleted(tmp_path):
    cleanup = Stepwise()
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT, cleanup=cleanup)
    journal.compact_to(40)
    (work, done), = cleanup.jobs
    cleanup.jobs.clear()
    work()
    assert spares(tmp_path)
    journal.shed_clear_entries(0)
    done(None)
    while cleanup.jobs:
        cleanup.step()
    assert not spares(tmp_path)
    extend_to(journal, 100)
    assert contents(open_journal(tmp_path))[-1][1] == 100


def test_a_start_keeps_no_spare_and_makes_none_of_what_it_finds(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    compact(journal, 30)
    journal.close()
    assert spares(tmp_path)
    again = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    assert not spares(tmp_path)
    compact(again, 51)
    assert not spares(tmp_path)


def test_a_reset_deletes_the_spares(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    compact(journal, 30)
    journal.reset(1000, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [segment_name(1001)]


def test_a_reset_allows_nothing_that_was_forbidden(tmp_path):
    journal = filled(tmp_path, 10, segment_bytes=SMALL_SEGMENT)
    journal.shed_clear_entries(140)
    journal.reset(100, 1)
    assert_reuse_behind(journal, tmp_path, 140)


def test_a_spare_that_was_deleted_to_make_room_is_not_missed(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    compact(journal, 40)
    for path in spares(tmp_path):
        path.unlink()
    extend_to(journal, 100)
    assert contents(open_journal(tmp_path))[-1][1] == 100


def test_a_disk_without_room_refuses_the_entry_and_the_spare_stays(tmp_path, monkeypatch):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    compact(journal, 40)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(DiskFull):
            extend_to(journal, 100)
    last = journal.last_index
    assert last < 100
    assert len(spares(tmp_path)) == MOST_SPARES
    extend_to(journal, 100)
    found = contents(open_journal(tmp_path))
    assert [index for _, index, _ in found] == list(range(journal.anchor_index + 1, 101))


def test_segments_of_version_1_are_read_and_continued(tmp_path):
    body = struct.pack(">4sIQQ", MAGIC, 1, 2, 0)
    path = tmp_path / segment_name(2)
    path.write_bytes(body + struct.pack(">I", records.crc32c(body))
                     + b"".join(records.encode(index, 1, b"\x00old", 0) for index in (2, 3)))
    journal = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    assert contents(journal) == [(b"\x00old", 2, 1), (b"\x00old", 3, 1)]
    extend_to(journal, 40)
    kept = contents(journal)
    journal.close()
    assert contents(open_journal(tmp_path)) == kept


def test_the_header_by_its_bytes():
    encoded = SegmentHeader(0x0102, 3, 0xA1B2C3D4).encode()
    assert encoded[:28].hex() == "454b4a4c" "00000002" "0000000000000102" "0000000000000003" \
        "a1b2c3d4"
    assert encoded[28:] == struct.pack(">I", records.crc32c(encoded[:28]))
    assert SegmentHeader.decode(encoded + b"more") == (0x0102, 3, 0xA1B2C3D4, 32)
    for cut in range(len(encoded)):
        assert SegmentHeader.decode(encoded[:cut]) is None
    for position in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[position] ^= 1
        assert SegmentHeader.decode(bytes(damaged)) is None


@pytest.mark.parametrize("head", [b"", b"head", b"h" * 30])
def test_a_reused_file_has_the_old_bytes_behind_its_end(tmp_path, head):
    disk = OsDisk()
    source, target = tmp_path / "old", tmp_path / "new"
    source.write_bytes(b"o" * 30)
    file = disk.reuse(source, target, head)
    assert file.size() == len(head)
    assert not source.exists()
    assert target.read_bytes() == head + b"o" * (30 - len(head))
    file.append(b"more")
    assert target.read_bytes()[:len(head) + 4] == head + b"more"
    file.close()
    assert target.read_bytes() == head + b"more"


def test_pages_are_written_whole_where_there_is_room(tmp_path):
    source, target = tmp_path / "old", tmp_path / "new"
    source.write_bytes(b"o" * (3 * PAGE_BYTES + 10))
    file = OsDisk().reuse(source, target, b"head")

    def room() -> bytes:
        return target.read_bytes()[file.size():]

    for length in (5, 100, PAGE_BYTES, 7):
        file.append(b"n" * length)
        in_page = -file.size() % PAGE_BYTES
        assert room() == bytes(in_page) + b"o" * (len(room()) - in_page)
    file.append(b"n" * (2 * PAGE_BYTES))  # there is no room for a whole page any more
    assert target.stat().st_size == file.size()
    assert target.read_bytes() == b"head" + b"n" * (3 * PAGE_BYTES + 112)
    file.truncate(PAGE_BYTES)
    file.append(b"m")
    assert target.stat().st_size == PAGE_BYTES + 1
    file.close()


def test_appending_in_room_reads_nothing_from_the_disk(tmp_path):
    """As when the page cache needed the memory for something else."""
    source = tmp_path / "old"
    source.write_bytes(os.urandom(64 * PAGE_BYTES))
    file = OsDisk().reuse(source, tmp_path / "new", b"head")
    with source.with_name("new").open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file.append(bytes(1000))  # the page that holds the head may be read
    before = bytes_read()
    for _ in range(100):
        file.append(bytes(1000))
    assert bytes_read() == before
    file.close()


def bytes_read() -> int:
    """What this process has read from disks so far (proc(5), io)."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines()
                if line.startswith("read_bytes"))
    return int(line.split()[1])


def test_nothing_to_reuse(tmp_path):
    with pytest.raises(FileNotFoundError):
        OsDisk().reuse(tmp_path / "none", tmp_path / "new", b"head")
    assert list(tmp_path.iterdir()) == []
