"""What an operation does to calls under load: rotations, the raft cutover, handed-over leadership,
and the compaction of the log. Any call that fails ends the run with an error: the members count
their calls by status."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from points import measure_calls, point
from ratios import percentile
from systems import NODES, ElasticKVCluster

LOAD = "put-16x8"
WARM_UP_S = 1.0
WINDOW_S = 1.0
"""How long after its beginning an operation is held responsible for a pause."""
HOLD_METRIC = "elastickv_encryption_cutover_hold_seconds"

Call = tuple[int, float]
"""(start in us since the epoch, latency in ms)."""


@dataclass(frozen=True)
class Event:
    """One operation: when it began, in us since the epoch, and how long it took."""

    start_us: int
    took_ms: float


def longest_pause_ms(calls: Sequence[Call], start_us: float, end_us: float) -> float:
    """The longest time within a window in which no call ended."""
    ends = sorted(end for start, latency_ms in calls
                  if start_us < (end := start + latency_ms * 1000) < end_us)
    edges = [start_us, *ends, end_us]
    return max(after - before for before, after in pairwise(edges)) / 1000


def under_load(cluster: ElasticKVCluster, keys: int, directory: Path, *, quiet_s: float,
               operations: Sequence[Callable[[], None]],
               every_s: float) -> tuple[list[Call], list[Event]]:
    """Put at 128 outstanding: for `quiet_s` alone, then with an operation every `every_s`.

    Raises what an operation raised, and `LoadFailed` when a put failed.
    """
    events: list[Event] = []
    failures: list[BaseException] = []
    load_failed = threading.Event()

    def operate() -> None:
        pause_s = WARM_UP_S + quiet_s
        try:
            for operation in operations:
                if load_failed.wait(pause_s):
                    return
                start_us, began = time.time_ns() // 1000, time.monotonic()
                operation()
                took_s = time.monotonic() - began
                events.append(Event(start_us, took_s * 1000))
                pause_s = max(0.0, every_s - took_s)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=operate)
    thread.start()
    try:
        _, calls = measure_calls(cluster, point(LOAD), keys, directory, warm_up_s=WARM_UP_S,
                                 duration_s=quiet_s + len(operations) * every_s)
    except BaseException:
        load_failed.set()
        raise
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return calls, events


@dataclass(frozen=True)
class RotationEffect:
    """Latency of puts before and while DEKs are rotated."""

    rotations: int
    before_p99_ms: float
    during_p99_ms: float
    before_p50_ms: float
    during_p50_ms: float
    slowest_rotation_ms: float
    puts: int


def rotation_under_load(cluster: ElasticKVCluster, keys: int, directory: Path, *, rotations: int,
                        quiet_s: float) -> RotationEffect:
    """Rotate the storage and the raft DEK in turns, one every half second."""
    calls, events = under_load(
        cluster, keys, directory, quiet_s=quiet_s, every_s=0.5,
        operations=[partial(cluster.rotate_dek, raft=bool(number % 2))
                    for number in range(rotations)])
    first_us = events[0].start_us
    before = sorted(latency for start, latency in calls if start < first_us)
    during = sorted(latency for start, latency in calls if start >= first_us)
    return RotationEffect(
        rotations=rotations,
        before_p99_ms=percentile(before, 0.99), during_p99_ms=percentile(during, 0.99),
        before_p50_ms=percentile(before, 0.50), during_p50_ms=percentile(during, 0.50),
        slowest_rotation_ms=max(event.took_ms for event in events), puts=len(calls))


@dataclass(frozen=True)
class CutoverEffect:
    """The raft cutover: how long it held proposals back, and the longest time without an
    acknowledged put around it."""

    hold_ms: float
    longest_pause_ms: float
    took_ms: float
    puts: int


def cutover_under_load(directory: Path, memory: Path, keys: int) -> CutoverEffect:
    """Enable the raft envelope of a new cluster under load."""
    cluster = ElasticKVCluster(directory, raft_envelope=False, metrics=True)
    try:
        cluster.start()
        calls, [event] = under_load(cluster, keys, memory, quiet_s=2.0, every_s=2.0,
                                    operations=[cluster.enable_raft_envelope])
        holds = [_metric(cluster.metrics(node), HOLD_METRIC) for node in range(NODES)]
        return CutoverEffect(max(holds) * 1000, _pause_after(calls, event), event.took_ms,
                             puts=len(calls))
    finally:
        cluster.remove()


def _pause_after(calls: Sequence[Call], event: Event) -> float:
    return longest_pause_ms(calls, event.start_us, event.start_us + WINDOW_S * 1e6)


def _metric(metrics: str, name: str) -> float:
    for line in metrics.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise LookupError(f"there is no metric {name}")


@dataclass(frozen=True)
class TransferEffect:
    """Leadership handed over under load. `took_ms` and the longest time without an acknowledged
    put are medians over the transfers; the worst are beside them."""

    transfers: int
    took_ms: float
    slowest_ms: float
    pause_ms: float
    longest_pause_ms: float
    puts: int


def transfers_under_load(cluster: ElasticKVCluster, keys: int, directory: Path, *,
                         transfers: int) -> TransferEffect:
    """Hand leadership over, one transfer a second; clients stay where they are connected."""
    calls, events = under_load(cluster, keys, directory, quiet_s=1.0, every_s=1.0,
                               operations=[cluster.transfer_leadership] * transfers)
    took = sorted(event.took_ms for event in events)
    pauses = sorted(_pause_after(calls, event) for event in events)
    return TransferEffect(transfers, percentile(took, 0.5), took[-1],
                          percentile(pauses, 0.5), pauses[-1], puts=len(calls))


@dataclass(frozen=True)
class CompactionEffect:
    """The longest times without an acknowledged put: with a log that is never compacted, and with
    one that is compacted over and over. The two clusters take turns; medians over the turns."""

    turns: int
    without_ms: float
    with_ms: float
    compacted_to: int
    puts: int


def compaction_under_load(directory: Path, memory: Path, keys: int, *, turns: int,
                          turn_s: float) -> CompactionEffect:
    """Compaction of a log of 8 MiB under load, which at this rate is due about every second."""
    pauses: dict[bool, list[float]] = {False: [], True: []}
    flags = {False: ["--snapshot-log-bytes", str(1 << 40), "--snapshot-entries", "1000000000"],
             True: ["--snapshot-log-bytes", str(8 << 20), "--snapshot-entries", "2000"]}
    clusters = {often: ElasticKVCluster(directory / ("often" if often else "never"),
                                        metrics=True, flags=flags[often]) for often in flags}
    compacted_to = puts = 0
    try:
        for _ in range(turns):
            for often, cluster in clusters.items():
                cluster.start()
                _, calls = measure_calls(cluster, point(LOAD), keys, memory, duration_s=turn_s,
                                         warm_up_s=WARM_UP_S)
                puts += len(calls)
                pauses[often].append(longest_pause_ms(
                    calls, min(calls)[0] + WARM_UP_S * 1e6, max(calls)[0]))
                if often:
                    compacted_to = cluster.last_snapshot_index()
                cluster.stop()
    finally:
        for cluster in clusters.values():
            cluster.remove()
    if not compacted_to:
        raise RuntimeError("the log was never compacted, so nothing was measured")
    return CompactionEffect(turns, percentile(sorted(pauses[False]), 0.5),
                            percentile(sorted(pauses[True]), 0.5), compacted_to, puts)
