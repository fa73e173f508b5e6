"""Membership changes, joining, leaving, and handing the leadership over."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from raft_lab import Lab, LabNode, MemoryDisk, outcome, run

from elastickv.errors import (
    DeadlineExceeded,
    DiskFull,
    InvalidArgument,
    MembershipConflict,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    RemovedFromCluster,
)
from elastickv.raft import configuration_file, frames, records
from elastickv.raft.configuration_file import unpack_configuration
from elastickv.raft.engine import Member, Role, Suffrage
from elastickv.raft.journal import FIRST_ANCHOR_INDEX
from elastickv.raft.membership import (
    CONFIGURATION_KIND,
    ChangeKind,
    MembershipChange,
    encode_members,
)
from elastickv.raft.pysyncobj_journal import NO_OP_COMMAND

SECOND = 1.0


async def change(leader: LabNode, kind: ChangeKind, node_id: str, **fields: object) -> int:
    address = "host9:1" if kind in (ChangeKind.ADD_VOTER, ChangeKind.ADD_LEARNER) else ""
    return await leader.engine.change_members(
        MembershipChange(kind, node_id, address, **fields), timeout_s=5)  # type: ignore[arg-type]


async def newcomer(lab: Lab, node_id: str = "n9") -> LabNode:
    node = LabNode(lab, Member(node_id, "host9:1"), joining=True)
    lab.nodes[node_id] = node
    await node.start()
    return node


async def learner(lab: Lab, leader: LabNode) -> LabNode:
    """n9, added and settled."""
    node = await newcomer(lab)
    await change(leader, ChangeKind.ADD_LEARNER, "n9")
    await lab.settle()
    return node


async def held_back(lab: Lab, leader: LabNode, entries: int) -> LabNode:
    """n9, which waits to be added; of a log of so many entries it is sent the beginning alone."""
    for number in range(entries):
        await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
    node = await newcomer(lab)
    await lab.until(lambda: len(node.engine.members()) == 1)
    lab.hub.rule = no_entries_behind_15
    return node


async def removed_and_wiped(lab: Lab, leader: LabNode) -> None:
    """n9 is a member no more, knows it, and its disk is gone."""
    await change(leader, ChangeKind.REMOVE, "n9")
    await lab.until(lambda: bool(lab.nodes["n9"].fatal))
    lab.nodes.pop("n9").kill()


def no_entries_behind_15(source: str, target: str, message: object) -> int:
    """A rule of the hub: n9 is sent the beginning of the log alone."""
    return 0 if target == "n9" and isinstance(message, frames.AppendEntries) and message.entries \
        and message.previous_index > 15 else 1


def silent(lab: Lab, node: LabNode) -> None:
    """The link stands, and nothing arrives."""
    lab.hub.rule = lambda source, target, message: int(node.node_id not in (source, target))


def suffrages(node: LabNode) -> dict[str, Suffrage]:
    return {member.node_id: member.suffrage for member in node.engine.members()}


def test_learner_joins_catches_up_and_is_promoted():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        for number in range(30):
            await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
        joined = await newcomer(lab)
        await lab.until(lambda: len(joined.engine.members()) == 3)
        assert joined.status().role is Role.FOLLOWER
        index = await change(leader, ChangeKind.ADD_LEARNER, "n9")
        assert leader.status().configuration_index == index
        await lab.until(lambda: joined.state.payloads() == leader.state.payloads())
        assert suffrages(joined)["n9"] is Suffrage.LEARNER
        await lab.until(lambda: leader.core.match_index("n9") == leader.journal.last_index)
        await change(leader, ChangeKind.PROMOTE, "n9", previous_index=index)
        await lab.settle()
        assert all(suffrages(node)["n9"] is Suffrage.VOTER for node in lab.nodes.values())
        # Four voters need three: with two of the old ones gone, nothing is committed.
        for node in lab.others(leader, joined):
            lab.hub.isolate(node.node_id)
        assert isinstance(await outcome(leader.engine.propose(b"x", timeout_s=0.3)), Exception)

    run(scenario())


def test_learner_neither_counts_nor_stands():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        joined = await learner(lab, leader)
        others = lab.others(leader, joined)
        lab.hub.isolate(leader.node_id, [node.node_id for node in others])
        result = await outcome(leader.engine.propose(b"x", timeout_s=0.3))
        assert isinstance(result, Exception), "committed by a learner's acknowledgement"
        for node in others:
            lab.hub.isolate(node.node_id)
        lab.hub.isolate(leader.node_id)
        await asyncio.sleep(5)
        assert joined.status().role is Role.FOLLOWER
        assert not lab.hub.sent(frames.RequestVote, "n9")

    run(scenario())


def test_added_voter_counts_at_once():
    async def scenario() -> None:
        lab = Lab(1)
        leader = await lab.start()
        joined = await newcomer(lab)
        await change(leader, ChangeKind.ADD_VOTER, "n9")
        await lab.settle()
        lab.hub.isolate("n9")
        assert isinstance(await outcome(leader.engine.propose(b"x", timeout_s=0.3)), Exception)
        lab.hub.heal()
        new = await lab.leader()
        assert await new.engine.propose(b"y", timeout_s=5) == b"y"
        await lab.settle()
        assert joined.state.payloads()[-1] == b"y"

    run(scenario())


def test_removed_follower_stops_itself_with_a_clear_message():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        removed = lab.others(leader)[0]
        await change(leader, ChangeKind.REMOVE, removed.node_id)
        await lab.until(lambda: bool(removed.fatal))
        assert isinstance(removed.fatal[0], RemovedFromCluster)
        assert removed.node_id in str(removed.fatal[0])
        assert len(leader.engine.members()) == 2
        assert await leader.engine.propose(b"x", timeout_s=SECOND) == b"x"

    run(scenario())


def test_node_removed_while_away_learns_it_when_it_comes_back():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        removed = lab.others(leader)[0]
        term = leader.status().term
        lab.hub.isolate(removed.node_id)
        await change(leader, ChangeKind.REMOVE, removed.node_id)
        await asyncio.sleep(3)
        lab.hub.heal()
        await lab.until(lambda: bool(removed.fatal))
        assert isinstance(removed.fatal[0], RemovedFromCluster)
        assert leader.engine.is_leader()
        assert leader.status().term == term

    run(scenario())


def test_leader_that_removes_itself_commits_without_itself_and_hands_over():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        await change(leader, ChangeKind.REMOVE, leader.node_id)
        await lab.until(lambda: bool(leader.fatal))
        assert isinstance(leader.fatal[0], RemovedFromCluster)
        new = await lab.leader(lab.others(leader))
        assert len(new.engine.members()) == 2
        assert await new.engine.propose(b"x", timeout_s=SECOND) == b"x"
        leader.kill()
        with pytest.raises(RemovedFromCluster):
            await leader.start()

    run(scenario())


def test_uncommitted_change_is_undone_with_the_entry_that_made_it():
    async def scenario() -> None:
        lab = Lab(leader_fallback_s=5.0)
        old = await lab.start()
        await lab.settle()
        pending = asyncio.ensure_future(outcome(
            change(old, ChangeKind.REMOVE, lab.others(old)[0].node_id)))
        await asyncio.sleep(0)
        lab.hub.isolate(old.node_id)
        assert len(old.engine.members()) == 2
        new = await lab.leader(lab.others(old))
        await new.engine.propose(b"x", timeout_s=SECOND)
        lab.hub.heal()
        await lab.until(lambda: old.state.payloads() == [b"x"])
        assert len(old.engine.members()) == 3
        assert isinstance(await pending, Exception)

    run(scenario())


@pytest.mark.parametrize("how", ["down", "cut off"])
def test_a_change_that_would_need_a_member_that_is_down_is_refused(how: str):
    """Committed by nobody, it would stop the cluster, for good if that member is lost."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await lab.settle()
        alive, dead = lab.others(leader)
        if how == "down":
            dead.kill()
        else:
            silent(lab, dead)
            await asyncio.sleep(2 * SECOND)
        with pytest.raises(MembershipConflict, match=dead.node_id) as refused:
            await change(leader, ChangeKind.REMOVE, alive.node_id)
        assert dead.node_id in refused.value.remedy
        assert await leader.engine.propose(b"x", timeout_s=SECOND) == b"x"
        await change(leader, ChangeKind.REMOVE, dead.node_id)
        await change(leader, ChangeKind.REMOVE, alive.node_id)
        assert suffrages(leader) == {leader.node_id: Suffrage.VOTER}

    run(scenario())


