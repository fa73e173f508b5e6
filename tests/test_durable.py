"""elastickv.durable: what survives a crash or a power cut at every point, and a full disk.

A power cut is modelled from the operations that `OsDisk` really issues: file content counts only up
to its last fsync, a rename only once its directory was fsynced. Whatever else the file system
may have done by itself is tried too: every subset of the changes that were not yet durable.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv import durable
from elastickv.durable import OsDisk, probe_file_system
from elastickv.errors import DiskFull, UnsupportedFileSystem

OLD, NEW = b"old content", b"new content, longer than before"


# --- a power cut at every point of replace() -------------------------------------------------


class Operation(NamedTuple):
    """One change that the code asked the kernel for."""

    kind: str  # write, fsync, rename, fsync-directory
    path: str
    argument: Any = None


class RecordingOs:
    """Stands in for the `os` module: does everything, and writes down what matters."""

    def __init__(self, fail_at: int = -1, error: int = errno.EIO) -> None:
        self.operations: list[Operation] = []
        self._paths: dict[int, str] = {}
        self._fail_at = fail_at
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _record(self, kind: str, path: str, argument: Any = None) -> None:
        if len(self.operations) == self._fail_at:
            raise OSError(self._error, os.strerror(self._error), path)
        self.operations.append(Operation(kind, path, argument))

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = str(path)
        if flags & os.O_TRUNC:
            self._record("truncate", str(path))
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        # One byte less than asked, so that short writes are always part of the picture.
        count = os.write(descriptor, bytes(data)[:max(1, len(data) - 1)])
        self._record("write", self._paths[descriptor], bytes(data)[:count])
        return count

    def fsync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        self._record("fsync-directory" if Path(path).is_dir() else "fsync", path)
        os.fsync(descriptor)

    def replace(self, source: Any, target: Any) -> None:
        self._record("rename", str(source), str(target))
        os.replace(source, target)


def contents_after_power_cut(operations: list[Operation], target: str,
                             old: bytes | None) -> set[bytes | None]:
    """Every content that `target` may have if power is lost after `operations`."""
    volatile: dict[str, bytes] = {}
    synced: dict[str, bytes] = {}
    durable_content = old
    possible: set[bytes | None] = {old}
    renamed = ""
    for operation in operations:
        match operation.kind:
            case "truncate":
                volatile[operation.path] = b""
                synced.pop(operation.path, None)
            case "write":
                volatile[operation.path] = volatile.get(operation.path, b"") + operation.argument
                synced.pop(operation.path, None)
            case "fsync":
                synced[operation.path] = volatile.get(operation.path, b"")
            case "rename":
                renamed = operation.path
                if renamed in synced:
                    possible = {durable_content, synced[renamed]}
                else:
                    # The name may reach the disk before the data: any prefix can be there.
                    data = volatile.get(renamed, b"")
                    possible = {durable_content, *(data[:end] for end in range(len(data) + 1))}
            case "fsync-directory":
                if renamed and Path(operation.path) == Path(target).parent:
                    durable_content = synced.get(renamed, volatile.get(renamed, b""))
                    possible = {durable_content} if renamed in synced else possible
    return possible


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> RecordingOs:
    recorder = RecordingOs()
    monkeypatch.setattr(durable, "os", recorder)
    return recorder


@pytest.mark.parametrize("old", [OLD, None], ids=["existing", "absent"])
def test_replace_survives_a_power_cut_at_every_point(
        tmp_path: Path, recording: RecordingOs, old: bytes | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    OsDisk().replace(path, NEW)
    operations = recording.operations
    assert [o.kind for o in operations if o.kind != "write"] == [
        "truncate", "fsync", "rename", "fsync-directory"]
    for count in range(len(operations) + 1):
        assert contents_after_power_cut(operations[:count], str(path), old) <= {old, NEW}
    assert contents_after_power_cut(operations, str(path), old) == {NEW}


@pytest.mark.parametrize(("missing", "allowed_at_end"), [
    ("fsync", False), ("fsync-directory", False), ("", True)])
def test_the_power_cut_model_sees_a_missing_step(
        tmp_path: Path, recording: RecordingOs, missing: str, allowed_at_end: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    OsDisk().replace(path, NEW)
    operations = [o for o in recording.operations if o.kind != missing]
    end = contents_after_power_cut(operations, str(path), OLD)
    assert (end == {NEW}) is allowed_at_end


@pytest.mark.parametrize("point", range(8))
def test_replace_that_is_killed_leaves_old_or_new(tmp_path: Path, point: int) -> None:
    """A child process is killed before its n-th operation; another replace then succeeds."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    child = os.fork()
    if child == 0:
        killer = RecordingOs(fail_at=point)
        killer._record = _exit_at(killer)  # type: ignore[method-assign]
        durable.os = killer  # type: ignore[assignment,attr-defined]
        OsDisk().replace(path, NEW)
        os._exit(0)
    os.waitpid(child, 0)
    assert path.read_bytes() in (OLD, NEW)
    OsDisk().replace(path, b"third")
    assert path.read_bytes() == b"third"
    assert OsDisk().list(tmp_path) == ["file"]


