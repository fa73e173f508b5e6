"""Snapshots of the whole state machine: the store's stream, and the key state that it carries.

The store's meta table holds a copy of the sidecar (wrapped keys only), so the stream that brings a
lagging follower its data brings it the keys for that data too. Order of an installation: verify the
stream, adopt the sidecar and this node's epochs in the registry durably, swap the store, derive
clock and writers again. A crash or a full disk after the second step leaves the sidecar ahead of
the store, which replay and a repeated installation accept; were the store ahead, the guard against
old sidecars would refuse the next start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastickv.clock import HybridLogicalClock
from elastickv.keys.applier import Applier
from elastickv.keys.guards import SidecarForeign, foreign_remedy
from elastickv.kv.fsm import META_HLC_CEILING, recorded_keys
from elastickv.store.mvcc_store import Store, decode_number
from elastickv.store.snapshot import SnapshotHeader, StoreSnapshots
from elastickv.store.tables import Item


def state_snapshots(store: Store, applier: Applier, hlc: HybridLogicalClock, *,
                    on_keys_changed: Callable[[int], None]) -> StoreSnapshots:
    """The node's `raft.engine.SnapshotSource`.

    Installing raises `KekError` when this node's KEK does not unwrap the snapshot's keys, and
    `SidecarForeign` when its sidecar is not of the snapshot's log: where a snapshot takes the place
    of entries, none of them would tell. Then nothing has changed and the node must stop.
    """

    def adopt_keys(header: SnapshotHeader, rows: Sequence[Item]) -> None:
        recorded, own = recorded_keys(header.applied_index, header.meta.get), applier.sidecar
        found = applier.contradiction(recorded)
        if own is not None and found is not None:
            raise SidecarForeign(found.message, remedy=foreign_remedy(
                own, recorded_keys(store.applied_index, store.meta)))
        foreign = recorded.sidecar
        if foreign is not None and (own is None
                                    or own.raft_applied_index < foreign.raft_applied_index):
            applier.adopt(foreign)
        applier.note_registry(rows)

    def installed(applied_index: int) -> None:
        hlc.observe(store.max_commit_ts)
        hlc.observe_ceiling(decode_number(store.meta(META_HLC_CEILING)))
        on_keys_changed(applied_index)

    return StoreSnapshots(store, before_install=adopt_keys, on_installed=installed)
