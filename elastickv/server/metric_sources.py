"""What is read from the components when metrics are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from elastickv.crypto.keystore import Purpose
from elastickv.keys.sidecar import Sidecar
from elastickv.kv.usage import NonceBudgets
from elastickv.metrics import Sample, Source
from elastickv.raft.engine import RaftEngine
from elastickv.store.dek_counts import PLAINTEXT, DekCounts
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
        yield Sample("raft_log_bytes", status.log_bytes)
        yield Sample("raft_snapshot_sent_bytes_total", status.snapshot_sent_bytes)
        yield Sample("raft_snapshot_received_bytes_total", status.snapshot_received_bytes)
        yield Sample("raft_snapshots_installed_total", status.snapshots_installed)
        yield Sample("raft_state_age_seconds", engine.state_age_s())

    return samples


def encryption_source(sidecar: Callable[[], Sidecar | None], budgets: NonceBudgets,
                      dek_counts: Callable[[], DekCounts],
                      cutover_hold_s: Callable[[], float]) -> Source:
    """Which DEKs are active, how worn, and what is sealed under each. `sidecar()` is the applied
    key state, None before bootstrap.

    Only active DEKs and those that still hold values have series, so that rotations do not add up.
    """

    def samples() -> Iterator[Sample]:
        state = sidecar()
        yield Sample("encryption_sidecar_index", state.raft_applied_index if state else 0)
        yield Sample("encryption_cutover_hold_seconds", cutover_hold_s())
        counts = {state.active_storage if state else PLAINTEXT: 0, **dek_counts()}
        for dek_id, values in sorted(counts.items()):
            yield Sample("encryption_dek_values", values, (str(dek_id),))
        for purpose in Purpose:
            dek_id = state.active(purpose) if state else 0
            yield Sample("encryption_active_dek_id", dek_id, (purpose.label,))
            if state is None or not dek_id:
                continue
            labels = (purpose.label, str(dek_id))
            writes = budgets.total(dek_id)
            yield Sample("encryption_dek_writes", writes, labels)
            yield Sample("encryption_dek_writes_left", budgets.limits.left(writes), labels)
            yield Sample("encryption_dek_epoch", state.keys[dek_id].local_epoch, labels)

    return samples


def store_source(store: Store) -> Source:
    """What is durable in the store and what is not yet."""

    def samples() -> Iterator[Sample]:
        yield Sample("store_applied_index", store.applied_index)
        yield Sample("store_durable_index", store.durable_index)
        yield Sample("store_overlay_bytes", store.overlay_bytes)
        yield Sample("store_file_bytes", store.stats().bytes_used)

    return samples
