"""Calls that fail at the gRPC level are found, although their HTTP status is 200."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import points
import pytest
from h2load import LoadFailed, LoadResult
from points import (
    SCAN_KEYS,
    body_of,
    check_counts,
    check_sizes,
    generator_limit,
    measure,
    measure_calls,
    point,
)
from processes import ClusterFailed, ServerProcess, wait_until
from systems import ElasticKVCluster, EtcdCluster, calls_by_status

from elastickv.metrics import Metrics

MIX = [1048] * 9 + [21]
FAILED = "failed at the gRPC level"


def result(calls: int, received_bytes: int, generator_cpu_s: float = 0.0) -> LoadResult:
    return LoadResult(rate=1.0, succeeded=calls, data_bytes=received_bytes, p50_ms=1.0, p99_ms=1.0,
                      generator_cpu_s=generator_cpu_s, server_cpu_s=0.0)


def mix(reads: int, writes: int) -> int:
    return reads * 1048 + writes * 21


@pytest.mark.parametrize(("name", "sizes", "after", "calls", "received_bytes", "shown"), [
    pytest.param("put-16x8", [21], [21], 1000, 21_000, True, id="every response"),
    pytest.param("put-16x8", [21], [21], 1000, 20_979, None, id="one call without a response"),
    pytest.param("put-16x8", [21], [21], 1000, 0, None, id="no response at all"),
    pytest.param("put-16x8", [20], [21], 50_000, 1_020_000, False, id="the index grew"),
    pytest.param("put-16x8", [20], [21], 1000, 19_980, None, id="failures before the index grew"),
    pytest.param("get-16x8", [1092], [1092], 100_000, 99_600 * 1092, None,
                 id="400 reads of 100,000 failed"),
    pytest.param("range-16x1", [1_048_005], [1_048_005], 97, 97 * 1_048_005 + 900_596, True,
                 id="a scan that was under way"),
    pytest.param("mixed-16x8", MIX, MIX, 10_000, mix(9_000, 1_000), True, id="an even mix"),
    pytest.param("mixed-16x8", MIX, MIX, 10_000, mix(9_069, 931), True,
                 id="a mix whose last round is not complete"),
    pytest.param("mixed-16x8", MIX, MIX, 10_000, mix(9_000, 0), False, id="all writes failed"),
    pytest.param("mixed-16x8", MIX, MIX, 10_000, mix(8_999, 1_000), False, id="one read failed"),
    pytest.param("mixed-16x8", MIX, MIX, 10_000, mix(8_700, 1_300), None, id="too few reads"),
    pytest.param("mixed-16x8", MIX, MIX, 10_000, mix(8_700, 1_000), None, id="300 reads failed"),
    pytest.param("mixed-16x8", [1048] * 9 + [20], MIX, 10_000, mix(9_000, 1_000) - 300, False,
                 id="a mix while the index grew"),
])
def test_a_call_without_a_response_has_failed(
        name: str, sizes: list[int], after: list[int], calls: int, received_bytes: int,
        shown: bool | None) -> None:
    checked = result(calls, received_bytes)
    if shown is None:
        with pytest.raises(LoadFailed, match=FAILED):
            check_sizes("elastickv", point(name), checked, sizes, after)
    else:
        assert check_sizes("elastickv", point(name), checked, sizes, after) is shown


def test_no_mix_with_writes_that_failed_is_taken_for_a_whole_one() -> None:
    assert not any(check_sizes("elastickv", point("mixed-16x8"),
                               result(10_000, mix(9_000, 1_000 - failed)), MIX, MIX)
                   for failed in range(1, 1001))


class Written(ElasticKVCluster):
    """A cluster that is not there: a put is answered with as many bytes as is said. Before a run
    and after it, it has counted so many calls."""

    def __init__(self, sizes: list[int], counts: Sequence[Mapping[str, int] | None] = ()) -> None:
        super().__init__(Path("nowhere"), encrypted=False)
        self.sizes = sizes
        self.counts = list(counts)

    def leader(self) -> int:
        return 0

    def ended_calls(self, node: int) -> Mapping[str, int] | None:
        return self.counts.pop(0) if self.counts else None

    def call(self, node: int, path: str, message: bytes, *, timeout_s: float = 1.0) -> bytes:
        # The frame has 5 bytes, the fields 4; the rest is an unknown field with 3 bytes of its own.
        padding = self.sizes.pop(0) - 5 - 4
        return self._pb.RawPutResponse(commit_index=1, success=True).SerializeToString() \
            + b"\x82\x02" + bytes([padding - 3]) + bytes(padding - 3)


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An item for each run: of 1,000 calls, in whose answers there are 25 bytes each."""
    monkeypatch.chdir(tmp_path)
    runs: list[bool] = []

    def run(*arguments: object, **options: object) -> tuple[LoadResult, list[tuple[int, float]]]:
        runs.append(True)
        return result(1000, 1000 * 25), []

    monkeypatch.setattr(points, "run", run)
    return runs


