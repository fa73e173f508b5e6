import json
import re
from pathlib import Path

import pytest
from ratios import Ratio
from report import markdown_table, median_of, render, write
from run import LIMITS, Verdict, last_line, limited, verdicts, with_part
from tls import proxy_configuration

RATIO = Ratio(0.7, 0.65, 0.75, 3)


def entry(target: float = 0.6) -> dict:
    turn = {"rate": 1000.0, "p50_ms": 1.0, "p99_ms": 5.0, "server_us": 100.0, "generator_us": 4.0}
    return {"title": "put", "target": target, "etcd": [turn],
            "elastickv": [{**turn, "rate": 700.0}],
            "ratio": RATIO._asdict()}


def document() -> dict:
    encryption = entry(0.97)
    encryption["off"] = encryption.pop("etcd")
    encryption["on"] = encryption.pop("elastickv")
    return {
        "environment": {"cores": 2, "processor": "P", "kernel": "6", "python": "3.11",
                        "etcd": "3.4", "h2load": "1.52", "date": "2026-01-01"},
        "plan": {"keys": 1000, "turns": 1, "duration_s": 4.0},
        "generator": {"rate": 170000.0, "generator_us": 5.0},
        "plain": {"put-16x8": entry(), "put-16x64": entry(0.0)},
        "plain_aio": {"put-16x8": entry(0.6), "get-16x8": entry(0.0)},
        "tls": {"put-16x8": entry(), "get-16x8": entry(0.0)},
        "tls_aio": {"put-16x8": entry()},
        "encryption": {"put-16x8": encryption}, "encryption_aio": {"get-16x8": encryption},
        "rotation": {"rotations": 20, "before_p99_ms": 10.0, "during_p99_ms": 12.0,
                     "before_p50_ms": 5.0, "during_p50_ms": 5.0, "slowest_rotation_ms": 40.0,
                     "puts": 123_456},
        "cutover": {"hold_ms": 12.0, "longest_pause_ms": 30.0, "took_ms": 20.0, "puts": 1000},
        "transfer": {"transfers": 10, "took_ms": 80.0, "slowest_ms": 200.0, "pause_ms": 60.0,
                     "longest_pause_ms": 150.0, "puts": 2000},
        "compaction": {"turns": 3, "without_ms": 40.0, "with_ms": 99.0, "compacted_to": 7,
                       "puts": 30_000},
        "fail_over": {side: {"median": 0.8, "minimum": 0.6, "maximum": 2.0, "count": 20}
                      for side in ("etcd", "elastickv")},
        "footprint": {"etcd": {"keys": 1000, "start_s": 1.0, "start_after_kill_s": 2.0,
                               "rss_bytes": 1 << 30, "anonymous_bytes": 1 << 29,
                               "disk_bytes": 1 << 31}},
        "sizes": {"10000": {"put-16x8": {"rate": 10.0}, "get-16x8": {"rate": 20.0}}},
    }


def test_the_page_tells_what_a_turn_begins_with() -> None:
    measured = document()
    sentence = "began with a copy of the data that was written first"
    assert sentence not in render(measured)
    measured["plan"]["fresh_turns"] = True
    assert sentence in render(measured)


def test_what_is_not_measured_any_more_is_not_shown() -> None:
    earlier = document()
    earlier["plain"]["put-of-yore"] = {**entry(), "title": "put of yore"}
    assert "of yore" not in render(earlier)
    assert "of yore" in json.dumps(earlier)


def test_the_page_has_every_section() -> None:
    page = render(document())
    for title in ("Side by side", "Encryption on against off", "Rotation under load",
                  "Operations under load", "Side by side over grpc.aio",
                  "Side by side over mutual TLS", "Side by side over mutual TLS and grpc.aio",
                  "Fail-over", "Start-up, memory and disk", "Throughput by number of keys"):
        assert f"\n## {title}\n" in page
    for plot in ("plain", "plain-latency", "tls", "tls-latency"):
        assert f"](benchmarks/{plot}.png)" in page
    assert "| put | 1,000 | 700 | **0.70** | 0.65 to 0.75 | 0.6 | 5.0 | 5.0 | 100 | 100 |" in page
    assert "170,000 calls/s" in page
    assert page.count("The same clusters, served by grpc.aio:\n\n| load | off calls/s") == 1


def test_the_page_names_the_file_system() -> None:
    measured = document()
    assert "data on" not in render(measured)
    measured["environment"]["file_system"] = "ext2/ext3"
    assert "h2load 1.52, data on ext2/ext3. 1,000 keys" in render(measured)


