"""The metric catalogue and the recorder that components write to.

One table declares every metric. Components hold a `Recorder` and never a metrics library: a node
that serves no metrics uses `NullRecorder`, which costs one call and imports nothing. Values that a
component already keeps (terms, indexes, sizes) are not pushed at all: `Metrics.add_source`
registers a function that is read when metrics are scraped.

Metric names never change their meaning; label values come from small sets, never from users.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX = "elastickv_"

FSYNC_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)
UNWRAP_BUCKETS_S = (0.00001, 0.00002, 0.00005, 0.0001, 0.001, 0.01, 0.1, 1.0)
CALL_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Kind(enum.Enum):
    """How a metric behaves; the names are those of Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue. `name` is without the prefix and has its unit last."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


CATALOGUE: tuple[Metric, ...] = (
    Metric("raft_term", Kind.GAUGE, "Current term."),
    Metric("raft_is_leader", Kind.GAUGE, "1 on the leader that can serve, else 0."),
    Metric("raft_commit_index", Kind.GAUGE, "Highest committed index."),
    Metric("raft_applied_index", Kind.GAUGE, "Highest applied index."),
    Metric("raft_last_log_index", Kind.GAUGE, "Highest index in the log."),
    Metric("raft_durable_log_index", Kind.GAUGE, "Highest index that is on this disk."),
    Metric("raft_snapshot_index", Kind.GAUGE, "Index up to which the log was compacted."),
    Metric("raft_proposals_pending", Kind.GAUGE, "Proposals without an outcome yet."),
    Metric("raft_proposals_total", Kind.COUNTER, "Log entries that this node proposed, by outcome: "
           "applied; rejected by every member alike; refused before it was in the log; unknown.",
           ("outcome",)),
    Metric("raft_log_bytes", Kind.GAUGE, "Size of the log on disk."),
    Metric("raft_snapshot_sent_bytes_total", Kind.COUNTER, "Bytes of snapshots sent to members "
           "that were behind the log."),
    Metric("raft_snapshot_received_bytes_total", Kind.COUNTER, "Bytes of snapshots received."),
    Metric("raft_snapshots_installed_total", Kind.COUNTER, "Snapshots that became this node's "
           "state."),
    Metric("raft_state_age_seconds", Kind.GAUGE, "Time since this node's state is known to have "
           "been complete, as in a stale read; +Inf = never."),
    Metric("raft_fsync_seconds", Kind.HISTOGRAM, "Duration of one fsync of the log.", (),
           FSYNC_BUCKETS_S),
    Metric("store_applied_index", Kind.GAUGE, "Highest index visible in the store."),
    Metric("store_durable_index", Kind.GAUGE, "Highest index that the store has flushed."),
    Metric("store_overlay_bytes", Kind.GAUGE, "Applied bytes that wait for a flush."),
    Metric("store_file_bytes", Kind.GAUGE, "Bytes used in the store's file."),
    Metric("grpc_calls_total", Kind.COUNTER, "Unary gRPC calls by method and status.",
           ("method", "status")),
    Metric("grpc_call_seconds", Kind.HISTOGRAM, "Duration of a unary gRPC call.", ("method",),
           CALL_BUCKETS_S),
    Metric("encryption_active_dek_id", Kind.GAUGE, "Active DEK id by purpose; 0 before bootstrap.",
           ("purpose",)),
    Metric("encryption_dek_writes", Kind.GAUGE, "Nonces reserved under an active DEK by all "
           "members: never below the writes sealed under it.", ("purpose", "dek_id")),
    Metric("encryption_dek_writes_left", Kind.GAUGE, "Writes until an active DEK reaches "
           "--dek-max-writes.", ("purpose", "dek_id")),
    Metric("encryption_dek_values", Kind.GAUGE, "Values on this node's disk by the DEK that they "
           "are sealed under, every kept version counted; dek_id 0 = in the clear.", ("dek_id",)),
    Metric("encryption_dek_epoch", Kind.GAUGE, "This node's highest nonce epoch under an active "
           "DEK; at 65535 it has no other.", ("purpose", "dek_id")),
    Metric("encryption_sidecar_index", Kind.GAUGE, "Index of the last encryption entry in the "
           "sidecar."),
    Metric("encryption_cutover_hold_seconds", Kind.GAUGE, "How long the raft cutover held "
           "proposals back on this node; 0 when another member led it or it was before the start."),
    Metric("encryption_kek_unwrap_seconds", Kind.HISTOGRAM, "Time to unwrap one DEK under the "
           "KEK.", (), UNWRAP_BUCKETS_S),
    Metric("encryption_decrypt_failures_total", Kind.COUNTER, "Stored values that did not open, "
           "by reason.", ("reason",)),
)
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in CATALOGUE}


class Recorder(Protocol):
    """Where components write. `labels` are the values of the metric's labels, in order."""

    def count(self, name: str, *labels: str, amount: float = 1) -> None:
        """Add to a counter."""
        ...

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Record one observation of a histogram."""
        ...


class NullRecorder:
    """Records nothing."""

    def count(self, name: str, *labels: str, amount: float = 1) -> None:
        return

    def observe(self, name: str, value: float, *labels: str) -> None:
        return


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a gauge or counter that a source reports at scrape time."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


Source = Callable[[], Iterable[Sample]]


class Metrics:
    """A registry of the whole catalogue, for a node that serves metrics.

    Creating one imports prometheus_client.
    """

    def __init__(self) -> None:
        import prometheus_client

        self._library = prometheus_client
        self.registry: CollectorRegistry = prometheus_client.CollectorRegistry()
        self._pushed: dict[str, Any] = {}
        self._sources: list[Source] = []
        self.registry.register(_Sources(self._sources))

    def add_source(self, source: Source) -> None:
        """Call `source` at every scrape. A source must be quick and must not block."""
        self._sources.append(source)

    def count(self, name: str, *labels: str, amount: float = 1) -> None:
        self._metric(name, labels).inc(amount)

    def observe(self, name: str, value: float, *labels: str) -> None:
        self._metric(name, labels).observe(value)

    def render(self) -> bytes:
        """The text exposition format."""
        return self._library.generate_latest(self.registry)

    def _metric(self, name: str, labels: tuple[str, ...]) -> Any:
        metric = self._pushed.get(name)
        if metric is None:
            metric = self._pushed[name] = self._create(BY_NAME[name])
        return metric.labels(*labels) if labels else metric

    def _create(self, metric: Metric) -> Any:
        full_name = PREFIX + metric.name
        if metric.kind is Kind.HISTOGRAM:
            return self._library.Histogram(full_name, metric.help, metric.labels,
                                           buckets=metric.buckets, registry=self.registry)
        return self._library.Counter(full_name, metric.help, metric.labels,
                                     registry=self.registry)


class _Sources:
    """The prometheus_client collector that reads the sources."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for source in self._sources:
            for sample in source():
                metric = BY_NAME[sample.name]
                if sample.name not in families:
                    family = (GaugeMetricFamily if metric.kind is Kind.GAUGE
                              else CounterMetricFamily)
                    families[sample.name] = family(PREFIX + metric.name, metric.help,
                                                   labels=metric.labels)
                families[sample.name].add_metric(sample.labels, sample.value)
        yield from families.values()
