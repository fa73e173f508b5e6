"""List append: every key holds a list that only grows at its end.

`append` operations carry one element, unique on their key; `read` operations bring back the whole
list. There must be one order per key of which every read is a prefix, and this order must agree
with real time: whatever was over before an operation began comes before it.

Because every read is a prefix of the longest one, real time reduces to one number per key: how long
the list is known to be at least. Completed appends and reads raise it; a later read may not be
shorter, and a later append may not stand before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

from jepsen.history import Kind, Operation, Record, Value, attempts, pair, require_functions
from jepsen.verdict import Verdict, judge

CHECKER = "append"
FUNCTIONS = ("append", "read")


def check_append(history: Sequence[Record]) -> Verdict:
    """Judge a history of `append` and `read`. Unknown when an acknowledged append was never looked
    for: no read of its key began after it. Raises `HistoryError`, also for an element that two
    appends to a key may have added; one that failed may be tried again."""
    by_key: dict[str | None, list[Operation]] = defaultdict(list)
    operations = pair(history)
    require_functions(operations, FUNCTIONS)
    for operation in operations:
        by_key[operation.key].append(operation)
    problems: list[str] = []
    unknown: list[str] = []
    for key, part in by_key.items():
        key_problems, unread = _check_key(part)
        problems += [f"key {key}: {problem}" for problem in key_problems]
        if unread:
            unknown.append(f"key {key}: {unread} acknowledged appends were never looked for")
    acknowledged = sum(op.f == "append" and op.kind is Kind.OK for op in operations)
    reads = sum(op.f == "read" and op.kind is Kind.OK for op in operations)
    if not acknowledged or not reads:
        unknown.append(f"{acknowledged} acknowledged appends and {reads} reads show nothing")
    return judge(CHECKER, problems, {"keys": len(by_key), "acknowledged": acknowledged,
                                     "reads": reads}, unknown)


def _check_key(operations: Sequence[Operation]) -> tuple[list[str], int]:
    appends = attempts((op for op in operations if op.f == "append"), attrgetter("argument"))
    reads = [op for op in operations if op.f == "read" and op.kind is Kind.OK]
    problems = [f"no list: {read.describe()}" for read in reads
                if not isinstance(read.result, tuple | None)]
    if problems:
        return problems, 0
    order = _longest(reads)
    problems = _prefix_problems(reads, order)
    if problems:
        return problems, 0
    places = {element: place for place, element in enumerate(order)}
    problems += _element_problems(order, appends)
    lost, unread = _lost(appends, reads, places)
    problems += lost + _real_time_problems(operations, places)
    return problems, unread


def _longest(reads: Iterable[Operation]) -> tuple[Value, ...]:
    return max((as_list(op) for op in reads), key=len, default=())


def as_list(read: Operation) -> tuple[Value, ...]:
    """The list that a read brought back; an absent key is the empty list."""
    return tuple(read.result) if read.result is not None else ()


def _prefix_problems(reads: Iterable[Operation], order: tuple[Value, ...]) -> list[str]:
    problems = []
    for read in reads:
        elements = as_list(read)
        if len(set(elements)) != len(elements):
            problems.append(f"an element appears twice: {read.describe()}")
        elif elements != order[:len(elements)]:
            at = next(n for n, (a, b) in enumerate(zip(elements, order, strict=False)) if a != b)
            problems.append(f"reads disagree at position {at}, {elements[at]!r} or {order[at]!r}: "
                            f"{read.describe()}")
    return problems


def _element_problems(order: Iterable[Value], appends: Mapping[Value, Operation]) -> list[str]:
    problems = []
    for element in order:
        append = appends.get(element)
        if append is None:
            problems.append(f"{element!r} was read and never appended")
        elif append.kind is Kind.FAIL:
            problems.append(f"a failed append was read: {append.describe()}")
    return problems


def _lost(appends: Mapping[Value, Operation], reads: Sequence[Operation],
          places: Mapping[Value, int]) -> tuple[list[str], int]:
    """Acknowledged appends that are nowhere: lost if a read or an append that began later must come
    behind them, else only unread."""
    shown = (append for element, append in appends.items() if element in places)
    last_begin = max((op.invoked for op in (*reads, *shown)), default=-1)
    problems: list[str] = []
    unread = 0
    for append in appends.values():
        if append.completed is None or append.kind is not Kind.OK or append.argument in places:
            continue
        if append.completed < last_begin:
            problems.append(f"an acknowledged append was lost: {append.describe()}")
        else:
            unread += 1
    return problems, unread


def _real_time_problems(operations: Sequence[Operation], places: dict[Value, int]) -> list[str]:
    events: list[tuple[int, bool, Operation]] = []
    for operation in operations:
        if operation.kind is Kind.FAIL or (operation.f == "read"
                                           and operation.kind is not Kind.OK):
            continue
        events.append((operation.invoked, False, operation))
        if operation.completed is not None:
            events.append((operation.completed, True, operation))
    problems: list[str] = []
    least_length = 0
    for _, is_end, operation in sorted(events, key=lambda event: event[:2]):
        if operation.f == "read":
            reach = len(as_list(operation))
        elif operation.argument in places:
            reach = places[operation.argument] + 1
        else:
            continue
        if not is_end:
            limit = reach if operation.f == "read" else reach - 1
            if limit < least_length:
                problems.append(f"the list was {least_length} long before this began: "
                                f"{operation.describe()}")
        else:
            least_length = max(least_length, reach)
    return problems
