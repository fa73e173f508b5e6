"""Clock steps, I/O errors and full disks reach a real process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jepsen import preload
from jepsen.cluster import Cluster, ClusterOptions
from jepsen.network import Unsupported
from jepsen.network.proxy import ProxyNetwork
from jepsen.preload import Preload, PreloadFiles
from jepsen.processes import NodeProcess

PATIENCE_S = 30.0


def installed(library: Preload) -> bool:
    try:
        return bool(preload.find_libraries(library))
    except Unsupported:
        return False


@contextlib.contextmanager
def as_somebody_else() -> Iterator[None]:
    """Another user may not look into the processes of this one."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class Child:
    """A Python process that answers each line of its input with one of output."""

    def __init__(self, code: str, files: PreloadFiles, *libraries: Preload) -> None:
        environment = {**os.environ, **preload.environment(libraries, files)}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", "import os, sys, time\nfor line in sys.stdin:\n" + code],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def files(tmp_path: Path) -> PreloadFiles:
    prepared = PreloadFiles(tmp_path / "control")
    prepared.prepare()
    return prepared


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.communicate()
    preload.remove_shared([child.process.pid for child in started])


@pytest.mark.skipif(not installed(Preload.FAKETIME), reason="libfaketime is not installed")
def test_the_wall_clock_steps_and_the_monotonic_one_does_not(files: PreloadFiles,
                                                             children: list[Child]) -> None:
    child = Child("    print(time.time(), time.monotonic())\n", files, Preload.FAKETIME)
    children.append(child)

    def offsets() -> tuple[int, int]:
        wall, monotonic = map(float, child.ask().split())
        return round((wall - time.time()) / 100), round((monotonic - time.monotonic()) / 100)

    assert offsets() == (0, 0)
    for offset_s, seen in ((-86_400, -864), (600, 6), (0, 0)):
        files.set_clock(offset_s)
        deadline = time.monotonic() + PATIENCE_S
        while offsets() != (seen, 0):
            assert time.monotonic() < deadline, f"the clock did not step to {offset_s} s"


def reads_are_noted(files: PreloadFiles) -> bool:
    """Whether the file system says when a file was read."""
    files.clock.read_text()
    return files.clock_was_read()


@pytest.mark.skipif(not installed(Preload.FAKETIME), reason="libfaketime is not installed")
def test_who_looks_at_its_clock_is_seen(files: PreloadFiles, children: list[Child]) -> None:
    child = Child("    print(time.time())\n", files, Preload.FAKETIME)
    children.append(child)
    child.ask()
    if not reads_are_noted(files):
        pytest.skip("the file system does not note reads")
    for offset_s in (600, 0):
        files.set_clock(offset_s)
        deadline = time.monotonic() + PATIENCE_S
        while not files.clock_was_read():
            assert time.monotonic() < deadline, "nobody looked at the clock"
            child.ask()


def test_a_clock_that_was_set_is_not_read_yet(files: PreloadFiles) -> None:
    assert not files.clock_was_read()
    reads_are_noted(files)
    files.set_clock(5)
    assert not files.clock_was_read()


@pytest.mark.skipif(not installed(Preload.FAKETIME), reason="libfaketime is not installed")
def test_a_library_is_looked_for_in_the_process(files: PreloadFiles,
                                                children: list[Child]) -> None:
    for libraries, loaded in (((Preload.FAKETIME,), True), ((), False)):
        children.append(child := Child("    print()\n", files, *libraries))
        child.ask()
        assert preload.is_loaded(child.process.pid, Preload.FAKETIME) is loaded
        with as_somebody_else():
            assert preload.is_loaded(child.process.pid, Preload.FAKETIME) is None
        child.process.kill()
        child.process.wait()
        assert preload.is_loaded(child.process.pid, Preload.FAKETIME) is None


def shared(pid: int) -> list[Path]:
    return list(preload.SHARED_MEMORY.glob(f"*faketime_*_{pid}"))


