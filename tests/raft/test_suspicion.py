"""Who remembers what of whom: an ordinary crash or a removal must make nobody a suspect."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from raft_lab import Lab, LabNode, MemoryDisk, outcome, run

from elastickv.errors import DiskFull
from elastickv.raft import frames
from elastickv.raft.engine import Member
from elastickv.raft.membership import ChangeKind, MembershipChange
from elastickv.raft.offload import InlineOffload
from elastickv.raft.peer_memory import FILE_NAME, PeerMemory, what_was_lost
from elastickv.raft.settings import EngineSettings
from elastickv.raft.storage import BOOTS_PER_ENTRY, RaftStorage


async def lead(lab: Lab, node: LabNode) -> None:
    """Make `node` the leader, and let its peers remember it durably."""
    for _ in range(10):
        leader = await lab.leader()
        if leader is node:
            break
        await outcome(leader.engine.transfer_leadership(node.node_id, timeout_s=2))
    await lab.settle()
    await asyncio.sleep(1.5)


def test_a_leader_announces_no_more_than_it_has_synced():
    """It may know as a follower that more is committed. Were that remembered of it, a power cut
    before its fsync would look like lost data, and its vote could be missing for ever."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        old, slow, other = lab.nodes.values()
        await lead(lab, old)
        slow.offload.holding = True
        on_disk = {path: bytearray(data) for path, data in slow.disk.files.items()
                   if "log" in path.parts}
        await old.engine.propose(b"x", timeout_s=3)
        await lab.until(lambda: slow.core.commit_index() > slow.journal.durable_index)
        old.kill()
        lab.hub.rule = lambda source, target, message: \
            0 if source == other.node_id and isinstance(message, frames.PreVote) else 1
        await lab.until(slow.core.is_leading)
        await asyncio.sleep(0.15)
        assert slow.core.commit_index() > slow.journal.durable_index
        slow.kill()
        slow.disk.files = {path: data for path, data in slow.disk.files.items()
                           if "log" not in path.parts} | on_disk
        lab.hub.rule = lambda source, target, message: 1
        await slow.start()
        leader = await lab.leader([slow, other])
        assert not slow.engine._trust.suspect
        await leader.engine.propose(b"y", timeout_s=3)

    run(scenario())


