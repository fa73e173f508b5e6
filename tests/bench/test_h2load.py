import pytest
from h2load import Load, LoadFailed, Summary, combine, command, parse_log, parse_summary

# What h2load 1.52 prints for a run with -D.
OUTPUT = """\
starting benchmark...
Main benchmark duration is over for thread #0. Stopping all clients.

finished in 6.00s, 7456.80 req/s, 510.65KB/s
requests: 37284 total, 37412 started, 37284 done, 37284 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 37284 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 2.49MB (2614536) total, 73.01KB (74760) headers (space savings 94.7%), 1.1MB (1218998) data
                     min         max         mean         sd        +/- sd
time for request:     1.89ms     55.48ms     16.80ms      7.35ms    76.42%
"""


def test_summary_reads_rate_counts_and_bytes() -> None:
    assert parse_summary(OUTPUT) == Summary(rate=7456.8, succeeded=37284, failed=0,
                                            data_bytes=1218998)


@pytest.mark.parametrize(("old", "new", "failed"), [
    ("0 failed", "3 failed", 3),
    ("0 errored", "4 errored", 4),
    ("0 timeout", "5 timeout", 5),
    ("0 4xx", "6 4xx", 6),
    ("0 5xx", "7 5xx", 7),
])
def test_summary_counts_every_kind_of_failure(old: str, new: str, failed: int) -> None:
    assert parse_summary(OUTPUT.replace(old, new, 1)).failed == failed


def test_summary_of_something_else_is_refused() -> None:
    with pytest.raises(LoadFailed, match="no such host"):
        parse_summary("h2load: no such host")


def test_log_gives_start_and_latency_of_calls_that_succeeded() -> None:
    text = "1700000000000001\t200\t1500\n1700000000000002\t-1\t9\n1700000000000003\t200\t250\n"
    assert parse_log(text) == [(1700000000000001, 1.5), (1700000000000003, 0.25)]


def test_instances_add_up() -> None:
    summaries = [Summary(100.0, 400, 0, 8000), Summary(50.0, 200, 0, 4600)]
    result = combine(summaries, [3.0, 1.0, 2.0, 4.0], generator_cpu_s=0.5, server_cpu_s=2.0)
    assert (result.rate, result.succeeded, result.data_bytes) == (150.0, 600, 12_600)
    assert (result.p50_ms, result.p99_ms) == (2.0, 4.0)


@pytest.mark.parametrize("summaries", [
    [Summary(100.0, 400, 0, 8000), Summary(50.0, 199, 1, 4000)],
    [Summary(0.0, 0, 0, 0)],
])
def test_a_failed_or_an_empty_run_is_no_result(summaries: list[Summary]) -> None:
    with pytest.raises(LoadFailed):
        combine(summaries, [1.0], generator_cpu_s=0.0, server_cpu_s=0.0)


def test_command_names_connections_streams_and_every_path(tmp_path) -> None:
    load = Load("http://127.0.0.1:1", ["/A/Get", "/A/Put"], tmp_path / "body", 4, 8)
    words = command(load, duration_s=2.5, log=tmp_path / "log")
    assert words[:6] == ["h2load", "-t1", "-c4", "-m8", "-D2500ms", "-d"]
    assert words[-2:] == ["http://127.0.0.1:1/A/Get", "http://127.0.0.1:1/A/Put"]
    assert "content-type: application/grpc" in words
