"""Side by side with etcd, on this machine, in one run: `make bench`, or `make bench QUICK=1`.

Servers of both systems run on loopback with fsync on; elastickv with storage and Raft encrypted.
Sides take turns (etcd, elastickv, elastickv over grpc.aio, etcd ...) and each turn is compared with
the nearest one of etcd, so that the machine's drift does not decide. Writes docs/benchmarks.json
and docs/benchmarks.md with its plots; a quick run, or one with FRONT=grpc in the place of our own
front, writes under runs/ instead. `make bench PART=encryption` (or tls, or sizes) measures that
part again and leaves the rest of the published run as it is. The last line names every ratio with
a target, with its smallest and largest value, and every figure with a limit; the exit code is 1
where one falls short.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import disturbances  # noqa: E402
import extras  # noqa: E402
import report  # noqa: E402
from bodies import key_of, random_value  # noqa: E402
from h2load import Load, warm_up  # noqa: E402
from h2load import run as run_load  # noqa: E402
from points import (  # noqa: E402
    BIG_KEYS,
    BIG_PREFIX,
    BIG_VALUE_BYTES,
    KIB,
    POINTS,
    Point,
    measure,
    point,
)
from processes import ServerProcess, listens, wait_until  # noqa: E402
from ratios import Ratio, with_ratios  # noqa: E402
from systems import Cluster, ElasticKVCluster, EtcdCluster  # noqa: E402

from jepsen.network.ports import free_ports  # noqa: E402

INCOMPLETE = ROOT / "runs" / "bench-incomplete"
ENCRYPTION_TARGET = 0.97
IN_MEMORY = ("tmpfs", "ramfs")
PROGRAMS = ("etcd", "h2load", "nghttpd")
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AIO_TARGETS = {"put-16x8": 0.6}
"""Over grpc.aio, by load; the targets in `points` are for the faster front."""
LIMITS = {
    "rotation p99, during / before": 2.0,
    "fail-over s": 1.0,
    "cutover hold ms": 100.0,
    "leadership transfer ms": 300.0,
    "compaction pause, with - without ms": 50.0,
}
"""What the figures of elastickv alone may be at most."""
SECTIONS = {"plain": "", "plain_aio": "grpc.aio ", "tls": "TLS ", "tls_aio": "TLS grpc.aio ",
            "encryption": "encryption on/off ", "encryption_aio": "encryption on/off grpc.aio "}
"""The sections of a document that have ratios, and what stands before the names of their loads."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how much."""

    keys: int
    turns: int
    duration_s: float
    points: Sequence[Point]
    aio_loads: Collection[str]
    """The names of those points that are measured over grpc.aio too."""
    encryption_slices: int
    extras: bool
    parts: Sequence[str]
    fresh_turns: bool = False
    """Whether each turn begins with the data that was written first, and nobody else's in memory:
    what all turns write may outgrow it, and then page caches are compared. Takes some minutes."""
    size_keys: Sequence[int] = ()


ENCRYPTION_KEYS = 100_000
"""Two clusters are up at once for this comparison. Both have to fit into the page cache, or it is
reads from the disk that are compared."""
QUICK = Plan(keys=1_000_000, turns=2, duration_s=3.0, extras=False, encryption_slices=12,
             points=[each for each in POINTS if each.quick], aio_loads=AIO_TARGETS,
             parts=("main", "encryption"))
FULL = Plan(keys=1_000_000, turns=3, duration_s=5.0, extras=True, encryption_slices=24,
            points=POINTS, aio_loads=[each.name for each in POINTS if each.target],
            parts=("main", "encryption", "tls", "sizes"),
            size_keys=(10_000, 1_000_000, 5_000_000), fresh_turns=True)


