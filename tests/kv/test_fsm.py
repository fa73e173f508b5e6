"""The state machine on a real store and a real applier: what an entry does, entry by entry."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from itertools import count as count_up
from pathlib import Path
from typing import Any

import pytest

from elastickv.clock import FakeClock
from elastickv.crypto.cipher import seal_raft
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.errors import (
    ApplyHalted,
    ConditionFailed,
    DiskFull,
    IntegrityError,
    StorageEnvelopeRequired,
)
from elastickv.kv import fsm
from elastickv.kv.api import OpKind, WriteResult
from elastickv.kv.conditions import SHARES, ConditionReader
from elastickv.kv.fsm import (
    META_HLC_CEILING,
    META_RAFT_CUTOVER_INDEX,
    KvStateMachine,
    read_payload,
)
from elastickv.raft.engine import Entry
from elastickv.store.flusher import Runner
from elastickv.store.mvcc_store import decode_number
from elastickv.store.scan import ScanRange
from elastickv.store.values import plain_record, seal_record, tombstone_record
from elastickv.wire import (
    Bootstrap,
    HlcCeiling,
    Registration,
    RegistryRow,
    Rotation,
    RotationTag,
    WriteOp,
    WriteRequest,
    encode_entry,
    encode_writes,
)
from tests.kv.machine import KEK, NODE, NOW_MS, RAFT_DEK, STORAGE_DEK, Machine, plain, ts


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def delete(key: bytes, commit_ts: int) -> WriteRequest:
    return WriteRequest(commit_ts, [WriteOp(OpKind.DELETE, key, tombstone_record())], [])


def short_lived(key: bytes, commit_ts: int, expiry_ms: int) -> WriteRequest:
    return WriteRequest(commit_ts, [WriteOp(OpKind.PUT, key, plain_record(b"v", expiry_ms))], [])


def test_a_group_applies_in_order_and_moves_index_and_clock(machine: Machine) -> None:
    outcomes = machine.write(plain(b"k", ts(1), b"one"), plain(b"k", ts(2), b"two"))
    assert outcomes == [WriteResult(1, ts(1)), WriteResult(1, ts(2))]
    assert machine.value(b"k") == b"two"
    assert machine.fsm.applied_index == 1
    assert machine.hlc.last == ts(2)


def test_what_waits_for_a_flush_is_bounded(machine: Machine) -> None:
    fsm = KvStateMachine(machine.store, machine.applier, machine.hlc,
                         on_keys_changed=machine.changed.append, max_overlay_bytes=1000)
    assert fsm.may_apply()
    while machine.store.overlay_bytes < 1000:
        assert fsm.may_apply()
        machine.write(plain(b"k", ts(machine.store.applied_index + 1), bytes(100)))
    assert not fsm.may_apply()
    machine.backend.write = full  # type: ignore[method-assign]
    with pytest.raises(DiskFull):
        machine.store.flush_now()
    with pytest.raises(DiskFull):
        fsm.may_apply()
    del machine.backend.write
    machine.store.flush_now()
    assert fsm.may_apply()


def test_how_many_versions_wait_for_a_flush_is_bounded(machine: Machine,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastickv.kv.fsm.MAX_OVERLAY_VERSIONS", 3)
    for counter in (1, 2, 3):
        assert machine.fsm.may_apply()
        machine.write(plain(b"k", ts(counter), b"v"))
    assert not machine.fsm.may_apply()
    machine.store.flush_now()
    assert machine.fsm.may_apply()


class Threads:
    """A runner whose work is done when a test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], object], asyncio.Future[object]]] = []

    def __call__(self, work: Callable[[], object]) -> asyncio.Future[object]:
        future = asyncio.get_running_loop().create_future()
        self.work.append((work, future))
        return future

    async def finish(self) -> None:
        for work, future in self.work:
            future.set_result(work())
        self.work.clear()
        for _ in range(3):
            await asyncio.sleep(0)


def that_reads_first(machine: Machine, prefetcher: Runner) -> KvStateMachine:
    return KvStateMachine(machine.store, machine.applier, machine.hlc,
                          on_keys_changed=machine.changed.append,
                          condition_reader=ConditionReader(machine.store, prefetcher))


