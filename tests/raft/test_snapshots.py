"""Compaction, and followers that are behind the start of the log."""

from __future__ import annotations

import asyncio
import errno
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from raft_lab import LATENCY_S, Lab, LabNode, ListState, MemoryDisk, outcome, run

from elastickv.errors import (
    ApplyHalted,
    CorruptionError,
    DiskFull,
    JournalCorrupt,
    NoLeader,
    OutcomeUnknown,
    Overloaded,
    StoreCorrupt,
)
from elastickv.raft import frames
from elastickv.raft.compaction import LogSize, compaction_target
from elastickv.raft.engine import Entry, Role
from elastickv.raft.install_marker import InstallMarker, MarkerFile
from elastickv.raft.journal import Journal
from elastickv.raft.membership import ChangeKind, MembershipChange, encode_members
from elastickv.raft.settings import EngineSettings
from elastickv.raft.snapshot_receiver import ABANDONED_S, SnapshotReceiver
from elastickv.raft.snapshot_sender import CATCH_UP_S, REFUSED_S, STALLED_S

SECOND = 1.0
COMPACTING = {"segment_bytes": 2000, "compact_bytes": 6000, "keep_entries": 10,
              "snapshot_chunk_bytes": 500, "full_disk_pause_s": 60.0}


@pytest.mark.parametrize(("name", "size", "expected"), [
    ("small log", LogSize(1, 500, 500, 1), 0),
    ("many entries", LogSize(1, 2000, 2000, 1), 1900),
    ("many bytes", LogSize(1, 500, 500, 300), 400),
    ("state not durable yet", LogSize(1, 2000, 1200, 1), 1200),
    ("nothing durable", LogSize(1000, 2500, 1000, 1000), 0),
    ("tail is kept", LogSize(1950, 3000, 3000, 2500), 2900),
    ("tail reaches the start", LogSize(2950, 3000, 3000, 2950), 0),
    ("tail of large entries", LogSize(2950, 3000, 3000, 2980), 2980),
    ("large entries, not durable yet", LogSize(2950, 3000, 2970, 2980), 2970),
    ("a snapshot is on its way", LogSize(1, 2000, 2000, 1950, sent_index=1500), 1500),
    ("the snapshot is of the state that the log begins with",
     LogSize(1500, 3000, 3000, 1950, sent_index=1500), 0),
    ("a small log that begins in the clear", LogSize(1, 500, 500, 1, clear_index=300), 300),
    ("in the clear, not durable yet", LogSize(1, 500, 200, 1, clear_index=300), 200),
    ("in the clear, and a snapshot is on its way",
     LogSize(1, 500, 500, 1, clear_index=300, sent_index=100), 100),
    ("what was in the clear is gone", LogSize(300, 500, 500, 300, clear_index=300), 0),
    ("in the clear up to the tail", LogSize(1, 2000, 2000, 1, clear_index=1950), 1950),
    ("many entries, some in the clear", LogSize(1, 2000, 2000, 1, clear_index=300), 1900),
], ids=lambda value: value if isinstance(value, str) else "")
def test_compaction_target(name, size, expected, tmp_path):
    settings = EngineSettings("n1", (), tmp_path, compact_bytes=1000, compact_entries=1000,
                              keep_entries=100)
    assert compaction_target(size, settings) == expected


async def fill(lab: Lab, count: int, leader: LabNode, prefix: bytes = b"") -> None:
    await asyncio.gather(*(leader.engine.propose(prefix + b"%d" % number, timeout_s=10)
                           for number in range(count)))


async def compacted(lab: Lab, node: LabNode, below: int) -> None:
    await lab.until(lambda: node.journal.anchor_index > below)


async def left_behind() -> tuple[Lab, LabNode, LabNode]:
    """A leader whose log begins behind the end of an isolated follower's: (lab, leader, follower).
    """
    lab = Lab(**COMPACTING)
    leader = await lab.start()
    behind = lab.others(leader)[0]
    lab.hub.isolate(behind.node_id)
    await fill(lab, 400, leader)
    await compacted(lab, leader, behind.journal.last_index)
    return lab, leader, behind


def test_log_is_compacted_by_itself_and_serves_on():
    async def scenario() -> None:
        lab = Lab(**COMPACTING)
        leader = await lab.start()
        await fill(lab, 400, leader)
        for node in lab.nodes.values():
            await compacted(lab, node, 100)
            assert node.journal.total_bytes < 20_000
        await fill(lab, 10, leader)
        await lab.settle()

    run(scenario())