class Bench:
    """One run; results gather in `document`, the content of the JSON file."""

    def __init__(self, plan: Plan, work: Path, memory: Path, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.work = work
        self.memory = memory
        self.say = say
        self.document: dict[str, Any] = {"environment": environment(work), "plan": {
            "keys": plan.keys, "turns": plan.turns, "duration_s": plan.duration_s,
            "fresh_turns": plan.fresh_turns}}

    def add(self, found: dict[str, Any]) -> None:
        """Put sections of the rates of turns into the document, and tell their ratios."""
        self.document = with_ratios({**self.document, **found})
        for section in found:
            for name, entry in self.document[section].items():
                self.say(f"ratio, {SECTIONS[section]}{name}: {Ratio(**entry['ratio'])}")

    def preload(self, cluster: Cluster, keys: int, *, big: bool) -> None:
        """Fill a running cluster."""
        started = time.monotonic()
        cluster.preload(keys, random_value(KIB))
        if big:
            value = random_value(BIG_VALUE_BYTES)
            for first in range(0, BIG_KEYS, 10):
                cluster.write([(key_of(number, BIG_PREFIX), value)
                               for number in range(first, first + 10)])
        self.say(f"{cluster.name}: {keys:,} keys written in {time.monotonic() - started:.0f} s")

    def side_by_side(self, section: str, baseline: Cluster, other: ElasticKVCluster) -> None:
        """All points of the plan in turns; both clusters hold their data and are stopped."""
        aio_points = [load for load in self.plan.points if load.name in self.plan.aio_loads]
        sides: list[tuple[str, Cluster, Sequence[Point]]] = [
            ("etcd", baseline, self.plan.points), ("elastickv", other, self.plan.points)]
        if (aio := other.over_aio()) is not None:
            sides.append(("grpc.aio", aio, aio_points))
        rates: dict[str, dict[str, list[dict[str, float]]]] = {
            side: {load.name: [] for load in points} for side, _, points in sides}
        if self.plan.fresh_turns:
            for cluster in (baseline, other):
                cluster.keep()
        for turn in range(self.plan.turns):
            for side, cluster, points in sides:
                if self.plan.fresh_turns and cluster is not aio:
                    self._restore(cluster, baseline, other)
                # Whatever ends a turn: who removes the data knows nothing of grpc.aio's servers.
                try:
                    cluster.start()
                    cluster.settle()
                    for load in points:
                        found = measure(cluster, load, self.plan.keys, self.memory, seed=turn,
                                        duration_s=self.plan.duration_s)
                        rates[side][load.name].append(dataclasses.asdict(found))
                        self.say(f"turn {turn + 1} {side:9} {load.name:14} "
                                 f"{found.rate:9.0f}/s  p99 {found.p99_ms:7.1f} ms  "
                                 f"{found.server_us:5.0f} us of CPU a call")
                finally:
                    cluster.stop()
        found = {section: {
            load.name: _entry(load, load.target, rates["etcd"], rates["elastickv"])
            for load in self.plan.points}}
        if aio is not None:
            found[f"{section}_aio"] = {
                load.name: _entry(load, AIO_TARGETS.get(load.name, 0.0),
                                  rates["etcd"], rates["grpc.aio"])
                for load in aio_points}
        self.add(found)

    def _restore(self, cluster: Cluster, *all_clusters: Cluster) -> None:
        """Leave just the data that was kept of `cluster`."""
        started = time.monotonic()
        for each in all_clusters:
            each.clear()
        cluster.restore()
        self.say(f"{cluster.name}: data put back in {time.monotonic() - started:.0f} s")

    def encryption(self, encrypted: ElasticKVCluster, plain: ElasticKVCluster) -> None:
        """Encrypted against not encrypted, a whole run over both fronts; both clusters hold their
        data and are stopped."""
        self._on_and_off("encryption", encrypted, plain)
        encrypted_aio, plain_aio = encrypted.over_aio(), plain.over_aio()
        if self.plan.extras and encrypted_aio is not None and plain_aio is not None:
            self._on_and_off("encryption_aio", encrypted_aio, plain_aio)

    def _on_and_off(self, section: str, encrypted: Cluster, plain: Cluster) -> None:
        """Both up, in short alternating slices, because a difference of a few per cent drowns in
        the drift between long turns."""
        loads = [point("put-16x8"), point("get-16x8")]
        rates: dict[str, dict[str, list[dict[str, float]]]] = {
            load.name: {"off": [], "on": []} for load in loads}
        try:
            for cluster in (encrypted, plain):
                cluster.start()
                cluster.settle()
            for load in loads:
                for number in range(self.plan.encryption_slices):
                    sides = [("off", plain), ("on", encrypted)]
                    # Who goes first changes: what a slice leaves to be written back is not always
                    # the same side's burden.
                    for side, cluster in sides if number % 2 == 0 else reversed(sides):
                        found = measure(cluster, load, ENCRYPTION_KEYS, self.memory,
                                        seed=number, duration_s=1.0, warm_up_s=0.3)
                        rates[load.name][side].append(dataclasses.asdict(found))
        finally:
            # Who removes the data knows nothing of grpc.aio's servers.
            for cluster in (encrypted, plain):
                cluster.stop()
        self.add({section: {
            load.name: {"title": load.title, "target": ENCRYPTION_TARGET, **rates[load.name]}
            for load in loads}})

    def sizes(self) -> None:
        """Throughput of elastickv with few, many and very many keys."""
        self.document["sizes"] = {}
        for keys in self.plan.size_keys:
            cluster = ElasticKVCluster(self.work / f"keys-{keys}")
            try:
                cluster.start()
                self.preload(cluster, keys, big=False)
                cluster.settle()
                self.document["sizes"][str(keys)] = {
                    name: dataclasses.asdict(measure(cluster, point(name), keys, self.memory,
                                                     duration_s=self.plan.duration_s))
                    for name in ("put-16x8", "get-16x8")}
            finally:
                cluster.remove()

    def rest(self, baseline: Cluster, other: ElasticKVCluster) -> None:
        """Start-up, memory, rotation and fail-over; both clusters hold their data."""
        self.document["footprint"] = {}
        self.document["fail_over"] = {}
        for side, cluster in (("etcd", baseline), ("elastickv", other)):
            if self.plan.fresh_turns:
                self._restore(cluster, baseline, other)
            cluster.start()
            self.document["footprint"][side] = dataclasses.asdict(
                extras.footprint(cluster, self.plan.keys))
            if cluster is other:
                self._disturb(other)
            self.document["fail_over"][side] = dataclasses.asdict(
                extras.fail_over_s(cluster, kills=20))
            cluster.stop()
            self.say(f"{cluster.name}: {self.document['footprint'][side]} "
                     f"{self.document['fail_over'][side]}")

    def _disturb(self, cluster: ElasticKVCluster) -> None:
        """Operations under load: on the running cluster, which is started again to count its calls,
        and on clusters of their own."""
        cluster.stop()
        counting = cluster.with_metrics()
        try:
            counting.start()
            counting.settle()
            found = {
                "rotation": disturbances.rotation_under_load(
                    counting, self.plan.keys, self.memory, rotations=20, quiet_s=10.0),
                "transfer": disturbances.transfers_under_load(
                    counting, self.plan.keys, self.memory, transfers=10),
            }
        finally:
            counting.stop()
        found["cutover"] = disturbances.cutover_under_load(
            self.work / "cutover", self.memory, self.plan.keys)
        found["compaction"] = disturbances.compaction_under_load(
            self.work / "compaction", self.memory, self.plan.keys, turns=3, turn_s=8.0)
        cluster.start()
        for name, effect in found.items():
            self.document[name] = dataclasses.asdict(effect)
            self.say(f"{name} under load: {effect}")

    def generator(self) -> None:
        """What the generator does against a server that does nothing, so that it is seen not to be
        the limit."""
        page = self.memory / "page"
        page.write_bytes(random_value(20))
        body = self.memory / "generator-body"
        body.write_bytes(random_value(KIB))
        port = free_ports(1)[0]
        server = ServerProcess(["nghttpd", "--no-tls", "-d", str(self.memory), str(port)],
                               self.work / "nghttpd.log")
        try:
            wait_until(lambda: listens(port), [server], timeout_s=10, what="nghttpd")
            loads = [Load(f"http://127.0.0.1:{port}", ["/page"], body, 4, 8) for _ in range(4)]
            warm_up(loads, self.memory, 1.0)
            result, _ = run_load(loads, self.memory, duration_s=3.0)
        finally:
            server.kill()
        self.document["generator"] = {
            "rate": result.rate, "generator_us": result.generator_cpu_s / result.succeeded * 1e6}
        self.say(f"generator against nghttpd: {result.rate:.0f}/s")


def _entry(load: Point, target: float, baseline: dict[str, list[dict[str, float]]],
           rates: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    return {"title": load.title, "target": target, "etcd": baseline[load.name],
            "elastickv": rates[load.name]}


def file_system(directory: Path) -> str:
    """The type of file system that `directory` is on."""
    return subprocess.run(["stat", "--file-system", "--format=%T", str(directory)],
                          capture_output=True, text=True, check=True).stdout.strip()


def require_disk(directory: Path) -> None:
    """Raise `ValueError` where an fsync costs nothing, because no disk is behind it."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    if (found := file_system(directory)) in IN_MEMORY:
        raise ValueError(f"{directory} is on {found}, where fsync costs nothing: set TMPDIR to a "
                         "directory on a disk, or name one with --directory")


def require_programs(parts: Collection[str]) -> None:
    """Raise `ValueError` where a program that these parts of a run need is not installed."""
    wanted = (*PROGRAMS, *(["haproxy"] if "tls" in parts else []))
    missing = [name for name in wanted if shutil.which(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not in PATH: `make bench` installs what a run "
                         "needs, by itself tests/bench/install.sh does")


def end_once(number: int, _: object) -> NoReturn:
    """Of the signals that end a run only the first one does."""
    ignore_signals()
    sys.exit(128 + number)


def ignore_signals() -> None:
    """None hinders from now on that servers and gigabytes of data are taken away."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def environment(work: Path) -> dict[str, str | int]:
    """What the figures depend on; servers keep their data under `work`."""
    def words(command: list[str]) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    model = next((line.partition(":")[2].strip() for line in
                  Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return {"cores": os.cpu_count() or 0, "processor": model,
            "kernel": platform.release().partition("-")[0],
            "python": platform.python_version(), "etcd": words(["etcd", "--version"])[2],
            "h2load": words(["h2load", "--version"])[1], "file_system": file_system(work),
            "date": time.strftime("%Y-%m-%d", time.gmtime())}


class Verdict(NamedTuple):
    """A ratio and the target that its median is to reach."""

    name: str
    ratio: Ratio
    target: float

    @property
    def reached(self) -> bool:
        return self.ratio.median >= self.target


def verdicts(document: dict[str, Any]) -> list[Verdict]:
    """Everything that has a target."""
    return [Verdict(f"{prefix}{name}", Ratio(**entry["ratio"]), entry["target"])
            for section, prefix in SECTIONS.items()
            for name, entry in document.get(section, {}).items() if entry["target"]]


def limited(document: dict[str, Any]) -> list[tuple[str, float, float]]:
    """`(name, figure, limit)` of everything that `LIMITS` bounds and that was measured."""
    figures: dict[str, float] = {}
    if rotation := document.get("rotation"):
        figures["rotation p99, during / before"] = (rotation["during_p99_ms"]
                                                    / rotation["before_p99_ms"])
    if own := document.get("fail_over", {}).get("elastickv"):
        figures["fail-over s"] = own["median"]
    if cutover := document.get("cutover"):
        figures["cutover hold ms"] = cutover["hold_ms"]
    if transfer := document.get("transfer"):
        figures["leadership transfer ms"] = transfer["took_ms"]
    if compaction := document.get("compaction"):
        figures["compaction pause, with - without ms"] = (compaction["with_ms"]
                                                          - compaction["without_ms"])
    return [(name, figure, LIMITS[name]) for name, figure in figures.items()]


def last_line(found: Sequence[Verdict],
              bounded: Sequence[tuple[str, float, float]] = ()) -> str:
    """Every ratio with its spread and target and every figure with its limit; what falls short is
    marked."""
    if not found:
        return "no ratio that has a target was measured"
    line = "ratios: " + ", ".join(
        f"{verdict.name} {verdict.ratio} (>= {verdict.target:g}"
        f"{'' if verdict.reached else ', SHORT'})" for verdict in found)
    if bounded:
        line += "; limits: " + ", ".join(
            f"{name} {figure:.2f} (<= {limit:g}{'' if figure <= limit else ', OVER'})"
            for name, figure, limit in bounded)
    return line


def perform(bench: Bench, parts: Sequence[str]) -> dict[str, Any]:
    """The named parts of a run; the document. What was measured before a failure is written under
    runs/ and told."""
    try:
        bench.generator()
        for part in parts:
            PARTS[part](bench)
    except BaseException:
        if found := verdicts(bench.document):
            write(bench.document, INCOMPLETE)
            bench.say(f"the run has failed; what it measured before is in {INCOMPLETE}")
            bench.say(last_line(found))
        raise
    return bench.document


def write(document: dict[str, Any], directory: Path) -> None:
    """The figures and their page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "benchmarks.json").write_text(json.dumps(document, indent=2) + "\n")
    report.write(document, directory)


def _main(bench: Bench) -> None:
    etcd = EtcdCluster(bench.work / "etcd")
    ours = ElasticKVCluster(bench.work / "elastickv")
    try:
        for cluster in (etcd, ours):
            cluster.start()
            bench.preload(cluster, bench.plan.keys, big=bench.plan.extras)
            cluster.stop()
        bench.side_by_side("plain", etcd, ours)
        if bench.plan.extras:
            bench.rest(etcd, ours)
    finally:
        etcd.remove()
        ours.remove()


def _encryption(bench: Bench) -> None:
    on = ElasticKVCluster(bench.work / "on")
    off = ElasticKVCluster(bench.work / "off", encrypted=False)
    try:
        for cluster in (on, off):
            cluster.start()
            bench.preload(cluster, ENCRYPTION_KEYS, big=False)
            cluster.stop()
        bench.encryption(on, off)
    finally:
        on.remove()
        off.remove()


def _tls(bench: Bench) -> None:
    etcd = EtcdCluster(bench.work / "etcd-tls", tls=True)
    ours = ElasticKVCluster(bench.work / "elastickv-tls", tls=True)
    try:
        for cluster in (etcd, ours):
            cluster.start()
            bench.preload(cluster, bench.plan.keys, big=True)
            cluster.stop()
        bench.side_by_side("tls", etcd, ours)
    finally:
        etcd.remove()
        ours.remove()


PARTS: dict[str, Callable[[Bench], None]] = {
    "main": _main, "encryption": _encryption, "tls": _tls, "sizes": Bench.sizes}


def with_part(published: dict[str, Any], found: dict[str, Any], part: str) -> dict[str, Any]:
    """A published document with one part from another run."""
    shared = ("environment", "plan", "generator")
    return {**published, **{name: value for name, value in found.items() if name not in shared},
            "apart": {**published.get("apart", {}), part: found["environment"]}}


def output_of(*, quick: bool, front: str) -> Path:
    """Where a run writes: what is quick, or over another front than the default, is not
    published."""
    return ROOT / ("runs/bench" if quick or front != ElasticKVCluster.front else "docs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="the main points, under six minutes")
    parser.add_argument("--part", choices=[part for part in PARTS if part != "main"],
                        help="measure one part of the published run again")
    parser.add_argument("--front", choices=("grpc", "h2"), default="h2",
                        help="the gRPC front of elastickv: grpc.aio or our own HTTP/2 (default)")
    parser.add_argument("--directory", type=Path, default=None,
                        help="where servers keep their data (default: a temporary directory)")
    arguments = parser.parse_args()
    if arguments.part and arguments.quick:
        parser.error("--part measures a part of the whole run, not of a quick one")
    if arguments.part and arguments.front != ElasticKVCluster.front:
        parser.error("--part measures a part of the published run, which is over the default front")
    output = output_of(quick=arguments.quick, front=arguments.front)
    ElasticKVCluster.front = arguments.front
    plan = QUICK if arguments.quick else FULL
    parts = [arguments.part] if arguments.part else plan.parts
    page = output / "benchmarks.json"
    if arguments.part and not page.exists():
        parser.error(f"there is no {page} to put the part into; run the whole benchmark first")
    try:
        require_programs(parts)
        require_disk(arguments.directory or Path(tempfile.gettempdir()))
    except ValueError as error:
        parser.error(str(error))
    published = json.loads(page.read_text()) if arguments.part else {}
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's is not to end
            signal.signal(number, end_once)
    work = Path(tempfile.mkdtemp(prefix="elastickv-bench-", dir=arguments.directory))
    memory = Path(tempfile.mkdtemp(prefix="elastickv-bench-", dir="/dev/shm"))
    try:
        bench = Bench(plan, work, memory, lambda line: print(line, file=sys.stderr, flush=True))
        document = perform(bench, parts)
    finally:
        ignore_signals()
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
    write(with_part(published, document, arguments.part) if arguments.part else document, output)
    found, bounded = verdicts(document), limited(document)
    print(f"wrote {output / 'benchmarks.md'}", file=sys.stderr)
    print(last_line(found, bounded))
    reached = all(verdict.reached for verdict in found)
    return 0 if reached and all(figure <= limit for _, figure, limit in bounded) else 1


if __name__ == "__main__":
    sys.exit(main())
