"""Whether clients were at work at all: without load, nothing is shown by what did not go wrong."""

from __future__ import annotations

from collections.abc import Sequence

from jepsen.history import Kind, Operation
from jepsen.nemesis import Window
from jepsen.verdict import Verdict, judge

LEAST_SHARE = 0.05
"""Of the operations that were asked for; the rest of the time the cluster may have been away."""

SHORTEST_WINDOW_S = 1.0


def check_load(operations: Sequence[Operation], windows: Sequence[Window], begin_ns: int,
               end_ns: int, rate: float) -> Verdict:
    """Unknown when fewer operations succeeded between `begin_ns` and `end_ns` than a twentieth of
    `rate` per second, or when nobody asked for anything during a fault of a second or more."""
    load_s = max(0, end_ns - begin_ns) / 1e9
    succeeded = sum(op.kind is Kind.OK and op.completed_ns is not None
                    and begin_ns <= op.completed_ns <= end_ns for op in operations)
    wanted = max(1.0, LEAST_SHARE * rate * load_s)
    doubts = [] if succeeded >= wanted else [
        f"{succeeded} operations succeeded in {load_s:.1f} s of load, at least {wanted:.0f} are "
        "needed to judge it"]
    begun = [op.invoked_ns for op in operations]
    for window in windows:
        if not window.is_brief and window.end_ns - window.begin_ns >= SHORTEST_WINDOW_S * 1e9 \
                and not any(window.begin_ns <= at <= window.end_ns for at in begun):
            doubts.append(f"nobody asked for anything during {window.name} at "
                          f"{window.begin_ns / 1e9:.1f} s")
    return judge("load", [], {"succeeded": succeeded, "load_s": round(load_s, 3)}, doubts)
