"""Counting writes: what is reserved covers what was made, across restarts and leaders; and what the
limit does."""

from __future__ import annotations

import asyncio

import pytest

from elastickv.crypto.keystore import Purpose
from elastickv.errors import DekExhausted, NotCapable
from elastickv.keys.usage import Limits
from elastickv.kv import rotation
from elastickv.kv.api import Op, OpKind
from elastickv.kv.rotation import RotationSettings, RotationState
from tests.kv.key_cluster import TIMEOUT_S, KeyCluster, MakeCluster, Node, until

SMALL = {"rotation": RotationSettings(Limits(1000))}


def require_covered(cluster: KeyCluster) -> None:
    """Every node's own copy of the reservations covers what that process has made."""
    for node in cluster.nodes.values():
        for dek_id in node.sidecar.keys:
            assert node.nonces_made(dek_id) <= node.encryption.budgets.total(dek_id)


async def test_reservations_cover_every_nonce_through_restarts_and_leaders(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3)
    await (await cluster.leader()).encrypt()
    await cluster.settled()
    made: dict[int, int] = {}
    for round_number in range(4):
        leader = await cluster.leader()
        await asyncio.gather(*(leader.put(b"%d-%d" % (round_number, i)) for i in range(40)))
        require_covered(cluster)
        for purpose in Purpose:
            dek_id = leader.active(purpose)
            made[dek_id] = made.get(dek_id, 0) + leader.nonces_made(dek_id)
        await cluster.restart(leader.node_id)
        await cluster.settled()
    for node in cluster.nodes.values():
        assert {dek_id: node.encryption.budgets.total(dek_id) for dek_id in made} == {
            dek_id: (await cluster.leader()).encryption.budgets.total(dek_id) for dek_id in made}
        for dek_id, count in made.items():
            assert node.encryption.budgets.total(dek_id) >= count


