"""A disk that loses what was not fsynced. `Medium` survives crashes, `MountedDisk` serves one life.

The model, which is as unkind as POSIX allows:

* Often only the process dies: the next one reads everything that was written, also what was not
  fsynced, and a later power cut may take it.
* Bytes written since the last fsync of a file are lost at a power cut, kept, kept up to a torn
  prefix, or kept in part with holes of zeros in between (pages reach the disk in any order).
* A created, renamed or removed name is durable after the fsync of its directory; before that a
  power cut keeps some prefix of the directory's changes.
* After a failed fsync the written pages stay readable and never become durable (Rebello et al.,
  "Can Applications Recover from fsync Failures?", ATC 2020).

The steps of `replace`, `rename`, `remove` and `reuse` are those of `durable.OsDisk`, with a crash
point before and after each fsync and rename.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from elastickv.durable import DiskFile
from elastickv.errors import DiskFull
from tests.sim.loop import Life

POWER_CUTS = 0.5
"""Which part of the deaths of a process are power cuts."""

PendingWrite = tuple[int, bytes | None]
"""`(offset, bytes)`, or `(size, None)` for a truncation."""


class DiskEvents(Protocol):
    """Who watches the disks and decides when a process dies."""

    def crash_point(self, life: Life, kind: str) -> None:
        """`kind` is about to happen or has just happened. `Crashed` ends the life here."""
        ...

    def written(self, node: str, path: str, data: bytes) -> None:
        """Bytes were handed to the disk."""
        ...

    def changed(self, node: str, kind: str, path: str, size: int) -> None:
        """An operation took effect."""
        ...


class Inode:
    """A file's content: as the process sees it, as the platter has it, the writes in between."""

    __slots__ = ("data", "durable", "pending")

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.durable = bytearray(data)
        self.pending: list[PendingWrite] = []

    def write(self, offset: int, data: bytes) -> None:
        _apply(self.data, (offset, data))
        self.pending.append((offset, data))

    def truncate(self, size: int) -> None:
        _apply(self.data, (size, None))
        self.pending.append((size, None))

    def settle(self) -> None:
        """Everything written becomes durable."""
        for write in self.pending:
            _apply(self.durable, write)
        self.pending.clear()

    def forget(self) -> None:
        """What is pending will never be durable, although it stays readable."""
        self.pending.clear()

    def survive(self, generator: random.Random) -> bool:
        """A crash: the pending writes meet their fate; True when a part of them survived."""
        kept: list[PendingWrite] = []
        pending, self.pending = self.pending, []
        if pending:
            kept = _survivors(pending, generator)
            for write in kept:
                _apply(self.durable, write)
        if self.data != self.durable:
            self.data = bytearray(self.durable)
        return bool(kept) and kept != pending


def _apply(content: bytearray, write: PendingWrite) -> None:
    position, data = write
    if data is None:
        if position < len(content):
            del content[position:]
        else:
            content.extend(bytes(position - len(content)))
        return
    if position > len(content):
        content.extend(bytes(position - len(content)))
    content[position:position + len(data)] = data


def _survivors(pending: Sequence[PendingWrite], generator: random.Random) -> list[PendingWrite]:
    """Which pending writes reached the platter."""
    fate = generator.random()
    if fate < 0.4:
        return []
    if fate < 0.55:
        return list(pending)
    if fate < 0.8:
        count = generator.randrange(len(pending))
        kept = list(pending[:count])
        offset, data = pending[count]
        if data is not None:
            kept.append((offset, data[:generator.randrange(len(data) + 1)]))
        return kept
    return [write for write in pending if generator.random() < 0.5]


NameChange = tuple[str, Inode | None]
"""A path and what it names from now on; None = unlinked."""


