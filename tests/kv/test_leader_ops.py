"""Operations on the keys of running clusters: races, refusals, and what each leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import MAX_EPOCH, full_node_id, node_id16
from elastickv.errors import (
    DeadlineExceeded,
    EncryptionConflict,
    GateOff,
    NodeIdCollision,
    NotBootstrapped,
    NotCapable,
    OutcomeUnknown,
    Overloaded,
)
from elastickv.keys.guards import NodeIdTaken
from elastickv.keys.registry import decode_row_value, row_key
from elastickv.keys.usage import USAGE_PREFIX
from elastickv.kv import admission, leader_ops
from elastickv.kv.api import CutoverResult, WriterRow
from elastickv.kv.forwarding import (
    METHOD_ADMIN,
    METHOD_CAPABILITY,
    METHOD_REGISTER_SELF,
    RegisterSelf,
)
from elastickv.kv.key_operations import RegisterWriters, RotateDek
from elastickv.wire import HlcCeiling, encode_entry
from tests.kv.key_cluster import KEK_BYTES, TIMEOUT_S, KeyCluster, MakeCluster, Node, until

OTHER_KEK = bytes(32)


async def test_a_rotation_before_the_writer_is_confirmed_does_not_block_the_confirmation(
        make_cluster: MakeCluster) -> None:
    """After the raft cutover the rotation's entry needs the very writer whose registration needs
    the lock that rotations hold."""
    cluster = await make_cluster(1)
    await cluster.nodes["n1"].encrypt()
    await cluster.nodes["n1"].stop()
    node = cluster.make("n1")
    async with node.encryption.operations.lock:  # the registration cannot go on
        await node.start(encryption=False)
        await cluster.leader()
        rotation = asyncio.create_task(node.rotate(Purpose.RAFT))
        await asyncio.sleep(0)
        assert node.encryption.writers.epoch(node.active(Purpose.RAFT)) is None
    new_id = await rotation
    assert node.active(Purpose.RAFT) == new_id
    await node.put(b"k")


async def test_a_writer_that_would_keep_a_member_from_registering_is_refused(
        make_cluster: MakeCluster) -> None:
    """For example a member named by its 16-bit id. Its row could never be removed."""
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    short_id = node_id16(full_node_id("n1"))
    await node.encrypt()
    with pytest.raises(EncryptionConflict, match="of member n1"):
        await node.encryption.register_writers(
            dek_id=node.active(Purpose.STORAGE), writers=[WriterRow(short_id, 1)],
            timeout_s=TIMEOUT_S)
    with pytest.raises(EncryptionConflict, match="of member n1"):
        await node.encryption.rotate_dek(
            purpose=Purpose.STORAGE, wrapped=Kek(KEK_BYTES).generate_wrapped_dek(), new_dek_id=777,
            proposer_node_id=short_id, proposer_local_epoch=1, timeout_s=TIMEOUT_S)
    await node.put(b"k")
    assert not node.fatal


@pytest.mark.parametrize("way", ["register_writers", "rotate_dek", "enable_storage_envelope"])
async def test_strangers_cannot_take_every_node_id(
        make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Rows are never removed; with all 16-bit ids taken no node could be added."""
    monkeypatch.setattr(admission, "MAX_OUTSIDERS", 2)
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.bootstrap()
    await node.encryption.register_writers(
        dek_id=node.active(Purpose.STORAGE),
        writers=[WriterRow(full_node_id(name), 1) for name in ("n7", "n8")], timeout_s=TIMEOUT_S)
    before = node.writer_rows()
    stranger = full_node_id("n9")
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "register_writers": lambda: node.encryption.register_writers(
            dek_id=node.active(Purpose.STORAGE), writers=[WriterRow(stranger, 1)],
            timeout_s=TIMEOUT_S),
        "rotate_dek": lambda: node.encryption.rotate_dek(
            purpose=Purpose.STORAGE, wrapped=Kek(KEK_BYTES).generate_wrapped_dek(),
            new_dek_id=777, proposer_node_id=stranger, proposer_local_epoch=1,
            timeout_s=TIMEOUT_S),
        "enable_storage_envelope": lambda: node.encryption.enable_storage_envelope(
            proposer_node_id=stranger, proposer_local_epoch=1, timeout_s=TIMEOUT_S)}
    with pytest.raises(EncryptionConflict, match="no members"):
        await calls[way]()
    assert node.writer_rows() == before
    await node.encryption.operations.register_self(
        RegisterSelf(node.active(Purpose.STORAGE), stranger, 0))


