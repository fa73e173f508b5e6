"""Nonce epochs: how a node's own record of them, its sidecar, follows the writer registry. Pure.

Two invariants make a nonce unique, and everything here serves one of them:

* an epoch is written into the sidecar before the node asks for it, and only an epoch above the
  registry's is ever confirmed;
* the sidecar never falls below the registry's row of its own node, so a sidecar that *is* below it
  is an old copy (start-up guard `epoch-rollback`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from elastickv.crypto.nonce import MAX_EPOCH
from elastickv.keys.guards import EpochExhausted
from elastickv.keys.sidecar import Sidecar

FIRST_EPOCH: Final = 1
"""The epoch that a rotation registers for its proposer: the DEK is new, so nothing came before."""


def next_epoch(dek_id: int, local_epoch: int, registry_last_seen: int | None) -> int:
    """The epoch to ask for: above what this node wrote down and above what the registry saw.

    Raises `EpochExhausted` past 0xFFFF.
    """
    epoch = max(local_epoch, -1 if registry_last_seen is None else registry_last_seen) + 1
    if epoch > MAX_EPOCH:
        raise EpochExhausted(f"every epoch of DEK {dek_id} is used on this node",
                             remedy="rotate the DEK: elastickv admin encryption rotate-dek")
    return epoch


def with_epochs_at_least(sidecar: Sidecar, epochs: Mapping[int, int]) -> Sidecar:
    """The sidecar with no epoch below `epochs`; the same object when there is nothing to raise."""
    raised = {dek_id: replace(key, local_epoch=epochs[dek_id])
              for dek_id, key in sidecar.keys.items()
              if epochs.get(dek_id, 0) > key.local_epoch}
    if not raised:
        return sidecar
    return replace(sidecar, keys=MappingProxyType({**sidecar.keys, **raised}))