def test_a_member_that_was_down_when_it_was_removed_is_forgotten():
    """It joins again with an empty disk, as it is told to, and nothing is missing from that."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, other, dead = lab.nodes.values()
        await lead(lab, leader)
        dead.kill()
        await leader.engine.change_members(
            MembershipChange(ChangeKind.REMOVE, dead.node_id), timeout_s=5)
        await lab.until(lambda: all(node.engine._storage.memory.of(dead.node_id) is None
                                    for node in (leader, other)))
        anew = LabNode(lab, Member(dead.node_id, dead.member.address), joining=True)
        lab.nodes[dead.node_id] = anew
        await anew.start()
        await asyncio.sleep(1)
        await leader.engine.change_members(MembershipChange(
            ChangeKind.ADD_VOTER, dead.node_id, dead.member.address), timeout_s=5)
        await lab.settle()
        assert not anew.engine._trust.suspect
        leader.kill()
        await lab.leader([other, anew])

    run(scenario())


@pytest.mark.parametrize("restarts", [False, True], ids=["", "after a restart"])
@pytest.mark.parametrize("comes_back", [False, True], ids=["runs", "comes back later"])
def test_nothing_that_a_removed_member_says_is_held_against_who_joins_under_its_name(
        comes_back, restarts):
    """It greets until it has stopped; who joins with an empty disk has lost nothing, and may be
    needed for an election before it has caught up."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, other, former = lab.nodes.values()
        await lead(lab, leader)
        if comes_back:
            former.kill()
        await leader.engine.change_members(
            MembershipChange(ChangeKind.REMOVE, former.node_id), timeout_s=5)
        await leader.engine.propose(b"x", timeout_s=5)
        await asyncio.sleep(1.5)
        if restarts:
            await other.restart()
        if comes_back:
            await former.start()
        await lab.until(lambda: bool(former.fatal))
        await asyncio.sleep(1)
        former.kill()
        anew = LabNode(lab, Member(former.node_id, former.member.address), joining=True)
        lab.nodes[former.node_id] = anew
        await anew.start()
        await asyncio.sleep(1)
        assert not anew.engine._trust.suspect
        lab.hub.rule = lambda source, target, message: int(
            target != anew.node_id or not isinstance(message, frames.AppendEntries))
        await leader.engine.change_members(MembershipChange(
            ChangeKind.ADD_VOTER, anew.node_id, anew.member.address), timeout_s=5)
        await lab.settle(leader, other)
        await asyncio.sleep(1)
        remembered = other.engine._storage.memory.of(anew.node_id)
        assert (remembered.boot_epoch, remembered.boot_id) == (1, anew.engine._storage.boot_id)
        leader.kill()
        lab.hub.rule = lambda source, target, message: 1
        await lab.leader([other])

    run(scenario())


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_who_was_removed_is_forgotten_before_anybody_can_be_added_in_its_place(disk_is_full):
    """A leader that crashes right after that must not find a newcomer, whose vote it may need, to
    have lost what the former member had."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader = await lab.leader()
        other, removed = lab.others(leader)
        await asyncio.sleep(1.5)  # it is remembered durably

        def remembered() -> set[str]:
            return set(PeerMemory(leader.disk, leader.path / FILE_NAME).peers())

        if disk_is_full:
            leader.disk.fail["replace"] = DiskFull("full")
        await leader.engine.change_members(
            MembershipChange(ChangeKind.REMOVE, removed.node_id), timeout_s=5)
        left = {other.node_id}
        assert remembered() == (left | {removed.node_id} if disk_is_full else left)
        removed.kill()
        addition = MembershipChange(ChangeKind.ADD_LEARNER, removed.node_id,
                                    removed.member.address)
        if disk_is_full:
            with pytest.raises(DiskFull):
                await leader.engine.change_members(addition, timeout_s=5)
            leader.disk.fail.clear()
        await leader.engine.change_members(addition, timeout_s=5)
        assert removed.node_id not in remembered()

    run(scenario())


def test_a_leader_that_removed_itself_is_forgotten_although_it_leads_for_a_while():
    """Until it has applied its own removal, which the others have by then."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, *others = lab.nodes.values()
        await lead(lab, leader)
        leader.state.takes_more = False
        change = asyncio.ensure_future(leader.engine.change_members(
            MembershipChange(ChangeKind.REMOVE, leader.node_id), timeout_s=5))
        await asyncio.sleep(1)
        assert leader.core.is_leading()
        assert all(node.state.applied_index > leader.state.applied_index for node in others)
        leader.state.takes_more = True
        await lab.until(lambda: bool(leader.fatal))
        await outcome(change)
        leader.kill()
        new = await lab.leader(others)
        await new.engine.propose(b"x", timeout_s=5)
        await lab.settle(*others)
        assert not any(node.engine._storage.memory.of(leader.node_id) for node in others)

    run(scenario())


@pytest.mark.parametrize("crashes", [False, True], ids=["", "crash before it is noted"])
def test_who_was_removed_is_forgotten_where_a_snapshot_tells_of_it(crashes):
    async def scenario() -> None:
        lab = Lab(4, segment_bytes=200, compact_entries=10, keep_entries=2)
        await lab.start()
        leader, other, behind, removed = lab.nodes.values()
        await lead(lab, leader)
        lab.hub.isolate(behind.node_id)
        removed.kill()
        await leader.engine.change_members(
            MembershipChange(ChangeKind.REMOVE, removed.node_id), timeout_s=5)
        for number in range(100):
            await leader.engine.propose(b"%d" % number, timeout_s=5)
        await lab.until(lambda: leader.journal.anchor_index > behind.journal.last_index)
        assert behind.engine._storage.memory.of(removed.node_id) is not None
        peers = behind.disk.read(behind.path / "peers")
        lab.hub.heal()
        await lab.settle(leader, other, behind)
        assert behind.status().snapshots_installed == 1
        if crashes:
            behind.kill()
            behind.disk.files[behind.path / "peers"] = bytearray(peers)
            await behind.start()
        assert behind.engine._storage.memory.of(removed.node_id) is None

    run(scenario())