def test_lagging_follower_gets_a_snapshot_while_the_leader_serves():
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        lab.hub.heal()
        await fill(lab, 50, leader, b"meanwhile")
        await lab.settle()
        assert behind.engine._receiver.installed_count == 1
        assert behind.journal.anchor_index > 100
        assert behind.state.entries == leader.state.entries
        await behind.restart()
        await fill(lab, 5, leader, b"after")
        await lab.settle()
        assert behind.state.entries == leader.state.entries

    run(scenario())


def test_large_entries_are_kept_up_to_the_limit_of_bytes():
    async def scenario() -> None:
        lab = Lab(**{**COMPACTING, "keep_entries": 10_000})
        leader = await lab.start()
        for number in range(60):
            await leader.engine.propose(b"%d" % number + bytes(1000), timeout_s=10)
        for node in lab.nodes.values():
            await compacted(lab, node, 40)
            await lab.until(lambda node=node: node.journal.total_bytes < 10_000)

    run(scenario())


def test_what_follows_a_snapshot_on_its_way_is_kept():
    """Or the peer would need another one, and under load one after the other for ever."""
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        lab.hub.rule = lambda source, target, message: int(
            not isinstance(message, frames.SnapshotChunk))
        lab.hub.heal()
        await lab.until(lambda: bool(lab.hub.sent(frames.SnapshotOffer)))
        await fill(lab, 400, leader, b"while it is on its way")
        await asyncio.sleep(STALLED_S - 1.0)
        (offer,) = lab.hub.sent(frames.SnapshotOffer)
        assert leader.journal.anchor_index <= offer.index
        lab.hub.rule = lambda source, target, message: 1
        await lab.until(lambda: behind.state.entries == leader.state.entries, 30)

    run(scenario())


def test_a_peer_that_is_sent_a_snapshot_hears_its_leader_with_every_heartbeat_and_no_more():
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        lab.hub.rule = lambda source, target, message: int(
            not isinstance(message, frames.SnapshotChunk))
        lab.hub.heal()
        await lab.until(lambda: bool(lab.hub.sent(frames.SnapshotOffer)))
        lab.hub.log.clear()
        beats = 20
        await asyncio.sleep(beats * leader.engine._settings.heartbeat_s)
        appends = [message for _, target, message in lab.hub.log
                   if isinstance(message, frames.AppendEntries) and target == behind.node_id]
        assert beats // 2 <= len(appends) <= 2 * beats

    run(scenario())


def test_a_snapshot_is_offered_as_soon_as_the_peer_says_where_its_log_ends():
    async def scenario() -> None:
        lab, leader, _ = await left_behind()
        loop = asyncio.get_running_loop()
        began = loop.time()
        lab.hub.heal()
        await lab.until(lambda: bool(lab.hub.sent(frames.SnapshotOffer)))
        assert loop.time() - began < leader.engine._settings.heartbeat_s + 0.01
        await lab.settle()
        assert len(lab.hub.sent(frames.SnapshotOffer)) == 1

    run(scenario())


def test_who_installed_a_snapshot_while_its_link_was_lost_is_not_sent_another():
    """The installation takes longer than a silent link lasts."""
    async def scenario() -> None:
        lab, leader, behind = await left_behind()

        def lose_link(source: str, target: str, message: frames.AnyMessage) -> int:
            if isinstance(message, frames.SnapshotChunk) and message.last:
                asyncio.get_running_loop().call_later(1.5 * LATENCY_S, lab.hub.isolate,
                                                      behind.node_id)
            return 1

        lab.hub.rule = lose_link
        lab.hub.heal()
        await lab.until(lambda: behind.engine._receiver.installed_count == 1)
        offer, = lab.hub.sent(frames.SnapshotOffer)
        await fill(lab, 400, leader, b"while it cannot be reached")
        await asyncio.sleep(4 * SECOND)
        assert leader.journal.anchor_index <= offer.index
        lab.hub.heal()
        await lab.until(lambda: behind.state.entries == leader.state.entries)
        assert lab.hub.sent(frames.SnapshotOffer) == [offer]
        await asyncio.sleep(CATCH_UP_S)
        await lab.until(lambda: leader.journal.total_bytes < 10_000)

    run(scenario())


