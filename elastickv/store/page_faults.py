"""Whether a thread had to wait for the disk where it read from memory."""

from __future__ import annotations

import resource


def major_faults() -> int:
    """How often this thread has waited for a page of a mapped file so far (`ru_majflt` in
    getrusage(2)): such a wait is no system call, so that nothing else tells of it."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
