"""Every invariant can fail: each is shown a breach, on a running cluster or by hand."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastickv.errors import ApplyHalted, DiskFull, StoreCorrupt
from elastickv.raft import frames
from elastickv.raft.engine import Entry
from elastickv.raft.membership import Configuration
from elastickv.store.tables import MapFull
from tests.sim import schedule as schedule_module
from tests.sim.cluster import EXPLAINS, SimNode
from tests.sim.invariants import SECRET, Violation
from tests.sim.schedule import Schedule
from tests.sim.test_cluster import run_scenario, started

Breach = Callable[[Schedule, SimNode], Awaitable[None]]
BREACHES: dict[str, Breach] = {}
SOURCES = Path(__file__).parent


def breach(name: str) -> Callable[[Breach], Breach]:
    """A coroutine that breaks the invariant `name` on a cluster at rest, given a follower."""
    def add(coroutine: Breach) -> Breach:
        BREACHES[name] = coroutine
        return coroutine

    return add


def leader_of(schedule: Schedule) -> SimNode:
    return next(node for node in schedule.cluster.nodes if node.engine.is_leader())


async def write(schedule: Schedule, key: bytes = b"k") -> None:
    leader = leader_of(schedule)
    await schedule.cluster.request(leader, lambda n: n.kv.put(
        key, b"v", timeout_s=1.0), 1.0)


def as_node(schedule: Schedule, node: SimNode) -> None:
    """What follows is done by the node's process."""
    schedule.loop.life = node.life


@breach("log matching")
async def other_entry(schedule: Schedule, node: SimNode) -> None:
    as_node(schedule, node)
    journal = node.journal
    schedule.oracle.appended(journal, journal.last_index, journal.last_term, journal.last_term,
                             b"\x00another")


