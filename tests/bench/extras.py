"""What is measured besides rates: fail-over, start-up, memory."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import grpc
from bodies import key_of
from processes import directory_bytes, wait_until
from systems import NODES, START_TIMEOUT_S, Cluster

ATTEMPT_TIMEOUT_S = 0.25


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several measurements."""

    median: float
    minimum: float
    maximum: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values), len(values))


def fail_over_s(cluster: Cluster, kills: int) -> Spread:
    """Seconds from kill -9 of the leader to the next acknowledged write, over several kills.

    The two survivors are tried side by side, so the figure holds for a client that knows them all.
    After each kill the member comes back and has caught up before the next one.
    """
    times = []
    for number in range(kills):
        leader = cluster.leader()
        write = cluster.put_message(key_of(number), b"fail-over")
        cluster.call(leader, cluster.put_path, write)
        killed_at = time.monotonic()
        cluster.processes[leader].kill()
        times.append(_first_success(cluster, leader, write) - killed_at)
        cluster.restart_node(leader)
        wait_until(partial(cluster.answers, leader), [cluster.processes[leader]],
                   timeout_s=START_TIMEOUT_S, what=f"{cluster.name} member {leader} is back")
    return Spread.of(times)


def _first_success(cluster: Cluster, dead: int, write: bytes) -> float:
    done = threading.Event()
    succeeded_at: list[float] = []

    def attempt(node: int) -> None:
        while not done.is_set():
            try:
                cluster.call(node, cluster.put_path, write, timeout_s=ATTEMPT_TIMEOUT_S)
                succeeded_at.append(time.monotonic())
                done.set()
            except grpc.RpcError:
                done.wait(0.005)

    threads = [threading.Thread(target=attempt, args=(node,), daemon=True)
               for node in range(NODES) if node != dead]
    for thread in threads:
        thread.start()
    if not done.wait(60):
        done.set()
        raise TimeoutError(f"{cluster.name}: no write within 60 s of the leader's death")
    for thread in threads:
        thread.join()
    return min(succeeded_at)


@dataclass(frozen=True)
class Footprint:
    """A cluster at rest with `keys` keys. Bytes in memory and on disk: the largest
    member's."""

    keys: int
    start_s: float
    start_after_kill_s: float
    rss_bytes: int
    anonymous_bytes: int
    disk_bytes: int


def footprint(cluster: Cluster, keys: int) -> Footprint:
    """Restart a running cluster twice (after SIGTERM, after kill -9 of all) and look at it."""
    cluster.stop()
    start_s = cluster.start()
    for process in cluster.processes:
        process.kill()
    cluster.stop()
    start_after_kill_s = cluster.start()
    memory = [process.memory_bytes() for process in cluster.processes]
    return Footprint(keys, start_s, start_after_kill_s,
                     rss_bytes=max(each["rss"] for each in memory),
                     anonymous_bytes=max(each["anonymous"] for each in memory),
                     disk_bytes=max(map(directory_bytes, cluster.data)))
