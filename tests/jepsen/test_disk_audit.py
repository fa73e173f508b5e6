"""The audits find a nonce used twice and replicas that differ, and say unknown when there was
nothing to look at."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from elastickv.clock import pack_timestamp
from elastickv.crypto.cipher import seal_raft
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import KeyHandle, Purpose
from elastickv.durable import OsDisk
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar, SidecarKey
from elastickv.raft import records
from elastickv.raft.segment import SegmentHeader, segment_name
from elastickv.store import gc
from elastickv.store.header import TOMBSTONE_BIT
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc_store import Store, encode_number
from elastickv.store.tables import Table, WriteBatch
from elastickv.store.values import plain_record, seal_record, tombstone_record
from elastickv.wire import (
    OP_PUT,
    Registration,
    RegistryRow,
    Reservation,
    Rotation,
    RotationTag,
    WriteOp,
    WriteRequest,
    Writes,
    encode_entry,
)
from jepsen.disk_audit import (
    NodeDisk,
    RecordFile,
    audit_compaction,
    audit_nonces,
    audit_replicas,
    audit_versions,
    unwrapped_keys,
)
from jepsen.nonces import NonceLedger
from jepsen.tap import JournalTap
from jepsen.verdict import Validity

STORAGE_ID, RAFT_ID = 7, 8
CUTOVER = 10
SALT = 0x5EED


class Fixture:
    """One node's data directory, written with the node's own codecs."""

    def __init__(self, root: Path, name: str, kek: Kek, wrapped: Sequence[bytes]) -> None:
        self.disk = NodeDisk(name, root / name)
        self.storage = kek.unwrap_handle(wrapped[0], STORAGE_ID, Purpose.STORAGE)
        self.raft = kek.unwrap_handle(wrapped[1], RAFT_ID, Purpose.RAFT)
        (self.disk.directory / "raft").mkdir(parents=True)
        path = self.disk.directory / RELATIVE_PATH
        path.parent.mkdir()
        sidecar_file.store(OsDisk(), path, Sidecar(
            raft_applied_index=CUTOVER, storage_envelope_active=True,
            storage_envelope_cutover_index=CUTOVER - 1, raft_envelope_cutover_index=CUTOVER,
            active_storage=STORAGE_ID, active_raft=RAFT_ID, keys={
                STORAGE_ID: SidecarKey(Purpose.STORAGE, wrapped[0], "2024-01-01T00:00:00Z"),
                RAFT_ID: SidecarKey(Purpose.RAFT, wrapped[1], "2024-01-01T00:00:00Z")}))

    def entry(self, number: int, *, key: bytes = b"key", value: bytes = b"value") -> bytes:
        """A write whose value is sealed with nonce `number`."""
        record = seal_record(self.storage, nonce(number), key, number, value)
        return encode_entry(Writes([WriteRequest(number, [WriteOp(OP_PUT, key, record)], [])]))

    def sealed_entry(self, number: int, **options: bytes) -> bytes:
        """The same inside a raft envelope with the same nonce, which is another key's."""
        return seal_raft(self.raft, nonce(number), self.entry(number, **options))

    def write_journal(self, payloads: dict[int, bytes], name: int = 1,
                      terms: Mapping[int, int] = MappingProxyType({})) -> Path:
        """The terms are 1 but for those of `terms`, by index."""
        path = self.disk.directory / "raft" / segment_name(name)
        path.write_bytes(SegmentHeader(name, 0, SALT).encode() + b"".join(
            records.encode(index, terms.get(index, 1), b"\0" + payload, 0, SALT)
            for index, payload in payloads.items()))
        return path

    def write_store(self, versions: Sequence[tuple[bytes, int, bytes]],
                    applied_index: int = 20) -> None:
        store = Store.open(LmdbBackend(self.disk.directory / "store"))
        store.apply_group(applied_index, [
            (key, at, seal_record(self.storage, nonce(at), key, at, value))
            for key, at, value in versions])
        store.flush_now()
        store.close()


    def write_facts(self, **facts: int) -> None:
        backend = LmdbBackend(self.disk.directory / "store")
        backend.write(WriteBatch(puts={Table.META: sorted(
            (name.encode(), encode_number(value)) for name, value in facts.items())}))
        backend.close()

    def delete(self, key: bytes, at: int) -> None:
        store = Store.open(LmdbBackend(self.disk.directory / "store"))
        store.apply_group(store.applied_index + 1, [(key, at, tombstone_record())])
        store.flush_now()
        store.close()


def nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


