"""What a node takes over from the leader, and when it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import MAX_EPOCH
from elastickv.errors import EncryptionConflict, NotBootstrapped
from elastickv.keys.guards import EpochExhausted
from elastickv.keys.resync import resynced, resynced_epoch
from elastickv.keys.sidecar import Sidecar, SidecarKey

CREATED = "2026-01-02T03:04:05Z"


def key(purpose: Purpose, epoch: int = 0) -> SidecarKey:
    return SidecarKey(purpose, bytes(60), CREATED, epoch)


LEADER = Sidecar(
    raft_applied_index=50, storage_envelope_active=True, storage_envelope_cutover_index=20,
    raft_envelope_cutover_index=30, active_storage=3, active_raft=2,
    keys=MappingProxyType({1: key(Purpose.STORAGE), 2: key(Purpose.RAFT),
                           3: key(Purpose.STORAGE)}))
OWN = replace(LEADER, raft_applied_index=30, active_storage=1, keys=MappingProxyType(
    {1: key(Purpose.STORAGE, 7), 2: key(Purpose.RAFT, 4)}))


@pytest.mark.parametrize(("local", "registry", "expected"), [
    (None, None, 0), (0, None, 1), (None, 0, 1), (4, 9, 10), (9, 4, 10), (4, 4, 5),
    (MAX_EPOCH, 1, MAX_EPOCH), (None, MAX_EPOCH, MAX_EPOCH),
])
def test_epoch(local: int | None, registry: int | None, expected: int) -> None:
    assert resynced_epoch(local, registry) == expected


def test_everything_is_the_leaders_but_the_epochs() -> None:
    result = resynced(OWN, LEADER, {1: 9, 2: 2})
    assert {dek_id: each.local_epoch for dek_id, each in result.keys.items()} == {1: 10, 2: 5, 3: 0}
    assert replace(result, keys=LEADER.keys) == LEADER


def test_without_a_readable_sidecar_the_registry_alone_counts() -> None:
    result = resynced(None, LEADER, {2: 6})
    assert {dek_id: each.local_epoch for dek_id, each in result.keys.items()} == {1: 0, 2: 7, 3: 0}


@given(st.none() | st.integers(0, MAX_EPOCH - 1), st.none() | st.integers(0, MAX_EPOCH - 1))
def test_the_epoch_is_above_whatever_was_seen(local: int | None, registry: int | None) -> None:
    epoch = resynced_epoch(local, registry)
    assert epoch > (-1 if local is None else local)
    assert epoch > (-1 if registry is None else registry)


def test_a_leader_without_keys_has_nothing_to_give() -> None:
    with pytest.raises(NotBootstrapped, match="no keys"):
        resynced(OWN, Sidecar(), {})


def test_newer_keys_are_not_given_up() -> None:
    with pytest.raises(EncryptionConflict, match=r"51.*50"):
        resynced(replace(OWN, raft_applied_index=51), LEADER, {})


@pytest.mark.parametrize(("dek_id", "refused"), [(1, False), (2, True), (3, True)])
def test_an_exhausted_epoch_matters_for_active_deks_only(dek_id: int, refused: bool) -> None:
    registry = {dek_id: MAX_EPOCH}
    if refused:
        with pytest.raises(EpochExhausted, match="rotate-dek"):
            resynced(None, LEADER, registry)
    else:
        assert resynced(None, LEADER, registry).keys[dek_id].local_epoch == MAX_EPOCH
