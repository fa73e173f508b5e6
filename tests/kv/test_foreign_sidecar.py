"""A sidecar that is not of this node's log, though it may seem to be only ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from elastickv.crypto.keystore import Purpose
from elastickv.durable import OsDisk
from elastickv.errors import ApplyHalted, ElasticKVError, StorageEnvelopeRequired
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.guards import SidecarForeign
from elastickv.keys.sidecar import Sidecar
from elastickv.wire import Bootstrap, HlcCeiling, RegistryRow, RotationTag, encode_entry
from tests.kv.key_cluster import TIMEOUT_S, KeyCluster, MakeCluster, Node, until
from tests.kv.machine import KEK, NODE, RAFT_DEK, STORAGE_DEK, Machine, plain, ts


def left_over(directory: Path) -> Sidecar:
    """The sidecar of a cluster that was here before: bootstrap at 1, storage cutover at 2."""
    machine = Machine(directory)
    machine.bootstrap()
    machine.enable_storage()
    assert machine.applier.sidecar is not None
    return machine.applier.sidecar


def put_into(directory: Path, sidecar: Sidecar) -> None:
    sidecar_file.store(OsDisk(), directory / "keys.json", sidecar)


WRITE = plain(b"k", ts(1), b"v")
CEILING = encode_entry(HlcCeiling(5))

OTHERS: dict[str, Callable[[Machine], object]] = {
    "a write": lambda machine: machine.write(WRITE),
    "a ceiling of the clock": lambda machine: machine.apply(CEILING),
    "an entry of Raft's own": lambda machine: machine.apply(b""),
}


@pytest.mark.parametrize("apply", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("claimed", ["storage cutover", "raft cutover", "last entry"])
def test_another_entry_where_the_sidecar_claims_a_key_entry_halts_apply(
        tmp_path: Path, claimed: str, apply: Callable[[Machine], object]) -> None:
    """Going on, this replica would refuse what the others apply."""
    sidecar = replace(left_over(tmp_path / "former"), raft_applied_index=9,
                      storage_envelope_cutover_index=2 if claimed == "storage cutover" else 8,
                      raft_envelope_cutover_index=2 if claimed == "raft cutover" else 8)
    if claimed == "last entry":
        sidecar = replace(sidecar, raft_applied_index=2)
    put_into(tmp_path / "new", sidecar)
    machine = Machine(tmp_path / "new")
    machine.write(plain(b"k", ts(1), b"before"))
    with pytest.raises(ApplyHalted, match="index 2"):
        apply(machine)
    assert machine.store.applied_index == 1


BOOTSTRAP = encode_entry(Bootstrap(
    STORAGE_DEK, KEK.generate_wrapped_dek(), RAFT_DEK, KEK.generate_wrapped_dek(),
    (RegistryRow(STORAGE_DEK, NODE, 0), RegistryRow(RAFT_DEK, NODE, 0))))
CUTOVERS = {RotationTag.ENABLE_STORAGE_ENVELOPE: (STORAGE_DEK, Purpose.STORAGE),
            RotationTag.ENABLE_RAFT_ENVELOPE: (RAFT_DEK, Purpose.RAFT)}


@pytest.mark.parametrize("logged", CUTOVERS)
@pytest.mark.parametrize("claimed", CUTOVERS)
def test_only_the_cutover_that_the_sidecar_claims_may_be_at_its_index(
        tmp_path: Path, claimed: RotationTag, logged: RotationTag) -> None:
    """As when a cluster is put back to the bootstrap and goes on otherwise."""
    former = Machine(tmp_path / "former")
    former.apply(BOOTSTRAP)
    former.cut_over(claimed, *CUTOVERS[claimed])
    assert former.applier.sidecar is not None
    put_into(tmp_path / "new", former.applier.sidecar)
    machine = Machine(tmp_path / "new")
    machine.apply(BOOTSTRAP)
    with nullcontext() if claimed is logged else pytest.raises(ApplyHalted, match="index 2"):
        machine.cut_over(logged, *CUTOVERS[logged])
    assert machine.store.applied_index == (2 if claimed is logged else 1)


@pytest.mark.parametrize(("storage_cutover", "refused", "words"), [
    (2, 0, "move it away"), (1, 1, "join it anew")], ids=["nothing refused", "a write refused"])
def test_the_remedy_of_the_halt_brings_back_what_was_refused_before(
        tmp_path: Path, storage_cutover: int, refused: int, words: str) -> None:
    put_into(tmp_path / "new", replace(left_over(tmp_path / "former"), raft_applied_index=3,
                                       storage_envelope_cutover_index=storage_cutover))
    machine = Machine(tmp_path / "new")
    machine.store.apply_group(1, ())
    for _ in range(refused):
        assert isinstance(machine.write(WRITE)[0], StorageEnvelopeRequired)
    with pytest.raises(ApplyHalted) as caught:
        machine.apply(CEILING)
    assert words in caught.value.remedy.split(":")[0]


async def start_with_a_sidecar_ahead(cluster: KeyCluster, node_id: str, sidecar: Sidecar,
                                     index: int = 1_000_000) -> Node:
    """The node in a new process, whose sidecar stands at `index`; by default far beyond everything
    in the log."""
    directory = cluster.directory / node_id
    put_into(directory, replace(sidecar, raft_applied_index=index))
    node = cluster.make(node_id)
    await node.start()
    return node


def log_end(node: Node) -> int:
    return node.engine.status().last_log_index


@pytest.mark.parametrize("passed", [False, True], ids=["beyond its log", "not in its log"])
async def test_a_leader_whose_sidecar_is_not_of_its_log_seals_nothing_and_stops(
        make_cluster: MakeCluster, passed: bool) -> None:
    """As when log and store come from a backup that is older than the sidecar."""
    cluster = await make_cluster(1)
    node = cluster.nodes["n1"]
    await node.encrypt()
    await node.put(b"k")
    await node.stop()
    end = log_end(node)
    node = await start_with_a_sidecar_ahead(cluster, "n1", node.sidecar,
                                            node.store.applied_index if passed else 1_000_000)
    await until(lambda: bool(node.fatal))
    assert isinstance(node.fatal[0], SidecarForeign)
    assert "move it away" in node.fatal[0].remedy
    assert node.encryption.proposer.submit(CEILING, timeout_s=TIMEOUT_S, beyond_limit=True) is None
    with pytest.raises(ElasticKVError):
        await node.kv.put(b"k", b"w", timeout_s=0.1)
    assert log_end(node) == end + 1  # Raft's own, of the new leader


async def test_a_left_over_sidecar_stops_the_member_that_would_lead_and_no_other(
        make_cluster: MakeCluster, tmp_path: Path) -> None:
    """What it sealed, nobody else could open."""
    cluster = await make_cluster(3)
    leader = await cluster.leader()
    victim = next(node for node in cluster.nodes.values() if node is not leader)
    await leader.put(b"k")
    await victim.stop()
    victim = await start_with_a_sidecar_ahead(cluster, victim.node_id, replace(
        left_over(tmp_path / "former"), storage_envelope_cutover_index=900_000))
    others = [node for node in cluster.nodes.values() if node is not victim]
    await leader.put(b"k", b"w")
    await victim.engine.wait_applied(leader.store.applied_index, timeout_s=TIMEOUT_S)
    await cluster.hand_over(victim.node_id)
    await until(lambda: bool(victim.fatal))
    assert isinstance(victim.fatal[0], SidecarForeign)
    await victim.stop()
    cluster.make(victim.node_id)
    await until(lambda: any(node.engine.is_leader() for node in others))
    await others[0].put(b"k", b"x")
    assert (await others[1].kv.get(b"k", timeout_s=TIMEOUT_S)).value == b"x"
    assert [node.fatal for node in others] == [[], []]
