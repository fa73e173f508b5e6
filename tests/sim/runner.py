"""Runs many seeds, or one in detail, and says what happened.

    python -m tests.sim --seeds 1000 [--first 0] [--jobs 2]
    python -m tests.sim --seed 17 [--verbose]

Exit status 0 means: no invariant was broken, and every kind of fault and event happened at least
once (a fault that never happened proves nothing). With `--seed`, the run is made twice, and must
leave the same trace hash both times.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.sim.plan import FAULTS
from tests.sim.schedule import Outcome, run_seed

REQUIRED = (
    "crash", "crash-at-fsync", "crash-at-rename", "crash-at-send", "power-cut", "stop", "pause",
    "partition", "isolate-leader", "one-way", "flapping", "weather", "narrow", "delay",
    "frames lost", "frames doubled", "reordered", "reset", "late bytes", "fsync-error",
    "disk-full", "clock-step", "clock-step back", "bit-flip journal", "bit-flip hardstate",
    "bit-flip sidecar", "bit-flip store", "bit-flip members", "bit-flip peers", "old-disk",
    "long-absence", "transfer", "stranded-change", "torn writes", "torn tails cut",
    "segments reused", "keys read ahead", "snapshots read ahead",
    "old disks noticed", "old disks caught up",
    "operations ok", "operations info", "operations fail", "entries", "elections", "truncations",
    "snapshots installed", "installations cut short", "histories checked",
    "sealed: storage", "sealed: raft",
    "bootstrap", "storage cutover", "raft cutover", "rotate storage", "rotate raft", "register",
    "promotions", "removals", "additions",
)
"""Counters that must not be zero over a run of `FULL_RUN_SEEDS` seeds or more."""

FULL_RUN_SEEDS = 300
COLLECT_EVERY = 25


@dataclass
class Totals:
    """The sum of many runs."""

    schedules: int = 0
    counters: Counter[str] = field(default_factory=Counter)
    violations: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.schedules += 1
        self.counters.update(outcome.counters)
        if outcome.violation:
            self.violations.append(outcome)

    def missing(self) -> list[str]:
        """Required counters that stayed zero."""
        return [name for name in REQUIRED if not self.counters[name]]


def quiet_run(seed: int) -> Outcome:
    """One seed in a worker, with the collector out of the way."""
    if seed % COLLECT_EVERY == 0:
        gc.collect()
    return run_seed(seed)


def _prepare_worker() -> None:
    gc.disable()
    gc.freeze()


def run_seeds(seeds: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """The outcomes of all seeds, in any order."""
    if jobs <= 1:
        yield from map(quiet_run, seeds)
        return
    with multiprocessing.get_context("fork").Pool(jobs, _prepare_worker) as pool:
        yield from pool.imap_unordered(quiet_run, seeds, chunksize=4)


def explain(outcome: Outcome) -> str:
    """A violation, and how to see it again."""
    return (f"seed {outcome.plan.seed}: {outcome.violation}\n"
            f"    {outcome.plan.size} voters, {outcome.plan.story or 'the same to the end'}; "
            f"faults {', '.join(outcome.plan.faults)}; encryption {outcome.plan.encryption}\n"
            f"    replay: make sim SEED={outcome.plan.seed}")


def report(totals: Totals, elapsed_s: float) -> str:
    """The summary of a run."""
    lines = [f"{totals.schedules} schedules in {elapsed_s:.1f} s "
             f"({totals.schedules / elapsed_s:.1f} per second)"]
    names = [*REQUIRED, *sorted(set(totals.counters) - set(REQUIRED))]
    lines += [f"  {name:<22}{totals.counters[name]:>9}" for name in names]
    lines.append(f"{len(totals.violations)} violations")
    return "\n".join(lines)


def run_many(first: int, count: int, jobs: int) -> int:
    """Run `count` seeds from `first` on; the exit status."""
    totals = Totals()
    begun = time.monotonic()
    for outcome in run_seeds(range(first, first + count), jobs):
        totals.add(outcome)
        if outcome.violation:
            print(explain(outcome), file=sys.stderr, flush=True)
    print(report(totals, time.monotonic() - begun))
    missing = totals.missing() if count >= FULL_RUN_SEEDS else []
    if missing:
        print(f"never happened: {', '.join(missing)}", file=sys.stderr)
    return 1 if totals.violations or missing else 0


def run_one(seed: int, *, verbose: bool) -> int:
    """Run one seed twice; the exit status."""
    outcomes = [run_seed(seed, hashed=True, echo=print if verbose and attempt == 0 else None)
                for attempt in range(2)]
    totals = Totals()
    totals.add(outcomes[0])
    for name in sorted(totals.counters):
        print(f"  {name:<22}{totals.counters[name]:>9}")
    for outcome in outcomes:
        print(f"trace {outcome.digest}  {outcome.steps} steps, {outcome.virtual_s:.3f} s")
    if totals.violations:
        print(explain(outcomes[0]), file=sys.stderr)
    if outcomes[0].digest != outcomes[1].digest:
        print("the two runs differ: something in them does not come from the seed", file=sys.stderr)
        return 1
    return 1 if totals.violations else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this one seed, twice")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--verbose", action="store_true", help="print every event of the seed")
    parser.add_argument("--list-faults", action="store_true", help="name the faults and exit")
    options = parser.parse_args(arguments)
    if options.list_faults:
        print("\n".join(FAULTS))
        return 0
    if options.seed is not None:
        return run_one(options.seed, verbose=options.verbose)
    return run_many(options.first, options.seeds, options.jobs)
