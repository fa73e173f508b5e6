"""The journal on real files: order, truncation, segments, damage, memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, InvalidArgument, JournalCorrupt
from elastickv.raft.compaction import segments_to_drop
from elastickv.raft.journal import FIRST_ANCHOR_INDEX, Journal
from elastickv.raft.offload import Done
from elastickv.raft.records import HEADER_BYTES
from elastickv.raft.segment import HEADER_SIZE, segment_name

SMALL_SEGMENT = 400
FIRST = FIRST_ANCHOR_INDEX + 1


def command_of(index: int) -> bytes:
    return b"\x00entry %d" % index


def open_journal(path: Path, **overrides: object) -> Journal:
    return Journal(OsDisk(), path, **overrides)  # type: ignore[arg-type]


def filled(path: Path, count: int, *, term: int = 1, **overrides: object) -> Journal:
    """Entries FIRST..., all synced one by one."""
    journal = open_journal(path, **overrides)
    for _ in range(count):
        index = journal.last_index + 1
        journal.append(index, term, command_of(index))
        journal.sync()
    return journal


def contents(journal: Journal) -> list[tuple[bytes, int, int]]:
    found = []
    index = journal.anchor_index + 1
    while index <= journal.last_index:
        chunk = journal.entries(index, journal.last_index, 1 << 30)
        found += chunk
        index += len(chunk)
    return found


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.log"))


def compact(journal: Journal, index: int) -> None:
    while journal.compact_to(index):
        pass


class Stepwise:
    """An `Offload` that runs one piece of work at a time, when it is told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], None], Done]] = []

    def submit(self, work: Callable[[], None], done: Done) -> None:
        self.jobs.append((work, done))

    def step(self, error: Exception | None = None) -> None:
        work, done = self.jobs.pop(0)
        if error is None:
            work()
        done(error)

    def close(self) -> None:
        pass


def test_new_journal_begins_behind_the_anchor(tmp_path):
    journal = open_journal(tmp_path)
    assert (journal.anchor_index, journal.anchor_term) == (1, 0)
    assert (journal.last_index, journal.last_term, len(journal)) == (1, 0, 0)
    assert not journal.needs_sync


def test_entries_survive_reopening_across_segments(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    expected = contents(journal)
    journal.close()
    assert len(segments(tmp_path)) > 3
    again = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT, cache_bytes=1)
    assert contents(again) == expected
    assert (again.last_index, again.durable_index) == (51, 51)


