"""A bank: transfers move money between accounts, so no read may see more or less of it.

`transfer` carries `[from, to, amount]`; `read` brings back all accounts at one moment, as a mapping
of account to `[balance, number of transfers]`. The number shows a transfer that was acknowledged
and is gone as a whole, of which the balances show nothing.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence

from jepsen.history import Kind, Operation, Record, Value, pair
from jepsen.verdict import Verdict, judge

CHECKER = "bank"


def check_bank(history: Sequence[Record], *, accounts: Sequence[str], total: int) -> Verdict:
    """Every read holds exactly `accounts`, with `total` between them and none below zero, and each
    has as many transfers behind it as were acknowledged before the read began, or as many more as
    may have happened by its end.

    Unknown without a successful transfer, or when no read began after the last one. Raises
    `HistoryError`.
    """
    operations = pair(history)
    reads = [op for op in operations if op.f == "read" and op.kind is Kind.OK]
    transfers = [op for op in operations if op.f == "transfer" and op.kind is Kind.OK]
    problems = [problem for read in reads for problem in _read_problems(read, accounts, total)]
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
    return judge(CHECKER, problems, facts, unknown)


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
