"""Epochs: which to ask for, and how the sidecar follows the registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from key_nodes import KEK, NODE_A, NODE_B, RAFT, STORAGE, THIRD, KeyNode, bootstrap, rotate

from elastickv.crypto.keystore import Keystore
from elastickv.crypto.nonce import node_id16
from elastickv.durable import OsDisk
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.applier import Applier
from elastickv.keys.epochs import with_epochs_at_least
from elastickv.keys.guards import Facts, Status, run_guards
from elastickv.keys.registry import WriterRecord, encode_row_value, own_epochs, row_key
from elastickv.wire import EncryptionEntry, Registration, RegistryRow


class OwnNode(KeyNode):
    """A key node that knows its own id, as a running node does."""

    def open(self, *, wired: bool = True) -> Applier:
        return Applier(disk=OsDisk(), read_row=lambda key: self.rows.get(key), kek=KEK,
                       keystore=Keystore(), sidecar_path=self.path, full_node_id=NODE_A,
                       now=lambda: self.created)

    def epochs(self) -> dict[int, int]:
        found = sidecar_file.load(OsDisk(), self.path)
        return {dek_id: key.local_epoch for dek_id, key in found.keys.items()} if found else {}

    def rollback_guard(self) -> Status:
        facts = Facts(full_node_id=NODE_A, encryption_enabled=True, kek_configured=True,
                      sidecar=sidecar_file.load(OsDisk(), self.path), registry=self.rows)
        return next(v.status for v in run_guards(facts) if v.guard == "epoch-rollback")


@pytest.fixture
def node(tmp_path: Path) -> OwnNode:
    node = OwnNode(tmp_path)
    node.apply(10, bootstrap(RegistryRow(STORAGE, NODE_A, 0), RegistryRow(RAFT, NODE_A, 0)))
    return node


@pytest.mark.parametrize(("entry", "expected"), [
    (rotate(THIRD, node=NODE_A, epoch=1), {STORAGE: 0, RAFT: 0, THIRD: 1}),
    (rotate(THIRD, node=NODE_B, epoch=9), {STORAGE: 0, RAFT: 0, THIRD: 0}),
    (Registration(RegistryRow(RAFT, NODE_A, 5)), {STORAGE: 0, RAFT: 5}),
    (Registration(RegistryRow(RAFT, NODE_B, 5)), {STORAGE: 0, RAFT: 0}),
], ids=["own rotation", "another's rotation", "own registration", "another's registration"])
def test_an_entry_raises_the_epochs_that_it_registers_for_this_node(
        node: OwnNode, entry: EncryptionEntry, expected: dict[int, int]) -> None:
    node.apply(11, entry)
    assert node.epochs() == expected
    assert node.rollback_guard() is Status.PASS


def test_a_crash_between_a_rotation_and_its_acceptance_is_no_rollback(node: OwnNode) -> None:
    node.apply(11, rotate(THIRD, node=NODE_A, epoch=1))
    node.restart()
    assert node.rollback_guard() is Status.PASS
    node.applier.set_local_epoch(THIRD, 1)
    assert node.epochs()[THIRD] == 1


def test_an_epoch_is_never_lowered(node: OwnNode) -> None:
    node.applier.set_local_epoch(RAFT, 8)
    node.apply(11, Registration(RegistryRow(RAFT, NODE_A, 5)))
    assert node.epochs()[RAFT] == 8


def test_rows_that_came_without_an_entry_are_noted_too(node: OwnNode) -> None:
    rows = [(row_key(RAFT, node_id16(NODE_A)), encode_row_value(WriterRecord(NODE_A, 0, 6)))]
    node.rows.update(rows)
    assert node.rollback_guard() is Status.FAIL
    node.applier.note_registry(rows)
    assert node.rollback_guard() is Status.PASS


def test_an_applier_that_does_not_know_its_node_leaves_epochs_alone(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap(RegistryRow(STORAGE, NODE_A, 3)))
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert {key.local_epoch for key in sidecar.keys.values()} == {0}


def test_own_epochs_ignores_other_nodes_and_other_rows() -> None:
    rows = [(row_key(1, 0x11), encode_row_value(WriterRecord(NODE_A, 0, 4))),
            (row_key(2, 0x22), encode_row_value(WriterRecord(NODE_B, 0, 9))),
            (b"!encryption|usage|something", b"else")]
    assert own_epochs(rows, NODE_A) == {1: 4}


def test_nothing_to_raise_is_the_same_sidecar(node: OwnNode) -> None:
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert with_epochs_at_least(sidecar, {STORAGE: 0, 99: 7}) is sidecar
    assert with_epochs_at_least(sidecar, {STORAGE: 2}) == replace(
        sidecar, keys={**sidecar.keys, STORAGE: replace(sidecar.keys[STORAGE], local_epoch=2)})
