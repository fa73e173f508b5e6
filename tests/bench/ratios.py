"""From rates measured in turns to ratios: medians, never means, so that one disturbed turn does not
decide (the machine is shared and its speed drifts)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """A ratio over several pairs of turns."""

    median: float
    minimum: float
    maximum: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.minimum:.2f} to {self.maximum:.2f}]"


Turns = Mapping[int, float]
"""Rates by place in the order in which everything was measured."""


def nearest_ratios(rates: Turns, baseline: Turns) -> list[float]:
    """Each turn's ratio to the turn of the baseline that is nearest to it, or to both where two are
    as near: that keeps slow drift of the machine out."""
    found = []
    for place, rate in sorted(rates.items()):
        distance = min((abs(place - other) for other in baseline), default=0)
        for other in (place - distance, place + distance):
            if other in baseline:
                if baseline[other] <= 0:
                    raise ValueError("a baseline of zero has no ratio")
                found.append(rate / baseline[other])
    return found


def in_turns(rates: Sequence[float], side: int, sides: int) -> Turns:
    """The places of one of several sides, which had their turns always in the same order."""
    return {turn * sides + side: rate for turn, rate in enumerate(rates)}


def in_slices(rates: Sequence[float], side: int) -> Turns:
    """The places of one of two sides of which the other one was first every other time."""
    return {2 * number + (side + number) % 2: rate for number, rate in enumerate(rates)}


def with_ratios(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a run with the ratio of each of its entries, from the rates of its turns.

    Side by side, etcd, elastickv and, if it was measured, elastickv over grpc.aio take turns.
    """
    result = dict(document)
    for section in ("plain", "tls"):
        sides = 2 + (f"{section}_aio" in document)
        for part, side in ((section, 1), (f"{section}_aio", 2)):
            if part in document:
                result[part] = {name: _with_ratio(entry, in_turns(_rates(entry["elastickv"]), side,
                                                                  sides),
                                                  in_turns(_rates(entry["etcd"]), 0, sides))
                                for name, entry in document[part].items()}
    for section in ("encryption", "encryption_aio"):
        if section in document:
            result[section] = {name: _with_ratio(entry, in_slices(_rates(entry["on"]), 1),
                                                 in_slices(_rates(entry["off"]), 0))
                               for name, entry in document[section].items()}
    return result


def _rates(turns: Sequence[Mapping[str, float]]) -> list[float]:
    return [turn["rate"] for turn in turns]


def _with_ratio(entry: Mapping[str, Any], rates: Turns, baseline: Turns) -> dict[str, Any]:
    return {**entry, "ratio": summarize(nearest_ratios(rates, baseline))._asdict()}


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