async def started_often(lab: Lab, nodes: Sequence[LabNode]) -> None:
    """Their peers remember that durably."""
    for _ in range(5):
        for node in nodes:
            await node.restart()
        await lab.leader()
        await lab.settle()
    await asyncio.sleep(1.5)


async def replace_disk(lab: Lab, leader: LabNode, node: LabNode) -> LabNode:
    """Remove a member, and let it join again with an empty disk."""
    await leader.engine.change_members(
        MembershipChange(ChangeKind.REMOVE, node.node_id), timeout_s=5)
    await lab.until(lambda: bool(node.fatal))
    node.kill()
    await asyncio.sleep(1)
    anew = LabNode(lab, node.member, joining=True)
    anew.boots = node.boots  # another process draws another number
    lab.nodes[node.node_id] = anew
    await anew.start()
    await asyncio.sleep(1)
    await leader.engine.change_members(MembershipChange(
        ChangeKind.ADD_VOTER, node.node_id, node.member.address), timeout_s=5)
    await lab.until(lambda: anew.state.applied_index == leader.state.applied_index)
    return anew


@pytest.mark.parametrize("all_start", [False, True], ids=["alone", "with all others"])
def test_a_removed_member_that_comes_back_makes_nobody_a_suspect(all_start):
    """It remembers members from before their disks were replaced. Suspects need a leader to catch
    up with, and nobody leads if enough of them are made suspects at once."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, other, removed = lab.nodes.values()
        await started_often(lab, [other])
        await lead(lab, leader)
        removed.kill()
        await leader.engine.change_members(
            MembershipChange(ChangeKind.REMOVE, removed.node_id), timeout_s=5)
        anew = await replace_disk(lab, leader, other)
        await leader.engine.transfer_leadership(anew.node_id, timeout_s=5)
        await lab.until(anew.engine.is_leader)
        await asyncio.sleep(1.5)
        if all_start:
            for node in (anew, leader):
                node.kill()
            await removed.start()
            await anew.start()
            await leader.start()
        else:
            await removed.start()
        await lab.until(lambda: bool(removed.fatal))
        assert not anew.engine._trust.suspect
        new = await lab.leader([anew, leader])
        assert await new.engine.propose(b"x", timeout_s=5) == b"x"

    run(scenario())


def test_a_disk_from_before_another_was_replaced_makes_nobody_else_a_suspect():
    """All start at once, so that nobody is known to be sound. Two suspects of three would wait for
    a leader for ever."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, other, old = lab.nodes.values()
        await started_often(lab, [other])
        await lead(lab, leader)
        backup, applied = old.disk.copy(), old.state.applied_index
        anew = await replace_disk(lab, leader, other)
        await leader.restart()
        await lead(lab, anew)
        for node in lab.nodes.values():
            node.kill()
        old.put_back(backup, applied)
        for node in (old, leader, anew):
            await node.start()
        new = await lab.leader([leader, anew])
        assert await new.engine.propose(b"x", timeout_s=5) == b"x"
        await lab.settle()
        assert not any(node.engine._trust.suspect for node in (leader, anew))
        await lab.until(lambda: not old.engine._trust.suspect)

    run(scenario())


def test_a_member_that_was_away_while_disks_were_replaced_makes_nobody_a_suspect():
    """Those who have caught up since their start hold whatever they can have lost before."""
    async def scenario() -> None:
        lab = Lab(5)
        await lab.start()
        leader, away, *others = lab.nodes.values()
        await started_often(lab, others)
        await lead(lab, leader)
        away.kill()
        anew = [await replace_disk(lab, leader, node) for node in others]
        await leader.engine.transfer_leadership(anew[0].node_id, timeout_s=5)
        await lab.until(anew[0].engine.is_leader)
        await away.start()
        await lab.settle()
        assert not any(node.engine._trust.suspect for node in lab.nodes.values())
        assert anew[0].engine.is_leader()
        assert await anew[0].engine.propose(b"x", timeout_s=5) == b"x"

    run(scenario())


