"""The durable shell: order of effects, a crash at every step, replay, wiring, and loading."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from key_nodes import (
    KEK,
    NODE_A,
    NODE_B,
    OTHER_KEK,
    RAFT,
    STORAGE,
    THIRD,
    W_FOURTH,
    W_STORAGE,
    W_STORAGE_AGAIN,
    KeyNode,
    bootstrap,
    raft_cutover,
    rotate,
    storage_cutover,
)

from elastickv import durable
from elastickv.crypto.keystore import Keystore
from elastickv.durable import OsDisk
from elastickv.errors import (
    DiskFull,
    EncryptionConflict,
    EntryNotApplicable,
    EntryRejected,
    EpochRollback,
    InvalidArgument,
    KekError,
    NotBootstrapped,
    SidecarCorrupt,
)
from elastickv.keys.applier import Applier, utc_now
from elastickv.keys.sidecar import parse
from elastickv.wire import EncryptionEntry, Registration, RegistryRow

ROW_A, ROW_B = RegistryRow(STORAGE, NODE_A, 0), RegistryRow(RAFT, NODE_B, 0)
SEQUENCE: list[tuple[int, EncryptionEntry]] = [
    (10, bootstrap(ROW_A, ROW_B)),
    (11, Registration(RegistryRow(STORAGE, NODE_B, 1))),
    (12, rotate(node=NODE_A, epoch=1)),
    (13, storage_cutover(STORAGE, node=NODE_B, epoch=2)),  # stale: a rotation came first
    (14, storage_cutover(THIRD, node=NODE_B, epoch=2)),
    (15, raft_cutover(RAFT, node=NODE_A, epoch=1)),
    (16, storage_cutover(THIRD, node=NODE_A, epoch=5)),  # repeated
    (17, rotate(4, W_FOURTH, purpose=2, node=NODE_B, epoch=1)),
    (18, Registration(RegistryRow(4, NODE_A, 1))),
]


# --- wiring ----------------------------------------------------------------------------------

PARTS = ("kek", "keystore", "sidecar_path")
INCOMPLETE = [present for size in (1, 2) for present in itertools.combinations(PARTS, size)]


def build(directory: Path, present: tuple[str, ...], rows: dict[bytes, bytes]) -> Applier:
    return Applier(disk=OsDisk(), read_row=rows.get,
                   kek=KEK if "kek" in present else None,
                   keystore=Keystore() if "keystore" in present else None,
                   sidecar_path=directory / "keys.json" if "sidecar_path" in present else None)


def test_there_are_six_incomplete_combinations() -> None:
    assert len(INCOMPLETE) == 6


@pytest.mark.parametrize("present", [*INCOMPLETE, ()], ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("entry", [bootstrap(ROW_A), rotate(), storage_cutover(), raft_cutover()],
                         ids=["bootstrap", "rotate-dek", "storage cutover", "raft cutover"])
def test_partial_wiring_is_refused_without_a_trace(
        present: tuple[str, ...], entry: EncryptionEntry, tmp_path: Path) -> None:
    rows: dict[bytes, bytes] = {}
    applier = build(tmp_path, present, rows)
    for attempt in (applier.validate, applier.apply):
        with pytest.raises(EntryNotApplicable) as caught:
            attempt(10, entry)
        for part, name in zip(PARTS, ("KEK", "keystore", "sidecar path"), strict=True):
            assert (f"no {name}" in caught.value.message) == (part not in present)
        assert caught.value.remedy
    assert applier.sidecar is None
    assert applier.keystore.ids() == ()
    assert list(tmp_path.iterdir()) == []


def test_registrations_apply_without_any_wiring(tmp_path: Path) -> None:
    applier = build(tmp_path, (), {})
    assert len(applier.apply(10, Registration(ROW_A))) == 1


# --- a wrong KEK -----------------------------------------------------------------------------


def test_a_wrong_kek_halts_and_the_right_one_resumes_from_the_same_index(tmp_path: Path) -> None:
    node = KeyNode(tmp_path, kek=OTHER_KEK)
    before = node.state()
    with pytest.raises(EntryNotApplicable, match="does not unwrap") as caught:
        node.apply(10, bootstrap(ROW_A))
    assert "KEK" in caught.value.remedy
    assert node.state() == before == (None, None, (), {})
    node.kek = KEK
    node.restart()
    node.apply(10, bootstrap(ROW_A))
    assert node.applier.keystore.ids() == (STORAGE, RAFT)


def test_a_wrong_kek_at_start_is_refused(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    data = node.file_bytes()
    node.kek = OTHER_KEK
    with pytest.raises(KekError, match="does not unwrap"):
        node.restart()
    node.kek = None
    with pytest.raises(KekError, match="no KEK"):
        node.restart()
    assert node.file_bytes() == data


# --- order of effects and crashes ------------------------------------------------------------


class Crash(BaseException):
    """The process is gone; nothing in the product catches this."""


class FaultyOs:
    """Stands in for `os` in `elastickv.durable`: records the calls that change the disk, and raises
    before (or, with `late`, after) the one numbered `fail_at`."""

    CALLS = ("open", "write", "fsync", "replace", "unlink", "close")

    def __init__(self, fail_at: int = -1, error: Callable[[], BaseException] = Crash, *,
                 late: bool = False) -> None:
        self.calls: list[tuple[str, str]] = []
        self._fail_at = fail_at
        self._error = error
        self._late = late
        self._names: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._recording(name, real) if name in self.CALLS else real

    def _recording(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            target = arguments[0]
            subject = self._names.get(target, "") if isinstance(target, int) else Path(target).name
            self.calls.append((name, subject))
            fails = len(self.calls) - 1 == self._fail_at
            if fails and not self._late:
                raise self._error()
            result = real(*arguments)
            if name == "open":
                self._names[result] = subject
            if fails:
                raise self._error()
            return result
        return call


def test_the_sidecar_write_is_durable_in_this_order(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    recorder = FaultyOs()
    monkeypatch.setattr(durable, "os", recorder)
    node.apply(11, rotate())
    assert [call for call in recorder.calls if call[0] != "close"] == [
        ("open", "keys.json.tmp"), ("write", "keys.json.tmp"), ("fsync", "keys.json.tmp"),
        ("replace", "keys.json.tmp"), ("open", "encryption"), ("fsync", "encryption")]


def count_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    node = KeyNode(tmp_path / "count")
    node.apply(10, bootstrap())
    recorder = FaultyOs()
    with monkeypatch.context() as patched:
        patched.setattr(durable, "os", recorder)
        node.apply(11, rotate())
    return len(recorder.calls)


@pytest.mark.parametrize("late", [False, True], ids=["before the call", "after the call"])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_state(
        late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached_new = []
    for step in range(count_calls(tmp_path, monkeypatch)):
        node = KeyNode(tmp_path / str(step))
        node.apply(10, bootstrap(ROW_A))
        old = node.state()
        with monkeypatch.context() as patched:
            patched.setattr(durable, "os", FaultyOs(step, late=late))
            with pytest.raises(Crash):
                node.apply(11, rotate())
        # Memory never runs ahead of the disk, and the caller got no rows to store.
        assert (node.applier.sidecar, node.applier.keystore.ids()) == (old[0], (STORAGE, RAFT))
        assert node.rows == old[3]
        node.restart()
        reached_new.append(node.applier.sidecar != old[0])
        node.apply(11, rotate())
        sidecar = node.applier.sidecar
        assert sidecar is not None
        assert (sidecar.active_storage, sidecar.raft_applied_index) == (THIRD, 11)
        assert node.applier.keystore.ids() == (STORAGE, RAFT, THIRD)
        assert len(node.rows) == 2
    assert reached_new == sorted(reached_new)  # once renamed, never back
    assert not reached_new[0]
    assert reached_new[-1]


def test_a_full_disk_changes_nothing_and_apply_can_go_on_later(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap(ROW_A))
    before = node.state()

    def no_space() -> OSError:
        return OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "os", FaultyOs(1, no_space))
        with pytest.raises(DiskFull):
            node.apply(11, rotate())
    assert node.state() == before
    node.apply(11, rotate())
    assert node.applier.keystore.ids() == (STORAGE, RAFT, THIRD)


# --- replay ----------------------------------------------------------------------------------


def test_every_pair_of_store_and_sidecar_positions_ends_in_the_same_state(tmp_path: Path) -> None:
    first = KeyNode(tmp_path / "first")
    rows_at, file_at = [dict(first.rows)], [first.file_bytes()]
    for index, entry in SEQUENCE:
        first.apply(index, entry)
        rows_at.append(dict(first.rows))
        file_at.append(first.file_bytes())
    for store_step, sidecar_step in itertools.combinations_with_replacement(
            range(len(SEQUENCE) + 1), 2):
        again = KeyNode(tmp_path / f"{store_step}-{sidecar_step}")
        again.rows = dict(rows_at[store_step])
        data = file_at[sidecar_step]
        if data is not None:
            again.path.parent.mkdir(parents=True)
            again.path.write_bytes(data)
        again.restart()
        for index, entry in SEQUENCE[store_step:]:
            again.apply(index, entry)
        assert again.file_bytes() == first.file_bytes()
        assert again.rows == first.rows
        assert again.applier.keystore.ids() == first.applier.keystore.ids()


def test_a_replay_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = KeyNode(tmp_path)
    for index, entry in SEQUENCE:
        node.apply(index, entry)
    node.restart()
    node.rows.clear()
    recorder = FaultyOs()
    monkeypatch.setattr(durable, "os", recorder)
    for index, entry in SEQUENCE:
        node.apply(index, entry)
    assert recorder.calls == []


def test_validation_never_takes_a_proposal_for_a_replay(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    for index in (0, 1, 10):
        with pytest.raises(EntryRejected):
            node.applier.validate(index, bootstrap(raft_id=THIRD))


def test_a_sidecar_that_claims_an_entry_without_its_key_is_refused(tmp_path: Path) -> None:
    """A damaged `raft_applied_index` must not make a rotation look as if it had been applied."""
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    sidecar = node.applier.sidecar
    assert sidecar is not None
    node.path.write_bytes(replace(sidecar, raft_applied_index=99).encode())
    node.restart()
    before = node.state()
    with pytest.raises(SidecarCorrupt, match="claims entry 20"):
        node.apply(20, rotate())
    assert node.state() == before


ROTATED = [(10, bootstrap()), (20, rotate()), (30, rotate(4, W_FOURTH, purpose=2))]


@pytest.mark.parametrize(("one", "other", "index"), [
    (STORAGE, RAFT, 10), (STORAGE, THIRD, 10), (RAFT, 4, 10), (THIRD, 4, 20)])
def test_a_sidecar_whose_keys_changed_places_is_refused(tmp_path: Path, one: int, other: int,
                                                        index: int) -> None:
    """Each is a key of the log, and unwraps: under the other id its nonces would come again."""
    node = KeyNode(tmp_path)
    for at, entry in ROTATED:
        node.apply(at, entry)
    sidecar = node.applier.sidecar
    assert sidecar is not None
    wrapped = {one: sidecar.keys[other].wrapped, other: sidecar.keys[one].wrapped}
    for dek_id, swapped in wrapped.items():
        sidecar = sidecar.with_key(dek_id, replace(sidecar.keys[dek_id], wrapped=swapped))
    node.path.write_bytes(sidecar.encode())
    node.restart()
    node.rows.clear()
    for at, entry in ROTATED:
        if at < index:
            node.apply(at, entry)
    before = node.state()
    with pytest.raises(SidecarCorrupt, match=f"claims entry {index}"):
        node.apply(index, dict(ROTATED)[index])
    assert node.state() == before


def test_a_key_that_was_wrapped_again_later_is_no_other_key(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    sequence = [(10, bootstrap()), (20, rotate()), (30, rotate(STORAGE, W_STORAGE_AGAIN, epoch=1))]
    for at, entry in sequence:
        node.apply(at, entry)
    node.restart()
    rows, before = dict(node.rows), node.file_bytes()
    node.rows.clear()
    for at, entry in sequence:
        node.apply(at, entry)
    assert (node.rows, node.file_bytes()) == (rows, before)


def test_a_replayed_key_of_another_kek_is_not_judged(tmp_path: Path) -> None:
    """Which of the two is wrong is not known: the KEK unwraps the sidecar's and not the log's."""
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    with pytest.raises(EntryNotApplicable, match="does not unwrap"):
        node.apply(10, bootstrap(wrapped_storage=OTHER_KEK.wrap(bytes(32))))


# --- epochs ----------------------------------------------------------------------------------


def test_an_epoch_is_durable_when_it_is_set(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    node.applier.set_local_epoch(STORAGE, 5)
    node.restart()
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert (sidecar.keys[STORAGE].local_epoch, sidecar.keys[RAFT].local_epoch) == (5, 0)
    assert sidecar.raft_applied_index == 10


def test_an_epoch_survives_later_entries(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    node.applier.set_local_epoch(STORAGE, 5)
    node.apply(11, bootstrap())
    node.apply(12, storage_cutover())
    sidecar = node.applier.sidecar
    assert sidecar is not None
    assert sidecar.keys[STORAGE].local_epoch == 5


def test_an_epoch_never_goes_back(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    node.applier.set_local_epoch(STORAGE, 5)
    before = node.state()
    node.applier.set_local_epoch(STORAGE, 5)
    with pytest.raises(EpochRollback):
        node.applier.set_local_epoch(STORAGE, 4)
    assert node.state() == before


@pytest.mark.parametrize("epoch", [-1, 0x1_0000])
def test_an_epoch_has_16_bits(epoch: int, tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    with pytest.raises(InvalidArgument):
        node.applier.set_local_epoch(STORAGE, epoch)


def test_an_epoch_needs_a_known_dek(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    with pytest.raises(NotBootstrapped):
        node.applier.set_local_epoch(STORAGE, 1)
    node.apply(10, bootstrap())
    with pytest.raises(NotBootstrapped):
        node.applier.set_local_epoch(THIRD, 1)


# --- loading and adopting --------------------------------------------------------------------


def test_load_without_a_file_or_without_a_path_is_not_bootstrapped(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.restart()
    assert node.applier.sidecar is None
    unwired = build(tmp_path, (), {})
    unwired.load()
    assert unwired.sidecar is None


def test_load_refuses_a_damaged_file(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    node.path.write_bytes(node.path.read_bytes()[:-1])
    with pytest.raises(SidecarCorrupt):
        node.restart()


def test_adopt_takes_the_keys_and_keeps_its_own_epochs(tmp_path: Path) -> None:
    leader, follower = KeyNode(tmp_path / "leader"), KeyNode(tmp_path / "follower")
    for node in (leader, follower):
        node.apply(10, bootstrap())
    leader.apply(11, rotate())
    leader.applier.set_local_epoch(STORAGE, 50)
    leader.applier.set_local_epoch(THIRD, 60)
    follower.applier.set_local_epoch(STORAGE, 7)
    theirs = leader.applier.sidecar
    assert theirs is not None
    follower.applier.adopt(theirs)
    follower.restart()
    adopted = follower.applier.sidecar
    assert adopted is not None
    assert adopted.raft_applied_index == 11
    assert adopted.active_storage == THIRD
    assert {dek_id: key.local_epoch for dek_id, key in adopted.keys.items()} == {
        STORAGE: 7, RAFT: 0, THIRD: 0}
    assert follower.applier.keystore.ids() == (STORAGE, RAFT, THIRD)


def test_adopt_refuses_another_key_under_a_known_id(tmp_path: Path) -> None:
    node, stranger = KeyNode(tmp_path / "node"), KeyNode(tmp_path / "stranger")
    node.apply(10, bootstrap())
    stranger.apply(10, bootstrap(wrapped_storage=W_FOURTH))
    before = node.state()
    theirs = stranger.applier.sidecar
    assert theirs is not None
    with pytest.raises(EncryptionConflict):
        node.applier.adopt(theirs)
    assert node.state() == before


def test_adopt_refuses_what_does_not_unwrap_or_contradicts_itself(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    mine = node.applier.sidecar
    assert mine is not None
    before = node.state()
    foreign_key = replace(mine.keys[STORAGE], wrapped=OTHER_KEK.wrap(bytes(32)))
    with pytest.raises(KekError):
        node.applier.adopt(mine.with_key(STORAGE, foreign_key))
    with pytest.raises(SidecarCorrupt):
        node.applier.adopt(replace(mine, active_storage=THIRD))
    assert node.state() == before


def test_the_creation_time_is_recorded_and_kept(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    node.created = "2030-01-01T00:00:00Z"
    node.apply(11, bootstrap())
    node.apply(12, rotate())
    sidecar = parse(node.path.read_bytes())
    assert [sidecar.keys[dek_id].created for dek_id in (STORAGE, THIRD)] == [
        "2026-01-02T03:04:05Z", "2030-01-01T00:00:00Z"]


def test_the_default_clock_writes_rfc_3339() -> None:
    assert len(utc_now()) == len("2026-01-02T03:04:05Z")
    assert utc_now().endswith("Z")


def test_no_file_holds_an_unwrapped_key(tmp_path: Path) -> None:
    node = KeyNode(tmp_path)
    node.apply(10, bootstrap())
    dek = KEK.unwrap(W_STORAGE)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert dek not in path.read_bytes()


def test_every_unwrapping_is_timed(tmp_path: Path) -> None:
    seconds: list[float] = []

    def open_() -> Applier:
        return Applier(disk=OsDisk(), read_row=lambda _: None, kek=KEK, keystore=Keystore(),
                       sidecar_path=tmp_path / "keys.json", on_unwrap=seconds.append)

    open_().apply(10, bootstrap(ROW_A, ROW_B))
    assert len(seconds) == 2, "both DEKs of the bootstrap"
    open_().load()
    assert len(seconds) == 4, "both again at start"
    assert all(each > 0 for each in seconds)