@pytest.mark.skipif(not installed(Preload.FAKETIME), reason="libfaketime is not installed")
async def test_nodes_that_were_killed_leave_nothing_in_shared_memory(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, ProxyNetwork(), ClusterOptions(
        node_count=1, preloads=frozenset({Preload.FAKETIME})), time.monotonic_ns)
    (tmp_path / "cluster").mkdir()
    files = cluster.preload_files("n1")
    files.prepare()
    node = NodeProcess("n1", ["sleep", "60"],
                       {**os.environ, **preload.environment([Preload.FAKETIME], files)},
                       tmp_path / "n1.log", time.monotonic_ns)
    cluster.processes["n1"] = node
    for _ in range(2):
        await node.start()
        deadline = time.monotonic() + PATIENCE_S
        while not shared(node.pid):
            assert time.monotonic() < deadline, "libfaketime shares nothing"
            await asyncio.sleep(0.01)
        await node.kill()
    assert all(map(shared, node.pids))
    await cluster.close()
    assert not any(map(shared, node.pids))


@pytest.mark.skipif(not installed(Preload.FIU), reason="libfiu is not installed")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_writes_fail_while_they_are_told_to(files: PreloadFiles, children: list[Child],
                                            tmp_path: Path, number: int) -> None:
    child = Child(f"""
    descriptor = os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(descriptor, b"x", 0)
        os.fdatasync(descriptor)
        answer = "ok"
    except OSError as error:
        answer = str(error.errno)
    os.close(descriptor)
    print(answer)
""", files, Preload.FIU)
    children.append(child)
    assert child.ask() == "ok"
    pid = child.process.pid
    for call in ("posix/io/rw/pwrite", "posix/io/sync/fdatasync"):
        preload.control_fiu(files, pid, f"enable_random name={call},probability=1,"
                                        f"failinfo={number}")
        assert child.ask() == str(number)
        preload.control_fiu(files, pid, f"disable name={call}")
        assert child.ask() == "ok"


@pytest.mark.parametrize("call", [preload.keep_and_unmount, lambda disk: preload.mount_small_disk(
    disk, 1)], ids=["unmount", "mount"])
def test_mounting_is_not_interrupted_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  call: Callable[[Path], None]) -> None:
    program = f"#!/bin/sh\nread -r pid name state parent group rest < /proc/$$/stat\n" \
              f"echo $group > {tmp_path}/group; echo $$ > {tmp_path}/process\n"
    for name in ("mount", "umount"):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    disk = tmp_path / "disk"
    disk.mkdir()
    call(disk)
    assert (tmp_path / "group").read_text().split() == (tmp_path / "process").read_text().split()


@pytest.mark.skipif(not preload.can_mount(), reason="mounting needs root")
def test_a_small_disk_fills_empties_and_leaves_its_content(tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    preload.mount_small_disk(directory, 2)
    (directory / "data").write_bytes(b"kept")
    try:
        assert 1_900_000 < preload.fill_disk(directory) <= 2 << 20
        with pytest.raises(OSError, match="No space left") as caught:
            (directory / "more").write_bytes(b"x" * 5000)
        assert caught.value.errno == errno.ENOSPC
        preload.empty_disk(directory)
        (directory / "more").write_bytes(b"x" * 5000)
        preload.fill_disk(directory)
    finally:
        preload.keep_and_unmount(directory)
    assert not directory.is_mount()
    assert sorted(path.name for path in directory.iterdir()) == ["data", "more"]
    assert (directory / "data").read_bytes() == b"kept"


@pytest.mark.parametrize("says", ["", "Error: unknown pid, skipping"])
def test_libfiu_is_told_by_paths_without_spaces_and_believed_only_if_it_says_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """Debian's fiu-ctrl cuts paths at spaces, and exits with 0 whatever it skips."""
    (tmp_path / "a node").mkdir()
    program = tmp_path / "fiu-ctrl"
    program.write_text(f'#!/bin/sh\necho "$PWD" "$2" > "{tmp_path}/told"\nprintf "{says}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    files = PreloadFiles(tmp_path / "a node")
    with pytest.raises(Unsupported, match=says) if says else contextlib.nullcontext():
        preload.control_fiu(files, 1, "disable name=posix/io/*")
    assert (tmp_path / "told").read_text() == f"{tmp_path}/a node fiu\n"