def test_a_member_that_was_away_while_most_were_replaced_leaves_a_cluster_that_starts_with_it():
    """All start at once, so that nobody has caught up with anybody. Nor was anything lost: the
    boots that it remembers are those of former members of the same names."""
    async def scenario() -> None:
        lab = Lab(5)
        await lab.start()
        leader, away, *others = lab.nodes.values()
        await started_often(lab, others)
        await lead(lab, leader)
        away.kill()
        anew = [await replace_disk(lab, leader, node) for node in others]
        for node in (leader, *anew):
            node.kill()
        for node in (away, leader, *anew):
            await node.start()
        new = await lab.leader()
        assert not any(node.engine._trust.suspect for node in lab.nodes.values())
        assert await new.engine.propose(b"x", timeout_s=5) == b"x"

    run(scenario())


def test_a_newcomers_boots_are_beyond_those_of_a_former_member_that_it_was_told_of():
    """By somebody who is behind. That former member may have started again since."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, other, _ = lab.nodes.values()
        await lead(lab, leader)
        anew = LabNode(lab, Member("n4", "host4:1"), joining=True)
        lab.nodes["n4"] = anew
        await anew.start()
        anew.engine._storage.hard_state.raise_boot(BOOTS_PER_ENTRY + 5)
        index = await leader.engine.change_members(MembershipChange(
            ChangeKind.ADD_VOTER, "n4", "host4:1"), timeout_s=5)
        await lab.settle()
        first = anew.engine._storage.hard_state.state.boot_epoch
        assert first >= index * BOOTS_PER_ENTRY
        await anew.restart()
        await lab.until(lambda: other.engine._storage.memory.of("n4").boot_epoch > first)

    run(scenario())


@pytest.mark.parametrize(("holder_is_first", "hears_the_term"), [
    (False, False), (True, False), (False, True)],
    ids=["", "who knows better is first", "another tells the term"])
def test_a_leader_of_the_past_commits_nothing_with_a_disk_from_its_time(holder_is_first,
                                                                        hears_the_term):
    """What that one has committed is not all that there is: its follower led in a later term, and
    is remembered by what it committed then."""
    async def scenario() -> None:
        lab = Lab(leader_fallback_s=30)
        await lab.start()
        past, former, holder = lab.nodes.values()
        await lead(lab, past)
        backup, applied = former.disk.copy(), former.state.applied_index
        lab.hub.isolate(past.node_id)
        lab.hub.rule = lambda source, target, message: \
            0 if source != former.node_id and isinstance(message, frames.PreVote) else 1
        await lab.until(former.engine.is_leader)
        await former.engine.propose(b"acknowledged", timeout_s=5)
        await lab.settle(former, holder)
        term = former.core.term()
        former.kill()
        former.put_back(backup, applied)
        lab.hub.rule = lambda source, target, message: 1
        apart = frozenset((past.node_id, holder.node_id))
        lab.hub.cut_pairs = {apart, frozenset((
            former.node_id, (past if holder_is_first else holder).node_id))}
        await former.start()
        await asyncio.sleep(0.15)
        if hears_the_term:
            lab.hub.inject(past.node_id, former.node_id, frames.StaleTerm(term))
        lab.hub.cut_pairs = {apart}
        lab.hub.connect_all()
        await asyncio.sleep(0.05)
        if past.engine.is_leader():
            assert isinstance(await outcome(past.engine.propose(b"other", timeout_s=2)), Exception)
        assert former.engine._trust.suspect
        lab.hub.heal()
        await lab.until(lambda: all(b"acknowledged" in node.state.payloads()
                                    for node in lab.nodes.values()))
        await lab.until(lambda: not former.engine._trust.suspect)
        assert not any(node.fatal for node in lab.nodes.values())

    run(scenario())


@pytest.mark.parametrize("full", [False, True], ids=["its link breaks", "the disk is full"])
def test_who_greeted_before_it_was_known_as_a_member_is_waited_for(full):
    """A member whose disk was emptied joins anew under its name. What the others said before it was
    told who they are is heeded once it is, and lost with the link."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, other, emptied = lab.nodes.values()
        await lead(lab, leader)
        emptied.kill()
        other.engine._storage.memory.forget(emptied.node_id)  # as if it had never met it
        anew = LabNode(lab, emptied.member, joining=True)
        lab.nodes[emptied.node_id] = anew
        lab.hub.rule = lambda source, target, message: int(not isinstance(message, frames.Response))
        await anew.start()
        await asyncio.sleep(0.01)
        trust = anew.engine._trust
        assert anew.engine._connected == {leader.node_id, other.node_id}
        lab.hub.cut_pairs.add(frozenset((leader.node_id, anew.node_id)))
        if full:
            heed = trust._heed

            def refuse(*arguments, **options):
                raise DiskFull("no space left")

            trust._heed = refuse
        else:
            lab.hub.disconnect(leader.node_id, anew.node_id)
        lab.hub.rule = lambda source, target, message: 1
        anew.engine._members.ask()
        await lab.until(lambda: bool(anew.core.voters()))
        assert not anew.engine._is_trusted()
        if full:
            trust._heed = heed
        lab.hub.heal()
        await lab.until(lambda: trust.suspect)
        await lab.until(lambda: not trust.suspect)

    run(scenario())