def test_a_state_that_came_with_a_snapshot_is_waited_for_no_longer():
    """Else the member would give way at once when it leads next."""
    async def scenario() -> None:
        lab = Lab(**COMPACTING)
        leader = await lab.start()
        behind = lab.others(leader)[0]
        behind.state.takes_more = False
        await leader.engine.propose(b"waits for a flush", timeout_s=5)
        await lab.until(lambda: behind.engine._applying.waits_since < math.inf)
        lab.hub.isolate(behind.node_id)
        await fill(lab, 400, leader)
        await compacted(lab, leader, behind.journal.last_index)
        lab.hub.heal()
        await lab.until(lambda: behind.status().applied_index == leader.status().last_log_index)
        assert behind.engine._receiver.installed_count == 1
        await lab.until(lambda: behind.engine._applying.waits_since == math.inf, 1.0)

    run(scenario())


def test_a_stream_ends_when_the_log_meets_the_peers_again():
    """The peer has installed what it was sent, and its word of that is lost."""
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        lab.hub.rule = lambda source, target, message: int(
            not isinstance(message, frames.SnapshotAck) or not message.done)
        lab.hub.heal()
        await lab.until(lambda: behind.engine._receiver.installed_count == 1)
        await lab.until(lambda: not leader.engine._sender._streams, 1.0)
        await lab.settle()
        assert len(lab.hub.sent(frames.SnapshotOffer)) == 1

    run(scenario())


def test_what_follows_an_installed_snapshot_is_kept_for_a_while():
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        lab.hub.rule = lambda source, target, message: int(
            target != behind.node_id or not isinstance(message, frames.AppendEntries)
            or not message.entries)
        lab.hub.heal()
        await lab.until(lambda: behind.engine._receiver.installed_count == 1)
        await fill(lab, 400, leader, b"before it has caught up")
        await asyncio.sleep(CATCH_UP_S / 2)
        assert leader.journal.anchor_index <= lab.hub.sent(frames.SnapshotOffer)[0].index
        lab.hub.rule = lambda source, target, message: 1
        await lab.until(lambda: behind.state.entries == leader.state.entries, 30)
        assert len(lab.hub.sent(frames.SnapshotOffer)) == 1
        await asyncio.sleep(CATCH_UP_S)
        await lab.until(lambda: leader.journal.total_bytes < 10_000)

    run(scenario())


def test_snapshot_survives_the_leaders_death_half_way():
    async def scenario() -> None:
        lab = Lab(**COMPACTING)
        leader = await lab.start()
        behind, other = lab.others(leader)
        lab.hub.isolate(behind.node_id)
        await fill(lab, 400, leader)
        for node in (leader, other):
            await compacted(lab, node, behind.journal.last_index)
        before = list(behind.state.entries)
        chunks = 0

        def stop_half_way(source: str, target: str, message: frames.AnyMessage) -> int:
            nonlocal chunks
            if isinstance(message, frames.SnapshotChunk):
                chunks += 1
                return int(chunks < 4)
            return 1

        lab.hub.rule = stop_half_way
        lab.hub.heal()
        await lab.until(lambda: chunks >= 4)
        assert behind.state.entries == before
        leader.kill()
        lab.hub.rule = lambda source, target, message: 1
        new = await lab.leader([behind, other])
        assert new is other
        await fill(lab, 5, new, b"after")
        await lab.until(lambda: behind.state.entries == new.state.entries)

    run(scenario())


@pytest.mark.parametrize("strike", ["another failure", "the link breaks"])
def test_a_node_that_cannot_delete_a_half_received_snapshot_halts_and_says_why(monkeypatch, strike):
    """As on a file system that has become read-only."""
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        lab.hub.rule = lambda source, target, message: int(
            not isinstance(message, frames.SnapshotChunk) or not message.last)
        lab.hub.heal()
        await lab.until(lambda: behind.engine._receiver.received_bytes > 0)
        target = behind.engine._receiver._target
        read_only = OSError(errno.EROFS, "Read-only file system")

        def abort() -> None:
            raise read_only

        monkeypatch.setattr(target, "abort", abort)
        waiting = asyncio.ensure_future(outcome(behind.engine.wait_applied(
            10_000, timeout_s=10 * SECOND)))
        await asyncio.sleep(0)
        if strike == "another failure":
            behind.disk.fail["replace"] = OSError(errno.EIO, "Input/output error")
            lab.hub.inject(leader.node_id, behind.node_id,
                           frames.StaleTerm(behind.status().term + 1))
        else:
            lab.hub.isolate(behind.node_id)
        await lab.until(lambda: bool(behind.fatal))
        assert isinstance(await waiting, NoLeader)
        assert behind.fatal == [behind.disk.fail.get("replace", read_only)]
        await behind.engine.stop()
        assert behind.status().role is Role.SHUTDOWN

    run(scenario())