@breach("committed entries stay")
async def committed_twice(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle._entries[(node.seen_commit, 99)] = (1, 1)
    schedule.oracle._commit(node.name, node.seen_commit, 99)


@breach("terms rise")
async def term_falls(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle._role_moved(node, node.seen_role[0] - 1, False)


@breach("one leader per term")
async def second_leader(schedule: Schedule, node: SimNode) -> None:
    term = node.core.term()
    for voter in ("n1", "n2", "n3"):
        schedule.oracle.promises._votes[(voter, term)] = node.name
    schedule.oracle._role_moved(node, term, True)


@breach("leaders are elected")
async def unelected(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle.promises.elected(node, node.core.term())


@breach("match indexes are of this term")
async def match_kept(schedule: Schedule, node: SimNode) -> None:
    leader, term = leader_of(schedule), node.core.term()
    await write(schedule)
    schedule.oracle.promises.elected(leader, term)


@breach("leader completeness")
async def incomplete(schedule: Schedule, node: SimNode) -> None:
    term = node.core.term() + 1
    for voter in ("n1", "n2", "n3"):
        schedule.oracle.promises._votes[(voter, term)] = node.name
    schedule.oracle._committed_in[term - 1] = node.journal.last_index + 1
    schedule.oracle._committed[node.journal.last_index + 1] = (term, 0)
    schedule.oracle._role_moved(node, term, True)


@breach("commit rises")
async def commit_falls(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle._commit_moved(node, node.seen_commit - 1)


@breach("leaders commit entries of their own term")
async def earlier_term(schedule: Schedule, node: SimNode) -> None:
    leader = leader_of(schedule)
    leader.core._SyncObj__raftCurrentTerm += 1
    leader.seen_role = (leader.core.term(), True)
    schedule.oracle._commit_moved(leader, leader.journal.last_index)


@breach("what a start believes is durable")
async def believed_too_much(schedule: Schedule, node: SimNode) -> None:
    node.journal._segments[-1].file.append(b"not synced")
    schedule.oracle.opened(node.journal)


@breach("leaders count what is durable")
async def counted_too_far(schedule: Schedule, node: SimNode) -> None:
    leader = leader_of(schedule)
    node.journal.durable_index -= 1
    schedule.oracle.counted(leader, node.name)


@breach("commitment is durable")
async def alone(schedule: Schedule, node: SimNode) -> None:
    for other in schedule.cluster.nodes:
        other.journal.durable_index = 1
    schedule.oracle._require_majority(node.name, node.journal.last_index, node.core.term())


@breach("each entry is applied once, in order")
async def applied_again(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle.applying(node, [Entry(node.store.applied_index, 1, b"")])


@breach("what is applied is durable")
async def applied_early(schedule: Schedule, node: SimNode) -> None:
    index = node.seen_commit
    node.journal.durable_index = index - 1
    node.store = SimpleNamespace(applied_index=index - 1)
    schedule.oracle.applying(node, [Entry(index, node.journal.term_at(index), b"")])


@breach("the log is kept until the state is durable")
async def dropped_early(schedule: Schedule, node: SimNode) -> None:
    as_node(schedule, node)
    node.journal.compact_to(node.store.durable_index + 1)


@breach("truncations are durable")
async def cut_in_memory(schedule: Schedule, node: SimNode) -> None:
    node.journal._segments[-1].file._inode.pending.append((0, None))
    as_node(schedule, node)
    schedule.oracle.truncated(node.journal)


@breach("commit timestamps rise")
async def timestamp_repeated(schedule: Schedule, node: SimNode) -> None:
    await write(schedule)
    schedule.oracle._note(9, [(b"k", schedule.oracle._last_ts, b"")], ())


@breach("replicas agree")
async def other_effect(schedule: Schedule, node: SimNode) -> None:
    await write(schedule)
    index = schedule.oracle.last_committed
    schedule.oracle.applied(node, index, [(b"other", 1, b"")], (), {})


@breach("state is the sum of the log")
async def lost_record(schedule: Schedule, node: SimNode) -> None:
    await schedule._until(lambda: node.store.applied_index > 0, 1.0, "an applied entry")
    schedule.oracle._effects[node.store.applied_index].writes[b"lost"] = b"x"
    schedule.oracle.check_whole_state(node)


@breach("applied state is durable")
async def state_went_back(schedule: Schedule, node: SimNode) -> None:
    node.durable_applied = node.store.applied_index + 1
    schedule.oracle.restarted(node)


@breach("no nonce twice")
async def nonce_twice(schedule: Schedule, node: SimNode) -> None:
    as_node(schedule, node)
    schedule.oracle._registered[(7, 1)] = 1
    for _ in range(2):
        schedule.oracle.sealed("storage", 7, b"\x00\x01\x00\x01" + bytes(8))


@breach("writers are registered")
async def unregistered(schedule: Schedule, node: SimNode) -> None:
    as_node(schedule, node)
    schedule.oracle.sealed("storage", 7, b"\x00\x01\x00\x01" + bytes(8))


@breach("ciphertext at rest")
async def plaintext(schedule: Schedule, node: SimNode) -> None:
    as_node(schedule, node)
    node.medium.mount(node.life).replace(Path("/data/x"), b"a" + SECRET + b"b")


@breach("configurations are committed or in the log")
async def configuration_of_nobody(schedule: Schedule, node: SimNode) -> None:
    await write(schedule)
    leader = leader_of(schedule)
    membership = leader.engine._storage.membership
    membership.rebase(Configuration(leader.store.applied_index, membership.current.members))
    schedule.oracle.check_configuration(leader)


@breach("nodes suspect themselves for a reason")
async def suspected(schedule: Schedule, node: SimNode) -> None:
    as_node(schedule, node)
    node.engine._trust._become_suspect("n1", "for no reason", 1, 1)


@breach("nodes halt for a reason")
async def halted(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle.halted(node, StoreCorrupt("for no reason"), EXPLAINS)


@breach("a failed fsync stops the node")
async def goes_on(schedule: Schedule, node: SimNode) -> None:
    schedule.cluster.changed(node.name, "fsync failed", "/data/raft/hardstate", 0)
    await schedule._until(lambda: False, 1.0, "breach")


@breach("one vote per term")
async def vote_twice(schedule: Schedule, node: SimNode) -> None:
    term = node.core.term()
    known = schedule.oracle.promises._votes.setdefault((node.name, term), "n1")
    other = next(name for name in ("n1", "n2", "n3") if name != known)
    schedule.oracle.promises.sending(node, other, frames.Vote(term))


@breach("votes are durable")
async def vote_in_memory(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle.promises.sending(node, "n1", frames.Vote(node.core.term() + 1))


@breach("a vote follows a configuration")
async def stranger_votes(schedule: Schedule, node: SimNode) -> None:
    node.engine._context.membership.rebase(Configuration(0, ()))
    schedule.oracle.promises.sending(node, "n1", frames.Vote(node.core.term()))


@breach("only voters stand")
async def stranger_stands(schedule: Schedule, node: SimNode) -> None:
    node.engine._context.membership.rebase(Configuration(0, ()))
    schedule.oracle.promises.sending(node, "n1", frames.RequestVote(node.core.term(), 1, 1, True))


@breach("no election without pre-votes")
async def stands_at_once(schedule: Schedule, node: SimNode) -> None:
    as_node(schedule, node)
    node.core.elect_now()
    node.engine._elections._cleared_term = node.core.term()
    node.engine._schedule()
    node.engine._pump.run()


@breach("reads see what was committed")
async def stale_read(schedule: Schedule, node: SimNode) -> None:
    schedule.oracle.last_committed += 10
    await schedule.cluster.request(node, lambda n: n.engine.read_index(timeout_s=1.0), 1.0)


@breach("calls end by their deadline")
async def endless_call(schedule: Schedule, node: SimNode) -> None:
    await schedule.cluster.request(node, lambda n: schedule.loop.create_future(), 0.5)


@breach("the cluster makes progress")
async def no_progress(schedule: Schedule, node: SimNode) -> None:
    await schedule._until(lambda: False, 0.1, "progress")


@breach("batches are atomic")
async def half_a_batch(schedule: Schedule, node: SimNode) -> None:
    await write(schedule, b"pair-a")
    await schedule.workload._scan_pair(leader_of(schedule), schedule.workload.cluster.streams
                                       .stream("test"))


@breach("histories are linearizable")
async def lost_write(schedule: Schedule, node: SimNode) -> None:
    leader = leader_of(schedule)
    generator = schedule.cluster.streams.stream("test")
    await schedule.workload._put(leader, generator)
    key = schedule.recorder.records[0].key
    real = leader.kv.get
    leader.kv.get = lambda name, **options: real(b"absent", **options)
    await schedule.workload.read(leader, key)
    await schedule._converge()
    schedule._examine()


@breach("histories can be decided")
async def endless_search(schedule: Schedule, node: SimNode) -> None:
    leader = leader_of(schedule)
    generator = schedule.cluster.streams.stream("test")
    for _ in range(3):
        await asyncio.gather(*(schedule.workload._put(leader, generator) for _ in range(8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "CHECK_CONFIGURATIONS", 0)
        schedule._check_history()


@pytest.mark.parametrize("name", list(BREACHES))
def test_breach_is_noticed(name: str) -> None:
    async def scenario(schedule: Schedule) -> None:
        follower = await started(schedule)
        try:
            await BREACHES[name](schedule, follower)
        finally:
            schedule.loop.life = None
        if schedule.loop.failure is not None:
            raise schedule.loop.failure

    with pytest.raises(Violation, match=re.escape(name)):
        run_scenario(scenario)


def test_a_start_answers_for_every_segment() -> None:
    async def scenario(schedule: Schedule) -> None:
        node = await started(schedule)
        as_node(schedule, node)
        node.journal._roll()
        schedule.oracle.opened(node.journal)
        node.journal._segments[0].file.append(b"not synced")
        schedule.oracle.opened(node.journal)

    with pytest.raises(Violation, match="what a start believes is durable"):
        run_scenario(scenario)


@pytest.mark.parametrize(("lossy", "is_noticed"), [
    pytest.param([], True, id="nobody"), pytest.param(["other"], True, id="another member"),
    pytest.param(["follower"], False, id="who is counted"),
    pytest.param(["leader"], False, id="who counts")])
def test_only_lost_data_of_its_own_excuses_what_is_counted(lossy: list[str],
                                                           is_noticed: bool) -> None:
    async def scenario(schedule: Schedule) -> None:
        node = await started(schedule)
        leader = leader_of(schedule)
        other = next(n for n in schedule.cluster.nodes if n not in (node, leader))
        for name in lossy:
            {"leader": leader, "follower": node, "other": other}[name].excuses.add("old-disk")
        await BREACHES["leaders count what is durable"](schedule, node)

    with pytest.raises(Violation, match="leaders count what is durable") if is_noticed \
            else contextlib.nullcontext():
        run_scenario(scenario)


@pytest.mark.parametrize(("lossy", "is_noticed"), [(0, True), (1, True), (2, False)])
def test_who_lost_data_may_have_had_what_was_committed(lossy: int, is_noticed: bool) -> None:
    async def scenario(schedule: Schedule) -> None:
        node = await started(schedule)
        for damaged in schedule.cluster.nodes[:lossy]:
            damaged.excuses.add("bit-flip")
        await BREACHES["commitment is durable"](schedule, node)

    with pytest.raises(Violation, match="commitment is durable") if is_noticed \
            else contextlib.nullcontext():
        run_scenario(scenario)


def halted_by_a_full_disk(error: Exception) -> Exception:
    error.__cause__ = DiskFull("no space left")
    return error


@pytest.mark.parametrize(("serving", "error", "is_explained"), [
    pytest.param(False, DiskFull("no space left"), True, id="a start, or the flush of a stop"),
    pytest.param(True, DiskFull("no space left"), False, id="a node that runs"),
    pytest.param(True, MapFull("no space left"), False, id="a node whose store is full"),
    pytest.param(False, halted_by_a_full_disk(ApplyHalted("halted")), False,
                 id="another error because of it"),
])
def test_what_a_full_disk_explains(serving: bool, error: Exception, is_explained: bool) -> None:
    async def scenario(schedule: Schedule) -> None:
        node = await started(schedule)
        node.excuses.add("disk-full")
        node.serving = serving
        schedule.oracle.halted(node, error, EXPLAINS)

    with contextlib.nullcontext() if is_explained else pytest.raises(
            Violation, match="nodes halt for a reason"):
        run_scenario(scenario)


def test_every_invariant_has_a_breach() -> None:
    named = {name for path in SOURCES.glob("*.py") if not path.name.startswith("test_")
             for name in re.findall(r'\.fail\(\s*"([^"]+)"', path.read_text(encoding="utf-8"))}
    assert named
    assert named - set(BREACHES) == set()
    assert set(BREACHES) - named == set()
