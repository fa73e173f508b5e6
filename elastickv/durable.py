"""The disk seam: every durable byte goes through a `Disk`.

`OsDisk` is the machine's; the simulator has one that loses what was not fsynced. The durability
rules are kept here once:

* A whole-file write is tmp, write, fsync, rename, fsync of the directory, in that order
  (`Disk.replace`); after it returns, either the old or the new content survives a power cut, and
  after its last step only the new.
* A file that takes the place of another, over the other's bytes, has its new beginning on the disk
  before it has its new name (`Disk.reuse`).
* A failed fsync is never retried: the kernel may have dropped the dirty pages (Rebello et al.,
  "Can Applications Recover from fsync Failures?", ATC 2020). The caller must stop the node.
* What a start reads may be in the page cache only: of a process that was killed before its fsync,
  or whose fsync failed, which leaves pages that read well and count as written. So a start fsyncs
  each directory before it believes the names in it (`Disk.make_directory`), and writes anew what is
  not known to be durable (`DiskFile.rewrite`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from elastickv.errors import DiskFull, ElasticKVError, UnsupportedFileSystem

OWNER_ONLY_FILE = 0o600
OWNER_ONLY_DIRECTORY = 0o700
_COPY_BYTES = 1 << 20
PAGE_BYTES = 4096
"""Of the page cache, and what most file systems read and write as one block."""
PROBE_FILE = ".probe"
_PROBE = b"elastickv durability probe\n"


class DiskFile(Protocol):
    """An open file with explicit offsets."""

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`; short only at the end of the file."""
        ...

    def append(self, data: bytes) -> None:
        """Write all of `data` at the end. Raises `DiskFull` on ENOSPC."""
        ...

    def sync(self) -> None:
        """fsync (data and size). Safe to call from a worker thread."""
        ...

    def truncate(self, size: int) -> None:
        """Cut (or extend with zeros) to `size` bytes; not durable until `sync`."""
        ...

    def rewrite(self, offset: int) -> None:
        """Write what is behind `offset` again, in place: the next `sync` then makes it and the
        file's length durable, even if an earlier `sync` failed. Raises `DiskFull`; it may be
        repeated."""
        ...

    def size(self) -> int:
        """Current length in bytes."""
        ...

    def close(self) -> None:
        """Close. Idempotent."""
        ...


@runtime_checkable
class Reservable(Protocol):
    """A `DiskFile` that can write zeros ahead of its end. An fsync that does not change the file's
    length or its blocks spares the file system a commit of its own journal."""

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes behind the end. The end, as `size()` tells it, stays; a reader
        after a crash may find zeros behind it. A full disk is no error here."""
        ...


class Disk(Protocol):
    """A directory tree that can lose power."""

    def open_append(self, path: Path) -> DiskFile:
        """Open for reading and appending; `FileNotFoundError` if absent."""
        ...

    def reuse(self, source: Path, target: Path, head: bytes) -> DiskFile:
        """Durably make the file `source`, no shorter than `head`, the file `target`, in the same
        directory, with the content `head`. What else it held is room behind the end (`Reservable`):
        appending writes over it, and a reader after a crash may find what is left of it.

        A crash leaves one of both names; under the new one the file begins with `head`. Raises
        `FileNotFoundError` if `source` is absent, `DiskFull` with both names as they were.
        """
        ...

    def read(self, path: Path) -> bytes:
        """The whole file; `FileNotFoundError` if absent."""
        ...

    def exists(self, path: Path) -> bool:
        """Whether the path exists."""
        ...

    def list(self, directory: Path) -> list[str]:
        """Sorted names in a directory; empty if it is absent."""
        ...

    def make_directory(self, path: Path) -> None:
        """Create with parents, owner-only, if absent. On return the names in it are durable, and so
        is its own if it was made here.

        Raises `DiskFull` or `UnsupportedFileSystem`.
        """
        ...

    def replace(self, path: Path, data: bytes) -> None:
        """Durably make `data` the content of `path` (tmp, fsync, rename, directory fsync).

        Raises `DiskFull` with the old content in place.
        """
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Rename and fsync the target's directory. Raises `DiskFull` without effect."""
        ...

    def remove(self, path: Path) -> None:
        """Unlink if present, and fsync the directory."""
        ...

    def sync_directory(self, path: Path) -> None:
        """fsync a directory."""
        ...


@contextlib.contextmanager
def _typed_if_full(path: Path) -> Iterator[None]:
    """Without effect on `path`: what is under way there can be done again."""
    try:
        yield
    except OSError as error:
        _raise_if_full(error, path)
        raise


def _raise_if_full(error: OSError, path: Path) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFull(f"no space left to write {path}",
                       remedy="free space on the data directory's file system") from error


def _write_at(descriptor: int, data: bytes, offset: int, needed: int | None = None) -> int:
    """Write all of `data`, or at least the first `needed` bytes; how many were written."""
    view = memoryview(data)
    written = 0
    while written < (len(view) if needed is None else needed):
        written += os.pwrite(descriptor, view[written:], offset + written)
    return written


