"""The KEK in a file: exactly 32 bytes, regular, and readable by its owner alone.

All checks are made on the opened descriptor, so nothing can be swapped between check and read.
Symbolic links are followed: mounted secrets are links to the current version.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from elastickv.crypto.kek import KEK_BYTES, Kek
from elastickv.errors import KekError, KekTooOpen

_ROOT_UID = 0


class FileKekProvider:
    """Loads the KEK of `--kekFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Kek:
        """Raises `KekError` naming the file and the remedy. Does not block on a FIFO."""
        try:
            descriptor = os.open(self.path,
                                 os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise KekError(f"cannot open the KEK file {self.path}: {error.strerror}",
                           remedy=self._remedy(error)) from None
        try:
            self._check(os.fstat(descriptor))
            return Kek(self._read(descriptor), source=str(self.path))
        finally:
            os.close(descriptor)

    def _remedy(self, error: OSError) -> str:
        if isinstance(error, PermissionError):
            return ("run this as the user that runs the node; the file must be that user's, with"
                    " mode 600, in a directory that the user may enter")
        return f"point --kekFile at a readable file of exactly {KEK_BYTES} bytes"

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise KekError(f"the KEK file {self.path} is not a regular file",
                           remedy=f"point --kekFile at a regular file of {KEK_BYTES} bytes")
        if status.st_uid not in (os.geteuid(), _ROOT_UID):
            raise KekTooOpen(f"the KEK file {self.path} belongs to user {status.st_uid}",
                             remedy="give it to the user that runs the node, with chown")
        if status.st_mode & 0o077:
            raise KekTooOpen(
                f"the KEK file {self.path} has mode {stat.S_IMODE(status.st_mode):04o}:"
                " others can access it", remedy=f"chmod 600 {self.path}")
        if status.st_size != KEK_BYTES:
            raise KekError(f"the KEK file {self.path} has {status.st_size} bytes,"
                           f" must be exactly {KEK_BYTES}",
                           remedy="supply the raw key, without encoding or line end")

    def _read(self, descriptor: int) -> bytes:
        try:
            key = os.read(descriptor, KEK_BYTES + 1)
        except OSError as error:
            raise KekError(f"cannot read the KEK file {self.path}: {error.strerror}",
                           remedy="check the file system that holds it") from None
        if len(key) != KEK_BYTES:
            raise KekError(f"the KEK file {self.path} changed while it was read",
                           remedy="write the file once, then start the node")
        return key


def write_kek_file(path: Path) -> None:
    """Create `path` with a new random KEK, owner-only and durable.

    Raises `KekError` when the path exists (a KEK is never overwritten) or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KekError(f"cannot create the KEK file {path}: {error.strerror}",
                       remedy="choose a path that does not exist in a writable directory") from None
    try:
        _write_key(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise KekError(f"cannot write the KEK file {path}: {error.strerror}",
                       remedy="free space on its file system") from None
    finally:
        os.close(descriptor)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_key(descriptor: int) -> None:
    view = memoryview(os.urandom(KEK_BYTES))
    while view:
        view = view[os.write(descriptor, view):]
    os.fsync(descriptor)