def test_stalled_stream_is_begun_anew():
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        dropped = []

        def drop_one(source: str, target: str, message: frames.AnyMessage) -> int:
            if isinstance(message, frames.SnapshotChunk) and message.offset and not dropped:
                dropped.append(message)
                return 0
            return 1

        lab.hub.rule = drop_one
        lab.hub.heal()
        await lab.until(lambda: behind.state.entries == leader.state.entries, 30)
        assert dropped
        assert len(lab.hub.sent(frames.SnapshotOffer)) == 2

    run(scenario())


def test_an_export_that_the_store_ended_is_begun_anew(monkeypatch):
    """As when its file grows; the leader goes on leading."""
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        exports = []
        open_export = leader.state.open_export

        def ended_at_first() -> object:
            export = open_export()
            exports.append(export)
            if len(exports) == 1:
                def read(max_bytes: int) -> bytes:
                    raise Overloaded("the store's file was being resized")

                export.read = read
            return export

        monkeypatch.setattr(leader.state, "open_export", ended_at_first)
        lab.hub.heal()
        await lab.until(lambda: behind.status().snapshots_installed == 1)
        assert not leader.fatal
        assert len(exports) == 2
        await lab.settle()

    run(scenario())


def test_a_chunk_waits_for_the_disk_beside_the_loop():
    """The leader goes on leading while a thread brings into memory what is read next."""
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        done = 0

        def work() -> None:
            nonlocal done
            done += 1

        leader.state.read_ahead = work
        leader.read_ahead.holding = True
        lab.hub.heal()
        await lab.until(lambda: leader.read_ahead.has_work)
        await fill(lab, 5, leader, b"while it waits")
        assert not lab.hub.sent(frames.SnapshotChunk)
        leader.read_ahead.release()
        await lab.until(lambda: behind.state.entries == leader.state.entries)
        assert done == len(lab.hub.sent(frames.SnapshotChunk)) > 1

    run(scenario())


def test_a_peer_is_not_given_up_for_what_the_own_disk_takes():
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        leader.state.read_ahead = lambda: None
        leader.read_ahead.holding = True
        lab.hub.heal()
        while behind.state.entries != leader.state.entries:
            await lab.until(lambda: leader.read_ahead.has_work
                            or behind.state.entries == leader.state.entries)
            if leader.read_ahead.has_work:
                await asyncio.sleep(1.2 * STALLED_S)
                leader.read_ahead.release()
                leader.read_ahead.holding = True
        assert len(lab.hub.sent(frames.SnapshotChunk)) > 1
        assert len(lab.hub.sent(frames.SnapshotOffer)) == 1

    run(scenario())


@pytest.mark.parametrize("ended_by", ["the link breaks", "the node stops", "another leader"])
def test_a_stream_that_ends_while_a_thread_reads_ahead_is_not_gone_on_with(monkeypatch, ended_by):
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        exports = []
        open_export = leader.state.open_export

        def watched() -> object:
            exports.append(open_export())
            return exports[-1]

        monkeypatch.setattr(leader.state, "open_export", watched)
        leader.state.read_ahead = lambda: None
        leader.read_ahead.holding = True
        lab.hub.heal()
        await lab.until(lambda: leader.read_ahead.has_work)
        if ended_by == "the link breaks":
            lab.hub.isolate(behind.node_id)
        elif ended_by == "the node stops":
            leader.kill()
        else:
            lab.hub.isolate(leader.node_id)
            await lab.until(lambda: leader.status().role is not Role.LEADER, 10)
        await asyncio.sleep(SECOND)

        def read(max_bytes: int) -> bytes:
            raise AssertionError("nobody wants it any more")

        for export in exports:
            monkeypatch.setattr(export, "read", read)
        leader.read_ahead.release()
        assert exports
        assert not leader.fatal

    run(scenario())


def test_damage_that_is_met_after_reading_ahead_stops_the_node(monkeypatch):
    async def scenario() -> None:
        lab, leader, _ = await left_behind()
        leader.state.read_ahead = lambda: None
        open_export = leader.state.open_export
        damage = StoreCorrupt("a flipped bit")

        def damaged() -> object:
            export = open_export()

            def read(max_bytes: int) -> bytes:
                raise damage

            export.read = read
            return export

        monkeypatch.setattr(leader.state, "open_export", damaged)
        leader.read_ahead.holding = True
        lab.hub.heal()
        await lab.until(lambda: leader.read_ahead.has_work)
        assert not leader.fatal
        leader.read_ahead.release()
        assert leader.fatal == [damage]

    run(scenario())


