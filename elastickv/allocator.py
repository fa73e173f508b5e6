"""The C library's allocator, set for a process that frees and takes the same memory all day.

A flush frees the megabytes that the next one needs again. By default glibc gives the top of its
heap back above 128 KiB of it and maps large blocks one by one, so that the kernel must find and
zero a page for every 4 KiB that a node writes. Freed memory is kept instead, up to a bound. Blocks
above `MMAP_THRESHOLD_BYTES` are still mapped on their own and given back. (mallopt(3))
"""

from __future__ import annotations

import ctypes
from typing import Final

TRIM_THRESHOLD_BYTES: Final = 256 << 20
TOP_PAD_BYTES: Final = 1 << 20
MMAP_THRESHOLD_BYTES: Final = 32 << 20

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> bool:
    """Have the allocator keep up to `TRIM_THRESHOLD_BYTES` that the process has freed. False where
    it is not glibc's or refuses: nothing is lost but speed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, size) == 1 for name, size in (
        (_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES), (_M_TOP_PAD, TOP_PAD_BYTES),
        (_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)))
