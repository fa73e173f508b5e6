"""The configuration: format, history, and the rules for changing it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import (
    ConditionFailed,
    ExitCode,
    InvalidArgument,
    MembershipConflict,
    WireError,
)
from elastickv.raft.engine import Member, Suffrage
from elastickv.raft.membership import (
    CONFIGURATION_KIND,
    ChangeContext,
    ChangeKind,
    Configuration,
    MembershipChange,
    MembershipLog,
    RaftAddressChanged,
    decode_members,
    encode_members,
    plan_change,
    require_majority_up,
    require_own_address,
)

VOTER, LEARNER = Suffrage.VOTER, Suffrage.LEARNER
THREE = (Member("n1", "h:1"), Member("n2", "h:2"), Member("n3", "h:3", LEARNER))
CURRENT = Configuration(20, THREE)
READY = ChangeContext(CURRENT, commit_index=25, leader_ready=True, match_index=24)


def change(kind: ChangeKind, node_id: str = "n4", address: str = "h:4", previous: int = 0,
           required: int = 0, skip: bool = False) -> MembershipChange:
    return MembershipChange(kind, node_id, address, previous, required, skip)


@given(st.lists(st.builds(Member, st.text(), st.text(), st.sampled_from(Suffrage))))
def test_members_survive_encoding(members):
    assert decode_members(encode_members(members)) == tuple(members)


@pytest.mark.parametrize("body", [b"", b"\x80", b"\x92\x02\x90", encode_members(THREE)[:-1],
                                  encode_members(THREE) + b"\0"])
def test_malformed_configuration_is_refused(body):
    with pytest.raises(WireError):
        decode_members(body)


ALLOWED = [
    ("add a voter", change(ChangeKind.ADD_VOTER), READY,
     {"n1": VOTER, "n2": VOTER, "n3": LEARNER, "n4": VOTER}),
    ("add a learner", change(ChangeKind.ADD_LEARNER, previous=20), READY,
     {"n1": VOTER, "n2": VOTER, "n3": LEARNER, "n4": LEARNER}),
    ("promote with enough", change(ChangeKind.PROMOTE, "n3", required=24), READY,
     {"n1": VOTER, "n2": VOTER, "n3": VOTER}),
    ("promote regardless", change(ChangeKind.PROMOTE, "n3", required=999, skip=True), READY,
     {"n1": VOTER, "n2": VOTER, "n3": VOTER}),
    ("remove a voter", change(ChangeKind.REMOVE, "n2"), READY, {"n1": VOTER, "n3": LEARNER}),
    ("remove a learner", change(ChangeKind.REMOVE, "n3"), READY, {"n1": VOTER, "n2": VOTER}),
]


@pytest.mark.parametrize(("wanted", "context", "expected"), [case[1:] for case in ALLOWED],
                         ids=[case[0] for case in ALLOWED])
def test_allowed_change(wanted, context, expected):
    assert {m.node_id: m.suffrage for m in plan_change(wanted, context)} == expected


ONE = ChangeContext(Configuration(0, THREE[:1]), 25, True)
REFUSED = [
    ("add a member again", change(ChangeKind.ADD_VOTER, "n2", "h:9"), READY, InvalidArgument),
    ("add an address again", change(ChangeKind.ADD_LEARNER, "n9", "h:2"), READY, InvalidArgument),
    ("add without an id", change(ChangeKind.ADD_VOTER, ""), READY, InvalidArgument),
    ("add without an address", change(ChangeKind.ADD_VOTER, "n4", ""), READY, InvalidArgument),
    ("promote a stranger", change(ChangeKind.PROMOTE, "n9"), READY, InvalidArgument),
    ("promote a voter", change(ChangeKind.PROMOTE, "n1"), READY, InvalidArgument),
    ("promote too early", change(ChangeKind.PROMOTE, "n3"), READY, MembershipConflict),
    ("promote below the minimum", change(ChangeKind.PROMOTE, "n3", required=25), READY,
     MembershipConflict),
    ("remove a stranger", change(ChangeKind.REMOVE, "n9"), READY, InvalidArgument),
    ("remove the only voter", change(ChangeKind.REMOVE, "n1"), ONE, MembershipConflict),
    ("configuration has moved", change(ChangeKind.REMOVE, "n2", previous=19), READY,
     ConditionFailed),
    ("another change is not committed", change(ChangeKind.REMOVE, "n2"),
     ChangeContext(CURRENT, 19, True), MembershipConflict),
    ("the leader's first entry is not committed", change(ChangeKind.REMOVE, "n2"),
     ChangeContext(CURRENT, 25, False), MembershipConflict),
]


@pytest.mark.parametrize(("wanted", "context", "error"), [case[1:] for case in REFUSED],
                         ids=[case[0] for case in REFUSED])
def test_refused_change(wanted, context, error):
    with pytest.raises(error):
        plan_change(wanted, context)


def voters(*numbers: int, learners: tuple[int, ...] = ()) -> tuple[Member, ...]:
    return tuple(Member(f"n{number}", f"h:{number}", LEARNER if number in learners else VOTER)
                 for number in (*numbers, *learners))


UP = [
    ("remove one of three, all up", voters(1, 2, 3), voters(1, 3), {"n1", "n3"}, ""),
    ("remove the dead one of three", voters(1, 2, 3), voters(1, 2), {"n1", "n2"}, ""),
    ("remove one of three, another is dead", voters(1, 2, 3), voters(1, 3), {"n1", "n2"}, "n3"),
    ("remove one of five, another is dead", voters(1, 2, 3, 4, 5), voters(1, 2, 3, 4),
     {"n1", "n2", "n3"}, ""),
    ("remove one of five, two others are dead", voters(1, 2, 3, 4, 5), voters(1, 2, 3, 4),
     {"n1", "n2", "n5"}, "n3, n4"),
    ("the leader removes itself, another is dead", voters(1, 2, 3), voters(2, 3), {"n1", "n2"},
     "n3"),
    ("remove down to the leader", voters(1, 2), voters(1), {"n1"}, ""),
    ("add to three, all up", voters(1, 2, 3), voters(1, 2, 3, 4), {"n1", "n2", "n3"}, ""),
    ("add to three, one is dead", voters(1, 2, 3), voters(1, 2, 3, 4), {"n1", "n2", "n4"}, ""),
    ("add one that is dead to three, one is dead", voters(1, 2, 3), voters(1, 2, 3, 4),
     {"n1", "n2"}, "n3, n4"),
    ("add one that is dead to one", voters(1), voters(1, 2), {"n1"}, "n2"),
    ("promote one that is dead, another is dead", voters(1, 2, 3, learners=(4,)),
     voters(1, 2, 3, 4), {"n1", "n2"}, "n3, n4"),
    ("a learner counts for nothing", voters(1, 2, 3, learners=(4,)), voters(1, 3, learners=(4,)),
     {"n1", "n2", "n4"}, "n3"),
    ("remove a learner, whatever is dead", voters(1, 2, 3, learners=(4,)), voters(1, 2, 3),
     {"n1"}, ""),
    ("add a learner, whatever is dead", voters(1, 2, 3), voters(1, 2, 3, learners=(4,)),
     {"n1"}, ""),
]


@pytest.mark.parametrize(("before", "after", "answering", "named"), [case[1:] for case in UP],
                         ids=[case[0] for case in UP])
def test_change_needs_a_majority_of_what_it_leads_to(before, after, answering, named):
    if not named:
        require_majority_up(before, after, answering)
        return
    with pytest.raises(MembershipConflict) as refused:
        require_majority_up(before, after, answering)
    assert f"without an answer from {named}" in refused.value.message
    assert named in refused.value.remedy


@given(st.sampled_from([case[1] for case in ALLOWED]))
def test_majorities_before_and_after_a_change_overlap(wanted):
    before = {m.node_id for m in THREE if m.suffrage is VOTER}
    after = {m.node_id for m in plan_change(wanted, READY) if m.suffrage is VOTER}
    assert len(before ^ after) <= 1


@pytest.mark.parametrize(("node_id", "raft_address"), [
    pytest.param("n2", "h:2", id="the same"),
    pytest.param("n3", "h:3", id="a learner"),
    pytest.param("n9", "h:9", id="no member"),
    pytest.param("n2", "", id="not told"),
])
def test_own_address_that_is_accepted(node_id, raft_address):
    require_own_address(CURRENT, node_id, raft_address)


@pytest.mark.parametrize("stored", ["10.0.0.4:9000", "[10.0.0.4]:9000", "10.0.0.4:09000"])
def test_own_address_is_the_same_in_any_spelling_that_was_stored(stored):
    known = Configuration(20, (Member("n4", stored),))
    require_own_address(known, "n4", "10.0.0.4:9000")


@pytest.mark.parametrize("raft_address", ["h:4", "g:2", "h:1", "H:2"])
def test_own_address_that_the_members_do_not_know_is_refused(raft_address):
    with pytest.raises(RaftAddressChanged) as caught:
        require_own_address(CURRENT, "n2", raft_address)
    assert caught.value.exit_code is ExitCode.STARTUP_REFUSED
    assert f"n2 at h:2, and --raftAddress is {raft_address}" in caught.value.message
    assert "--raftAddress h:2 " in caught.value.remedy


def test_history_follows_the_log():
    history = MembershipLog(Configuration(0, THREE[:1]))
    history.appended(5, CONFIGURATION_KIND + encode_members(THREE[:2]))
    history.appended(9, CONFIGURATION_KIND + encode_members(THREE))
    assert [history.at(index).index for index in (1, 5, 8, 9, 100)] == [0, 5, 5, 9, 9]
    history.rebase(history.at(5))
    assert (history.base.index, history.current.index) == (5, 9)
    history.appended(5, CONFIGURATION_KIND + encode_members(THREE[:1]))
    assert history.current.index == 9
    history.back_to_base()
    assert history.current == Configuration(5, THREE[:2])
