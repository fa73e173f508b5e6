"""What happens below a node: clock steps, I/O errors, a full disk.

* **Clock**: libfaketime, preloaded, reads an offset from a file, so that a step takes effect while
  the node runs. Monotonic time is left alone, as when a real clock is set.
* **I/O errors**: libfiu's POSIX preload, told at run time through a named pipe which calls fail.
* **Full disk**: the data directory is a small tmpfs; a ballast file takes what is left of it.
  Without root, libfiu makes writes fail with ENOSPC instead.

Each needs a Debian package (`jepsen/install.sh`) or root; what is missing is `Unsupported`.
"""

from __future__ import annotations

import enum
import errno
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jepsen.network import Unsupported

BALLAST = "ballast"
CLOCK_DELAY_S = 2.0
"""Nodes look at their offset when the second since they last did is over: a look at every reading
of a clock takes most of a processor."""
CONTROL_TIMEOUT_S = 10.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""Where Linux keeps what shm_overview(7) and sem_overview(7) name."""

_INSTALL = "run jepsen/install.sh"
_LIBRARY_ROOTS = (Path("/usr/lib"), Path("/usr/local/lib"))


class Preload(enum.StrEnum):
    """A library to be preloaded into the nodes."""

    FAKETIME = "faketime"
    FIU = "fiu"


_PATTERNS = {
    Preload.FAKETIME: ("*/faketime/libfaketimeMT.so.1", "faketime/libfaketimeMT.so.1"),
    Preload.FIU: ("fiu/fiu_run_preload.so", "fiu/fiu_posix_preload.so"),
}


@dataclass(frozen=True, slots=True)
class PreloadFiles:
    """Where one node's preloaded libraries are told what to do."""

    directory: Path

    @property
    def clock(self) -> Path:
        """libfaketime's offset file."""
        return self.directory / "clock"

    @property
    def fiu_pipe_prefix(self) -> Path:
        """libfiu appends `-<pid>.in` and `-<pid>.out`."""
        return self.directory / "fiu"

    def prepare(self) -> None:
        """Make the directory, with the clock at real time."""
        self.directory.mkdir()
        self.set_clock(0.0)

    def set_clock(self, offset_s: float) -> None:
        """Step the node's wall clock to real time + `offset_s`, within `CLOCK_DELAY_S`."""
        temporary = self.clock.with_suffix(".new")
        temporary.write_text(f"{offset_s:+.3f}s\n")
        # Read at 0, that is never: see `clock_was_read`. `relatime` notes a read when the last one
        # is older than a day.
        os.utime(temporary, (0, 0))
        os.replace(temporary, self.clock)

    def clock_was_read(self) -> bool:
        """Whether anybody has looked at the offset since it was set. Never where the file system
        does not note reads (`noatime`)."""
        return self.clock.stat().st_atime_ns > 0


def find_libraries(library: Preload) -> list[Path]:
    """The shared objects to preload. Raises `Unsupported` when they are not installed."""
    found: list[Path] = []
    for pattern in _PATTERNS[library]:
        for root in _LIBRARY_ROOTS:
            found += sorted(root.glob(pattern))
    wanted = 2 if library is Preload.FIU else 1
    if len(found) < wanted:
        raise Unsupported(f"lib{library.value} is not installed ({_INSTALL})")
    return found[:wanted]


def environment(preloads: Iterable[Preload], files: PreloadFiles) -> dict[str, str]:
    """The variables under which a node runs with `preloads`. Raises `Unsupported`."""
    libraries: list[str] = []
    variables: dict[str, str] = {}
    for library in sorted(preloads):
        libraries += map(str, find_libraries(library))
        if library is Preload.FAKETIME:
            variables.update(FAKETIME_TIMESTAMP_FILE=str(files.clock), FAKETIME_CACHE_DURATION="1",
                             FAKETIME_DONT_FAKE_MONOTONIC="1", FAKETIME_DONT_RESET="1")
        else:
            variables["FIU_CTRL_FIFO"] = str(files.fiu_pipe_prefix)
    if libraries:
        variables["LD_PRELOAD"] = ":".join(libraries)
    return variables


def is_loaded(pid: int, library: Preload) -> bool | None:
    """Whether the process has `library` mapped: a preload that cannot be loaded is only warned
    about. None where the kernel does not tell: of a process that has ended, and of a node, which
    hides its memory from other processes of the same user."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return None
    if not maps:
        return None
    return all(str(path.resolve()) in maps or str(path) in maps for path in find_libraries(library))


def remove_shared(pids: Iterable[int], directory: Path = SHARED_MEMORY) -> None:
    """Remove what libfaketime shares between a process and its children: one that is killed leaves
    it behind, and a later one of the same number would go without."""
    for pid in pids:
        for name in ("faketime_shm", "sem.faketime_sem"):
            (directory / f"{name}_{pid}").unlink(missing_ok=True)


def free_bytes(directory: Path) -> int:
    """What still fits on the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def control_fiu(files: PreloadFiles, pid: int, command: str) -> None:
    """Give the running process one libfiu command, for example
    `enable_random name=posix/io/rw/write,probability=0.1,failinfo=5`. Raises `Unsupported`."""
    program = shutil.which("fiu-ctrl")
    if program is None:
        raise Unsupported(f"fiu-ctrl is not installed ({_INSTALL})")
    try:
        result = subprocess.run(
            # It is a shell script that cuts paths at spaces.
            [program, "-f", files.fiu_pipe_prefix.name, "-c", command, str(pid)],
            cwd=files.directory, capture_output=True, text=True, timeout=CONTROL_TIMEOUT_S,
            check=False)
    except subprocess.TimeoutExpired:
        raise Unsupported(f"libfiu in process {pid} did not answer within "
                          f"{CONTROL_TIMEOUT_S:g} s") from None
    if result.returncode or result.stdout.strip():  # what it skips, it says there, and exits with 0
        raise Unsupported(f"fiu-ctrl: {result.stderr.strip() or result.stdout.strip()}")


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a file system: root may, unless it is confined."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory(prefix="jepsen-mount-") as directory:
        try:
            mount_small_disk(Path(directory), 1)
        except Unsupported:
            return False
        subprocess.run(["umount", directory], check=True, start_new_session=True)
    return True


def mount_small_disk(directory: Path, size_mib: int) -> None:
    """Mount a tmpfs of `size_mib` on `directory`. Raises `Unsupported`."""
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "jepsen", str(directory)],
        capture_output=True, text=True, check=False, start_new_session=True)
    if result.returncode:
        raise Unsupported(f"a small disk cannot be mounted: {result.stderr.strip()}")


def keep_and_unmount(directory: Path) -> None:
    """Unmount, leaving a copy of the content in the directory itself."""
    aside = directory.with_name(directory.name + ".kept")
    try:
        shutil.copytree(directory, aside, ignore=shutil.ignore_patterns(BALLAST))
    finally:
        # A terminal interrupts whole process groups, and the commands that clean up with them.
        subprocess.run(["umount", "-l", str(directory)], check=True, start_new_session=True)
    directory.rmdir()
    aside.rename(directory)


def fill_disk(directory: Path) -> int:
    """Write a ballast file until nothing more fits; its size in bytes. Raises `OSError` for what
    is no full disk."""
    written = 0
    with (directory / BALLAST).open("wb", buffering=0) as ballast:
        for block in (1 << 20, 4096, 1):
            try:
                while True:
                    written += ballast.write(b"\0" * block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return written


def empty_disk(directory: Path) -> None:
    """Remove the ballast."""
    (directory / BALLAST).unlink(missing_ok=True)