def test_a_promotion_that_would_need_the_learner_while_it_is_down_is_refused():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        joined = await learner(lab, leader)
        alive, dead = lab.others(leader, joined)
        dead.kill()
        lab.hub.isolate("n9")
        with pytest.raises(MembershipConflict, match=f"{dead.node_id}, n9"):
            await change(leader, ChangeKind.PROMOTE, "n9", skip_min_applied_check=True)
        lab.hub.heal()
        await lab.until(lambda: leader.engine._context.answers("n9"))
        await change(leader, ChangeKind.PROMOTE, "n9", skip_min_applied_check=True)
        await lab.settle(leader, alive, joined)
        assert suffrages(joined)["n9"] is Suffrage.VOTER

    run(scenario())


def test_one_change_at_a_time():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        others = lab.others(leader)
        for node in others:
            node.offload.holding = True
        first = asyncio.ensure_future(outcome(change(leader, ChangeKind.REMOVE,
                                                     others[0].node_id)))
        await asyncio.sleep(0)
        assert leader.status().pending_configuration
        with pytest.raises(MembershipConflict, match="under way"):
            await change(leader, ChangeKind.ADD_LEARNER, "n9")
        for node in others:
            node.offload.release()
        assert isinstance(await first, int)

    run(scenario())


def test_membership_survives_restart_and_compaction():
    async def scenario() -> None:
        lab = Lab(segment_bytes=2000, compact_bytes=6000, keep_entries=10)
        leader = await lab.start()
        joined = await newcomer(lab)
        await change(leader, ChangeKind.ADD_LEARNER, "n9")
        await asyncio.gather(*(leader.engine.propose(b"%d" % number, timeout_s=10)
                               for number in range(300)))
        await lab.until(lambda: leader.journal.anchor_index > 100)
        await lab.settle()
        for node in lab.nodes.values():
            await node.restart()
        await lab.leader()
        assert all(suffrages(node)["n9"] is Suffrage.LEARNER for node in lab.nodes.values())
        assert joined.status().configuration_index == leader.status().configuration_index

    run(scenario())