def test_damaged_stream_is_refused_and_sent_again(monkeypatch):
    finish = ListState.open_import
    refusals = []

    class Refusing:
        def __init__(self, inner):
            self.inner = inner

        def write(self, chunk):
            self.inner.write(chunk)

        def finish(self):
            if not refusals:
                refusals.append(1)
                raise CorruptionError("the checksum differs")
            return self.inner.finish()

        def abort(self):
            self.inner.abort()

    monkeypatch.setattr(ListState, "open_import", lambda self: Refusing(finish(self)))

    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        lab.hub.heal()
        await lab.until(lambda: behind.state.entries == leader.state.entries)
        assert refusals == [1]
        assert not behind.fatal
        assert not behind.disk.exists(behind.path / "install")

    run(scenario())


@pytest.mark.parametrize("state_was_replaced", [True, False])
def test_crash_between_the_steps_of_an_installation(state_was_replaced):
    """The marker is there. Whether the log follows depends on which state the store has."""
    async def scenario() -> None:
        lab = Lab(**COMPACTING)
        leader = await lab.start()
        behind = lab.others(leader)[0]
        await lab.settle()
        lab.hub.isolate(behind.node_id)
        await fill(lab, 100, leader)
        index = leader.state.applied_index
        behind.kill()
        configuration = leader.engine._context.configuration
        marker = MarkerFile(behind.disk, behind.path / "install")
        from elastickv.raft.membership import encode_members
        marker.save(InstallMarker(index, leader.journal.term_at(index), configuration.index,
                                  encode_members(configuration.members)))
        if state_was_replaced:
            behind.state.entries = list(leader.state.entries)
        last_index = behind.journal.last_index
        lab.hub.heal()
        await behind.start()
        assert marker.load() is None
        assert behind.journal.anchor_index == (index if state_was_replaced else 1)
        assert behind.journal.last_index == (index if state_was_replaced else last_index)
        await fill(lab, 5, leader, b"after")
        await lab.settle()
        assert behind.state.entries == leader.state.entries

    run(scenario())


def test_a_configuration_that_nobody_committed_goes_with_the_log():
    """A deposed leader that is sent the state has none of its own entries any more, whatever their
    index: a member of its own making could elect a second leader."""
    async def scenario() -> None:
        lab = Lab(4, **COMPACTING)
        deposed = await lab.start()
        await fill(lab, 10, deposed)
        await lab.settle()
        others = lab.others(deposed)
        change = asyncio.ensure_future(outcome(deposed.engine.change_members(
            MembershipChange(ChangeKind.REMOVE, others[-1].node_id), timeout_s=5)))
        await asyncio.sleep(0)
        lab.hub.isolate(deposed.node_id)
        leader = await lab.leader(others)
        assert isinstance(await change, OutcomeUnknown)
        assert len(deposed.core.voters()) == 3
        await fill(lab, 400, leader)
        await compacted(lab, leader, 100)
        lab.hub.heal()
        await lab.until(lambda: deposed.status().snapshots_installed == 1)
        assert sorted(deposed.core.voters()) == sorted(leader.core.voters())
        await fill(lab, 400, leader, b"more")
        await compacted(lab, deposed, 500)
        await deposed.restart()
        await lab.settle()
        assert {node.status().configuration_index for node in lab.nodes.values()} == {0}
        assert len(deposed.core.voters()) == 4

    run(scenario())


def full_behind_an_installed_state(monkeypatch, node: LabNode, full_at: str, *,
                                   is_full: bool = True) -> SimpleNamespace:
    """While `is_full` of what is returned, the disk of `node` has no space for files that end with
    `full_at` once the state is a snapshot's and the log does not follow it."""
    original, space = node.disk.replace, SimpleNamespace(is_full=is_full, refusals=0)

    def replace(path: Path, data: bytes) -> None:
        if space.is_full and path.name.endswith(full_at) \
                and node.state.applied_index > node.core.applied_index():
            space.refusals += 1
            raise DiskFull("no space left")
        original(path, data)

    monkeypatch.setattr(node.disk, "replace", replace)
    return space