async def test_writers_are_registered_together_or_not_at_all(make_cluster: MakeCluster) -> None:
    """A caller that is told that nothing was done must be able to believe it."""
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    before = node.writer_rows()
    stranger = full_node_id("n8")
    for refused in ([WriterRow(stranger, 5), WriterRow(node.full_id, 0)],
                    [WriterRow(stranger, 5), WriterRow(stranger, 4)],
                    [WriterRow(stranger, 5), WriterRow(stranger ^ (1 << 40), 5)],
                    [WriterRow(stranger, 5), WriterRow(node_id16(full_node_id("n1")), 1)]):
        with pytest.raises(EncryptionConflict):
            await node.encryption.register_writers(
                dek_id=node.active(Purpose.STORAGE), writers=refused, timeout_s=TIMEOUT_S)
        assert node.writer_rows() == before
    await node.encryption.register_writers(
        dek_id=node.active(Purpose.STORAGE),
        writers=[WriterRow(stranger, 4), WriterRow(stranger, 5)], timeout_s=TIMEOUT_S)
    assert len(node.writer_rows()) == len(before) + 1


async def test_two_rotations_at_once_are_two_in_a_row(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3)
    leader = await cluster.leader()
    await leader.encrypt()
    others = [node for node in cluster.nodes.values() if node is not leader]
    before = set(leader.sidecar.keys)
    made = await asyncio.gather(*(node.rotate() for node in (leader, *others, leader)))
    await cluster.settled()
    assert len(set(made)) == 4
    for node in cluster.nodes.values():
        assert set(node.sidecar.keys) == before | set(made)
        assert node.active(Purpose.STORAGE) == leader.active(Purpose.STORAGE)
    assert leader.active(Purpose.STORAGE) in made


