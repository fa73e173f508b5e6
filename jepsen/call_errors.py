"""With which errors calls ended: most faults explain an outage, none explains damaged data."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Sequence

from elastickv import errors
from elastickv.client.failures import NotReached
from elastickv.errors import (
    ConditionFailed,
    CorruptionError,
    DeadlineExceeded,
    DiskFailed,
    DiskFull,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    Unreachable,
)
from jepsen.history import NO_COMPLETION, Operation
from jepsen.verdict import Verdict, judge

CHECKER = "errors"
EXPLAINED = frozenset({ConditionFailed.__name__})
"""A condition of the workload's own that did not hold."""

OUTAGE = frozenset(kind.__name__ for kind in (
    DeadlineExceeded, NoLeader, NotLeader, NotReached, OutcomeUnknown, Overloaded, Unreachable))
"""What a member explains that is away, slow, cut off or stopping."""

UNDISTURBING = frozenset({"bootstrap", "cutovers", "rotate-storage", "rotate-raft"})
"""Packages under which every member is there, and the leader stays: they explain no outage."""

EXPLAINED_BY = {"disk-full": frozenset({DiskFull.__name__}),
                "io-error": frozenset({DiskFailed.__name__})}
"""What only one package explains."""

DAMAGE = frozenset(name for name, kind in vars(errors).items()
                   if inspect.isclass(kind) and issubclass(kind, CorruptionError))


def check_errors(operations: Sequence[Operation], faults: Collection[str]) -> Verdict:
    """Invalid when a call ended with damaged data; unknown when one ended with an error that none
    of the `faults` explains: somebody has to look at it."""
    first: dict[str, Operation] = {}
    counts: Counter[str] = Counter()
    for operation in operations:
        if operation.error not in ("", NO_COMPLETION):
            first.setdefault(operation.error, operation)
            counts[operation.error] += 1
    explained = EXPLAINED.union(OUTAGE if set(faults) - UNDISTURBING else (),
                                *(names for fault, names in EXPLAINED_BY.items()
                                  if fault in faults))
    lines = {error: f"calls that ended with {error}: {count}, the first: {first[error].describe()}"
             for error, count in sorted(counts.items())}
    return judge(CHECKER, [line for error, line in lines.items() if error in DAMAGE],
                 {"by_error": dict(counts)},
                 [line for error, line in lines.items() if error not in DAMAGE | explained])
