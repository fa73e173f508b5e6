"""A member that is started with another raft address than the members know it by: the others would
go on dialling the old one."""

from __future__ import annotations

import asyncio
import shutil
import signal

import pytest

from elastickv.errors import ExitCode
from jepsen.network.ports import free_ports
from tests.cluster.cluster import Cluster, NodeProcess
from tests.keys_process.doctor_shell import doctor

pytestmark = [pytest.mark.cluster]


@pytest.fixture
def cluster(one_plain_member: Cluster) -> Cluster:
    return one_plain_member


def moved(node: NodeProcess) -> str:
    """Give the node another --raftAddress, wherever its flags name it; the new one."""
    new = f"127.0.0.1:{free_ports(1)[0]}"
    node.arguments[:] = [text.replace(node.raft_address, new) for text in node.arguments]
    return new


def without_founding(node: NodeProcess) -> None:
    at = node.arguments.index("--raftBootstrapMembers")
    del node.arguments[at:at + 2]


@pytest.mark.parametrize("founding", [True, False], ids=["founding-flags", "none"])
async def test_a_founder_with_another_address_is_refused_and_both_are_named(
        cluster: Cluster, founding: bool) -> None:
    node = cluster.nodes["n1"]
    node.kill(signal.SIGTERM)
    if not founding:
        without_founding(node)
    before = [*node.arguments]
    new = moved(node)
    node.start()
    assert await cluster.exit_code("n1") == ExitCode.STARTUP_REFUSED
    refusal = node.log.splitlines()[-1]
    assert f"{node.raft_address}, and --raftAddress is {new}" in refusal
    assert f"Remedy: give --raftAddress {node.raft_address}" in refusal
    assert "Traceback" not in node.log

    code, verdicts = await asyncio.to_thread(doctor, node.arguments)
    assert (code, verdicts["raft-address"]["result"]) == (ExitCode.ERROR, "fail")
    assert verdicts["raft-address"]["problem"] in refusal

    node.arguments[:] = before
    code, verdicts = await asyncio.to_thread(doctor, node.arguments)
    assert (code, verdicts["raft-address"]["result"]) == (ExitCode.OK, "pass")
    await cluster.start("n1")


async def test_a_member_that_joined_is_known_by_the_address_in_the_log(cluster: Cluster) -> None:
    """Its file `members` says what was in force before it was added."""
    newcomer = cluster.newcomer("n2", "n1")
    newcomer.start()
    await cluster.logged("n2", "waiting to be added")
    async with cluster.client("n1") as client:
        await client.raft.add_learner("n2", newcomer.raft_address)
    await cluster.ready("n2")
    newcomer.kill(signal.SIGTERM)
    new = moved(newcomer)
    newcomer.start()
    assert await cluster.exit_code("n2") == ExitCode.STARTUP_REFUSED
    assert f"{newcomer.raft_address}, and --raftAddress is {new}" in newcomer.log


async def test_a_member_moves_by_being_removed_and_joined_anew(cluster: Cluster) -> None:
    """The old address is in the log that it is sent, and is its own no more."""
    node = cluster.newcomer("n2", "n1")
    node.start()
    await cluster.logged("n2", "waiting to be added")
    async with cluster.client("n1") as client:
        await client.raft.add_learner("n2", node.raft_address)
        await cluster.ready("n2")
        await client.raft.remove_server("n2")
        assert await cluster.exit_code("n2") == ExitCode.REMOVED
        shutil.rmtree(node.directory)
        new = moved(node)
        node.start()
        await cluster.logged("n2", f"add-learner n2 {new}")
        await client.raft.add_learner("n2", new)
        await cluster.ready("n2")
        assert {(m.node_id, m.address) for m in await client.raft.members()} == {
            ("n1", cluster.nodes["n1"].raft_address), ("n2", new)}
    node.kill(signal.SIGKILL)
    await cluster.start("n2")


async def test_a_newcomer_that_waits_may_move(cluster: Cluster) -> None:
    newcomer = cluster.newcomer("n2", "n1")
    newcomer.start()
    await cluster.logged("n2", "waiting to be added")
    newcomer.kill(signal.SIGTERM)
    new = moved(newcomer)
    code, verdicts = await asyncio.to_thread(doctor, newcomer.arguments)
    assert (code, verdicts["raft-address"]["result"]) == (ExitCode.OK, "pass")
    newcomer.start()
    await cluster.logged("n2", f"add-learner n2 {new}")
    async with cluster.client("n1") as client:
        await client.raft.add_voter("n2", new)
    await cluster.ready("n2")
