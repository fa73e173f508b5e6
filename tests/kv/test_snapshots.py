"""A snapshot carries keys and data together; snapshot plus tail is the same state as replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore, Purpose
from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, KekError
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.applier import Applier
from elastickv.keys.guards import SidecarForeign
from elastickv.kv.snapshots import state_snapshots
from elastickv.wire import (
    Bootstrap,
    Entry,
    HlcCeiling,
    Registration,
    RegistryRow,
    Rotation,
    RotationTag,
    encode_entry,
)
from tests.kv.machine import KEK, NODE, RAFT_DEK, STORAGE_DEK, Machine, plain, ts


def stream(machine: Machine) -> bytes:
    machine.store.flush_now()
    source = state_snapshots(machine.store, machine.applier, machine.hlc,
                             on_keys_changed=machine.changed.append)
    export = source.open_export()
    chunks = []
    while chunk := export.read(64):
        chunks.append(chunk)
    export.close()
    return b"".join(chunks)


def install(machine: Machine, data: bytes) -> int:
    source = state_snapshots(machine.store, machine.applier, machine.hlc,
                             on_keys_changed=machine.changed.append)
    receiving = source.open_import()
    receiving.write(data)
    return receiving.finish()


def populated(directory: Path) -> Machine:
    machine = Machine(directory)
    machine.write(plain(b"k", ts(1), b"clear"))
    machine.bootstrap()
    machine.enable_storage()
    machine.write(machine.sealed(b"s", ts(2), b"hidden"))
    return machine


def test_a_new_member_gets_data_and_keys(tmp_path: Path) -> None:
    leader, follower = populated(tmp_path / "leader"), Machine(tmp_path / "follower")
    assert install(follower, stream(leader)) == leader.store.applied_index
    assert follower.value(b"s") == b"hidden"
    assert follower.value(b"k") == b"clear"
    assert follower.applier.keystore.ids() == (STORAGE_DEK, RAFT_DEK)
    assert follower.hlc.last == ts(2)
    assert follower.changed == [leader.store.applied_index]


def test_snapshot_and_tail_equal_replay(tmp_path: Path) -> None:
    leader, follower = populated(tmp_path / "leader"), Machine(tmp_path / "follower")
    install(follower, stream(leader))
    rotation = encode_entry(Rotation(
        RotationTag.ROTATE_DEK, 33, Purpose.STORAGE, KEK.generate_wrapped_dek(),
        RegistryRow(33, NODE, 1)))
    for machine in (leader, follower):
        machine.apply(rotation)
    assert follower.store.rows() == leader.store.rows()
    assert follower.store.applied_index == leader.store.applied_index
    assert follower.applier.keystore.ids() == leader.applier.keystore.ids()
    assert follower.applier.sidecar is not None and leader.applier.sidecar is not None
    assert follower.applier.sidecar.active_storage == leader.applier.sidecar.active_storage == 33


def test_epochs_of_the_receiver_are_its_own(tmp_path: Path) -> None:
    leader = populated(tmp_path / "leader")
    leader.applier.set_local_epoch(STORAGE_DEK, 9)
    follower = Machine(tmp_path / "follower")
    install(follower, stream(leader))
    assert follower.applier.sidecar is not None
    assert follower.applier.sidecar.keys[STORAGE_DEK].local_epoch == 0


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_refuses_the_snapshot_and_takes_the_next(tmp_path: Path, room: int) -> None:
    """Whatever the sidecar has to know, this node's epochs too, is durable before the state is
    another one: a start would take a sidecar that lacks it for an old copy."""
    leader = populated(tmp_path / "leader")
    leader.apply(encode_entry(Registration(RegistryRow(STORAGE_DEK, NODE, 5))))
    data = stream(leader)
    follower = Machine(tmp_path / "follower", full_node_id=NODE)
    follower.disk.room = room
    with pytest.raises(DiskFull):
        install(follower, data)
    assert follower.store.applied_index == 0
    assert follower.changed == []
    follower.disk.room = math.inf
    assert install(follower, data) == leader.store.applied_index
    assert follower.value(b"s") == b"hidden"
    assert follower.applier.sidecar is not None
    assert follower.applier.sidecar.keys[STORAGE_DEK].local_epoch == 5


BOOTSTRAP = Bootstrap(
    STORAGE_DEK, KEK.generate_wrapped_dek(), RAFT_DEK, KEK.generate_wrapped_dek(),
    (RegistryRow(STORAGE_DEK, NODE, 0), RegistryRow(RAFT_DEK, NODE, 0)))
STORAGE_CUTOVER, RAFT_CUTOVER = (
    Rotation(tag, dek_id, purpose, b"", RegistryRow(dek_id, NODE, 0)) for tag, dek_id, purpose in (
        (RotationTag.ENABLE_STORAGE_ENVELOPE, STORAGE_DEK, Purpose.STORAGE),
        (RotationTag.ENABLE_RAFT_ENVELOPE, RAFT_DEK, Purpose.RAFT)))
ROTATION = Rotation(RotationTag.ROTATE_DEK, 33, Purpose.STORAGE, KEK.generate_wrapped_dek(),
                    RegistryRow(33, NODE, 1))
FIRST_DEK_FOR_THE_LOG = Rotation(
    RotationTag.ROTATE_DEK, STORAGE_DEK, Purpose.RAFT,
    KEK.wrap(KEK.unwrap(BOOTSTRAP.wrapped_storage)), RegistryRow(STORAGE_DEK, NODE, 1))
CEILING = HlcCeiling(5)

# What the log held that the sidecar comes from, and what the log holds that the snapshot is of.
# Both begin with the bootstrap, which the receiver has applied.
LOGS: dict[str, tuple[Sequence[Entry], Sequence[Entry], bool]] = {
    "the sidecar is that of the store": ((), (CEILING, STORAGE_CUTOVER), True),
    "the sidecar knows what the snapshot brings": (
        (CEILING, STORAGE_CUTOVER), (CEILING, STORAGE_CUTOVER, CEILING), True),
    "the sidecar is ahead of the snapshot": (
        (CEILING, STORAGE_CUTOVER, CEILING, ROTATION), (CEILING, STORAGE_CUTOVER), True),
    "the snapshot gives a DEK another purpose": (
        (), (ROTATION, FIRST_DEK_FOR_THE_LOG), True),
    "the sidecar, ahead, gives a DEK another purpose": (
        (ROTATION, FIRST_DEK_FOR_THE_LOG), (ROTATION,), True),
    "no key entry where the sidecar has a rotation": (
        (CEILING, ROTATION), (CEILING, CEILING, CEILING), False),
    "no key entry where the sidecar has a cutover": (
        (CEILING, STORAGE_CUTOVER), (CEILING, CEILING, CEILING), False),
    "no key entry where the sidecar, now ahead, has a cutover": (
        (STORAGE_CUTOVER, CEILING, CEILING, ROTATION), (CEILING, CEILING), False),
    "no key entry at the snapshot's own index": ((CEILING, ROTATION), (CEILING, CEILING), False),
    "another cutover at the same index": (
        (CEILING, STORAGE_CUTOVER), (CEILING, RAFT_CUTOVER), False),
    "another DEK at the same index": (
        (ROTATION,), (replace(ROTATION, dek_id=44, proposer=RegistryRow(44, NODE, 1)),), False),
    "a DEK that the log does not have, and later ones": (
        (ROTATION,), (CEILING, STORAGE_CUTOVER), False),
}


@pytest.mark.parametrize(("former", "present", "is_same"), LOGS.values(), ids=LOGS)
def test_a_snapshot_of_another_log_than_the_sidecars_is_not_installed(
        tmp_path: Path, former: Sequence[Entry], present: Sequence[Entry], is_same: bool) -> None:
    """No entry of what it jumps over would tell, and this replica would refuse what others apply,
    or seal what they cannot open."""
    machines = [Machine(tmp_path / name) for name in ("former", "leader", "follower")]
    for machine, tail in zip(machines, (former, present, ()), strict=True):
        for entry in (BOOTSTRAP, *tail):
            machine.apply(encode_entry(entry))
        machine.store.flush_now()
    assert machines[0].applier.sidecar is not None
    sidecar_file.store(OsDisk(), tmp_path / "follower" / "keys.json", machines[0].applier.sidecar)
    follower = Machine(tmp_path / "follower")
    before = follower.fingerprint()
    if is_same:
        assert install(follower, stream(machines[1])) == machines[1].store.applied_index
        return
    with pytest.raises(SidecarForeign) as caught:
        install(follower, stream(machines[1]))
    assert "move it away" in caught.value.remedy.split(":")[0]
    assert follower.fingerprint() == before


def test_another_kek_refuses_the_snapshot_and_changes_nothing(tmp_path: Path) -> None:
    data = stream(populated(tmp_path / "leader"))
    follower = Machine(tmp_path / "follower")
    follower.applier = Applier(disk=OsDisk(), read_row=follower.store.row, kek=Kek(b"x" * 32),
                               keystore=Keystore(), sidecar_path=tmp_path / "follower/keys.json")
    with pytest.raises(KekError):
        install(follower, data)
    assert follower.store.applied_index == 0
    assert follower.applier.sidecar is None
