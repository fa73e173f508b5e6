"""What the simulator found, each as the shortest scenario that shows it."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from raft_lab import Lab, LabNode, outcome, run
from structlog.testing import capture_logs

from elastickv import logs
from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, JournalCorrupt, OutcomeUnknown
from elastickv.raft import frames
from elastickv.raft.engine import Member, Role
from elastickv.raft.journal import Journal
from elastickv.raft.membership import ChangeKind, MembershipChange
from elastickv.raft.segment import HEADER_SIZE

COMPACTING: dict[str, Any] = {"segment_bytes": 2000, "compact_bytes": 6000, "keep_entries": 10,
                              "snapshot_chunk_bytes": 500}


def no_room(index: int, term: int, command: bytes) -> None:
    """`Journal.append` on a full disk."""
    raise DiskFull("no space left")


def test_nothing_is_written_behind_a_header_that_a_power_cut_can_take(tmp_path: Path) -> None:
    """Pages reach the disk in any order: without the header nothing tells what a segment held."""
    journal = Journal(OsDisk(), tmp_path, segment_bytes=200)
    while len(list(tmp_path.glob("*.log"))) < 2:
        journal.append(journal.last_index + 1, 1, b"\x00" + bytes(50))
    first_of_newest = journal.last_index
    journal.close()
    newest = sorted(tmp_path.glob("*.log"))[-1]
    content = newest.read_bytes()
    newest.write_bytes(bytes(HEADER_SIZE) + content[HEADER_SIZE:])
    with pytest.raises(JournalCorrupt, match="the header is damaged"):
        Journal(OsDisk(), tmp_path, segment_bytes=200)
    newest.write_bytes(bytes(HEADER_SIZE))
    assert Journal(OsDisk(), tmp_path, segment_bytes=200).last_index == first_of_newest - 1


def test_a_node_that_was_greeted_while_its_disk_was_full_can_lead_later() -> None:
    """What a greeting tells has to be durable; until it is, the peer greets again."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        full, other = lab.others(leader)
        full.disk.fail["replace"] = DiskFull("no space left")
        for node in (leader, other):
            await node.restart()
        await asyncio.sleep(2.0)
        del full.disk.fail["replace"]
        await asyncio.sleep(2.0)
        for node in (leader, other):
            node.core.elect_now = lambda: None
            if node.core.is_leading():
                node.core.follow_nobody()
        await lab.until(full.engine.is_leader)
        await full.engine.propose(b"x", timeout_s=5)
        await lab.settle()

    run(scenario())


def test_a_follower_with_a_full_disk_applies_later() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        follower, other = lab.others(leader)
        follower.state.full_on = b"key change"
        for payload in (b"before", b"key change", b"after"):
            await leader.engine.propose(payload, timeout_s=5)
        await lab.until(lambda: other.state.payloads()[-1:] == [b"after"])
        await lab.until(lambda: follower.state.payloads()[-1:] == [b"before"])
        assert leader.engine.is_leader()
        await asyncio.sleep(5.0)
        assert follower.status().role is Role.FOLLOWER
        follower.state.full_on = None
        await lab.settle()
        assert follower.state.payloads() == [b"before", b"key change", b"after"]
        assert not follower.fatal

    run(scenario())


def test_what_fits_of_a_group_is_applied_and_answered() -> None:
    async def scenario() -> None:
        lab = Lab(1)
        node = await lab.start()
        node.state.full_on = b"key change"
        answers = [node.engine.propose(payload, timeout_s=5)
                   for payload in (b"before", b"key change", b"after")]
        assert await answers[0] == b"before"
        await asyncio.sleep(1.0)
        assert node.engine.is_leader()  # nobody else could apply it
        assert node.state.payloads() == [b"before"]
        node.state.full_on = None
        assert await asyncio.gather(*answers[1:]) == [b"key change", b"after"]
        assert not node.fatal

    run(scenario())


def test_a_disk_that_fails_under_an_entry_is_no_fault_of_the_entry() -> None:
    async def scenario() -> None:
        lab = Lab(1)
        node = await lab.start()
        node.state.fails_with = OSError(errno.EIO, "Input/output error")
        await outcome(node.engine.propose(b"key change", timeout_s=5))
        assert node.fatal == [node.state.fails_with]
        assert node.state.payloads() == []

    run(scenario())