@pytest.mark.parametrize("writes", range(2))
def test_a_suspicion_is_durable_in_one_write(writes):
    """Were only part of it, a later greeting could find no reason for the rest."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, _, suspect = lab.nodes.values()
        await lead(lab, leader)
        hard_state = suspect.engine._storage.hard_state
        before, after, save = hard_state.state, [], hard_state._save

        def refuse(state):
            if len(after) == writes:
                raise DiskFull("no space left")
            save(state)
            after.append(state)

        hard_state._save = refuse
        lost = partial(suspect.engine._trust._become_suspect, "n1", "for a test", 40, 50)
        if writes == 0:
            with pytest.raises(DiskFull):
                lost()
            assert hard_state.state == before
            assert suspect.core.term() == before.term
        else:
            lost()
            now = hard_state.state
            assert (now.suspect, now.term, now.vote, now.boot_epoch) == (
                True, 50, suspect.node_id, 41)
            assert suspect.core.term() == 50
            assert after == [now]

    run(scenario())


@pytest.mark.parametrize("teller_stays", [True, False], ids=["", "who told is gone"])
def test_a_full_disk_makes_a_disk_from_the_past_no_less_suspect(teller_stays):
    """There may be room in the log, and none for the suspicion. A leader of the past would commit
    with it what is not what was committed since."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        past, former, holder = lab.nodes.values()
        await lead(lab, past)
        backup, applied = former.disk.copy(), former.state.applied_index
        lab.hub.isolate(past.node_id)
        lab.hub.rule = lambda source, target, message: \
            0 if source != former.node_id and isinstance(message, frames.PreVote) else 1
        await lab.until(former.engine.is_leader)
        await former.engine.propose(b"acknowledged", timeout_s=5)
        await lab.settle(former, holder)
        former.kill()
        former.put_back(backup, applied)
        lab.hub.rule = lambda source, target, message: 1
        lab.hub.cut_pairs = {frozenset((past.node_id, holder.node_id))}
        await former.start()
        former.disk.fail["replace"] = DiskFull("no space left")
        await asyncio.sleep(1)
        assert isinstance(await outcome(past.engine.propose(b"other", timeout_s=0.5)), Exception)
        assert former.engine._trust.suspect
        assert former.engine.make_hello(past.node_id).suspect
        if not teller_stays:
            holder.kill()
        former.disk.fail.clear()
        await asyncio.sleep(2)
        if not teller_stays:
            state = former.engine._storage.hard_state.state
            assert state.suspect
            assert (state.term, state.vote) == (holder.core.term(), former.node_id)
            assert not past.engine.is_leader()
            await holder.start()
        lab.hub.heal()
        await lab.until(lambda: all(b"acknowledged" in node.state.payloads()
                                    for node in lab.nodes.values()))
        await lab.until(lambda: not former.engine._trust.suspect)
        assert not any(node.fatal for node in lab.nodes.values())

    run(scenario())


