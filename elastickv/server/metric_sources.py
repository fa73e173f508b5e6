"""What is read from the components when metrics are scraped."""

from __future__ import annotations

from collections.abc import Iterator

from elastickv.metrics import Sample, Source
from elastickv.raft.engine import RaftEngine
from elastickv.store.mvcc_store import Store


def raft_source(engine: RaftEngine) -> Source:
    """Term, roles and indexes."""

    def samples() -> Iterator[Sample]:
        status = engine.status()
        yield Sample("raft_term", status.term)
        yield Sample("raft_is_leader", float(engine.is_leader()))
        yield Sample("raft_commit_index", status.commit_index)
        yield Sample("raft_applied_index", status.applied_index)
        yield Sample("raft_last_log_index", status.last_log_index)
        yield Sample("raft_durable_log_index", status.durable_log_index)
        yield Sample("raft_snapshot_index", status.last_snapshot_index)
        yield Sample("raft_proposals_pending", status.pending_proposals)

    return samples


def store_source(store: Store) -> Source:
    """What is durable in the store and what is not yet."""

    def samples() -> Iterator[Sample]:
        yield Sample("store_applied_index", store.applied_index)
        yield Sample("store_durable_index", store.durable_index)
        yield Sample("store_overlay_bytes", store.overlay_bytes)
        yield Sample("store_file_bytes", store.stats().bytes_used)

    return samples