@pytest.mark.parametrize("full_at", [".log", "members"])
@pytest.mark.parametrize("restarts", [False, True])
def test_full_disk_between_the_steps_of_an_installation(monkeypatch, full_at, restarts):
    """Until there is space the node takes no part: its log is gone and its state is ahead. What its
    peers remember of the old log must not make it a suspect."""
    async def scenario() -> None:
        lab = Lab(**COMPACTING)
        leader = await lab.start()
        behind, witness = lab.others(leader)
        await lab.settle()
        await asyncio.sleep(2)
        lab.hub.isolate(behind.node_id)
        await fill(lab, 400, leader)
        await compacted(lab, leader, 100)
        space = full_behind_an_installed_state(monkeypatch, behind, full_at)
        lab.hub.heal()
        await lab.until(lambda: space.refusals > 0)
        index = behind.state.applied_index
        await fill(lab, 5, leader, b"meanwhile")
        offers = len(lab.hub.sent(frames.SnapshotOffer))
        await asyncio.sleep(30)
        assert len(lab.hub.sent(frames.SnapshotOffer)) - offers <= 30 / STALLED_S + 1
        assert isinstance(await outcome(behind.engine.read_index(timeout_s=1)), NoLeader)
        assert isinstance(await outcome(behind.engine.wait_applied(index, timeout_s=1)), NoLeader)
        assert not behind.fatal
        assert behind.status().snapshots_installed == 0
        assert behind.core.applied_index() < index == behind.state.applied_index
        assert not behind.engine._connected
        assert (leader.status().role, behind.status().role) == (Role.LEADER, Role.FOLLOWER)
        if restarts:
            await behind.engine.stop()
        space.is_full = False
        if restarts:
            await behind.start()
        await lab.settle()
        assert behind.state.entries == leader.state.entries
        assert behind.journal.anchor_index >= index
        assert not behind.engine._trust.suspect
        witness.kill()
        await fill(lab, 5, leader, b"after")
        await lab.until(lambda: behind.state.entries == leader.state.entries)
        assert not behind.fatal

    run(scenario())


@pytest.mark.parametrize("is_full", [False, True])
def test_who_greeted_while_the_disk_was_full_is_waited_for(monkeypatch, is_full):
    """A node with an old disk is sent the state by a leader that was deposed. Whether the voter
    that knows better greets before or while the disk is full: it has to be heard first."""
    async def scenario() -> None:
        lab = Lab(**COMPACTING, housekeeping_s=0.6)
        stale = await lab.start()
        knows, behind = lab.others(stale)
        await lab.settle()
        await asyncio.sleep(2)
        lab.hub.isolate(behind.node_id)
        await fill(lab, 400, stale)
        await compacted(lab, stale, 100)
        await compacted(lab, knows, 100)
        old_disk, old_entries = behind.disk.copy(), list(behind.state.entries)
        lab.hub.cut_pairs.clear()
        lab.hub.isolate(stale.node_id)
        lab.hub.connect_all()
        await lab.until(knows.engine.is_leader)
        await knows.engine.propose(b"committed without the stale leader", timeout_s=3)
        behind.kill()
        behind.disk.files, behind.state.entries = old_disk, old_entries
        space = full_behind_an_installed_state(monkeypatch, behind, ".log", is_full=is_full)
        lab.hub.cut_pairs = {frozenset((knows.node_id, other.node_id)) for other in (stale, behind)}
        await behind.start()
        lab.hub.connect_all()
        await lab.until(lambda: behind.state.applied_index > 300)
        assert behind.engine._receiver.is_cut_short is is_full
        lab.hub.cut_pairs = {frozenset((knows.node_id, stale.node_id))}
        lab.hub.connect_all()
        await asyncio.sleep(0.01)
        lab.hub.isolate(behind.node_id, [knows.node_id])
        space.is_full = False
        proposal = asyncio.ensure_future(outcome(stale.engine.propose(b"too late", timeout_s=2)))
        await lab.until(lambda: not behind.engine._receiver.is_cut_short)
        await asyncio.sleep(0.2)
        lab.hub.cut_pairs = {frozenset((knows.node_id, stale.node_id))}
        lab.hub.connect_all()
        assert isinstance(await proposal, Exception)
        lab.hub.heal()
        await lab.settle()
        assert not any(node.fatal for node in lab.nodes.values())
        assert stale.state.entries == knows.state.entries == behind.state.entries

    run(scenario())


