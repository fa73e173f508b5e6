"""What a run leaves behind: `results.json`, a plot, and one line."""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jepsen.history import Kind, Operation
from jepsen.nemesis import Window
from jepsen.verdict import Validity, Verdict, combine

BIN_S = 0.5
_COLOURS = {Kind.OK: "#1f77b4", Kind.FAIL: "#ff7f0e", Kind.INFO: "#d62728"}
_MAX_POINTS = 20_000


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of the one line."""

    operations: int
    by_kind: Mapping[str, int]
    faults: Mapping[str, int]
    not_available: Sequence[str]
    longest_unavailability_s: float
    validity: Validity

    def line(self) -> str:
        """The last line that a run prints."""
        kinds = ", ".join(f"{self.by_kind.get(kind, 0)} {kind}" for kind in ("ok", "fail", "info"))
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        missing = f" (not available: {', '.join(self.not_available)})" if self.not_available else ""
        return (f"ops {self.operations}: {kinds} | faults: {faults or 'none'}{missing} | "
                f"longest unavailability {self.longest_unavailability_s:.2f} s | "
                f"verdict: {self.validity}")


def longest_unavailability_s(operations: Sequence[Operation], begin_ns: int, end_ns: int) -> float:
    """The longest time within the load during which no operation succeeded, in seconds; 0 without
    load."""
    if end_ns <= begin_ns:
        return 0.0
    moments = sorted(op.completed_ns for op in operations
                     if op.kind is Kind.OK and op.completed_ns is not None
                     and begin_ns <= op.completed_ns <= end_ns)
    edges = [begin_ns, *moments, end_ns]
    return max(later - earlier for earlier, later in itertools.pairwise(edges)) / 1e9


def summarise(operations: Sequence[Operation], windows: Sequence[Window],
              verdicts: Sequence[Verdict], injected: Mapping[str, int],
              not_available: Sequence[str], begin_ns: int, end_ns: int) -> Summary:
    """The numbers of a run."""
    return Summary(
        len(operations), Counter(operation.kind.value for operation in operations),
        dict(injected), list(not_available),
        longest_unavailability_s(operations, begin_ns, end_ns), combine(verdicts))


def write_results(path: Path, summary: Summary, verdicts: Sequence[Verdict],
                  windows: Sequence[Window], settings: Mapping[str, object]) -> None:
    """`results.json`: everything that the verdict rests on, and how to repeat the run."""
    path.write_text(json.dumps({
        "verdict": summary.validity.value,
        "settings": dict(settings),
        "operations": {"total": summary.operations, **summary.by_kind},
        "faults": dict(summary.faults),
        "not_available": list(summary.not_available),
        "longest_unavailability_s": round(summary.longest_unavailability_s, 3),
        "checkers": [verdict.as_dict() for verdict in verdicts],
        "windows": [{"fault": window.name, "begin_s": round(window.begin_ns / 1e9, 3),
                     "end_s": round(window.end_ns / 1e9, 3), "what": window.what}
                    for window in windows],
    }, indent=2, default=str) + "\n", encoding="utf-8")


def plot(path: Path, operations: Sequence[Operation], windows: Sequence[Window],
         title: str, load_end_ns: int) -> None:
    """Latency of every operation, and operations per second by outcome, over time. Windows of
    faults are shaded; operators' calls are thin lines. The lower scale is that of the load: what is
    read back after `load_end_ns` comes in a burst and may go off it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    names = sorted({window.name for window in windows})
    colours = [pyplot.get_cmap(name)(number) for name in ("tab20", "tab20b")
               for number in range(20)]
    shades = dict(zip(names, itertools.cycle(colours), strict=False))
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(13, 8),
                                             height_ratios=(3, 2))
    for axes in (above, below):
        for window in windows:
            if window.is_brief:
                axes.axvline(window.begin_ns / 1e9, color=shades[window.name], linewidth=1,
                             alpha=0.8)
            else:
                axes.axvspan(window.begin_ns / 1e9, (window.end_ns or window.begin_ns) / 1e9,
                             color=shades[window.name], alpha=0.3, linewidth=0)
    ended = [op for op in operations if op.completed_ns is not None]
    step = max(1, len(ended) // _MAX_POINTS)
    highest = 0.0
    for kind, colour in _COLOURS.items():
        of_kind = [op for op in ended if op.kind is kind]
        shown = of_kind[::step] if kind is Kind.OK else of_kind
        above.scatter([op.invoked_ns / 1e9 for op in shown],
                      [max(_milliseconds(op), 0.01) for op in shown],
                      s=4, color=colour, label=f"{kind} ({len(of_kind)})")
        per_bin = Counter(int((op.completed_ns or 0) / 1e9 / BIN_S) for op in of_kind)
        bins = range(max(per_bin, default=0) + 1)
        below.plot([place * BIN_S for place in bins], [per_bin[place] / BIN_S for place in bins],
                   color=colour, linewidth=1, label=kind.value)
        highest = max([highest, *(count / BIN_S for place, count in per_bin.items()
                                  if (place + 1) * BIN_S <= load_end_ns / 1e9)])
    below.set_ylim(0, highest * 1.1 or 1)
    above.set_yscale("log" if ended else "linear")
    above.set_ylabel("latency (ms)")
    above.set_title(textwrap.fill(title, 130), fontsize=10)
    below.set_ylabel("operations per second")
    below.set_xlabel("time (s)")
    above.legend(loc="upper right", fontsize=8)
    if names:
        figure.legend(handles=[Patch(color=shades[name], alpha=0.5, label=name)
                               for name in names],
                      loc="lower center", fontsize=7, ncols=8)
    figure.tight_layout(rect=(0, 0.025 * (1 + math.ceil(len(names) / 8)), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _milliseconds(operation: Operation) -> float:
    return ((operation.completed_ns or 0) - operation.invoked_ns) / 1e6