async def test_no_nonce_before_its_reservation_is_applied(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    dek_id = node.active(Purpose.STORAGE)
    budgets = node.encryption.budgets
    factory = budgets.take(dek_id, 1)
    assert factory is not None
    wanted = budgets.total(dek_id) - factory.count + 1
    assert budgets.take(dek_id, wanted) is None
    await until(lambda: budgets.take(dek_id, wanted) is not None)


async def test_a_dek_is_rotated_before_its_limit_and_no_write_fails(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(3, options=SMALL)
    leader = await cluster.leader()
    await leader.encrypt()
    first = leader.active(Purpose.STORAGE)
    for start in range(0, 3000, 100):
        await asyncio.gather(*(leader.put(b"%d" % i) for i in range(start, start + 100)))
    require_covered(cluster)
    await cluster.settled()
    used = [leader.encryption.budgets.total(dek_id) for dek_id in leader.sidecar.keys]
    assert leader.active(Purpose.STORAGE) != first
    assert len(used) >= 5
    assert max(used) <= 1010  # rotations and registrations of the cluster's own come on top
    assert (await leader.kv.get(b"17", timeout_s=TIMEOUT_S)).value == b"v"


async def test_a_batch_larger_than_the_limit_takes_a_whole_dek(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1, options={"rotation": RotationSettings(Limits(100))})
    node = cluster.nodes["n1"]
    await node.encrypt()
    await node.put(b"k")
    ops = [Op(OpKind.PUT, b"key-%d" % i, b"v") for i in range(250)]
    await asyncio.wait_for(node.kv.batch(ops, timeout_s=TIMEOUT_S), TIMEOUT_S)
    require_covered(cluster)


async def spend(node: Node) -> DekExhausted:
    """Write until writes are refused."""
    for number in range(3000):
        try:
            await node.put(b"%d" % number)
        except DekExhausted as error:
            return error
    raise AssertionError("3000 writes went under a limit of 1000")


def let_no_rotation_succeed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` undoes it."""
    async def refuse(wrapped: object) -> None:
        raise NotCapable("a member stands in the way")

    monkeypatch.setattr(node.encryption.members, "require_unwraps", refuse)


async def test_writes_are_refused_at_the_limit_while_no_rotation_succeeds(
        make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await make_cluster(1, options=SMALL)
    node = cluster.nodes["n1"]
    await node.encrypt()
    let_no_rotation_succeed(node, monkeypatch)
    error = await spend(node)
    assert "rotate-dek" in error.remedy
    assert node.encryption.budgets.total(node.active(Purpose.STORAGE)) <= 1000
    assert node.encryption.rotation.state(Purpose.STORAGE) is RotationState.WAITING
    assert (await node.kv.get(b"0", timeout_s=TIMEOUT_S)).value == b"v"
    (row,) = await node.encryption.member_status(timeout_s=5)
    assert any("used up" in problem and "rotate-dek" in problem for problem in row.problems)

    monkeypatch.undo()
    await node.rotate(Purpose.STORAGE)
    await node.rotate(Purpose.RAFT)
    await node.put(b"after")
    require_covered(cluster)


async def test_a_write_that_waits_for_a_rotation_is_refused_when_that_fails(
        make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "RETRY_S", 0.1)
    cluster = await make_cluster(1, options=SMALL)
    node = cluster.nodes["n1"]
    await node.encrypt()
    begun, is_decided = asyncio.Event(), asyncio.Event()
    is_decided.set()

    async def refuse(wrapped: object) -> None:
        if node.encryption.rotation.state(Purpose.RAFT) is RotationState.ROTATING \
                and not is_decided.is_set():
            begun.set()
            await is_decided.wait()
        raise NotCapable("a member stands in the way")

    monkeypatch.setattr(node.encryption.members, "require_unwraps", refuse)
    assert "raft" in (await spend(node)).remedy
    is_decided.clear()
    await asyncio.wait_for(begun.wait(), TIMEOUT_S)
    write = asyncio.create_task(node.put(b"k"))
    await asyncio.sleep(0.1)
    assert not write.done()
    is_decided.set()
    with pytest.raises(DekExhausted):
        await asyncio.wait_for(write, 5)


async def test_a_cutover_may_be_repeated_although_its_dek_is_spent(
        make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await make_cluster(1, options=SMALL)
    node = cluster.nodes["n1"]
    await node.encrypt()
    let_no_rotation_succeed(node, monkeypatch)
    await spend(node)
    budgets, storage_dek = node.encryption.budgets, node.active(Purpose.STORAGE)
    while not budgets.is_spent(storage_dek):
        factory = budgets.take(storage_dek, 1)
        if factory is not None:
            factory.next()
        await asyncio.sleep(0)
    assert budgets.is_spent(node.active(Purpose.RAFT))
    for enable in (node.encryption.enable_storage_envelope, node.encryption.enable_raft_envelope):
        result = await enable(proposer_node_id=0, proposer_local_epoch=0, timeout_s=2)
        assert result.was_already_active


async def test_user_writes_take_nothing_of_what_a_rotation_reserves_beyond_the_limit(
        make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await make_cluster(1, options=SMALL)
    node = cluster.nodes["n1"]
    await node.encrypt()
    let_no_rotation_succeed(node, monkeypatch)
    await spend(node)
    node.encryption.rotation.stop()
    monkeypatch.undo()
    await node.rotate(Purpose.STORAGE)  # under which there is room for writes again
    let_no_rotation_succeed(node, monkeypatch)
    made = node.nonces_made(node.active(Purpose.RAFT))
    for _ in range(3):
        with pytest.raises(NotCapable):
            await node.rotate(Purpose.RAFT)
        with pytest.raises(DekExhausted):
            await node.put(b"k")
    assert node.nonces_made(node.active(Purpose.RAFT)) == made

    monkeypatch.undo()
    await node.rotate(Purpose.RAFT)
    await node.put(b"k")
    require_covered(cluster)


async def test_the_count_survives_a_restart(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1, options={"rotation": RotationSettings(Limits(100_000))})
    node = cluster.nodes["n1"]
    await node.encrypt()
    for number in range(50):
        await node.put(b"%d" % number)
    dek_id = node.active(Purpose.STORAGE)
    before = node.encryption.budgets.total(dek_id)
    assert before >= 50
    node = await cluster.restart("n1")
    await cluster.settled()
    assert node.encryption.budgets.total(dek_id) == before
    await node.put(b"k")
    assert node.encryption.budgets.total(dek_id) > before


async def test_a_limit_below_what_is_used_already_ends_in_a_rotation(
        make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(1)
    await cluster.nodes["n1"].encrypt()
    await cluster.nodes["n1"].put(b"k")
    await cluster.nodes["n1"].stop()
    cluster.options = SMALL
    node = cluster.make("n1")
    before = {purpose: node.active(purpose) for purpose in Purpose}
    await node.start()
    await node.put(b"k", b"w")
    await until(lambda: all(node.active(purpose) != before[purpose] for purpose in Purpose))
    assert (await node.kv.get(b"k", timeout_s=TIMEOUT_S)).value == b"w"