def test_newcomer_behind_a_compacted_log_gets_the_membership_with_the_snapshot():
    async def scenario() -> None:
        lab = Lab(segment_bytes=2000, compact_bytes=6000, keep_entries=10)
        leader = await lab.start()
        await asyncio.gather(*(leader.engine.propose(b"%d" % number, timeout_s=10)
                               for number in range(300)))
        await lab.until(lambda: leader.journal.anchor_index > 100)
        joined = await newcomer(lab)
        await change(leader, ChangeKind.ADD_VOTER, "n9")
        await lab.settle()
        assert joined.state.entries == leader.state.entries
        assert suffrages(joined) == suffrages(leader)

    run(scenario())


def test_transfer_moves_the_leadership_quickly_and_loses_no_write():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        target = lab.others(leader)[1]
        acknowledged = [await leader.engine.propose(b"%d" % n, timeout_s=SECOND)
                        for n in range(20)]
        before = asyncio.get_running_loop().time()
        await leader.engine.transfer_leadership(target.node_id, timeout_s=SECOND)
        await lab.until(target.engine.is_leader)
        assert asyncio.get_running_loop().time() - before < 0.3
        acknowledged.append(await target.engine.propose(b"after", timeout_s=SECOND))
        await lab.settle()
        assert all(node.state.payloads() == acknowledged for node in lab.nodes.values())

    run(scenario())


