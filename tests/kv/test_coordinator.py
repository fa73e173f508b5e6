"""Group commit on a real one-node engine: sharing, independence, deadlines, conditions."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from elastickv import wire
from elastickv.clock import FakeClock, HybridLogicalClock, SystemClock, pack_timestamp, timestamp_ms
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore
from elastickv.crypto.nonce import full_node_id
from elastickv.durable import OsDisk
from elastickv.errors import (
    ConditionFailed,
    DeadlineExceeded,
    DiskFull,
    ElasticKVError,
    InvalidArgument,
    NoLeader,
    OutcomeUnknown,
    Overloaded,
    ResultTooLarge,
    Unreachable,
)
from elastickv.keys.applier import Applier
from elastickv.kv import coordinator, forwarding, gathering, reads
from elastickv.kv.api import (
    PAIR_OVERHEAD_BYTES,
    Condition,
    Op,
    OpKind,
    ReadResult,
    WriteResult,
)
from elastickv.kv.encryption import EncryptionController
from elastickv.kv.forwarding import WriteGroup, WriteGroupReply, WriteReply
from elastickv.kv.fsm import META_HLC_CEILING, KvStateMachine
from elastickv.kv.key_value import KeyValue
from elastickv.kv.txn import PART_MEMORY_BYTES
from elastickv.raft.engine import Member
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.settings import EngineSettings
from elastickv.raft.tls_links import TlsLinks
from elastickv.store import mvcc_store
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store
from elastickv.store.scan import ENTRY_COST, ScanRange
from elastickv.store.values import open_record
from jepsen.network.ports import free_address
from tests.kv.key_cluster import DEFAULT

TIMEOUT_S = 10.0


class OneNode:
    """A whole node below the servers, without a second member."""

    def __init__(self, directory: Path, *, peers: int = 0) -> None:
        disk = OsDisk()
        addresses = [free_address() for _ in range(1 + peers)]
        self.store = Store.open(MemoryBackend(disk, directory / "store"))
        applier = Applier(disk=disk, read_row=self.store.row, kek=Kek(bytes(32)),
                          keystore=Keystore(), sidecar_path=directory / "keys.json")
        hlc = HybridLogicalClock(SystemClock())
        machine = KvStateMachine(
            self.store, applier, hlc,
            on_keys_changed=lambda index: self.encryption.keys_changed(index))
        settings = EngineSettings(
            "n1", [Member(f"n{i + 1}", address) for i, address in enumerate(addresses)],
            directory / "raft", election_min_s=0.1, election_max_s=0.2, heartbeat_s=0.02)
        links = TlsLinks("n1", addresses[0], tls=None, max_entry_bytes=settings.max_entry_bytes)
        self.engine = PySyncObjEngine(settings, machine, disk, links)
        self.fatal: list[BaseException] = []
        self.disk_problem: DiskFull | None = None
        self.encryption = EncryptionController(
            self.engine, self.store, applier, full_node_id=full_node_id("n1"),
            kek=Kek(bytes(32)), gate=True, build_sha="test", on_fatal=self.fatal.append,
            rotation=DEFAULT)
        self.kv = KeyValue(
            self.engine, self.store, hlc, self.encryption,
            opener=lambda key, record: open_record(applier.keystore, key, record),
            writable=lambda: self.disk_problem, max_value_bytes=1 << 20, max_request_bytes=2 << 20)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[OneNode]:
    node = OneNode(tmp_path)
    await node.engine.start()
    yield node
    node.encryption.writers.stop()
    await node.engine.stop()
    assert node.fatal == []


async def encrypt(node: OneNode) -> None:
    await node.encryption.bootstrap(wrapped_storage=b"", wrapped_raft=b"", storage_dek_id=0,
                                    raft_dek_id=0, writers=[], timeout_s=TIMEOUT_S)
    for enable in (node.encryption.enable_storage_envelope, node.encryption.enable_raft_envelope):
        await enable(proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("encrypted", [False, True])
async def test_concurrent_writes_share_entries(node: OneNode, encrypted: bool) -> None:
    if encrypted:
        await encrypt(node)
    results = await asyncio.gather(*(
        node.kv.put(b"key-%d" % i, b"value-%d" % i, timeout_s=TIMEOUT_S) for i in range(300)))
    assert len({result.commit_index for result in results}) < 30
    assert len({result.commit_ts for result in results}) == 300
    for i in range(300):
        assert (await node.kv.get(b"key-%d" % i, timeout_s=TIMEOUT_S)).value == b"value-%d" % i


async def put_all(node: OneNode, prefix: bytes, count: int) -> set[int]:
    """Concurrent writes; the commit indexes of the entries that held them."""
    results = await asyncio.gather(*(
        node.kv.put(prefix + b"-%d" % i, b"v", timeout_s=TIMEOUT_S) for i in range(count)))
    return {result.commit_index for result in results}


async def expect_company(node: OneNode, monkeypatch: pytest.MonkeyPatch, limit_s: float) -> None:
    """Serve ten callers in one entry; the leader then waits up to `limit_s` for as many."""
    monkeypatch.setattr(gathering, "PATIENCE", 1e9)
    monkeypatch.setattr(gathering, "LIMIT_S", limit_s)
    await node.kv.put(b"warm", b"up", timeout_s=TIMEOUT_S)
    assert len(await put_all(node, b"together", 10)) == 1


async def test_callers_that_come_back_one_by_one_share_an_entry(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    await expect_company(node, monkeypatch, TIMEOUT_S)
    parts = []
    for part in range(5):
        parts.append(asyncio.create_task(put_all(node, b"part-%d" % part, 2)))
        for _ in range(20):  # time enough for the pump, were it not to wait
            await asyncio.sleep(0)
    assert len(set.union(*await asyncio.gather(*parts))) == 1


async def test_a_caller_whose_company_stays_away_is_served(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    await expect_company(node, monkeypatch, 0.1)
    assert len(await put_all(node, b"alone", 1)) == 1


async def test_a_write_that_its_leader_kept_waiting_is_told_so_and_not_written(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    await expect_company(node, monkeypatch, TIMEOUT_S)
    with pytest.raises(DeadlineExceeded, match=r"nothing was written.*longer timeout"):
        await node.kv.put(b"impatient", b"v", timeout_s=0.02)
    assert not (await node.kv.get(b"impatient", timeout_s=TIMEOUT_S)).exists


async def test_a_caller_that_gives_up_delays_and_breaks_nobody(node: OneNode) -> None:
    await node.kv.put(b"warm", b"up", timeout_s=TIMEOUT_S)
    impatient = [asyncio.create_task(node.kv.put(b"gone-%d" % i, b"v", timeout_s=TIMEOUT_S))
                 for i in range(20)]
    patient = [asyncio.create_task(node.kv.put(b"kept-%d" % i, b"v", timeout_s=TIMEOUT_S))
               for i in range(20)]
    await asyncio.sleep(0)
    for task in impatient:
        task.cancel()
    results = await asyncio.gather(*patient)
    assert all(isinstance(result, WriteResult) for result in results)
    outcomes = await asyncio.gather(*impatient, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


async def test_without_a_leader_nothing_is_written_and_the_error_says_so(tmp_path: Path) -> None:
    node = OneNode(tmp_path, peers=2)
    await node.engine.start()
    try:
        with pytest.raises(NoLeader, match="nothing was written"):
            await node.kv.put(b"k", b"v", timeout_s=0.2)
        with pytest.raises(NoLeader):
            await node.kv.get(b"k", timeout_s=0.2)
        assert node.engine.status().last_log_index <= 1
    finally:
        await node.engine.stop()


async def test_timestamps_rise_across_writes_and_role_changes(node: OneNode) -> None:
    previous = 0
    for _ in range(20):
        result = await node.kv.put(b"k", b"v", timeout_s=TIMEOUT_S)
        assert result.commit_ts > previous
        previous = result.commit_ts


async def test_compare_and_set(node: OneNode) -> None:
    first = await node.kv.batch([Op(OpKind.PUT, b"k", b"1")], conditions=[Condition(b"k", 0)],
                                timeout_s=TIMEOUT_S)
    with pytest.raises(ConditionFailed):
        await node.kv.batch([Op(OpKind.PUT, b"k", b"2")], conditions=[Condition(b"k", 0)],
                            timeout_s=TIMEOUT_S)
    await node.kv.batch([Op(OpKind.PUT, b"k", b"3")],
                        conditions=[Condition(b"k", first.commit_ts)], timeout_s=TIMEOUT_S)
    assert (await node.kv.get(b"k", timeout_s=TIMEOUT_S)).value == b"3"


async def test_only_one_of_many_racing_compare_and_sets_wins(node: OneNode) -> None:
    outcomes = await asyncio.gather(*(
        node.kv.batch([Op(OpKind.PUT, b"k", b"%d" % i)], conditions=[Condition(b"k", 0)],
                      timeout_s=TIMEOUT_S) for i in range(50)), return_exceptions=True)
    winners = [outcome for outcome in outcomes if isinstance(outcome, WriteResult)]
    assert len(winners) == 1
    assert sum(isinstance(outcome, ConditionFailed) for outcome in outcomes) == 49


async def test_an_entry_holds_no_more_conditions_than_a_request_may_have(node: OneNode) -> None:
    """Each member judges all of an entry's at once, and they are small: a megabyte of them would
    keep its loop from everything else for longer than an election timeout."""
    conditions = [Condition(b"%x" % number, 0) for number in range(4_999)]
    results = await asyncio.gather(*(
        node.kv.batch([Op(OpKind.PUT, b"k", b"v")], conditions=conditions, timeout_s=TIMEOUT_S)
        for _ in range(6)))
    indexes = [result.commit_index for result in results]
    assert sorted(indexes.count(index) for index in set(indexes)) == [2, 2, 2]


async def test_large_requests_fail_nobody_else(node: OneNode) -> None:
    """Conditions take room in the log as well: four such requests do not fit in one entry."""
    conditions = [Condition(b"%0480d" % number, 0) for number in range(9_999)]
    writes = [node.kv.put(b"small-%d" % number, b"v", timeout_s=TIMEOUT_S) for number in range(5)]
    writes += [node.kv.batch([Op(OpKind.PUT, b"large-%d" % number, b"v")], conditions=conditions,
                             timeout_s=TIMEOUT_S) for number in range(4)]
    results = await asyncio.gather(*writes)
    assert len({result.commit_index for result in results}) >= 4


async def test_a_request_that_fits_in_no_entry_is_refused_at_once(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_ENTRY_BYTES", 50_000)
    with pytest.raises(InvalidArgument, match="exceeds the limit"):
        await node.kv.put(b"large", bytes(60_000), timeout_s=TIMEOUT_S)
    await node.kv.put(b"small", b"v", timeout_s=TIMEOUT_S)


async def test_a_batch_is_all_or_nothing_and_deletes(node: OneNode) -> None:
    await node.kv.put(b"a", b"1", timeout_s=TIMEOUT_S)
    await node.kv.batch([Op(OpKind.DELETE, b"a"), Op(OpKind.PUT, b"b", b"2")],
                        timeout_s=TIMEOUT_S)
    assert not (await node.kv.get(b"a", timeout_s=TIMEOUT_S)).exists
    assert (await node.kv.get(b"b", timeout_s=TIMEOUT_S)).value == b"2"
    with pytest.raises(InvalidArgument):
        await node.kv.batch([Op(OpKind.PUT, b"c", b"3"), Op(OpKind.PUT, b"", b"4")],
                            timeout_s=TIMEOUT_S)
    assert not (await node.kv.get(b"c", timeout_s=TIMEOUT_S)).exists


async def test_a_full_disk_refuses_writes_and_serves_reads(node: OneNode) -> None:
    await node.kv.put(b"k", b"v", timeout_s=TIMEOUT_S)
    node.disk_problem = DiskFull("no space")
    with pytest.raises(DiskFull):
        await node.kv.put(b"k", b"w", timeout_s=TIMEOUT_S)
    assert (await node.kv.get(b"k", timeout_s=TIMEOUT_S)).value == b"v"
    node.disk_problem = None
    await node.kv.put(b"k", b"w", timeout_s=TIMEOUT_S)


async def test_what_a_full_disk_refused_is_not_kept(node: OneNode) -> None:
    """One error is raised for all until the next flush ends, which may take long."""
    await node.kv.put(b"k", b"v", timeout_s=TIMEOUT_S)
    node.disk_problem = DiskFull("no space")
    tracemalloc.start()
    try:
        for _ in range(50):
            with pytest.raises(DiskFull):
                await node.kv.put(b"k", bytes(1 << 20), timeout_s=TIMEOUT_S)
        assert tracemalloc.get_traced_memory()[0] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("refusal", [Overloaded("busy"), NoLeader("handed over"),
                                     OutcomeUnknown("halted"), DiskFull("no space")],
                         ids=lambda error: type(error).__name__)
async def test_a_ceiling_that_is_refused_at_once_is_not_counted_on(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, refusal: ElasticKVError) -> None:
    """No timestamp goes out above what the log says that a next leader must skip."""
    async with asyncio.timeout(TIMEOUT_S):
        while not node.engine.is_leader():
            await asyncio.sleep(0.01)
    propose = node.engine.propose
    refused = False

    def refuse_one(payload: bytes, *, timeout_s: float) -> asyncio.Future[object]:
        nonlocal refused
        if refused or not isinstance(wire.decode_entry(payload), wire.HlcCeiling):
            assert refused
            return propose(payload, timeout_s=timeout_s)
        refused = True
        future = asyncio.get_running_loop().create_future()
        future.set_exception(refusal)
        return future

    monkeypatch.setattr(node.engine, "propose", refuse_one)
    if isinstance(refusal, DiskFull):
        with pytest.raises(DiskFull):
            await node.kv.put(b"k", b"v", timeout_s=TIMEOUT_S)
    written = await node.kv.put(b"k", b"w", timeout_s=TIMEOUT_S)
    assert refused
    assert 0 < written.commit_ts < mvcc_store.decode_number(node.store.meta(META_HLC_CEILING))


async def test_a_storage_cutover_under_load_loses_and_refuses_nothing(node: OneNode) -> None:
    await node.encryption.bootstrap(wrapped_storage=b"", wrapped_raft=b"", storage_dek_id=0,
                                    raft_dek_id=0, writers=[], timeout_s=TIMEOUT_S)
    stop = False
    written: dict[bytes, bytes] = {}

    async def write(worker: int) -> None:
        number = 0
        while not stop:
            key, value = b"w%d-%d" % (worker, number), b"v%d" % number
            await node.kv.put(key, value, timeout_s=TIMEOUT_S)
            written[key] = value
            number += 1

    workers = [asyncio.create_task(write(worker)) for worker in range(10)]
    for enable in (node.encryption.enable_storage_envelope, node.encryption.enable_raft_envelope):
        await enable(proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
    count = len(written)
    while len(written) < count + 50:
        await asyncio.sleep(0)
    stop = True
    await asyncio.gather(*workers)
    for key, value in written.items():
        assert (await node.kv.get(key, timeout_s=TIMEOUT_S)).value == value


async def test_a_read_at_a_timestamp_sees_the_past(node: OneNode) -> None:
    first = await node.kv.put(b"k", b"1", timeout_s=TIMEOUT_S)
    await node.kv.put(b"k", b"2", timeout_s=TIMEOUT_S)
    assert (await node.kv.get(b"k", ts=first.commit_ts, timeout_s=TIMEOUT_S)).value == b"1"
    assert not (await node.kv.get(b"k", ts=first.commit_ts - 1, timeout_s=TIMEOUT_S)).exists
    found = await node.kv.scan(b"", b"", limit=10, max_bytes=1 << 20, ts=first.commit_ts,
                               timeout_s=TIMEOUT_S)
    assert found.pairs == [(b"k", b"1")]


async def test_a_read_says_how_much_time_a_value_has_left(node: OneNode) -> None:
    written = await node.kv.put(b"k", b"v", ttl_ms=HOUR_MS, timeout_s=TIMEOUT_S)
    then = await node.kv.get(b"k", ts=written.commit_ts, timeout_s=TIMEOUT_S)
    now = await node.kv.get(b"k", timeout_s=TIMEOUT_S)
    assert then.ttl_ms == HOUR_MS
    assert 0 < now.ttl_ms <= HOUR_MS
    await node.kv.put(b"k", b"v", timeout_s=TIMEOUT_S)
    assert (await node.kv.get(b"k", timeout_s=TIMEOUT_S)).ttl_ms == 0


def follow_a_leader_that_answers(node: OneNode, monkeypatch: pytest.MonkeyPatch,
                                 *answers: bytes) -> None:
    """Forwarded groups get `answers`, one after the other."""
    left = iter(answers)

    async def answer(*arguments: object, **options: object) -> bytes:
        return next(left)

    status = dataclasses.replace(node.engine.status(), leader_id="n2")
    monkeypatch.setattr(node.engine, "is_leader", lambda: False)
    monkeypatch.setattr(node.engine, "status", lambda: status)
    monkeypatch.setattr(node.engine, "call", answer)


def reply(count: int) -> bytes:
    return forwarding.encode(WriteGroupReply([WriteReply(7, 8, None)] * count))


@pytest.mark.parametrize("answer", [b"\xff", reply(0), reply(2)],
                         ids=["no message", "too few answers", "too many answers"])
async def test_a_forwarded_write_whose_answer_does_not_parse_may_have_happened(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    count = coordinator.MAX_FORWARDS_IN_FLIGHT
    follow_a_leader_that_answers(node, monkeypatch, *[answer] * count, reply(1))
    for _ in range(count):
        with pytest.raises(OutcomeUnknown, match="does not parse"):
            await node.kv.put(b"k", b"v", timeout_s=TIMEOUT_S)
    assert await node.kv.put(b"k", b"v", timeout_s=TIMEOUT_S) == WriteResult(7, 8)


def lose_leader(node: OneNode, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nobody leads until the result is called; then it is who led before."""
    followed = node.engine.status()
    leaderless = dataclasses.replace(followed, leader_id="")
    monkeypatch.setattr(node.engine, "status", lambda: leaderless)

    def find_leader() -> None:
        monkeypatch.setattr(node.engine, "status", lambda: followed)
        node.kv.writes.wake()

    return find_leader


