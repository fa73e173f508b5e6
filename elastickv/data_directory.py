"""Who uses a data directory: the lock that a running node holds, a look at it from outside, whose
it is, and what a failure of its disk means."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shlex
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

from elastickv.errors import (
    DISK_FAILED_REMEDY,
    DiskFailed,
    DiskFull,
    ElasticKVError,
    OperatorError,
)
from elastickv.keys.guards import AlreadyRunning, DataDirectoryUnusable
from elastickv.raft.hardstate import FILE_NAME as HARD_STATE

LOCK_FILE: Final = "LOCK"
LOOK_S: Final = 0.005
"""Far longer than a look holds the lock."""
LOOKS_TO_OUTWAIT: Final = 2
_ACCESS_REMEDY: Final = ("make the directory writable for the user that runs the node, or choose"
                         " another --raftDataDir")

_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of the system that say nothing of a disk."""
_NO_FILE: Final = (ConnectionError, TimeoutError, BlockingIOError, socket.gaierror, ssl.SSLError)
_OF_A_SOCKET: Final = frozenset({
    errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EDESTADDRREQ, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EISCONN, errno.EMSGSIZE, errno.ENETDOWN, errno.ENETRESET,
    errno.ENETUNREACH, errno.ENOPROTOOPT, errno.ENOTCONN, errno.ENOTSOCK,
    errno.EPROTONOSUPPORT})
"""Those that have no class of their own."""


class Seen(NamedTuple):
    """What `look` found: whether a process uses the directory, and why a node cannot; "" = it can.
    """

    in_use: bool = False
    problem: str = ""
    remedy: str = ""


def take(directory: Path) -> int:
    """Take the directory for this process; returns the descriptor that holds the lock.

    Raises `DataDirectoryUnusable`, `AlreadyRunning`.
    """
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataDirectoryUnusable(f"{directory} cannot be written: {error.strerror}",
                                    remedy=_ACCESS_REMEDY) from None
    for _ in range(LOOKS_TO_OUTWAIT):
        if _lock(descriptor):
            return descriptor
        time.sleep(LOOK_S)
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    raise AlreadyRunning(f"{directory} is in use by another process",
                         remedy="stop that node, or choose another --raftDataDir")


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def look(directory: Path) -> Seen:
    """Whether `take` would succeed, with nothing taken, made or written."""
    try:
        os.stat(directory)
    except FileNotFoundError:
        return Seen()
    except OSError as error:
        return Seen(problem=f"{directory} cannot be reached: {error.strerror}",
                    remedy=_ACCESS_REMEDY)
    if not directory.is_dir():
        return Seen(problem=f"{directory} is not a directory",
                    remedy="choose another --raftDataDir")
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return Seen(problem=f"{directory} cannot be read and written by this user",
                    remedy=_ACCESS_REMEDY)
    return _look_at_lock(directory)


def _look_at_lock(directory: Path) -> Seen:
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return Seen()
    except OSError as error:
        return Seen(problem=f"{directory / LOCK_FILE} cannot be read: {error.strerror}",
                    remedy=_ACCESS_REMEDY)
    try:
        # Shared, so that two looks do not see each other, and given back at once: a node that
        # starts in this moment outwaits it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return Seen(True, f"a node runs on {directory}",
                    "nothing if it is meant to run; stop it before another is started here")
    finally:
        os.close(descriptor)
    return Seen()


def other_owner(directory: Path) -> str:
    """The user that the node runs as, as sudo -u takes it, if it is not the one that runs this; ""
    when it is, or when there is no data yet."""
    try:
        # Written at every start of a node.
        owner = os.stat(directory / "raft" / HARD_STATE).st_uid
    except PermissionError:
        owner = os.stat(directory).st_uid
    except OSError:
        return ""
    if owner == os.geteuid():
        return ""
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"#{owner}"


def program() -> str:
    """This program, as a shell takes it under whatever PATH."""
    path = Path(sys.executable).with_name("elastickv")
    return shlex.quote(str(path)) if path.exists() else "elastickv"


def as_user(owner: str, command: str) -> str:
    """How to run a command of this program as `owner`, which is what `other_owner` says."""
    return (f"run it as that user: sudo -u {shlex.quote(owner)} {program()} {command} (sudo takes"
            " no ELASTICKV_ variable along: give options, with files that the user may read)")


def failure_of(error: BaseException) -> BaseException:
    """`error`; an `OSError` of a file as what an operator can act on. One of a connection is a
    defect wherever it was not foreseen, and stays as it is."""
    if isinstance(error, OSError) and not isinstance(error, _NO_FILE) \
            and error.errno not in _OF_A_SOCKET:
        return file_failure(error)
    return error


def file_failure(error: OSError) -> ElasticKVError:
    """What the failure of a file means. The traceback stays, to tell which call it was."""
    return _typed(error).with_traceback(error.__traceback__)


def _typed(error: OSError) -> ElasticKVError:
    reason = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _OUT_OF_RESOURCES:
        return OperatorError(f"the system refused the node a resource: {reason}{where}",
                             remedy="raise the limits of the node's user, and start it again")
    if isinstance(error, PermissionError):
        return DataDirectoryUnusable(
            f"{error.filename or 'the data directory'} cannot be used: {reason}",
            remedy="give the data directory with everything in it to the user that runs the node"
                   " (chown -R)")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # As of an fsync, where what was written is not known to be on the disk any more.
        return DiskFull(f"no space left: {reason}{where}",
                        remedy="free space on the data directory's file system, and start the node"
                               " again")
    return DiskFailed(f"the disk of the data directory failed: {reason}{where}",
                      remedy=DISK_FAILED_REMEDY)