def test_the_page_says_that_puts_succeeded_where_the_node_counted_them() -> None:
    measured = document()
    page = render(measured)
    assert "under 123,456 puts at 128 outstanding; by the node's own count all succeeded" in page
    assert "Under 33,000 puts at 128 outstanding; by the node's own count all succeeded" in page
    for name in ("rotation", "transfer"):
        del measured[name]["puts"]
    page = render(measured)
    assert "under puts at 128 outstanding; no failure was seen" in page
    assert "Under puts at 128 outstanding; no failure was seen" in page
    assert "succeeded" not in page.partition("## Rotation")[2].partition("## Fail-over")[0]


def test_the_page_leaves_out_what_was_not_measured() -> None:
    page = render({key: value for key, value in document().items()
                   if key in ("environment", "plan", "plain")})
    assert "Fail-over" not in page
    assert "mutual TLS" not in page


def test_a_part_that_was_measured_by_itself_says_so() -> None:
    published = document()
    found = {"environment": {**published["environment"], "date": "2026-02-02"},
             "plan": {"keys": 7}, "generator": {"rate": 1.0},
             "encryption": {"get-16x8": published["encryption"]["put-16x8"]}}
    merged = with_part(published, found, "encryption")
    assert merged["encryption"] == found["encryption"]
    assert {**merged, "encryption": 0, "apart": 0} == {**published, "encryption": 0, "apart": 0}
    page = render(merged)
    assert "Measured by itself: 2026-02-02: 2 cores (P)" in page
    assert page.count("Measured by itself") == 1
    assert "Measured by itself" not in render(published)
    tls = {name: published[name] for name in ("environment", "tls", "tls_aio")}
    assert render(with_part(published, tls, "tls")).count("Measured by itself") == 2


def test_page_and_plots_are_written(tmp_path: Path) -> None:
    write(document(), tmp_path)
    assert (tmp_path / "benchmarks.md").read_text().startswith("# Benchmarks")
    assert plots_of(tmp_path) == ["plain.png", "plain-latency.png", "tls.png", "tls-latency.png"]


def plots_of(directory: Path) -> list[str]:
    """The names of the plots that the page in `directory` shows, all of which are there."""
    names = re.findall(r"\]\(benchmarks/([^)]*)\)", (directory / "benchmarks.md").read_text())
    for name in names:
        assert (directory / "benchmarks" / name).read_bytes().startswith(b"\x89PNG")
    return names


def test_table() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |\n"


@pytest.mark.parametrize(("values", "median"), [([3.0], 3.0), ([4.0, 2.0], 3.0),
                                                ([5.0, 1.0, 3.0], 3.0)])
def test_median_of_turns(values: list[float], median: float) -> None:
    assert median_of([{"rate": value} for value in values], "rate") == median


def test_only_points_with_a_target_are_judged() -> None:
    found = verdicts(document())
    assert found == [Verdict("put-16x8", RATIO, 0.6), Verdict("grpc.aio put-16x8", RATIO, 0.6),
                     Verdict("TLS put-16x8", RATIO, 0.6),
                     Verdict("TLS grpc.aio put-16x8", RATIO, 0.6),
                     Verdict("encryption on/off put-16x8", RATIO, 0.97),
                     Verdict("encryption on/off grpc.aio get-16x8", RATIO, 0.97)]
    assert [verdict.reached for verdict in found] == [True, True, True, True, False, False]


def test_every_limit_is_judged() -> None:
    found = limited(document())
    assert found == [("rotation p99, during / before", 1.2, 2.0), ("fail-over s", 0.8, 1.0),
                     ("cutover hold ms", 12.0, 100.0), ("leadership transfer ms", 80.0, 300.0),
                     ("compaction pause, with - without ms", 59.0, 50.0)]
    assert {name for name, _, _ in found} == set(LIMITS)
    assert limited({}) == []


def test_the_last_line_names_each_ratio_and_marks_what_falls_short() -> None:
    reached, short = Verdict("a", RATIO, 0.6), Verdict("b", Ratio(0.9, 0.8, 1.25, 2), 0.97)
    assert last_line([reached, short]) == \
        "ratios: a 0.70 [0.65 to 0.75] (>= 0.6), b 0.90 [0.80 to 1.25] (>= 0.97, SHORT)"
    assert last_line([]) == "no ratio that has a target was measured"
    assert last_line([reached], [("x", 1.0, 2.0), ("y", 3.0, 2.0)]) == \
        "ratios: a 0.70 [0.65 to 0.75] (>= 0.6); limits: x 1.00 (<= 2), y 3.00 (<= 2, OVER)"


def test_the_proxy_verifies_the_server_and_speaks_http2() -> None:
    text = proxy_configuration([(1, 2)], pair="/p.pem", ca="/ca.crt")
    assert "  bind 127.0.0.1:1\n" in text
    assert ("  server member 127.0.0.1:2 ssl crt /p.pem ca-file /ca.crt verify required alpn h2\n"
            in text)


def test_published_page_is_that_of_the_published_figures() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    document = json.loads((docs / "benchmarks.json").read_text())
    assert (docs / "benchmarks.md").read_text() == render(document)
    assert plots_of(docs)
