"""The simulator finds nothing wrong, sees everything happen, and repeats itself exactly."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv.errors import NoLeader
from jepsen import linearizable
from tests.sim import schedule
from tests.sim.cluster import SimNode
from tests.sim.plan import draw_plan
from tests.sim.random_streams import Streams
from tests.sim.runner import FULL_RUN_SEEDS, Totals, explain, run_many, run_seeds
from tests.sim.schedule import run_seed
from tests.sim.workload import Workload

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1800)
def test_no_invariant_is_broken_and_every_fault_happens() -> None:
    totals = Totals()
    for outcome in run_seeds(range(FULL_RUN_SEEDS), jobs=os.cpu_count() or 1):
        totals.add(outcome)
    assert not totals.violations, "\n".join(map(explain, totals.violations))
    assert totals.schedules == FULL_RUN_SEEDS
    assert not totals.missing()


@pytest.mark.parametrize("seed", [3, 7])
def test_a_seed_replays_exactly_in_any_process(seed: int) -> None:
    """Twice here, then in processes whose string hashes differ."""
    digests = {run_seed(seed, hashed=True).digest for _ in range(2)}
    for hash_seed in ("1", "2"):
        finished = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", str(seed)], cwd=ROOT, check=True,
            capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed})
        digests |= {line.split()[1] for line in finished.stdout.splitlines()
                    if line.startswith("trace ")}
    assert len(digests) == 1


def test_a_removal_that_is_never_settled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unanswered(*arguments: object, **options: object) -> bool:
        return False

    monkeypatch.setattr(Workload, "_change", unanswered)
    seed = next(seed for seed in range(1000)
                if draw_plan(seed, Streams(seed).stream("plan")).story == "dismiss")
    assert run_seed(seed).violation.startswith("the cluster makes progress: no convergence")


@pytest.mark.parametrize(("error", "violation"), [
    (KeyError("background"), "no task fails: Traceback"), (NoLeader("none"), "")])
def test_a_task_of_a_node_that_fails_and_nobody_asks_for_is_found(
        monkeypatch: pytest.MonkeyPatch, error: Exception, violation: str) -> None:
    async def fail() -> None:
        raise error

    real_start = SimNode.start

    def start(self: SimNode) -> None:
        real_start(self)
        loop = self.cluster.loop
        loop.schedule(self.life, loop.now, lambda: loop.create_task(fail()))

    monkeypatch.setattr(SimNode, "start", start)
    found = run_seed(1).violation
    assert found.startswith(violation)
    assert bool(found) == bool(violation)


def test_a_history_that_is_not_decided_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "CHECK_CONFIGURATIONS", 1)
    undecided = next(outcome for outcome in map(run_seed, range(100)) if outcome.violation)
    assert undecided.violation.startswith("histories can be decided: key ")
    assert "no answer within 1 configurations" in undecided.violation
    assert run_many(undecided.plan.seed, 1, jobs=1) == 1


def test_how_fast_the_machine_is_does_not_change_what_a_seed_comes_to(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearizable, "_CLOCK_EVERY", 1)
    monkeypatch.setattr(schedule, "check_register", functools.partial(
        linearizable.check_register, now=itertools.count(0, 1e6).__next__))
    assert run_seed(1).counters["histories checked"] == 1


def test_seeds_differ() -> None:
    assert run_seed(1, hashed=True).digest != run_seed(2, hashed=True).digest