@pytest.mark.parametrize(("sizes", "runs"), [
    pytest.param([21, 21], 1, id="responses keep their size"),
    pytest.param([20, 21, 21, 21], 2, id="the index grows in the first run"),
    pytest.param([20, 21, 22, 23, 24, 25], None, id="it never ends"),
])
def test_a_point_is_measured_again_until_all_calls_are_shown_to_have_succeeded(
        tmp_path: Path, done: list[bool], sizes: list[int], runs: int | None) -> None:
    cluster = Written(sizes)
    if runs is None:
        with pytest.raises(LoadFailed, match="in none of 3 runs"):
            measure(cluster, point("put-16x8"), 1000, tmp_path, duration_s=1.0, warm_up_s=0.0)
    else:
        measure(cluster, point("put-16x8"), 1000, tmp_path, duration_s=1.0, warm_up_s=0.0)
        assert len(done) == runs
    assert not sizes


@pytest.mark.usefixtures("done")
def test_a_point_during_which_a_member_ended_is_none(tmp_path: Path) -> None:
    cluster = Written([21, 21])
    cluster.processes = [ServerProcess(["sleep", "60"], tmp_path / "log"),
                         ServerProcess(["true"], tmp_path / "log")]
    try:
        wait_until(lambda: cluster.processes[1].cpu_s() >= 0 and "Z" in Path(
            f"/proc/{cluster.processes[1].pid}/stat").read_text(), [], timeout_s=10, what="an end")
        with pytest.raises(ClusterFailed, match="ended with exit code 0"):
            measure(cluster, point("put-16x8"), 1000, tmp_path, duration_s=1.0, warm_up_s=0.0)
    finally:
        for process in cluster.processes:
            process.kill()


@pytest.mark.parametrize(("leaders", "runs"), [
    pytest.param([0, 0, 0], 1, id="one leader"),
    pytest.param([0, 0, 1, 1, 1, 1], 2, id="the leader changes in the first run"),
])
def test_a_point_is_measured_again_when_the_leader_changes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: list[bool], leaders: list[int],
        runs: int) -> None:
    cluster = Written([21] * 2 * runs)
    # Asked before the run, in it, for the sizes before and after it, and after it.
    asked = iter([leader for number, leader in enumerate(leaders)
                  for _ in range(3 if number % 3 == 1 else 1)])
    monkeypatch.setattr(cluster, "leader", lambda: next(asked))
    measure(cluster, point("put-16x8"), 1000, tmp_path, duration_s=1.0, warm_up_s=0.0)
    assert len(done) == runs


@pytest.mark.parametrize(("name", "generator_cpu_s", "is_limit"), [
    ("put-16x8", 2.0 * 4 * 0.7, False), ("put-16x8", 2.0 * 4 * 0.9, True),
    ("put-1x128", 2.0 * 0.7, False), ("put-1x128", 2.0 * 0.9, True)])
def test_a_generator_that_is_the_limit_is_not_taken_for_the_server(
        name: str, generator_cpu_s: float, is_limit: bool) -> None:
    found = generator_limit("etcd", point(name), result(1000, 0, generator_cpu_s), 2.0)
    assert ("generator computed for 90% of the time" in found) == is_limit


