"""The append, bank, unique-write and scan checkers on hand-written histories."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from jepsen import bank_search
from jepsen.append import check_append
from jepsen.bank import check_bank
from jepsen.history import HistoryError, Kind, Record
from jepsen.scans import check_scans
from jepsen.unique_writes import check_unique_writes
from jepsen.verdict import Validity, Verdict, combine, judge

Call = tuple[str, str | None, object, str, object]
"""function, key, argument, how it ended, what came back"""


def sequential(*calls: Call) -> list[Record]:
    """One call after the other, each by a process of its own."""
    records: list[Record] = []
    for process, (f, key, argument, kind, result) in enumerate(calls):
        records.append(Record(Kind.INVOKE, process, len(records), f, key, argument))
        records.append(Record(Kind(kind), process, len(records), f, key, result))
    return records


def concurrent(*calls: Call) -> list[Record]:
    """All calls begin, in order; then all end, in order."""
    begins = [Record(Kind.INVOKE, n, n, f, key, argument)
              for n, (f, key, argument, _, _) in enumerate(calls)]
    ends = [Record(Kind(kind), n, len(calls) + n, f, key, result)
            for n, (f, key, _, kind, result) in enumerate(calls)]
    return begins + ends


def then(*parts: list[Record]) -> list[Record]:
    """One part after the other, each by other processes."""
    return [Record(r.kind, r.process + later, r.time_ns + later, r.f, r.key, r.value)
            for number, part in enumerate(parts) for later in [1000 * number] for r in part]


def opened(call: Call, *within: Call) -> list[Record]:
    """The calls of `within`, one after the other, between the begin and the end of `call`."""
    f, key, argument, kind, result = call
    between = sequential(*within)
    return [Record(Kind.INVOKE, 999, 0, f, key, argument), *between,
            Record(Kind(kind), 999, len(between), f, key, result)]


def append(element: int, kind: str = "ok") -> Call:
    return ("append", "k", element, kind, element)


def read_list(*elements: int) -> Call:
    return ("read", "k", None, "ok", list(elements))


APPEND_CASES: dict[str, tuple[list[Record], Validity, str]] = {
    "in order": (sequential(append(1), append(2), read_list(1, 2)), Validity.VALID, ""),
    "concurrent, other order": (
        then(concurrent(append(1), append(2)), sequential(read_list(2, 1))), Validity.VALID, ""),
    "unknown append read": (sequential(append(1, "info"), read_list(1), append(2),
                                       read_list(1, 2)), Validity.VALID, ""),
    "unknown append not read": (sequential(append(1, "info"), append(2), read_list(2)),
                                Validity.VALID, ""),
    "lost": (sequential(append(1), append(2), read_list(1)), Validity.INVALID, "was lost"),
    "all lost": (sequential(append(1), ("read", "k", None, "ok", None)), Validity.INVALID,
                 "was lost"),
    "lost, and a later one read, by a read that began before both": (
        opened(read_list(2), append(1), append(2)), Validity.INVALID, "was lost"),
    "lost, and a later one of unknown outcome read": (
        opened(read_list(2), append(1), append(2, "info")), Validity.INVALID, "was lost"),
    "an earlier one read, by a read that began before both": (
        then(opened(read_list(1), append(1), append(2)), sequential(read_list(1, 2))),
        Validity.VALID, ""),
    "not read, and one under way with it read": (
        concurrent(append(1), append(2), read_list(2)), Validity.UNKNOWN,
        "never looked for"),
    "twice": (sequential(append(1), read_list(1, 1)), Validity.INVALID, "twice"),
    "fork": (sequential(append(1), append(2, "info"), append(3, "info"), read_list(1, 2),
                        read_list(1, 3)), Validity.INVALID, "disagree"),
    "invented": (sequential(append(1), read_list(1, 9)), Validity.INVALID, "never appended"),
    "failed append read": (sequential(append(1, "fail"), append(2), read_list(1, 2)),
                           Validity.INVALID, "failed append"),
    "tried again after a failure": (sequential(append(1, "fail"), append(1), read_list(1)),
                                    Validity.VALID, ""),
    "lost after a second attempt": (
        sequential(append(1, "fail"), append(1), read_list()), Validity.INVALID, "was lost"),
    "read before the second attempt": (
        sequential(append(1, "fail"), read_list(1), append(1), read_list(1)), Validity.INVALID,
        "before this began"),
    "against real time": (sequential(append(1), append(2), read_list(2, 1)), Validity.INVALID,
                          "before this began"),
    "stale read": (sequential(append(1), append(2), read_list(1, 2), read_list(1)),
                   Validity.INVALID, "before this began"),
    "a number in the place of a list": (
        sequential(append(1), ("read", "k", None, "ok", 1)), Validity.INVALID, "no list"),
    "a text in the place of a list": (
        sequential(append(1), ("read", "k", None, "ok", "1")), Validity.INVALID, "no list"),
    "true is no 1": (sequential(append(1), read_list(True)), Validity.INVALID, "never appended"),
    "never read": (sequential(append(1)), Validity.UNKNOWN, "show nothing"),
    "not read after": (sequential(append(1), read_list(1), append(2)), Validity.UNKNOWN,
                       "never looked for"),
    "nothing": ([], Validity.UNKNOWN, "show nothing"),
}


ACCOUNTS = ("a", "b")


def transfer(kind: str = "ok") -> Call:
    return ("transfer", None, ["a", "b", 5], kind, None)


def balances(transfers: int = 1, **amounts: int) -> Call:
    return ("read", None, None, "ok",
            {account: [amount, transfers] for account, amount in amounts.items()})


BANK_CASES: dict[str, tuple[list[Record], Validity, str]] = {
    "conserved": (sequential(transfer(), balances(a=5, b=15)), Validity.VALID, ""),
    "unknown transfer happened": (sequential(transfer(), transfer("info"), balances(2, a=0, b=20)),
                                  Validity.VALID, ""),
    "unknown transfer did not": (sequential(transfer(), transfer("info"), balances(1, a=5, b=15)),
                                 Validity.VALID, ""),
    "failed transfer did not": (sequential(transfer(), transfer("fail"), balances(1, a=5, b=15)),
                                Validity.VALID, ""),
    "failed transfer happened": (sequential(transfer(), transfer("fail"), balances(2, a=0, b=20)),
                                 Validity.INVALID, "2 transfers, not 1 to 1"),
    "acknowledged and lost": (sequential(transfer(), balances(1, a=5, b=15), transfer(),
                                         balances(1, a=5, b=15)),
                              Validity.INVALID, "1 transfers, not 2 to 2"),
    "all lost": (sequential(transfer(), balances(0, a=10, b=10)), Validity.INVALID,
                 "0 transfers, not 1 to 1"),
    "made twice": (sequential(transfer(), balances(2, a=0, b=20)), Validity.INVALID,
                   "2 transfers, not 1 to 1"),
    "money made": (sequential(transfer(), balances(a=10, b=15)), Validity.INVALID, "sum to 25"),
    "money lost": (sequential(transfer(), balances(a=5, b=10)), Validity.INVALID, "sum to 15"),
    "negative": (sequential(transfer(), balances(a=-1, b=21)), Validity.INVALID, "a below zero"),
    "account missing": (sequential(transfer(), balances(a=20)), Validity.INVALID, "accounts are"),
    "no account": (sequential(transfer(), ("read", None, None, "ok",
                                           {"a": "foreign", "b": [5, 1]})),
                   Validity.INVALID, "nobody wrote"),
    "no transfer": (sequential(balances(0, a=10, b=10)), Validity.UNKNOWN, "no transfer"),
    "no read after": (sequential(balances(0, a=10, b=10), transfer()), Validity.UNKNOWN,
                      "no read began"),
    "no read after the last": (sequential(transfer(), balances(1, a=5, b=15), transfer()),
                               Validity.UNKNOWN, "after the last successful transfer"),
    "all reads after the last failed": (
        sequential(transfer(), balances(1, a=5, b=15), transfer(),
                   ("read", None, None, "fail", None)), Validity.UNKNOWN, "after the last"),
}


def moved(source: str, target: str, amount: int, kind: str = "ok") -> Call:
    return ("transfer", None, [source, target, amount], kind, None)


def ledger(**accounts: list[int]) -> Call:
    """A read; an account that is not named has its opening balance and no transfers."""
    return ("read", None, None, "ok", {name: [10, 0] for name in LEDGER} | accounts)


LEDGER = ("a", "b", "c", "d", "e", "f")
BEFORE = ledger(e=[9, 1], f=[11, 1])
AFTER = ledger(e=[9, 1], f=[11, 1], a=[5, 1], b=[15, 1])
LEDGER_CASES: dict[str, tuple[list[Record], Validity, str]] = {
    "moved": (sequential(moved("a", "b", 5), ledger(a=[5, 1], b=[15, 1])), Validity.VALID, ""),
    "counted and not moved": (
        sequential(moved("a", "b", 5), ledger(a=[10, 1], b=[10, 1])), Validity.INVALID,
        "no transfers explain"),
    "moved backwards": (
        sequential(moved("a", "b", 5), ledger(a=[15, 1], b=[5, 1])), Validity.INVALID,
        "no transfers explain"),
    "moved to somebody else": (
        sequential(moved("a", "b", 5), ledger(a=[5, 1], b=[10, 1], c=[15, 0])),
        Validity.INVALID, "no transfers explain"),
    "another amount": (
        sequential(moved("a", "b", 5), ledger(a=[6, 1], b=[14, 1])), Validity.INVALID,
        "no transfers explain"),
    "an account that nothing moved": (
        sequential(moved("a", "b", 5), ledger(a=[5, 1], b=[15, 1], c=[9, 0], d=[11, 0])),
        Validity.INVALID, "no transfers explain"),
    "unknown, seen, then gone": (
        sequential(moved("e", "f", 1), moved("a", "b", 5, "info"), AFTER, BEFORE),
        Validity.INVALID, "1 transfers, then 0"),
    "unknown, not seen, then seen": (
        sequential(moved("e", "f", 1), moved("a", "b", 5, "info"), BEFORE, AFTER, AFTER),
        Validity.VALID, ""),
    "new then old while it is under way": (
        then(sequential(moved("e", "f", 1)), opened(moved("a", "b", 5), AFTER, BEFORE),
             sequential(AFTER)), Validity.INVALID, "1 transfers, then 0"),
    "old then new while it is under way": (
        then(sequential(moved("e", "f", 1)), opened(moved("a", "b", 5), BEFORE, AFTER),
             sequential(AFTER)), Validity.VALID, ""),
    "half of each of two unknown ones": (
        sequential(moved("e", "f", 1), moved("a", "b", 5, "info"), moved("c", "d", 5, "info"),
                   ledger(e=[9, 1], f=[11, 1], a=[5, 1], d=[15, 1])),
        Validity.INVALID, "no transfers explain"),
    "both of two unknown ones": (
        sequential(moved("e", "f", 1), moved("a", "b", 5, "info"), moved("c", "d", 5, "info"),
                   ledger(e=[9, 1], f=[11, 1], a=[5, 1], b=[15, 1], c=[5, 1], d=[15, 1])),
        Validity.VALID, ""),
    "one of two unknown ones, then the other alone": (
        sequential(moved("e", "f", 1), moved("a", "b", 5, "info"), moved("a", "b", 3, "info"),
                   ledger(e=[9, 1], f=[11, 1], a=[5, 1], b=[15, 1]),
                   ledger(e=[9, 1], f=[11, 1], a=[7, 1], b=[13, 1])),
        Validity.INVALID, "the same numbers of transfers"),
    "different parts of two transfers at once": (
        then(concurrent(moved("a", "b", 5), moved("c", "d", 5), ledger(a=[5, 1], b=[15, 1]),
                        ledger(c=[5, 1], d=[15, 1])),
             sequential(ledger(a=[5, 1], b=[15, 1], c=[5, 1], d=[15, 1]))),
        Validity.INVALID, "neither came first"),
    "a later transfer and not the one before it": (
        then(opened(ledger(c=[5, 1], d=[15, 1]), moved("a", "b", 5), moved("c", "d", 5)),
             sequential(ledger(a=[5, 1], b=[15, 1], c=[5, 1], d=[15, 1]))),
        Validity.INVALID, "no transfers explain"),
    "an earlier transfer and not the one after it": (
        then(opened(ledger(a=[5, 1], b=[15, 1]), moved("a", "b", 5), moved("c", "d", 5)),
             sequential(ledger(a=[5, 1], b=[15, 1], c=[5, 1], d=[15, 1]))),
        Validity.VALID, ""),
    "an unknown one in the place of one like it that is due later": (
        then(sequential(moved("e", "f", 1), moved("a", "b", 5, "info")),
             opened(moved("a", "b", 5), AFTER),
             sequential(ledger(e=[9, 1], f=[11, 1], a=[0, 2], b=[20, 2]))), Validity.VALID, ""),
    "no account of the bank": (
        sequential(moved("a", "b", 5), ledger(a=[5, 1], b=[15, True])), Validity.INVALID,
        "nobody wrote"),
}


def write(key: str, value: str, kind: str = "ok") -> Call:
    return ("write", key, value, kind, value)


def read(key: str, value: str | None) -> Call:
    return ("read", key, None, "ok", value)


def expired(key: str, value: str | None) -> Call:
    return ("expired", key, None, "ok", value)


UNIQUE_CASES: dict[str, tuple[list[Record], Validity, str]] = {
    "read back": (sequential(write("k", "v"), read("k", "v")), Validity.VALID, ""),
    "unknown, absent": (sequential(write("a", "v"), read("a", "v"), write("k", "v", "info"),
                                   read("k", None)), Validity.VALID, ""),
    "unknown, appears late": (sequential(write("a", "v"), read("a", "v"),
                                         write("k", "v", "info"), read("k", None),
                                         read("k", "v")), Validity.VALID, ""),
    "concurrent": (then(concurrent(write("k", "v"), read("k", None)),
                        sequential(read("k", "v"))), Validity.VALID, ""),
    "lost": (sequential(write("k", "v"), read("k", None)), Validity.INVALID, "lost"),
    "seen, then gone": (sequential(write("k", "v", "info"), read("k", "v"), read("k", None)),
                        Validity.INVALID, "lost"),
    "invented value": (sequential(write("k", "v"), read("k", "w")), Validity.INVALID,
                       "nobody wrote"),
    "invented key": (sequential(write("k", "v"), read("k", "v"), read("j", "v")),
                     Validity.INVALID, "nobody wrote"),
    "failed write read": (sequential(write("k", "v", "fail"), read("k", "v")), Validity.INVALID,
                          "failed write"),
    "tried again after a failure": (
        sequential(write("k", "v", "fail"), write("k", "w"), read("k", "w")), Validity.VALID, ""),
    "tried again, and the failed one read": (
        sequential(write("k", "v", "fail"), write("k", "w"), read("k", "v")), Validity.INVALID,
        "nobody wrote"),
    "only failures": (sequential(write("k", "v", "fail"), write("k", "w", "fail"), read("k", "v")),
                      Validity.INVALID, "failed write"),
    "before it was written": (sequential(read("k", "v"), write("k", "v")), Validity.INVALID,
                              "before it was written"),
    "true is no 1": (sequential(("write", "k", 1, "ok", 1), ("read", "k", None, "ok", True)),
                     Validity.INVALID, "nobody wrote"),
    "never read": (sequential(write("k", "v")), Validity.UNKNOWN, "never read"),
    "expired": (sequential(write("k", "v"), expired("k", None), read("k", "v")), Validity.VALID,
                ""),
    "there for too long": (sequential(write("k", "v"), read("k", "v"), expired("k", "v")),
                           Validity.INVALID, "after its time to live"),
    "expired and never read": (sequential(write("k", "v"), expired("k", None)), Validity.UNKNOWN,
                               "never read"),
    "nothing acknowledged": (sequential(write("k", "v", "info")), Validity.UNKNOWN,
                             "no write was acknowledged"),
}


def batch(value: str, timestamp: int | None, kind: str = "ok") -> Call:
    return ("batch", "g", value, kind, timestamp)


def scan(at: int, **pairs: str) -> Call:
    return ("scan", "g", at, "ok", pairs)


TWO_UNKNOWN = (batch("v", 10), batch("a", None, "info"), batch("b", None, "info"))

SCAN_CASES: dict[str, tuple[list[Record], Validity, str]] = {
    "past and present": (sequential(batch("v", 10), batch("w", 20), scan(10, x="v", y="v"),
                                    scan(20, x="w", y="w"), scan(0, x="w", y="w")),
                         Validity.VALID, ""),
    "unknown batch visible": (sequential(batch("v", 10), batch("w", None, "info"),
                                         batch("z", 30), scan(30, x="z", y="z"),
                                         scan(10, x="v", y="v"), scan(0, x="w", y="w")),
                              Validity.VALID, ""),
    "torn": (sequential(batch("v", 10), batch("w", 20), scan(20, x="v", y="w")),
             Validity.INVALID, "half of a batch"),
    "torn, key missing": (sequential(batch("v", 10), scan(10, x="v")), Validity.INVALID,
                          "half of a batch"),
    "not repeatable": (sequential(batch("v", 10), batch("w", None, "info"), batch("z", 20),
                                  scan(10, x="v", y="v"), scan(10, x="w", y="w")),
                       Validity.INVALID, "two states"),
    "stale": (sequential(batch("v", 10), batch("w", 20), scan(20, x="v", y="v")),
              Validity.INVALID, "stale"),
    "stale latest": (sequential(batch("v", 10), batch("w", 20), scan(10, x="v", y="v"),
                                scan(0, x="v", y="v")), Validity.INVALID, "stale"),
    "from the future": (sequential(batch("v", 10), batch("w", 20), scan(10, x="w", y="w")),
                        Validity.INVALID, "later than the timestamp"),
    "gone": (sequential(batch("v", 10), scan(10)), Validity.INVALID, "not visible"),
    "invented": (sequential(batch("v", 10), scan(10, x="q", y="q")), Validity.INVALID,
                 "nobody wrote"),
    "failed": (sequential(batch("v", 10), batch("w", None, "fail"), scan(10, x="v", y="v"),
                          scan(0, x="w", y="w")), Validity.INVALID, "failed batch"),
    "tried again after a failure": (
        sequential(batch("v", None, "fail"), batch("v", 10), scan(10, x="v", y="v")),
        Validity.VALID, ""),
    "failed after a success": (
        sequential(batch("v", 10), batch("v", None, "fail"), scan(10, x="v", y="v")),
        Validity.VALID, ""),
    "failed twice and visible": (
        sequential(batch("w", 10), batch("v", None, "fail"), batch("v", None, "fail"),
                   scan(0, x="v", y="v")), Validity.INVALID, "failed batch"),
    "timestamps go back": (sequential(batch("v", 20), batch("w", 10), scan(20, x="v", y="v")),
                           Validity.INVALID, "timestamps go back"),
    "one timestamp twice": (then(concurrent(batch("v", 20), batch("w", 20)),
                                 sequential(scan(20, x="v", y="v"))),
                            Validity.INVALID, "one timestamp twice"),
    "concurrent, other order": (then(concurrent(batch("v", 20), batch("w", 10)),
                                     sequential(scan(20, x="v", y="v"), scan(10, x="w", y="w"))),
                                Validity.VALID, ""),
    "true is no 1": (sequential(("batch", "g", 1, "ok", 10), ("scan", "g", 10, "ok",
                                                              {"x": True, "y": True})),
                     Validity.INVALID, "nobody wrote"),
    "nothing to see": (sequential(batch("v", 10)), Validity.UNKNOWN, "no scan"),
    "no scan after the last": (sequential(batch("v", 10), scan(10, x="v", y="v"), batch("w", 20)),
                               Validity.UNKNOWN, "no scan began after"),
    "only scans of the past after the last": (
        sequential(batch("v", 10), batch("w", 20), scan(10, x="v", y="v")), Validity.UNKNOWN,
        "no scan began after"),
    "all scans after the last failed": (
        sequential(batch("v", 10), scan(10, x="v", y="v"), batch("w", 20),
                   ("scan", "g", 0, "fail", None)), Validity.UNKNOWN, "no scan began after"),
    "unknown batch seen and later still there": (
        sequential(batch("v", 10), batch("u", None, "info"), batch("w", 30), scan(0, x="u", y="u"),
                   scan(0, x="u", y="u"), scan(10, x="v", y="v"), scan(30, x="w", y="w")),
        Validity.VALID, ""),
    "unknown batch in the place of an acknowledged one": (
        sequential(batch("v", 10), batch("u", None, "info"), batch("w", 30),
                   scan(30, x="u", y="u")), Validity.INVALID, "no timestamp is left"),
    "unknown batch seen, hidden by a later one": (
        sequential(batch("v", 10), batch("u", None, "info"), scan(0, x="u", y="u"), batch("w", 30),
                   scan(30, x="w", y="w"), scan(10, x="v", y="v")), Validity.VALID, ""),
    "unknown batch seen, then gone": (
        sequential(batch("v", 10), batch("u", None, "info"), scan(0, x="u", y="u"),
                   scan(0, x="v", y="v")), Validity.INVALID, "seen, then gone"),
    "unknown batch seen, then what it hid": (
        sequential(batch("v", 10), batch("u", None, "info"), batch("w", 40),
                   scan(0, x="u", y="u"), scan(40, x="w", y="w"), scan(0, x="w", y="w")),
        Validity.INVALID, "seen, then gone"),
    "unknown batch seen, then nothing": (
        sequential(batch("v", None, "info"), scan(0, x="v", y="v"), scan(0), batch("w", 10),
                   scan(10, x="w", y="w")), Validity.INVALID, "seen, then gone"),
    "unknown batch seen below what it follows": (
        sequential(batch("v", 10), batch("w", 20), batch("u", None, "info"),
                   scan(20, x="u", y="u")), Validity.INVALID, "no timestamp is left"),
    "unknown batch seen, then below one that began later": (
        sequential(batch("v", 10), batch("u", None, "info"), scan(0, x="u", y="u"), batch("w", 30),
                   scan(30, x="u", y="u")), Validity.INVALID, "no timestamp is left"),
    "seen, then gone, then acknowledged": (
        [*sequential(batch("v", 10), scan(10, x="v", y="v")),
         Record(Kind.INVOKE, 9, 9, "batch", "g", "w"),
         *then([], sequential(scan(0, x="w", y="w"), scan(0, x="v", y="v"))),
         Record(Kind.OK, 9, 9999, "batch", "g", 20)], Validity.INVALID, "stale"),
    "two unknown batches in turns": (
        sequential(batch("v", 10), scan(10, x="v", y="v"), batch("a", None, "info"),
                   batch("b", None, "info"), scan(0, x="a", y="a"), scan(0, x="b", y="b"),
                   scan(0, x="a", y="a")), Validity.INVALID, "then back again"),
    "two unknown batches after each other": (
        sequential(batch("v", 10), scan(10, x="v", y="v"), batch("a", None, "info"),
                   batch("b", None, "info"), scan(0, x="b", y="b"), scan(0, x="a", y="a"),
                   scan(0, x="a", y="a")), Validity.VALID, ""),
    "two unknown batches in the order of two timestamps": (
        sequential(*TWO_UNKNOWN, scan(11, x="a", y="a"), scan(12, x="b", y="b"),
                   scan(0, x="b", y="b")), Validity.VALID, ""),
    "two unknown batches against the order of two timestamps": (
        sequential(*TWO_UNKNOWN, scan(11, x="a", y="a"), scan(12, x="b", y="b"),
                   scan(0, x="a", y="a")), Validity.INVALID, "no timestamp explains"),
    "two unknown batches in an order of which the latest scans go back": (
        sequential(*TWO_UNKNOWN, scan(20, x="a", y="a"), scan(30, x="b", y="b"),
                   scan(0, x="b", y="b"), scan(0, x="a", y="a")), Validity.INVALID,
        "no timestamp explains"),
    "an unknown batch that begins after another was seen, at an earlier timestamp": (
        sequential(batch("v", 10), batch("a", None, "info"), scan(0, x="a", y="a"),
                   batch("b", None, "info"), scan(20, x="b", y="b"), scan(30, x="a", y="a")),
        Validity.INVALID, "no timestamp explains"),
    "two unknown batches where there is room for one": (
        sequential(*TWO_UNKNOWN, scan(0, x="a", y="a"), scan(0, x="b", y="b"),
                   scan(11, x="b", y="b")), Validity.INVALID, "no timestamp explains"),
    "two unknown batches where there is room for two": (
        sequential(*TWO_UNKNOWN, scan(0, x="a", y="a"), scan(0, x="b", y="b"),
                   scan(12, x="b", y="b")), Validity.VALID, ""),
}


def cases(table: dict[str, tuple[list[Record], Validity, str]],
          check: Callable[[Sequence[Record]], Verdict]) -> list[object]:
    return [pytest.param(check, *case, id=f"{check.__name__}: {name}")
            for name, case in table.items()]


def bank(history: Sequence[Record]) -> Verdict:
    return check_bank(history, accounts=ACCOUNTS, opening=10)


def ledgers(history: Sequence[Record]) -> Verdict:
    return check_bank(history, accounts=LEDGER, opening=10)


def scans(history: Sequence[Record]) -> Verdict:
    return check_scans(history, group_size=2)


@pytest.mark.parametrize(("check", "history", "validity", "message"), [
    *cases(APPEND_CASES, check_append), *cases(BANK_CASES, bank), *cases(LEDGER_CASES, ledgers),
    *cases(UNIQUE_CASES, check_unique_writes), *cases(SCAN_CASES, scans)])
def test_case(check: Callable[[Sequence[Record]], Verdict], history: list[Record],
              validity: Validity, message: str) -> None:
    verdict = check(history)
    assert verdict.validity is validity, verdict.problems
    assert any(message in problem for problem in verdict.problems) or not message


MISTAKES: dict[str, tuple[Callable[[Sequence[Record]], Verdict], list[Record], str]] = {
    "append: function": (
        check_append, sequential(append(1), ("put", "k", 2, "ok", None), read_list(1)),
        "no function of this workload"),
    "append: function that failed": (
        check_append, sequential(append(1), ("put", "k", 2, "fail", None), read_list(1)),
        "no function of this workload"),
    "append: element twice": (
        check_append, sequential(append(1), append(1, "info"), read_list(1)), "used twice: 1"),
    "append: element twice at once": (
        check_append, then(concurrent(append(1), append(1)), sequential(read_list(1))),
        "used twice: 1"),
    "bank: function": (
        ledgers, sequential(moved("a", "b", 5), ("deposit", None, ["a", 5], "ok", None),
                            ledger(a=[5, 1], b=[15, 1])), "no function of this workload"),
    "bank: account": (ledgers, sequential(moved("a", "z", 5)), r"needs \[from, to, amount\]"),
    "bank: same account": (ledgers, sequential(moved("a", "a", 5)), r"\[from, to, amount\]"),
    "bank: amount": (ledgers, sequential(moved("a", "b", True)), r"\[from, to, amount\]"),
    "unique: function": (
        check_unique_writes, sequential(write("k", "v"), ("delete", "k", None, "ok", None),
                                        read("k", "v")), "no function of this workload"),
    "unique: key twice": (
        check_unique_writes, sequential(write("k", "v"), write("k", "w")), "used twice: 'k'"),
    "unique: nothing": (
        check_unique_writes, sequential(("write", "k", None, "ok", None), read("k", None)),
        "nothing is written"),
    "scans: function": (
        scans, sequential(batch("v", 10), ("btach", "g", "w", "ok", 20), scan(0, x="v", y="v")),
        "no function of this workload"),
    "scans: value twice": (
        scans, sequential(batch("v", 10), batch("v", None, "info"), batch("w", 20), scan(10),
                          scan(20, x="w", y="w")), "used twice: 'v'"),
    "scans: value twice, acknowledged": (
        scans, sequential(batch("v", 10), batch("w", 20), batch("v", 30), scan(10, x="v", y="v"),
                          scan(0, x="v", y="v")), "used twice: 'v'"),
}


@pytest.mark.parametrize(("check", "history", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_no_workload_does_is_a_mistake(check: Callable[[Sequence[Record]], Verdict],
                                            history: list[Record], message: str) -> None:
    with pytest.raises(HistoryError, match=message):
        check(history)


def test_a_search_that_was_cut_short_tells_nothing() -> None:
    unknown = [moved("a", "b", amount, "info") for amount in (1, 2, 3, 4)]
    for seen, validity in (([4, 2], Validity.VALID), ([2, 2], Validity.INVALID)):
        history = sequential(moved("e", "f", 1), *unknown, ledger(
            e=[9, 1], f=[11, 1], a=[seen[0], seen[1]], b=[20 - seen[0], seen[1]]))
        assert ledgers(history).validity is validity
        verdict = check_bank(history, accounts=LEDGER, opening=10, max_tries=1)
        assert verdict.validity is Validity.UNKNOWN
        assert "1 tries did not tell" in verdict.problems[0]


def test_a_search_takes_as_many_tries_as_the_length_calls_for(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_search, "LEAST_MAX_TRIES", 1000)
    moves = 1000
    # At any time some transfers are open that may be the one that was made.
    calls = [moved("a", "b", amount, "info") for amount in range(2, 12)]
    for number in range(1, moves + 1):
        calls += [moved("a", "b", 1) if number % 2 else moved("b", "a", 1),
                  ledger(a=[10 - number % 2, number], b=[10 + number % 2, number])]
    history = sequential(*calls)
    assert ledgers(history).is_valid
    assert check_bank(history, accounts=LEDGER, opening=10,
                      max_tries=1000).validity is Validity.UNKNOWN


@pytest.mark.parametrize("seed", range(20))
def test_a_real_list_is_valid_until_an_element_is_taken_out(seed: int) -> None:
    source = random.Random(seed)
    elements: list[int] = []
    calls: list[Call] = []
    for number in range(200):
        if source.random() < 0.5:
            elements.append(number)
            calls.append(append(number))
        else:
            calls.append(read_list(*elements))
    calls.append(read_list(*elements))
    assert check_append(sequential(*calls)).is_valid
    lost = elements[:-1] if seed % 2 else [*elements[:5], *elements[6:]]
    calls[-1] = read_list(*lost)
    assert check_append(sequential(*calls)).validity is Validity.INVALID


@pytest.mark.timeout(25)
def test_a_long_history_of_scans_is_judged_in_proportion() -> None:
    # Each scan with each batch would take half a minute and more.
    calls: list[Call] = []
    for number in range(20_000):
        shown = str(number // 2)
        calls += [batch(str(number), number + 1), scan(number // 2 + 1, x=shown, y=shown)]
    calls.append(scan(0, x="19999", y="19999"))
    assert scans(sequential(*calls)).is_valid
    calls[-1] = scan(0, x="19998", y="19998")
    assert scans(sequential(*calls)).validity is Validity.INVALID


def test_verdicts_combine_to_the_worst() -> None:
    valid = judge("a", [], {})
    unknown = judge("b", [], {}, ["ran out of time"])
    invalid = judge("c", ["broken"], {}, ["and ran out of time"])
    assert combine([valid, valid]) is Validity.VALID
    assert combine([valid, unknown]) is Validity.UNKNOWN
    assert combine([valid, unknown, invalid]) is Validity.INVALID
    assert combine([]) is Validity.UNKNOWN
    assert invalid.as_dict() == {"checker": "c", "verdict": "invalid", "problems": ["broken"],
                                 "facts": {}}
