"""The audit of a large file beside a running node, in a process of its own.

The child opens a read transaction first, which keeps the audited state from being overwritten, says
so, and only then does the node start to write. Run as `python -m elastickv.store.audit_process
FILE`:

    stdout: "pinned\\n", then "ok\\n" or one line with what is damaged
    exit status: 0 sound, 5 damaged, 10 a read failed, anything else: the audit itself failed

Only damage and a disk that fails stop the node. An audit that failed otherwise (the kernel took its
memory for somebody else, say) is logged: the file is sound as far as anybody knows, and the next
start audits it again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import lmdb

from elastickv.errors import JOIN_ANEW_REMEDY, ExitCode, StoreCorrupt
from elastickv.logs import get_logger
from elastickv.store.audit import audit_file
from elastickv.store.lmdb_environment import CORRUPT_ERRORS, prepare_lock_file

_PINNED = b"pinned\n"

log = get_logger("elastickv.store.audit")

_FAULTS = frozenset({signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT})
"""Signals that the file itself causes. Others (SIGKILL of the kernel or a person) say nothing."""

# About a tenth of a busy core: the node's own work comes first, and yet the audit ends in minutes,
# because the state that it pins makes the file grow under writes.
NICENESS = 10


class BackgroundAudit:
    """A child process that audits `path`. The constructor returns when the state is pinned."""

    def __init__(self, path: Path) -> None:
        """Raises what `poll` raises, of what the child finds before it has pinned anything, and
        `DiskFull`. This process must not have the file open."""
        self._path = path
        prepare_lock_file(path)
        # S603: a fixed argument list of this interpreter and this package.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, start_new_session=True)  # Ctrl-C is for the node
        stdout = self._process.stdout
        first = stdout.readline() if stdout is not None else b""
        if first != _PINNED:
            self._process.wait()
            self._require_no_finding(first.decode(errors="replace").strip())

    def poll(self) -> bool:
        """Whether the audit is still under way. Raises `StoreCorrupt` when it found damage, or died
        of it, and `OSError` when the disk failed a read."""
        status = self._process.poll()
        if status is None:
            return True
        output = self._read()
        self._require_no_finding(output)
        if status != 0:
            log.warning("the store was not audited", path=str(self._path), status=status,
                        detail=output)
        return False

    def _require_no_finding(self, output: str) -> None:
        """Of a child that has ended."""
        status = self._process.returncode
        if status == ExitCode.DISK_FAILED:
            self.stop()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._path))
        if status == ExitCode.CORRUPTION or -status in _FAULTS:
            self.stop()
            raise StoreCorrupt(
                f"the audit of {self._path} found damage: {output or f'status {status}'}",
                remedy=JOIN_ANEW_REMEDY)

    def _read(self) -> str:
        stdout = self._process.stdout
        if stdout is None or stdout.closed:
            return ""
        with stdout:
            return stdout.read().decode(errors="replace").strip()

    def stop(self) -> None:
        """End the child. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _say_pinned() -> None:
    sys.stdout.buffer.write(_PINNED)
    sys.stdout.buffer.flush()


def main(path: Path) -> int:
    """The child. Prints as the module says; the exit status."""
    os.nice(NICENESS)
    try:
        with contextlib.closing(lmdb.open(str(path), subdir=False, readonly=True, max_dbs=8,
                                          create=False)) as environment, \
                environment.begin() as txn:
            audit_file(path, txn.id(), on_meta=_say_pinned)
    except StoreCorrupt as error:
        print(error.message, flush=True)
        return ExitCode.CORRUPTION
    except lmdb.Error as error:
        print(f"LMDB: {error}", flush=True)
        if isinstance(error, CORRUPT_ERRORS):
            return ExitCode.CORRUPTION
        return ExitCode.DISK_FAILED if error.code == errno.EIO else ExitCode.ERROR
    except (OSError, MemoryError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        failed = isinstance(error, OSError) and error.errno == errno.EIO
        return ExitCode.DISK_FAILED if failed else ExitCode.ERROR
    print("ok", flush=True)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