async def test_a_write_that_is_given_up_before_there_is_a_leader_leaves_nothing(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    follow_a_leader_that_answers(node, monkeypatch, reply(1))
    find_leader = lose_leader(node, monkeypatch)
    monkeypatch.setattr(coordinator, "MAX_QUEUE_BYTES", 1 << 20)
    kept = asyncio.create_task(node.kv.put(b"kept", b"v", timeout_s=TIMEOUT_S))
    for _ in range(3):
        given_up = asyncio.create_task(node.kv.put(b"k", bytes(900_000), timeout_s=TIMEOUT_S))
        await asyncio.sleep(0)  # it is in the queue, or was refused
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
    find_leader()
    assert await kept == WriteResult(7, 8)
    assert (len(node.kv.writes._queue), node.kv.writes._queue_bytes) == (0, 0)


async def test_what_waits_is_counted_as_memory_holds_it(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition takes eleven bytes in the log, and more than ten times as much here."""
    follow_a_leader_that_answers(node, monkeypatch, reply(1))
    find_leader = lose_leader(node, monkeypatch)
    monkeypatch.setattr(coordinator, "MAX_QUEUE_BYTES", 1_500 * PART_MEMORY_BYTES)

    async def write() -> WriteResult:
        return await node.kv.batch(
            [Op(OpKind.DELETE, b"k")], timeout_s=TIMEOUT_S,
            conditions=[Condition(b"%d" % (number % 10), number) for number in range(999)])

    tracemalloc.start()
    waits = asyncio.create_task(write())
    await asyncio.sleep(0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 2 < node.kv.writes._queue_bytes < 2 * held
    with pytest.raises(Overloaded):
        await write()
    find_leader()
    assert await waits == WriteResult(7, 8)
    assert node.kv.writes._queue_bytes == 0


async def test_giving_writes_up_costs_no_search_and_keeps_the_others_in_order(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Counted(coordinator._Pending):
        __slots__ = ()
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return self is other

    monkeypatch.setattr(coordinator, "_Pending", Counted)
    monkeypatch.setattr(node.engine, "is_leader", lambda: False)
    leaderless = dataclasses.replace(node.engine.status(), leader_id="")
    monkeypatch.setattr(node.engine, "status", lambda: leaderless)
    writes = [asyncio.create_task(node.kv.put(b"%03d" % number, b"v", timeout_s=TIMEOUT_S))
              for number in range(400)]
    await asyncio.sleep(0)
    size = node.kv.writes._queue_bytes // len(writes)
    kept = writes[::10]
    given_up = [write for write in writes if write not in set(kept)]
    for write in reversed(given_up):
        write.cancel()
    await asyncio.gather(*given_up, return_exceptions=True)
    assert compared == 0
    assert node.kv.writes._waiting() == len(kept)
    assert len(node.kv.writes._queue) <= 2 * len(kept)
    assert node.kv.writes._queue_bytes == len(kept) * size
    assert sum(bool(left.ops) for left in node.kv.writes._queue) == len(kept)
    monkeypatch.undo()
    node.kv.writes.wake()
    results = await asyncio.gather(*kept)
    stamps = [result.commit_ts for result in results]
    assert stamps == sorted(stamps)
    queue = node.kv.writes
    assert (len(queue._queue), queue._waiting(), queue._queue_bytes) == (0, 0, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
async def test_a_queue_of_writes_that_were_given_up_is_empty(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(node.engine, "is_leader", lambda: False)
        leaderless = dataclasses.replace(node.engine.status(), leader_id="")
        patched.setattr(node.engine, "status", lambda: leaderless)
        outcomes = await asyncio.gather(*(node.kv.put(b"k", b"v", timeout_s=0.01)
                                          for _ in range(count)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [NoLeader] * count
    assert (len(node.kv.writes._queue), node.kv.writes._queue_bytes) == (0, 0)
    await node.kv.put(b"k", b"w", timeout_s=TIMEOUT_S)


# --- scans --------------------------------------------------------------------------------------

SCAN_BYTES = 1 << 20
HOUR_MS = 3_600_000


async def put_records(node: OneNode, count: int, value: bytes) -> None:
    await node.kv.batch([Op(OpKind.PUT, b"%04d" % number, value) for number in range(count)],
                        timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("keys_only", [False, True])
@pytest.mark.parametrize("flushed", [False, True])
async def test_a_scan_holds_no_more_than_its_answer_may(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, flushed: bool, keys_only: bool) -> None:
    """It ends with the first pair that is too much, and has read little beyond that."""
    await put_records(node, 900, bytes(2_000))
    if flushed:
        node.store.flush_now()
    monkeypatch.setattr(mvcc_store, "TURN_COST", 20 * (2_000 + ENTRY_COST))
    turns = 0
    take_turn = node.store.scan_turn

    def counted(wanted: ScanRange, is_over: object) -> object:
        nonlocal turns
        turns += 1
        return take_turn(wanted)

    monkeypatch.setattr(node.store, "scan_turn", counted)
    pair = 4 + PAIR_OVERHEAD_BYTES + (0 if keys_only else 2_000)
    with pytest.raises(ResultTooLarge, match="50 pairs fit") as caught:
        await node.kv.scan(b"", b"", limit=900, max_bytes=50 * pair, keys_only=keys_only,
                           timeout_s=TIMEOUT_S)
    assert "pages of at most 50 pairs" in caught.value.remedy
    assert turns <= 4
    fitting = await node.kv.scan(b"", b"", limit=50, max_bytes=50 * pair, keys_only=keys_only,
                                 timeout_s=TIMEOUT_S)
    assert len(fitting.pairs) == 50


@pytest.mark.parametrize("keys_only", [False, True])
async def test_all_scans_together_hold_no_more_than_so_much(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, keys_only: bool) -> None:
    """One connection may have a thousand of them, and none ends before its answer is whole."""
    await put_records(node, 100, bytes(1_000))
    turn = 10 * (reads.PAIR_MEMORY_BYTES + PAIR_OVERHEAD_BYTES + 4 + (0 if keys_only else 1_000))
    monkeypatch.setattr(mvcc_store, "TURN_COST", 10 * (1_000 + ENTRY_COST))
    monkeypatch.setattr(reads, "MAX_GATHERED_BYTES", 25 * turn)
    monkeypatch.setattr(reads, "SMALL_ANSWER_BYTES", 2 * turn)

    async def scan(limit: int) -> int:
        return len((await node.kv.scan(b"", b"", limit=limit, max_bytes=SCAN_BYTES,
                                       keys_only=keys_only, timeout_s=TIMEOUT_S)).pairs)

    most = 0
    take_turn = node.store.scan_turn

    def counted(wanted: ScanRange, is_over: object) -> object:
        nonlocal most
        most = max(most, node.kv.reads._gathered_bytes)
        return take_turn(wanted)

    monkeypatch.setattr(node.store, "scan_turn", counted)
    large = [asyncio.create_task(scan(100)) for _ in range(10)]
    small = [asyncio.create_task(scan(20)) for _ in range(10)]
    assert await asyncio.gather(*small) == [20] * 10
    answers = await asyncio.gather(*large, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Overloaded)]
    assert 1 <= len(refused) <= 8
    assert [answer for answer in answers if answer not in refused] == [100] * (10 - len(refused))
    # Small ones are not kept from going on.
    assert 25 * turn <= most <= (26 + 2 * 10) * turn
    assert node.kv.reads._gathered_bytes == 0
    monkeypatch.setattr(reads, "MAX_GATHERED_BYTES", turn)
    assert await scan(100) == 100
    given_up = asyncio.create_task(scan(100))
    while not node.kv.reads._gathered_bytes:
        await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    assert node.kv.reads._gathered_bytes == 0


async def test_a_scan_over_what_is_deleted_lets_others_go_on(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvcc_store, "TURN_COST", 10 * ENTRY_COST)
    await node.kv.batch([Op(OpKind.DELETE, b"%04d" % number) for number in range(1_000)],
                        timeout_s=TIMEOUT_S)
    task = asyncio.create_task(node.kv.scan(b"", b"", limit=1, max_bytes=SCAN_BYTES,
                                            timeout_s=TIMEOUT_S))
    turns = 0
    take_turn = node.store.scan_turn

    def counted(wanted: ScanRange, is_over: object) -> object:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(between.append, turns)
        return take_turn(wanted)

    between: list[int] = []
    monkeypatch.setattr(node.store, "scan_turn", counted)
    assert (await task).pairs == []
    assert turns >= 100
    assert between[:99] == list(range(1, 100))


@pytest.mark.parametrize("turns", [1, 10])
async def test_many_scans_take_their_turns_one_after_the_other(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """However many there are, the loop is held for one turn at a time, and none is left behind."""
    await put_records(node, 100, b"v")
    if turns > 1:
        monkeypatch.setattr(mvcc_store, "TURN_COST", 100 // turns * ENTRY_COST)
    round_number = 0
    rounds: list[int] = []
    limits: list[int] = []
    take_turn = node.store.scan_turn

    def counted(wanted: ScanRange, is_over: object) -> object:
        rounds.append(round_number)
        limits.append(wanted.limit)
        return take_turn(wanted)

    async def count_rounds() -> None:
        nonlocal round_number
        while True:
            round_number += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(node.store, "scan_turn", counted)
    counter = asyncio.create_task(count_rounds())
    answers = await asyncio.gather(*(
        node.kv.scan(b"", b"", limit=100, max_bytes=SCAN_BYTES, timeout_s=TIMEOUT_S)
        for _ in range(20)))
    counter.cancel()
    assert [len(found.pairs) for found in answers] == [100] * 20
    assert len(rounds) == len(set(rounds)) >= 20 * turns
    # The first one queues for its second turn before the others are there for their first.
    assert turns == 1 or limits[:41] == [100, 90, *[100] * 19, 80, *[90] * 19]


def let_reads_take_no_time(node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the machine did nothing else."""
    monkeypatch.setattr(node.kv.reads._hlc, "clock", FakeClock())


def let_each_look_at_the_clock_take_a_second(node: OneNode,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """As if keys came from a slow disk."""
    clock = FakeClock()
    monkeypatch.setattr(clock, "monotonic", itertools.count().__next__)
    monkeypatch.setattr(node.kv.reads._hlc, "clock", clock)


async def test_a_scan_that_waits_for_its_disk_lets_others_go_on(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    await put_records(node, 100, b"v")
    let_each_look_at_the_clock_take_a_second(node, monkeypatch)
    turns = 0
    take_turn = node.store.scan_turn

    def counted(wanted: ScanRange, is_over: Callable[[], bool]) -> object:
        nonlocal turns
        turns += 1
        return take_turn(wanted, is_over)

    monkeypatch.setattr(node.store, "scan_turn", counted)
    ahead: list[tuple[bytes, int]] = []
    prefetch = node.store.prefetch

    def counted_prefetch(wanted: ScanRange, keys: int) -> Callable[[], None]:
        ahead.append((wanted.start, keys))
        return prefetch(wanted, keys)

    async def run_at_once(work: Callable[[], None]) -> None:
        work()

    monkeypatch.setattr(node.store, "prefetch", counted_prefetch)
    for prefetcher in (None, run_at_once):
        turns = 0
        monkeypatch.setattr(node.kv.reads, "_prefetcher", prefetcher)
        found = await node.kv.scan(b"", b"", limit=100, max_bytes=SCAN_BYTES, timeout_s=TIMEOUT_S)
        assert len(found.pairs) == 100
        assert turns == 100 // mvcc_store.ASKED_EVERY
        assert len(ahead) == (turns - 1 if prefetcher else 0)
    assert ahead[:2] == [(found.pairs[3][0] + b"\0", 96), (found.pairs[7][0] + b"\0", 92)]


def let_threads_hang(node: OneNode, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Nothing that is read ahead arrives; an item for each time that this was given up."""
    given_up: list[bool] = []

    async def hang(work: Callable[[], bool]) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            given_up.append(True)

    monkeypatch.setattr(node.kv.reads, "_prefetcher", hang)
    return given_up


async def test_a_scan_waits_for_its_disk_until_its_deadline(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    await put_records(node, 100, b"v")
    let_each_look_at_the_clock_take_a_second(node, monkeypatch)
    given_up = let_threads_hang(node, monkeypatch)
    with pytest.raises(DeadlineExceeded, match="did not get through"):
        await node.kv.scan(b"", b"", limit=100, max_bytes=SCAN_BYTES, timeout_s=0.05)
    assert given_up == [True]


async def stored_keys(node: OneNode) -> list[bytes]:
    found = await node.kv.scan(b"", b"", limit=1_000, max_bytes=SCAN_BYTES, timeout_s=TIMEOUT_S)
    return [key for key, _ in found.pairs]


def keys_read_ahead(node: OneNode, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The keys that are read by a thread first, from now on."""
    keys: list[bytes] = []
    prefetch = node.store.prefetch

    def noted(wanted: ScanRange, count: int) -> Callable[[], None]:
        assert (wanted.end, wanted.limit, count) == (wanted.start + b"\0", 1, 1)
        keys.append(wanted.start)
        return prefetch(wanted, count)

    async def in_the_next_round(work: Callable[[], None]) -> None:
        await asyncio.sleep(0)
        work()

    monkeypatch.setattr(node.store, "prefetch", noted)
    monkeypatch.setattr(node.kv.reads, "_prefetcher", in_the_next_round)
    return keys


@pytest.mark.parametrize("stale", [False, True])
async def test_of_reads_that_wait_for_their_disk_one_does_so_in_the_loop(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, stale: bool) -> None:
    """For the others threads read; a thousand in a row would hold up heartbeats."""
    await put_records(node, 20, b"v")
    let_reads_take_no_time(node, monkeypatch)
    read_ahead = keys_read_ahead(node, monkeypatch)
    keys = await stored_keys(node)

    async def get_all() -> None:
        found = await asyncio.gather(*(node.kv.get(key, stale=stale, timeout_s=TIMEOUT_S)
                                       for key in keys))
        assert [each.value for each in found] == [b"v"] * 20

    await get_all()
    assert not read_ahead
    let_each_look_at_the_clock_take_a_second(node, monkeypatch)
    await get_all()
    assert read_ahead == keys[1:]
    await node.kv.latest_commit_ts(keys[0], timeout_s=TIMEOUT_S)
    assert read_ahead == keys[1:] + keys[:1]


async def test_threads_read_for_the_loop_until_they_find_everything_in_memory(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they have to wait for the disk the loop would wait behind them."""
    await put_records(node, 2, b"v")
    let_reads_take_no_time(node, monkeypatch)
    first, second = await stored_keys(node)
    read_ahead: list[bytes] = []
    waits = True

    def prefetch(wanted: ScanRange, count: int) -> Callable[[], bool]:
        read_ahead.append(wanted.start)
        return lambda: waits

    async def run_at_once(work: Callable[[], bool]) -> bool:
        return work()

    monkeypatch.setattr(node.store, "prefetch", prefetch)
    monkeypatch.setattr(node.kv.reads, "_prefetcher", run_at_once)

    async def get(key: bytes) -> None:
        assert (await node.kv.get(key, timeout_s=TIMEOUT_S)).value == b"v"

    with monkeypatch.context() as slow:
        let_each_look_at_the_clock_take_a_second(node, slow)
        await get(first)
    assert not read_ahead
    for number in range(1, 30):
        await get(second)
        assert read_ahead == [second] * number
    waits = False
    for _ in range(reads.WARM_READS - 1):
        await get(first)
    waits = True
    await get(second)
    waits = False
    read_ahead.clear()
    for _ in range(2 * reads.WARM_READS):
        await get(first)
    assert read_ahead == [first] * reads.WARM_READS


async def test_a_read_waits_for_its_disk_until_its_deadline(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    await put_records(node, 2, b"v")
    let_each_look_at_the_clock_take_a_second(node, monkeypatch)
    given_up = let_threads_hang(node, monkeypatch)
    keys = await stored_keys(node)
    first, second = await asyncio.gather(
        *(node.kv.get(key, stale=True, timeout_s=0.05) for key in keys), return_exceptions=True)
    assert isinstance(first, ReadResult)
    assert isinstance(second, DeadlineExceeded)
    assert "the disk did not answer" in second.message
    assert given_up == [True]


async def test_writes_that_come_between_two_turns_are_not_shown(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan while one transfer follows another sees none of them by half."""
    monkeypatch.setattr(mvcc_store, "TURN_COST", 1)
    await put_records(node, 40, b"0")
    stop = False

    async def rewrite_all() -> int:
        number = 0
        while not stop:
            number += 1
            await put_records(node, 40, b"%d" % number)
            if number % 5 == 0:
                node.store.flush_now()
        return number

    writer = asyncio.create_task(rewrite_all())
    seen = set()
    while len(seen) < 5:
        pairs, _ = await node.kv.scan(b"", b"", limit=99, max_bytes=SCAN_BYTES,
                                      timeout_s=TIMEOUT_S)
        assert len(pairs) == 40
        values = {value for _, value in pairs}
        assert len(values) == 1
        seen |= values
    stop = True
    assert await writer >= 5


async def test_a_scan_that_waits_for_its_first_turn_shows_nothing_that_expires_meanwhile(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written meanwhile it shows, and a writer may have seen that the other was gone."""
    await node.kv.put(b"expiring", b"old", ttl_ms=HOUR_MS, timeout_s=TIMEOUT_S)
    await node.kv.reads._scan_turns._lock.acquire()
    scan = asyncio.create_task(node.kv.scan(b"", b"", limit=9, max_bytes=SCAN_BYTES,
                                            timeout_s=TIMEOUT_S))
    while not node.kv.reads._scan_turns._lock._waiters:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    later_ms = timestamp_ms(node.store.max_commit_ts) + HOUR_MS
    monkeypatch.setattr(node.kv.reads._hlc, "now_ms", lambda: later_ms)
    assert not (await node.kv.get(b"expiring", timeout_s=TIMEOUT_S)).exists
    await node.kv.put(b"next", b"new", timeout_s=TIMEOUT_S)
    node.kv.reads._scan_turns._lock.release()
    assert (await scan).pairs == [(b"next", b"new")]


@pytest.mark.parametrize("asked", ["latest", "a recent timestamp", "an old timestamp"])
async def test_a_scan_that_compaction_overtakes_begins_anew_unless_its_time_is_gone(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(mvcc_store, "TURN_COST", 1)
    await put_records(node, 5, b"old")
    await node.kv.put(b"expiring", b"old", ttl_ms=HOUR_MS, timeout_s=TIMEOUT_S)
    old_ts = node.store.max_commit_ts
    ts = {"latest": 0, "a recent timestamp": old_ts + pack_timestamp(2 * HOUR_MS),
          "an old timestamp": old_ts}[asked]
    take_turn = node.store.scan_turn
    turns = 0
    overtaken = False

    def slow(wanted: ScanRange, is_over: object) -> object:
        nonlocal turns
        turns += 1
        return take_turn(wanted) if overtaken or turns < 3 else ([], wanted)

    monkeypatch.setattr(node.store, "scan_turn", slow)
    scan = asyncio.create_task(node.kv.scan(b"", b"", limit=9, max_bytes=SCAN_BYTES, ts=ts,
                                            timeout_s=TIMEOUT_S))
    while turns < 3:
        await asyncio.sleep(0)
    await put_records(node, 5, b"new")
    node.store.raise_horizon(old_ts + 1)
    later_ms = timestamp_ms(old_ts) + 2 * HOUR_MS
    monkeypatch.setattr(node.kv.reads._hlc, "now_ms", lambda: later_ms)
    overtaken = True
    if asked == "an old timestamp":
        with pytest.raises(InvalidArgument, match="is before"):
            await scan
    else:
        assert [value for _, value in (await scan).pairs] == [b"new"] * 5


@pytest.mark.parametrize(("stale", "age_s", "stale_ms"), [
    (True, 1.5, 3_500), (True, math.inf, -1), (False, 1.5, 0)],
    ids=["stale", "never complete", "linearizable"])
async def test_a_stale_scan_says_how_old_its_first_pair_is(
        node: OneNode, monkeypatch: pytest.MonkeyPatch, stale: bool, age_s: float,
        stale_ms: int) -> None:
    """It takes two seconds here, from one turn to the next."""
    monkeypatch.setattr(mvcc_store, "TURN_COST", 1)
    await put_records(node, 2, b"v")
    loop = asyncio.get_running_loop()
    started, turns = math.floor(loop.time()), 0
    take_turn = node.store.scan_turn

    def slow(wanted: ScanRange, is_over: object) -> object:
        nonlocal turns
        turns += 1
        return take_turn(wanted)

    with monkeypatch.context() as patch:
        patch.setattr(node.store, "scan_turn", slow)
        patch.setattr(node.engine, "state_age_s", lambda: age_s)
        patch.setattr(loop, "time", lambda: started + (2 if turns > 1 else 0))
        found = await node.kv.scan(b"", b"", limit=9, max_bytes=SCAN_BYTES, stale=stale,
                                   timeout_s=TIMEOUT_S)
    assert turns > 1
    assert found.stale_ms == stale_ms


async def test_a_scan_ends_at_its_deadline(node: OneNode,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvcc_store, "TURN_COST", 1)
    await put_records(node, 2, b"v")
    loop = asyncio.get_running_loop()
    late = asyncio.Event()
    take_turn = node.store.scan_turn

    def slow(wanted: ScanRange, is_over: object) -> object:
        late.set()
        return take_turn(wanted)

    monkeypatch.setattr(node.store, "scan_turn", slow)
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + (TIMEOUT_S if late.is_set() else 0))
    with pytest.raises(DeadlineExceeded, match="the scan"):
        await node.kv.scan(b"", b"", limit=9, max_bytes=SCAN_BYTES, timeout_s=TIMEOUT_S)


async def test_large_writes_do_not_all_go_to_the_leader_at_once(
        node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link would be dropped for what waits on it. One that found no leader counts no more."""
    value_bytes, count = 700 << 10, 6
    sizes: list[int] = []
    most = 0
    answer = asyncio.Event()

    async def forward(leader_id: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        nonlocal most
        sizes.append(len(payload))
        most = max(most, sum(sizes))
        try:
            await answer.wait()
            if not found:
                found.append(leader_id)
                raise Unreachable("no link")
        finally:
            sizes.remove(len(payload))
        group = forwarding.decode(payload, WriteGroup)
        return forwarding.encode(WriteGroupReply([WriteReply(7, 8, None) for _ in group.items]))

    found: list[str] = []
    status = dataclasses.replace(node.engine.status(), leader_id="n2")
    monkeypatch.setattr(node.engine, "is_leader", lambda: False)
    monkeypatch.setattr(node.engine, "status", lambda: status)
    monkeypatch.setattr(node.engine, "call", forward)
    monkeypatch.setattr(coordinator, "MAX_FORWARD_BYTES", 1 << 20)
    writes = [asyncio.create_task(node.kv.put(b"%d" % number, bytes(value_bytes),
                                              timeout_s=TIMEOUT_S)) for number in range(count)]
    async with asyncio.timeout(TIMEOUT_S):
        while len(sizes) < 2:
            await asyncio.sleep(0)
    answer.set()
    results = await asyncio.gather(*writes)
    assert results == [WriteResult(7, 8)] * count
    assert 2 * value_bytes < most < 3 * value_bytes
