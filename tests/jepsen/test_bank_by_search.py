"""`check_bank` against a search through every order, on small random histories."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from jepsen.bank import check_bank
from jepsen.history import Kind, Operation, Record, Value, pair
from jepsen.verdict import Validity

ACCOUNTS = ("a", "b", "c", "d")
OPENING = 10
HISTORIES = 3000

State = Mapping[str, Sequence[int]]
START: State = {account: (OPENING, 0) for account in ACCOUNTS}


def after(transfer: Value, state: State) -> State:
    source, target, amount = transfer
    return {**state, source: (state[source][0] - amount, state[source][1] + 1),
            target: (state[target][0] + amount, state[target][1] + 1)}


def random_history(source: random.Random) -> list[Record]:
    """Transfers and reads of three processes. A read shows what some transfers that have begun
    leave behind, those that are over more often than not."""
    records: list[Record] = []
    open_calls: dict[int, tuple[str, Value]] = {}
    processes, begun = [0, 1, 2], []
    calls = source.randrange(3, 10)

    def add(kind: Kind, process: int, f: str, value: Value) -> None:
        records.append(Record(kind, process, len(records), f, None, value))

    while calls or open_calls:
        slot = source.randrange(len(processes))
        process = processes[slot]
        if process in open_calls:
            f, argument = open_calls.pop(process)
            if f == "read":
                state = START
                for transfer, is_over in begun:
                    if source.random() < (0.9 if is_over[0] else 0.5):
                        state = after(transfer, state)
                add(Kind.OK, process, f, {name: list(shown) for name, shown in state.items()})
            elif source.random() < 0.3:
                add(Kind.INFO, process, f, argument)
                processes[slot] = max(processes) + 1
            else:
                next(over for transfer, over in begun if transfer is argument)[0] = True
                add(Kind.OK, process, f, argument)
        elif calls:
            calls -= 1
            if source.random() < 0.55:
                transfer = [*source.choice((("a", "b"), ("a", "d"), ("c", "b"), ("c", "d"))),
                            source.choice((1, 1, 2))]
                begun.append((transfer, [False]))
                open_calls[process] = ("transfer", transfer)
            else:
                open_calls[process] = ("read", None)
            add(Kind.INVOKE, process, *open_calls[process])
    return records


def has_explanation(operations: Sequence[Operation]) -> bool:
    """Whether there is an order in real time of all that ended and some of what did not."""
    certain = [op for op in operations if op.kind is Kind.OK]
    doubtful = [op for op in operations if op.kind is Kind.INFO]
    return any(_in_some_order([*certain, *some], START)
               for number in range(len(doubtful) + 1)
               for some in itertools.combinations(doubtful, number))


def _in_some_order(left: list[Operation], state: State) -> bool:
    first_end = min((op.completed for op in left if op.completed is not None), default=None)
    for op in left:
        if first_end is not None and op.invoked > first_end:
            continue
        rest = [other for other in left if other is not op]
        if op.f == "transfer":
            if _in_some_order(rest, after(op.argument, state)):
                return True
        elif dict(op.result) == state and _in_some_order(rest, state):
            return True
    return not left


@pytest.mark.parametrize("seed", range(4))
def test_the_checker_agrees_with_a_search(seed: int) -> None:
    source = random.Random(seed)
    seen: list[bool] = []
    for _ in range(HISTORIES // 4):
        history = random_history(source)
        explained = has_explanation(pair(history))
        verdict = check_bank(history, accounts=ACCOUNTS, opening=OPENING)
        assert (verdict.validity is not Validity.INVALID) is explained, (history, verdict)
        if any(op.f == "read" for op in pair(history)):
            seen.append(explained)
    assert 0.2 < seen.count(True) / len(seen) < 0.8
