"""`check_scans` against a search for an explanation, on random histories of one group."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import pytest

from jepsen.history import Kind, Operation, Record, Value, pair
from jepsen.scans import check_scans
from jepsen.verdict import Validity

TIMESTAMPS = range(10, 120, 10)
BETWEEN = [at + shift for at in (0, *TIMESTAMPS) for shift in (3, 6)]
"""Where a batch of unknown outcome may have its timestamp; two fit between acknowledged ones."""

MOST_UNKNOWN = 2
HISTORIES = 3000


def random_history(source: random.Random) -> list[Record]:
    """Batches and scans of three processes; what the scans show is made up."""
    records: list[Record] = []
    open_calls: dict[int, tuple[str, Value]] = {}
    processes, acknowledged, free = [0, 1, 2], [], list(TIMESTAMPS)
    calls, batches = source.randrange(3, 9), 0

    def add(kind: Kind, process: int, f: str, value: Value) -> None:
        records.append(Record(kind, process, len(records), f, "g", value))

    while calls or open_calls:
        slot = source.randrange(len(processes))
        process = processes[slot]
        if process in open_calls:
            f, argument = open_calls.pop(process)
            if f == "scan":
                shown = source.randrange(batches + 1)
                add(Kind.OK, process, f, {"k": shown} if shown else {})
            elif source.random() < 0.35:
                add(Kind.INFO, process, f, argument)
                processes[slot] = max(processes) + 1
            else:
                timestamp = free.pop(source.randrange(len(free)))
                acknowledged.append(timestamp)
                add(Kind.OK, process, f, timestamp)
        elif calls:
            calls -= 1
            if source.random() < 0.45:
                batches += 1
                open_calls[process] = ("batch", batches)
            else:
                past = acknowledged and source.random() < 0.4
                open_calls[process] = ("scan", source.choice(acknowledged) if past else 0)
            add(Kind.INVOKE, process, *open_calls[process])
    return records


def shown_by(scan: Operation) -> Value:
    return scan.result[0][1] if scan.result else None


def has_explanation(operations: Sequence[Operation]) -> bool | None:
    """Whether there are timestamps and an order in real time that explain every scan; None when
    there are too many unknown batches to try."""
    batches = [op for op in operations if op.f == "batch"]
    scans = [op for op in operations if op.f == "scan" and op.kind is Kind.OK]
    known = {op.argument: op.result for op in batches if op.kind is Kind.OK}
    seen = {shown_by(scan) for scan in scans}
    unknown = [op.argument for op in batches if op.kind is Kind.INFO and op.argument in seen]
    if len(unknown) > MOST_UNKNOWN:
        return None
    return any(_explains(operations, scans, timestamps)
               for timestamps in _timestamps(known, unknown))


def _timestamps(known: Mapping[Value, int], unknown: Sequence[Value]
                ) -> Iterator[dict[Value, int]]:
    for chosen in itertools.permutations(BETWEEN, len(unknown)):
        yield {**known, **dict(zip(unknown, chosen, strict=True))}


def _explains(operations: Sequence[Operation], scans: Sequence[Operation],
              timestamps: Mapping[Value, int]) -> bool:
    for scan in scans:
        if scan.argument:
            below = [value for value, at in timestamps.items() if at <= scan.argument]
            if shown_by(scan) != max(below, key=timestamps.__getitem__, default=None):
                return False
    events = [op for op in operations if op.argument in timestamps and op.f == "batch"]
    events += [scan for scan in scans if not scan.argument]
    return _in_some_order(events, None, timestamps)


def _in_some_order(left: list[Operation], current: Value, timestamps: Mapping[Value, int]) -> bool:
    if not left:
        return True
    first_end = min((op.completed for op in left if op.completed is not None), default=None)
    for op in left:
        if first_end is not None and op.invoked > first_end:
            continue
        rest = [other for other in left if other is not op]
        if op.f == "scan":
            if shown_by(op) == current and _in_some_order(rest, current, timestamps):
                return True
        elif timestamps[op.argument] > timestamps.get(current, 0) \
                and _in_some_order(rest, op.argument, timestamps):
            return True
    return False


@pytest.mark.parametrize("seed", range(4))
def test_the_checker_agrees_with_a_search(seed: int) -> None:
    source = random.Random(seed)
    seen: set[bool] = set()
    for _ in range(HISTORIES // 4):
        history = random_history(source)
        explained = has_explanation(pair(history))
        if explained is not None:
            verdict = check_scans(history, group_size=1)
            assert (verdict.validity is not Validity.INVALID) is explained, (history, verdict)
            seen.add(explained)
    assert seen == {True, False}
