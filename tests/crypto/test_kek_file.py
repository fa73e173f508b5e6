"""The KEK file: each way it can be wrong is a KekError that names the file and the remedy."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.crypto import kek_file
from elastickv.crypto.kek_file import FileKekProvider, write_kek_file
from elastickv.errors import KekError

KEY = bytes(range(32))


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    path.write_bytes(data)
    path.chmod(mode)


def test_a_good_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    write(path, KEY)
    kek = FileKekProvider(path).load()
    assert kek.unwrap(kek.wrap(bytes(32))) == bytes(32)
    assert str(path) in repr(kek)


def test_read_only_for_the_owner_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "kek", KEY, 0o400)
    FileKekProvider(tmp_path / "kek").load()


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "..data", KEY)
    (tmp_path / "kek").symlink_to("..data")
    FileKekProvider(tmp_path / "kek").load()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


WRONG: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "31 bytes": lambda path: write(path, KEY[:-1]),
    "33 bytes": lambda path: write(path, KEY + b"\n"),
    "empty": lambda path: write(path, b""),
    "hex text": lambda path: write(path, KEY.hex().encode()),
    "mode 0644": lambda path: write(path, KEY, 0o644),
    "mode 0640": lambda path: write(path, KEY, 0o640),
    "mode 0602": lambda path: write(path, KEY, 0o602),
    "mode 0610": lambda path: write(path, KEY, 0o610),
    "directory": lambda path: path.mkdir(mode=0o700),
    "fifo": lambda path: os.mkfifo(path, 0o600),
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to a readable file": lambda path: (write(path.parent / "target", KEY, 0o644),
                                             path.symlink_to("target")),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.timeout(10)
def test_a_wrong_file_is_refused_by_name_without_blocking(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kek"
    WRONG[name](path)
    with pytest.raises(KekError) as caught:
        FileKekProvider(path).load()
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    assert KEY.hex() not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.timeout(10)
def test_a_fifo_with_a_writer_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    os.mkfifo(path, 0o600)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    try:
        os.write(writer, KEY)
        with pytest.raises(KekError, match="not a regular file"):
            FileKekProvider(path).load()
    finally:
        os.close(writer)
        os.close(reader)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kek"
    write(path, KEY)
    owner = path.stat().st_uid
    monkeypatch.setattr(kek_file, "_ROOT_UID", owner + 2)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(KekError, match=f"belongs to user {owner}") as caught:
        FileKekProvider(path).load()
    # Who looks need not be who runs the node.
    assert str(owner + 1) not in caught.value.remedy
    assert "the user that runs the node" in caught.value.remedy


def test_a_file_swapped_after_it_was_opened_changes_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks see the opened file, not what the name points to later."""
    path = tmp_path / "kek"
    write(path, KEY, 0o644)
    real_open = os.open

    def open_then_swap(name: Path, flags: int) -> int:
        descriptor = real_open(name, flags)
        path.unlink()
        write(path, KEY)
        return descriptor

    monkeypatch.setattr(os, "open", open_then_swap)
    with pytest.raises(KekError, match="mode 0644"):
        FileKekProvider(path).load()


def test_a_written_kek_is_owner_only_random_and_loads(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        write_kek_file(tmp_path / "one")
        write_kek_file(tmp_path / "two")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()
    FileKekProvider(tmp_path / "one").load()


def test_a_kek_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    write(path, KEY)
    with pytest.raises(KekError, match="File exists"):
        write_kek_file(path)
    assert path.read_bytes() == KEY


def test_two_writers_at_once_make_one_kek(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    failures: list[KekError] = []

    def attempt() -> None:
        try:
            write_kek_file(path)
        except KekError as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 3
    FileKekProvider(path).load()


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(KekError, match="No such file or directory"):
        write_kek_file(tmp_path / "missing" / "kek")
