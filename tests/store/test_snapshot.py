"""Snapshot streams: round trips in any pieces, and every kind of damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.durable import OsDisk
from elastickv.errors import CorruptionError, DiskFull, Overloaded, WireError
from elastickv.store import snapshot
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store, encode_number
from elastickv.store.records import CRC_BYTES
from elastickv.store.snapshot import (
    MAGIC,
    SnapshotHeader,
    StoreSnapshots,
    decode_header,
    encode_header,
)
from elastickv.store.tables import Backend, Item, Table
from elastickv.store.values import plain_record, tombstone_record
from tests.store.conftest import LATEST, OpenStore

MINIMAL = SnapshotHeader(5, 0, 0, 7, 0, {})
FRAME_HEADER_BYTES = 9


def fill(store: Store, keys: int = 40) -> None:
    store.apply_group(1, [(b"key-%03d" % key, 1, plain_record(b"old" * 50)) for key in range(keys)])
    store.apply_group(2, [(b"key-%03d" % key, 2, tombstone_record() if key % 3 else
                           plain_record(b"new" * 20, expiry_ms=50)) for key in range(keys)],
                      rows=[(b"row|%d" % number, b"%d" % number) for number in range(5)],
                      meta={b"hlc_ceiling": encode_number(99), b"sidecar": b"{}",
                            b"raft_cutover_index": encode_number(2)})
    store.flush_now()


def exported(store: Store, piece: int = 1 << 20) -> bytes:
    export = StoreSnapshots(store).open_export()
    try:
        return b"".join(iter(lambda: export.read(piece), b""))
    finally:
        export.close()


def contents(store: Store) -> object:
    view = store.backend.view()
    try:
        return [list(view.iterate(table)) for table in Table]
    finally:
        view.close()


def install(store: Store, stream: bytes, piece: int = 1 << 20) -> int:
    receiver = StoreSnapshots(store).open_import()
    for start in range(0, len(stream), piece):
        receiver.write(stream[start:start + piece])
    return receiver.finish()


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "FRAME_TARGET_BYTES", 512)


@pytest.fixture
def stream(small_frames: None, tmp_path: Path) -> bytes:
    store = Store.open(MemoryBackend(OsDisk(), tmp_path / "source"))
    fill(store)
    return exported(store)


def frame_starts(stream: bytes) -> list[int]:
    starts, offset = [], len(MAGIC)
    while offset < len(stream):
        starts.append(offset)
        offset += FRAME_HEADER_BYTES + int.from_bytes(stream[offset + 5:offset + 9], "big") + 4
    return starts


@pytest.mark.parametrize("piece", [1, 13, 1 << 20])
def test_restore_equals_the_source(open_store: OpenStore, small_frames: None, piece: int) -> None:
    source = open_store("source")
    fill(source)
    target = open_store("target")
    target.apply_group(1, [(b"leftover", 1, plain_record(b"x"))], rows=[(b"leftover", b"x")])
    target.flush_now()
    target.apply_group(2, [(b"unflushed", 1, plain_record(b"x"))])
    assert install(target, exported(source, piece), piece) == 2
    expected = contents(source)
    for _ in ("running", "restarted"):
        assert contents(target) == expected
        assert (target.applied_index, target.durable_index, target.max_commit_ts) == (2, 2, 2)
        assert target.meta(b"sidecar") == b"{}"
        assert target.row(b"leftover") is None
        assert target.scan(b"", b"", 99, LATEST, 49) == source.scan(b"", b"", 99, LATEST, 49)
        target = open_store("target")


def test_the_header_tells_index_ceiling_and_cutover(store: Store) -> None:
    fill(store)
    receiver = StoreSnapshots(store).open_import()
    receiver.write(exported(store))
    header = receiver.header
    assert header is not None
    assert (header.applied_index, header.hlc_ceiling, header.raft_cutover_index) == (2, 99, 2)
    assert header.meta[b"sidecar"] == b"{}"
    receiver.abort()


def test_equal_stores_give_equal_streams(open_store: OpenStore) -> None:
    one, other = open_store("one"), open_store("other")
    fill(one)
    fill(other)
    assert exported(one) == exported(other, piece=100)


def test_an_export_holds_its_state_while_writes_and_flushes_go_on(store: Store) -> None:
    fill(store)
    expected = exported(store)
    export = StoreSnapshots(store).open_export()
    received = export.read(100)
    for index in range(3, 30):
        store.apply_group(index, [(b"key-%03d" % index, index, plain_record(b"later" * 99))])
        store.flush_now()
    try:
        received += b"".join(iter(lambda: export.read(1000), b""))
    except Overloaded:
        # The map had to grow, which closes read transactions: the follower asks again.
        assert isinstance(store.backend, LmdbBackend)
        return
    finally:
        export.close()
    assert received == expected


@pytest.mark.parametrize("piece", [100, 512, 3_000])
@pytest.mark.parametrize("cold_turns", [5, None])
def test_what_is_read_next_is_in_memory_while_that_waits_for_the_disk(
        store: Store, small_frames: None, monkeypatch: pytest.MonkeyPatch, piece: int,
        cold_turns: int | None) -> None:
    """After `cold_turns` all of it is in memory, or nothing but what was read ahead ever is."""
    fill(store, keys=200)
    expected = exported(store)
    export = StoreSnapshots(store).open_export()
    iterate = export._view.iterate
    in_memory: set[Item] = set()
    turns = 0

    def is_warm() -> bool:
        return cold_turns is not None and turns >= cold_turns

    def prefetch_all(table: Table, start: bytes, byte_count: int) -> Callable[[], bool]:
        def work() -> bool:
            left, known = byte_count, len(in_memory)
            for key, value in iterate(table, start):
                in_memory.add((key, value))
                left -= len(key) + len(value) + CRC_BYTES
                if left <= 0:
                    break
            return not is_warm() and len(in_memory) > known

        return work

    def read_in_memory(table: Table) -> Iterator[Item]:
        for item in iterate(table):
            assert item in in_memory or table is not Table.MVCC or is_warm()
            yield item

    monkeypatch.setattr(export._view, "iterate", read_in_memory)
    monkeypatch.setattr(store.backend, "prefetch_all", prefetch_all)
    pieces = []
    while not pieces or pieces[-1]:
        work = export.read_ahead(piece)
        if work is not None:
            turns += 1
            work()
        pieces.append(export.read(piece))
    assert b"".join(pieces) == expected
    assert turns > 9 if cold_turns is None else turns == cold_turns + snapshot.WARM_PIECES - 1
    export.close()


def test_an_export_reads_ahead_again_once_it_has_waited_for_the_disk(
        store: Store, small_frames: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    export = StoreSnapshots(store).open_export()
    monkeypatch.setattr(store.backend, "prefetch_all", lambda *arguments: lambda: False)
    for _ in range(snapshot.WARM_PIECES):
        work = export.read_ahead(512)
        assert work is not None
        work()
    for before, after in ((3, 3), (3, 4)):
        assert export.read_ahead(512) is None
        monkeypatch.setattr(store.backend, "disk_waits", partial(next, iter((before, after))))
        export.read(512)
    assert export.read_ahead(512) is not None
    export.close()


def test_an_export_is_of_the_durable_index(store: Store) -> None:
    fill(store)
    store.apply_group(3, [(b"not-flushed", 3, plain_record(b"x"))])
    export = StoreSnapshots(store).open_export()
    assert export.applied_index == store.durable_index == 2
    export.close()
    export.close()
    assert export.read(10) == b""


def test_a_snapshot_behind_the_store_is_refused(open_store: OpenStore) -> None:
    source, target = open_store("source"), open_store("target")
    fill(source)
    target.apply_group(3, [(b"ahead", 1, plain_record(b"x"))])
    with pytest.raises(WireError, match="behind"):
        install(target, exported(source))
    assert target.get(b"ahead", LATEST, 0) is not None


def expect_refused(store: Store, stream: bytes, piece: int = 1 << 20) -> None:
    """The stream is refused and the store is what it was, also after a restart."""
    store.apply_group(store.applied_index + 1, [(b"own", 1, plain_record(b"x"))])
    before = store.scan(b"", b"", 99, LATEST, 0)
    with pytest.raises(CorruptionError):
        install(store, stream, piece)
    assert store.scan(b"", b"", 99, LATEST, 0) == before


def test_truncation_at_every_frame_and_within(store: Store, stream: bytes) -> None:
    starts = frame_starts(stream)
    assert len(starts) > 10
    cuts = {0, 3, len(MAGIC), len(stream) - 1}
    for start in starts:
        cuts |= {start, start + 5, start + FRAME_HEADER_BYTES, start + FRAME_HEADER_BYTES + 3}
    for cut in sorted(cuts):
        expect_refused(store, stream[:cut])


def swapped(stream: bytes, starts: list[int]) -> bytes:
    a, b, c = starts[2:5]
    return stream[:a] + stream[b:c] + stream[a:b] + stream[c:]


DAMAGE = {
    "lost-frame": lambda s, f: s[:f[2]] + s[f[3]:],
    "doubled-frame": lambda s, f: s[:f[3]] + s[f[2]:f[3]] + s[f[3]:],
    "swapped-frames": swapped,
    "lost-header": lambda s, f: s[:f[0]] + s[f[1]:],
    "lost-trailer": lambda s, f: s[:f[-1]],
    "second-trailer": lambda s, f: s + s[f[-1]:],
    "trailing-byte": lambda s, f: s + b"\x00",
    "two-streams": lambda s, f: s + s,
    "other-magic": lambda s, f: b"EKVSNAP\x02" + s[8:],
    "garbage": lambda s, f: bytes(range(256)) * 4,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_streams(store: Store, stream: bytes, damage: str) -> None:
    expect_refused(store, DAMAGE[damage](stream, frame_starts(stream)))


@given(st.data())
@settings(max_examples=150)
def test_every_flipped_bit_is_refused(tmp_path_factory: pytest.TempPathFactory,
                                      data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("flips")
    source = Store.open(MemoryBackend(OsDisk(), root / "source"))
    fill(source, keys=6)
    stream = bytearray(exported(source))
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    stream[bit // 8] ^= 1 << bit % 8
    target = Store.open(MemoryBackend(OsDisk(), root / "target"))
    with pytest.raises(CorruptionError):
        install(target, bytes(stream))
    assert target.applied_index == 0


def test_a_refused_import_takes_nothing_more(store: Store, stream: bytes) -> None:
    receiver = StoreSnapshots(store).open_import()
    with pytest.raises(WireError):
        receiver.write(b"this is no snapshot")
    with pytest.raises(WireError, match="ended"):
        receiver.write(stream)
    with pytest.raises(WireError, match="incomplete"):
        receiver.finish()
    receiver.abort()


def test_an_import_can_follow_an_aborted_one(open_store: OpenStore, stream: bytes) -> None:
    store = open_store()
    receiver = StoreSnapshots(store).open_import()
    receiver.write(stream[:len(stream) // 2])
    receiver.abort()
    receiver.abort()
    assert install(store, stream) == 2
    assert open_store().applied_index == 2


def test_a_half_received_import_is_gone_after_a_restart(open_store: OpenStore,
                                                        stream: bytes) -> None:
    store = open_store()
    store.apply_group(1, [(b"own", 1, plain_record(b"x"))])
    store.flush_now()
    receiver = StoreSnapshots(store).open_import()
    receiver.write(stream[:-1])
    store = open_store()
    assert [key for key, _ in store.scan(b"", b"", 9, LATEST, 0)] == [b"own"]
    assert install(store, stream) == 2


class FullDisk(OsDisk):
    """A disk that is full once it is told so."""

    is_full = False

    def replace(self, path: Path, data: bytes) -> None:
        if self.is_full:
            raise DiskFull("no space left", remedy="free space")
        super().replace(path, data)


@pytest.mark.parametrize("make_backend", [
    lambda directory, disk: LmdbBackend(directory, disk=disk),
    lambda directory, disk: MemoryBackend(disk, directory)], ids=["lmdb", "memory"])
def test_an_installation_on_a_full_disk_leaves_what_was_applied(
        make_backend: Callable[[Path, OsDisk], Backend], tmp_path: Path, stream: bytes) -> None:
    """Also what is in memory only: the log goes on behind it."""
    disk = FullDisk()
    store = Store.open(make_backend(tmp_path / "full", disk))
    store.apply_group(1, [(b"a", 1, plain_record(b"flushed"))])
    store.flush_now()
    store.apply_group(2, [(b"b", 2, plain_record(b"not flushed"))], rows=[(b"row", b"x")],
                      meta={b"fact": b"y"})
    disk.is_full = True
    with pytest.raises(DiskFull):
        install(store, stream)
    assert (store.applied_index, store.durable_index) == (2, 1)
    assert [store.get(key, LATEST, 0) is not None for key in (b"a", b"b")] == [True, True]
    assert (list(store.rows()), store.meta(b"fact")) == ([(b"row", b"x")], b"y")
    # What was received is off the full disk.
    assert len(list((tmp_path / "full").glob("gen-*.mdb"))) <= 1
    disk.is_full = False
    assert install(store, stream) == 2
    assert store.get(b"b", LATEST, 0) is None
    store.close()


def test_hooks_around_the_installation(open_store: OpenStore, stream: bytes) -> None:
    store = open_store()
    calls: list[tuple[object, ...]] = []

    def receive(snapshots: StoreSnapshots) -> None:
        receiver = snapshots.open_import()
        receiver.write(stream)
        receiver.finish()

    def refuse(header: SnapshotHeader, rows: Sequence[Item]) -> None:
        raise WireError("not this one")

    with pytest.raises(WireError, match="not this one"):
        receive(StoreSnapshots(store, before_install=refuse))
    assert store.applied_index == 0
    receive(StoreSnapshots(
        store,
        before_install=lambda header, rows: calls.append(
            ("before", header.applied_index, store.applied_index, rows)),
        on_installed=lambda index: calls.append(("after", index, store.applied_index))))
    assert calls == [("before", 2, 0, store.rows()), ("after", 2, 2)]
    assert store.rows()


headers = st.builds(
    lambda numbers, meta: SnapshotHeader(
        numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
        {**meta, b"hlc_ceiling": encode_number(numbers[1]),
         b"raft_cutover_index": encode_number(numbers[2])}),
    st.lists(st.integers(0, 2**64 - 1), min_size=5, max_size=5),
    st.dictionaries(st.binary(min_size=1, max_size=9), st.binary(max_size=9), max_size=4))


@given(headers)
def test_header_round_trip(header: SnapshotHeader) -> None:
    assert decode_header(encode_header(header)) == header


@pytest.mark.parametrize("payload", [
    b"", encode_header(MINIMAL)[:-1], encode_header(MINIMAL) + b"\x00",
    encode_header(MINIMAL._replace(hlc_ceiling=1)),
    encode_header(MINIMAL._replace(raft_cutover_index=1)),
    encode_header(MINIMAL._replace(meta={b"applied_index": encode_number(1)})),
    encode_header(MINIMAL)[:-1] + b"\x01",
], ids=["empty", "cut", "trailing", "ceiling-differs", "cutover-differs", "reserved-name",
        "count-too-high"])
def test_headers_that_do_not_parse(payload: bytes) -> None:
    with pytest.raises(CorruptionError):
        decode_header(payload)


@pytest.mark.parametrize("payload", [
    b"\x01\x00\x03\x00\x00\x00", b"\x01\x00\x03\x00\x00\x00\x01ke",
    b"\x03\x00\x01\x00\x00\x00\x00k", b"\x09\x00\x01\x00\x00\x00\x00k",
], ids=["cut-in-lengths", "cut-in-key", "meta-table", "unknown-table"])
def test_entries_that_do_not_parse(payload: bytes) -> None:
    with pytest.raises(WireError):
        list(snapshot.decode_entries(payload))
