"""The journal on the disk that loses power: whatever step a crash strikes, the log opens again."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.errors import DiskFull
from elastickv.raft.journal import FIRST_ANCHOR_INDEX, Journal
from elastickv.raft.segment import SPARE_SUFFIX
from tests.sim.disk import MountedDisk
from tests.sim.loop import Crashed
from tests.sim.test_disk import Watcher, medium, mount

LOG = Path("/data/log")
COUNT = 12
SEEDS = range(12)

Entries = list[tuple[bytes, int, int]]
Change = Callable[[Journal], None]


def open_journal(disk: object) -> Journal:
    return Journal(disk, LOG, segment_bytes=200,  # type: ignore[arg-type]
                   generator=random.Random(1))


def entries(journal: Journal) -> Entries:
    return [journal.entry(index)
            for index in range(journal.anchor_index + 1, journal.last_index + 1)]


def fill(journal: Journal, count: int, term: int) -> None:
    for _ in range(count):
        index = journal.last_index + 1
        journal.append(index, term, b"\x00entry %d of term %d" % (index, term))
        journal.sync()


def roll(journal: Journal) -> None:
    fill(journal, COUNT, 2)


def truncate(journal: Journal) -> None:
    journal.truncate_from(5)


def compact(journal: Journal) -> None:
    journal.compact_to(9)


def reset(journal: Journal) -> None:
    journal.reset(40, 3)


def reuse(journal: Journal) -> None:
    """Compact, and write over what was dropped, some of it without a sync in between."""
    while journal.compact_to(9):
        pass
    for _ in range(3):
        for _ in range(4):
            index = journal.last_index + 1
            journal.append(index, 2, b"\x00entry %d, after the others" % index)
        journal.sync()


def crashed_at(point: int, seed: int, change: Change) -> tuple[bool, Entries, Journal]:
    """Whether the crash came before the end, the log before, and the log that opens after it."""
    platter = medium(seed)
    watcher = platter.events
    assert isinstance(watcher, Watcher)
    disk, life = mount(platter)
    journal = open_journal(disk)
    fill(journal, COUNT, 1)
    before = entries(journal)
    watcher.points.clear()
    watcher.crash_at = point
    struck = False
    try:
        change(journal)
    except Crashed:
        struck = True
    watcher.crash_at = 0
    life.end()
    reopened = mount(platter)[0]
    return struck, before, open_journal(reopened)


def killed(journal: Journal, disk: MountedDisk) -> None:
    """The process dies, the machine goes on."""


def failed(journal: Journal, disk: MountedDisk) -> None:
    """An fsync fails, and with that the process ends."""
    disk.medium.failing_syncs = 1
    with pytest.raises(OSError, match="Input/output error"):
        journal.sync()
    journal.close()


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("die", [killed, failed])
@pytest.mark.parametrize("synced", [0, 1, COUNT])
def test_a_start_believes_only_what_a_power_cut_leaves(
        synced: int, die: Callable[[Journal, MountedDisk], None], seed: int) -> None:
    """What the start before left in the page cache alone is read, and may be acknowledged."""
    platter = medium(seed, power_cuts=0.0)
    disk, life = mount(platter)
    journal = open_journal(disk)
    fill(journal, synced, 1)
    for _ in range(3):
        index = journal.last_index + 1
        journal.append(index, 1, b"\x00entry %d, without a sync" % index)
    die(journal, disk)
    life.end()
    disk, life = mount(platter)
    believed = open_journal(disk)
    before = entries(believed)[:believed.durable_index - believed.anchor_index]
    life.end()
    platter.cut_power()
    after = entries(open_journal(mount(platter)[0]))
    assert after[:len(before)] == before


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("synced", [0, 1])
@pytest.mark.parametrize("behind", [0, 1, COUNT], ids=["nothing", "an entry", "segments"])
def test_a_start_does_not_believe_the_index_of_what_an_fsync_failed_to_write(
        behind: int, synced: int, seed: int) -> None:
    """The kernel tells of the error once, to the fsync that is under way as the segment is sealed:
    sealing succeeds, and the index file is durable."""
    platter = medium(seed)
    disk, life = mount(platter)
    journal = open_journal(disk)
    fill(journal, synced, 1)

    def append() -> None:
        index = journal.last_index + 1
        journal.append(index, 1, b"\x00entry %d, without a sync" % index)

    append()
    append()
    work, _ticket = journal.begin_sync()
    platter.failing_syncs = 1
    with pytest.raises(OSError, match="Input/output error"):
        work()
    append()
    journal._roll()
    for _ in range(behind):
        append()
    written = entries(journal)
    life.end()
    platter.cut_power()
    disk, life = mount(platter)
    believed = open_journal(disk)
    found = entries(believed)
    assert found == written[:synced]
    assert believed.durable_index == believed.last_index
    fill(believed, COUNT, 2)
    found = entries(believed)
    life.end()
    platter.cut_power()
    assert entries(open_journal(mount(platter)[0])) == found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("change", [roll, truncate, compact, reset, reuse])
def test_log_opens_after_a_crash_at_any_step(change: Change, seed: int) -> None:
    """What opens is the old log, a part of it that the change allows, or the new one."""
    for point in itertools.count(1):
        struck, before, journal = crashed_at(point, seed, change)
        found = entries(journal)
        if change is roll:
            assert found[:COUNT] == before
        elif change is truncate:
            assert found == before[:len(found)]
            assert journal.last_index >= 4
        elif change is compact:
            assert found == before[COUNT - len(found):]
            assert journal.anchor_index <= 9
        elif change is reuse:
            old = [entry for entry in found if entry[2] == 1]
            assert old == before[COUNT - len(old):]
            assert found[len(old):] == [
                (b"\x00entry %d, after the others" % index, index, 2)
                for index in range(COUNT + 2, COUNT + 2 + len(found) - len(old))]
        elif found or journal.anchor_index < 40:
            assert found == before[:len(found)]
        if not struck:
            break
    if change is reset:
        assert (journal.anchor_index, journal.anchor_term, journal.last_index) == (40, 3, 40)
    if change is truncate:
        assert journal.last_index == 4


def cut(journal: Journal) -> None:
    journal.truncate_from(journal.last_index - 2)


def go_on(journal: Journal) -> None:
    """Nothing happens before the next entries."""


@pytest.mark.parametrize(("change", "follow"), [
    (change, follow) for change in (roll, cut, compact, reuse) for follow in (go_on, cut, reset)
] + [(reset, reset)])
def test_log_opens_after_the_disk_was_full_at_any_step(change: Change, follow: Change) -> None:
    """What failed half-way leaves nothing that a start takes for a part of the log, whatever comes
    once there is room again."""
    for room in itertools.count():
        platter = medium(room)
        disk, life = mount(platter)
        journal = open_journal(disk)
        fill(journal, COUNT, 1)
        platter.room = room
        struck = False
        try:
            change(journal)
        except DiskFull:
            struck = True
        platter.room = None
        follow(journal)
        for length in (90, 50, 150, 10, 10):
            journal.append(journal.last_index + 1, 4, bytes(length))
        journal.sync()
        expected = entries(journal)
        life.end()
        assert entries(open_journal(mount(platter)[0])) == expected
        if not struck:
            break


class Tale:
    """Random appends, syncs, truncations and compactions, and what has to be left of them."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        self.written: dict[int, bytes] = {}
        self.durable = self.committed = FIRST_ANCHOR_INDEX
        self.reused = 0

    def check(self, journal: Journal) -> None:
        """`journal` was opened after a power cut."""
        assert journal.anchor_index <= self.committed
        assert journal.last_index >= self.durable
        for command, index, _ in entries(journal):
            assert command == self.written[index]

    def step(self, journal: Journal, disk: MountedDisk) -> None:
        generator = self.generator
        uncommitted = max(self.committed, journal.anchor_index) + 1
        match generator.choice("aaaaaasstc"):
            case "a":
                index = journal.last_index + 1
                self.written[index] = b"\x00" + generator.randbytes(generator.randrange(60))
                spares = self._spares(disk)
                journal.append(index, 1, self.written[index])
                self.reused += spares - self._spares(disk)
            case "s":
                journal.sync()
                self.committed = max(self.committed, journal.last_index - 3)
            case "t" if journal.last_index >= uncommitted:
                index = generator.randint(uncommitted, journal.last_index)
                self.durable = min(self.durable, index - 1)
                journal.truncate_from(index)
            case "c":
                journal.compact_to(self.committed)
        self.durable = journal.durable_index

    @staticmethod
    def _spares(disk: MountedDisk) -> int:
        return sum(name.endswith(SPARE_SUFFIX) for name in disk.list(LOG))


@pytest.mark.parametrize("seed", range(60))
def test_wherever_a_power_cut_strikes_what_was_durable_is_there(seed: int) -> None:
    platter = medium(seed)
    watcher = platter.events
    assert isinstance(watcher, Watcher)
    tale = Tale(seed)
    for _ in range(5):
        disk, life = mount(platter)
        watcher.crash_at = 0
        journal = open_journal(disk)
        tale.check(journal)
        watcher.points.clear()
        watcher.crash_at = tale.generator.randrange(100, 400)
        with contextlib.suppress(Crashed):
            while True:
                tale.step(journal, disk)
        life.end()
    assert tale.reused > 0
