"""Scans at a timestamp: each shows the state at one moment, the same one whenever it is asked for.

A `batch` writes one value to every key of a group, atomically; when acknowledged it brings back its
commit timestamp. A `scan` of the group carries a timestamp (0 for the latest state) and brings back
the pairs it saw, as a mapping. Hence

* all pairs of one scan are equal, or all keys are absent;
* scans at the same timestamp see the same;
* a scan at T sees the acknowledged batch with the highest timestamp up to T that was over when the
  scan began, or a batch that may be later than it: one of unknown outcome, or still under way;
* timestamps are unique and grow in real time;
* what a scan showed had happened by the end of that scan, whenever it was acknowledged;
* a latest state that another one has followed does not come back;
* a batch of unknown outcome that a scan showed did happen, so from the end of that scan on it is
  due like an acknowledged one, at a timestamp that the scans that show it narrow down.

Timestamps to scan at must come from batches that were acknowledged already, or else the state at T
is still in the making.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from jepsen.history import (
    HistoryError,
    Kind,
    Operation,
    Record,
    Value,
    attempts,
    pair,
    require_functions,
)
from jepsen.verdict import Verdict, judge

CHECKER = "scans"
FUNCTIONS = ("batch", "scan")


def check_scans(history: Sequence[Record], *, group_size: int) -> Verdict:
    """Judge `batch` and `scan` operations whose key names the group. Unknown without a scan at a
    timestamp that saw an acknowledged batch, or when no scan that reaches the last acknowledged
    batch of a group began after it. Raises `HistoryError`, also for a value that two batches of a
    group may have written; one that failed may be tried again."""
    by_group: dict[str | None, list[Operation]] = defaultdict(list)
    operations = pair(history)
    require_functions(operations, FUNCTIONS)
    for op in operations:
        if op.kind is Kind.OK:
            given, least = (op.result, 1) if op.f == "batch" else (op.argument, 0)
            if type(given) is not int or given < least:
                raise HistoryError(f"{given!r} is no timestamp: {op.describe()}")
    for operation in operations:
        by_group[operation.key].append(operation)
    problems: list[str] = []
    done: list[Operation] = []
    unseen: list[str] = []
    past_scans = 0
    for group, part in by_group.items():
        scans = [op for op in part if op.f == "scan" and op.kind is Kind.OK]
        last = max((op for op in part if op.f == "batch" and op.kind is Kind.OK),
                   key=lambda op: op.completed or 0, default=None)
        if last is not None and not any(scan.invoked > (last.completed or 0)
                                        and _reaches(scan, last) for scan in scans):
            unseen.append(f"group {group}: no scan began after {last.describe()}")
        batches = _over_once_seen(
            attempts((op for op in part if op.f == "batch"), attrgetter("argument")), scans)
        done += [op for op in batches.values() if op.kind is Kind.OK]
        past_scans += sum(op.argument != 0 and bool(op.result) for op in scans)
        problems += [f"group {group}: {problem}" for problem in (
            *_torn(scans, group_size), *_unrepeatable(scans), *_wrong_version(scans, batches),
            *_hidden_again(scans, batches), *_back_again(scans),
            *_without_order(scans, batches))]
    problems += _timestamp_problems(done)
    facts = {"groups": len(by_group), "scans_in_the_past": past_scans,
             "batches": sum(op.f == "batch" and op.kind is Kind.OK for op in operations)}
    unknown = [] if past_scans else ["no scan at a timestamp saw anything"]
    return judge(CHECKER, problems, facts, [*unknown, *unseen])


def _timestamp_problems(batches: Iterable[Operation]) -> list[str]:
    """Every acknowledged batch is later than all that were over before it began."""
    problems: list[str] = []
    done = sorted(batches, key=lambda op: op.invoked)
    by_end = sorted(done, key=lambda op: op.completed or 0)
    highest: Operation | None = None
    ended = 0
    for batch in done:
        while (by_end[ended].completed or 0) < batch.invoked:
            if highest is None or by_end[ended].result > highest.result:
                highest = by_end[ended]
            ended += 1
        if highest is not None and batch.result <= highest.result:
            problems.append(f"timestamps go back: {highest.describe()}, then {batch.describe()}")
    timestamps: dict[Value, Operation] = {}
    for batch in done:
        other = timestamps.setdefault(batch.result, batch)
        if other is not batch:
            problems.append(f"one timestamp twice: {other.describe()} and {batch.describe()}")
    return problems


def _over_once_seen(batches: Mapping[Value, Operation],
                    scans: Iterable[Operation]) -> dict[Value, Operation]:
    """The batches, with each acknowledged one over at the end of the first scan that showed it, if
    that came before its acknowledgement: it had happened by then."""
    result = dict(batches)
    for scan in scans:
        batch = result.get(scan.result[0][1]) if scan.result else None
        if batch is not None and batch.kind is Kind.OK and scan.completed is not None \
                and batch.invoked < scan.completed < (batch.completed or 0):
            result[batch.argument] = replace(batch, completed=scan.completed)
    return result


def _back_again(scans: Iterable[Operation]) -> list[str]:
    """Latest states that were seen, then another one, then the first again: whatever is known of
    their timestamps, each was later than the other."""
    latest = sorted((scan for scan in scans if scan.argument == 0 and scan.result),
                    key=lambda scan: scan.invoked)
    seen_by: dict[Value, int] = {}
    for scan in latest:
        value, end = scan.result[0][1], scan.completed or 0
        seen_by[value] = min(seen_by.get(value, end), end)
    begins = [scan.invoked for scan in latest]
    # From each position on: the earliest end, and the earliest end of one that shows another value.
    ends: list[tuple[tuple[float, Value], tuple[float, Value]]] = \
        [((math.inf, None), (math.inf, None))]
    for scan in reversed(latest):
        first, second = ends[-1]
        candidate = (float(scan.completed or 0), scan.result[0][1])
        if candidate[0] < first[0]:
            first, second = candidate, first if first[1] != candidate[1] else second
        elif candidate[1] != first[1] and candidate[0] < second[0]:
            second = candidate
        ends.append((first, second))
    ends.reverse()
    replaced_by = {}
    for value, end in seen_by.items():
        first, second = ends[bisect.bisect_right(begins, end)]
        replaced_by[value] = first[0] if first[1] != value else second[0]
    return [f"seen, then another one, then back again: {scan.describe()}" for scan in latest
            if scan.invoked > replaced_by[scan.result[0][1]]]


def _torn(scans: Iterable[Operation], group_size: int) -> list[str]:
    return [f"half of a batch is visible: {scan.describe()}" for scan in scans
            if scan.result and (len(scan.result) != group_size
                                or len({value for _, value in scan.result}) != 1)]


def _unrepeatable(scans: Iterable[Operation]) -> list[str]:
    problems = []
    first: dict[Value, Operation] = {}
    for scan in scans:
        if scan.argument == 0:
            continue
        before = first.setdefault(scan.argument, scan)
        if before.result != scan.result:
            problems.append(f"the same timestamp shows two states: {before.describe()} and "
                            f"{scan.describe()}")
    return problems


def _wrong_version(scans: Iterable[Operation], batches: dict[Value, Operation]) -> list[str]:
    problems = []
    acknowledged = [op for op in batches.values() if op.kind is Kind.OK]
    for scan in scans:
        limit = scan.argument
        due = max((op for op in acknowledged
                   if (op.completed or 0) < scan.invoked and (limit == 0 or op.result <= limit)),
                  key=lambda op: op.result, default=None)
        if not scan.result:
            if due is not None:
                problems.append(f"not visible: {due.describe()} in {scan.describe()}")
            continue
        seen = batches.get(scan.result[0][1])
        if seen is None:
            problems.append(f"a value that nobody wrote: {scan.describe()}")
        elif seen.kind is Kind.FAIL:
            problems.append(f"a failed batch is visible: {seen.describe()} in {scan.describe()}")
        elif scan.completed is not None and scan.completed < seen.invoked:
            problems.append(f"visible before it began: {seen.describe()} in {scan.describe()}")
        elif seen.kind is Kind.OK:
            if limit and seen.result > limit:
                problems.append(f"later than the timestamp: {seen.describe()} in "
                                f"{scan.describe()}")
            elif due is not None and seen.result < due.result:
                problems.append(f"stale: {due.describe()} is later than what {scan.describe()} "
                                "shows")
    return problems


class _Sighting(NamedTuple):
    """A batch of unknown outcome that scans showed: it has a timestamp above `after` and up to
    `until`, and is there for every scan that begins after `since`, a position in the history."""

    batch: Operation
    after: int
    until: float
    since: int


def _sightings(scans: Sequence[Operation], batches: Mapping[Value, Operation]) -> list[_Sighting]:
    acknowledged = [op for op in batches.values() if op.kind is Kind.OK]
    shown: dict[Value, list[Operation]] = defaultdict(list)
    for scan in scans:
        if scan.result:
            shown[scan.result[0][1]].append(scan)
    found = []
    for value, sights in shown.items():
        batch = batches.get(value)
        if batch is None or batch.kind is not Kind.INFO:
            continue
        since = min(scan.completed or 0 for scan in sights)
        # Above what was over before it began, and above what it hid in a scan that showed it.
        after = max((op.result for op in acknowledged
                     if (op.completed or 0) < batch.invoked or any(
                         (op.completed or 0) < scan.invoked and _reaches(scan, op)
                         for scan in sights)), default=0)
        until = min([math.inf, *(scan.argument for scan in sights if scan.argument),
                     *(op.result - 1 for op in acknowledged if op.invoked > since)])
        found.append(_Sighting(batch, after, until, since))
    return found


def _reaches(scan: Operation, batch: Operation) -> bool:
    """Whether an acknowledged batch is old enough for what the scan asked for."""
    return bool(scan.argument == 0 or batch.result <= scan.argument)


def _hidden_again(scans: Sequence[Operation], batches: Mapping[Value, Operation]) -> list[str]:
    problems = []
    for seen in _sightings(scans, batches):
        if seen.after >= seen.until:
            problems.append(f"no timestamp is left for {seen.batch.describe()}: it is above "
                            f"{seen.after} and not above {seen.until}")
            continue
        for scan in scans:
            if scan.invoked <= seen.since or 0 < scan.argument < seen.until:
                continue
            shown = batches.get(scan.result[0][1]) if scan.result else None
            if not scan.result or (shown is not None and shown.kind is Kind.OK
                                   and shown.result <= seen.after):
                problems.append(f"seen, then gone: {seen.batch.describe()} in {scan.describe()}")
    return problems


def _without_order(scans: Sequence[Operation], batches: Mapping[Value, Operation]) -> list[str]:
    """Batches of unknown outcome that scans showed, where no order of their timestamps explains
    what was shown. What must be true of them is gathered until nothing new follows."""
    acknowledged = [op for op in batches.values() if op.kind is Kind.OK]
    shown: dict[Value, list[Operation]] = defaultdict(list)
    for scan in scans:
        value = scan.result[0][1] if scan.result else None
        if value in batches and batches[value].kind is Kind.INFO:
            shown[value].append(scan)
    if len(shown) < 2:  # One alone is `_hidden_again`'s.
        return []
    since = {value: min(scan.completed or 0 for scan in sights)
             for value, sights in shown.items()}
    # A timestamp is above `low` and up to `high`.
    low: dict[Value, float] = {}
    high: dict[Value, float] = {}
    for value, sights in shown.items():
        low[value] = max((op.result for op in acknowledged
                          if (op.completed or 0) < batches[value].invoked or any(
                              (op.completed or 0) < scan.invoked and _reaches(scan, op)
                              for scan in sights)), default=0)
        high[value] = min([math.inf, *(scan.argument for scan in sights if scan.argument),
                           *(op.result - 1 for op in acknowledged if op.invoked > since[value])])
    later = {value: {other for other in shown if since[value] < batches[other].invoked}
             for value in shown}
    before: object = None
    while before != (now := (dict(low), dict(high), {v: frozenset(o) for v, o in later.items()})):
        before = now
        for value in shown:
            for scan in scans:
                if scan.invoked < since[value]:
                    continue
                limit = scan.argument or math.inf
                seen = scan.result[0][1] if scan.result else None
                if seen == value:
                    continue
                # It had happened: either it is below what the scan shows, or above its limit.
                is_above = seen is None
                if seen in shown:
                    is_above = value in later[seen]
                    if high[value] <= limit:
                        later[value].add(seen)
                elif seen in batches and batches[seen].kind is Kind.OK:
                    is_above = low[value] >= batches[seen].result
                    if high[value] <= limit:
                        high[value] = min(high[value], batches[seen].result - 1)
                if is_above:
                    low[value] = max(low[value], limit)
            for other in shown:
                if other != value and high[value] <= low[other]:
                    later[value].add(other)
            for other in tuple(later[value]):
                later[value] |= later[other]
                low[other] = max(low[other], low[value] + 1)
                high[value] = min(high[value], high[other] - 1)
            if value in later[value] or low[value] >= high[value]:
                return [f"no timestamp explains what was shown of {batches[value].describe()}"]
    return []