def test_a_state_that_takes_no_more_is_waited_for() -> None:
    """Its leader stays: it will, and the others may be no faster."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        follower = lab.others(leader)[0]
        leader.state.takes_more = follower.state.takes_more = False
        answer = leader.engine.propose(b"later", timeout_s=10)
        await asyncio.sleep(5.0)
        assert leader.engine.is_leader()
        assert not answer.done()
        assert (leader.state.payloads(), follower.state.payloads()) == ([], [])
        leader.state.takes_more = follower.state.takes_more = True
        assert await answer == b"later"
        await lab.settle()
        assert follower.state.payloads() == [b"later"]
        assert not leader.fatal + follower.fatal

    run(scenario())


async def _store_hangs(lab: Lab, leader: LabNode, stalled: LabNode) -> None:
    """The state of a member takes nothing any more, although there is something to apply."""
    stalled.state.takes_more = False
    await outcome(leader.engine.propose(b"later", timeout_s=1))
    assert stalled.status().applied_index < leader.status().commit_index


async def _long_enough(node: LabNode) -> None:
    """Longer than a leader waits for its state."""
    await asyncio.sleep(node.engine._settings.stalled_state_s + 5.0)


def test_a_leader_whose_store_makes_progress_stays() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        loop = asyncio.get_running_loop()

        def flush_some() -> None:
            leader.state.flushed_index = (leader.state.flushed_index or 0) + 1
            loop.call_later(leader.engine._settings.stalled_state_s / 2, flush_some)

        flush_some()
        await _store_hangs(lab, leader, leader)
        await _long_enough(leader)
        assert leader.engine.is_leader()

    run(scenario())


@pytest.mark.parametrize("members", [1, 3], ids=["alone", "nobody else has the whole log"])
def test_a_leader_whose_store_hangs_stays_while_nobody_could_succeed_it(members: int) -> None:
    async def scenario() -> None:
        lab = Lab(members)
        leader = await lab.start()
        await lab.settle()
        await _store_hangs(lab, leader, leader)
        for node in lab.others(leader):
            node.offload.holding = True
        await outcome(leader.engine.propose(b"on its own disk only", timeout_s=1))
        await _long_enough(leader)
        assert leader.engine.is_leader()

    run(scenario())


def test_a_member_whose_store_hangs_leads_no_longer_than_others_need_its_log() -> None:
    """Only it has the last entry, and of three members one is gone: it has to lead first."""
    async def scenario() -> None:
        lab = Lab()
        gone = await lab.start()
        await lab.settle()
        stalled, other = lab.others(gone)
        await _store_hangs(lab, gone, stalled)
        await _long_enough(stalled)
        lab.hub.rule = lambda source, target, message: int(target != other.node_id)
        assert await gone.engine.propose(b"x", timeout_s=1) == b"x"
        gone.kill()
        lab.hub.rule = lambda source, target, message: 1
        await lab.until(other.engine.is_leader)
        assert await other.engine.propose(b"y", timeout_s=5) == b"y"
        assert other.state.payloads()[-2:] == [b"x", b"y"]
        assert stalled.status().role is Role.FOLLOWER

    run(scenario())


def test_a_leader_whose_disk_is_full_hands_over_what_it_cannot_apply() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        leader.state.full_on = b"key change"
        assert isinstance(await outcome(leader.engine.propose(b"key change", timeout_s=5)),
                          OutcomeUnknown)
        successor = await lab.leader(lab.others(leader))
        await successor.engine.propose(b"after", timeout_s=5)
        assert successor.state.payloads() == [b"key change", b"after"]
        assert leader.state.payloads() == []
        leader.state.full_on = None
        await lab.settle()
        assert leader.state.payloads() == [b"key change", b"after"]
        assert not leader.fatal

    run(scenario())


@pytest.mark.parametrize("propose", [
    lambda engine: engine.propose(b"x", timeout_s=5),
    lambda engine: engine.change_members(MembershipChange(ChangeKind.REMOVE, "n9"), timeout_s=5),
], ids=["write", "membership change"])
def test_a_failed_fsync_during_a_proposal_stops_the_node(propose: Any) -> None:
    """Appending may seal a segment, which syncs it."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await leader.engine.change_members(
            MembershipChange(ChangeKind.ADD_LEARNER, "n9", "nowhere:1"), timeout_s=5)

        def failing(index: int, term: int, command: bytes) -> None:
            raise OSError(errno.EIO, "Input/output error")

        leader.journal.append = failing
        assert isinstance(await outcome(propose(leader.engine)), OutcomeUnknown)
        assert leader.status().role is Role.SHUTDOWN

    run(scenario())


