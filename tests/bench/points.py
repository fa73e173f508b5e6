"""What is measured: one table of load points, and how each becomes h2load instances."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bodies import Body, KeyRotator, key_of, random_value
from h2load import Load, LoadFailed, LoadResult, run, warm_up

KIB = 1024
BATCH_KEYS = 100
SCAN_KEYS = 1000
BIG_KEYS = 2000
BIG_PREFIX = b"big-"
BIG_VALUE_BYTES = 64 * KIB
MIX_READS_PER_WRITE = 9
CUT_OFF = ("Unknown", "Canceled", "CANCELLED")
"""Under these statuses calls are counted that were under way when the generator ended: by etcd
under the first two, by elastickv under the last."""
ATTEMPTS = 3
"""So often is a point measured at most until its responses show that all calls succeeded."""
GENERATOR_SHARE = 0.8
"""An h2load instance is one thread. One that computes for so much of the time may be the limit."""
# Numbers above every real key, to find the places where keys stand in a serialized message.
_PLACEHOLDER = 900_000_000_000


@dataclass(frozen=True)
class Point:
    """One load. `target` is the ratio to the baseline to reach, 0 = none asked for."""

    name: str
    title: str
    kind: str
    connections: int
    streams: int
    value_bytes: int = KIB
    target: float = 0.0
    quick: bool = False

    @property
    def outstanding(self) -> int:
        return self.connections * self.streams

    @property
    def instances(self) -> int:
        """h2load processes: each posts its own keys."""
        return min(4, self.connections)


# What writes much comes last: its effects go on for some seconds.
POINTS: tuple[Point, ...] = (
    Point("put-1", "put, 1 outstanding", "put", 1, 1, target=1.0, quick=True),
    Point("put-16x1", "put, 16 outstanding, 16 connections", "put", 16, 1),
    Point("put-16x8", "put, 128 outstanding, 16 connections", "put", 16, 8, target=0.6, quick=True),
    Point("put-1x128", "put, 128 outstanding, 1 connection", "put", 1, 128),
    Point("put-16x64", "put, 1,024 outstanding, 16 connections", "put", 16, 64),
    Point("put-1x1024", "put, 1,024 outstanding, 1 connection", "put", 1, 1024),
    Point("get-1", "linearizable get, 1 outstanding", "get", 1, 1),
    Point("get-16x1", "linearizable get, 16 outstanding, 16 connections", "get", 16, 1),
    Point("get-16x8", "linearizable get, 128 outstanding, 16 connections", "get", 16, 8,
          target=1.2, quick=True),
    Point("get-1x128", "linearizable get, 128 outstanding, 1 connection", "get", 1, 128),
    Point("get-16x64", "linearizable get, 1,024 outstanding, 16 connections", "get", 16, 64),
    Point("get-1x1024", "linearizable get, 1,024 outstanding, 1 connection", "get", 1, 1024),
    Point("range-16x1", "scan of a range of 1,000 pairs, 16 outstanding, 16 connections", "scan",
          16, 1),
    Point("mixed-16x8", "90 % get, 10 % put, 128 outstanding, 16 connections", "mixed", 16, 8),
    Point("get-64k-16x8", "linearizable get of 64 KiB, 128 outstanding, 16 connections", "get",
          16, 8, value_bytes=BIG_VALUE_BYTES),
    Point("batch-16x1", "atomic batch of 100 puts, 16 outstanding, 16 connections", "batch", 16, 1,
          target=3.0, quick=True),
    Point("put-64k-16x8", "put of 64 KiB, 128 outstanding, 16 connections", "put", 16, 8,
          value_bytes=BIG_VALUE_BYTES),
)


def point(name: str) -> Point:
    """The point with this name."""
    return next(each for each in POINTS if each.name == name)


class Calls(Protocol):
    """What a point needs of a cluster (`systems.Cluster`)."""

    name: str
    put_path: str
    get_path: str
    batch_path: str
    scan_path: str

    def put_message(self, key: bytes, value: bytes) -> bytes: ...
    def get_message(self, key: bytes) -> bytes: ...
    def batch_message(self, pairs: Sequence[tuple[bytes, bytes]]) -> bytes: ...
    def scan_message(self, start: bytes, end: bytes, limit: int) -> bytes: ...
    def values_in(self, path: str, response: bytes) -> list[bytes]: ...
    def leader(self) -> int: ...
    def load_url(self, node: int) -> str: ...
    def call(self, node: int, path: str, message: bytes) -> bytes: ...
    def cpu_s(self) -> float: ...
    def ended_calls(self, node: int) -> Mapping[str, int] | None: ...
    def require_members(self) -> None: ...


@dataclass(frozen=True)
class Measured:
    """One point on one system in one turn. Rates are calls per second; `server_us` is processor
    time of all members per call, `generator_us` that of h2load."""

    rate: float
    p50_ms: float
    p99_ms: float
    server_us: float
    generator_us: float

    @staticmethod
    def of(result: LoadResult) -> Measured:
        return Measured(result.rate, result.p50_ms, result.p99_ms,
                        server_us=result.server_cpu_s / result.succeeded * 1e6,
                        generator_us=result.generator_cpu_s / result.succeeded * 1e6)


def paths_of(calls: Calls, load: Point) -> list[str]:
    """The paths that one instance visits in turn."""
    match load.kind:
        case "put":
            return [calls.put_path]
        case "get":
            return [calls.get_path]
        case "batch":
            return [calls.batch_path]
        case "scan":
            return [calls.scan_path]
        case "mixed":
            return [calls.get_path] * MIX_READS_PER_WRITE + [calls.put_path]
    raise ValueError(f"no such kind of load: {load.kind}")


def body_of(calls: Calls, load: Point, keys: int) -> Body:
    """The body of one instance over a key space of `keys`.

    The mixed body serves as a put and as a get: its value starts with its own key and a zero byte.
    etcd reads field 2 of a get as the end of a range, and [key, key 0x00 ...) holds exactly that
    key; elastickv has no field 2 in a get and skips it.

    A scan's range holds as many keys as its limit: etcd 3.4 goes through a range to its end, to
    count it, whatever the limit is.
    """
    big = load.value_bytes == BIG_VALUE_BYTES
    prefix = BIG_PREFIX if big else b"key-"
    span = BIG_KEYS if big else keys
    placeholder = key_of(_PLACEHOLDER, prefix)
    value = random_value(load.value_bytes)
    match load.kind:
        case "put":
            message = calls.put_message(placeholder, value)
        case "get":
            message = calls.get_message(placeholder)
        case "scan":
            end = key_of(_PLACEHOLDER + 1)
            message = calls.scan_message(placeholder, end, SCAN_KEYS)
            return Body.with_keys(message, [placeholder, end], span=keys - SCAN_KEYS,
                                  base=[0, SCAN_KEYS])
        case "mixed":
            marked = placeholder + b"\0"
            message = calls.put_message(placeholder, marked + value[len(marked):])
        case "batch":
            placeholders = [key_of(_PLACEHOLDER + slot) for slot in range(BATCH_KEYS)]
            span = keys // BATCH_KEYS
            message = calls.batch_message([(each, value) for each in placeholders])
            return Body.with_keys(message, placeholders, span=span,
                                  base=[slot * span for slot in range(BATCH_KEYS)])
        case _:
            raise ValueError(f"no such kind of load: {load.kind}")
    return Body.with_keys(message, [placeholder], span=span, base=[0], prefix=prefix)


def response_bytes(calls: Calls, load: Point, keys: int) -> list[int]:
    """Make each call of the point once, check it as a client would, and return the sizes of the
    responses, gRPC frame included."""
    leader = calls.leader()
    sizes = []
    for step, path in enumerate(paths_of(calls, load)):
        message = body_of(calls, load, keys).at_step(step)[5:]
        response = calls.call(leader, path, message)
        values = calls.values_in(path, response)
        wanted = {calls.get_path: 1, calls.scan_path: 1}.get(path, 0)
        if load.kind == "scan":
            wanted = SCAN_KEYS
        if len(values) != wanted or any(len(value) != load.value_bytes for value in values):
            raise LoadFailed(f"{calls.name}: {path} gave {len(values)} values, not {wanted} of "
                             f"{load.value_bytes} bytes")
        sizes.append(len(response) + 5)
    return sizes


def check_counts(name: str, load: Point, succeeded: int, before: Mapping[str, int],
                 after: Mapping[str, int]) -> None:
    """Raise `LoadFailed` unless all calls succeeded by the server's own count of calls by status.

    What is left unseen: calls that failed with a status of `CUT_OFF`, as many as may be under way
    when a run ends, that of the warm-up included.
    """
    ended = {status: count - before.get(status, 0) for status, count in after.items()}
    cut_off = sum(ended.get(status, 0) for status in CUT_OFF)
    failed = {status: count for status, count in ended.items()
              if count and status not in ("OK", *CUT_OFF)}
    if failed or cut_off > 2 * load.outstanding or ended.get("OK", 0) < succeeded:
        raise LoadFailed(f"{name}, {load.title}: of {succeeded} calls that were answered, the "
                         f"server counts {ended}: calls failed at the gRPC level")


def check_sizes(name: str, load: Point, result: LoadResult, before: Sequence[int],
                after: Sequence[int]) -> bool:
    """Whether all calls succeeded by the bytes of their responses: a call that fails has no
    response body, although its HTTP status is 200. Raises `LoadFailed` when calls failed certainly.

    `before` and `after` are the sizes of the responses before and after the run, one for each path
    in turn. While they stay the same, one missing response is found; but what had arrived of
    responses that were under way at the end is there as well, as for long scans through a proxy.
    A size that grew, because an index did, shows nothing. Nor does a mix whose bytes are not those
    of a whole number of reads and of writes, about as many as were asked for: calls failed, or part
    of a response was under way. Writes of a mix that failed are not seen where they are as many, or
    a multiple of as many, as the bytes in which its two sizes differ.
    """
    calls, received = result.succeeded, result.data_bytes
    small, large = min(before), max(before)
    if small == large:
        complete = received > (calls - 1) * small
        shown = True
    else:
        reads, rest = divmod(received - calls * small, large - small)
        complete = abs(reads - calls * before.count(large) / len(before)) <= load.outstanding
        shown = not rest
    if not complete:
        raise LoadFailed(f"{name}, {load.title}: {received} bytes of {calls} responses, which have "
                         f"{sorted(set(before))} each: calls failed at the gRPC level")
    return shown and before == after


def generator_limit(name: str, load: Point, result: LoadResult, duration_s: float) -> str:
    """What to say where it was perhaps the generator that was measured; "" where it was not."""
    share = result.generator_cpu_s / (duration_s * load.instances)
    if share <= GENERATOR_SHARE:
        return ""
    return (f"{name}, {load.title}: the generator computed for {share:.0%} of the time, so that "
            "it may be the limit")


def measure(calls: Calls, load: Point, keys: int, directory: Path, *, duration_s: float,
            seed: int = 0, warm_up_s: float = 1.0) -> Measured:
    """Run one point against the leader, again when it was not shown that all calls succeeded or
    when another member leads at the end. Raises `LoadFailed` when calls failed at any level, or
    when it cannot be shown, and `ClusterFailed` when a member has ended."""
    for _ in range(ATTEMPTS):
        leader = calls.leader()
        found, _, shown = _measure(calls, load, keys, directory, duration_s=duration_s, seed=seed,
                                   warm_up_s=warm_up_s)
        stayed = calls.leader() == leader
        if shown and stayed:
            return found
        why = "it was not shown that all calls succeeded" if stayed else "the leader changed"
        print(f"{calls.name}, {load.title}: measured again, because {why}", file=sys.stderr,
              flush=True)
    raise LoadFailed(f"{calls.name}, {load.title}: in none of {ATTEMPTS} runs was it shown that "
                     "all calls succeeded at the gRPC level, with one leader")


def measure_calls(calls: Calls, load: Point, keys: int, directory: Path, *, duration_s: float,
                  seed: int = 0, warm_up_s: float = 1.0,
                  ) -> tuple[Measured, list[tuple[int, float]]]:
    """One run, with `(start in us since the epoch, latency in ms)` of every call. Raises
    `LoadFailed` when calls failed at any level, or when it is not shown that all succeeded, which
    is left to chance where the cluster does not count its calls."""
    found, log, shown = _measure(calls, load, keys, directory, duration_s=duration_s, seed=seed,
                                 warm_up_s=warm_up_s)
    if not shown:
        raise LoadFailed(f"{calls.name}, {load.title}: it is not shown that all calls succeeded "
                         "at the gRPC level")
    return found, log


def _measure(calls: Calls, load: Point, keys: int, directory: Path, *, duration_s: float,
             seed: int, warm_up_s: float) -> tuple[Measured, list[tuple[int, float]], bool]:
    """One run, its calls, and whether it is shown that all of them succeeded."""
    leader = calls.leader()
    url = calls.load_url(leader)
    share, rest = divmod(load.connections, load.instances)
    bodies = [body_of(calls, load, keys) for _ in range(load.instances)]
    with KeyRotator(bodies, directory, start=seed * 100_003):
        loads = [Load(url, paths_of(calls, load), _path(body), share + (number < rest),
                      load.streams) for number, body in enumerate(bodies)]
        if warm_up_s:
            warm_up(loads, directory, warm_up_s)
        sizes = response_bytes(calls, load, keys)
        counts = calls.ended_calls(leader)
        result, log = run(loads, directory, duration_s=duration_s, server_cpu_s=calls.cpu_s)
    # Without one of three, calls succeed as well.
    calls.require_members()
    if limit := generator_limit(calls.name, load, result, duration_s):
        print(limit, file=sys.stderr, flush=True)
    shown = True
    if counts is None:
        shown = check_sizes(calls.name, load, result, sizes, response_bytes(calls, load, keys))
    else:
        check_counts(calls.name, load, result.succeeded, counts, calls.ended_calls(leader) or {})
    return Measured.of(result), log, shown


def _path(body: Body) -> Path:
    if body.path is None:
        raise ValueError("the body is in no file")
    return body.path
