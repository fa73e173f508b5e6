"""One run: a quiet start, faults under load, mending, and the final examination."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elastickv.errors import ElasticKVError
from elastickv.raft.journal import Journal
from jepsen.history import Recorder
from jepsen.linearizable import check_register
from jepsen.verdict import Validity
from tests.sim import instruments
from tests.sim.cluster import Cluster, SimNode
from tests.sim.invariants import Oracle, Violation
from tests.sim.loop import SimLoop, Stalled
from tests.sim.nemesis import Nemesis
from tests.sim.plan import FAULTS, SIZES, Plan, draw_plan
from tests.sim.random_streams import Streams
from tests.sim.trace import Trace
from tests.sim.workload import KEYS, Workload

ELECTION_LIMIT_S = 5.0
CONVERGENCE_LIMIT_S = 8.0
CHECK_CONFIGURATIONS = 200_000
SUSPECT_LINE = \
    "this node has lost data: it neither votes nor counts until it has caught up with a leader"
COUNTED_LINES = {
    SUSPECT_LINE: "old disks noticed",
    "this node has caught up and counts again": "old disks caught up",
}
"""Lines of the nodes' logs that the report counts, and under which name."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to; `violation` is "" when every invariant held."""

    plan: Plan
    violation: str
    counters: Counter[str]
    digest: str
    steps: int
    virtual_s: float