@pytest.fixture
def kek() -> Kek:
    return Kek(os.urandom(32))


@pytest.fixture
def wrapped(kek: Kek) -> list[bytes]:
    return [kek.generate_wrapped_dek(), kek.generate_wrapped_dek()]


@pytest.fixture
def node(tmp_path: Path, kek: Kek, wrapped: list[bytes]) -> Fixture:
    return Fixture(tmp_path, "n1", kek, wrapped)


# --- nonces ----------------------------------------------------------------------------------


def test_the_same_envelope_in_many_places_is_no_reuse(node: Fixture, kek: Kek) -> None:
    sealed = node.sealed_entry(30)
    node.write_journal({5: node.entry(4), CUTOVER + 1: sealed, CUTOVER + 2: node.sealed_entry(31)})
    copy = node.disk.directory.with_name("n2")
    shutil.copytree(node.disk.directory, copy)
    verdict = audit_nonces([node.disk, NodeDisk("n2", copy)], [], kek)
    assert verdict.validity is Validity.VALID, verdict.problems
    assert verdict.facts["distinct_nonces"] == 5
    assert verdict.facts["envelopes"] == 10


def test_finds_a_storage_nonce_used_twice_before_the_cutover(node: Fixture, kek: Kek) -> None:
    node.write_journal({2: node.entry(4, value=b"one"), 3: node.entry(4, value=b"two")})
    verdict = audit_nonces([node.disk], [], kek)
    assert verdict.validity is Validity.INVALID
    assert f"under key {STORAGE_ID}" in verdict.problems[0]


def test_finds_a_storage_nonce_used_twice_inside_raft_envelopes(node: Fixture, kek: Kek) -> None:
    inner = [node.entry(4, value=b"one"), node.entry(4, value=b"two")]
    node.write_journal({CUTOVER + n: seal_raft(node.raft, nonce(50 + n), entry)
                        for n, entry in enumerate(inner, start=1)})
    verdict = audit_nonces([node.disk], [], kek)
    assert verdict.validity is Validity.INVALID
    assert f"under key {STORAGE_ID}" in verdict.problems[0]


@pytest.mark.parametrize(("term", "validity"), [
    (3, Validity.VALID), (4, Validity.INVALID), (5, Validity.INVALID)])
def test_who_knows_of_the_cutover_seals_what_follows(node: Fixture, kek: Kek, term: int,
                                                     validity: Validity) -> None:
    """A leader of an earlier term, deposed before the cutover committed, did not know of it."""
    cutover = encode_entry(Rotation(RotationTag.ENABLE_RAFT_ENVELOPE, RAFT_ID, 2, b"",
                                    RegistryRow(RAFT_ID, 1, 1)))
    numbers = {CUTOVER + 2: encode_entry(Reservation(RAFT_ID, 1, 1, 9)),
               CUTOVER + 3: encode_entry(Registration(RegistryRow(RAFT_ID, 1, 2)))}
    node.write_journal({CUTOVER: cutover, CUTOVER + 1: node.sealed_entry(31), **numbers},
                       terms={CUTOVER: 4, CUTOVER + 1: 5, CUTOVER + 2: 5, CUTOVER + 3: 5})
    node.write_journal({CUTOVER + 1: node.entry(30)}, name=CUTOVER + 1, terms={CUTOVER + 1: term})
    verdict = audit_nonces([node.disk], [], kek)
    assert verdict.validity is validity
    assert [f"entry {CUTOVER + 1} of term {term} is in the clear" in problem
            for problem in verdict.problems] == [True] * (validity is Validity.INVALID)


def test_finds_a_raft_nonce_used_twice_on_two_disks(node: Fixture, tmp_path: Path, kek: Kek,
                                                    wrapped: list[bytes]) -> None:
    other = Fixture(tmp_path, "n2", kek, wrapped)
    node.write_journal({CUTOVER + 1: seal_raft(node.raft, nonce(9), node.entry(1))})
    other.write_journal({CUTOVER + 1: seal_raft(node.raft, nonce(9), node.entry(2))})
    assert audit_nonces([node.disk], [], kek).is_valid
    verdict = audit_nonces([node.disk, other.disk], [], kek)
    assert verdict.validity is Validity.INVALID
    assert f"under key {RAFT_ID}" in verdict.problems[0]


def test_finds_a_nonce_that_only_the_store_repeats(node: Fixture, kek: Kek) -> None:
    node.write_journal({2: node.entry(40, key=b"key", value=b"one")})
    node.write_store([(b"other", 40, b"two")])
    assert audit_nonces([node.disk], [], kek).validity is Validity.INVALID


