"""What the clients did and saw: a list of records, in real-time order.

Every operation has an *invoke* record and at most one completion:

* `ok`: it happened, and `value` holds what came back;
* `fail`: it certainly did not happen;
* `info`: nobody knows; it may take effect at any time after its invocation, or never.

An invocation without completion counts as `info`. The position of a record in the list is its place
in real time: an operation whose completion stands before the invocation of another one was over
before that one began. `time_ns` serves plots only.

On disk a history is JSON lines, one record per line:

    {"kind": "invoke", "process": 3, "time_ns": 12, "f": "write", "key": "r4", "value": 17}

Tuples come back as lists, so values are compared after `normalise`.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

NO_COMPLETION = "no completion"
"""The `error` of an operation whose end is not in the history."""

Value = Any
"""None, bool, int, str, or (nested) lists and dictionaries of them."""


class HistoryError(ValueError):
    """A history that contradicts itself; the message names the record."""


class Truth(enum.Enum):
    """The JSON values true and false. Python takes them for 1 and 0, which a checker must not."""

    TRUE = True
    FALSE = False

    def __repr__(self) -> str:
        return str(self.value).lower()


class Kind(enum.StrEnum):
    """The four kinds of records."""

    INVOKE = "invoke"
    OK = "ok"
    FAIL = "fail"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a history. `error` says why an operation did not end `ok`."""

    kind: Kind
    process: int
    time_ns: int
    f: str
    key: str | None = None
    value: Value = None
    error: str = ""

    def to_json(self) -> str:
        """One line, without its line end."""
        fields: dict[str, Value] = {"kind": self.kind.value, "process": self.process,
                                    "time_ns": self.time_ns, "f": self.f, "key": self.key,
                                    "value": self.value}
        if self.error:
            fields["error"] = self.error
        return json.dumps(fields, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Operation:
    """An invocation with its completion.

    `argument` is what the invocation carried, `result` what an `ok` brought back. `invoked` and
    `completed` are positions in the history; `completed` is None for an operation of kind `info`,
    which stays open for ever.
    """

    process: int
    f: str
    key: str | None
    argument: Value
    result: Value
    kind: Kind
    invoked: int
    completed: int | None
    invoked_ns: int
    completed_ns: int | None
    error: str = ""

    def describe(self) -> str:
        """One line for a report: who, what, when, and how it ended."""
        target = "" if self.key is None else f" {self.key}"
        came_back = f" -> {self.result!r}" if self.kind is Kind.OK else ""
        given = "" if self.argument is None else f" {self.argument!r}"
        span = f"[{self.invoked}, {'open' if self.completed is None else self.completed}]"
        return f"process {self.process} {self.f}{target}{given}{came_back} ({self.kind}) at {span}"


def normalise(value: Value) -> Value:
    """Lists become tuples, so that values can be compared and used as dictionary keys, and truth
    values become `Truth`."""
    if isinstance(value, list | tuple):
        return tuple(normalise(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, normalise(item)) for key, item in value.items()))
    return Truth(value) if isinstance(value, bool) else value


def validate(records: Sequence[Record]) -> None:
    """Raise `HistoryError` unless every completion has its invocation, of the same function and
    key, no process has two operations open, and time does not go back."""
    pending: dict[int, Record] = {}
    last_ns: int | None = None
    for position, record in enumerate(records):
        where = f"record {position} ({record.to_json()[:160]})"
        if last_ns is not None and record.time_ns < last_ns:
            raise HistoryError(f"{where}: time goes back from {last_ns} ns")
        last_ns = record.time_ns
        before = pending.get(record.process)
        if record.kind is Kind.INVOKE:
            if before is not None:
                raise HistoryError(f"{where}: process {record.process} is already busy")
            pending[record.process] = record
            continue
        if before is None:
            raise HistoryError(f"{where}: a completion without an invocation")
        if (before.f, before.key) != (record.f, record.key):
            raise HistoryError(f"{where}: completes {before.f} {before.key}")
        del pending[record.process]


def pair(records: Sequence[Record]) -> list[Operation]:
    """The operations of a history, in the order of their invocations.

    Raises `HistoryError` when the history is not valid.
    """
    validate(records)
    ends: dict[int, int] = {}
    open_by_process: dict[int, int] = {}
    for position, record in enumerate(records):
        if record.kind is Kind.INVOKE:
            open_by_process[record.process] = position
        else:
            ends[open_by_process.pop(record.process)] = position
    return [_operation(records, position, ends.get(position))
            for position, record in enumerate(records) if record.kind is Kind.INVOKE]