def test_a_full_disk_does_not_keep_a_node_from_stopping():
    """What it remembers of peers is not worth an error."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await leader.engine.propose(b"x", timeout_s=5)
        await lab.settle()
        node = lab.others(leader)[0]
        node.engine._storage.memory.spoke(leader.node_id, 99)
        node.disk.fail["replace"] = DiskFull("no space left")
        await node.engine.stop()
        assert node.status().role is Role.SHUTDOWN
        del node.disk.fail["replace"]
        await node.start()
        await lab.settle()

    run(scenario())


def test_state_outside_the_log_refuses_the_start():
    async def scenario() -> None:
        lab = Lab(1, **COMPACTING)
        node = await lab.start()
        await fill(lab, 400, node)
        await compacted(lab, node, 100)
        node.kill()
        entries = node.state.entries
        node.state.entries = entries[:50]
        with pytest.raises(JournalCorrupt, match="state is that of entry 51"):
            await node.start()
        node.state.entries = [*entries, type(entries[0])(entries[-1].index + 1, 9, b"x")]
        with pytest.raises(JournalCorrupt, match="state is that of entry"):
            await node.start()

    run(scenario())


def test_lost_hard_state_refuses_the_start():
    async def scenario() -> None:
        lab = Lab(1)
        node = await lab.start()
        await fill(lab, 3, node)
        node.kill()
        del node.disk.files[node.path / "hardstate"]
        with pytest.raises(JournalCorrupt, match="no term and vote"):
            await node.start()

    run(scenario())


class Received:
    """A receiver whose log holds entries 2 to `last_index` of term 1, the first few applied."""

    def __init__(self, last_index: int, applied_index: int = 3) -> None:
        disk = MemoryDisk()
        self.journal = Journal(disk, Path("/log"))
        self.append_to(last_index)
        self.applied_index = applied_index
        self.sent: list[frames.SnapshotAck] = []
        self.installed: list[InstallMarker] = []
        self.state = ListState()
        core = SimpleNamespace(term=lambda: 1, term_leader_id=lambda: "n1",
                               applied_index=lambda: self.applied_index)
        context = SimpleNamespace(core=core, journal=self.journal, now=lambda: 0.0,
                                  send=lambda peer_id, message: self.sent.append(message))
        self.receiver = SnapshotReceiver(context, self.state, MarkerFile(disk, Path("/install")),
                                         self.installed.append)

    def append_to(self, last_index: int) -> None:
        for index in range(self.journal.last_index + 1, last_index + 1):
            self.journal.append(index, 1, b"\0")

    def offer(self, index: int, term: int) -> None:
        self.receiver.on_offer("n1", frames.SnapshotOffer(1, 1, index, term, 0,
                                                          encode_members([])))

    def complete(self, index: int) -> None:
        export = ListState()
        export.entries = [Entry(each, 1, b"%d" % each) for each in range(2, index + 1)]
        data = export.open_export().read(1 << 20)
        self.receiver.on_chunk("n1", frames.SnapshotChunk(1, 1, 0, data, True))


def test_an_offer_to_a_full_disk_is_refused(monkeypatch):
    """Unanswered, it would keep the leader's read of its store open until the stream stalls."""
    async def scenario() -> None:
        lab, leader, behind = await left_behind()
        imports = []

        def full() -> object:
            imports.append(asyncio.get_running_loop().time())
            raise DiskFull("no space left")

        monkeypatch.setattr(behind.state, "open_import", full)
        lab.hub.heal()
        await lab.until(lambda: bool(imports))
        await lab.until(lambda: not leader.engine._sender._streams, 0.1)
        await lab.until(lambda: len(imports) == 3)
        assert imports[-1] - imports[0] < 3 * REFUSED_S
        assert not behind.fatal
        monkeypatch.undo()
        await lab.until(lambda: behind.state.entries == leader.state.entries)

    run(scenario())


class Imports:
    """Counts the imports of a node that were begun and not ended."""

    def __init__(self, monkeypatch, node: LabNode) -> None:
        self.begun, self.open = 0, 0
        open_import = node.state.open_import

        def begin() -> object:
            target = open_import()
            self.begun, self.open = self.begun + 1, self.open + 1
            finish, abort = target.finish, target.abort

            def ended(way):
                self.open -= 1
                return way()

            target.finish, target.abort = lambda: ended(finish), lambda: ended(abort)
            return target

        monkeypatch.setattr(node.state, "open_import", begin)


async def half_received(monkeypatch) -> tuple[Lab, LabNode, LabNode, Imports]:
    """The follower has the beginning of a snapshot; chunks do not arrive any more."""
    lab, leader, behind = await left_behind()
    imports = Imports(monkeypatch, behind)
    lab.hub.rule = lambda source, target, message: int(
        not isinstance(message, frames.SnapshotChunk) or message.offset < 1000)
    lab.hub.heal()
    await lab.until(lambda: behind.engine._receiver.received_bytes > 0)
    return lab, leader, behind, imports


def test_what_was_received_of_a_former_leaders_snapshot_is_dropped(monkeypatch):
    """The next one may serve from its log, and will offer nothing."""
    async def scenario() -> None:
        lab, leader, behind, imports = await half_received(monkeypatch)
        other, = lab.others(leader, behind)
        assert imports.open == 1
        await leader.engine.transfer_leadership(other.node_id, timeout_s=SECOND)
        await lab.until(lambda: behind.core.leader_id() == other.node_id)
        await lab.until(lambda: imports.open == 0, 0.1)

    run(scenario())