class Medium:
    """The platter and the page cache of one node."""

    def __init__(self, node: str, events: DiskEvents, generator: random.Random) -> None:
        self.node = node
        self.events = events
        self.generator = generator
        self.files: dict[str, Inode] = {}
        self.directories: set[str] = set()
        self.is_full = False
        self.room: int | None = None
        self.failing_syncs = 0
        self.power_cuts = POWER_CUTS
        self.life: Life | None = None
        self._durable_names: dict[str, Inode] = {}
        self._name_changes: dict[str, list[list[NameChange]]] = {}

    def take_room(self, path: str) -> None:
        """Bytes or a name are about to be written at `path`. Raises `DiskFull` when `is_full`, and
        once so much as `room` says has been written."""
        if self.is_full or self.room == 0:
            raise DiskFull(f"no space left to write {path}", remedy="free space")
        if self.room is not None:
            self.room -= 1

    def mount(self, life: Life) -> MountedDisk:
        """The disk of a process that starts, until `life` ends."""
        self.life = life
        life.on_death.append(lambda: self.crash(life))
        return MountedDisk(self, life)

    def rename_names(self, directory: str, changes: list[NameChange]) -> None:
        """Names change, as one step of the directory; durable with its fsync."""
        for path, inode in changes:
            _set_name(self.files, path, inode)
        self._name_changes.setdefault(directory, []).append(changes)

    def sync_names(self, directory: str) -> None:
        """fsync of a directory."""
        for changes in self._name_changes.pop(directory, ()):
            for path, inode in changes:
                _set_name(self._durable_names, path, inode)

    def crash(self, life: Life) -> None:
        """`life` dies, if it still is the one that uses this disk; by a power cut or without."""
        if self.life is life:
            self.life = None
            if self.generator.random() < self.power_cuts:
                self.cut_power()

    def cut_power(self) -> None:
        """The page cache is gone. Nothing may be mounted."""
        for steps in self._name_changes.values():
            for changes in steps[:self.generator.randrange(len(steps) + 1)]:
                for path, inode in changes:
                    _set_name(self._durable_names, path, inode)
        self._name_changes.clear()
        self.files = dict(self._durable_names)
        for path, inode in self.files.items():
            if inode.survive(self.generator):
                self.events.changed(self.node, "torn", path, len(inode.data))

    def copy(self) -> dict[str, bytes]:
        """What would be on the disk if the power failed now with nothing unsynced kept."""
        return {path: bytes(inode.durable) for path, inode in self._durable_names.items()}

    def durable(self, path: str) -> bytes:
        """What a power cut at this moment certainly leaves of a file; b"" when it leaves none."""
        inode = self._durable_names.get(path)
        return bytes(inode.durable) if inode is not None else b""

    def restore(self, copy: dict[str, bytes]) -> None:
        """Replace the whole content by an earlier `copy`. Nothing may be mounted."""
        self.files = {path: Inode(data) for path, data in copy.items()}
        self._durable_names = dict(self.files)
        self._name_changes.clear()

    def flip_bit(self, path: str, offset: int, bit: int) -> None:
        """The platter returns another byte from now on. Nothing may be mounted, and nothing be left
        in the page cache."""
        inode = self.files[path]
        inode.durable[offset] ^= 1 << bit
        inode.data = bytearray(inode.durable)


def _set_name(names: dict[str, Inode], path: str, inode: Inode | None) -> None:
    if inode is None:
        names.pop(path, None)
    else:
        names[path] = inode


class MountedFile:
    """A `durable.DiskFile`."""

    def __init__(self, disk: MountedDisk, path: str, inode: Inode,
                 size: int | None = None) -> None:
        self._disk = disk
        self._path = path
        self._inode = inode
        self._size = len(inode.data) if size is None else size

    def pread(self, size: int, offset: int) -> bytes:
        return bytes(memoryview(self._inode.data)[offset:offset + size])

    def append(self, data: bytes) -> None:
        self._disk.prepare_write(self._path, data)
        self._inode.write(self._size, data)
        self._size += len(data)

    @property
    def is_durable(self) -> bool:
        """Whether a power cut at this moment would take nothing."""
        return not self._inode.pending and self._inode.durable == self._inode.data

    def sync(self) -> None:
        self._disk.sync_inode(self._path, self._inode)

    def truncate(self, size: int) -> None:
        self._disk.life.require_alive()
        self._inode.truncate(size)
        self._size = size

    def rewrite(self, offset: int) -> None:
        self._disk.life.require_alive()
        self._inode.truncate(self._size)
        self._inode.write(offset, self.pread(self._size - offset, offset))

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        """Nothing is held."""