def require_functions(operations: Iterable[Operation], functions: Collection[str]) -> None:
    """Raise `HistoryError` for an operation that is none of `functions`: a checker that passed it
    by would have judged another history."""
    for operation in operations:
        if operation.f not in functions:
            raise HistoryError(f"no function of this workload ({', '.join(functions)}): "
                               f"{operation.describe()}")


def attempts(operations: Iterable[Operation],
             name_of: Callable[[Operation], Value]) -> dict[Value, Operation]:
    """By its name, what wrote something that is written once: the attempt that may have happened,
    or else one that failed. Raises `HistoryError` when two may have: nobody could tell whose was
    read.

    Attempts that failed do not count, whether before or after that one: they left nothing.
    """
    found: dict[Value, Operation] = {}
    for operation in operations:
        name = name_of(operation)
        before = found.setdefault(name, operation)
        if before is operation or operation.kind is Kind.FAIL:
            continue
        if before.kind is not Kind.FAIL:
            raise HistoryError(f"used twice: {name!r}: {before.describe()} and "
                               f"{operation.describe()}")
        found[name] = operation
    return found


def _operation(records: Sequence[Record], invoked: int, ended: int | None) -> Operation:
    invoke = records[invoked]
    end = records[ended] if ended is not None else None
    kind = end.kind if end is not None else Kind.INFO
    is_open = end is None or kind is Kind.INFO
    return Operation(
        process=invoke.process, f=invoke.f, key=invoke.key, argument=normalise(invoke.value),
        result=normalise(end.value) if end is not None and kind is Kind.OK else None,
        kind=kind, invoked=invoked, completed=None if is_open else ended,
        invoked_ns=invoke.time_ns, completed_ns=None if end is None else end.time_ns,
        error=end.error if end is not None else NO_COMPLETION)


def parse_line(line: str) -> Record:
    """The inverse of `Record.to_json`. Raises `HistoryError`."""
    try:
        fields = json.loads(line)
        process, key = fields["process"], fields.get("key")
        if type(process) is not int:
            raise ValueError(f"{process!r} is no process")
        if not isinstance(key, str | None):
            raise ValueError(f"{key!r} is no key")
        return Record(Kind(fields["kind"]), process, int(fields["time_ns"]), str(fields["f"]), key,
                      fields.get("value"), str(fields.get("error") or ""))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise HistoryError(f"not a history record: {line[:160]!r} ({error})") from None


def read_history(path: Path, on_torn: Callable[[str], None] | None = None) -> list[Record]:
    """Every record of a JSON-lines file. `on_torn` is told a last line that is torn, as a run that
    was killed leaves it; the line is left out then. Without it such a line is a damaged one. Raises
    `HistoryError`."""
    with path.open(encoding="utf-8") as file:
        lines = list(file)
    if on_torn is not None and lines and _is_torn(lines[-1]):
        on_torn(lines.pop())
    return [parse_line(line) for line in lines if line.strip()]


def _is_torn(line: str) -> bool:
    if line.endswith("\n") or not line.strip():
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def open_history(path: Path) -> TextIO:
    """A new file for a `Recorder`. A run that is killed leaves in it what was recorded."""
    return path.open("w", buffering=1, encoding="utf-8")


def write_history(path: Path, records: Iterable[Record]) -> None:
    """Write `records` as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)


class Recorder:
    """Collects records as they happen, and writes each to a file at once when one is given.

    `now_ns` must not go back. Not thread-safe: one recorder belongs to one event loop, which is
    what makes list order real-time order.
    """

    def __init__(self, now_ns: Callable[[], int], file: TextIO | None = None) -> None:
        self.records: list[Record] = []
        self._now_ns = now_ns
        self._file = file

    def add(self, kind: Kind, process: int, f: str, key: str | None = None,
            value: Value = None, error: str = "") -> None:
        """Append one record, stamped now."""
        record = Record(kind, process, self._now_ns(), f, key, value, error)
        self.records.append(record)
        if self._file is not None:
            self._file.write(record.to_json() + "\n")
