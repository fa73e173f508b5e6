"""elastickv.metrics: one catalogue, pushed and sourced values, no library where none is served."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastickv import metrics
from elastickv.metrics import CATALOGUE, Kind, Metrics, NullRecorder, Sample

UNITS = ("_total", "_seconds", "_bytes", "_index", "_term", "_id", "_pending", "_is_leader",
         "_writes", "_values", "_writes_left", "_epoch")


def values(rendered: bytes) -> dict[str, float]:
    families = text_string_to_metric_families(rendered.decode())
    return {f"{s.name}{sorted(s.labels.values())}": s.value for f in families for s in f.samples}


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_catalogue(metric: metrics.Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert metric.name.endswith(UNITS) or metric.name == "raft_is_leader"
    assert metric.name.endswith("_total") is (metric.kind is Kind.COUNTER)
    assert bool(metric.buckets) is (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.help.endswith(".")


def test_names_are_unique() -> None:
    assert len(metrics.BY_NAME) == len(CATALOGUE)


def test_pushed_values_are_rendered() -> None:
    registry = Metrics()
    registry.count("raft_proposals_total", "applied")
    registry.count("raft_proposals_total", "applied", amount=2)
    registry.count("raft_proposals_total", "unknown")
    registry.observe("raft_fsync_seconds", 0.003)
    found = values(registry.render())
    assert found["elastickv_raft_proposals_total['applied']"] == 3
    assert found["elastickv_raft_proposals_total['unknown']"] == 1
    assert found["elastickv_raft_fsync_seconds_count[]"] == 1
    assert found["elastickv_raft_fsync_seconds_bucket['0.002']"] == 0
    assert found["elastickv_raft_fsync_seconds_bucket['0.005']"] == 1


def test_sources_are_read_at_every_scrape() -> None:
    registry = Metrics()
    terms = iter([4, 5])
    registry.add_source(lambda: [Sample("raft_term", next(terms))])
    registry.add_source(lambda: [Sample("encryption_active_dek_id", 1, ("storage",)),
                                 Sample("encryption_active_dek_id", 2, ("raft",))])
    assert values(registry.render())["elastickv_raft_term[]"] == 4
    found = values(registry.render())
    assert found["elastickv_raft_term[]"] == 5
    assert found["elastickv_encryption_active_dek_id['raft']"] == 2


def test_a_name_outside_the_catalogue_is_a_defect() -> None:
    with pytest.raises(KeyError):
        Metrics().count("no_such_metric_total")


def test_recording_nothing_imports_nothing() -> None:
    NullRecorder().count("raft_proposals_total", "applied")
    NullRecorder().observe("raft_fsync_seconds", 1.0)
    code = "import sys, elastickv.metrics; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
