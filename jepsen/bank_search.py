"""Which transfers are behind each read of a bank: a search.

Accounts count their transfers, so reads have an order, and between two reads that follow one
another lies a set of transfers with just the counts and the money in between. The reads are
explained exactly if the transfers can be dealt out to these *steps*, some to none, so that

* a transfer is behind every read that began after its acknowledgement, and behind none that ended
  before it began;
* of two transfers, one over before the other began, the later one is in no earlier step;
* the transfers of each step have its counts and its money.

The search deals them out step by step and goes back when one does not come out. Transfers of the
same amount between the same accounts are alike. Which of those a step takes is no choice, as long
as the one that was over first does: whatever the others can do later, one that is over later can
do in their place.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jepsen.verdict import Validity

LEAST_MAX_TRIES = 300_000
TRIES_PER_MOMENT = 100
"""A step takes 5 to 20 tries, the more the more transfers are of unknown outcome."""

Alike = tuple[int, int, int]
"""(source, target, amount); accounts are numbers here."""


class Move(NamedTuple):
    """A transfer that may have happened: what it moved, and when, as positions in the history.
    `completed` is `math.inf` for one of unknown outcome."""

    completed: float
    invoked: int
    alike: Alike


class Moment(NamedTuple):
    """What one or more reads showed: per account its balance and its count. The first of them ended
    at `first_end`, the last one began at `last_begin`."""

    balances: tuple[int, ...]
    counts: tuple[int, ...]
    first_end: int
    last_begin: int


class _Step(NamedTuple):
    """What lies between two moments: counts and money per account, and the moves that cannot be in
    an earlier step. A move that was over before `due` is in this step at the latest. Not
    `is_possible`: such a move cannot be in this step yet."""

    counts: tuple[int, ...]
    money: tuple[int, ...]
    released: list[Move]
    due: int
    is_possible: bool


class Answer(NamedTuple):
    """Whether there is an explanation, and the furthest moment that was tried."""

    validity: Validity
    moment: int


def max_tries_of(moments: Sequence[Moment]) -> int:
    """How many tries suffice unless the search keeps going back, however long the history is."""
    return LEAST_MAX_TRIES + TRIES_PER_MOMENT * len(moments)


def explain(moves: Sequence[Move], moments: Sequence[Moment], opening: int,
            max_tries: int) -> Answer:
    """Whether `moves` explain `moments`, which are in the order of their counts; unknown when
    `max_tries` do not suffice to tell."""
    return _Search(_steps(moves, moments, opening), max_tries).run()


def _steps(moves: Sequence[Move], moments: Sequence[Moment], opening: int) -> list[_Step]:
    # A move that began after a moment ended is in none of the steps up to it.
    ends = list(itertools.accumulate((moment.first_end for moment in reversed(moments)), min))
    begins = itertools.accumulate((moment.last_begin for moment in moments), max)
    waiting = sorted(moves, key=lambda move: -move.invoked)
    first_over = list(itertools.accumulate((move.completed for move in waiting), min))
    steps: list[_Step] = []
    counts: Sequence[int] = [0] * len(moments[0].counts)
    balances: Sequence[int] = [opening] * len(counts)
    for moment, end, due in zip(moments, reversed(ends), begins, strict=True):
        released: list[Move] = []
        while waiting and waiting[-1].invoked < end:
            released.append(waiting.pop())
        steps.append(_Step(_minus(moment.counts, counts), _minus(moment.balances, balances),
                           released, due, not waiting or first_over[len(waiting) - 1] >= due))
        counts, balances = moment.counts, moment.balances
    return steps


def _minus(after: Sequence[int], before: Sequence[int]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(after, before, strict=True))


class _Search:
    """The depth-first search over the steps."""

    def __init__(self, steps: Sequence[_Step], max_tries: int) -> None:
        self._steps = steps
        self._tries_left = max_tries
        self._furthest = 0

    def run(self) -> Answer:
        """Search until every step is explained, nothing is left to try, or the tries are used
        up."""
        # A frame is what may be left over after its step, still to be tried.
        frames = [self._after(0, [])]
        while frames:
            left = next(frames[-1], None)
            if left is None:
                frames.pop()
            elif len(frames) == len(self._steps):
                return Answer(Validity.VALID, self._furthest)
            else:
                self._furthest = max(self._furthest, len(frames))
                frames.append(self._after(len(frames), left))
        return Answer(Validity.INVALID if self._tries_left else Validity.UNKNOWN, self._furthest)

    def _spend(self) -> bool:
        """Count one try; False when there is none left."""
        self._tries_left = max(0, self._tries_left - 1)
        return self._tries_left > 0

    def _after(self, number: int, left: Sequence[Move]) -> Iterator[list[Move]]:
        """The moves that are left over after a step, for each way to explain it."""
        step = self._steps[number]
        if not step.is_possible:
            return
        alike: dict[Alike, list[Move]] = defaultdict(list)
        taken: Counter[Alike] = Counter()
        # These cannot be in this step. A step holds on to what it knows until the search ends, so
        # that of them must be little.
        others: list[Move] = []
        for move in sorted([*left, *step.released]):
            source, target, _ = move.alike
            if move.completed < step.due or (step.counts[source] and step.counts[target]):
                alike[move.alike].append(move)
                taken[move.alike] += move.completed < step.due
            else:
                others.append(move)
        counts, money = list(step.counts), list(step.money)
        for (source, target, amount), number_due in taken.items():
            counts[source] -= number_due
            counts[target] -= number_due
            money[source] += number_due * amount
            money[target] -= number_due * amount
        free = {each: len(moves) - taken[each] for each, moves in alike.items()}
        for chosen in self._choices(tuple(counts), tuple(money), free):
            yield from self._without(alike, taken + Counter(chosen), step.due, others)

    def _choices(self, counts: tuple[int, ...], money: tuple[int, ...],
                 free: dict[Alike, int]) -> Iterator[tuple[Alike, ...]]:
        """Every choice among `free` that has these counts and this money, once."""
        if any(count < 0 or (amount and not count)
               for count, amount in zip(counts, money, strict=True)):
            return
        stack: list[tuple[tuple[int, ...], tuple[int, ...], dict[Alike, int],
                          tuple[Alike, ...]]] = [(counts, money, free, ())]
        while stack:
            if not self._spend():
                return
            counts, money, free, chosen = stack.pop()
            account = min((a for a, count in enumerate(counts) if count),
                          key=counts.__getitem__, default=None)
            if account is None:
                yield chosen
                continue
            usable = {each: number for each, number in free.items()
                      if number and counts[each[0]] and counts[each[1]]}
            children = []
            for each in [each for each in usable if account in each[:2]]:
                if not self._spend():
                    return
                source, target, amount = each
                fewer = tuple(c - (a in (source, target)) for a, c in enumerate(counts))
                rest = tuple(m + amount if a == source else m - amount if a == target else m
                             for a, m in enumerate(money))
                if all(fewer[a] or not rest[a] for a in (source, target)):
                    children.append((fewer, rest, usable | {each: usable[each] - 1},
                                     (*chosen, each)))
                # Whatever else is chosen with this one was chosen before.
                del usable[each]
            stack += reversed(children)

    def _without(self, alike: dict[Alike, list[Move]], taken: Counter[Alike], due: int,
                 others: Sequence[Move]) -> Iterator[list[Move]]:
        """What is left of the moves, `others` among it, after so many of each kind, for each way to
        take them that may matter."""
        first = [move for each, moves in alike.items() for move in moves[:taken[each]]]
        left = [move for each, moves in alike.items() for move in moves[taken[each]:]]
        left += others
        if _is_cut(first, left):
            yield left
            return
        for parts in itertools.product(*(itertools.combinations(moves, taken[each])
                                         for each, moves in alike.items())):
            if not self._spend():
                return
            chosen = set(itertools.chain.from_iterable(parts))
            left = [move for moves in alike.values() for move in moves if move not in chosen]
            left += others
            if all(move.completed >= due for move in left) and _is_cut(chosen, left):
                yield left


def _is_cut(taken: Sequence[Move] | set[Move], left: Sequence[Move]) -> bool:
    """Whether nothing that is left was over before something began that is taken."""
    return max((move.invoked for move in taken), default=-1) < min(
        (move.completed for move in left), default=math.inf)
