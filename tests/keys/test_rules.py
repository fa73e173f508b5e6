"""Every rule for encryption entries: what is accepted changes exactly this, what is refused
changes nothing at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from key_nodes import (
    FOURTH_DEK,
    KEK,
    NODE_A,
    NODE_B,
    OTHER_KEK,
    RAFT,
    RAFT_DEK,
    STORAGE,
    STORAGE_DEK,
    THIRD,
    TWIN_OF_A,
    W_FOURTH,
    W_RAFT,
    W_STORAGE,
    W_STORAGE_AGAIN,
    W_THIRD,
    KeyNode,
    bootstrap,
    raft_cutover,
    rotate,
    storage_cutover,
)

from elastickv.crypto.keystore import Purpose
from elastickv.errors import (
    ApplyHalted,
    EntryNotApplicable,
    EntryRejected,
    EpochRollback,
    NodeIdCollision,
    WireError,
)
from elastickv.keys import lifecycle
from elastickv.keys.lifecycle import CUTOVER_TRANSITIONS
from elastickv.keys.registry import WriterRecord, decode_row_value, row_key
from elastickv.wire import (
    EncryptionEntry,
    Opcode,
    Registration,
    RegistryRow,
    Rotation,
    RotationTag,
    decode_entry,
    encode_entry,
)
from tests.walked import Walked


@pytest.fixture
def node(tmp_path: Path) -> KeyNode:
    """Bootstrapped at index 10: node A writes both DEKs in epoch 2, node B the storage DEK in 0."""
    fresh = KeyNode(tmp_path)
    fresh.apply(10, bootstrap(RegistryRow(STORAGE, NODE_A, 2), RegistryRow(RAFT, NODE_A, 2),
                              RegistryRow(STORAGE, NODE_B, 0)))
    return fresh


def assert_refused(node: KeyNode, index: int, entry: EncryptionEntry,
                   error: type[ApplyHalted]) -> None:
    """Refused by the leader's validation and by apply, with keystore, file and rows unchanged."""
    before = node.state()
    with pytest.raises(error) as proposed:
        node.applier.validate(index, entry)
    assert node.state() == before
    with pytest.raises(error) as applied:
        node.apply(index, entry)
    assert node.state() == before
    assert str(proposed.value) == str(applied.value)
    node.restart()
    assert node.state()[:2] == before[:2]


