"""Values by DEK: the counts of a store are always those of a walk over it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from elastickv.clock import pack_timestamp
from elastickv.errors import DiskFull, StoreCorrupt
from elastickv.store.dek_counts import (
    PLAINTEXT,
    count_in,
    decode_counts,
    dek_id_of,
    encode_counts,
)
from elastickv.store.gc import Compactor
from elastickv.store.header import EncryptionState, encode_header
from elastickv.store.mvcc_store import DEK_COUNTS, Store
from elastickv.store.snapshot import StoreSnapshots
from elastickv.store.tables import MapFull, Table, WriteBatch
from elastickv.store.values import plain_record, tombstone_record
from tests.store.conftest import OpenStore

SEED = 20


def sealed(dek_id: int) -> bytes:
    """A record whose envelope names `dek_id`; what follows does not matter here."""
    return (encode_header(state=EncryptionState.ENVELOPE) + b"\x01\x00"
            + dek_id.to_bytes(4, "big") + bytes(28))


def walked(store: Store) -> dict[int, int]:
    counts: dict[int, int] = {}
    view = store.backend.view()
    try:
        count_in(counts, (record for _, record in view.iterate(Table.MVCC)))
    finally:
        view.close()
    return counts


@pytest.mark.parametrize(("record", "dek_id"), [
    (sealed(1), 1), (sealed(0xFFFF_FFFF), 0xFFFF_FFFF), (plain_record(b"v"), PLAINTEXT),
    (plain_record(b"v", 5), PLAINTEXT), (tombstone_record(), None)])
def test_which_dek_a_record_is_under(record: bytes, dek_id: int | None) -> None:
    assert dek_id_of(record) == dek_id


def test_counting_adds_to_what_was_counted() -> None:
    records = [sealed(1), plain_record(b"v"), sealed(1), tombstone_record(), plain_record(b"w", 5),
               sealed(2), plain_record(b"")]
    counts = {1: 10, 9: 1}
    count_in(counts, iter(records))
    assert counts == {1: 12, 9: 1, 2: 1, PLAINTEXT: 3}
    one_by_one = [dek_id for record in records if (dek_id := dek_id_of(record)) is not None]
    count_in(fresh := {}, records)
    assert fresh == Counter(one_by_one)


def test_the_bytes() -> None:
    counts = {9: 1, PLAINTEXT: 1 << 40, 0xFFFF_FFFF: 3}
    assert decode_counts(encode_counts(counts)) == counts
    assert encode_counts({1: 2}).hex() == "000000010000000000000002"
    with pytest.raises(StoreCorrupt):
        decode_counts(b"x")


def random_group(rng: random.Random, at_ms: int) -> list[tuple[bytes, int, bytes]]:
    records = [sealed(1), sealed(2), plain_record(b"v"), tombstone_record(),
               plain_record(b"v", at_ms + 3)]
    return [(b"k%d" % rng.randrange(9), pack_timestamp(at_ms, counter), rng.choice(records))
            for counter in range(rng.randrange(1, 6))]


def test_random_histories(open_store: OpenStore) -> None:
    """Writes, flushes, compaction, crashes: the counts are those of a walk."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    store = open_store()
    removed = 0
    for at_ms in range(1, 400):
        store.apply_group(store.applied_index + 1, random_group(rng, at_ms))
        if rng.random() < 0.3:
            store.flush_now()
            assert store.dek_counts == walked(store)
        if rng.random() < 0.1:
            compactor = Compactor(store, lambda now=at_ms: now,  # type: ignore[misc]
                                  retention_ms=20)
            removed += compactor.run_pass()
            assert store.dek_counts == walked(store)
        if rng.random() < 0.05:
            store = open_store()
            assert store.dek_counts == walked(store)
    assert removed > 0


def test_a_snapshot_brings_its_counts(open_store: OpenStore) -> None:
    source, target = open_store("source"), open_store("target")
    source.apply_group(1, [(b"a", 1, sealed(7)), (b"b", 1, plain_record(b"v"))])
    source.flush_now()
    target.apply_group(1, [(b"z", 1, sealed(8))])
    target.flush_now()
    snapshots = StoreSnapshots(source).open_export()
    receiver = StoreSnapshots(target).open_import()
    receiver.write(snapshots.read(1 << 20))
    receiver.finish()
    snapshots.close()
    assert target.dek_counts == {7: 1, PLAINTEXT: 1} == walked(target)


def test_a_store_without_counts_is_walked_once(open_store: OpenStore) -> None:
    store = open_store()
    store.apply_group(1, [(b"a", 1, sealed(7)), (b"b", 1, tombstone_record())])
    store.flush_now()
    store.backend.write(WriteBatch(deletes={Table.META: [DEK_COUNTS]}))
    assert open_store().dek_counts == {7: 1}


@pytest.mark.parametrize("error", [MapFull, DiskFull])
def test_a_flush_that_is_repeated_counts_once(store: Store, monkeypatch: pytest.MonkeyPatch,
                                              error: type[DiskFull]) -> None:
    write: Callable[[WriteBatch], None] = store.backend.write
    refused: list[bool] = []

    def refusing(batch: WriteBatch) -> None:
        for items in batch.puts.values():
            list(items)
        if not refused:
            refused.append(True)
            raise error("full", remedy="")
        write(batch)

    monkeypatch.setattr(store.backend, "write", refusing)
    store.apply_group(1, [(b"a", 1, sealed(7))])
    job = store.begin_flush()
    assert job is not None
    with pytest.raises(DiskFull):
        job.run()
    store.finish_flush(job)
    monkeypatch.undo()
    store.flush_now()
    assert store.dek_counts == {7: 1}
