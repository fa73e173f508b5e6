"""The fake disk loses exactly what POSIX allows it to lose."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from elastickv.errors import DiskFull
from tests.sim.disk import Medium, MountedDisk, MountedFile
from tests.sim.loop import Crashed, Life

FILE = Path("/data/file")


class Watcher:
    """Disk events, with a crash at the n-th point on demand."""

    def __init__(self) -> None:
        self.points: list[str] = []
        self.crash_at = 0

    def crash_point(self, life: Life, kind: str) -> None:
        self.points.append(kind)
        if len(self.points) == self.crash_at:
            life.end()
            raise Crashed(life.name)

    def written(self, node: str, path: str, data: bytes) -> None:
        """Not looked at."""

    def changed(self, node: str, kind: str, path: str, size: int) -> None:
        """Not looked at."""


def medium(seed: int = 0, *, power_cuts: float = 1.0) -> Medium:
    platter = Medium("n1", Watcher(), random.Random(seed))
    platter.power_cuts = power_cuts
    return platter


def mount(platter: Medium) -> tuple[MountedDisk, Life]:
    life = Life("n1")
    return platter.mount(life), life


def new_file(disk: MountedDisk, path: Path = FILE) -> MountedFile:
    """An empty file, durable and under a durable name."""
    disk.replace(path, b"")
    return disk.open_append(path)


def after_crash(platter: Medium, life: Life) -> MountedDisk:
    life.end()
    return mount(platter)[0]


@pytest.mark.parametrize("seed", range(40))
def test_what_was_synced_survives(seed: int) -> None:
    platter = medium(seed)
    disk, life = mount(platter)
    file = new_file(disk)
    file.append(b"synced")
    file.sync()
    file.append(b"lost or kept")
    assert after_crash(platter, life).read(FILE).startswith(b"synced")


def test_what_was_not_synced_meets_every_fate() -> None:
    found: set[bytes] = set()
    for seed in range(200):
        platter = medium(seed)
        disk, life = mount(platter)
        file = new_file(disk)
        file.append(b"aa")
        file.append(b"bb")
        found.add(after_crash(platter, life).read(FILE))
    # Lost, kept, a torn prefix, and a hole before what reached the platter first.
    assert {b"", b"aabb", b"aa", b"a", b"aab", b"\0\0bb"} <= found


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("point", range(1, 8))
def test_a_replacement_is_the_old_or_the_new_content(seed: int, point: int) -> None:
    platter = medium(seed)
    disk, life = mount(platter)
    disk.replace(FILE, b"old")
    watcher = platter.events
    assert isinstance(watcher, Watcher)
    watcher.points.clear()
    watcher.crash_at = point
    finished = True
    try:
        disk.replace(FILE, b"new content")
    except Crashed:
        finished = False
    content = after_crash(platter, life).read(FILE)
    assert content == b"new content" if finished else content in (b"old", b"new content")


def test_a_replacement_has_crash_points_around_every_step() -> None:
    platter = medium()
    disk, _ = mount(platter)
    disk.replace(FILE, b"x")
    watcher = platter.events
    assert isinstance(watcher, Watcher)
    assert watcher.points == ["fsync", "fsync", "rename", "rename", "fsync", "fsync"]


def test_pages_of_a_failed_fsync_never_become_durable() -> None:
    platter = medium()
    disk, life = mount(platter)
    file = new_file(disk)
    file.append(b"gone")
    platter.failing_syncs = 1
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    assert file.pread(4, 0) == b"gone"
    file.append(b"later")
    file.sync()
    assert after_crash(platter, life).read(FILE) == b"\0\0\0\0later"


def test_a_process_that_dies_leaves_the_page_cache() -> None:
    platter = medium(power_cuts=0.0)
    disk, life = mount(platter)
    disk.replace(FILE, b"synced")
    file = disk.open_append(FILE)
    file.append(b" or not")
    disk = after_crash(platter, life)
    assert disk.read(FILE) == b"synced or not"
    assert platter.durable(str(FILE)) == b"synced"


def test_what_is_written_again_can_become_durable() -> None:
    platter = medium(power_cuts=0.0)
    disk, life = mount(platter)
    file = new_file(disk)
    file.append(b"gone, gone")
    platter.failing_syncs = 1
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    file = after_crash(platter, life).open_append(FILE)
    file.rewrite(6)
    file.sync()
    assert platter.durable(str(FILE)) == b"\0\0\0\0\0\0gone"


def test_a_full_disk_takes_nothing() -> None:
    platter = medium()
    disk, _ = mount(platter)
    file = new_file(disk)
    platter.is_full = True
    with pytest.raises(DiskFull):
        file.append(b"x")
    with pytest.raises(DiskFull):
        disk.replace(FILE, b"x")
    assert disk.read(FILE) == b""


@pytest.mark.parametrize(("room", "names"), [
    (0, []), (1, ["file.tmp"]), (2, ["file"])], ids=["no name", "a name alone", "both"])
def test_a_disk_may_fill_up_half_way(room: int, names: list[str]) -> None:
    platter = medium()
    disk, _ = mount(platter)
    platter.room = room
    with contextlib.suppress(DiskFull):
        disk.replace(FILE, b"x")
    assert disk.list(FILE.parent) == names


def test_a_dead_process_writes_nothing() -> None:
    platter = medium()
    disk, life = mount(platter)
    file = new_file(disk)
    life.end()
    with pytest.raises(Crashed):
        file.append(b"x")


def test_an_old_copy_holds_only_what_was_durable() -> None:
    platter = medium()
    disk, life = mount(platter)
    disk.replace(FILE, b"old")
    file = new_file(disk, Path("/data/other"))
    file.append(b"unsynced")
    copy = platter.copy()
    disk.replace(FILE, b"new")
    life.end()
    platter.restore(copy)
    restored, _ = mount(platter)
    assert restored.read(FILE) == b"old"
    assert restored.read(Path("/data/other")) == b""


def test_a_flipped_bit_is_read_back() -> None:
    platter = medium()
    disk, life = mount(platter)
    disk.replace(FILE, b"\x00\x00")
    life.end()
    platter.flip_bit(str(FILE), 1, 3)
    assert mount(platter)[0].read(FILE) == b"\x00\x08"


def test_listing_names_files_and_directories() -> None:
    disk, _ = mount(medium())
    disk.make_directory(Path("/data/log"))
    disk.replace(FILE, b"x")
    assert disk.list(Path("/data")) == ["file", "log"]
    assert disk.list(Path("/nowhere")) == []