@pytest.mark.parametrize("full", ["the log", "the state, as the stream goes on",
                                  "the state, as the stream begins"])
def test_a_full_disk_ends_what_its_leader_sends(monkeypatch, full):
    """It pins pages of the store and what follows it in the log, however slow the peer is. The next
    stream comes when the peer has long dropped what it had of this one."""
    async def scenario() -> None:
        lab, leader, behind, imports = await half_received(monkeypatch)
        first, = lab.hub.sent(frames.SnapshotOffer)
        stream = leader.engine._sender._streams[behind.node_id]
        pause_s = leader.engine._settings.full_disk_pause_s

        def no_room(*arguments: object) -> None:
            raise DiskFull("no space left")

        if full == "the log":
            with monkeypatch.context() as patch:
                patch.setattr(leader.journal, "append", no_room)
                assert isinstance(await outcome(leader.engine.propose(b"x", timeout_s=SECOND)),
                                  DiskFull)
        elif full == "the state, as the stream goes on":
            monkeypatch.setattr(stream.export, "read", no_room)
            lab.hub.inject(behind.node_id, leader.node_id, frames.SnapshotAck(
                first.term, first.stream, stream.sent, False))
        else:
            with monkeypatch.context() as patch:
                patch.setattr(leader.state, "open_export", no_room)
                await asyncio.sleep(STALLED_S + SECOND)
        assert not leader.engine._sender._streams
        lab.hub.rule = lambda source, target, message: 1
        await fill(lab, 400, leader, b"the log may go on")
        await compacted(lab, leader, first.index)
        await lab.until(lambda: imports.open == 0, ABANDONED_S + SECOND)
        await asyncio.sleep(pause_s - 2 * ABANDONED_S)
        assert lab.hub.sent(frames.SnapshotOffer) == [first]
        assert leader.engine.is_leader()
        await lab.until(lambda: behind.state.entries == leader.state.entries, 2 * ABANDONED_S)
        assert (imports.begun, imports.open) == (2, 0)

    run(scenario())


def test_a_snapshot_that_its_leader_begins_anew_is_received(monkeypatch):
    """While it is on its way its leader goes on sending heartbeats."""
    async def scenario() -> None:
        lab, leader, behind, imports = await half_received(monkeypatch)
        leaders = []
        behind.engine.on_role_change(
            lambda role, term: leaders.append(behind.status().leader_id))
        await asyncio.sleep(STALLED_S / 2)
        assert (imports.begun, imports.open) == (1, 1)
        assert leaders == []
        lab.hub.rule = lambda source, target, message: 1
        await lab.until(lambda: behind.state.entries == leader.state.entries, 30)
        assert (imports.begun, imports.open) == (2, 0)

    run(scenario())


@pytest.mark.parametrize(("meanwhile", "term", "installs"), [
    pytest.param(lambda it: it.append_to(20), 1, False, id="the log came to hold it"),
    pytest.param(lambda it: it.append_to(10), 1, False, id="the log came to end with it"),
    pytest.param(lambda it: setattr(it, "applied_index", 10), 1, False, id="the state came to it"),
    pytest.param(lambda it: it.append_to(9), 1, True, id="the log ends before it"),
    pytest.param(lambda it: it.append_to(20), 2, True, id="the log holds another entry there"),
])
def test_a_snapshot_of_what_came_meanwhile_drops_nothing(meanwhile, term, installs):
    """What follows it in the log may be acknowledged."""
    it = Received(last_index=5)
    it.offer(10, term)
    meanwhile(it)
    last_index = it.journal.last_index
    it.complete(10)
    assert bool(it.installed) is installs
    assert it.sent[-1].done
    assert installs or (it.journal.last_index == last_index and it.state.entries == [])


def test_a_snapshot_of_what_the_log_holds_is_not_asked_for():
    it = Received(last_index=20)
    it.offer(10, 1)
    assert [message.done for message in it.sent] == [True]


def test_nothing_is_applied_over_a_gap_in_the_state():
    """As after an installation that took the state back, and failed."""
    async def scenario():
        lab = Lab(1)
        node = await lab.start()
        await fill(lab, 3, node)
        lost = node.state.entries.pop()
        await outcome(node.engine.propose(b"next", timeout_s=SECOND))
        assert [type(error) for error in node.fatal] == [ApplyHalted]
        assert f"the state is that of entry {lost.index - 1}, not of {lost.index}" \
            in str(node.fatal[0])
    run(scenario())
