"""Taking the key state over from the leader: a sidecar that is lost, damaged or an old copy. Pure.

The leader's sidecar is the state after every encryption entry up to its `raft_applied_index`. A
node that takes it over is ahead of its own store, which replay accepts: entries at or below that
index only insert their registry rows again. What cannot be taken over are the epochs, which are
each node's own; they are derived anew as max(local, registry) + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from elastickv.crypto.nonce import MAX_EPOCH
from elastickv.errors import EncryptionConflict, NotBootstrapped
from elastickv.keys.guards import EpochExhausted
from elastickv.keys.sidecar import Sidecar


def resynced_epoch(local: int | None, registry: int | None) -> int:
    """max(local, registry) + 1, never above 0xFFFF; None = never seen there."""
    known = [epoch for epoch in (local, registry) if epoch is not None]
    return min(max(known, default=-1) + 1, MAX_EPOCH)


def resynced(own: Sidecar | None, leader: Sidecar, registry: Mapping[int, int]) -> Sidecar:
    """The sidecar to write. `own` is what this node has, None when it cannot be read; `registry`
    maps DEK ids to the last epoch that the leader's registry saw from this node.

    Raises `NotBootstrapped` when the leader has no keys, `EncryptionConflict` when this node's keys
    are newer than the leader's, and `EpochExhausted` when no epoch is left for an active DEK.
    """
    if not leader.bootstrapped:
        raise NotBootstrapped("the leader has no keys to give",
                              remedy="check that the endpoints are those of this node's cluster")
    if own is not None and own.raft_applied_index > leader.raft_applied_index:
        raise EncryptionConflict(
            f"this node's sidecar stands at index {own.raft_applied_index}, the leader's at"
            f" {leader.raft_applied_index}",
            remedy="check that the endpoints are those of this node's cluster; if they are and the"
                   " sidecar is from another one, move it away first")
    keys = {}
    for dek_id, key in leader.keys.items():
        held = own.keys.get(dek_id) if own is not None else None
        local, seen = held.local_epoch if held else None, registry.get(dek_id)
        if MAX_EPOCH in (local, seen) and dek_id in leader.active_ids:
            raise EpochExhausted(
                f"this node has used every epoch of DEK {dek_id}, which is still active",
                remedy="first run elastickv admin encryption rotate-dek")
        keys[dek_id] = replace(key, local_epoch=resynced_epoch(local, seen))
    result = replace(leader, keys=MappingProxyType(keys))
    result.validate()
    return result