def test_transfer_waits_until_the_leader_has_applied_what_it_proposed():
    """Its proposals would end with an unknown outcome, though their entries are committed."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        target, _ = lab.others(leader)
        leader.state.takes_more = False
        proposal = leader.engine.propose(b"x", timeout_s=SECOND)
        await lab.until(lambda: leader.core.match_index(target.node_id)
                        == leader.journal.last_index)
        transfer = asyncio.ensure_future(
            leader.engine.transfer_leadership(target.node_id, timeout_s=SECOND))
        await asyncio.sleep(0.2)
        leader.state.takes_more = True
        assert await proposal == b"x"
        await transfer
        await lab.until(target.engine.is_leader)

    run(scenario())


def test_transfer_does_not_wait_for_a_state_that_takes_nothing():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        target, _ = lab.others(leader)
        leader.state.takes_more = False
        proposal = leader.engine.propose(b"x", timeout_s=60)
        await leader.engine.transfer_leadership(target.node_id, timeout_s=2 * SECOND)
        assert isinstance(await outcome(proposal), OutcomeUnknown)
        await lab.until(target.engine.is_leader)

    run(scenario())


def test_transfer_whose_caller_gives_up_does_not_block_the_leader():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        lab.hub.rule = lambda source, target, message: int(
            not isinstance(message, frames.TimeoutNow))
        transfer = asyncio.ensure_future(leader.engine.transfer_leadership("", timeout_s=60))
        await asyncio.sleep(0.05)
        assert isinstance(await outcome(leader.engine.propose(b"x", timeout_s=SECOND)), NoLeader)
        transfer.cancel()
        await asyncio.sleep(0)
        assert await leader.engine.propose(b"y", timeout_s=SECOND) == b"y"

    run(scenario())


@pytest.mark.parametrize("how", ["down", "cut off", "silent"])
def test_transfer_to_a_member_that_does_not_answer_is_refused_at_once(how: str):
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        target, other = lab.others(leader)
        if how == "down":
            target.kill()
        elif how == "cut off":
            lab.hub.isolate(target.node_id)
        else:
            silent(lab, target)
            await asyncio.sleep(2 * SECOND)
        before = asyncio.get_running_loop().time()
        with pytest.raises(MembershipConflict, match=target.node_id):
            await leader.engine.transfer_leadership(target.node_id, timeout_s=60)
        assert asyncio.get_running_loop().time() == before
        assert await leader.engine.propose(b"x", timeout_s=SECOND) == b"x"
        await leader.engine.transfer_leadership("", timeout_s=SECOND)
        await lab.until(other.engine.is_leader)

    run(scenario())


@pytest.mark.parametrize("kind", [frames.TimeoutNow, frames.Ack])
def test_transfer_that_gets_nowhere_holds_the_writes_for_an_election_and_no_longer(kind: type):
    """The target is asked in vain, or does not catch up."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        target, _ = lab.others(leader)
        await lab.settle()
        lab.hub.rule = lambda source, recipient, message: int(
            target.node_id not in (source, recipient) or not isinstance(message, kind))
        await leader.engine.propose(b"x", timeout_s=SECOND)
        loop = asyncio.get_running_loop()
        began = loop.time()
        transfer = asyncio.ensure_future(outcome(
            leader.engine.transfer_leadership(target.node_id, timeout_s=60)))
        await asyncio.sleep(0)
        assert isinstance(await outcome(leader.engine.propose(b"y", timeout_s=SECOND)), NoLeader)
        assert isinstance(await transfer, DeadlineExceeded)
        assert loop.time() - began < 1.1
        assert await leader.engine.propose(b"z", timeout_s=SECOND) == b"z"

    run(scenario())


def test_transfer_waits_for_a_target_that_catches_up():
    async def scenario() -> None:
        lab = Lab(batch_bytes=1000, window_bytes=1000)
        leader = await lab.start()
        target, _ = lab.others(leader)
        lab.hub.isolate(target.node_id)
        for number in range(100):
            await leader.engine.propose(b"%d" % number + bytes(500), timeout_s=SECOND)
        lab.hub.rule = lambda source, recipient, message: int(
            source != target.node_id or not isinstance(message, frames.Ack)
            or asyncio.get_running_loop().time() % 0.5 < 0.1)
        lab.hub.heal()
        await lab.until(lambda: leader.core.match_index(target.node_id) > 50)
        await leader.engine.transfer_leadership(target.node_id, timeout_s=60)
        await lab.until(target.engine.is_leader)

    run(scenario())


