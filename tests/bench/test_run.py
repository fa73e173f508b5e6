"""What a run of the benchmark needs, and what it leaves behind when it fails."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import points
import pytest
import run
from extras import Spread
from h2load import LoadFailed
from run import QUICK, Bench, file_system, main, require_disk
from systems import MEMBERS, EtcdCluster

MEMORY = Path("/dev/shm")
ENVIRONMENT = {"cores": 2, "processor": "P", "kernel": "6", "python": "3.11", "etcd": "3.4",
               "h2load": "1.52", "date": "2026-01-01"}
needs_memory = pytest.mark.skipif(not MEMORY.is_dir() or file_system(MEMORY) != "tmpfs",
                                  reason="/dev/shm is no tmpfs")


class Side:
    """Stands for a cluster: which of its servers run."""

    def __init__(self, name: str, aio: Side | None = None) -> None:
        self.name = name
        self.runs = False
        self.started = 0
        self._aio = aio
        self.data = ["first"]
        self._kept: list[str] = []

    def keep(self) -> None:
        self._kept, self.data = self.data, []

    def clear(self) -> None:
        assert not self.runs
        self.data = []

    def restore(self) -> None:
        self.data = list(self._kept)

    def start(self) -> None:
        self.runs = True
        self.started += 1

    def settle(self) -> None:
        return

    def stop(self) -> None:
        self.runs = False

    def over_aio(self) -> Side | None:
        return self._aio

    def with_metrics(self) -> Side:
        return Side(f"{self.name} with metrics")


@pytest.mark.parametrize("failing", ["etcd", "elastickv", "grpc.aio"])
def test_a_turn_that_fails_leaves_no_servers(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def measure(cluster: Side, *arguments: object, **options: object) -> points.Measured:
        if cluster.name == failing:
            raise LoadFailed("calls failed")
        return points.Measured(1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "environment", lambda work: ENVIRONMENT)
    aio = Side("grpc.aio")
    sides = [Side("etcd"), Side("elastickv", aio), aio]
    bench = Bench(QUICK, tmp_path, tmp_path, lambda line: None)
    with pytest.raises(LoadFailed):
        bench.side_by_side("plain", *sides[:2])  # type: ignore[arg-type]
    assert not any(side.runs for side in sides)
    assert next(side for side in sides if side.name == failing).started == 1


def test_operations_under_load_are_measured_where_calls_are_counted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Side] = []

    def effect(cluster: Side, *arguments: object, **options: object) -> Spread:
        assert cluster.runs
        assert not ours.runs
        measured.append(cluster)
        if len(measured) == 2:
            raise LoadFailed("a put failed")
        return Spread(1.0, 1.0, 1.0, 1)

    for name in ("rotation_under_load", "transfers_under_load"):
        monkeypatch.setattr(run.disturbances, name, effect)
    monkeypatch.setattr(run, "environment", lambda work: ENVIRONMENT)
    monkeypatch.setattr(run.extras, "footprint", lambda *arguments: Spread(1.0, 1.0, 1.0, 1))
    monkeypatch.setattr(run.extras, "fail_over_s",
                        lambda *arguments, **options: Spread(1.0, 1.0, 1.0, 1))
    ours = Side("elastickv")
    bench = Bench(QUICK, tmp_path, tmp_path, lambda line: None)
    with pytest.raises(LoadFailed):
        bench.rest(Side("etcd"), ours)  # type: ignore[arg-type]
    assert [each.name for each in measured] == ["elastickv with metrics"] * 2
    assert not any(each.runs for each in measured)


def test_what_a_failed_run_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            ) -> None:
    def fails(bench: Bench) -> None:
        raise LoadFailed("a server died")

    def measures(bench: Bench) -> None:
        turns = [{"rate": 2.0, "p50_ms": 1.0, "p99_ms": 1.0, "server_us": 1.0, "generator_us": 1.0}]
        bench.add({"plain": {"put-1": {"title": "put", "target": 1.0, "etcd": turns,
                                       "elastickv": turns}}})

    monkeypatch.setattr(run, "PARTS", {"main": measures, "tls": fails})
    monkeypatch.setattr(run, "INCOMPLETE", tmp_path / "incomplete")
    monkeypatch.setattr(Bench, "generator", lambda bench: None)
    monkeypatch.setattr(run, "environment", lambda work: ENVIRONMENT)
    said: list[str] = []
    bench = Bench(QUICK, tmp_path, tmp_path, said.append)
    with pytest.raises(LoadFailed):
        run.perform(bench, ["main", "tls"])
    assert said[0] == "ratio, put-1: 1.00 [1.00 to 1.00]"
    assert said[-1] == "ratios: put-1 1.00 [1.00 to 1.00] (>= 1)"
    assert "| put | 2 | 2 | **1.00** |" in (tmp_path / "incomplete/benchmarks.md").read_text()


def test_every_ratio_is_told_with_its_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             ) -> None:
    monkeypatch.setattr(run, "environment", lambda work: ENVIRONMENT)
    rates = iter(range(1, 100))
    monkeypatch.setattr(run, "measure", lambda *arguments, **options: points.Measured(
        float(next(rates)), 1.0, 1.0, 1.0, 1.0))
    said: list[str] = []
    plan = dataclasses.replace(QUICK, points=[points.point("put-1"), points.point("put-16x1")],
                               aio_loads=["put-1"])
    bench = Bench(plan, tmp_path, tmp_path, said.append)
    bench.side_by_side("tls", Side("etcd"), Side("elastickv", Side("grpc.aio")))  # type: ignore[arg-type]
    # Rates 1 and 2 of etcd, then 3 and 4, then 5 of grpc.aio, and so on from 6.
    assert said[-3:] == ["ratio, TLS put-1: 2.17 [1.33 to 3.00]",
                         "ratio, TLS put-16x1: 1.64 [1.29 to 2.00]",
                         "ratio, TLS grpc.aio put-1: 1.25 [0.83 to 1.67]"]


def test_a_turn_begins_with_the_first_data_and_nobody_elses(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aio = Side("grpc.aio")
    etcd, ours = Side("etcd"), Side("elastickv", aio)
    found: list[tuple[str, list[str], list[str]]] = []

    def measure(cluster: Side, *arguments: object, **options: object) -> points.Measured:
        found.append((cluster.name, list(etcd.data), list(ours.data)))
        (ours if cluster is aio else cluster).data.append(f"of {cluster.name}")
        return points.Measured(1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "environment", lambda work: ENVIRONMENT)
    plan = dataclasses.replace(QUICK, points=[points.point("put-1")], aio_loads=["put-1"], turns=2,
                               fresh_turns=True)
    Bench(plan, tmp_path, tmp_path, lambda line: None).side_by_side(
        "plain", etcd, ours)  # type: ignore[arg-type]
    assert found == 2 * [("etcd", ["first"], []), ("elastickv", [], ["first"]),
                         ("grpc.aio", [], ["first", "of elastickv"])]


def test_turns_of_a_whole_run_begin_afresh_and_those_of_a_quick_one_save_the_time() -> None:
    assert (run.FULL.fresh_turns, QUICK.fresh_turns) == (True, False)


def test_a_quick_run_measures_over_grpc_aio_just_what_has_a_target_there() -> None:
    assert set(QUICK.aio_loads) == {"put-16x8"} < set(run.FULL.aio_loads)


def test_kept_data_can_be_put_back_again_and_again(tmp_path: Path) -> None:
    cluster = EtcdCluster(tmp_path / "etcd")
    for member in cluster.data:
        (member / "wal").mkdir(parents=True)
        (member / "wal" / "0").write_text(member.name)
    cluster.keep()
    assert not any(member.exists() for member in cluster.data)
    for _ in range(2):
        cluster.restore()
        assert [(member / "wal" / "0").read_text() for member in cluster.data] == list(MEMBERS)
        (cluster.data[0] / "wal" / "0").write_text("written since")
        (cluster.data[1] / "wal" / "1").write_text("written since")
    cluster.restore()
    assert not (cluster.data[1] / "wal" / "1").exists()
    cluster.clear()
    assert not any(member.exists() for member in cluster.data)
    cluster.remove()
    assert not cluster.directory.exists()


@needs_memory
def test_a_file_system_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="tmpfs, where fsync costs nothing: set TMPDIR"):
        require_disk(MEMORY)


@needs_memory
@pytest.mark.parametrize("arguments", [["--directory", str(MEMORY)], []],
                         ids=["named", "by default"])
def test_a_run_in_memory_is_refused_in_a_line(
        arguments: list[str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run.tempfile, "tempdir", str(MEMORY))
    monkeypatch.setattr(run.sys, "argv", ["run.py", "--quick", *arguments])
    made: list[object] = []
    monkeypatch.setattr(run.tempfile, "mkdtemp", lambda **options: made.append(options))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "/dev/shm is on tmpfs" in capsys.readouterr().err
    assert not made


@pytest.mark.parametrize(("parts", "is_enough"), [
    (["main", "encryption"], True), (["main", "tls"], False), (["tls"], False)])
def test_the_programs_that_a_run_needs_are_asked_for_first(
        parts: list[str], is_enough: bool, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("etcd", "h2load", "nghttpd"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if is_enough:
        run.require_programs(parts)
        (tmp_path / "etcd").unlink()
    with pytest.raises(ValueError, match=f"{'etcd' if is_enough else 'haproxy'} not in PATH"):
        run.require_programs(parts)


@pytest.mark.parametrize("first", run.ENDING_SIGNALS)
def test_a_second_signal_does_not_hinder_that_everything_is_taken_away(
        first: signal.Signals) -> None:
    before = {number: signal.signal(number, run.end_once) for number in run.ENDING_SIGNALS}
    try:
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(first)
        for number in run.ENDING_SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 128 + first


@needs_memory
def test_a_signal_at_the_end_does_not_hinder_that_everything_is_taken_away(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LoadFailed("calls failed")

    def remove(directory: Path, **options: bool) -> None:
        signal.raise_signal(signal.SIGTERM)
        rmtree(directory, **options)

    rmtree = shutil.rmtree
    monkeypatch.setattr(run, "require_programs", lambda parts: None)
    monkeypatch.setattr(run, "require_disk", lambda directory: None)
    monkeypatch.setattr(run, "environment", lambda work: ENVIRONMENT)
    monkeypatch.setattr(run, "perform", fail)
    monkeypatch.setattr(shutil, "rmtree", remove)
    monkeypatch.setattr("sys.argv", ["run.py", "--quick", "--directory", str(tmp_path)])
    before = {number: signal.getsignal(number) for number in run.ENDING_SIGNALS}
    try:
        with pytest.raises(LoadFailed):
            main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "reason"), [
    pytest.param(["--quick"], "not of a quick one", id="of a quick run"),
    pytest.param(["--front", "grpc"], "over the default front", id="over grpc.aio"),
])
def test_a_part_that_is_not_of_the_published_run_is_refused(
        arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run.tempfile, "tempdir", str(MEMORY))
    monkeypatch.setattr(run.sys, "argv", ["run.py", "--part", "tls", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("quick", "front", "directory"), [
    (False, "h2", "docs"), (True, "h2", "runs/bench"), (False, "grpc", "runs/bench"),
    (True, "grpc", "runs/bench")])
def test_only_a_whole_run_over_the_default_front_is_published(
        quick: bool, front: str, directory: str) -> None:
    assert run.output_of(quick=quick, front=front) == run.ROOT / directory


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch()],
                         ids=["nothing", "a file"])
def test_what_is_no_directory_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(ValueError, match="is no directory"):
        require_disk(tmp_path / "x")


def test_a_disk_is_taken() -> None:
    root = Path(__file__).parent
    if file_system(root) in run.IN_MEMORY:
        pytest.skip("this checkout is in memory")
    require_disk(root)
