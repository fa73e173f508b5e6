"""Runs h2load instances side by side and adds up what they report."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ratios import percentile

_FINISHED = re.compile(r"^finished in ([0-9.]+)(us|ms|s|m|h)?.*, ([0-9.]+) req/s", re.MULTILINE)
_REQUESTS = re.compile(r"^requests: (\d+) total, (\d+) started, (\d+) done, (\d+) succeeded, "
                       r"(\d+) failed, (\d+) errored, (\d+) timeout", re.MULTILINE)
_STATUS = re.compile(r"^status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", re.MULTILINE)
_TRAFFIC = re.compile(r"^traffic: \S+ \((\d+)\) total, \S+ \((\d+)\) headers .*?, "
                      r"\S+ \((\d+)\) data", re.MULTILINE)

GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")


class LoadFailed(Exception):
    """h2load could not run, or calls failed."""


@dataclass(frozen=True)
class Summary:
    """What one h2load instance reports. `data_bytes` counts response bodies; a gRPC call that
    fails has none, although its HTTP status is 200."""

    rate: float
    succeeded: int
    failed: int
    data_bytes: int


@dataclass(frozen=True)
class Load:
    """One instance: `connections` x `streams` calls outstanding, posting `body`."""

    url: str
    paths: Sequence[str]
    body: Path
    connections: int
    streams: int


@dataclass(frozen=True)
class LoadResult:
    """Several instances together. `succeeded` calls have HTTP status 200, whatever their gRPC
    status. Latencies in milliseconds; processor time in seconds, of h2load and of the servers."""

    rate: float
    succeeded: int
    data_bytes: int
    p50_ms: float
    p99_ms: float
    generator_cpu_s: float
    server_cpu_s: float


def parse_summary(output: str) -> Summary:
    """The numbers in h2load's closing lines. Raises `LoadFailed` when they are not there."""
    finished = _FINISHED.search(output)
    requests = _REQUESTS.search(output)
    status = _STATUS.search(output)
    traffic = _TRAFFIC.search(output)
    if not (finished and requests and status and traffic):
        raise LoadFailed(f"h2load said: {output[-500:]}")
    not_ok = sum(int(status.group(number)) for number in (2, 3, 4))
    broken = sum(int(requests.group(number)) for number in (5, 6, 7))
    return Summary(rate=float(finished.group(3)), succeeded=int(requests.group(4)),
                   failed=not_ok + broken, data_bytes=int(traffic.group(3)))


def parse_log(text: str) -> list[tuple[int, float]]:
    """`(start in us since the epoch, latency in ms)` of every call in an h2load --log-file."""
    calls = []
    for line in text.splitlines():
        start, status, latency = line.split("\t")[:3]
        if status == "200":
            calls.append((int(start), int(latency) / 1000))
    return calls


def command(load: Load, *, duration_s: float, log: Path) -> list[str]:
    """The command line of one instance."""
    headers = [part for header in GRPC_HEADERS for part in ("-H", header)]
    # Several paths are visited in turn; that is how a mix of calls with one body is made.
    return ["h2load", "-t1", f"-c{load.connections}", f"-m{load.streams}",
            f"-D{round(duration_s * 1000)}ms", "-d", str(load.body),
            f"--log-file={log}", *headers, *(load.url + path for path in load.paths)]


def warm_up(loads: Sequence[Load], directory: Path, duration_s: float) -> None:
    """Run all instances at the same time for nothing.

    It is a run of its own: h2load's, within one run, has no requests in the report, but its bytes
    are there, and no count of them would tell whether calls failed.
    """
    _run_all(loads, _logs(loads, directory), duration_s)


def run(loads: Sequence[Load], directory: Path, *, duration_s: float,
        server_cpu_s: Callable[[], float] = lambda: 0.0,
        ) -> tuple[LoadResult, list[tuple[int, float]]]:
    """Run all instances at the same time; the sum, and every call with its latency.

    `server_cpu_s` is read before and after. Raises `LoadFailed` when an instance reports any
    failed, errored or timed-out request.
    """
    logs = _logs(loads, directory)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    server_before = server_cpu_s()
    outputs = _run_all(loads, logs, duration_s)
    server_used = server_cpu_s() - server_before
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summaries = [parse_summary(output) for output in outputs]
    calls = [call for log in logs for call in parse_log(log.read_text(encoding="ascii"))]
    generator_s = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return combine(summaries, [latency for _, latency in calls], generator_s, server_used), calls


def _logs(loads: Sequence[Load], directory: Path) -> list[Path]:
    return [directory / f"log-{number}" for number in range(len(loads))]


def _run_all(loads: Sequence[Load], logs: Sequence[Path], duration_s: float) -> list[str]:
    """What each instance printed."""
    processes = []
    for load, log in zip(loads, logs, strict=True):
        log.unlink(missing_ok=True)
        processes.append(subprocess.Popen(
            command(load, duration_s=duration_s, log=log), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env={**os.environ, "LC_ALL": "C"}))
    return _collect(processes, timeout_s=duration_s + 60)


def _collect(processes: Sequence[subprocess.Popen[str]], timeout_s: float) -> list[str]:
    try:
        return [process.communicate(timeout=timeout_s)[0] for process in processes]
    except subprocess.TimeoutExpired:
        raise LoadFailed("h2load did not end in time") from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def combine(summaries: Sequence[Summary], latencies_ms: list[float],
            generator_cpu_s: float, server_cpu_s: float) -> LoadResult:
    """Add up instances that ran at the same time."""
    succeeded = sum(summary.succeeded for summary in summaries)
    failed = sum(summary.failed for summary in summaries)
    if failed or not succeeded:
        raise LoadFailed(f"{failed} of {succeeded + failed} requests failed")
    ordered = sorted(latencies_ms)
    return LoadResult(
        rate=sum(summary.rate for summary in summaries), succeeded=succeeded,
        data_bytes=sum(summary.data_bytes for summary in summaries),
        p50_ms=percentile(ordered, 0.50), p99_ms=percentile(ordered, 0.99),
        generator_cpu_s=generator_cpu_s, server_cpu_s=server_cpu_s)