async def test_an_entry_waits_until_what_its_conditions_compare_with_is_in_memory(
        machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, read, waits = Threads(), list[bytes](), True

    def prefetch(wanted: ScanRange, count: int) -> Callable[[], bool]:
        assert (wanted.end, count) == (wanted.start + b"\0", 1)
        return lambda: read.append(wanted.start) or waits

    monkeypatch.setattr(machine.store, "prefetch", prefetch)
    subject = that_reads_first(machine, threads)
    keys = [b"%02d" % number for number in range(20)]

    def conditional(index: int) -> Entry:
        return Entry(index, 1, encode_writes([
            plain(key, ts(100 * index + number), b"v", [(key, 0)])
            for number, key in enumerate(keys)]))

    blind = Entry(1, 1, encode_writes([plain(b"k", ts(1), b"v")]))
    assert subject.apply([blind, conditional(2), conditional(3)]) == [[WriteResult(1, ts(1))]]
    await asyncio.sleep(0)
    assert len(threads.work) == SHARES
    assert subject.apply([conditional(2)]) == []
    assert not read
    assert not subject.may_apply()
    await threads.finish()
    assert subject.may_apply()
    assert sorted(read) == keys
    (outcomes,) = subject.apply([conditional(2), conditional(3)])
    assert outcomes == [WriteResult(2, ts(200 + number)) for number in range(20)]
    await asyncio.sleep(0)
    waits = False
    await threads.finish()
    assert sorted(read) == sorted(2 * keys)
    (outcomes,) = subject.apply([conditional(3)])
    assert all(isinstance(each, ConditionFailed) for each in outcomes)
    # Nothing came from the disk: the next one is judged at once, and what that meets counts.
    for count, index in ((5, 4), (6, 5)):
        monkeypatch.setattr(machine.backend, "disk_waits",
                            partial(next, chain((5,), repeat(count))))
        assert len(subject.apply([conditional(index)])) == 1
    assert subject.apply([conditional(6)]) == []


async def test_the_loop_does_not_wait_for_thousands_of_keys_after_some_that_were_in_memory(
        machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads()
    subject = that_reads_first(machine, threads)
    hot = Entry(1, 1, encode_writes([plain(b"k", ts(1), b"v", [(b"k", 0)])]))
    assert subject.apply([hot]) == []
    await asyncio.sleep(0)
    await threads.finish()
    assert subject.apply([hot]) == [[WriteResult(1, ts(1))]]
    # From here on each key has to come from the disk.
    waits = count_up()
    monkeypatch.setattr(machine.backend, "disk_waits", partial(next, waits))
    many = Entry(2, 1, encode_writes([
        plain(b"z", ts(2), b"v", [(b"%04d" % number, 0) for number in range(5_000)])]))
    assert subject.apply([many]) == []
    assert next(waits) < 100
    await asyncio.sleep(0)
    await threads.finish()
    assert subject.apply([many]) == [[WriteResult(2, ts(2))]]


async def test_conditions_are_judged_though_threads_read_no_more(machine: Machine) -> None:
    """As when the node stops."""
    def closed(work: Callable[[], object]) -> asyncio.Future[None]:
        raise RuntimeError("cannot schedule new futures after shutdown")

    subject = that_reads_first(machine, closed)
    entry = Entry(1, 1, encode_writes([plain(b"k", ts(1), b"v", [(b"k", 0)])]))
    assert subject.apply([entry]) == []
    await asyncio.sleep(0)
    assert subject.apply([entry]) == [[WriteResult(1, ts(1))]]


def test_entries_that_take_long_are_not_applied_all_at_once(
        machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(index, 1, encode_writes([plain(b"k", ts(index), b"v")]))
               for index in (1, 2, 3)]
    clock = FakeClock()
    monkeypatch.setattr(machine.hlc, "clock", clock)
    apply_writes = machine.fsm._apply_writes

    def slow(*arguments: Any) -> object:
        clock.advance(0.6 * fsm.APPLY_S)
        return apply_writes(*arguments)

    monkeypatch.setattr(machine.fsm, "_apply_writes", slow)
    assert machine.fsm.apply(entries) == [[WriteResult(1, ts(1))], [WriteResult(2, ts(2))]]
    clock.advance(10.0)
    assert machine.fsm.apply(entries[2:]) == [[WriteResult(3, ts(3))]]
    assert machine.fsm.applied_index == 3


def full(batch: object) -> None:
    raise DiskFull("no space left", remedy="free space")


def test_rafts_own_entries_only_move_the_index(machine: Machine) -> None:
    assert machine.apply(b"") == 1
    assert machine.fsm.applied_index == 1


@pytest.mark.parametrize(("before", "condition", "holds"), [
    ([], (b"k", 0), True),
    ([], (b"k", ts(1)), False),
    ([plain(b"k", ts(1), b"v")], (b"k", ts(1)), True),
    ([plain(b"k", ts(1), b"v")], (b"k", 0), False),
    ([plain(b"k", ts(1), b"v"), delete(b"k", ts(2))], (b"k", 0), True),
    ([plain(b"k", ts(1), b"v"), delete(b"k", ts(2))], (b"k", ts(1)), False),
    ([short_lived(b"k", ts(1), NOW_MS + 1)], (b"k", ts(1)), True),
    ([short_lived(b"k", ts(1), NOW_MS)], (b"k", ts(1)), False),
    ([short_lived(b"k", ts(1), NOW_MS)], (b"k", 0), True),
], ids=["absent is 0", "absent is no version", "latest", "not absent", "deleted is 0", "deleted",
        "not expired yet", "expired", "expired is 0"])
@pytest.mark.parametrize("same_entry", [False, True])
def test_conditions_see_everything_before_them(
        machine: Machine, before: list[WriteRequest], condition: tuple[bytes, int], holds: bool,
        same_entry: bool) -> None:
    request = plain(b"other", ts(9), b"new", [condition])
    if same_entry:
        outcome = machine.write(*before, request)[-1]
    else:
        for earlier in before:
            machine.write(earlier)
        outcome = machine.write(request)[0]
    assert isinstance(outcome, WriteResult if holds else ConditionFailed)
    assert machine.value(b"other") == (b"new" if holds else None)


def test_plaintext_after_the_storage_cutover_is_refused_without_effect(machine: Machine) -> None:
    machine.bootstrap()
    machine.enable_storage()
    refused, accepted = machine.write(plain(b"k", ts(1), b"clear"),
                                      machine.sealed(b"s", ts(2), b"hidden"))
    assert isinstance(refused, StorageEnvelopeRequired)
    assert machine.value(b"k") is None
    assert isinstance(accepted, WriteResult)
    assert machine.value(b"s") == b"hidden"


def test_deletes_need_no_envelope(machine: Machine) -> None:
    machine.write(plain(b"k", ts(1), b"v"))
    machine.bootstrap()
    machine.enable_storage()
    assert isinstance(machine.write(delete(b"k", ts(2)))[0], WriteResult)
    assert machine.value(b"k") is None


def flipped(envelope: bytes) -> bytes:
    """With one bit of its tag changed."""
    return envelope[:-1] + bytes((envelope[-1] ^ 1,))


def halting_entries() -> dict[str, Callable[[Machine], bytes]]:
    return {
        "unknown opcode": lambda machine: b"\x06\x01",
        "trailing bytes": lambda machine: encode_entry(HlcCeiling(1)) + b"\0",
        "clear entry above the cutover": lambda machine: encode_writes([plain(b"k", ts(1), b"v")]),
        "flipped envelope": lambda machine: flipped(seal_raft(
            machine.handle(RAFT_DEK), machine.nonces.next(),
            encode_writes([machine.sealed(b"k", ts(1), b"v")]))),
        "unknown storage DEK": lambda machine: seal_raft(
            machine.handle(RAFT_DEK), machine.nonces.next(),
            encode_writes([WriteRequest(ts(1), [WriteOp(OpKind.PUT, b"k", seal_record(
                KeyHandle(99, Purpose.STORAGE, bytes(32)), bytes(12), b"k", ts(1), b"v"))], [])])),
        "second bootstrap": lambda machine: seal_raft(
            machine.handle(RAFT_DEK), machine.nonces.next(),
            encode_entry(Bootstrap(1, KEK.generate_wrapped_dek(), 2, KEK.generate_wrapped_dek()))),
    }


@pytest.mark.parametrize("name", halting_entries())
def test_an_entry_that_cannot_be_applied_halts_without_a_trace(machine: Machine,
                                                              name: str) -> None:
    machine.bootstrap()
    machine.enable_storage()
    machine.enable_raft()
    payload = halting_entries()[name](machine)
    before = machine.fingerprint()
    with pytest.raises(ApplyHalted):
        machine.apply(payload)
    assert machine.fingerprint() == before


def test_a_full_disk_ends_a_group_and_the_rest_applies_later(tmp_path: Path) -> None:
    untroubled, full = Machine(tmp_path / "untroubled"), Machine(tmp_path / "full")
    bootstrap = Bootstrap(STORAGE_DEK, KEK.generate_wrapped_dek(), RAFT_DEK,
                          KEK.generate_wrapped_dek(), (RegistryRow(RAFT_DEK, NODE, 0),))
    group = [Entry(index, 1, payload) for index, payload in enumerate((
        encode_writes([plain(b"k", ts(1), b"one")]), encode_entry(bootstrap),
        encode_writes([plain(b"k", ts(2), b"two")])), start=1)]
    expected = untroubled.fsm.apply(group)

    full.disk.room = 0
    assert full.fsm.apply(group) == expected[:1]
    before = full.fingerprint()
    with pytest.raises(DiskFull):
        full.fsm.apply(group[1:])
    assert full.fingerprint() == before
    assert full.fsm.applied_index == 1
    assert full.changed == []
    full.disk.room = math.inf
    assert full.fsm.apply(group[1:]) == expected[1:]
    assert full.changed == [2]
    assert full.store.rows() == untroubled.store.rows()
    assert full.value(b"k") == untroubled.value(b"k") == b"two"
    assert full.applier.keystore.ids() == untroubled.applier.keystore.ids()


def test_above_the_raft_cutover_entries_are_opened(machine: Machine) -> None:
    machine.bootstrap()
    machine.enable_storage()
    machine.enable_raft()
    assert decode_number(machine.store.meta(META_RAFT_CUTOVER_INDEX)) == 3
    payload = seal_raft(machine.handle(RAFT_DEK), machine.nonces.next(),
                        encode_writes([machine.sealed(b"k", ts(1), b"v")]))
    outcomes = machine.apply(payload)
    assert outcomes == [WriteResult(4, ts(1))]
    assert machine.value(b"k") == b"v"


def test_a_registration_may_stay_in_the_clear_above_the_cutover(machine: Machine) -> None:
    machine.bootstrap()
    machine.enable_storage()
    machine.enable_raft()
    rows_before = machine.store.rows()
    machine.apply(encode_entry(Registration(RegistryRow(STORAGE_DEK, NODE, 5))))
    assert machine.store.rows() != rows_before
    assert machine.changed == [1, 2, 3, 4]


def test_the_cutover_entry_itself_and_those_before_it_are_clear() -> None:
    entry = HlcCeiling(ts(500))
    assert read_payload(encode_entry(entry), 7, 0, Keystore()) == entry
    assert read_payload(encode_entry(entry), 7, 7, Keystore()) == entry
    with pytest.raises(IntegrityError):
        read_payload(encode_entry(entry), 8, 7, Keystore())


def test_a_ceiling_is_kept_and_observed(machine: Machine) -> None:
    machine.apply(encode_entry(HlcCeiling(ts(500))))
    assert machine.hlc.ceiling == ts(500)
    assert decode_number(machine.store.meta(META_HLC_CEILING)) == ts(500)


def test_replay_after_a_crash_between_sidecar_and_store_ends_in_the_same_state(
        tmp_path: Path) -> None:
    first = Machine(tmp_path)
    entries = [encode_entry(Bootstrap(
        STORAGE_DEK, KEK.generate_wrapped_dek(), RAFT_DEK, KEK.generate_wrapped_dek(),
        (RegistryRow(STORAGE_DEK, NODE, 0),)))]
    entries.append(encode_entry(Rotation(
        RotationTag.ROTATE_DEK, 33, Purpose.STORAGE, KEK.generate_wrapped_dek(),
        RegistryRow(33, NODE, 1))))
    for entry in entries:
        first.apply(entry)
    expected = first.fingerprint()
    first.store.close()  # nothing flushed: the store forgets, the sidecar does not

    again = Machine(tmp_path)
    assert again.fsm.applied_index == 0
    assert again.applier.sidecar is not None
    for entry in entries:
        again.apply(entry)
    assert again.fingerprint() == expected


def test_plaintext_below_the_cutover_is_replayed_although_the_sidecar_is_ahead(
        tmp_path: Path) -> None:
    first = Machine(tmp_path)
    first.bootstrap()
    first.store.flush_now()
    write = encode_writes([plain(b"k", ts(1), b"clear")])
    first.apply(write)
    first.enable_storage()
    first.store.close()  # write and cutover reached the sidecar, not the store

    again = Machine(tmp_path)
    assert again.applier.sidecar is not None and again.applier.sidecar.storage_envelope_active
    assert again.store.applied_index == 1
    assert again.apply(write) == [WriteResult(2, ts(1))]
    assert again.value(b"k") == b"clear"


def test_replay_stores_no_cutover_that_comes_later(tmp_path: Path) -> None:
    """A snapshot of a replaying replica must not tell of a cutover behind its own index."""
    first = Machine(tmp_path)
    bootstrap = encode_entry(Bootstrap(
        STORAGE_DEK, KEK.generate_wrapped_dek(), RAFT_DEK, KEK.generate_wrapped_dek(),
        (RegistryRow(STORAGE_DEK, NODE, 0), RegistryRow(RAFT_DEK, NODE, 0))))
    first.apply(bootstrap)
    first.enable_storage()
    first.enable_raft()
    assert decode_number(first.store.meta(META_RAFT_CUTOVER_INDEX)) == 3
    first.store.close()  # the sidecar knows the cutover, the store nothing

    again = Machine(tmp_path)
    again.apply(bootstrap)
    assert decode_number(again.store.meta(META_RAFT_CUTOVER_INDEX)) == 0
    again.enable_storage()
    again.enable_raft()
    assert decode_number(again.store.meta(META_RAFT_CUTOVER_INDEX)) == 3