def test_index_files_are_only_a_cache(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    expected = contents(journal)
    journal.close()
    indexes = sorted(tmp_path.glob("*.index"))
    assert indexes
    indexes[0].unlink()
    indexes[1].write_bytes(b"nonsense")
    assert contents(open_journal(tmp_path, cache_bytes=1)) == expected


def test_terms_are_known_everywhere(tmp_path):
    journal = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    terms = [1, 1, 3, 3, 3, 4, 7] + [8] * 30 + [9]
    for term in terms:
        journal.append(journal.last_index + 1, term, command_of(journal.last_index + 1))
    journal.close()
    again = open_journal(tmp_path)
    assert [again.term_at(FIRST + i) for i in range(len(terms))] == terms
    assert [again.first_index_of_term(FIRST + i) for i in range(len(terms))] \
        == [FIRST + terms.index(term) for term in terms]
    assert again.first_index_of_term(again.anchor_index) == again.anchor_index
    with pytest.raises(IndexError):
        again.term_at(again.last_index + 1)


def test_appending_out_of_order_or_over_the_limit_is_refused_without_effect(tmp_path):
    journal = filled(tmp_path, 3, max_command_bytes=100)
    for index, term, error in [(4, 1, JournalCorrupt), (6, 1, JournalCorrupt),
                               (5, 0, JournalCorrupt)]:
        with pytest.raises(error):
            journal.append(index, term, b"\x00x")
    with pytest.raises(InvalidArgument, match="100 bytes"):
        journal.append(5, 1, bytes(101))
    with pytest.raises(InvalidArgument):
        journal.append(5, 1, b"")
    journal.append(5, 1, bytes(100))
    assert journal.last_index == 5


def test_durable_index_moves_with_the_sync_that_covers_it(tmp_path):
    journal = open_journal(tmp_path)
    journal.append(2, 1, b"\x00a")
    job, ticket = journal.begin_sync()
    journal.append(3, 1, b"\x00b")
    job()
    assert journal.durable_index == 1
    journal.finish_sync(ticket)
    assert (journal.durable_index, journal.needs_sync) == (2, True)


def test_sync_that_a_truncation_overtook_proves_nothing(tmp_path):
    journal = filled(tmp_path, 3)
    journal.append(5, 1, b"\x00old")
    job, ticket = journal.begin_sync()
    job()
    journal.truncate_from(4)
    journal.append(4, 2, b"\x00new")
    journal.append(5, 2, b"\x00new")
    journal.finish_sync(ticket)
    assert journal.durable_index == 3


def test_sync_of_a_file_that_a_truncation_removed_is_no_failure(tmp_path):
    journal = filled(tmp_path, 20, segment_bytes=SMALL_SEGMENT)
    journal.append(22, 1, b"\x00x")
    job, ticket = journal.begin_sync()
    journal.truncate_from(3)
    with pytest.raises((OSError, ValueError)) as caught:
        job()
    journal.finish_sync(ticket, caught.value)
    assert journal.durable_index == 2


def test_failed_sync_is_raised_although_a_truncation_overtook_it(tmp_path):
    """It may have run late, and the kernel have dropped what was appended behind the cut."""
    journal = filled(tmp_path, 3)
    journal.append(5, 1, b"\x00old")
    _, ticket = journal.begin_sync()
    journal.truncate_from(5)
    journal.append(5, 2, b"\x00new")
    with pytest.raises(OSError, match="I/O"):
        journal.finish_sync(ticket, OSError(5, "I/O error"))


def test_failed_sync_is_raised(tmp_path):
    journal = filled(tmp_path, 3)
    journal.append(5, 1, b"\x00x")
    _, ticket = journal.begin_sync()
    with pytest.raises(OSError, match="I/O"):
        journal.finish_sync(ticket, OSError(5, "I/O error"))
    assert journal.durable_index == 4


def test_compaction_leaves_a_segment_that_is_being_synced(tmp_path):
    journal = filled(tmp_path, 5, segment_bytes=SMALL_SEGMENT)
    _, ticket = journal.begin_sync()
    anchor = journal.anchor_index
    for _ in range(40):
        journal.append(journal.last_index + 1, 1, command_of(journal.last_index + 1))
    journal.compact_to(30)
    assert journal.anchor_index == anchor
    journal.finish_sync(ticket)
    assert journal.compact_to(30)


@pytest.mark.parametrize("index", [FIRST, 5, 17, 30, 51])
def test_truncation_holds_across_segments_and_reopening(tmp_path, index):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    before = contents(journal)
    journal.truncate_from(index)
    assert contents(journal) == before[:index - FIRST]
    journal.append(index, 5, b"\x00other")
    journal.sync()
    journal.close()
    again = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    assert contents(again) == [*before[:index - FIRST], (b"\x00other", index, 5)]


def test_compaction_deletes_whole_segments_and_keeps_the_anchor_term(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT, term=4)
    names = segments(tmp_path)
    assert journal.compact_to(25)
    compact(journal, 25)
    assert 15 < journal.anchor_index <= 25
    assert journal.anchor_term == 4
    assert segments(tmp_path) == names[-len(segments(tmp_path)):]
    journal.close()
    again = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    assert (again.anchor_index, again.anchor_term) == (journal.anchor_index, 4)
    assert again.entry(again.anchor_index + 1)[1] == again.anchor_index + 1
    with pytest.raises(IndexError):
        again.entry(again.anchor_index)


def test_what_was_dropped_is_deleted_oldest_first_one_after_the_other(tmp_path):
    cleanup = Stepwise()
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT, cleanup=cleanup)
    before, names = contents(journal), segments(tmp_path)
    compact(journal, 40)
    kept = contents(journal)
    assert kept == before[len(before) - len(kept):]
    assert 20 < journal.anchor_index <= 40
    assert segments(tmp_path) == names
    # Whatever a crash leaves is the old log or a part of it that ends as it does.
    while cleanup.jobs:
        assert len(cleanup.jobs) == 1
        again = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
        found = contents(again)
        again.close()
        assert found == before[len(before) - len(found):]
        names.pop(0)
        cleanup.step()
        assert segments(tmp_path) == names
    assert segments(tmp_path)[0].name == segment_name(journal.anchor_index + 1)
    assert {path.stem for path in tmp_path.glob("*.index")} <= {path.stem for path in names}