async def test_few_changes_wait_for_one_another_also_when_their_callers_give_up(
        make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on to its end, and writers are registered behind them."""
    monkeypatch.setattr(leader_ops, "MAX_UNDER_WAY", 3)
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    before = len(node.sidecar.keys)
    change = RotateDek(Purpose.STORAGE, b"", 0, 0, 0)
    async with node.encryption.operations.lock:
        given_up = [asyncio.create_task(node.rotate()) for _ in range(2)]
        given_up.append(asyncio.create_task(node.encryption.register_writers(
            dek_id=node.active(Purpose.STORAGE), writers=[WriterRow(17, 0)], timeout_s=TIMEOUT_S)))
        await until(lambda: node.encryption.operations._under_way == 3)
        for each in given_up:
            each.cancel()
        for refused in (change, RegisterWriters(node.active(Purpose.STORAGE), [])):
            with pytest.raises(Overloaded, match="3 key changes are under way"):
                await node.encryption.operations.run(refused)
        registered = asyncio.create_task(node.encryption.operations.register_self(
            RegisterSelf(node.active(Purpose.STORAGE), node.full_id, 9)))
        await asyncio.sleep(0)
        assert not registered.done()
    await registered
    await until(lambda: len(node.sidecar.keys) == before + 2)
    await node.encryption.operations.run(change)
    assert len(node.sidecar.keys) == before + 3


async def test_a_sidecar_that_did_not_come_in_time_is_no_unknown_outcome(
        make_cluster: MakeCluster) -> None:
    """It is only read."""
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    async with node.encryption.operations.lock:
        with pytest.raises(DeadlineExceeded, match="within the deadline"):
            await node.encryption.resync_sidecar(caller_full_node_id=node.full_id, timeout_s=0.05)


async def test_an_automatic_rotation_of_a_dek_that_was_just_replaced_does_nothing(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    judged = node.active(Purpose.STORAGE)
    new_id = await node.rotate()
    await node.encryption.rotate_own(Purpose.STORAGE, judged)
    assert node.active(Purpose.STORAGE) == new_id


async def test_every_member_of_a_cluster_becomes_a_writer_of_every_active_dek(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3)
    leader = await cluster.leader()
    await leader.encrypt()
    await leader.rotate()
    await cluster.settled()
    for node in cluster.nodes.values():
        for purpose in Purpose:
            dek_id = node.active(purpose)
            value = leader.store.row(row_key(dek_id, node_id16(node.full_id)))
            assert value is not None
            assert decode_row_value(value).last_seen_epoch == \
                node.encryption.writers.epoch(dek_id)


async def test_an_own_rotation_needs_no_second_round(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    index = node.store.applied_index
    new_id = await node.rotate()
    assert node.encryption.writers.epoch(new_id) == 1
    assert node.encryption.budgets.take(new_id, 1) is not None
    # The rotation and its reservation, nothing else.
    assert node.store.applied_index <= index + 2


async def test_a_restart_takes_a_higher_epoch(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    await cluster.nodes["n1"].encrypt()
    epochs = []
    for _ in range(3):
        await cluster.settled()
        node = cluster.nodes["n1"]
        await node.put(b"k")
        epochs.append(node.encryption.writers.epoch(node.active(Purpose.STORAGE)))
        await cluster.restart("n1")
    assert epochs == sorted(set(epochs))


async def test_a_member_with_another_kek_keeps_the_bootstrap_out_of_the_log(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3, by_node={"n3": {"kek": OTHER_KEK}})
    leader = await cluster.leader()
    if leader.node_id == "n3":
        await cluster.hand_over("n1")
        await until(lambda: cluster.nodes["n1"].engine.is_leader())
    with pytest.raises(NotCapable, match="KEK of n3 does not unwrap"):
        await cluster.nodes["n1"].bootstrap()
    assert all(node.applier.sidecar is None for node in cluster.nodes.values())
    assert all(node.fatal == [] for node in cluster.nodes.values())


async def test_a_cutover_names_every_member_that_stands_in_the_way(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(5, by_node={"n2": {"gate": False}})
    leader = await cluster.leader()
    if leader.node_id in ("n2", "n3"):
        await cluster.hand_over("n1")
        await until(lambda: cluster.nodes["n1"].engine.is_leader())
        leader = cluster.nodes["n1"]
    await cluster.nodes["n3"].stop()
    asker = next(node for name, node in cluster.nodes.items() if name not in ("n2", "n3"))
    with pytest.raises(NotCapable) as caught:
        await asker.bootstrap()
    assert "n2 runs without" in str(caught.value)
    assert "n3 does not answer" in str(caught.value)
    assert "n1" not in str(caught.value)
    assert leader.applier.sidecar is None
    cluster.make("n3")


async def test_cutovers_are_idempotent_and_in_order(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    encryption = cluster.nodes["n1"].encryption
    with pytest.raises(NotBootstrapped, match="bootstrap first"):
        await encryption.enable_storage_envelope(
            proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
    await cluster.nodes["n1"].bootstrap()
    with pytest.raises(EncryptionConflict, match="enable-storage-envelope first"):
        await encryption.enable_raft_envelope(
            proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
    for enable in (encryption.enable_storage_envelope, encryption.enable_raft_envelope):
        first = await enable(proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
        again = await enable(proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
        assert not first.was_already_active
        assert again.was_already_active
        assert again.applied_index == first.applied_index
        assert [each.full_node_id for each in first.capabilities] == [full_node_id("n1")]


async def test_no_write_is_lost_by_the_cutovers_and_every_later_entry_is_sealed(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3)
    leader = await cluster.leader()
    await leader.bootstrap()
    stop = asyncio.Event()
    written: list[bytes] = []

    async def writer(name: str) -> None:
        number = 0
        while not stop.is_set():
            key = f"{name}-{number}".encode()
            await cluster.nodes[name].put(key, key)
            written.append(key)
            number += 1

    writers = [asyncio.create_task(writer(name)) for name in cluster.nodes]
    await until(lambda: len(written) > 50)
    await leader.encryption.enable_storage_envelope(
        proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
    await leader.encryption.enable_raft_envelope(
        proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
    count = len(written)
    await until(lambda: len(written) > count + 50)
    stop.set()
    await asyncio.gather(*writers)
    for key in written:
        assert (await leader.kv.get(key, timeout_s=TIMEOUT_S)).value == key
    assert all(node.fatal == [] for node in cluster.nodes.values())


async def test_the_gate_refuses_every_change(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1, options={"gate": False})
    node = cluster.nodes["n1"]
    index = node.engine.status().last_log_index
    for call in (node.bootstrap(), node.rotate(), node.encryption.register_writers(
            dek_id=1, writers=[WriterRow(1, 1)], timeout_s=1.0)):
        with pytest.raises(GateOff, match="--kekFile"):
            await call
    assert node.engine.status().last_log_index == index


def colliding_names() -> tuple[str, str]:
    """Two raft ids with one 16-bit node id."""
    seen: dict[int, str] = {}
    number = 0
    while True:
        name = f"m{number}"
        short = node_id16(full_node_id(name))
        if short in seen:
            return seen[short], name
        seen[short] = name
        number += 1


async def test_the_second_of_two_colliding_nodes_stops_and_the_rest_goes_on(
        make_cluster: MakeCluster) -> None:
    one, two = colliding_names()
    cluster = await make_cluster(names=[one, two, "n3"])
    leader = await cluster.leader()
    writers = [WriterRow(full_node_id(name), 0) for name in (one, "n3")]
    kek = leader.encryption.require_kek()
    await leader.encryption.bootstrap(
        wrapped_storage=kek.generate_wrapped_dek(), wrapped_raft=kek.generate_wrapped_dek(),
        storage_dek_id=1, raft_dek_id=2, writers=writers, timeout_s=TIMEOUT_S)
    refused = cluster.nodes[two]
    await until(lambda: bool(refused.fatal))
    error = refused.fatal[0]
    assert isinstance(error, NodeIdTaken)
    assert "--raftId" in error.remedy
    await until(lambda: all(cluster.nodes[name].encryption.writers.epoch(1)
                            for name in (one, "n3")))
    assert cluster.nodes[one].fatal == []


async def test_a_registration_of_an_unknown_dek_is_refused(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.bootstrap()
    index = node.engine.status().last_log_index
    with pytest.raises(EncryptionConflict, match="no DEK 99"):
        await node.encryption.operations.register_self(RegisterSelf(99, node.full_id, 1))
    with pytest.raises(NodeIdCollision):
        await node.encryption.operations.register_self(RegisterSelf(
            node.active(Purpose.RAFT), node.full_id ^ (1 << 40), 1))
    assert node.engine.status().last_log_index - index <= 2


async def test_status_tells_a_line_for_each_problem(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3)
    leader = await cluster.leader()
    await leader.encrypt()
    await cluster.settled()
    rows = {row.node_id: row for row in await leader.encryption.member_status(timeout_s=5)}
    assert {name: list(row.problems) for name, row in rows.items()} == {
        name: [] for name in cluster.nodes}
    assert {dek.writer_state for dek in rows["n1"].deks if dek.active} == {"confirmed"}

    down = next(name for name, node in cluster.nodes.items() if node is not leader)
    await cluster.nodes[down].stop()
    rows = {row.node_id: row for row in await leader.encryption.member_status(timeout_s=5)}
    assert rows[down].reachable is False
    assert "start it" in rows[down].problems[0]
    cluster.make(down)


@pytest.mark.parametrize("method", [METHOD_ADMIN, METHOD_REGISTER_SELF])
async def test_an_answer_that_does_not_parse_is_an_unknown_outcome(
        make_cluster: MakeCluster, method: str) -> None:
    """The leader has carried out what it answers: nobody may be told that nothing was done."""
    cluster = await make_cluster(3)
    leader = await cluster.leader()
    await leader.encrypt()
    await cluster.settled()
    follower = next(node for node in cluster.nodes.values() if node is not leader)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        METHOD_ADMIN: follower.rotate,
        METHOD_REGISTER_SELF: lambda: follower.encryption._register_through_leader(
            follower.active(Purpose.STORAGE), 9)}

    async def garbage(peer_id: str, method: str, payload: bytes) -> bytes:
        return b"\xc1"

    leader.engine.handle(method, garbage)
    with pytest.raises(OutcomeUnknown, match="does not parse"):
        await calls[method]()


async def test_a_cutover_that_is_cancelled_undecided_leaves_the_barrier_closed(
        make_cluster: MakeCluster) -> None:
    """Its entry may yet be committed, and nothing in the clear may be above it."""
    cluster = await make_cluster(1)
    proposer = cluster.nodes["n1"].encryption.proposer
    cutover = asyncio.create_task(proposer.propose_behind_barrier(encode_entry(HlcCeiling(5))))
    while not proposer.held:
        await asyncio.sleep(0)
    cutover.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cutover
    assert proposer.held
    assert proposer.submit(encode_entry(HlcCeiling(6)), timeout_s=TIMEOUT_S) is None


async def test_a_report_reads_the_usage_rows_once_however_many_deks_there_are(
        make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    for _ in range(5):
        await node.rotate()
    await cluster.settled()
    expected = {dek_id: node.encryption.budgets.total(dek_id) for dek_id in node.sidecar.keys}
    read, rows = [], node.store.rows
    monkeypatch.setattr(node.store, "rows",
                        lambda prefix=b"": read.append(prefix) or rows(prefix))
    report = node.encryption.members.report()
    assert {dek.dek_id: dek.writes for dek in report.deks} == expected
    assert read == [USAGE_PREFIX]


async def move_leadership(cluster: KeyCluster, node_id: str) -> None:
    await cluster.hand_over(node_id)
    await until(cluster.nodes[node_id].engine.is_leader)


@pytest.mark.parametrize("operation", ["enable_storage_envelope", "enable_raft_envelope"])
async def test_a_cutover_that_was_made_under_another_leader_meanwhile_is_not_made_again(
        make_cluster: MakeCluster, operation: str) -> None:
    """The leader waits for a member's answer, loses the leadership and gets it back. A second raft
    cutover would be an entry in the clear above the first, at which every replica stops."""
    cluster = await make_cluster(3)
    first, second, slow = cluster.nodes.values()
    await move_leadership(cluster, first.node_id)
    await first.bootstrap()
    if operation == "enable_raft_envelope":
        await first.encryption.enable_storage_envelope(
            proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
    await cluster.settled()
    answer, asked = asyncio.Event(), asyncio.Event()
    serve = slow.encryption.members._serve_capability

    async def serve_slowly(peer_id: str, method: str, payload: bytes) -> bytes:
        if peer_id == first.node_id:
            asked.set()
            await answer.wait()
        return await serve(peer_id, method, payload)

    slow.engine.handle(METHOD_CAPABILITY, serve_slowly)

    def enable(node: Node) -> Awaitable[CutoverResult]:
        return getattr(node.encryption, operation)(
            proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)

    waiting = asyncio.ensure_future(enable(first))
    await asked.wait()
    await move_leadership(cluster, second.node_id)
    made = await enable(second)
    await move_leadership(cluster, first.node_id)
    answer.set()
    repeated = await waiting
    assert (repeated.applied_index, repeated.was_already_active) == (made.applied_index, True)
    await first.put(b"k")
    await cluster.settled()
    assert not any(node.fatal for node in cluster.nodes.values())


async def test_a_cutover_registers_nobody_who_shadows_a_member(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.bootstrap()
    with pytest.raises(EncryptionConflict, match="of member n1"):
        await node.encryption.enable_storage_envelope(
            proposer_node_id=node.full_id ^ (1 << 40), proposer_local_epoch=1, timeout_s=TIMEOUT_S)
    assert not node.sidecar.storage_envelope_active


async def test_no_member_is_registered_with_the_last_epoch(make_cluster: MakeCluster) -> None:
    """It takes the epoch after it: there is none, and the member would stop for good."""
    cluster = await make_cluster(1)
    node, kek = cluster.nodes["n1"], Kek(KEK_BYTES)
    with pytest.raises(EncryptionConflict, match="the last one"):
        await node.encryption.bootstrap(
            wrapped_storage=kek.generate_wrapped_dek(), wrapped_raft=kek.generate_wrapped_dek(),
            storage_dek_id=11, raft_dek_id=22, writers=[WriterRow(node.full_id, MAX_EPOCH)],
            timeout_s=TIMEOUT_S)
    await node.bootstrap()
    with pytest.raises(EncryptionConflict, match="the last one"):
        await node.encryption.rotate_dek(
            purpose=Purpose.STORAGE, wrapped=kek.generate_wrapped_dek(), new_dek_id=33,
            proposer_node_id=node.full_id, proposer_local_epoch=MAX_EPOCH, timeout_s=TIMEOUT_S)
    with pytest.raises(EncryptionConflict, match="the last one"):
        await node.encryption.enable_storage_envelope(
            proposer_node_id=node.full_id, proposer_local_epoch=MAX_EPOCH, timeout_s=TIMEOUT_S)
    with pytest.raises(EncryptionConflict, match="the last one"):
        await node.encryption.register_writers(
            dek_id=node.active(Purpose.STORAGE), writers=[WriterRow(node.full_id, MAX_EPOCH)],
            timeout_s=TIMEOUT_S)
    await node.encryption.register_writers(
        dek_id=node.active(Purpose.STORAGE), writers=[WriterRow(full_node_id("n9"), MAX_EPOCH)],
        timeout_s=TIMEOUT_S)
    await cluster.settled()
    assert not node.fatal


async def test_the_same_request_once_more_says_that_it_is_done(make_cluster: MakeCluster) -> None:
    """As after an unknown outcome: meanwhile the member has registered its next epoch itself."""
    cluster = await make_cluster(1)
    node, kek = cluster.nodes["n1"], Kek(KEK_BYTES)
    wrapped = [kek.generate_wrapped_dek() for _ in range(3)]

    async def bootstrap(epoch: int = 0) -> object:
        return await node.encryption.bootstrap(
            wrapped_storage=wrapped[0], wrapped_raft=wrapped[1], storage_dek_id=11, raft_dek_id=22,
            writers=[WriterRow(node.full_id, epoch)], timeout_s=TIMEOUT_S)

    async def rotate(dek: bytes, epoch: int = 0) -> object:
        return await node.encryption.rotate_dek(
            purpose=Purpose.STORAGE, wrapped=dek, new_dek_id=33, proposer_node_id=node.full_id,
            proposer_local_epoch=epoch, timeout_s=TIMEOUT_S)

    for request in (bootstrap, lambda: rotate(wrapped[2])):
        first = await request()
        await cluster.settled()
        index = node.engine.status().last_log_index
        assert await request() == first
        assert node.engine.status().last_log_index == index
    with pytest.raises(EncryptionConflict):
        await bootstrap()
    with pytest.raises(EncryptionConflict, match="another key"):
        await rotate(kek.generate_wrapped_dek())
    assert not node.fatal
