"""Linearizability of registers, after Wing and Gong with Lowe's memoisation (WGL).

Linearizability is local: a history is linearizable exactly if the operations on each key are, so
every key is searched on its own. The search builds a linearization from the front. A
*configuration* is what it has placed so far and the register's value after that; one that was seen
before is not searched again.

Six facts keep the search small, and none of them changes its answer:

* A read of the current value may be placed at once: it changes nothing, and whatever order exists
  without it exists with it moved to the front. So only writes and compare-and-sets branch.
* An operation of unknown outcome (`info`) need never be placed. If nothing ever saw the value it
  would have written, a linearization with it is one without it as well, so it is dropped
  beforehand.
* A write whose value nothing ever saw goes just before the next blind write, which hides it. So
  such writes are placed together with that one and never branch.
* A value that an unplaced operation still has to find must not be overwritten while nothing else is
  left that could write it again.
* Of two configurations that differ only in the unknown operations placed, the one that placed fewer
  can do all that the other can.
* All operations before the first unplaced one are placed, so a configuration names that position
  and a short bit mask after it, however long the history is.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jepsen.history import (
    HistoryError,
    Kind,
    Operation,
    Record,
    Value,
    pair,
    require_functions,
)
from jepsen.verdict import Validity, Verdict

CHECKER = "linearizable"
FUNCTIONS = ("read", "write", "delete", "cas")
INITIAL: Value = None
"""What a key holds before its first write, and after a delete."""

DEFAULT_TIME_LIMIT_S = 60.0
DEFAULT_MAX_CONFIGURATIONS = 3_000_000
_CLOCK_EVERY = 64
_FOREVER = 1 << 62


class Step(NamedTuple):
    """An operation as the search sees it.

    `expects` is the value it must find (`_ANYTHING` for a write); `writes` is the value it leaves
    (`_NOTHING` for a read). `completed` is `_FOREVER` for an unknown outcome.
    """

    operation: Operation
    expects: Value
    writes: Value
    invoked: int
    completed: int


class _Mark:
    """A value that equals nothing that a register can hold."""


_ANYTHING = _Mark()
_NOTHING = _Mark()


@dataclass(slots=True)
class Budget:
    """What is left to spend on one whole check: configurations, and seconds by `now`."""

    configurations: int
    deadline_s: float
    now: Callable[[], float]
    spent: int = 0
    is_used_up: bool = False

    def spend(self) -> bool:
        """Count one configuration; False when the budget is used up."""
        self.spent += 1
        if self.spent >= self.configurations or (
                self.spent % _CLOCK_EVERY == 0 and self.now() >= self.deadline_s):
            self.is_used_up = True
        return not self.is_used_up


class Stuck(NamedTuple):
    """How far the search came at most: the value there, the last operations that it placed, and the
    operations that could have come next and did not fit."""

    value: Value
    placed: tuple[Operation, ...]
    candidates: tuple[Operation, ...]


class Search(NamedTuple):
    """The outcome for one key; `stuck` is set when it is invalid."""

    validity: Validity
    stuck: Stuck | None = None


def to_step(operation: Operation) -> Step | None:
    """The search's view of `operation`; None for one that leaves no trace (a failure, a read whose
    answer nobody got). Raises `HistoryError` for a compare-and-set of other than two values."""
    if operation.kind is Kind.FAIL or (operation.f == "read" and operation.kind is not Kind.OK):
        return None
    completed = _FOREVER if operation.completed is None else operation.completed
    expects: Value = _ANYTHING
    writes: Value = _NOTHING
    if operation.f == "read":
        expects = operation.result
    elif operation.f == "write":
        writes = operation.argument
    elif operation.f == "delete":
        writes = INITIAL
    else:
        if not isinstance(operation.argument, tuple) or len(operation.argument) != 2:
            raise HistoryError(f"a cas needs [expected, new]: {operation.describe()}")
        expects, writes = operation.argument
    return Step(operation, expects, writes, operation.invoked, completed)


def drop_unseen(steps: Iterable[Step]) -> list[Step]:
    """Without the unknown operations whose value nothing ever saw."""
    steps = list(steps)
    seen = {step.expects for step in steps if step.expects is not _ANYTHING}
    return [step for step in steps if step.completed != _FOREVER or step.writes in seen]


class _KeySearch:
    """The depth-first search over one key's steps."""

    def __init__(self, steps: Sequence[Step], budget: Budget) -> None:
        kept = drop_unseen(steps)
        self._definite = sorted((s for s in kept if s.completed != _FOREVER),
                                key=lambda step: step.invoked)
        self._unknown = sorted((s for s in kept if s.completed == _FOREVER),
                               key=lambda step: step.invoked)
        self._budget = budget
        self._expecters: dict[Value, list[int]] = defaultdict(list)
        self._writers: dict[Value, list[int]] = defaultdict(list)
        for index, step in enumerate(self._definite):
            if step.expects is not _ANYTHING:
                self._expecters[step.expects].append(index)
            if step.writes is not _NOTHING:
                self._writers[step.writes].append(index)
        # An unknown step's expectation counts as well: it saw the value if it happened.
        self._seen_values = set(self._expecters) | {
            step.expects for step in self._unknown if step.expects is not _ANYTHING}
        # (position, mask, value) -> masks of unknown operations with which it was reached.
        self._seen: dict[tuple[int, int, Value], list[int]] = {}
        self._best_count = -1
        self._best: Stuck | None = None

    def run(self) -> Search:
        """Search until a linearization is found, none is left, or the budget is used up."""
        path: list[Operation] = []
        start = self._absorb(0, 0, INITIAL, path)
        if start[0] == len(self._definite):
            return Search(Validity.VALID)
        # A frame is (successors still to try, length of `path` before them).
        frames = [(self._successors(*start, 0, path), len(path))]
        while frames:
            successors, path_length = frames[-1]
            del path[path_length:]
            if not successors:
                frames.pop()
                continue
            position, mask, value, unknown_mask, operation = successors.pop()
            path.append(operation)
            position, mask, value = self._absorb(position, mask, value, path)
            if position == len(self._definite):
                return Search(Validity.VALID)
            if not self._is_new(position, mask, value, unknown_mask):
                continue
            if not self._budget.spend():
                return Search(Validity.UNKNOWN)
            frames.append((self._successors(position, mask, value, unknown_mask, path), len(path)))
        return Search(Validity.INVALID, self._best)

    def _is_new(self, position: int, mask: int, value: Value, unknown_mask: int) -> bool:
        reached = self._seen.setdefault((position, mask, value), [])
        if any(known & ~unknown_mask == 0 for known in reached):
            return False
        reached[:] = [known for known in reached if unknown_mask & ~known]
        reached.append(unknown_mask)
        return True

    def _candidates(self, position: int, mask: int) -> tuple[list[int], int]:
        """The definite operations that may come next, as offsets from `position`, and the first
        completion among the unplaced: nothing invoked after it may come before it."""
        definite = self._definite
        offsets: list[int] = []
        horizon = _FOREVER
        for index in range(position, len(definite)):
            step = definite[index]
            if step.invoked > horizon:
                break
            if not mask >> (index - position) & 1:
                offsets.append(index - position)
                horizon = min(horizon, step.completed)
        return offsets, horizon

    def _absorb(self, position: int, mask: int, value: Value,
                path: list[Operation]) -> tuple[int, int, Value]:
        """Place every read of the current value that may come next, until there is none."""
        definite = self._definite
        while True:
            placed = False
            for offset in self._candidates(position, mask)[0]:
                step = definite[position + offset]
                if step.writes is _NOTHING and step.expects == value:
                    mask |= 1 << offset
                    path.append(step.operation)
                    placed = True
            while mask & 1:
                mask >>= 1
                position += 1
            if not placed:
                return position, mask, value

    def _successors(self, position: int, mask: int, value: Value, unknown_mask: int,
                    path: list[Operation]) -> list[tuple[int, int, Value, int, Operation]]:
        """The configurations one write or compare-and-set further, the most urgent one last."""
        offsets, horizon = self._candidates(position, mask)
        self._note_progress(position, mask, value, path, offsets)
        blind = not self._must_keep(position, mask, value, unknown_mask)
        definite = self._definite
        hidden = 0
        hidden_last: Step | None = None
        for offset in offsets:
            step = definite[position + offset]
            if step.expects is _ANYTHING and step.writes not in self._seen_values:
                hidden |= 1 << offset
                hidden_last = step
        found: list[tuple[int, int, Value, int, Operation]] = []
        for index, step in enumerate(self._unknown):
            if step.invoked > horizon:
                break
            bit = 1 << index
            if unknown_mask & bit:
                continue
            if step.expects is _ANYTHING and blind:
                found.append((position, mask | hidden, step.writes, unknown_mask | bit,
                              step.operation))
            elif step.expects == value:
                found.append((position, mask, step.writes, unknown_mask | bit, step.operation))
        if hidden_last is not None and blind:
            found.append((position, mask | hidden, hidden_last.writes, unknown_mask,
                          hidden_last.operation))
        # Earliest completion last, so that it is tried first.
        for offset in sorted(offsets, key=lambda o: -definite[position + o].completed):
            step = definite[position + offset]
            if step.writes is _NOTHING or hidden >> offset & 1:
                continue
            if step.expects is _ANYTHING and blind:
                found.append((position, mask | hidden | 1 << offset, step.writes, unknown_mask,
                              step.operation))
            elif step.expects == value:
                found.append((position, mask | 1 << offset, step.writes, unknown_mask,
                              step.operation))
        return found

    def _must_keep(self, position: int, mask: int, value: Value, unknown_mask: int) -> bool:
        """True while an unplaced operation has to find `value` and nothing is left to write it
        again.

        A compare-and-set on `value` may still replace it; it is one of those that have to find it.
        """

        def unplaced(index: int) -> bool:
            return index >= position and not mask >> (index - position) & 1

        if not any(map(unplaced, self._expecters.get(value, ()))):
            return False
        return not any(map(unplaced, self._writers.get(value, ()))) and not any(
            step.writes == value and not unknown_mask >> index & 1
            for index, step in enumerate(self._unknown))

    def _note_progress(self, position: int, mask: int, value: Value, path: list[Operation],
                       offsets: list[int]) -> None:
        count = position + mask.bit_count()
        if count > self._best_count:
            self._best_count = count
            self._best = Stuck(value, tuple(path[-5:]), tuple(
                self._definite[position + offset].operation for offset in offsets))