def test_nothing_is_deleted_behind_what_could_not_be(tmp_path):
    cleanup = Stepwise()
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT, cleanup=cleanup)
    names = segments(tmp_path)
    compact(journal, 40)
    with pytest.raises(OSError, match="Input/output error"):
        cleanup.step(OSError(5, "Input/output error"))
    assert not cleanup.jobs
    assert segments(tmp_path) == names
    journal.compact_to(40)
    while cleanup.jobs:  # it was tried again
        cleanup.step()
    assert segments(tmp_path)[0].name == segment_name(journal.anchor_index + 1)


def test_a_reset_takes_along_what_is_still_to_be_deleted(tmp_path):
    cleanup = Stepwise()
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT, cleanup=cleanup)
    compact(journal, 40)
    journal.reset(1000, 12)
    assert [path.name for path in segments(tmp_path)] == [segment_name(1001)]
    for index in range(1001, 1060):
        journal.append(index, 12, command_of(index))
    journal.sync()
    journal.compact_to(1040)
    names = segments(tmp_path)
    cleanup.step()  # it was under way when the log began anew
    cleanup.step()
    assert segments(tmp_path) == names[1:]
    assert contents(open_journal(tmp_path, segment_bytes=SMALL_SEGMENT))[-1][1] == 1059


def test_a_closed_journal_deletes_nothing_more(tmp_path):
    cleanup = Stepwise()
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT, cleanup=cleanup)
    compact(journal, 40)
    journal.close()
    cleanup.step()
    assert not cleanup.jobs


@pytest.mark.parametrize(("droppable", "expected"), [(0, 0), (1, 1), (7, 1), (8, 4), (100, 4)])
def test_how_many_segments_go_at_once(droppable, expected):
    assert segments_to_drop(droppable) == expected


def test_reset_begins_anew_behind_a_snapshot(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    journal.reset(1000, 12)
    assert (journal.anchor_index, journal.anchor_term, journal.durable_index) == (1000, 12, 1000)
    journal.append(1001, 12, b"\x00x")
    journal.close()
    again = open_journal(tmp_path)
    assert contents(again) == [(b"\x00x", 1001, 12)]
    assert again.term_at(1000) == 12


@pytest.mark.parametrize(("change", "kept"), [
    pytest.param(lambda journal: compact(journal, 40), range(FIRST, 52), id="compaction"),
    pytest.param(lambda journal: journal.truncate_from(20), range(FIRST, 20), id="truncation"),
    pytest.param(lambda journal: journal.reset(1000, 12), range(0), id="reset"),
])
@pytest.mark.parametrize("removals", range(6))
def test_a_change_that_fails_half_way_claims_only_what_is_there(tmp_path, monkeypatch, change,
                                                                kept, removals):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    remaining = [removals]
    remove = OsDisk.remove

    def fail(self, path):
        if not remaining[0]:
            raise DiskFull("no space left")
        remaining[0] -= 1
        remove(self, path)

    monkeypatch.setattr(OsDisk, "remove", fail)
    with pytest.raises(DiskFull):
        change(journal)
    expected = [(command_of(index), index, 1) for index in kept if index > journal.anchor_index]
    assert contents(journal) == expected
    assert journal.durable_index == journal.last_index
    assert [journal.term_at(index) for _, index, _ in expected] == [1] * len(expected)
    monkeypatch.undo()
    journal.reset(2000, 13)
    assert [path.name for path in tmp_path.iterdir()] == [segment_name(2001)]


def test_marked_entries_are_found_again(tmp_path):
    journal = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    for index in range(2, 40):
        journal.append(index, 1, (b"\x02" if index % 10 == 0 else b"\x00") + b"x" * 20)
    journal.truncate_from(31)
    journal.close()
    assert open_journal(tmp_path).marked_indexes() == [10, 20, 30]


def test_a_batch_is_bounded_but_never_empty(tmp_path):
    journal = filled(tmp_path, 10, cache_bytes=1)
    size = len(command_of(5)) + HEADER_BYTES
    assert len(journal.entries(2, 11, 1)) == 1
    assert len(journal.entries(2, 11, 3 * size)) == 3
    assert len(journal.entries(2, 11, 1 << 20)) == 10


# --- damage --------------------------------------------------------------------------------------


def damage(path: Path, offset: int, data: bytes = b"\xff") -> None:
    content = bytearray(path.read_bytes())
    offset %= len(content)
    content[offset:offset + len(data)] = bytes(b ^ 0x55 for b in content[offset:offset + len(data)])
    path.write_bytes(content)


@pytest.mark.parametrize("missing", [1, 5, HEADER_BYTES, HEADER_BYTES + 5])
def test_torn_last_record_is_cut(tmp_path, missing):
    journal = filled(tmp_path, 5)
    expected = contents(journal)
    journal.close()
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-missing])
    again = open_journal(tmp_path)
    assert contents(again) == expected[:len(contents(again))]
    assert len(again) == (4 if missing <= HEADER_BYTES + len(command_of(6)) else 3)
    again.append(again.last_index + 1, 2, b"\x00new")
    again.close()
    assert open_journal(tmp_path).last_term == 2