def test_a_halt_is_acted_on_before_it_is_logged() -> None:
    """What fails may be the disk that the log lines go to."""
    async def scenario() -> None:
        lab = Lab(1)
        leader = await lab.start()
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stream:
            logs.configure(stream=stream)
            try:
                leader.engine._fail(OSError(errno.EIO, "Input/output error"))
            finally:
                logs.configure()
        assert leader.status().role is Role.SHUTDOWN
        assert [type(error) for error in leader.fatal] == [OSError]

        other = Lab(1)
        leader = await other.start()
        logged_before: list[int] = []
        with capture_logs() as logged:
            leader.engine.on_fatal(lambda error: logged_before.append(len(logged)))
            leader.engine._fail(OSError(errno.EIO, "Input/output error"))
        assert logged_before == [0]
        assert [event["event"] for event in logged] == ["raft halted"]

    run(scenario())


def test_a_snapshot_of_an_unknown_leader_is_refused_aloud() -> None:
    """Silence would keep the sender waiting for ten seconds."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        first, second = lab.others(leader)
        lab.hub.inject(first.node_id, second.node_id, frames.SnapshotOffer(
            second.status().term, 7, 1000, 1, 0, b""))
        refusals = lab.hub.sent(frames.SnapshotAck, second.node_id)
        assert [(ack.stream, ack.offset) for ack in refusals] == [(7, frames.REFUSED_OFFSET)]

    run(scenario())


async def follower_behind_the_log(lab: Lab) -> tuple[LabNode, LabNode]:
    """A leader that has dropped the log that a follower needs; the follower is still cut off."""
    leader = await lab.start()
    behind = lab.others(leader)[0]
    lab.hub.isolate(behind.node_id)
    await asyncio.gather(*(leader.engine.propose(b"%d" % number, timeout_s=10)
                           for number in range(400)))
    await lab.until(lambda: leader.journal.anchor_index > behind.journal.last_index)
    return leader, behind


def test_a_full_disk_refuses_a_snapshot_and_takes_the_next() -> None:
    async def scenario() -> None:
        lab = Lab(**COMPACTING)
        _, behind = await follower_behind_the_log(lab)
        marker = behind.engine._receiver._marker
        real_save = marker.save

        def full_once(record: Any) -> None:
            marker.save = real_save
            raise DiskFull("no space left")

        marker.save = full_once
        lab.hub.heal()
        await lab.until(lambda: behind.engine._receiver.installed_count == 1, timeout_s=5.0)
        await lab.settle()

    run(scenario())


def test_a_leader_whose_disk_is_full_refuses_writes_and_logs_it_once_a_minute() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()

        real_append, leader.journal.append = leader.journal.append, no_room
        with capture_logs() as logged:
            for _ in range(3):
                assert isinstance(await outcome(leader.engine.propose(b"x", timeout_s=5)), DiskFull)
            assert [line["event"] for line in logged] == ["disk full"]
            await asyncio.sleep(60.0)
            assert isinstance(await outcome(leader.engine.propose(b"x", timeout_s=5)), DiskFull)
        assert [line["event"] for line in logged] == ["disk full"] * 2
        leader.journal.append = real_append
        await leader.engine.propose(b"x", timeout_s=5)

    run(scenario())


@pytest.mark.parametrize(("error", "role"), [
    (DiskFull("no space left", remedy="free space"), Role.FOLLOWER),
    (OSError(errno.EIO, "Input/output error"), Role.SHUTDOWN),
], ids=["full disk", "failed fsync"])
def test_disk_that_refuses_when_a_suspect_has_caught_up(error: Exception, role: Role) -> None:
    """That is noted in its hard state, and may be due at the end of an fsync of the log."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        suspect = lab.others(leader)[0]
        suspect.offload.holding = True
        await leader.engine.propose(b"x", timeout_s=5)
        await lab.until(lambda: suspect.journal.last_index == leader.journal.last_index)
        suspect.engine._storage.hard_state.lost_data(suspect.core.term(), "", 0)
        suspect.engine._follower._required_index = leader.core.commit_index()
        suspect.disk.fail["replace"] = error
        suspect.offload.release()
        assert suspect.status().role is role
        suspect.disk.fail.clear()
        if role is Role.FOLLOWER:
            await lab.until(lambda: not suspect.engine._trust.suspect)

    run(scenario())