@pytest.mark.parametrize("size", [1, 3])
def test_transfer_without_anybody_who_could_lead_is_refused(size: int):
    async def scenario() -> None:
        lab = Lab(size, leader_fallback_s=30)
        leader = await lab.start()
        lab.hub.isolate(leader.node_id)
        expected = InvalidArgument if size == 1 else MembershipConflict
        with pytest.raises(expected):
            await leader.engine.transfer_leadership("", timeout_s=SECOND)
        with pytest.raises(InvalidArgument):
            await leader.engine.transfer_leadership("n7", timeout_s=SECOND)

    run(scenario())


def test_transfer_is_the_leaders():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        with pytest.raises(NotLeader):
            await lab.others(leader)[0].engine.transfer_leadership("", timeout_s=SECOND)

    run(scenario())


def test_read_that_a_removed_member_had_asked_for_harms_nobody():
    """Its leader knows no next index of it any more."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        gone = lab.others(leader)[0]
        await leader.engine.propose(b"known to all", timeout_s=SECOND)
        await lab.settle()
        leader.engine._reads.on_read_request(gone.node_id, frames.ReadRequest(7))
        await change(leader, ChangeKind.REMOVE, gone.node_id)
        leader.engine._reads.on_read_request(gone.node_id, frames.ReadRequest(8))
        assert await leader.engine.read_index(timeout_s=SECOND) > 0
        await lab.settle()
        assert leader.engine.is_leader()
        assert await leader.engine.propose(b"goes on", timeout_s=SECOND)

    run(scenario())


def test_a_full_disk_at_a_new_term_leaves_the_configuration_that_the_log_keeps():
    """The truncation that goes with the new term did not happen either."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await leader.engine.propose(b"x", timeout_s=5)
        await lab.settle()
        follower, rival = lab.others(leader)
        term, journal = leader.core.term(), follower.journal
        last_index, last_term, commit_index = (journal.last_index, journal.last_term,
                                               follower.core.commit_index())
        smaller = encode_members([m for m in lab.members if m.node_id != rival.node_id])
        lab.hub.rule = lambda source, target, message: 0

        def entries(entry_term: int, command: bytes) -> frames.AppendEntries:
            return frames.AppendEntries(
                entry_term, 1 << 20, commit_index, last_index, last_term,
                records.encode(last_index + 1, entry_term, command, 0))

        lab.hub.inject(leader.node_id, follower.node_id,
                       entries(term, CONFIGURATION_KIND + smaller))
        expected = sorted((leader.node_id, follower.node_id))
        assert sorted(follower.core.voters()) == expected
        follower.disk.fail["replace"] = DiskFull("no space left")
        lab.hub.inject(rival.node_id, follower.node_id, entries(term + 1, NO_OP_COMMAND))
        assert (journal.last_index, journal.last_term) == (last_index + 1, term)
        assert sorted(follower.core.voters()) == expected
        follower.disk.fail.clear()
        lab.hub.inject(rival.node_id, follower.node_id, entries(term + 1, NO_OP_COMMAND))
        assert (journal.last_index, journal.last_term) == (last_index + 1, term + 1)
        assert len(follower.core.voters()) == 3

    run(scenario())


def test_a_voter_that_has_not_heard_of_its_promotion_votes():
    """Its vote may be the one that the promotion, committed by the others, made necessary."""
    async def scenario() -> None:
        lab = Lab(2)
        leader = await lab.start()
        joined = await learner(lab, leader)
        lab.hub.isolate("n9")
        await change(leader, ChangeKind.PROMOTE, "n9", skip_min_applied_check=True)
        other, = lab.others(leader, joined)
        await lab.settle(leader, other)
        leader.kill()
        lab.hub.heal()
        assert suffrages(joined)["n9"] is Suffrage.LEARNER
        assert await lab.leader([other, joined]) is other
        await other.engine.propose(b"x", timeout_s=SECOND)
        assert suffrages(joined)["n9"] is Suffrage.VOTER

    run(scenario())