class MountedDisk:
    """A `durable.Disk` for one life."""

    def __init__(self, medium: Medium, life: Life) -> None:
        self.medium = medium
        self._events = medium.events
        self.life = life

    # --- steps, each with its crash points ------------------------------------------------------

    def prepare_write(self, path: str, data: bytes) -> None:
        """Bytes are about to be written."""
        self.life.require_alive()
        self.medium.take_room(path)
        self._events.written(self.medium.node, path, data)

    def _point(self, kind: str, effect: Callable[[], None]) -> None:
        self.life.require_alive()
        self._events.crash_point(self.life, kind)
        effect()
        self._events.crash_point(self.life, kind)

    def sync_inode(self, path: str, inode: Inode) -> None:
        """fsync of a file."""
        self._events.changed(self.medium.node, "fsync", path, len(inode.data))
        self._point("fsync", lambda: self._settle(path, inode))

    def _settle(self, path: str, inode: Inode) -> None:
        if self.medium.failing_syncs:
            self.medium.failing_syncs -= 1
            inode.forget()
            self._events.changed(self.medium.node, "fsync failed", path, 0)
            raise OSError(errno.EIO, "Input/output error", path)
        inode.settle()

    # --- Disk -----------------------------------------------------------------------------------

    def open_append(self, path: Path) -> MountedFile:
        self.life.require_alive()
        return MountedFile(self, str(path), self._existing(path))

    def _existing(self, path: Path) -> Inode:
        inode = self.medium.files.get(str(path))
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return inode

    def reuse(self, source: Path, target: Path, head: bytes) -> DiskFile:
        inode = self._existing(source)
        self.prepare_write(str(source), head)
        inode.write(0, head)
        self.sync_inode(str(source), inode)
        self.rename(source, target)
        self._events.changed(self.medium.node, "reuse", str(target), len(inode.data))
        return MountedFile(self, str(target), inode, len(head))

    def read(self, path: Path) -> bytes:
        return bytes(self._existing(path).data)

    def exists(self, path: Path) -> bool:
        name = str(path)
        return name in self.medium.files or name in self.medium.directories

    def list(self, directory: Path) -> list[str]:
        prefix = f"{directory}/"
        return sorted({name[len(prefix):].split("/")[0]
                       for name in (*self.medium.files, *self.medium.directories)
                       if name.startswith(prefix)})

    def make_directory(self, path: Path) -> None:
        self.life.require_alive()
        self.medium.directories.update(str(p) for p in (path, *path.parents))
        self.sync_directory(path)

    def replace(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        name = str(temporary)
        self.life.require_alive()
        inode = self.medium.files.get(name)
        if inode is None:
            inode = self._create(temporary)
        inode.truncate(0)
        self.prepare_write(name, data)
        inode.write(0, data)
        self.sync_inode(name, inode)
        self.rename(temporary, path)

    def _create(self, path: Path) -> Inode:
        """A name for an empty file, as durable as its directory is."""
        self.medium.take_room(str(path))
        inode = Inode()
        self.medium.rename_names(str(path.parent), [(str(path), inode)])
        return inode

    def rename(self, source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise NotImplementedError("renames across directories are not modelled")
        inode = self.medium.files[str(source)]
        self._point("rename", lambda: self.medium.rename_names(
            str(target.parent), [(str(source), None), (str(target), inode)]))
        self._events.changed(self.medium.node, "rename", str(target), len(inode.data))
        self.sync_directory(target.parent)

    def remove(self, path: Path) -> None:
        self.life.require_alive()
        if str(path) in self.medium.files:
            self.medium.rename_names(str(path.parent), [(str(path), None)])
            self._events.changed(self.medium.node, "remove", str(path), 0)
            self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        self._point("fsync", lambda: self._sync_names(path))

    def _sync_names(self, path: Path) -> None:
        if self.medium.failing_syncs:
            self.medium.failing_syncs -= 1
            self._events.changed(self.medium.node, "fsync failed", str(path), 0)
            raise OSError(errno.EIO, "Input/output error", str(path))
        self.medium.sync_names(str(path))