def test_preallocated_zeros_are_cut(tmp_path):
    filled(tmp_path, 5).close()
    path = segments(tmp_path)[0]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(10_000))
    assert open_journal(tmp_path).last_index == 6
    assert path.stat().st_size == size


def test_room_is_reserved_and_never_seen(tmp_path):
    journal = filled(tmp_path, 3, segment_bytes=1000)
    path = segments(tmp_path)[0]
    assert path.stat().st_size > 1 << 20
    crashed = path.read_bytes()
    while len(segments(tmp_path)) == 1:
        journal.append(journal.last_index + 1, 1, command_of(journal.last_index + 1))
    assert path.stat().st_size < 1200
    last_index = journal.last_index
    journal.close()
    assert segments(tmp_path)[1].stat().st_size < 1200
    assert open_journal(tmp_path).last_index == last_index
    segments(tmp_path)[1].unlink()
    path.with_suffix(".index").unlink()
    path.write_bytes(crashed)
    assert open_journal(tmp_path).last_index == 4


def test_damaged_record_with_a_later_durable_one_refuses_the_start(tmp_path):
    filled(tmp_path, 5).close()
    damage(segments(tmp_path)[0], HEADER_SIZE + HEADER_BYTES + 3)
    with pytest.raises(JournalCorrupt, match="entry 2"):
        open_journal(tmp_path)


@pytest.mark.parametrize("offset", range(0, 200, 7))
def test_a_flip_anywhere_before_the_last_record_refuses_the_start(tmp_path, offset):
    filled(tmp_path, 8).close()
    path = segments(tmp_path)[0]
    last_record = HEADER_BYTES + len(command_of(9))
    damage(path, offset % (path.stat().st_size - last_record))
    with pytest.raises(JournalCorrupt):
        open_journal(tmp_path)