def search_key(operations: Iterable[Operation], budget: Budget) -> Search:
    """Search the operations of one key."""
    steps = [step for step in map(to_step, operations) if step is not None]
    return _KeySearch(steps, budget).run()


# --- counter-examples ------------------------------------------------------------------------


def _cut(operations: Sequence[Operation], end: int) -> list[Operation]:
    """The history as it was just after position `end`: later completions have not happened yet."""
    cut: list[Operation] = []
    for operation in operations:
        if operation.invoked > end:
            continue
        if operation.completed is not None and operation.completed > end:
            operation = Operation(
                operation.process, operation.f, operation.key, operation.argument, None, Kind.INFO,
                operation.invoked, None, operation.invoked_ns, None, "cut")
        cut.append(operation)
    return cut


def _removable(kept: Sequence[Operation], removed: Sequence[Operation]) -> bool:
    """True when no value that a kept operation saw loses one of its writers. Only then does a
    violation in `kept` prove one in the whole."""
    lost = {step.writes for step in map(to_step, removed)
            if step is not None and step.writes is not _NOTHING}
    return all(step.expects not in lost for step in map(to_step, kept)
               if step is not None and step.expects is not _ANYTHING)


def minimise(operations: Sequence[Operation], budget: Budget) -> list[Operation]:
    """A small part of an invalid single-key history that is invalid by itself.

    First the shortest prefix (a prefix of a linearizable history is linearizable, so bisection
    finds it), then without every block of operations that the violation does not need.
    """

    def is_invalid(part: Sequence[Operation]) -> bool:
        return search_key(part, budget).validity is Validity.INVALID

    ends = sorted(op.completed for op in operations if op.completed is not None)
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if is_invalid(_cut(operations, ends[middle])):
            high = middle
        else:
            low = middle + 1
    current = _cut(operations, ends[high]) if ends else list(operations)
    current = [op for op in current if op.kind is not Kind.FAIL]
    block = max(1, len(current) // 2)
    while not budget.is_used_up:
        start, shrunk = 0, False
        while start < len(current) and not budget.is_used_up:
            removed = current[start:start + block]
            kept = _with_readers(current[:start] + current[start + block:], removed)
            if kept is not None and is_invalid(kept):
                current, shrunk = kept, True
            else:
                start += block
        if not shrunk:
            if block == 1:
                break
            block //= 2
    return current


def _with_readers(kept: list[Operation], removed: Sequence[Operation]) -> list[Operation] | None:
    """`kept` without the reads of what `removed` wrote; None when a compare-and-set needs it."""
    lost = {step.writes for step in map(to_step, removed)
            if step is not None and step.writes is not _NOTHING}
    remaining = [op for op in kept if not (op.f == "read" and op.result in lost)]
    return remaining if _removable(remaining, removed) else None


# --- the checker -----------------------------------------------------------------------------


def check_register(history: Sequence[Record], *, time_limit_s: float = DEFAULT_TIME_LIMIT_S,
                   max_configurations: int = DEFAULT_MAX_CONFIGURATIONS,
                   now: Callable[[], float] = time.monotonic) -> Verdict:
    """Is the history of `read`, `write`, `delete` and `cas` operations linearizable per key?

    A `cas` argument is `[expected, new]`; None is the value of an absent key. Unknown when the time
    limit (seconds; `math.inf` for none) or the number of configurations runs out first. Raises
    `HistoryError`.
    """
    return check_operations(pair(history), time_limit_s=time_limit_s,
                            max_configurations=max_configurations, now=now)


def check_operations(operations: Sequence[Operation], *,
                     time_limit_s: float = DEFAULT_TIME_LIMIT_S,
                     max_configurations: int = DEFAULT_MAX_CONFIGURATIONS,
                     now: Callable[[], float] = time.monotonic) -> Verdict:
    """`check_register` for operations that are paired already."""
    require_functions(operations, FUNCTIONS)
    by_key: dict[str | None, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_key[operation.key].append(operation)
    budget = Budget(max_configurations, now() + time_limit_s, now)
    problems: list[str] = []
    unknown: list[str] = []
    for key, part in by_key.items():
        search = search_key(part, budget)
        if search.validity is Validity.INVALID:
            problems.append(_explain(key, part, search.stuck))
        elif search.validity is Validity.UNKNOWN:
            unknown.append(f"key {key}: no answer within {max_configurations} configurations"
                           + (f" and {time_limit_s:g} s" if time_limit_s < math.inf else ""))
    kinds = Counter(operation.kind.value for operation in operations)
    facts = {"operations": len(operations), "keys": len(by_key), "by_kind": dict(kinds),
             "configurations": budget.spent}
    validity = (Validity.INVALID if problems else Validity.UNKNOWN if unknown else Validity.VALID)
    return Verdict(CHECKER, validity, tuple(problems or unknown), facts)


def _explain(key: str | None, operations: Sequence[Operation], stuck: Stuck | None) -> str:
    # Its own, smaller budget: the verdict stands, this only makes it shorter to read.
    budget = Budget(200_000, time.monotonic() + 5.0, time.monotonic)
    smallest = minimise(operations, budget)
    lines = [f"key {key}: not linearizable; {len(smallest)} of {len(operations)} operations "
             "suffice to show it:"]
    lines += [f"    {operation.describe()}" for operation in smallest[:20]]
    if stuck is not None:
        candidates = "; ".join(operation.describe() for operation in stuck.candidates[:4])
        lines.append(f"    the longest linearization ends with value {stuck.value!r}; next would "
                     f"be one of: {candidates}")
    return "\n".join(lines)