def test_a_newcomer_that_has_not_heard_that_it_is_a_voter_votes():
    """The lone old member wrote that the newcomer is a voter, and was restarted before it said so:
    from then on it needs that vote."""
    async def scenario() -> None:
        lab = Lab(1)
        leader = await lab.start()
        joined = await newcomer(lab)
        await lab.until(lambda: len(joined.engine.members()) == 1)
        lab.hub.isolate("n9")
        added = asyncio.ensure_future(change(leader, ChangeKind.ADD_VOTER, "n9"))
        await asyncio.sleep(0.05)
        await leader.restart()
        lab.hub.heal()
        assert await lab.leader([leader]) is leader
        assert suffrages(joined)["n9"] is Suffrage.VOTER
        added.cancel()

    run(scenario())


def test_a_node_that_joins_votes_for_nobody_before_it_knows_who_remembers_it():
    """A member whose disk was wiped may have voted before: it waits for all voters' greetings, and
    these it learns from the configuration."""
    async def scenario() -> None:
        lab = Lab()
        await lab.start()
        wiped, *others = lab.nodes.values()
        wiped.kill()
        await lab.leader(others)
        lab.hub.isolate("n1")
        anew = LabNode(lab, wiped.member, joining=True)
        lab.nodes["n1"] = anew
        await anew.start()
        await asyncio.sleep(3 * SECOND)
        term = others[0].core.term() + 1
        lab.hub.inject("n2", "n1", frames.PreVote(term, 1, 1000, term))
        anew.engine.connected("n2", others[0].engine.make_hello("stranger"))
        lab.hub.inject("n2", "n1", frames.RequestVote(term, 1000, term, True))
        anew.engine._members._adopt(others[0].engine._context.configuration)
        lab.hub.inject("n2", "n1", frames.RequestVote(term, 1000, term, True))
        assert not anew.core.term()
        assert not anew.engine._is_trusted()
        await asyncio.sleep(SECOND)
        assert anew.engine._is_trusted()

    run(scenario())


def test_a_newcomer_that_is_restarted_before_it_is_a_member_goes_on_joining():
    """It gets the entries before the one that makes it a member first."""
    async def scenario() -> None:
        lab = Lab(1, batch_bytes=100)
        leader = await lab.start()
        joined = await held_back(lab, leader, 30)
        adding = asyncio.ensure_future(change(leader, ChangeKind.ADD_LEARNER, "n9"))
        await lab.until(lambda: joined.state.applied_index > 5)
        await joined.restart()
        lab.hub.rule = lambda source, target, message: 1
        await adding
        await lab.settle()
        assert suffrages(joined)["n9"] is Suffrage.LEARNER

    run(scenario())


@pytest.mark.parametrize("remembered", [True, False], ids=["later", "at once"])
def test_a_removed_member_does_not_join_again_with_its_old_data(remembered: bool):
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        joined = await learner(lab, leader)
        if remembered:
            await lab.until(lambda: joined.engine._storage.hard_state.state.joined)
        await change(leader, ChangeKind.REMOVE, "n9")
        await lab.until(lambda: bool(joined.fatal))
        joined.kill()
        with contextlib.suppress(RemovedFromCluster):
            await joined.start()
            await lab.until(lambda: bool(joined.fatal))
            assert isinstance(joined.fatal[0], RemovedFromCluster)

    run(scenario())


def test_a_node_that_joins_again_under_its_old_name_skips_what_it_was_before():
    """The log holds its former addition and removal, which it replays; and a member that was away
    still takes it for one."""
    async def scenario() -> None:
        lab = Lab(batch_bytes=100, window_bytes=200)
        leader = await lab.start()
        await learner(lab, leader)
        behind = lab.others(leader, lab.nodes["n9"])[0]
        behind.kill()
        await removed_and_wiped(lab, leader)
        for number in range(200):
            await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
        lab.hub.isolate(behind.node_id, [node.node_id for node in lab.others(behind)])
        await behind.start()
        joined = await newcomer(lab)
        adding = asyncio.ensure_future(change(leader, ChangeKind.ADD_VOTER, "n9"))
        await adding
        await lab.settle(leader, joined)
        assert not joined.fatal
        lab.hub.heal()
        await lab.settle()
        await joined.restart()
        await lab.settle()
        assert suffrages(joined)["n9"] is Suffrage.VOTER
        assert not joined.fatal

    run(scenario())