class Schedule:
    """One run of one plan. Implements `instruments.Taps`."""

    def __init__(self, plan: Plan, streams: Streams, *, hashed: bool,
                 echo: Callable[[str], None] | None) -> None:
        self.plan = plan
        self.loop = SimLoop()
        self.trace = Trace(lambda: self.loop.now, hashed=hashed, echo=echo)
        self.oracle = Oracle(self.loop, self.trace)
        self.cluster = Cluster(self.loop, plan, streams, self.trace, self.oracle)
        self.recorder = Recorder(lambda: int(self.loop.now * 1e9))
        self.workload = Workload(self.cluster, self.recorder)
        self.nemesis = Nemesis(self.cluster)
        self.sealed = self.oracle.sealed
        self.truncating = self.oracle.truncating
        self.truncated = self.oracle.truncated
        self.cutting_tail = self.oracle.cutting_tail
        self.compacting = self.oracle.compacting
        self.opened = self.oracle.opened

    def appended(self, journal: Journal, index: int, term: int, previous_term: int,
                 command: bytes) -> None:
        self.oracle.appended(journal, index, term, previous_term, command)

    def logged(self, event: str, fields: dict[str, Any]) -> None:
        life = self.loop.life
        self.trace.add("log", life.name if life else "-", event, fields)
        if event == "snapshot installed" and life is not None:
            self.trace.count("snapshots installed")
            self.oracle.check_whole_state(self.oracle.nodes[life.name])
            self.oracle.check_configuration(self.oracle.nodes[life.name])
        elif event in COUNTED_LINES:
            self.trace.count(COUNTED_LINES[event])
        if event == SUSPECT_LINE and life is not None:
            self.oracle.suspected(self.oracle.nodes[life.name], fields)

    async def main(self) -> None:
        """The run."""
        plan, workload = self.plan, self.workload
        for node in self.cluster.nodes:
            node.start()
        await self._until(lambda: any(n.serving and n.engine.is_leader()
                                      for n in self.cluster.nodes),
                          ELECTION_LIMIT_S, "a leader at the start")
        early = plan.encryption == "full-early"
        clients = [asyncio.ensure_future(workload.client(f"{number}"))
                   for number in range(plan.clients)]
        reader = asyncio.ensure_future(workload.reader())
        operator = asyncio.ensure_future(workload.operator(until=plan.encryption, repeat=True))
        changes = [asyncio.ensure_future(story) for story in workload.membership()]
        if early:
            await self._until(self._is_cut_over, ELECTION_LIMIT_S, "the cutovers at the start")
        await self.nemesis.run()
        self.nemesis.heal()
        workload.is_over = True
        await asyncio.gather(*clients, reader, operator)
        await self._converge(changes)
        await self._final_reads()
        self._examine()

    def _is_cut_over(self) -> bool:
        return any(node.serving and node.applier.sidecar is not None
                   and node.applier.sidecar.raft_envelope_cutover_index
                   for node in self.cluster.nodes)

    async def _until(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        deadline = self.loop.now + limit_s
        while not condition():
            if self.loop.now > deadline:
                self.oracle.fail("the cluster makes progress",
                                 f"no {what} within {limit_s} s: {self._describe()}")
            await asyncio.sleep(0.01)

    def _describe(self) -> str:
        return "; ".join(
            f"{n.name} " + (f"term {n.core.term()} role {n.core.role()} "
                            f"commit {n.core.commit_index()} log {n.journal.last_index} "
                            f"leader {n.core.leader_id()!r}" if n.core is not None else "down")
            for n in self.cluster.nodes)

    # --- the end --------------------------------------------------------------------------------

    async def _converge(self, changes: Sequence[asyncio.Future[None]] = ()) -> None:
        """Membership is settled, every member is up and has applied what is committed."""
        def converged() -> bool:
            nodes = self._usable()
            for node in nodes:
                if not node.is_up:
                    node.start()
            return all(change.done() for change in changes) \
                and all(node.serving for node in nodes) \
                and any(node.engine.is_leader() for node in nodes) \
                and len({node.store.applied_index for node in nodes}) == 1 \
                and nodes[0].store.applied_index >= self.oracle.last_committed

        await self._until(converged, CONVERGENCE_LIMIT_S, "convergence after the faults")
        await asyncio.gather(*changes)

    def _usable(self) -> list[SimNode]:
        """The members that an operator does not have to mend first: a majority, always."""
        return [node for node in self.cluster.nodes if node.is_usable]

    async def _final_reads(self) -> None:
        """Every key is read at every node, after all writes."""
        for node in self._usable():
            for key in KEYS:
                await self._read_until_ok(node, key)

    async def _read_until_ok(self, node: SimNode, key: str) -> None:
        deadline = self.loop.now + CONVERGENCE_LIMIT_S
        while await self.workload.read(node, key) is None:
            if self.loop.now > deadline:
                self.oracle.fail("the cluster makes progress", f"no read at {node.name}")
            await asyncio.sleep(0.02)

    def _examine(self) -> None:
        for node in self._usable():
            life = node.life
            if life is not None:
                self.loop.life = life
                node.store.flush_now()
                self.loop.life = None
            self.oracle.check_whole_state(node)
            self.oracle.check_configuration(node)
        self._check_history()

    def _check_history(self) -> None:
        # Real time has no say in what a seed comes to.
        verdict = check_register(self.recorder.records, time_limit_s=math.inf,
                                 max_configurations=CHECK_CONFIGURATIONS)
        if verdict.validity is Validity.INVALID:
            self.oracle.fail("histories are linearizable", "\n".join(verdict.problems))
        if verdict.validity is Validity.UNKNOWN:
            self.oracle.fail("histories can be decided", "\n".join(verdict.problems))
        self.trace.count("histories checked")

    def run(self) -> str:
        """Run to the end; the violation, "" for none."""
        try:
            return self._run()
        finally:
            for node in self.cluster.nodes:
                node.crash()
            self.loop.dispose()

    def _run(self) -> str:
        try:
            self.loop.run(self.main())
        except Violation as violation:
            return str(violation)
        except Stalled as error:
            return f"the cluster makes progress: {error}"
        except Exception as error:
            return "no callback fails: " + "".join(traceback.format_exception(error))
        unexpected = [e for e in self.loop.failures() if not isinstance(e, ElasticKVError)]
        if unexpected:
            return "no task fails: " + "".join(traceback.format_exception(unexpected[0]))
        return ""


def run_seed(seed: int, *, enabled: tuple[str, ...] = FAULTS, sizes: tuple[int, ...] = SIZES,
             hashed: bool = False, echo: Callable[[str], None] | None = None) -> Outcome:
    """Run the schedule of `seed`."""
    streams = Streams(seed)
    plan = draw_plan(seed, streams.stream("plan"), enabled, sizes)
    schedule = Schedule(plan, streams, hashed=hashed, echo=echo)
    with instruments.installed(schedule, streams.stream("entropy")):
        violation = schedule.run()
    return Outcome(plan, violation, schedule.trace.counters, schedule.trace.digest(),
                   schedule.loop.steps, schedule.loop.now)
