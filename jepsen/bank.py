"""A bank: transfers move money between accounts, so no read may see more or less of it.

`transfer` carries `[from, to, amount]`; `read` brings back all accounts at one moment, as a mapping
of account to `[balance, number of transfers]`. The number shows a transfer that was acknowledged
and is gone as a whole, of which the balances show nothing.

Every read must be explained by transfers: each shows what some of them left behind, with all those
in it that are in a read before (`bank_search`).
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from jepsen import bank_search
from jepsen.bank_search import Moment, Move
from jepsen.history import (
    HistoryError,
    Kind,
    Operation,
    Record,
    Value,
    pair,
    require_functions,
)
from jepsen.verdict import Validity, Verdict, judge

CHECKER = "bank"
FUNCTIONS = ("transfer", "read")


def check_bank(history: Sequence[Record], *, accounts: Sequence[str], opening: int,
               max_tries: int | None = None) -> Verdict:
    """Every read holds exactly `accounts`, which began with `opening` each, with the same money
    between them and none below zero. The reads are linearizable: some order of the transfers, those
    that were acknowledged and perhaps some of unknown outcome, explains every count and balance.

    Unknown without a successful transfer, when no read began after the last one, or when
    `max_tries` of the search (None: as many as the length calls for) did not suffice. Raises
    `HistoryError`.
    """
    operations = pair(history)
    require_functions(operations, FUNCTIONS)
    for op in operations:
        _require_transfer(op, accounts)
    reads = [op for op in operations if op.f == "read" and op.kind is Kind.OK]
    transfers = [op for op in operations if op.f == "transfer" and op.kind is Kind.OK]
    problems = [problem for read in reads
                for problem in _read_problems(read, accounts, opening * len(accounts))]
    problems += _miscounts(operations, [
        read for read in reads if all(map(_is_account, dict(read.result).values()))])
    facts = {"reads": len(reads), "transfers": len(transfers),
             "unknown_transfers": sum(op.f == "transfer" and op.kind is Kind.INFO
                                      for op in operations)}
    last = max((op.completed for op in transfers if op.completed is not None), default=None)
    unknown = []
    if last is None:
        unknown.append("no transfer succeeded")
    elif not any(read.invoked > last for read in reads):
        unknown.append("no read began after the last successful transfer")
    if not problems:
        problems = _order_problems(reads)
    if reads and not problems:
        validity, line = _explain(operations, reads, opening, max_tries)
        problems += [line] * (validity is Validity.INVALID)
        unknown += [line] * (validity is Validity.UNKNOWN)
    return judge(CHECKER, problems, facts, unknown)


def _require_transfer(op: Operation, accounts: Sequence[str]) -> None:
    if op.f == "transfer" and not (
            isinstance(op.argument, tuple) and len(op.argument) == 3
            and op.argument[0] != op.argument[1] and type(op.argument[2]) is int
            and all(account in accounts for account in op.argument[:2])):
        raise HistoryError(f"a transfer needs [from, to, amount]: {op.describe()}")


def _is_account(value: Value) -> bool:
    return isinstance(value, tuple) and [type(part) for part in value] == [int, int]


def _miscounts(operations: Sequence[Operation], reads: Sequence[Operation]) -> list[str]:
    """Reads of an account with fewer transfers than were certainly made, or more than may be."""
    made: dict[Value, list[int]] = defaultdict(list)
    begun: dict[Value, list[int]] = defaultdict(list)
    for op in operations:
        if op.f == "transfer" and op.kind is not Kind.FAIL:
            for account in op.argument[:2]:
                bisect.insort(begun[account], op.invoked)
                if op.kind is Kind.OK and op.completed is not None:
                    bisect.insort(made[account], op.completed)
    problems = []
    for read in reads:
        for account, (_, count) in read.result:
            least = bisect.bisect_left(made[account], read.invoked)
            most = bisect.bisect_left(begun[account], read.completed or 0)
            if not least <= count <= most:
                problems.append(f"{account} has {count} transfers, not {least} to {most}: "
                                f"{read.describe()}")
    return problems


def _read_problems(read: Operation, accounts: Sequence[str], total: int) -> list[str]:
    if not all(map(_is_account, dict(read.result).values())):
        return [f"an account that nobody wrote: {read.describe()}"]
    balances = {account: balance for account, (balance, _) in read.result}
    problems = []
    if sorted(balances) != sorted(accounts):
        problems.append(f"the accounts are {sorted(balances)}: {read.describe()}")
    if sum(balances.values()) != total:
        problems.append(f"the balances sum to {sum(balances.values())} instead of {total}: "
                        f"{read.describe()}")
    negative = sorted(account for account, balance in balances.items() if balance < 0)
    if negative:
        problems.append(f"{', '.join(negative)} below zero: {read.describe()}")
    return problems


# --- what is behind the reads ----------------------------------------------------------------


def _counts(read: Operation) -> tuple[int, ...]:
    return tuple(count for _, (_, count) in read.result)


def _balances(read: Operation) -> tuple[int, ...]:
    return tuple(balance for _, (balance, _) in read.result)


def _order_problems(reads: Sequence[Operation]) -> list[str]:
    """Reads of which neither can come first: no count goes down in real time, and of any two reads
    one has all the transfers of the other."""
    problems = []
    by_end = sorted(reads, key=lambda read: read.completed or 0)
    highest: dict[Value, tuple[int, Operation]] = {}
    ended = 0
    for read in reads:
        while (by_end[ended].completed or 0) < read.invoked:
            for account, (_, count) in by_end[ended].result:
                if account not in highest or count > highest[account][0]:
                    highest[account] = (count, by_end[ended])
            ended += 1
        for account, (_, count) in read.result:
            before = highest.get(account)
            if before is not None and count < before[0]:
                problems.append(f"{account} had {before[0]} transfers, then {count}: "
                                f"{before[1].describe()}, then {read.describe()}")
    for one, other in pairwise(sorted(reads, key=lambda read: sum(_counts(read)))):
        if any(b < a for a, b in zip(_counts(one), _counts(other), strict=True)):
            problems.append(f"neither came first: {one.describe()} and {other.describe()}")
        elif _counts(one) == _counts(other) and _balances(one) != _balances(other):
            problems.append(f"the same numbers of transfers and other balances: {one.describe()} "
                            f"and {other.describe()}")
    return problems


def _explain(operations: Sequence[Operation], reads: Sequence[Operation], opening: int,
             max_tries: int | None) -> tuple[Validity, str]:
    """Whether transfers explain the reads, and the line that says where they do not."""
    numbers = {account: number for number, (account, _) in enumerate(reads[0].result)}
    moves = []
    for op in operations:
        if op.f == "transfer" and op.kind is not Kind.FAIL:
            source, target, amount = op.argument
            moves.append(Move(math.inf if op.completed is None else op.completed, op.invoked,
                              (numbers[source], numbers[target], amount)))
    alike: dict[tuple[int, ...], list[Operation]] = defaultdict(list)
    for read in sorted(reads, key=lambda read: sum(_counts(read))):
        alike[_counts(read)].append(read)
    moments = [Moment(_balances(part[0]), counts, min(read.completed or 0 for read in part),
                      max(read.invoked for read in part)) for counts, part in alike.items()]
    if max_tries is None:
        max_tries = bank_search.max_tries_of(moments)
    validity, furthest = bank_search.explain(moves, moments, opening, max_tries)
    shown = [part[0].describe() for part in alike.values()]
    before = shown[furthest - 1] if furthest else "the opening balances"
    if validity is Validity.UNKNOWN:
        return validity, f"{max_tries} tries did not tell what explains {shown[furthest]}"
    return validity, f"no transfers explain {shown[furthest]} after {before}"
