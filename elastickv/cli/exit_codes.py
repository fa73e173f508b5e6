"""What each process exit code means. `docs/reference/exit-codes.md` is made from this table."""

from __future__ import annotations

import signal

from elastickv.errors import ExitCode

INTERRUPTED = 128 + signal.SIGINT

MEANINGS: dict[int, tuple[str, str]] = {
    ExitCode.OK: ("success; a node: stopped cleanly", "Nothing."),
    ExitCode.ERROR: ("the operation failed, or an unexpected error",
                     "Read the message on stderr. A traceback is a defect: report it."),
    ExitCode.USAGE: ("wrong flags or settings",
                     "The message names the flag, variable or key, and the remedy."),
    ExitCode.STARTUP_REFUSED: ("a start-up guard refused to run the node",
                               "Follow the remedy in the message. Nothing was changed."),
    ExitCode.APPLY_HALTED: ("a committed entry could not be applied",
                            "The node stopped before that entry. Mend the cause (often the KEK) "
                            "and start it again: it goes on from the same index."),
    ExitCode.CORRUPTION: ("damaged data",
                          "Keep the files for analysis. Take the node out of service and "
                          "restore or rebuild it; the other members hold the data."),
    ExitCode.BIND_FAILED: ("a listening address could not be bound",
                           "Free the port or choose another."),
    ExitCode.REMOVED: ("this node was removed from the cluster",
                       "Do not restart it with this data directory."),
    ExitCode.OUTCOME_UNKNOWN: ("the write may or may not have happened",
                               "Read before you decide to write again."),
    ExitCode.UNAVAILABLE: ("no member that could answer was reached in time",
                           "Certainly nothing was written; of `client batch --chunk`, nothing of "
                           "the chunk that failed. Check the members and try again."),
    ExitCode.DISK_FAILED: ("the disk failed a read, a write or an fsync",
                           "Check the disk. Do not restart the node on it automatically; replace "
                           "it and let the member join anew."),
    INTERRUPTED: ("interrupted (Ctrl-C)",
                  "A write or an administrative change that was under way may or may not have "
                  "happened: read before you decide to do it again."),
}


def meaning(code: int) -> str:
    """An exit status in words; a negative one is the signal that ended the process."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return MEANINGS[code][0] if code in MEANINGS else "unknown exit code"
