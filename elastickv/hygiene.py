"""What a process can do so that the keys in its memory stay there.

Core dumps: RLIMIT_CORE is 0 (soft and hard, so that nothing below can raise it again), and the
process is not dumpable, which also covers dumps into a pipe, for which the kernel ignores the
limit, and denies ptrace and /proc/<pid>/mem to other processes of the same user. (prctl(2),
core(5))

Swap: the writable anonymous mappings, where every Python object and OpenSSL context lives, are
locked with MLOCK_ONFAULT: pages stay once they are used, unused ones take no memory. It is not
mlockall(2): that would also pin every page of the store's file that is ever read, and with
MCL_FUTURE make each later mapping fail that does not fit RLIMIT_MEMLOCK. Stacks are left out: a
locked stack that grows past the limit is a SIGSEGV. Without CAP_IPC_LOCK or an unlimited
RLIMIT_MEMLOCK nothing is locked. Memory that is mapped later is not covered until the next call.

Nothing here can fail a start: what was not achieved is in the result.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

PR_SET_DUMPABLE: Final = 4
MLOCK_ONFAULT: Final = 1
CAP_IPC_LOCK: Final = 14
_STATUS: Final = Path("/proc/self/status")
_MAPS: Final = Path("/proc/self/maps")


class MemoryLock(NamedTuple):
    """`locked_bytes` of address space; `problem` says why it is not everything, "" = it is."""

    locked_bytes: int
    problem: str


def disable_core_dumps() -> str:
    """No core file of this process from here on. Returns what could not be done, "" = nothing."""
    problems = []
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        problems.append(f"RLIMIT_CORE: {error}")
    try:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
            problems.append(f"PR_SET_DUMPABLE: {os.strerror(ctypes.get_errno())}")
    except (OSError, AttributeError) as error:
        problems.append(f"PR_SET_DUMPABLE: {error}")
    return "; ".join(problems)


def has_capability(status: str, capability: int) -> bool:
    """Whether the text of /proc/<pid>/status lists `capability` as effective."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> capability & 1)
    return False


def writable_anonymous(maps: str) -> Iterator[tuple[int, int]]:
    """`(address, size)` of every mapping of /proc/<pid>/maps that can hold this process's own
    objects: private, writable, of no file, and no stack.

        address-address perms offset dev inode [name]
    """
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 5 or not fields[1].startswith("rw") or fields[1][3:] != "p":
            continue
        name = fields[5] if len(fields) > 5 else ""
        if fields[4] != "0" or (name not in ("", "[heap]") and not name.startswith("[anon")):
            continue
        start, _, end = fields[0].partition("-")
        yield int(start, 16), int(end, 16) - int(start, 16)


def may_lock(limit: int, status: str) -> bool:
    """Whether locking is without a limit; `limit` is the soft RLIMIT_MEMLOCK."""
    return limit == resource.RLIM_INFINITY or has_capability(status, CAP_IPC_LOCK)


def lock_memory() -> MemoryLock:
    """Keep what is in memory now out of the swap. Safe to call again, after keys came."""
    try:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if not may_lock(limit, _STATUS.read_text()):
            return MemoryLock(0, f"RLIMIT_MEMLOCK is {limit} bytes, must be unlimited")
        mlock2 = ctypes.CDLL(None, use_errno=True).mlock2
        maps = _MAPS.read_text()
    except (OSError, AttributeError) as error:
        return MemoryLock(0, str(error))
    mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    locked, problem = 0, ""
    for address, size in writable_anonymous(maps):
        if mlock2(address, size, MLOCK_ONFAULT) == 0:
            locked += size
        else:
            problem = f"mlock2: {os.strerror(ctypes.get_errno())}"
    return MemoryLock(locked, problem)
