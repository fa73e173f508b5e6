"""A bank: transfers move money between accounts, so no read may see more or less of it.

`transfer` carries `[from, to, amount]`; `read` brings back all balances at one moment, as a mapping
of account to balance.
"""

from __future__ import annotations

from collections.abc import Sequence

from jepsen.history import Kind, Operation, Record, pair
from jepsen.verdict import Verdict, judge

CHECKER = "bank"


def check_bank(history: Sequence[Record], *, accounts: Sequence[str], total: int) -> Verdict:
    """Every read holds exactly `accounts`, with `total` between them and none below zero.

    Unknown without a successful transfer and a read that began after one. Raises `HistoryError`.
    """
    operations = pair(history)
    reads = [op for op in operations if op.f == "read" and op.kind is Kind.OK]
    transfers = [op for op in operations if op.f == "transfer" and op.kind is Kind.OK]
    problems = [problem for read in reads for problem in _read_problems(read, accounts, total)]
    facts = {"reads": len(reads), "transfers": len(transfers),
             "unknown_transfers": sum(op.f == "transfer" and op.kind is Kind.INFO
                                      for op in operations)}
    first = min((op.completed for op in transfers if op.completed is not None), default=None)
    unknown = []
    if first is None or not any(read.invoked > first for read in reads):
        unknown.append("no read began after a successful transfer")
    return judge(CHECKER, problems, facts, unknown)


def _read_problems(read: Operation, accounts: Sequence[str], total: int) -> list[str]:
    balances = dict(read.result)
    if not all(isinstance(balance, int) for balance in balances.values()):
        return [f"a balance that nobody wrote: {read.describe()}"]
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
