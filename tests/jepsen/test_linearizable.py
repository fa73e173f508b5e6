"""The WGL checker: hand-written histories, and agreement with a brute-force checker."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepsen.history import HistoryError, Kind, Operation, Record, pair
from jepsen.linearizable import Budget, check_operations, check_register, minimise, search_key
from jepsen.verdict import Validity

_TOKEN = re.compile(r"(\d+)([(!?)x])(?:(\w)(\w*)(?:>(\w+))?)?")


def value(text: str) -> int | None:
    return None if text in ("", "n") else int(text)


def script(text: str, key: str = "k") -> list[Record]:
    """A history from a line of events, each `process`, then what happens:

    `0(w5` invokes write 5, `0(r` a read, `0(c3>4` a compare-and-set, `0(d` a delete; `0)` completes
    ok, `0)r5` a read that returned 5 (`n` for absent), `0!` fails, `0?` has an unknown outcome.
    """
    names = {"w": "write", "r": "read", "c": "cas", "d": "delete"}
    open_calls: dict[int, tuple[str, object]] = {}
    records = []
    for time_ns, (process, what, function, first, second) in enumerate(_TOKEN.findall(text)):
        number = int(process)
        if what == "(":
            argument = {"w": lambda f=first: value(f), "r": lambda: None, "d": lambda: None,
                        "c": lambda f=first, s=second: [value(f), value(s)]}[function]()
            open_calls[number] = (names[function], argument)
            records.append(Record(Kind.INVOKE, number, time_ns, names[function], key, argument))
            continue
        name, argument = open_calls.pop(number)
        result = value(first) if function == "r" else argument
        kind = {")": Kind.OK, "!": Kind.FAIL, "?": Kind.INFO}[what]
        records.append(Record(kind, number, time_ns, name, key, result))
    return records


VALID = {
    "empty": "",
    "write then read": "0(w1 0) 1(r 1)r1",
    "read of an absent key": "0(r 0)rn",
    "read during a write sees the old": "0(w1 1(r 1)rn 0)",
    "read during a write sees the new": "0(w1 1(r 1)r1 0)",
    "two concurrent writes, either order": "0(w1 1(w2 0) 1) 2(r 2)r1",
    "unknown write that happened": "0(w1 0? 1(r 1)r1",
    "unknown write that did not": "0(w1 0? 1(r 1)rn",
    "unknown write that happens late": "0(w1 0? 1(r 1)rn 1(w2 1) 1(r 1)r2 1(r 1)r1",
    "write without completion that happened": "0(w1 1(r 1)r1",
    "failed write leaves nothing": "0(w1 0! 1(r 1)rn",
    "cas chain": "0(w1 0) 0(c1>2 0) 1(c2>3 1) 0(r 0)r3",
    "cas that failed": "0(w1 0) 0(c7>2 0! 0(r 0)r1",
    "cas from absent": "0(cn>1 0) 0(r 0)r1",
    "unknown cas that happened": "0(w1 0) 0(c1>2 0? 1(r 1)r2",
    "delete": "0(w1 0) 0(d 0) 1(r 1)rn",
    "same value written twice": "0(w1 0) 1(w2 1) 0(w1 0) 1(r 1)r1",
    "overlapping reads around a write": "0(w1 0) 1(w2 2(r 3(r 3)r1 2)r2 1)",
    # Herlihy and Wing, 1990, figure 2 in spirit: order fixed only by what later reads saw.
    "late order": "0(w1 1(w2 2(w3 2) 1) 0) 3(r 3)r2",
    "chain of unknown cas, seen at its end only":
        "0(w1 0) 1(c1>2 1? 2(c2>3 2? 3(c3>4 3? 4(r 4)r4",
    "unknown cas whose turn comes after a definite one":
        "0(w1 0) 1(c3>2 1? 2(r 2)r1 2(c1>3 2) 2(r 2)r2",
    "unknown delete between two reads": "0(w1 0) 1(d 1? 2(r 2)r1 2(r 2)rn",
    "two unknown writes in the other order than they began":
        "0(w1 0? 1(w2 1? 2(r 2)r2 2(r 2)r1",
    "concurrent cas, only one succeeds": "0(w1 0) 0(c1>2 1(c1>3 0) 1! 2(r 2)r2",
    "cas that goes round": "0(w1 0) 0(c1>2 0) 1(c2>1 1) 0(c1>2 0) 2(r 2)r2",
    "stale within concurrency": "0(w1 0) 1(w2 2(r 3(r 3)r2 2)r1 1) 2(r 2)r2",
    "a write nobody saw between two others": "0(w1 0) 1(w2 2(w3 1) 2) 0(r 0)r3",
}

INVALID = {
    "stale read": "0(w1 0) 0(w2 0) 1(r 1)r1",
    "lost write": "0(w1 0) 1(r 1)rn",
    "value from nowhere": "0(r 0)r9",
    "failed write seen": "0(w1 0! 1(r 1)r1",
    "new then old": "0(w1 0) 1(w2 2(r 2)r2 3(r 3)r1 1)",
    "unknown write seen, then gone": "0(w1 0) 1(w2 1? 2(r 2)r2 2(r 2)r1",
    "unknown write before its invocation": "1(r 1)r1 0(w1 0?",
    "two cas from one value": "0(w1 0) 0(c1>2 0) 1(c1>3 1) 2(r 2)r2",
    "cas on a value that never was": "0(w1 0) 0(c5>6 0)",
    "deleted value read": "0(w1 0) 0(d 0) 1(r 1)r1",
    "one unknown write seen twice with another between":
        "0(w1 0? 1(w2 1) 1(r 1)r1 1(w3 1) 1(r 1)r1",
    "concurrent writes read in both orders":
        "0(w1 1(w2 0) 1) 2(r 2)r1 2(r 2)r2 2(r 2)r1",
    "chain of unknown cas with a link that failed":
        "0(w1 0) 1(c1>2 1? 2(c2>3 2! 3(c3>4 3? 4(r 4)r4",
    "unknown cas used twice": "0(w1 0) 1(c1>2 1? 2(r 2)r2 2(w1 2) 2(r 2)r1 2(r 2)r2",
    "lost update that only unknown operations could show":
        "0(w1 0) 1(c1>2 1? 2(r 2)r2 3(c1>3 3? 2(r 2)r3",
    "unknown delete seen, then the value again": "0(w1 0) 1(d 1? 2(r 2)rn 2(r 2)r1",
    "new then old within one write": "0(w1 0) 1(w2 2(r 2)r2 3(r 3)r1 1)",
    "two concurrent cas from one value, both succeed":
        "0(w1 0) 0(c1>2 1(c1>3 0) 1) 2(r 2)r3",
    "cas from a value that was overwritten before it began":
        "0(w1 0) 0(w2 0) 1(c1>3 1) 2(r 2)r3",
    "cas succeeded and its value was never there, after a later read":
        "0(w1 0) 0(c1>2 0) 1(r 1)r2 1(r 1)r1",
    "reads by two clients see two writes in opposite orders":
        "0(w1 1(w2 2(r 2)r1 3(r 3)r2 2(r 2)r2 3(r 3)r1 0) 1)",
    "lost compare-and-set": "0(w1 0) 0(c1>2 0) 1(r 1)r1",
}


@pytest.mark.parametrize("text", VALID.values(), ids=VALID.keys())
def test_valid(text: str) -> None:
    verdict = check_register(script(text))
    assert verdict.validity is Validity.VALID, verdict.problems


@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID.keys())
def test_invalid(text: str) -> None:
    verdict = check_register(script(text))
    assert verdict.validity is Validity.INVALID
    assert "not linearizable" in verdict.problems[0]


def test_keys_are_judged_apart() -> None:
    good, bad = script("0(w1 0) 1(r 1)r1", "a"), script("2(w1 2) 3(r 3)rn", "b")
    records = [Record(r.kind, r.process, n, r.f, r.key, r.value)
               for n, r in enumerate(good + bad)]
    verdict = check_register(records)
    assert verdict.validity is Validity.INVALID
    assert len(verdict.problems) == 1
    assert verdict.problems[0].startswith("key b:")


def test_unknown_when_the_budget_is_used_up() -> None:
    history = random_history(random.Random(1), operations=400, processes=8)
    assert check_register(history, max_configurations=3).validity is Validity.UNKNOWN
    clock = itertools.count(step=100.0)
    assert check_register(history, time_limit_s=1.0, now=lambda: next(clock)).validity in (
        Validity.UNKNOWN, Validity.VALID)


def test_other_functions_are_refused() -> None:
    with pytest.raises(HistoryError, match="no function of this workload"):
        check_register([Record(Kind.INVOKE, 0, 1, "append", "k", 1)])


def test_true_is_no_1() -> None:
    for seen, validity in ((1, Validity.VALID), (True, Validity.INVALID)):
        assert check_register([
            Record(Kind.INVOKE, 0, 1, "write", "k", 1), Record(Kind.OK, 0, 2, "write", "k", 1),
            Record(Kind.INVOKE, 0, 3, "read", "k"), Record(Kind.OK, 0, 4, "read", "k", seen),
        ]).validity is validity


def test_the_counter_example_is_small_and_invalid_by_itself() -> None:
    history = random_history(random.Random(7), operations=600, processes=5)
    last = history[-1].time_ns
    history += [Record(Kind.INVOKE, 900, last + 1, "write", "k", -1),
                Record(Kind.OK, 900, last + 2, "write", "k", -1),
                Record(Kind.INVOKE, 900, last + 3, "write", "k", -2),
                Record(Kind.OK, 900, last + 4, "write", "k", -2),
                Record(Kind.INVOKE, 901, last + 5, "read", "k"),
                Record(Kind.OK, 901, last + 6, "read", "k", -1)]
    budget = Budget(10**6, 10**12, lambda: 0.0)
    smallest = minimise(pair(history), budget)
    assert search_key(smallest, budget).validity is Validity.INVALID
    assert [(op.f, op.argument, op.result) for op in smallest] == [
        ("write", -1, -1), ("write", -2, -2), ("read", None, -1)]


# --- against brute force ---------------------------------------------------------------------


def brute_force(operations: list[Operation]) -> bool:
    """Every subset of the unknown operations, every order that real time allows. Tiny inputs
    only."""
    definite = [op for op in operations if op.kind is Kind.OK]
    unknown = [op for op in operations if op.kind is Kind.INFO and op.f != "read"]
    for size in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, size):
            if _some_order([*definite, *chosen], None):
                return True
    return False


def _some_order(left: list[Operation], current: object) -> bool:
    if not left:
        return True
    for operation in left:
        if any(other.completed is not None and other.completed < operation.invoked
               for other in left if other is not operation):
            continue
        rest = [other for other in left if other is not operation]
        if operation.f == "read":
            if operation.result == current and _some_order(rest, current):
                return True
        elif operation.f == "cas":
            expected, new = operation.argument
            if expected == current and _some_order(rest, new):
                return True
        elif _some_order(rest, operation.argument if operation.f == "write" else None):
            return True
    return False


@st.composite
def small_histories(draw: st.DrawFn) -> list[Record]:
    """Up to 7 operations of 3 processes over 3 values, with any results: valid or not."""
    values = st.sampled_from([None, 1, 2, 3])
    records: list[Record] = []
    busy: dict[int, tuple[str, object]] = {}
    for _ in range(draw(st.integers(0, 14))):
        process = draw(st.integers(0, 2))
        if process not in busy:
            f = draw(st.sampled_from(["write", "read", "cas", "delete"]))
            argument: object = {"write": lambda: draw(st.sampled_from([1, 2, 3])),
                                "cas": lambda: [draw(values), draw(st.sampled_from([1, 2, 3]))],
                                "read": lambda: None, "delete": lambda: None}[f]()
            records.append(Record(Kind.INVOKE, process, len(records), f, "k", argument))
            busy[process] = (f, argument)
            continue
        f, argument = busy.pop(process)
        kind = draw(st.sampled_from([Kind.OK, Kind.OK, Kind.OK, Kind.FAIL, Kind.INFO]))
        result = draw(values) if f == "read" and kind is Kind.OK else argument
        records.append(Record(kind, process, len(records), f, "k", result))
    return records


@settings(max_examples=600)
@given(small_histories())
def test_agrees_with_brute_force(history: list[Record]) -> None:
    operations = pair(history)
    expected = Validity.VALID if brute_force(operations) else Validity.INVALID
    assert check_operations(operations).validity is expected


@settings(max_examples=150)
@given(small_histories())
def test_a_minimised_history_is_invalid_for_brute_force_too(history: list[Record]) -> None:
    operations = pair(history)
    if brute_force(operations):
        return
    smallest = minimise(operations, Budget(10**6, 10**12, lambda: 0.0))
    assert not brute_force(smallest)
    assert len(smallest) <= len(operations)


def random_history(source: random.Random, *, operations: int, processes: int) -> list[Record]:
    """A history of a real register: every operation takes effect between its two records."""
    records: list[Record] = []
    state: object = None
    calls: dict[int, list[object]] = {}  # process -> [f, argument, effect done, result]
    started = 0
    while started < operations or calls:
        process = source.randrange(processes)
        call = calls.get(process)
        if call is None:
            if started < operations:
                started += 1
                f = source.choice(["read", "write", "cas"])
                argument: object = {"read": None, "write": started,
                                    "cas": [state, started]}[f]
                calls[process] = [f, argument, False, None]
                records.append(Record(Kind.INVOKE, process, len(records), f, "k", argument))
        elif not call[2]:
            call[2] = True
            if call[0] == "read":
                call[3] = state
            elif call[0] == "write":
                state = call[1]
            elif isinstance(call[1], list) and call[1][0] == state:
                state = call[1][1]
            else:
                call[3] = "failed"
        else:
            f, argument, _, result = calls.pop(process)
            kind = Kind.FAIL if result == "failed" else Kind.OK
            if kind is Kind.OK and f != "read" and source.random() < 0.05:
                kind = Kind.INFO
            records.append(Record(kind, process, len(records), str(f), "k",
                                  result if f == "read" else argument))
    return records


@pytest.mark.parametrize("seed", range(5))
def test_a_real_register_is_linearizable(seed: int) -> None:
    history = random_history(random.Random(seed), operations=20_000 if seed == 0 else 2_000,
                             processes=12)
    verdict = check_register(history)
    assert verdict.validity is Validity.VALID, verdict.problems
    assert verdict.facts["operations"] == (20_000 if seed == 0 else 2_000)
