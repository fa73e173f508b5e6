"""What nodes said of themselves: a traceback in a log is a defect, whatever the faults."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from jepsen.verdict import Verdict, judge

CHECKER = "logs"
TRACEBACK = "Traceback (most recent call last)"
UNEXPECTED = '"unexpected error in a call"'


def check_logs(logs: Mapping[str, Path], io_errors: Collection[str]) -> Verdict:
    """Invalid when the log of a node holds a traceback, or names an error in a call that the code
    does not foresee, unless it is one of `io_errors`, whose disks failed under it."""
    problems = []
    line_count = 0
    for node, path in logs.items():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        line_count += len(lines)
        problems += [f"{path}:{number}: a traceback: {error or 'cut short'}"
                     for number, error in tracebacks(lines)]
        problems += [f"{path}:{number}: {line}" for number, line in enumerate(lines, start=1)
                     if UNEXPECTED in line and node not in io_errors]
    return judge(CHECKER, problems, {"logs": len(logs), "lines": line_count},
                 [] if line_count else ["there was nothing to read"])


def tracebacks(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The number of the line with which each traceback begins, and the line that names its error:
    the first one that is indented no further."""
    for number, line in enumerate(lines, start=1):
        if TRACEBACK in line:
            margin = _indent(line)
            yield number, next((below.strip() for below in lines[number:]
                                if below.strip() and _indent(below) <= margin), "")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