REFUSED: dict[str, tuple[EncryptionEntry, type[ApplyHalted]]] = {
    "registration: epoch rollback": (
        Registration(RegistryRow(STORAGE, NODE_A, 1)), EpochRollback),
    "registration: node id collision": (
        Registration(RegistryRow(STORAGE, TWIN_OF_A, 9)), NodeIdCollision),
    "registration: DEK id 0": (Registration(RegistryRow(0, NODE_A, 9)), EntryRejected),

    "bootstrap: identical DEK ids": (
        bootstrap(storage_id=5, raft_id=5, wrapped_raft=W_THIRD), EntryRejected),
    "bootstrap: foreign dek_id in the batch": (
        bootstrap(RegistryRow(STORAGE, NODE_A, 3), RegistryRow(99, NODE_B, 3)), EntryRejected),
    "bootstrap: second with another storage id": (
        bootstrap(storage_id=THIRD, wrapped_storage=W_THIRD), EntryRejected),
    "bootstrap: second with another raft id": (
        bootstrap(raft_id=THIRD, wrapped_raft=W_THIRD), EntryRejected),
    "bootstrap: second with the ids swapped": (
        bootstrap(storage_id=RAFT, wrapped_storage=W_RAFT, raft_id=STORAGE,
                  wrapped_raft=W_STORAGE), EntryRejected),
    "bootstrap: second with another storage key": (
        bootstrap(wrapped_storage=W_THIRD), EntryRejected),
    "bootstrap: second with another raft key": (bootstrap(wrapped_raft=W_THIRD), EntryRejected),
    "bootstrap: second with the same storage key wrapped anew": (
        bootstrap(wrapped_storage=W_STORAGE_AGAIN), EntryRejected),
    "bootstrap: second with the same raft key wrapped anew": (
        bootstrap(wrapped_raft=KEK.wrap(RAFT_DEK)), EntryRejected),
    "bootstrap: repeated, epoch rollback in the batch": (
        bootstrap(RegistryRow(STORAGE, NODE_B, 5), RegistryRow(RAFT, NODE_A, 1)), EpochRollback),
    "bootstrap: repeated, rollback against an earlier row of the batch": (
        bootstrap(RegistryRow(RAFT, NODE_B, 5), RegistryRow(RAFT, NODE_B, 4)), EpochRollback),
    "bootstrap: repeated, collision in the batch": (
        bootstrap(RegistryRow(STORAGE, TWIN_OF_A, 9)), NodeIdCollision),
    "bootstrap: repeated, collision within the batch": (
        bootstrap(RegistryRow(RAFT, NODE_B, 1), RegistryRow(RAFT, 0xDDDD_0000_0000_0022, 1)),
        NodeIdCollision),

    "rotate: the proposer's dek_id differs": (rotate(proposer_dek_id=STORAGE), EntryRejected),
    "rotate: unknown purpose 0": (rotate(purpose=0), EntryRejected),
    "rotate: unknown purpose 3": (rotate(purpose=3), EntryRejected),
    "rotate: unknown purpose 0xfe": (rotate(purpose=0xFE), EntryRejected),
    "rotate: unknown purpose on a known key": (
        rotate(STORAGE, W_STORAGE, purpose=0xFE, epoch=2), EntryRejected),
    "rotate: DEK id 0": (rotate(0), EntryRejected),
    "rotate: wrapped empty": (rotate(wrapped=b""), EntryRejected),
    "rotate: wrapped one byte short": (rotate(wrapped=W_THIRD[:-1]), EntryRejected),
    "rotate: wrapped one byte long": (rotate(wrapped=W_THIRD + b"\x00"), EntryRejected),
    "rotate: id taken by another key": (
        rotate(STORAGE, W_THIRD, epoch=2), EntryRejected),
    "rotate: key already held under another id": (rotate(THIRD, W_STORAGE_AGAIN), EntryRejected),
    "rotate: active storage key becomes a raft key": (
        rotate(STORAGE, W_STORAGE, purpose=2, epoch=2), EntryRejected),
    "rotate: active raft key becomes a storage key": (
        rotate(RAFT, W_RAFT, purpose=1, epoch=2), EntryRejected),
    "rotate: proposer epoch rollback": (
        rotate(STORAGE, W_STORAGE, epoch=1), EpochRollback),
    "rotate: proposer collision": (
        rotate(STORAGE, W_STORAGE, node=TWIN_OF_A, epoch=9), NodeIdCollision),
    "rotate: wrapped under another KEK": (
        rotate(wrapped=OTHER_KEK.wrap(FOURTH_DEK)), EntryNotApplicable),
    "rotate: wrapped bytes damaged": (
        rotate(wrapped=W_THIRD[:-1] + bytes((W_THIRD[-1] ^ 1,))), EntryNotApplicable),

    "storage cutover: the proposer's dek_id differs": (
        storage_cutover(proposer_dek_id=RAFT), EntryRejected),
    "storage cutover: purpose raft": (storage_cutover(purpose=2), EntryRejected),
    "storage cutover: unknown purpose": (storage_cutover(purpose=0xFE), EntryRejected),
    "storage cutover: one byte wrapped": (storage_cutover(wrapped=b"\x01"), EntryRejected),
    "storage cutover: a whole wrapped DEK": (storage_cutover(wrapped=W_THIRD), EntryRejected),
    "storage cutover: proposer epoch rollback": (storage_cutover(epoch=1), EpochRollback),
    "storage cutover: proposer collision": (
        storage_cutover(node=TWIN_OF_A, epoch=9), NodeIdCollision),
    "storage cutover: stale, and one byte wrapped": (
        storage_cutover(THIRD, wrapped=b"\x01"), EntryRejected),
    "raft cutover: the proposer's dek_id differs": (
        raft_cutover(proposer_dek_id=STORAGE), EntryRejected),
    "raft cutover: purpose storage": (raft_cutover(purpose=1), EntryRejected),
    "raft cutover: unknown purpose": (raft_cutover(purpose=0xFE), EntryRejected),
    "raft cutover: one byte wrapped": (raft_cutover(wrapped=b"\x01"), EntryRejected),
    "raft cutover: proposer epoch rollback": (raft_cutover(epoch=1), EpochRollback),
    "raft cutover: proposer collision": (
        raft_cutover(node=TWIN_OF_A, epoch=9), NodeIdCollision),

    "rewrap-deks: not supported": (rotate(tag=RotationTag.REWRAP_DEKS), EntryRejected),
    "retire-dek: not supported": (
        rotate(STORAGE, b"", epoch=2, tag=RotationTag.RETIRE_DEK), EntryRejected),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_entry_leaves_no_trace(name: str, node: KeyNode) -> None:
    entry, error = REFUSED[name]
    assert decode_entry(encode_entry(entry)) == entry
    assert_refused(node, 20, entry, error)


@pytest.mark.parametrize(("name", "reason"), [
    ("bootstrap: identical DEK ids", "names DEK 5 for both purposes"),
    ("bootstrap: foreign dek_id in the batch", "registers a writer of DEK 99"),
    ("bootstrap: second with another storage id", "already bootstrapped: DEK 1"),
    ("bootstrap: second with another storage key", "other key material under the same ids"),
    ("bootstrap: second with another raft key", "other key material under the same ids"),
    ("rotate: the proposer's dek_id differs", "registers its proposer for DEK 1"),
    ("rotate: unknown purpose 0xfe", "unknown purpose 0xfe"),
    ("rotate: id taken by another key", "key id 1 already stands for another key"),
    ("rotate: key already held under another id", "is the same key as DEK 1"),
    ("rotate: active storage key becomes a raft key", "contradictory sidecar"),
    ("storage cutover: one byte wrapped", "carries 1 bytes of key material"),
    ("raft cutover: purpose storage", "has purpose storage"),
    ("retire-dek: not supported", "not supported by this build"),
])
def test_the_reason_is_named(name: str, reason: str, node: KeyNode) -> None:
    entry, error = REFUSED[name]
    with pytest.raises(error, match=reason):
        node.apply(20, entry)


@pytest.mark.parametrize("tag", [0x00, 0x06, 0x7F, 0xFF])
def test_an_unknown_sub_tag_stops_before_the_rules(tag: int, node: KeyNode) -> None:
    before = node.state()
    encoded = bytearray(encode_entry(rotate()))
    assert encoded[0] == Opcode.ROTATION
    encoded[2] = tag
    with pytest.raises(WireError):
        node.apply(20, decode_rotation(bytes(encoded)))
    assert node.state() == before


def decode_rotation(data: bytes) -> Rotation:
    entry = decode_entry(data)
    if not isinstance(entry, Rotation):
        raise TypeError("not a rotation")
    return entry


BEFORE_BOOTSTRAP: dict[str, tuple[EncryptionEntry, type[ApplyHalted]]] = {
    "rotate-dek": (rotate(), EntryRejected),
    "storage cutover": (storage_cutover(), EntryRejected),
    "raft cutover": (raft_cutover(), EntryRejected),
    "bootstrap with identical ids": (bootstrap(raft_id=STORAGE), EntryRejected),
    "bootstrap with id 0": (bootstrap(storage_id=0), EntryRejected),
    "bootstrap with one key for both": (bootstrap(wrapped_raft=W_STORAGE_AGAIN), EntryRejected),
    "bootstrap with a foreign row": (bootstrap(RegistryRow(99, NODE_A, 0)), EntryRejected),
    "bootstrap with a rollback in its batch": (
        bootstrap(RegistryRow(STORAGE, NODE_A, 2), RegistryRow(STORAGE, NODE_A, 1)),
        EpochRollback),
    "bootstrap with a short storage key": (bootstrap(wrapped_storage=b"x" * 59), EntryRejected),
    "bootstrap with a storage key of another KEK": (
        bootstrap(wrapped_storage=OTHER_KEK.wrap(STORAGE_DEK)), EntryNotApplicable),
    "bootstrap with a raft key of another KEK": (
        bootstrap(wrapped_raft=OTHER_KEK.wrap(FOURTH_DEK)), EntryNotApplicable),
}


@pytest.mark.parametrize("name", BEFORE_BOOTSTRAP)
def test_refused_before_the_bootstrap(name: str, tmp_path: Path) -> None:
    entry, error = BEFORE_BOOTSTRAP[name]
    fresh = KeyNode(tmp_path)
    assert_refused(fresh, 5, entry, error)
    assert fresh.state() == (None, None, (), {})


def writer(node: KeyNode, dek_id: int, full_node_id: int) -> WriterRecord | None:
    value = node.rows.get(row_key(dek_id, full_node_id & 0xFFFF))
    return decode_row_value(value) if value is not None else None


# --- what is accepted ------------------------------------------------------------------------


def test_bootstrap_installs_both_keys_and_registers_the_batch(node: KeyNode) -> None:
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert (sidecar.active_storage, sidecar.active_raft) == (STORAGE, RAFT)
    assert sidecar.raft_applied_index == 10
    assert not sidecar.storage_envelope_active
    assert node.applier.keystore.ids() == (STORAGE, RAFT)
    assert {dek_id: key.purpose for dek_id, key in sidecar.keys.items()} == {
        STORAGE: Purpose.STORAGE, RAFT: Purpose.RAFT}
    assert writer(node, STORAGE, NODE_A) == WriterRecord(NODE_A, 2, 2)
    assert writer(node, STORAGE, NODE_B) == WriterRecord(NODE_B, 0, 0)


def test_a_repeated_bootstrap_only_notes_its_index_and_new_rows(node: KeyNode) -> None:
    before = node.applier.sidecar
    node.apply(20, bootstrap(RegistryRow(RAFT, NODE_B, 1), RegistryRow(STORAGE, NODE_A, 3)))
    after = node.applier.sidecar
    assert before is not None
    assert after is not None
    assert (after.keys, after.active_storage) == (before.keys, before.active_storage)
    assert after.raft_applied_index == 20
    assert writer(node, RAFT, NODE_B) == WriterRecord(NODE_B, 1, 1)
    assert writer(node, STORAGE, NODE_A) == WriterRecord(NODE_A, 2, 3)


def test_a_registration_needs_no_known_dek_and_no_sidecar(tmp_path: Path) -> None:
    fresh = KeyNode(tmp_path)
    fresh.apply(3, Registration(RegistryRow(THIRD, NODE_A, 0)))
    assert writer(fresh, THIRD, NODE_A) == WriterRecord(NODE_A, 0, 0)
    assert fresh.state()[:3] == (None, None, ())


def test_a_registration_does_not_touch_the_sidecar(node: KeyNode) -> None:
    before = node.state()
    node.apply(20, Registration(RegistryRow(STORAGE, NODE_A, 7)))
    assert node.state()[:3] == before[:3]
    assert writer(node, STORAGE, NODE_A) == WriterRecord(NODE_A, 2, 7)


@pytest.mark.parametrize("purpose", list(Purpose))
def test_rotate_activates_the_new_key_and_keeps_the_old(purpose: Purpose, node: KeyNode) -> None:
    node.apply(20, rotate(purpose=purpose, node=NODE_B, epoch=4))
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert sidecar.active(purpose) == THIRD
    assert node.applier.keystore.ids() == (STORAGE, RAFT, THIRD)
    assert sidecar.keys[THIRD].purpose is purpose
    assert sidecar.keys[THIRD].local_epoch == 0
    assert sidecar.raft_applied_index == 20
    assert writer(node, THIRD, NODE_B) == WriterRecord(NODE_B, 4, 4)


def test_rotating_back_to_an_old_key_keeps_its_local_epoch(node: KeyNode) -> None:
    node.applier.set_local_epoch(STORAGE, 9)
    node.apply(20, rotate())
    node.apply(21, rotate(STORAGE, W_STORAGE_AGAIN, epoch=2))
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert sidecar.active_storage == STORAGE
    assert sidecar.keys[STORAGE].local_epoch == 9
    assert sidecar.keys[STORAGE].wrapped == W_STORAGE_AGAIN


def test_a_key_that_is_not_active_may_change_its_purpose(node: KeyNode) -> None:
    node.apply(20, rotate())
    node.apply(21, rotate(STORAGE, W_STORAGE, purpose=2, epoch=2))
    sidecar, handle = node.applier.sidecar, node.applier.keystore.get(STORAGE)
    assert sidecar is not None
    assert handle is not None
    assert (sidecar.active_storage, sidecar.active_raft) == (THIRD, STORAGE)
    assert sidecar.keys[STORAGE].purpose is handle.purpose is Purpose.RAFT


def test_the_storage_cutover_happens_once(node: KeyNode) -> None:
    node.apply(20, storage_cutover(epoch=3))
    node.apply(21, storage_cutover(node=NODE_B, epoch=1))
    node.apply(22, rotate())
    node.apply(23, storage_cutover(STORAGE, epoch=9))
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert sidecar.storage_envelope_active
    assert sidecar.storage_envelope_cutover_index == 20
    assert sidecar.raft_applied_index == 23
    assert sidecar.raft_envelope_cutover_index == 0
    assert writer(node, STORAGE, NODE_A) == WriterRecord(NODE_A, 2, 3)
    assert writer(node, STORAGE, NODE_B) == WriterRecord(NODE_B, 0, 0)


def test_the_raft_cutover_happens_once(node: KeyNode) -> None:
    node.apply(20, raft_cutover(epoch=3))
    node.apply(21, raft_cutover(node=NODE_B))
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert sidecar.raft_envelope_cutover_index == 20
    assert sidecar.raft_applied_index == 21
    assert not sidecar.storage_envelope_active
    assert writer(node, RAFT, NODE_B) is None


def test_every_transition_of_a_cutover_is_taken(node: KeyNode,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    walked = Walked(CUTOVER_TRANSITIONS)
    monkeypatch.setattr(lifecycle, "CUTOVER_TRANSITIONS", walked)
    for index, dek_id in enumerate((RAFT, STORAGE, STORAGE, RAFT), 20):
        node.apply(index, storage_cutover(dek_id, epoch=index))
    assert walked.keys_not_taken() == set()


@pytest.mark.parametrize("entry", [
    pytest.param(storage_cutover(RAFT, epoch=9), id="storage"),
    pytest.param(raft_cutover(STORAGE, epoch=9), id="raft"),
    pytest.param(storage_cutover(THIRD, epoch=9), id="unknown DEK"),
    pytest.param(raft_cutover(STORAGE, node=TWIN_OF_A, epoch=0), id="with a row that would fail"),
])
def test_a_stale_cutover_only_notes_its_index(entry: Rotation, node: KeyNode) -> None:
    before = node.state()
    node.apply(20, entry)
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert sidecar.raft_applied_index == 20
    assert not sidecar.storage_envelope_active
    assert sidecar.raft_envelope_cutover_index == 0
    assert node.state()[2:] == before[2:]


# --- replicas agree --------------------------------------------------------------------------

_ID = st.sampled_from((STORAGE, RAFT, THIRD, 4))
_WRAPPED = st.sampled_from((W_STORAGE, W_STORAGE_AGAIN, W_RAFT, W_THIRD, W_FOURTH))
_OWN_WRAPPED = {STORAGE: W_STORAGE, RAFT: W_RAFT, THIRD: W_THIRD, 4: W_FOURTH}
_NODE = st.sampled_from((NODE_A, NODE_B, TWIN_OF_A))
_EPOCH = st.integers(0, 3)
_ROW = st.builds(RegistryRow, _ID, _NODE, _EPOCH)
_ENTRY = st.one_of(
    st.builds(Registration, _ROW),
    st.builds(lambda rows: bootstrap(*rows), st.lists(_ROW, max_size=3)),
    st.builds(lambda wrapped, rows: bootstrap(*rows, wrapped_storage=wrapped), _WRAPPED,
              st.lists(_ROW, max_size=2)),
    st.builds(lambda dek_id, purpose, node, epoch: rotate(
        dek_id, _OWN_WRAPPED[dek_id], purpose=purpose, node=node, epoch=epoch),
        _ID, st.sampled_from((1, 2)), _NODE, _EPOCH),
    st.builds(lambda dek_id, wrapped: rotate(dek_id, wrapped), _ID, _WRAPPED),
    st.builds(lambda dek_id, node, epoch: storage_cutover(dek_id, node=node, epoch=epoch),
              _ID, _NODE, _EPOCH),
    st.builds(lambda dek_id, node, epoch: raft_cutover(dek_id, node=node, epoch=epoch),
              _ID, _NODE, _EPOCH))


def outcome(node: KeyNode, index: int, entry: EncryptionEntry) -> str:
    before = node.state()
    try:
        node.apply(index, entry)
    except ApplyHalted as error:
        assert node.state() == before
        return f"{type(error).__name__}: {error}"
    return "ok"


@settings(max_examples=60)
@given(st.lists(_ENTRY, max_size=12))
def test_replicas_agree_whatever_their_clocks_and_restarts(entries: list[EncryptionEntry]) -> None:
    """One node runs through; the other has another clock and restarts before every entry."""
    with tempfile.TemporaryDirectory() as steady_path, tempfile.TemporaryDirectory() as other_path:
        steady = KeyNode(Path(steady_path))
        restarted = KeyNode(Path(other_path), created="1999-12-31T23:59:59Z")
        for index, entry in enumerate((bootstrap(), *entries), start=1):
            restarted.restart()
            assert outcome(steady, index, entry) == outcome(restarted, index, entry)
            assert steady.rows == restarted.rows
            left, right = steady.applier.sidecar, restarted.applier.sidecar
            assert left is not None
            assert right is not None
            assert left.encode().replace(b"2026-01-02T03:04:05Z", b"") == \
                right.encode().replace(b"1999-12-31T23:59:59Z", b"")
            assert tuple(sorted(left.keys)) == steady.applier.keystore.ids() \
                == restarted.applier.keystore.ids()
            assert all(KEK.unwrap_handle(key.wrapped, dek_id, key.purpose).same_key(handle)
                       for dek_id, key in left.keys.items()
                       if (handle := steady.applier.keystore.get(dek_id)) is not None)