def test_a_newcomer_follows_nobody_before_it_has_stored_the_configuration(monkeypatch):
    """What it was before, under the same name, is in the log."""
    async def scenario() -> None:
        lab = Lab(batch_bytes=100, window_bytes=200)
        leader = await lab.start()
        await learner(lab, leader)
        await removed_and_wiped(lab, leader)
        replace, refusals = MemoryDisk.replace, []

        def full(disk: MemoryDisk, path: Path, data: bytes) -> None:
            if path.name == configuration_file.FILE_NAME:
                refusals.append(path)
                raise DiskFull("no space left")
            replace(disk, path, data)

        with monkeypatch.context() as without_room:
            without_room.setattr(MemoryDisk, "replace", full)
            joined = await newcomer(lab)
            await change(leader, ChangeKind.ADD_LEARNER, "n9")
            await lab.until(lambda: len(refusals) > 10)
            assert joined.journal.last_index == FIRST_ANCHOR_INDEX
        await lab.settle()
        assert suffrages(joined)["n9"] is Suffrage.LEARNER
        assert not joined.fatal

    run(scenario())


def test_a_node_that_only_a_member_from_the_past_takes_for_one_goes_on_waiting():
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        await learner(lab, leader)
        behind, other = lab.others(leader, lab.nodes["n9"])
        behind.kill()
        await removed_and_wiped(lab, leader)
        lab.hub.isolate(behind.node_id, [leader.node_id, other.node_id])
        lab.hub.isolate("n9", [leader.node_id, other.node_id])
        await behind.start()
        joined = await newcomer(lab)
        await lab.until(lambda: "n9" in suffrages(joined))
        lab.hub.heal()
        await asyncio.sleep(2 * SECOND)
        assert not joined.fatal
        await joined.restart()
        await asyncio.sleep(2 * SECOND)
        assert not joined.fatal
        await change(await lab.leader(), ChangeKind.ADD_LEARNER, "n9")
        await lab.settle()
        assert suffrages(joined) == suffrages(leader)

    run(scenario())


def test_a_full_disk_keeps_no_log_from_being_compacted():
    """That is what makes space. Only a compaction after which the log knows nothing of it any more
    waits until the node has written down that it is a member."""
    async def scenario() -> None:
        lab = Lab(1, segment_bytes=2000, compact_bytes=6000, keep_entries=10, housekeeping_s=5.0)
        leader = await lab.start()
        for number in range(300):
            await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
        leader.disk.fail["replace"] = DiskFull("no space left")
        await lab.until(lambda: leader.journal.anchor_index > 100)
        assert not leader.engine._storage.hard_state.state.joined
        del leader.disk.fail["replace"]
        await lab.until(lambda: leader.engine._storage.hard_state.state.joined)

    run(scenario())


def test_what_a_member_from_the_past_told_is_corrected_before_the_log_is_believed():
    """The newcomer knows that member alone, asks it in the moment in which it is back, and is added
    by a leader that reaches it by itself."""
    async def scenario() -> None:
        lab = Lab(batch_bytes=100, window_bytes=200)
        leader = await lab.start()
        await learner(lab, leader)
        behind, other = lab.others(leader, lab.nodes["n9"])
        behind.kill()
        for number in range(200):
            await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
        await removed_and_wiped(lab, leader)
        for number in range(200):
            await leader.engine.propose(b"%d" % number, timeout_s=SECOND)
        lab.hub.isolate("n9", [leader.node_id, other.node_id])
        members, lab.members = lab.members, [behind.member]
        joined = await newcomer(lab)
        lab.members = members
        await behind.start()
        await lab.settle(leader, behind, other)
        await asyncio.sleep(3 * SECOND)
        lab.hub.cut_pairs.clear()
        await change(leader, ChangeKind.ADD_VOTER, "n9")
        await lab.settle()
        await joined.restart()
        await lab.settle()
        assert not joined.fatal
        assert suffrages(joined)["n9"] is Suffrage.VOTER

    run(scenario())