def _exit_at(killer: RecordingOs) -> Any:
    original = killer._record

    def record(kind: str, path: str, argument: Any = None) -> None:
        try:
            original(kind, path, argument)
        except OSError:
            os._exit(9)

    return record


@pytest.mark.parametrize("point", range(6))
def test_replace_that_fails_keeps_the_old_content_or_has_the_new(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    monkeypatch.setattr(durable, "os", RecordingOs(fail_at=point))
    with pytest.raises(OSError, match="Input/output error"):
        OsDisk().replace(path, b"ab")
    assert path.read_bytes() in (OLD, b"ab")


def test_files_and_directories_are_owner_only(tmp_path: Path) -> None:
    disk = OsDisk()
    previous = os.umask(0)
    try:
        disk.make_directory(tmp_path / "a" / "b")
        disk.replace(tmp_path / "a" / "b" / "file", NEW)
    finally:
        os.umask(previous)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").rglob("*")}
    assert modes == {"b": 0o700, "file": 0o600}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_make_directory_syncs_every_new_parent(tmp_path: Path, recording: RecordingOs) -> None:
    """And the directory itself: what an earlier process did in it may not be durable."""
    directory = tmp_path / "a" / "b"
    OsDisk().make_directory(directory)
    OsDisk().make_directory(directory)
    assert [o.path for o in recording.operations] == [
        str(tmp_path), str(tmp_path / "a"), str(directory), str(directory)]


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/elastickv"])
def test_make_directory_refuses_where_none_can_be(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(UnsupportedFileSystem, match=str(tmp_path / path)):
        OsDisk().make_directory(tmp_path / path)


def test_rename_and_remove_sync_the_directory(tmp_path: Path, recording: RecordingOs) -> None:
    (tmp_path / "x").write_bytes(OLD)
    disk = OsDisk()
    disk.rename(tmp_path / "x", tmp_path / "y")
    disk.remove(tmp_path / "y")
    disk.remove(tmp_path / "y")
    assert [o.kind for o in recording.operations] == ["rename", "fsync-directory",
                                                     "fsync-directory"]
    assert disk.list(tmp_path) == []
    assert disk.list(tmp_path / "absent") == []


# --- appending -------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Iterator[durable.DiskFile]:
    (tmp_path / "log").touch()
    file = OsDisk().open_append(tmp_path / "log")
    yield file
    file.close()
    file.close()


@given(chunks=st.lists(st.binary(max_size=20), max_size=24))
def test_what_is_appended_follows_in_order(tmp_path_factory: pytest.TempPathFactory,
                                           chunks: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("append") / "log"
    path.touch()
    file = OsDisk().open_append(path)
    for chunk in chunks:
        file.append(chunk)
    expected = b"".join(chunks)
    file.sync()
    file.close()
    reopened = OsDisk().open_append(path)
    assert reopened.size() == len(expected)
    assert reopened.pread(len(expected) + 10, 0) == expected
    reopened.close()


def test_open_append_needs_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OsDisk().open_append(tmp_path / "log")


def test_truncate_then_append(log: durable.DiskFile) -> None:
    log.append(b"abcdef")
    log.truncate(2)
    log.append(b"XY")
    assert log.pread(10, 0) == b"abXY"
    assert log.size() == 4


def test_a_failed_append_is_overwritten_by_the_next(
        log: durable.DiskFile, monkeypatch: pytest.MonkeyPatch) -> None:
    real_pwrite = os.pwrite
    calls = iter([lambda fd, data, at: real_pwrite(fd, bytes(data)[:3], at), _no_space])
    log.append(b"kept-")
    monkeypatch.setattr(os, "pwrite", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(DiskFull):
        log.append(b"lostlost")
    monkeypatch.undo()
    assert log.size() == 5
    log.append(b"next")
    assert log.pread(9, 0) == b"kept-next"


@pytest.mark.parametrize(("written_bytes", "has_effect"), [
    (0, False), (7, False), (8, True), (100, True), (durable.PAGE_BYTES, True)])
def test_an_append_has_an_effect_exactly_if_all_of_it_was_written(
        log: durable.DiskFile, monkeypatch: pytest.MonkeyPatch, written_bytes: int,
        has_effect: bool) -> None:
    """Zeros follow it to the end of its page, and the disk may be full within them."""
    log.reserve(2 * durable.PAGE_BYTES)
    real_pwrite = os.pwrite
    calls = iter([lambda fd, data, at: real_pwrite(fd, bytes(data)[:written_bytes], at)]
                 if written_bytes else [])
    monkeypatch.setattr(os, "pwrite", lambda *arguments: next(calls, _no_space)(*arguments))
    try:
        log.append(b"12345678")
    except DiskFull:
        assert not has_effect
    else:
        assert has_effect
    assert (log.pread(8, 0) == b"12345678") is has_effect
    assert log.size() == 8 * has_effect
    monkeypatch.undo()
    log.append(b"next")
    assert log.pread(4, 8 * has_effect) == b"next"


def _no_space(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- a full disk -----------------------------------------------------------------------------


def test_full_device_on_append(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    file = OsDisk().open_append(tmp_path / "log")
    with pytest.raises(DiskFull, match=str(tmp_path / "log")) as caught:
        file.append(b"x")
    file.close()
    assert caught.value.grpc_status == "RESOURCE_EXHAUSTED"
    assert caught.value.remedy


def test_full_device_on_replace_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=str(path)):
        OsDisk().replace(path, NEW)
    assert path.read_bytes() == OLD


@pytest.mark.parametrize(("code", "expected"), [
    (errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, OSError),
    (errno.EROFS, OSError)])
def test_which_errors_mean_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int,
                                       expected: type[Exception]) -> None:
    monkeypatch.setattr(durable, "os", RecordingOs(fail_at=1, error=code))
    with pytest.raises(expected) as caught:
        OsDisk().replace(tmp_path / "file", NEW)
    assert type(caught.value) is expected


@pytest.mark.parametrize("refused", ["open", "replace"])
def test_a_disk_without_room_for_a_name_is_full(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """A new file needs an inode, and its name may need another block of the directory."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with monkeypatch.context() as patched:
        patched.setattr(os, refused, _no_space)
        with pytest.raises(DiskFull, match=str(path)):
            OsDisk().replace(path, NEW)
    assert path.read_bytes() == OLD
    OsDisk().replace(path, NEW)
    assert path.read_bytes() == NEW


def test_a_directory_that_cannot_be_synced_is_no_full_disk(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the new name is on the disk is not known then, so it must not look repeatable."""
    monkeypatch.setattr(durable, "os", RecordingOs(fail_at=5, error=errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as caught:
        OsDisk().replace(tmp_path / "file", b"ab")
    assert not isinstance(caught.value, DiskFull)


# --- the file-system probe -------------------------------------------------------------------


class FailingDisk(OsDisk):
    """A file system that lacks one step."""

    def __init__(self, step: str) -> None:
        self._step = step

    def sync_directory(self, path: Path) -> None:
        if self._step == "sync_directory":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        if self._step == "rename":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        super().rename(source, target)

    def read(self, path: Path) -> bytes:
        return b"" if self._step == "read" else super().read(path)


def test_probe_passes_and_leaves_nothing(tmp_path: Path) -> None:
    probe_file_system(OsDisk(), tmp_path)
    assert OsDisk().list(tmp_path) == []


@pytest.mark.parametrize("step", ["sync_directory", "rename", "read"])
def test_probe_refuses(tmp_path: Path, step: str) -> None:
    with pytest.raises(UnsupportedFileSystem, match=str(tmp_path)) as caught:
        probe_file_system(FailingDisk(step), tmp_path)
    assert "--raftDataDir" in caught.value.remedy


def test_probe_refuses_a_real_file_system_that_cannot() -> None:
    with pytest.raises(UnsupportedFileSystem, match="/proc"):
        probe_file_system(OsDisk(), Path("/proc"))


def test_probe_of_a_full_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / ".probe.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        probe_file_system(OsDisk(), tmp_path)
