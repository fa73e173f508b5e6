"""One run: a cluster, clients, faults, and the verdict on what was seen."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from elastickv.crypto.kek_file import FileKekProvider
from elastickv.errors import ElasticKVError
from jepsen import preload, report
from jepsen.call_errors import check_errors
from jepsen.cluster import DEFAULT_LAUNCHER, Cluster, ClusterError, ClusterOptions
from jepsen.disk_audit import (
    audit_compaction,
    audit_nonces,
    audit_replicas,
    audit_versions,
    unwrapped_keys,
)
from jepsen.faults import FAULTS, Requirements
from jepsen.history import HistoryError, Operation, Recorder, open_history, pair
from jepsen.interrupts import to_the_end
from jepsen.leaks import LeakWatch, audit_keys, audit_plaintext
from jepsen.load import check_load
from jepsen.nemesis import Nemesis, check_processes
from jepsen.network import Network, Unsupported
from jepsen.network.namespaces import NamespaceNetwork, namespaces_work
from jepsen.network.proxy import ProxyNetwork
from jepsen.node_logs import check_logs
from jepsen.ticks import until_tick_s
from jepsen.values import Codec
from jepsen.verdict import Validity, Verdict, judge
from jepsen.workloads import WORKLOADS, Session, Workload
from jepsen.workloads.api import Processes

CALL_TIMEOUT_S = 3.0
FINAL_CALL_TIMEOUT_S = 15.0
RECOVERY_TIMEOUT_S = 60.0
SMALL_DISK_MIB = 256
"""At least. Such a disk lies in memory, ballast and all."""

OPERATION_BYTES = 3 << 10
"""What an operation leaves on a disk, and as much for the state that a member may be sent: a disk
that the load itself fills is never well again."""
SHARE_OF_MEMORY = 8
"""One disk takes at most one part in so many."""
FINAL_SESSIONS = 12
TOGETHER_SHARE = 0.5
"""So many operations begin at a tick, those of all clients at once: what comes together shares an
entry of the log, where one must see what the one before it did."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What to run. `faults` are names of packages; `rate` is operations per second over all
    workloads; `launcher` and `environment` start another build of the node."""

    workloads: tuple[str, ...]
    faults: tuple[str, ...]
    duration_s: float
    seed: int
    node_count: int
    directory: Path
    network: str = "auto"
    rate: float = 150.0
    concurrency: int = 10
    every_fault_must_happen: bool = True
    launcher: tuple[str, ...] = DEFAULT_LAUNCHER
    environment: dict[str, str] = field(default_factory=dict)
    node_flags: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The part that repeats the run."""
        return {"workloads": list(self.workloads), "faults": list(self.faults),
                "time_s": self.duration_s, "seed": self.seed, "nodes": self.node_count,
                "network": self.network, "rate": self.rate, "concurrency": self.concurrency,
                "every_fault_must_happen": self.every_fault_must_happen,
                "launcher": list(self.launcher), "environment": dict(self.environment),
                "node_flags": list(self.node_flags)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    summary: report.Summary
    verdicts: Sequence[Verdict]


async def choose_network(name: str, seed: int) -> tuple[Network, str]:
    """The driver of that name, and why it is not namespaces; "auto" is namespaces where they work
    in full, else the proxy."""
    if name == "proxy":
        return ProxyNetwork(seed), "asked for"
    if name == "auto" and (missing := await namespaces_work()):
        return ProxyNetwork(seed), f"no namespaces: {missing}"
    return NamespaceNetwork(seed), ""


def requirements_of(fault: str) -> Requirements:
    """What a fault package needs of the cluster here."""
    need = FAULTS[fault].requirements
    return need.on_this_machine(can_mount=preload.can_mount()) if need.small_disk else need


def missing_packages(names: Sequence[str]) -> dict[str, str]:
    """Which of the fault packages this machine cannot offer, and what it lacks."""
    missing: dict[str, str] = {}
    for name in names:
        try:
            for library in requirements_of(name).preloads:
                preload.find_libraries(library)
        except Unsupported as error:
            missing[name] = str(error)
    return missing


def small_disk_mib(operations: float) -> int:
    """A size at which so many operations do not fill a disk, where there is the memory for it."""
    memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    wanted_mib = math.ceil(operations * OPERATION_BYTES / (1 << 20))
    return max(SMALL_DISK_MIB, min(wanted_mib, memory_mib // SHARE_OF_MEMORY))


def cluster_options(settings: RunSettings, faults: Sequence[str]) -> ClusterOptions:
    """What the fault packages need of the cluster."""
    needs = [requirements_of(name) for name in faults]
    return ClusterOptions(
        node_count=settings.node_count, launcher=settings.launcher,
        environment=settings.environment, node_flags=settings.node_flags,
        preloads=frozenset().union(*(need.preloads for need in needs)),
        small_disk_mib=(small_disk_mib(settings.rate * settings.duration_s)
                        if any(need.small_disk for need in needs) else 0),
        encrypted=not any(need.starts_in_clear for need in needs))


class Run:
    """One run. `execute` once."""

    def __init__(self, settings: RunSettings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._origin_ns = time.monotonic_ns()
        self._workloads: dict[str, Workload] = {name: WORKLOADS[name]()
                                                for name in settings.workloads}
        self._recorders: dict[str, Recorder] = {}
        self._stopping = asyncio.Event()

    def _now_ns(self) -> int:
        return time.monotonic_ns() - self._origin_ns

    async def execute(self) -> Outcome:
        """Run, check, and write everything into the run directory."""
        settings = self._settings
        settings.directory.mkdir(parents=True, exist_ok=True)
        network, self._network_reason = await choose_network(settings.network, settings.seed)
        missing = missing_packages(settings.faults)
        usable = [name for name in settings.faults if name not in missing]
        self._cluster = Cluster(settings.directory, network, cluster_options(settings, usable),
                                self._now_ns)
        self._codec = Codec(lambda: self._cluster.sealed)
        self._watch = LeakWatch(
            {node: (self._cluster.data_directory(node), self._cluster.scratch_directory(node))
             for node in self._cluster.nodes}, self._codec.sealed_secrets, self._cluster.pids)
        self._nemesis = Nemesis(
            self._cluster, [FAULTS[name](self._cluster, random.Random(f"{settings.seed} {name}"))
                            for name in usable], settings.seed, self._now_ns, missing,
            every_must_happen=settings.every_fault_must_happen)
        verdicts: list[Verdict] = []
        self._begin_ns = self._end_ns = 0
        with contextlib.ExitStack() as files:
            for name in settings.workloads:
                path = settings.directory / f"history-{name}.jsonl"
                self._recorders[name] = Recorder(
                    self._now_ns, files.enter_context(open_history(path)))
            try:
                self._watch.start()
                verdicts.append(await self._load())
            except Exception as error:
                # Of the harness itself, which cut the load short; what was seen is judged.
                verdicts.append(self._broke_down("recovery", error))
            finally:
                await self._close()
        verdicts += await asyncio.to_thread(self._check, verdicts[0].is_valid)
        return self._report(verdicts)

    async def _close(self) -> None:
        """Take everything down, to the end."""
        self._watch.stop()
        await to_the_end(self._cluster.close())

    # --- load ---------------------------------------------------------------------------------

    async def _load(self) -> Verdict:
        """Everything that needs running nodes; how the cluster came through."""
        try:
            await self._cluster.start()
            await self._prepare()
        except (ClusterError, ElasticKVError, Unsupported) as error:
            return judge("recovery", [], {}, [f"the cluster did not come up: {error}"])
        reason = f" ({self._network_reason})" if self._network_reason else ""
        self._say(f"{len(self._cluster.nodes)} nodes are up, network: "
                  f"{self._cluster.network.name}{reason}")
        supervisor = asyncio.create_task(self._nemesis.supervise())
        try:
            self._begin_ns = self._now_ns()
            await self._work()
            await self._nemesis.heal_all()
            healed_ns = self._now_ns()
            try:
                await self._cluster.wait_ready(RECOVERY_TIMEOUT_S)
            except ClusterError as error:
                return judge("recovery", [f"the cluster did not recover: {error}"], {})
            recovered_s = (self._now_ns() - healed_ns) / 1e9
            if not self._cluster.sealed:
                await self._cluster.encrypt()
            await self._finish()
            # Final reads may be followed by entries of the leader's own; members have to be equal
            # once everybody has them.
            await self._cluster.wait_ready()
        except ClusterError as error:
            return judge("recovery", [str(error)], {})
        finally:
            supervisor.cancel()
        return self._stopped(await self._cluster.stop(), recovered_s)

    def _stopped(self, codes: dict[str, int | None], recovered_s: float) -> Verdict:
        problems = [f"{node} did not stop in an orderly way: exit code {code}"
                    for node, code in codes.items() if code != 0]
        return judge("recovery", problems, {"recovered_after_s": round(recovered_s, 3)})

    async def _prepare(self) -> None:
        for name, workload in self._workloads.items():
            session = self._session(name, Processes(), 0, FINAL_CALL_TIMEOUT_S)
            try:
                await workload.prepare(session)
            finally:
                await session.client.close()

    def _session(self, name: str, processes: Processes, number: int, timeout_s: float, *,
                 only_reads: bool = False) -> Session:
        nodes = self._cluster.nodes
        node = nodes[number % len(nodes)]
        client = (self._cluster.pinned_client(node, timeout_s) if only_reads
                  else self._cluster.new_client(node, timeout_s))
        return Session(client, self._recorders[name], processes, self._codec,
                       random.Random(f"{self._settings.seed} {name} {number}"),
                       only_reads=only_reads)

    async def _work(self) -> None:
        self._processes = {name: Processes() for name in self._workloads}
        writers = self._settings.concurrency
        async with asyncio.TaskGroup() as group:
            for number in range(writers + len(self._cluster.nodes)):
                for name in self._workloads:
                    group.create_task(self._client(name, number, only_reads=number >= writers))
            await self._nemesis.run(self._settings.duration_s)
            self._end_ns = self._now_ns()
            self._stopping.set()

    async def _client(self, name: str, number: int, *, only_reads: bool) -> None:
        """Operations one after the other, at random intervals, half of them with those of other
        clients, until the load ends."""
        settings = self._settings
        session = self._session(name, self._processes[name], number, CALL_TIMEOUT_S,
                                only_reads=only_reads)
        sessions = settings.concurrency + len(self._cluster.nodes)
        interval_s = sessions * len(self._workloads) / settings.rate
        try:
            while not self._stopping.is_set():
                pause_s = session.random.expovariate(1 / interval_s)
                if session.random.random() < TOGETHER_SHARE:
                    pause_s = until_tick_s(asyncio.get_running_loop().time(), pause_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause_s)
                    return
                await self._workloads[name].step(session)
        finally:
            await session.client.close()

    async def _finish(self) -> None:
        for name, workload in self._workloads.items():
            sessions = [self._session(name, self._processes[name], number, FINAL_CALL_TIMEOUT_S)
                        for number in range(FINAL_SESSIONS)]
            try:
                # A few more writes: encryption may only just have been turned on.
                for session in sessions:
                    await workload.step(session)
                await workload.finish(sessions)
            finally:
                for session in sessions:
                    await session.client.close()

    # --- judgement ----------------------------------------------------------------------------

    def _check(self, recovered: bool) -> list[Verdict]:
        cluster = self._cluster
        checks: list[tuple[str, Callable[[], Verdict]]] = []
        for name, workload in self._workloads.items():
            checks.append((name, partial(workload.check, self._recorders[name].records)))
        checks.append(("errors", lambda: check_errors(
            self._operations(), {window.name for window in self._nemesis.windows})))
        checks.append(("load", lambda: check_load(
            self._operations(), self._nemesis.windows, self._begin_ns, self._end_ns,
            self._settings.rate)))
        checks.append(("faults", self._nemesis.verdict))
        checks.append(("processes", partial(check_processes, cluster)))
        checks.append(("logs", partial(check_logs, {
            node: process.log_path for node, process in cluster.processes.items()},
            cluster.io_errors)))
        if cluster.kek_file.exists():
            kek = FileKekProvider(cluster.kek_file).load()
            roots = [self._settings.directory / name
                     for name in ("cluster", "logs", "old-disks", "taps")]
            checks += [
                ("replicas", partial(audit_replicas, cluster.present_disks, caught_up=recovered)),
                ("versions", partial(audit_versions, cluster.present_disks, kek,
                                     ended=recovered)),
                ("compaction", partial(audit_compaction, cluster.present_disks)),
                ("nonces", partial(audit_nonces, cluster.disks, cluster.tap.spools, kek,
                                   cluster.tap.error)),
                ("plaintext", partial(audit_plaintext, [root for root in roots if root.exists()],
                                      self._codec.sealed_secrets, written=self._codec.sealed_count,
                                      seen=self._watch.problems)),
                ("keys", lambda: audit_keys(
                    [root for root in roots if root.exists()],
                    {"KEK": cluster.kek_file.read_bytes(),
                     "wrong KEK": cluster.wrong_kek_file.read_bytes(),
                     **unwrapped_keys(cluster.disks, kek)},
                    (cluster.kek_file, cluster.wrong_kek_file)))]
            if self._watch.error:
                checks.append(("watch", lambda: judge("watch", [], {}, [self._watch.error])))
        return [self._verdict(name, check) for name, check in checks]

    def _verdict(self, name: str, check: Callable[[], Verdict]) -> Verdict:
        """What `check` says; a checker that fails has decided nothing, and the others go on."""
        try:
            return check()
        except Exception as error:
            return self._broke_down(name, error)

    def _broke_down(self, name: str, error: Exception) -> Verdict:
        path = self._settings.directory / f"broken-{name}.log"
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return judge(name, [], {}, [f"broke down, see {path}: {type(error).__name__}: {error}"])

    def _operations(self) -> list[Operation]:
        """Of all workloads, as they began."""
        return sorted((operation for recorder in self._recorders.values()
                       for operation in pair(recorder.records)),
                      key=lambda operation: operation.invoked_ns)

    def _report(self, verdicts: Sequence[Verdict]) -> Outcome:
        directory = self._settings.directory
        nemesis = self._nemesis
        try:
            operations = self._operations()
        except HistoryError:  # Which the checkers of that workload have met as well.
            operations = []

        def summarise() -> report.Summary:
            return report.summarise(operations, nemesis.windows, verdicts, nemesis.injected,
                                    list(nemesis.not_available), self._begin_ns, self._end_ns)

        title = (f"{', '.join(self._settings.workloads)} under "
                 f"{', '.join(self._settings.faults) or 'no faults'}, {self._settings.node_count} "
                 f"nodes, seed {self._settings.seed}: {summarise().validity}")
        try:
            report.plot(directory / "plot.png", operations, nemesis.windows, title,
                        self._end_ns or self._now_ns())
        except Exception as error:
            verdicts = [*verdicts, self._broke_down("plot", error)]
        summary = summarise()
        report.write_results(directory / "results.json", summary, verdicts, nemesis.windows,
                             self._settings.as_dict() | {
                                 "network": self._cluster.network.name})
        return Outcome(summary, verdicts)


def describe_problems(outcome: Outcome) -> list[str]:
    """The lines that explain a verdict that is not valid."""
    return [f"{verdict.checker}: {verdict.validity}: {problem}"
            for verdict in outcome.verdicts if verdict.validity is not Validity.VALID
            for problem in verdict.problems]