def test_a_full_disk_lets_no_former_leader_elect_who_lacks_what_it_committed():
    """Who told it what it sent is gone when there is space again."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        former, holder, other = lab.nodes.values()
        await lead(lab, former)
        backup, applied = former.disk.copy(), former.state.applied_index
        lab.hub.isolate(other.node_id)
        await former.engine.propose(b"acknowledged", timeout_s=5)
        former.kill()
        former.put_back(backup, applied)
        await former.start()
        former.disk.fail["replace"] = DiskFull("no space left")
        await asyncio.sleep(1)
        holder.kill()
        former.disk.fail.clear()
        lab.hub.heal()
        await asyncio.sleep(5)
        assert not former.engine.is_leader()
        assert not other.engine.is_leader()
        await former.restart()  # the floor is durable by now
        await asyncio.sleep(5)
        assert not former.engine.is_leader()
        await holder.start()
        await lab.until(lambda: all(b"acknowledged" in node.state.payloads()
                                    for node in lab.nodes.values()))

    run(scenario())


def test_what_only_a_suspect_received_keeps_nobody_from_an_election():
    """It was not counted, and cannot be elected: nobody would ever reach such a floor."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        away, leader, suspect = lab.nodes.values()
        await lead(lab, away)
        backup, applied = suspect.disk.copy(), suspect.state.applied_index
        await away.engine.propose(b"acknowledged", timeout_s=5)
        await lab.settle()
        lab.hub.rule = lambda source, target, message: int(
            target == leader.node_id or not isinstance(message, frames.AppendEntries))
        suspect.kill()
        suspect.put_back(backup, applied)
        await suspect.start()
        await lab.until(lambda: suspect.engine._trust.suspect)
        on_disk = leader.disk.copy()
        leader.offload.holding = True
        handed_over = asyncio.ensure_future(outcome(
            away.engine.transfer_leadership(leader.node_id, timeout_s=2)))
        await lab.until(leader.core.is_leading)
        away.kill()
        lab.hub.rule = lambda source, target, message: 1
        await lab.until(lambda: suspect.journal.durable_index == leader.journal.last_index)
        leader.kill()
        leader.disk.files = on_disk | {path: data for path, data in leader.disk.files.items()
                                       if "log" not in path.parts}
        await leader.start()
        await away.start()
        new = await lab.leader()
        await new.engine.propose(b"x", timeout_s=5)
        await lab.until(lambda: not suspect.engine._trust.suspect)
        handed_over.cancel()

    run(scenario())


def test_a_suspect_gives_no_vote_that_was_waiting_for_its_fsync():
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        leader, voter, other = lab.nodes.values()
        await lead(lab, leader)
        voter.offload.holding = True
        lab.hub.isolate(other.node_id)
        leader.engine.propose(b"x", timeout_s=30)
        await asyncio.sleep(0.05)
        leader.engine._running = False
        await asyncio.sleep(0.7)
        term = voter.core.term() + 1
        lab.hub.inject(leader.node_id, voter.node_id, frames.RequestVote(term, 99, term, True))
        assert voter.engine._elections._held_votes
        voter.engine._trust._caught_up_term = 0  # as after a start
        greeting = {name: getattr(other.engine.make_hello(voter.node_id), name)
                    for name in frames.Hello.__struct_fields__}
        greeting["remembered"] = frames.PeerRecord(50, 1, term, 0, 0, 0, 0)
        voter.engine.connected(other.node_id, frames.Hello(**greeting))
        assert voter.engine._trust.suspect
        before = len(lab.hub.sent(frames.Vote, voter.node_id))
        voter.offload.release()
        await asyncio.sleep(0.05)
        assert len(lab.hub.sent(frames.Vote, voter.node_id)) == before

    run(scenario())