def test_a_peer_that_hangs_does_not_keep_a_newcomer_from_its_leader():
    async def scenario() -> None:
        lab = Lab(1)
        leader = await lab.start()
        hung = LabNode(lab, Member("n2", "host2:1"), joining=True)
        lab.nodes["n2"] = hung
        await hung.start()
        await leader.engine.change_members(
            MembershipChange(ChangeKind.ADD_LEARNER, "n2", "host2:1"), timeout_s=5)
        await lab.settle()
        lab.members = [*lab.members, hung.member]
        term = leader.status().term
        lab.hub.rule = lambda source, target, message: 0 if source == "n2" else 1
        await newcomer(lab)
        await asyncio.sleep(0.01)
        await change(leader, ChangeKind.ADD_VOTER, "n9")
        assert leader.status().term == term

    run(scenario())


def test_a_newcomer_that_is_removed_while_it_catches_up_waits_again():
    async def scenario() -> None:
        lab = Lab(1, batch_bytes=100)
        leader = await lab.start()
        joined = await held_back(lab, leader, 200)
        await change(leader, ChangeKind.ADD_LEARNER, "n9")
        await lab.until(lambda: "n9" in suffrages(joined))
        await change(leader, ChangeKind.REMOVE, "n9")
        lab.hub.rule = lambda source, target, message: 1
        await lab.until(lambda: "n9" not in suffrages(joined))
        await joined.restart()
        await asyncio.sleep(2 * SECOND)
        assert not joined.fatal
        await change(leader, ChangeKind.ADD_LEARNER, "n9")
        await lab.settle()
        assert suffrages(joined)["n9"] is Suffrage.LEARNER

    run(scenario())


def test_a_new_leader_tells_a_newcomer_nothing_before_it_knows_what_is_committed():
    async def scenario() -> None:
        lab = Lab()
        first = await lab.start()
        await learner(lab, first)
        others = [node for node in lab.nodes.values() if node is not first and node.node_id != "n9"]
        first.kill()
        lab.hub.rule = lambda source, target, message: 0 if isinstance(message, frames.Ack) else 1
        await lab.until(lambda: any(node.core.is_leading() for node in others))
        second = next(node for node in others if node.core.is_leading())
        with pytest.raises(NoLeader):
            await second.engine._members._tell("n8", "", b"")
        lab.hub.rule = lambda source, target, message: 1
        await lab.leader(others)
        told = unpack_configuration(await second.engine._members._tell("n8", "", b""))
        assert told.find("n9") is not None

    run(scenario())


def test_some_calls_are_served_to_members_only():
    """Whatever a certificate allows, the configuration of whoever is asked decides."""
    async def scenario() -> None:
        lab = Lab()
        leader = await lab.start()
        follower, _ = lab.others(leader)
        stranger = await newcomer(lab)

        async def serve(peer_id: str, method: str, payload: bytes) -> bytes:
            return peer_id.encode()

        async def asked_by(node: LabNode, method: str) -> object:
            return await outcome(node.engine.call(leader.node_id, method, b"", timeout_s=SECOND))

        leader.engine.handle("open", serve)
        leader.engine.handle("closed", serve, members_only=True)
        await lab.until(lambda: len(stranger.engine.members()) == 3)
        assert await asked_by(follower, "closed") == follower.node_id.encode()
        assert await asked_by(leader, "closed") == leader.node_id.encode()
        assert await asked_by(stranger, "open") == b"n9"
        refusal = await asked_by(stranger, "closed")
        assert isinstance(refusal, NotLeader)
        assert "n9 is no member" in str(refusal)

        # The entry is in the leader's log, and nobody else has it yet.
        lab.hub.rule = lambda source, target, message: not isinstance(message, frames.AppendEntries)
        adding = asyncio.ensure_future(change(leader, ChangeKind.ADD_LEARNER, "n9"))
        await lab.until(lambda: leader.status().pending_configuration)
        assert await asked_by(stranger, "closed") == b"n9"
        lab.hub.rule = lambda source, target, message: 1
        await adding
        await lab.settle()
        await change(leader, ChangeKind.PROMOTE, "n9", skip_min_applied_check=True)
        assert await asked_by(stranger, "closed") == b"n9"

        # It does not hear that it was removed.
        lab.hub.rule = lambda source, target, message: \
            target != "n9" or isinstance(message, frames.Response)
        await change(leader, ChangeKind.REMOVE, "n9")
        assert isinstance(await asked_by(stranger, "closed"), NotLeader)
        assert await asked_by(stranger, "open") == b"n9"

    run(scenario())
