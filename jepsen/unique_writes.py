"""Unique writes: every key is written at most once and never deleted.

`write` carries the value, `read` brings back a value or None. An acknowledged write is there for
every later read; a failed one is never there; and nobody reads what nobody wrote. Once a value was
seen it stays. `expired` is a read at a moment at which the key's time to live is over: it brings
back nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter

from jepsen.history import (
    HistoryError,
    Kind,
    Operation,
    Record,
    attempts,
    pair,
    require_functions,
)
from jepsen.verdict import Verdict, judge

CHECKER = "unique-writes"
FUNCTIONS = ("write", "read", "expired")


def check_unique_writes(history: Sequence[Record]) -> Verdict:
    """Judge a history of `write` and `read`. Unknown when an acknowledged write was never read
    afterwards. Raises `HistoryError`, also when two writes of a key may have happened; one that
    failed may be tried again."""
    operations = pair(history)
    require_functions(operations, FUNCTIONS)
    reads: dict[str | None, list[Operation]] = defaultdict(list)
    for operation in operations:
        if operation.f == "read" and operation.kind is Kind.OK:
            reads[operation.key].append(operation)
        elif operation.f == "write" and operation.argument is None:
            raise HistoryError(f"nothing is written: {operation.describe()}")
    writes = attempts((op for op in operations if op.f == "write"), attrgetter("key"))
    problems = [f"a value was read that nobody wrote: {read.describe()}"
                for key in reads.keys() - writes.keys()
                for read in reads[key] if read.result is not None]
    problems += [f"there after its time to live: {op.describe()}" for op in operations
                 if op.f == "expired" and op.kind is Kind.OK and op.result is not None]
    unread = 0
    for key, write in writes.items():
        problems += _key_problems(write, reads.get(key, []))
        if write.completed is not None and write.kind is Kind.OK:
            unread += not any(read.invoked > write.completed for read in reads.get(key, []))
    acknowledged = sum(write.kind is Kind.OK for write in writes.values())
    unknown = [f"{unread} acknowledged writes were never read afterwards"] if unread else []
    if not acknowledged:
        unknown.append("no write was acknowledged")
    facts = {"writes": len(writes), "acknowledged": acknowledged,
             "reads": sum(map(len, reads.values()))}
    return judge(CHECKER, problems, facts, unknown)


def _key_problems(write: Operation, reads: Sequence[Operation]) -> list[str]:
    problems = []
    # From here on every read that begins has to see the value: its acknowledgement, or the end of
    # the first read that saw it.
    visible_from = write.completed if write.kind is Kind.OK else None
    seen = [read.completed for read in reads
            if read.result == write.argument and read.completed is not None]
    visible_from = min([*seen, *([] if visible_from is None else [visible_from])], default=None)
    for read in reads:
        if read.result is None:
            if visible_from is not None and read.invoked > visible_from:
                problems.append(f"lost: {write.describe()}, but later {read.describe()}")
        elif read.result != write.argument:
            problems.append(f"a value was read that nobody wrote: {read.describe()}")
        elif write.kind is Kind.FAIL:
            problems.append(f"a failed write was read: {write.describe()}, {read.describe()}")
        elif read.completed is not None and read.completed < write.invoked:
            problems.append(f"read before it was written: {read.describe()}")
    return problems
