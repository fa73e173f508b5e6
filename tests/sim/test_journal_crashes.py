"""The journal on the disk that loses power: whatever step a crash strikes, the log opens again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.raft.journal import Journal
from tests.sim.loop import Crashed
from tests.sim.test_disk import Watcher, medium, mount

LOG = Path("/data/log")
COUNT = 12
SEEDS = range(12)

Entries = list[tuple[bytes, int, int]]
Change = Callable[[Journal], None]


def open_journal(disk: object) -> Journal:
    return Journal(disk, LOG, segment_bytes=200)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("change", [roll, truncate, compact, reset])
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
        elif found or journal.anchor_index < 40:
            assert found == before[:len(found)]
        if not struck:
            break
    if change is reset:
        assert (journal.anchor_index, journal.anchor_term, journal.last_index) == (40, 3, 40)
    if change is truncate:
        assert journal.last_index == 4