def test_a_payload_that_does_not_open_leaves_it_unknown(node: Fixture, kek: Kek) -> None:
    foreign = KeyHandle(99, Purpose.RAFT, os.urandom(32))
    node.write_journal({CUTOVER + 1: node.sealed_entry(1),
                        CUTOVER + 2: seal_raft(foreign, nonce(2), node.entry(2))})
    verdict = audit_nonces([node.disk], [], kek)
    assert verdict.validity is Validity.UNKNOWN
    assert "could not be opened" in verdict.problems[0]


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xff
    path.write_bytes(data)


def add(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


FIRST, LAST = segment_name(1), segment_name(4)
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "whole": (lambda raft: None, ""),
    "header of the first segment": (lambda raft: damage(raft / FIRST, 9), "header"),
    "header of the last segment": (lambda raft: damage(raft / LAST, 9), "header"),
    "empty file": (lambda raft: (raft / LAST).write_bytes(b""), "header"),
    "record of the first segment": (lambda raft: damage(raft / FIRST, 80), "damaged at byte 32"),
    "end of the first segment": (lambda raft: cut(raft / FIRST, 1), "damaged at byte"),
    "bytes behind the first segment": (lambda raft: add(raft / FIRST, b"\0"), "damaged at byte"),
    "first record of the last segment": (lambda raft: damage(raft / LAST, 80), "byte 32"),
    "torn end": (lambda raft: cut(raft / LAST, 1), ""),
    "zeros behind the end": (lambda raft: add(raft / LAST, bytes(5000)), ""),
    "an older segment behind the end": (
        lambda raft: add(raft / LAST, records.encode(2, 1, b"\0old", 0, SALT + 1) * 3), ""),
    "no entry": (lambda raft: [path.unlink() for path in raft.iterdir()],
                 "n1: no log entry was read"),
    "no folder": (shutil.rmtree, "n1: no log entry was read"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGES.values(), ids=DAMAGES)
def test_entries_that_could_not_be_read_leave_it_unknown(
        node: Fixture, kek: Kek, harm: Callable[[Path], object], message: str) -> None:
    node.write_journal({index: node.entry(index) for index in (1, 2, 3)})
    node.write_journal({index: node.entry(index) for index in (4, 5, 6)}, name=4)
    node.write_store([(b"key", 40, b"value")])
    harm(node.disk.directory / "raft")
    verdict = audit_nonces([node.disk], [], kek)
    assert verdict.validity is (Validity.UNKNOWN if message else Validity.VALID), verdict
    assert any(message in problem for problem in verdict.problems) or not message


def test_what_could_not_be_read_hides_no_reuse(node: Fixture, kek: Kek) -> None:
    path = node.write_journal({2: node.entry(4, value=b"one"), 3: node.entry(4, value=b"two"),
                               4: node.entry(5), 5: node.entry(6)})
    damage(path, len(path.read_bytes()) - len(records.encode(5, 1, b"\0" + node.entry(6), 0)) - 1)
    assert audit_nonces([node.disk], [], kek).validity is Validity.INVALID


def test_a_node_that_never_ran_has_no_log_to_read(node: Fixture, tmp_path: Path, kek: Kek) -> None:
    node.write_journal({2: node.entry(4)})
    never = NodeDisk("n2", tmp_path / "n2")
    never.directory.mkdir()
    assert audit_nonces([node.disk, never], [], kek).is_valid
    (never.directory / "store").mkdir()
    assert audit_nonces([node.disk, never], [], kek).problems == ("n2: no log entry was read",)
    gone = NodeDisk("n3", tmp_path / "n3")
    assert audit_nonces([node.disk, gone], [], kek).validity is Validity.UNKNOWN


def test_no_envelope_at_all_is_not_a_pass(node: Fixture, kek: Kek) -> None:
    assert audit_nonces([node.disk], [], kek).validity is Validity.UNKNOWN


def test_the_ledger_names_both_places(node: Fixture) -> None:
    ledger = NonceLedger()
    ledger.add(seal_raft(node.raft, nonce(1), b"a"), "first")
    ledger.add(seal_raft(node.raft, nonce(1), b"b"), "second")
    assert "first and second" in ledger.problems[0]
    assert (ledger.reused, ledger.distinct) == (1, 1)


# --- the tap ---------------------------------------------------------------------------------


def test_the_tap_keeps_what_compaction_and_truncation_take_away(node: Fixture, tmp_path: Path,
                                                                kek: Kek) -> None:
    tap = JournalTap({"n1": node.disk.directory}, tmp_path / "taps")
    one, two, three = (node.entry(number) for number in (1, 2, 3))
    path = node.write_journal({2: one, 3: two})
    assert tap.poll("n1") == 2
    assert tap.poll("n1") == 0
    node.write_journal({2: one, 3: three, 4: two})
    assert tap.poll("n1") == 2
    path.unlink()
    assert tap.poll("n1") == 0
    node.write_journal({5: node.entry(5)}, name=5)
    assert tap.poll("n1") == 1
    (spool,) = tap.spools
    assert [record.index for record in RecordFile(spool)] == [2, 3, 3, 4, 5]
    verdict = audit_nonces([node.disk], [spool], kek)
    assert verdict.is_valid
    assert verdict.facts["distinct_nonces"] == 4
    cut(spool, 1)
    verdict = audit_nonces([node.disk], [spool], kek)
    assert verdict.validity is Validity.UNKNOWN
    assert "n1.spool: damaged at byte" in verdict.problems[0]


def test_the_tap_waits_for_a_record_to_be_whole(node: Fixture, tmp_path: Path) -> None:
    tap = JournalTap({"n1": node.disk.directory}, tmp_path / "taps")
    path = node.write_journal({2: node.entry(1), 3: node.entry(2)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert tap.poll("n1") == 1
    path.write_bytes(whole)
    assert tap.poll("n1") == 1


def test_the_tap_survives_a_disk_that_goes_away_under_it(node: Fixture, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    tap = JournalTap({"n1": node.disk.directory}, tmp_path / "taps")
    node.write_journal({2: node.entry(1)})

    def gone(path: Path, pattern: str) -> list[Path]:
        raise FileNotFoundError(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rglob", gone)
        assert tap.poll("n1") == 0
    assert tap.poll("n1") == 1


def test_a_tap_that_ended_early_leaves_the_audit_unknown(node: Fixture, kek: Kek) -> None:
    node.write_journal({2: node.entry(1)})
    assert audit_nonces([node.disk], [], kek).is_valid
    verdict = audit_nonces([node.disk], [], kek, "the journal tap ended early: OSError")
    assert verdict.validity is Validity.UNKNOWN


def test_the_tap_says_why_it_ended_early(node: Fixture, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    tap = JournalTap({"n1": node.disk.directory}, tmp_path / "taps")
    broken = threading.Event()

    def fail(name: str) -> int:
        broken.set()
        raise PermissionError(name)

    with monkeypatch.context() as patch:
        patch.setattr(tap, "poll", fail)
        tap.start()
        assert broken.wait(30)
    tap.stop()
    assert "PermissionError: n1" in tap.error


# --- keys ------------------------------------------------------------------------------------


def test_the_keys_of_every_sidecar_that_can_be_read(node: Fixture, tmp_path: Path, kek: Kek,
                                                    wrapped: list[bytes]) -> None:
    damaged = Fixture(tmp_path, "n2", kek, wrapped)
    (damaged.disk.directory / RELATIVE_PATH).write_bytes(b"{")
    disks = [NodeDisk("n3", tmp_path / "n3"), damaged.disk, node.disk]
    assert unwrapped_keys(disks, kek) == {
        f"DEK {STORAGE_ID}": kek.unwrap(wrapped[0]), f"DEK {RAFT_ID}": kek.unwrap(wrapped[1])}


# --- replicas --------------------------------------------------------------------------------


def test_replicas_are_compared_by_their_newest_versions(tmp_path: Path, kek: Kek,
                                                        wrapped: list[bytes]) -> None:
    one, two = (Fixture(tmp_path, name, kek, wrapped) for name in ("n1", "n2"))
    one.write_store([(b"a", 3, b"old"), (b"a", 5, b"new"), (b"b", 4, b"v")])
    two.write_store([(b"a", 5, b"new"), (b"b", 4, b"v")])
    assert audit_replicas([one.disk, two.disk]).problems == (
        "1 versions or tombstones are not in both n1 and n2, first b'a' at 3",)
    two.write_facts(gc_horizon_ts=4)
    assert audit_replicas([one.disk, two.disk]).is_valid
    assert audit_replicas([one.disk]).validity is Validity.UNKNOWN


@pytest.mark.parametrize("versions", [
    [(b"a", 5, b"other"), (b"b", 4, b"v")], [(b"a", 6, b"new"), (b"b", 4, b"v")],
    [(b"a", 5, b"new")], [(b"a", 5, b"new"), (b"b", 4, b"v"), (b"c", 7, b"v")]],
    ids=["value", "timestamp", "missing", "extra"])
def test_replicas_that_differ(tmp_path: Path, kek: Kek, wrapped: list[bytes],
                              versions: list[tuple[bytes, int, bytes]]) -> None:
    one, two = (Fixture(tmp_path, name, kek, wrapped) for name in ("n1", "n2"))
    one.write_store([(b"a", 5, b"new"), (b"b", 4, b"v")], applied_index=21)
    two.write_store(versions)
    verdict = audit_replicas([one.disk, two.disk])
    assert verdict.validity is Validity.INVALID
    assert "keys differ between n1 and n2" in verdict.problems[0]


def test_members_that_were_cut_short_are_not_compared(tmp_path: Path, kek: Kek,
                                                      wrapped: list[bytes]) -> None:
    one, two, gone = (Fixture(tmp_path, name, kek, wrapped) for name in ("n1", "n2", "n3"))
    one.write_store([(b"a", 5, b"new"), (b"b", 4, b"v")], applied_index=21)
    two.write_store([(b"b", 4, b"v")], applied_index=20)
    assert audit_replicas([one.disk, two.disk]).validity is Validity.INVALID
    verdict = audit_replicas([one.disk, two.disk], caught_up=False)
    assert verdict.validity is Validity.UNKNOWN
    assert verdict.problems == ("n2 had applied 20 entries, n1 21",)
    two.write_store([(b"a", 5, b"other")], applied_index=21)
    assert audit_replicas([one.disk, two.disk], caught_up=False).validity is Validity.INVALID
    two.write_store([(b"a", 5, b"new")], applied_index=22)
    verdict = audit_replicas([one.disk, two.disk, gone.disk])
    assert verdict.validity is Validity.UNKNOWN
    assert verdict.problems == ("n3 has no store",)


def test_a_tombstone_that_one_member_has_dropped_is_no_difference(
        tmp_path: Path, kek: Kek, wrapped: list[bytes]) -> None:
    one, two = (Fixture(tmp_path, name, kek, wrapped) for name in ("n1", "n2"))
    one.write_store([(b"a", 3, b"v"), (b"b", 4, b"v")])
    one.delete(b"b", 5)
    two.write_store([(b"a", 3, b"v")])
    two.write_facts(max_commit_ts=5)
    assert audit_replicas([one.disk, two.disk]).problems == (
        "2 versions or tombstones are not in both n1 and n2, first b'b' at 5",)
    two.write_facts(gc_horizon_ts=5)
    assert audit_replicas([one.disk, two.disk]).is_valid


@pytest.mark.parametrize("fact", ["hlc_ceiling", "max_commit_ts", "last_encryption_index",
                                  "raft_cutover_index"])
def test_facts_that_differ(tmp_path: Path, kek: Kek, wrapped: list[bytes], fact: str) -> None:
    one, two = (Fixture(tmp_path, name, kek, wrapped) for name in ("n1", "n2"))
    for each in (one, two):
        each.write_store([(b"a", 5, b"new")])
        each.write_facts(**{fact: 9})
    assert audit_replicas([one.disk, two.disk]).is_valid
    two.write_facts(**{fact: 8})
    assert audit_replicas([one.disk, two.disk]).problems == (
        f"{fact} differs between n1 and n2",)


def test_sidecars_that_differ(tmp_path: Path, kek: Kek, wrapped: list[bytes]) -> None:
    one, two = (Fixture(tmp_path, name, kek, wrapped) for name in ("n1", "n2"))
    for each in (one, two):
        each.write_store([(b"a", 5, b"new")])
    path = two.disk.directory / RELATIVE_PATH
    path.write_bytes(path.read_bytes().replace(
        b'"raft_envelope_cutover_index": 10', b'"raft_envelope_cutover_index": 11'))
    verdict = audit_replicas([one.disk, two.disk])
    assert verdict.validity is Validity.INVALID
    assert "sidecars" in verdict.problems[0]


# --- versions --------------------------------------------------------------------------------


def test_what_is_written_once_is_there_once(node: Fixture, tmp_path: Path, kek: Kek,
                                            wrapped: list[bytes]) -> None:
    other = Fixture(tmp_path, "n2", kek, wrapped)
    for each in (node, other):
        each.write_store([(b"a", 3, b"one"), (b"a", 5, b"two"), (b"b", 4, b"one")])
        each.delete(b"a", 6)
        each.delete(b"a", 7)
    verdict = audit_versions([node.disk, other.disk], kek)
    assert verdict.validity is Validity.VALID, verdict.problems
    assert verdict.facts["versions"] == 10
    other.write_store([(b"a", 8, b"one")], applied_index=30)
    verdict = audit_versions([node.disk, other.disk], kek)
    assert verdict.validity is Validity.INVALID
    assert verdict.problems == ("n2: b'a' was written twice with one value, at 3 and at 8",)


def test_finds_a_version_that_does_not_open(node: Fixture, kek: Kek) -> None:
    store = Store.open(LmdbBackend(node.disk.directory / "store"))
    record = seal_record(node.storage, nonce(3), b"a", 3, b"one")
    store.apply_group(20, [(b"a", 4, record)])  # at another timestamp than it is sealed for
    store.flush_now()
    store.close()
    verdict = audit_versions([node.disk], kek)
    assert verdict.validity is Validity.INVALID
    assert "n1: b'a' at 4 does not open" in verdict.problems[0]


@pytest.mark.parametrize(("dek_id", "how"), [(RAFT_ID, f"sealed under DEK {RAFT_ID}"),
                                             (0, "in the clear")])
def test_finds_a_last_write_that_is_not_sealed_under_the_active_key(node: Fixture, kek: Kek,
                                                                    dek_id: int, how: str) -> None:
    node.write_store([(b"a", 3, b"one")])
    store = Store.open(LmdbBackend(node.disk.directory / "store"))
    store.apply_group(30, [(b"b", 4, seal_record(node.raft, nonce(4), b"b", 4, b"two") if dek_id
                            else plain_record(b"two"))])
    store.flush_now()
    store.close()
    assert audit_versions([node.disk], kek).problems == (
        f"n1: the last write, b'b' at 4, is {how}, and DEK {STORAGE_ID} is active",)
    assert audit_versions([node.disk], kek, ended=False).is_valid


def test_versions_that_cannot_be_read_are_unknown(node: Fixture, kek: Kek) -> None:
    assert audit_versions([node.disk], kek).problems == ("n1 has no store",)
    node.write_store([(b"a", 3, b"one")])
    (node.disk.directory / RELATIVE_PATH).write_bytes(b"{")
    assert audit_versions([node.disk], kek).validity is Validity.UNKNOWN


# --- compaction ------------------------------------------------------------------------------


@pytest.fixture
def history(node: Fixture) -> Fixture:
    """Keys that were written over, deleted, and deleted late."""
    times = [pack_timestamp(second * 1000) for second in range(1, 7)]
    node.write_store([(key, at, b"%d" % at) for key in (b"a", b"b", b"c") for at in times[:4]])
    node.delete(b"b", times[2] + 1)
    node.delete(b"c", times[5])
    return node


def test_compaction_changes_nothing_that_can_be_read(history: Fixture) -> None:
    verdict = audit_compaction([history.disk])
    assert verdict.validity is Validity.VALID, verdict.problems
    assert verdict.facts["removed"] == 12
    assert audit_compaction([history.disk]).facts == verdict.facts  # that was a copy


def keep_what_tombstones_hide(versions: Sequence[gc.StoredVersion], horizon_ts: int, *,
                              complete: bool = True) -> Sequence[gc.StoredVersion]:
    return [version for version in versions if version.commit_ts <= horizon_ts
            and version.header[0] & TOMBSTONE_BIT]


def drop_one_more(versions: Sequence[gc.StoredVersion], horizon_ts: int, *,
                  complete: bool = True) -> Sequence[gc.StoredVersion]:
    return [version for version in versions if version.commit_ts <= horizon_ts]


@pytest.mark.parametrize("removable", [keep_what_tombstones_hide, drop_one_more])
def test_finds_a_compaction_that_changes_what_is_read(
        history: Fixture, monkeypatch: pytest.MonkeyPatch,
        removable: Callable[..., Sequence[gc.StoredVersion]]) -> None:
    monkeypatch.setattr(gc, "removable", removable)
    verdict = audit_compaction([history.disk])
    assert verdict.validity is Validity.INVALID
    assert "what compaction up to" in verdict.problems[0]


def test_a_store_that_is_missing_leaves_compaction_unknown(node: Fixture, tmp_path: Path) -> None:
    verdict = audit_compaction([NodeDisk("n9", tmp_path / "n9")])
    assert verdict.problems == ("n9 has no store",)
    assert verdict.validity is Validity.UNKNOWN
