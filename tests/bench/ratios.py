"""From rates measured in turns to ratios: medians, never means, so that one disturbed turn does not
decide (the machine is shared and its speed drifts)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """A ratio over several pairs of neighbouring turns."""

    median: float
    minimum: float
    maximum: float
    pairs: int


def neighbour_ratios(rates: Sequence[float], baseline: Sequence[float],
                     baseline_first: bool = True) -> list[float]:
    """Ratios rate / baseline of every two turns that were measured one after the other.

    With turns B R B R there are three such pairs: (B1, R1), (R1, B2), (B2, R2). Comparing only
    neighbours keeps slow drift of the machine out. `baseline_first` says who had turn one.
    """
    if len(rates) != len(baseline):
        raise ValueError(f"{len(rates)} turns against {len(baseline)}")
    first, second = (baseline, rates) if baseline_first else (rates, baseline)
    order = [turn for pair in zip(first, second, strict=True) for turn in pair]
    found = []
    for position in range(len(order) - 1):
        left, right = order[position], order[position + 1]
        baseline_left = (position % 2 == 0) == baseline_first
        rate, base = (right, left) if baseline_left else (left, right)
        if base <= 0:
            raise ValueError("a baseline of zero has no ratio")
        found.append(rate / base)
    return found


def summarize(ratios: Sequence[float]) -> Ratio:
    """Median, smallest and largest."""
    if not ratios:
        raise ValueError("no ratios")
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile of values in ascending order; `fraction` from 0 to 1."""
    if not sorted_values:
        raise ValueError("no values")
    rank = max(1, math.ceil(fraction * len(sorted_values)))
    return sorted_values[rank - 1]
