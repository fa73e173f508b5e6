"""The simulated node: what the oracle may ask of it at any time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elastickv.errors import StartupRefused
from elastickv.keys.sidecar import RELATIVE_PATH
from tests.sim import instruments
from tests.sim.cluster import DATA, SimNode
from tests.sim.plan import draw_plan
from tests.sim.random_streams import Streams
from tests.sim.schedule import Schedule


def run_scenario(scenario: Callable[[Schedule], Awaitable[None]]) -> None:
    """Run `scenario` on a cluster of three without load and without other faults."""
    streams = Streams(0)
    plan = replace(draw_plan(0, streams.stream("plan")), size=3, story="", rates=(1.0, 1.05, 0.95))
    schedule = Schedule(plan, streams, hashed=False, echo=None)
    with instruments.installed(schedule, streams.stream("entropy")):
        try:
            schedule.loop.run(scenario(schedule))
        finally:
            schedule.loop.dispose()


async def started(schedule: Schedule) -> SimNode:
    """Start all nodes, and let all know that the leader's first entry is committed; a follower."""
    nodes = schedule.cluster.nodes
    for node in nodes:
        node.start()
    await schedule._until(lambda: all(node.serving and node.seen_commit > 1 for node in nodes)
                          and any(node.engine.is_leader() for node in nodes), 5.0, "a leader")
    return next(node for node in nodes if not node.engine.is_leader())


def test_log_is_known_wherever_in_its_start_a_process_dies():
    async def scenario(schedule: Schedule) -> None:
        cluster = schedule.cluster
        follower = await started(schedule)
        durable_index = follower.journal.durable_index
        crashes = 0
        while not crashes or not follower.serving:
            crashes += 1
            follower.crash()
            cluster.arm(follower.name, "fsync", crashes)
            follower.start()
            await schedule._until(lambda: follower.serving or not follower.is_up, 5.0, "an end")
            assert follower.journal.durable_index >= durable_index > 1
        assert crashes > 2
        cluster.disarm()

    run_scenario(scenario)


@pytest.mark.parametrize("at", ["the leader", "a follower"])
def test_a_large_value_on_slow_links_deposes_no_leader(at: str) -> None:
    async def scenario(schedule: Schedule) -> None:
        follower, cluster = await started(schedule), schedule.cluster
        leader = next(node for node in cluster.nodes if node.engine.is_leader())
        term = leader.engine.status().term
        cluster.network.conditions.bytes_per_s = 10_000.0
        value = bytes(16_000)
        await cluster.request(
            leader if at == "the leader" else follower,
            lambda node: node.kv.put(b"key", value, timeout_s=20.0), 20.0)
        assert {node.engine.status().term for node in cluster.nodes} == {term}
        assert leader.engine.is_leader()

    run_scenario(scenario)


@pytest.mark.parametrize("state", ["up", "down", "paused"])
def test_a_power_cut_takes_what_any_node_has_not_synced(state: str) -> None:
    async def scenario(schedule: Schedule) -> None:
        node, nodes = await started(schedule), schedule.cluster.nodes
        for each in nodes:
            each.medium.power_cuts = 0.0
            assert each.life is not None
            disk = each.medium.mount(each.life)
            disk.replace(Path("/data/file"), b"")
            file = disk.open_append(Path("/data/file"))
            file.append(b"not synced")
            assert not file.is_durable
        if state == "down":
            node.crash()
        elif state == "paused" and node.life is not None:
            schedule.loop.pause(node.life)
        await schedule.nemesis.power_cut()
        for each in nodes:
            assert not each.is_up
            assert {path: bytes(inode.data) for path, inode in each.medium.files.items()} \
                == each.medium.copy()

    run_scenario(scenario)


def damage_sidecar(node: SimNode) -> None:
    node.excuses.add("bit-flip")
    node.medium.restore({**node.medium.copy(), str(DATA / RELATIVE_PATH): b"{"})


def fill_disk(node: SimNode) -> None:
    node.excuses.add("disk-full")
    node.medium.is_full = True


@pytest.mark.parametrize(("fault", "guard", "needs_operator"), [
    (damage_sidecar, "sidecar-readable", True), (fill_disk, "file-system", False)])
def test_a_node_that_a_guard_refuses_is_not_started_again_unless_its_disk_may_get_better(
        fault: Callable[[SimNode], None], guard: str, needs_operator: bool) -> None:
    async def scenario(schedule: Schedule) -> None:
        node = await started(schedule)
        node.crash()
        fault(node)
        errors: list[BaseException] = []
        halt = node.halt
        node.halt = lambda error: errors.append(error) or halt(error)
        node.start()
        await schedule._until(lambda: bool(errors) and not node.is_up, 5.0, "a refusal")
        (error,) = errors
        assert isinstance(error, StartupRefused)
        assert error.guard == guard
        assert (node.needs_operator, node.is_usable) == (needs_operator, not needs_operator)

    run_scenario(scenario)