def test_hole_in_one_unsynced_group_is_a_torn_tail(tmp_path):
    """A power cut keeps pages of one group in any order: the third may be there, the second not."""
    journal = filled(tmp_path, 3)
    expected = contents(journal)
    for index in range(5, 8):
        journal.append(index, 1, command_of(index))
    journal.close()
    record = HEADER_BYTES + len(command_of(5))
    damage(segments(tmp_path)[0], -2 * record, bytes(record))
    assert contents(open_journal(tmp_path)) == [*expected, (command_of(5), 5, 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_segment_sealed_beside_a_failing_fsync_proves_nothing(tmp_path, count):
    """The kernel tells one of the two calls of the error."""
    journal = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    _, ticket = journal.begin_sync()
    while len(segments(tmp_path)) <= count:
        index = journal.last_index + 1
        journal.append(index, 1, command_of(index))
    assert journal.durable_index == 1
    with pytest.raises(OSError, match="EIO"):
        journal.finish_sync(ticket, OSError("EIO"))
    assert journal.durable_index == 1


def test_what_was_sealed_beside_an_fsync_is_durable_after_the_next(tmp_path):
    journal = open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)
    job, ticket = journal.begin_sync()
    while len(segments(tmp_path)) == 1:
        index = journal.last_index + 1
        journal.append(index, 1, command_of(index))
    job()
    journal.finish_sync(ticket)
    assert journal.needs_sync
    journal.sync()
    assert journal.durable_index == journal.last_index


@pytest.mark.parametrize("lost", [1, 60, 80, 300])
def test_a_hole_before_durable_records_refuses_the_start(tmp_path, lost):
    """However many small records it has taken: a lost write of a disk takes whole pages."""
    journal = filled(tmp_path, 400)
    offsets = list(journal._segments[0].offsets)
    journal.close()
    path = segments(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[offsets[50]:offsets[50 + lost]] = bytes(offsets[50 + lost] - offsets[50])
    path.write_bytes(content)
    with pytest.raises(JournalCorrupt, match="entry 52 "):
        open_journal(tmp_path)
    assert path.read_bytes() == content


def test_damage_in_a_sealed_segment_is_found_when_it_is_read(tmp_path):
    journal = filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT)
    journal.close()
    damage(segments(tmp_path)[1], HEADER_SIZE + HEADER_BYTES + 2)
    again = open_journal(tmp_path, cache_bytes=1)
    with pytest.raises(JournalCorrupt):
        contents(again)


def test_damage_in_a_sealed_segment_that_nothing_follows_refuses_the_start(tmp_path):
    """Unlike a torn tail: a later entry of that segment says that the damaged one was durable."""
    journal = filled(tmp_path, 5)
    journal._roll()
    journal.close()
    sealed, empty = segments(tmp_path)
    damage(sealed, HEADER_SIZE + HEADER_BYTES + 2)
    content = sealed.read_bytes()
    with pytest.raises(JournalCorrupt, match="entry 2 "):
        open_journal(tmp_path)
    assert sealed.read_bytes() == content
    assert empty.exists()


def test_what_a_torn_group_proves_durable_is_not_cut_with_it(tmp_path):
    """The group goes. What it says of the entries before it holds: damage there is no torn tail."""
    journal = filled(tmp_path, 5)
    offset = journal._segments[0].offsets[-1]
    journal._roll()
    for index in (7, 8):
        journal.append(index, 1, command_of(index))
    journal.close()
    sealed, torn = segments(tmp_path)
    damage(sealed, offset + HEADER_BYTES + 2)
    damage(torn, HEADER_SIZE + HEADER_BYTES + 2)
    again = open_journal(tmp_path)
    assert again.last_index == 6
    with pytest.raises(JournalCorrupt, match="is damaged"):
        again.entry(6)


def test_missing_segment_refuses_the_start(tmp_path):
    filled(tmp_path, 50, segment_bytes=SMALL_SEGMENT).close()
    segments(tmp_path)[1].unlink()
    with pytest.raises(JournalCorrupt, match="does not follow"):
        open_journal(tmp_path)


def test_segment_that_was_being_created_is_dropped(tmp_path):
    journal = filled(tmp_path, 5)
    journal.close()
    (tmp_path / f"{7:020d}.log").write_bytes(b"EKJL\x00")
    again = open_journal(tmp_path)
    assert again.last_index == 6
    assert len(segments(tmp_path)) == 1


def test_damaged_header_refuses_the_start(tmp_path):
    filled(tmp_path, 5).close()
    damage(segments(tmp_path)[0], 9)
    with pytest.raises(JournalCorrupt, match="header"):
        open_journal(tmp_path)


def test_full_disk_refuses_the_entry_and_the_log_stays_whole(tmp_path, monkeypatch):
    journal = filled(tmp_path, 3)
    file = journal._segments[-1].file
    monkeypatch.setattr(type(file), "append", lambda self, data: (_ for _ in ()).throw(
        DiskFull("no space")))
    with pytest.raises(DiskFull):
        journal.append(5, 1, b"\x00x")
    monkeypatch.undo()
    journal.append(5, 1, b"\x00y")
    journal.close()
    assert open_journal(tmp_path).entry(5)[0] == b"\x00y"


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


@pytest.mark.parametrize("change", [
    pytest.param(lambda journal: None, id="the next segment"),
    pytest.param(lambda journal: journal.reset(500, 2), id="reset"),
    pytest.param(lambda journal: journal.truncate_from(journal.last_index - 2), id="truncation"),
])
def test_full_disk_at_a_new_segment_leaves_nothing_of_it(tmp_path, monkeypatch, change):
    journal = filled(tmp_path, 3, segment_bytes=SMALL_SEGMENT)
    while journal._segments[-1].size < SMALL_SEGMENT:
        journal.append(journal.last_index + 1, 1, command_of(journal.last_index + 1))
    before, names = descriptors(), segments(tmp_path)

    def without_room_for_a_header(write: Callable[..., int]) -> Callable[..., int]:
        def write_or_fail(file: int, data: bytes, *offset: int) -> int:
            if len(data) == HEADER_SIZE:
                raise OSError(errno.ENOSPC, "no space left")
            return write(file, data, *offset)
        return write_or_fail

    with monkeypatch.context() as full:
        full.setattr(os, "write", without_room_for_a_header(os.write))
        full.setattr(os, "pwrite", without_room_for_a_header(os.pwrite))
        for _ in range(3):
            with pytest.raises(DiskFull):
                journal.append(journal.last_index + 1, 1, b"\x00x")
    assert len(descriptors()) == len(before)
    assert segments(tmp_path) == names
    change(journal)
    for length in (200, 250, 30, 300, 10):
        journal.append(journal.last_index + 1, 2, b"\x00" + bytes(length))
    journal.sync()
    expected = contents(journal)
    journal.close()
    assert contents(open_journal(tmp_path, segment_bytes=SMALL_SEGMENT)) == expected


# --- size ----------------------------------------------------------------------------------------

_OPEN = """
import resource, sys, time
from pathlib import Path
from elastickv.durable import OsDisk
from elastickv.raft.journal import Journal
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.monotonic()
journal = Journal(OsDisk(), Path(sys.argv[1]), segment_bytes=4 << 20)
journal.entry(journal.last_index)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(journal))
"""


@pytest.mark.parametrize("with_indexes", [True, False])
def test_opening_does_not_load_the_log_into_memory(tmp_path, with_indexes):
    journal = open_journal(tmp_path, segment_bytes=4 << 20)
    payload = b"\x00" + bytes(4095)
    count = 100 << 20 >> 12
    for index in range(2, 2 + count):
        journal.append(index, 1, payload)
    journal.close()
    if not with_indexes:
        for path in tmp_path.glob("*.index"):
            path.unlink()
    output = subprocess.run([sys.executable, "-c", _OPEN, str(tmp_path)], check=True,
                            capture_output=True, text=True).stdout.split()
    grown_kib, entries = int(output[0]), int(output[1])
    assert entries == count
    assert grown_kib < 32 << 10


def test_what_a_full_disk_left_of_an_append_is_not_sealed(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Large records make no room ahead of themselves, so that nothing was cut behind them."""
    limits = {"segment_bytes": 1 << 20, "max_command_bytes": 1 << 20}
    journal = open_journal(tmp_path, **limits)
    while journal._segments[-1].size < (1 << 20) - (50 << 10):
        journal.append(journal.last_index + 1, 1, bytes(40 << 10))
    pwrite = os.pwrite

    def a_part_of_it(file: int, data: bytes, offset: int) -> int:
        if offset > (1 << 20) + (100 << 10):
            raise OSError(errno.ENOSPC, "no space left")
        return pwrite(file, data[:256 << 10], offset)

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", a_part_of_it)
        with pytest.raises(DiskFull):
            journal.append(journal.last_index + 1, 1, b"\xee" * (500 << 10))
    for _ in range(4):
        journal.append(journal.last_index + 1, 1, bytes(40 << 10))
    journal.sync()
    last = journal.last_index
    assert len(segments(tmp_path)) == 2
    journal.close()
    assert open_journal(tmp_path, **limits).last_index == last