@pytest.mark.parametrize("crashes", [True, False], ids=["it crashes", "it goes on"])
def test_a_member_whose_acknowledged_entry_was_replaced_has_lost_nothing(crashes):
    """An entry that was never committed is replaced; a peer that remembers its acknowledgement
    greets before what replaced it is durable. A suspect would be missing from the last majority."""
    async def scenario() -> None:
        lab = Lab(5)
        await lab.start()
        old, member, new, *others = lab.nodes.values()
        await lead(lab, old)
        log_before = {path: bytearray(data) for path, data in member.disk.files.items()
                      if "log" in path.parts}
        lab.hub.isolate(old.node_id, [node.node_id for node in (new, *others)])
        old.engine.propose(b"never committed", timeout_s=60)
        await lab.until(lambda: old.core.match_index(member.node_id) == old.journal.last_index)
        replaced = old.journal.last_index
        lab.hub.isolate(old.node_id)
        lab.hub.rule = lambda source, target, message: \
            0 if source != new.node_id and isinstance(message, frames.PreVote) else 1
        member.offload.holding = True
        await lab.until(new.engine.is_leader)
        await lab.until(lambda: member.journal.last_index >= replaced
                        > member.journal.durable_index)
        assert old.engine._storage.memory.of(member.node_id).acked_index == replaced
        if crashes:
            member.kill()
            member.disk.files = {path: data for path, data in member.disk.files.items()
                                 if "log" not in path.parts} | log_before
            lab.hub.isolate(member.node_id, [new.node_id, others[1].node_id])
            new.kill()
            others[1].kill()
        lab.hub.rule = lambda source, target, message: 1
        lab.hub.cut_pairs.clear()
        if crashes:
            await member.start()
        lab.hub.connect_all()
        assert not member.engine._trust.suspect
        await lab.until(lambda: not old.engine.is_leader())
        leader = await lab.leader([old, member, others[0]] if crashes else [new])
        await leader.engine.propose(b"x", timeout_s=5)
        assert not member.engine._trust.suspect

    run(scenario())


@pytest.mark.parametrize("restarts", [True, False], ids=["after a restart", "at once"])
def test_a_replacement_may_be_replaced_in_its_turn(restarts):
    """What is only durable does not settle it: the log can become shorter again."""
    members = [Member(f"n{number}", f"host{number}:1") for number in range(1, 6)]
    settings = EngineSettings("n2", members, Path("/raft"))
    disk = MemoryDisk()

    def opened() -> RaftStorage:
        return RaftStorage(settings, disk, 0, random.Random(1), InlineOffload(), lambda error: None)

    storage = opened()
    journal, boot_id = storage.journal, storage.boot_id
    storage.hard_state.set_term(3, "")
    for index in range(2, 13):
        journal.append(index, 2 if index <= 10 else 3, b"\0x")
    journal.sync()
    remembered = frames.PeerRecord(1, boot_id, 3, 12, 3, 0, 0)
    assert not what_was_lost(remembered, storage.position())
    for term in (4, 5):
        storage.hard_state.set_term(term, "")
        storage.truncating(10, 1)
        journal.truncate_from(11)
        assert not what_was_lost(remembered, storage.position())
        journal.append(11, term, b"\0y")
        journal.sync()
        assert not what_was_lost(remembered, storage.position())
        if restarts:
            storage.close(sync=True)
            storage = opened()
            journal = storage.journal
    assert storage.hard_state.state.replaced.runs
    storage.truncating(11, 11)
    assert not storage.hard_state.state.replaced.runs


def test_a_suspect_is_trusted_once_it_has_the_state_of_everything_committed():
    """By a snapshot that nothing follows, on an idle cluster."""
    async def scenario() -> None:
        lab = Lab(segment_bytes=2000, compact_bytes=6000, keep_entries=10)
        leader = await lab.start()
        node = lab.others(leader)[0]
        await lab.settle()
        old_disk, old_entries = node.disk.copy(), list(node.state.entries)
        for number in range(400):
            await leader.engine.propose(b"%d" % number, timeout_s=5)
        await lab.until(lambda: leader.journal.anchor_index > len(old_entries) + 10)
        await asyncio.sleep(2)  # what peers remember is durable
        node.kill()
        node.disk.files, node.state.entries = old_disk, old_entries
        await node.start()
        await lab.until(lambda: node.engine._trust.suspect)
        await lab.until(lambda: node.status().snapshots_installed == 1)
        assert node.state.entries == leader.state.entries
        await lab.until(lambda: not node.engine._trust.suspect)

    run(scenario())