def test_a_cluster_is_at_rest_once_every_member_answers(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cluster, asked = Written([]), []

    def answers(node: int) -> bool:
        asked.append(node)
        return len(asked) > 4

    monkeypatch.setattr(cluster, "answers", answers)
    cluster.settle()
    assert asked == [0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("system", [EtcdCluster, ElasticKVCluster])
def test_a_scan_asks_for_a_range_that_holds_what_it_is_to_give(
        tmp_path: Path, system: type[EtcdCluster | ElasticKVCluster]) -> None:
    keys = 10_000
    cluster = system(tmp_path)
    body = body_of(cluster, point("range-16x1"), keys)
    for step in range(100):
        start, end = re.findall(rb"key-(\d{12})", body.at_step(step))
        assert int(end) - int(start) == SCAN_KEYS
        assert 0 <= int(start) < int(end) <= keys


@pytest.mark.parametrize(("counts", "sizes", "failure"), [
    pytest.param([], [21, 21], None, id="shown by the sizes"),
    pytest.param([], [20, 21], "not shown", id="the index grows, and nothing is counted"),
    pytest.param([{}, {"OK": 1000}], [20, 21], None, id="the index grows, and all are counted"),
    pytest.param([{}, {"OK": 999, "UNAVAILABLE": 1}], [20, 21], FAILED,
                 id="a failure that the growth would hide"),
])
@pytest.mark.usefixtures("done")
def test_calls_are_only_told_where_all_are_shown_to_have_succeeded(
        tmp_path: Path, counts: list[Mapping[str, int]], sizes: list[int],
        failure: str | None) -> None:
    cluster = Written(sizes, counts)
    if failure is None:
        measure_calls(cluster, point("put-16x8"), 1000, tmp_path, duration_s=1.0, warm_up_s=0.0)
    else:
        with pytest.raises(LoadFailed, match=failure):
            measure_calls(cluster, point("put-16x8"), 1000, tmp_path, duration_s=1.0,
                          warm_up_s=0.0)


@pytest.mark.parametrize(("counts", "succeeded"), [
    pytest.param({"OK": 1000}, True, id="every call"),
    pytest.param({"OK": 1090, "Unknown": 200, "Canceled": 50}, True,
                 id="some were under way at the ends"),
    pytest.param({"OK": 1090, "CANCELLED": 250}, True, id="the same of elastickv"),
    pytest.param({"OK": 1090, "UNKNOWN": 1}, False, id="one of elastickv failed"),
    pytest.param({"OK": 1090, "Unavailable": 1}, False, id="one failed"),
    pytest.param({"OK": 1090, "InvalidArgument": 1}, False, id="one was refused"),
    pytest.param({"OK": 1090, "Unknown": 257}, False, id="more than were under way failed"),
    pytest.param({"OK": 999}, False, id="one was not ended"),
    pytest.param({}, False, id="nothing was counted"),
])
def test_calls_that_the_server_counts(counts: Mapping[str, int], succeeded: bool) -> None:
    before = {"OK": 50, "Unknown": 7, "NotFound": 3}
    after = {status: before.get(status, 0) + counts.get(status, 0) for status in
             {**before, **counts}}
    if succeeded:
        check_counts("etcd", point("put-16x8"), 1000, before, after)
    else:
        with pytest.raises(LoadFailed, match=FAILED):
            check_counts("etcd", point("put-16x8"), 1000, before, after)


def test_counts_of_etcd_are_those_of_its_keys() -> None:
    assert calls_by_status("""\
# TYPE grpc_server_handled_total counter
grpc_server_handled_total{grpc_code="OK",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 2.5284e+04
grpc_server_handled_total{grpc_code="OK",grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 16
grpc_server_handled_total{grpc_code="Unknown",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 168
grpc_server_handled_total{grpc_code="OK",grpc_method="Status",grpc_service="etcdserverpb.Maintenance",grpc_type="unary"} 9
""", EtcdCluster.counted) == {"OK": 25_300, "Unknown": 168}  # noqa: E501


def test_counts_of_elastickv_are_those_of_its_keys() -> None:
    served = Metrics()
    for method, status, count in (("RawPut", "OK", 1_000_000), ("RawGet", "OK", 16),
                                  ("RawPut", "CANCELLED", 128)):
        served.count("grpc_calls_total", f"RawKV/{method}", status, amount=count)
    served.count("grpc_calls_total", "RaftAdmin/Status", "OK")
    served.observe("grpc_call_seconds", 0.1, "RawKV/RawPut")
    assert calls_by_status(served.render().decode(), ElasticKVCluster.counted) == {
        "OK": 1_000_016, "CANCELLED": 128}
