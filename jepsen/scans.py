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
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    for operation in operations:
        _require_timestamp(operation)
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
        sightings = _sightings(scans, batches)
        problems += [f"group {group}: {problem}" for problem in (
            *_torn(scans, group_size), *_unrepeatable(scans), *_wrong_version(scans, batches),
            *_hidden_again(scans, batches, sightings), *_back_again(scans),
            *_without_order(scans, batches, sightings))]
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


def _require_timestamp(operation: Operation) -> None:
    """Raise `HistoryError` for an `ok` batch or scan with anything else than a timestamp."""
    if operation.kind is not Kind.OK:
        return
    given, least = (operation.result, 1) if operation.f == "batch" else (operation.argument, 0)
    if type(given) is not int or given < least:
        raise HistoryError(f"{given!r} is no timestamp: {operation.describe()}")


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
    for scan, due in _with_due(scans, batches):
        limit = scan.argument
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


def _with_due(scans: Iterable[Operation], batches: Mapping[Value, Operation],
              ) -> Iterator[tuple[Operation, Operation | None]]:
    """Each scan with what it has to show or something later: of the acknowledged batches that were
    over when it began and that it reaches, the one with the highest timestamp."""
    ends = deque(sorted((op for op in batches.values() if op.kind is Kind.OK),
                        key=lambda op: op.completed or 0))
    over: list[Operation] = []  # by timestamp
    for scan in sorted(scans, key=lambda scan: scan.invoked):
        while ends and (ends[0].completed or 0) < scan.invoked:
            bisect.insort(over, ends.popleft(), key=_timestamp)
        reached = (bisect.bisect_right(over, scan.argument, key=_timestamp) if scan.argument
                   else len(over))
        yield scan, over[reached - 1] if reached else None


def _timestamp(batch: Operation) -> int:
    return int(batch.result)


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


def _hidden_again(scans: Sequence[Operation], batches: Mapping[Value, Operation],
                  sightings: Sequence[_Sighting]) -> list[str]:
    problems = []
    for seen in sightings:
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


class _Order:
    """What must be true of the timestamps of batches of unknown outcome that scans showed: each is
    above `_low` and up to `_high`, and before those in `_later`. By value."""

    def __init__(self, sightings: Sequence[_Sighting]) -> None:
        self._low: dict[Value, float] = {seen.batch.argument: seen.after for seen in sightings}
        self._high = {seen.batch.argument: seen.until for seen in sightings}
        self._later = {seen.batch.argument: {other.batch.argument for other in sightings
                                             if seen.since < other.batch.invoked}
                       for seen in sightings}

    def facts(self) -> object:
        """All that is known; it only grows."""
        return (dict(self._low), dict(self._high),
                {value: frozenset(later) for value, later in self._later.items()})

    def learn(self, value: Value, scan: Operation, shown: Operation | None) -> None:
        """`scan` began when `value` was there, and shows another batch or nothing. So `value` is
        below what it shows, or above its limit."""
        limit = scan.argument or math.inf
        is_within = self._high[value] <= limit
        is_above = not scan.result
        if shown is not None and shown.argument in self._later:
            is_above = value in self._later[shown.argument]
            if is_within:
                self._later[value].add(shown.argument)
        elif shown is not None and shown.kind is Kind.OK:
            is_above = self._low[value] >= shown.result
            if is_within:
                self._high[value] = min(self._high[value], shown.result - 1)
        if is_above:
            self._low[value] = max(self._low[value], limit)

    def follow(self, value: Value) -> None:
        """What follows for `value` from the others."""
        later = self._later[value]
        later.update(other for other in self._low
                     if other != value and self._high[value] <= self._low[other])
        for other in tuple(later):
            later |= self._later[other]
            self._low[other] = max(self._low[other], self._low[value] + 1)
            self._high[value] = min(self._high[value], self._high[other] - 1)

    def is_possible(self, value: Value) -> bool:
        """Whether a timestamp is left for `value`."""
        return value not in self._later[value] and self._low[value] < self._high[value]


def _without_order(scans: Sequence[Operation], batches: Mapping[Value, Operation],
                   sightings: Sequence[_Sighting]) -> list[str]:
    """Batches of unknown outcome that scans showed, where no order of their timestamps explains
    what was shown. What must be true of them is gathered until nothing new follows."""
    if len(sightings) < 2:  # one alone is `_hidden_again`'s
        return []
    order = _Order(sightings)
    before: object = None
    while before != (now := order.facts()):
        before = now
        for seen in sightings:
            value = seen.batch.argument
            for scan in scans:
                shown = scan.result[0][1] if scan.result else None
                if scan.invoked >= seen.since and shown != value:
                    order.learn(value, scan, batches.get(shown))
            order.follow(value)
            if not order.is_possible(value):
                return [f"no timestamp explains what was shown of {seen.batch.describe()}"]
    return []