async def _leader_loses_what_it_sent(lab: Lab, leader: LabNode, receiver: LabNode) -> None:
    """Only `receiver` gets the leader's last entry; the leader dies before its own fsync."""
    lab.hub.rule = lambda source, target, message: int(
        target == receiver.node_id or not isinstance(message, frames.AppendEntries))
    disk = leader.disk.copy()
    leader.offload.holding = True
    proposal = asyncio.ensure_future(outcome(leader.engine.propose(b"lost", timeout_s=1)))
    await lab.until(lambda: receiver.journal.last_index == leader.journal.last_index)
    leader.kill()
    leader.disk.files = disk
    proposal.cancel()


def test_what_only_a_learner_received_keeps_nobody_from_an_election() -> None:
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        learner = lab.nodes["n9"] = LabNode(lab, Member("n9", "host9:1"), joining=True)
        await learner.start()
        await leader.engine.change_members(
            MembershipChange(ChangeKind.ADD_LEARNER, "n9", "host9:1"), timeout_s=5)
        await lab.settle()
        await _leader_loses_what_it_sent(lab, leader, learner)
        await leader.start()
        await lab.until(lambda: learner.node_id in leader.engine._connected)
        assert leader.engine._trust.current_floor() == (0, 0)
        lab.hub.rule = lambda source, target, message: 1
        await lab.leader()

    run(scenario())


def test_what_a_follower_remembers_of_its_leader_is_on_its_own_disk() -> None:
    """Both may lose an entry that neither synced, and then nobody could reach such a floor."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        follower = lab.others(leader)[0]
        memory, journal = follower.engine._storage.memory, follower.journal
        follower.offload.holding = True
        await leader.engine.propose(b"x", timeout_s=5)
        await lab.until(lambda: journal.last_index == leader.journal.last_index)
        assert memory.of(leader.node_id).sent_index == journal.durable_index < journal.last_index
        follower.offload.release()
        assert memory.of(leader.node_id).sent_index == journal.last_index

    run(scenario())


def test_read_index_for_a_process_that_is_gone_does_not_reach_the_next() -> None:
    """Requests of a new process have the numbers of the old one's."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        follower = lab.others(leader)[0]
        lab.hub.rule = lambda source, target, message: int(not isinstance(message, frames.Probe))
        reading = asyncio.ensure_future(outcome(follower.engine.read_index(timeout_s=0.1)))
        await lab.until(lambda: bool(lab.hub.sent(frames.ReadRequest, follower.node_id)))
        await lab.until(lambda: leader.engine._reads._rounds.active)
        await follower.restart()
        await lab.until(lambda: follower.node_id in leader.engine._connected)
        lab.hub.log.clear()
        lab.hub.rule = lambda source, target, message: 1
        await lab.until(lambda: not leader.engine._reads._rounds.active)
        assert not lab.hub.sent(frames.ReadReply, leader.node_id)
        await reading

    run(scenario())


def test_a_leader_that_cannot_write_its_first_entry_serves_no_read() -> None:
    """Without an entry of its own term it does not know what was committed before."""
    async def scenario() -> None:
        lab = Lab(commit_delay_s=60.0)
        old = await lab.start()
        await lab.settle()
        candidate, voter = lab.others(old)

        await old.engine.propose(b"committed", timeout_s=5)
        written = old.status().applied_index
        await lab.until(lambda: candidate.journal.last_index == voter.journal.last_index == written)
        assert candidate.status().commit_index < written
        old.kill()
        candidate.journal.append = no_room
        voter.core.postpone_election = lambda: None
        voter.core._SyncObj__raftElectionDeadline = asyncio.get_running_loop().time() + 1000
        candidate.core.elect_now()
        await lab.until(lambda: candidate.status().term > old.status().term)
        for _ in range(20):
            read = await outcome(candidate.engine.read_index(timeout_s=0.5))
            assert isinstance(read, Exception) or read >= written
        assert not candidate.engine.is_leader()

    run(scenario())