class OsFile:
    """A `DiskFile` on the machine's file system."""

    def __init__(self, path: Path, descriptor: int, size: int | None = None) -> None:
        """`size`: where the content ends, if that is not where the file does."""
        self._path = path
        self._descriptor = descriptor
        self._reserved_end = os.fstat(descriptor).st_size
        self._size = self._reserved_end if size is None else size
        self._whole_end = 0
        """Up to here whole pages were written."""

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def append(self, data: bytes) -> None:
        end = self._size + len(data)
        whole_end = -(-end // PAGE_BYTES) * PAGE_BYTES
        # Of a page that is not in memory the kernel reads what is not written, and the caller waits
        # for the disk. In the room behind the end nothing is worth that.
        fills_page = self._whole_end < whole_end <= self._reserved_end
        try:
            # An error for the zeros alone would be one with the whole of `data` written.
            written = _write_at(
                self._descriptor, data + bytes(whole_end - end) if fills_page else data,
                self._size, len(data))
        except OSError as error:
            # The size is not advanced: the next append overwrites what a short write left behind.
            _raise_if_full(error, self._path)
            raise
        if fills_page and self._size + written == whole_end:
            self._whole_end = whole_end
        self._size = end
        self._reserved_end = max(self._reserved_end, end)

    def reserve(self, size: int) -> None:
        missing = self._size + size - self._reserved_end
        if missing > 0:
            with contextlib.suppress(OSError):
                self._reserved_end += os.pwrite(self._descriptor, bytes(missing),
                                                self._reserved_end)

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self._size = self._reserved_end = size
        self._whole_end = 0

    def rewrite(self, offset: int) -> None:
        with _typed_if_full(self._path):
            while content := self.pread(min(_COPY_BYTES, self._size - offset), offset):
                _write_at(self._descriptor, content, offset)
                offset += len(content)

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        if self._descriptor >= 0:
            if self._reserved_end > self._size:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
            os.close(self._descriptor)
            self._descriptor = -1


class OsDisk:
    """The machine's file system."""

    def open_append(self, path: Path) -> DiskFile:
        return OsFile(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def reuse(self, source: Path, target: Path, head: bytes) -> DiskFile:
        descriptor = os.open(source, os.O_RDWR | os.O_CLOEXEC)
        try:
            with _typed_if_full(source):
                _write_at(descriptor, head, 0)
            os.fdatasync(descriptor)
            self.rename(source, target)
        except BaseException:
            os.close(descriptor)
            raise
        return OsFile(target, descriptor, len(head))

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def exists(self, path: Path) -> bool:
        return path.exists()

    def list(self, directory: Path) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []

    def make_directory(self, path: Path) -> None:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        try:
            for directory in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    directory.mkdir(mode=OWNER_ONLY_DIRECTORY)
                self.sync_directory(directory.parent)
            self.sync_directory(path)
        except OSError as error:
            _raise_if_full(error, path)
            raise UnsupportedFileSystem(
                f"the directory {path} cannot be made or used: {error.strerror}",
                remedy=_remedy(error, path, "put --raftDataDir on a local file system, where this"
                                            " user may read and write")) from None

    def replace(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with _typed_if_full(path):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
                                 OWNER_ONLY_FILE)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view):]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self.rename(temporary, path)

    def rename(self, source: Path, target: Path) -> None:
        with _typed_if_full(target):
            os.replace(source, target)
        # Not typed: the name may be on the disk or not, and a failed fsync is never repeated.
        self.sync_directory(target.parent)

    def remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remedy(error: Exception, path: Path, otherwise: str) -> str:
    if not isinstance(error, PermissionError):
        return otherwise
    # Who looks need not be who runs the node: no user is named.
    return (f"run this as the node's user, whose directory it must be (install -d -o <user> -m 700"
            f" {shlex.quote(str(path))}), or choose another --raftDataDir")


def probe_file_system(disk: Disk, directory: Path, name: str = PROBE_FILE,
                      wanted: Path | None = None) -> None:
    """Prove that `directory` supports what durability needs: write, fsync, rename, directory fsync.
    `wanted` will be made in it, if that is not the one itself.

    No two processes may use the same file `name` in it at once. Raises `UnsupportedFileSystem`
    naming the directory (guard `file-system`).
    """
    probe = directory / name
    try:
        disk.replace(probe, _PROBE)
        if disk.read(probe) != _PROBE:
            raise UnsupportedFileSystem(
                f"{directory} does not read back what was written",
                remedy="put --raftDataDir on a local ext4 or xfs file system")
        disk.remove(probe)
    except (OSError, ElasticKVError) as error:
        for leftover in (probe.with_name(probe.name + ".tmp"), probe):
            with contextlib.suppress(OSError):
                disk.remove(leftover)
        if isinstance(error, ElasticKVError):
            raise
        raise UnsupportedFileSystem(
            f"{directory} cannot write, fsync, rename and fsync its directory ({error.strerror})",
            remedy=_remedy(error, wanted or directory, "put --raftDataDir on a local, writable ext4"
                                                       " or xfs file system")) from None
