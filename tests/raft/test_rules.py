"""The safety rules as tables of named cases."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.raft import rules
from elastickv.raft.records import Record
from elastickv.raft.rules import LogDiverged, Standing


class FakeLog:
    """A log by its terms: the first term is that of the anchor."""

    def __init__(self, anchor_index: int, *terms: int) -> None:
        self.anchor_index = anchor_index
        self.terms = terms
        self.last_index = anchor_index + len(terms) - 1

    def term_at(self, index: int) -> int:
        if not self.anchor_index <= index <= self.last_index:
            raise IndexError(index)
        return self.terms[index - self.anchor_index]

    def first_index_of_term(self, index: int) -> int:
        while index > self.anchor_index and self.term_at(index - 1) == self.term_at(index):
            index -= 1
        return index


def entries(first: int, *terms: int) -> list[Record]:
    return [Record(b"\x00", first + offset, term, 0) for offset, term in enumerate(terms)]


class Case(NamedTuple):
    name: str
    log: FakeLog
    committed: int
    previous: tuple[int, int]
    sent: list[Record]
    leader_commit: int
    accepted: bool
    stands_at: int = 0
    appended: int = 0
    match: int = 0
    commit: int = 0
    truncates: bool = False
    continue_from: int = 0


LOG = FakeLog(1, 0, 1, 1, 2, 2)  # entries 2..5
APPENDS = [
    Case("next entry", LOG, 3, (5, 2), entries(6, 2), 5, True, 5, 1, 6, 5),
    Case("heartbeat at the end", LOG, 3, (5, 2), [], 4, True, 5, 0, 5, 4),
    Case("heartbeat in the middle truncates nothing", LOG, 3, (3, 1), [], 3, True, 5, 0, 3, 3),
    Case("heartbeat commits only what it verified", LOG, 2, (3, 1), [], 5, True, 5, 0, 3, 3),
    Case("entries that are there already", LOG, 3, (3, 1), entries(4, 2, 2), 5, True, 5, 0, 5, 5),
    Case("the first of them only", LOG, 3, (3, 1), entries(4, 2), 5, True, 5, 0, 4, 4),
    Case("overlap, then new", LOG, 3, (3, 1), entries(4, 2, 2, 2), 6, True, 5, 1, 6, 6),
    Case("conflict of the last", LOG, 3, (4, 2), entries(5, 3), 5, True, 4, 1, 5, 5, True),
    Case("conflict in the middle", LOG, 3, (3, 1), entries(4, 3, 3), 3, True, 3, 2, 5, 3, True),
    Case("gap", LOG, 3, (6, 2), entries(7, 2), 7, False, continue_from=6),
    Case("other term before", LOG, 3, (5, 3), entries(6, 3), 5, False, continue_from=4),
    Case("other term, committed below", LOG, 4, (5, 3), entries(6, 3), 5, False, continue_from=5),
    Case("all below the anchor", FakeLog(10, 3, 3), 10, (4, 1), entries(5, 1, 1), 6, True,
         11, 0, 10, 6),
    Case("reaches over the anchor", FakeLog(10, 3, 3), 10, (8, 2), entries(9, 2, 3, 3, 4), 12, True,
         11, 1, 12, 12),
]


@pytest.mark.parametrize("case", APPENDS, ids=[case.name for case in APPENDS])
def test_append(case):
    plan = rules.plan_append(case.log, case.committed, *case.previous, case.sent,
                             case.leader_commit)
    assert plan.accepted is case.accepted
    if not case.accepted:
        assert plan.next_index == case.continue_from
        return
    assert plan.previous_index == case.stands_at
    assert plan.previous_term == case.log.term_at(case.stands_at)
    assert len(plan.entries) == case.appended
    assert (plan.match_index, plan.commit_index) == (case.match, case.commit)
    assert plan.truncates is case.truncates


@pytest.mark.parametrize(("previous", "sent"), [
    ((3, 1), entries(4, 3)), ((2, 1), entries(3, 1, 3)), ((4, 3), entries(5, 3))])
def test_conflict_with_a_committed_entry_stops_the_node(previous, sent):
    with pytest.raises(LogDiverged, match="committed"):
        rules.plan_append(LOG, 4, *previous, sent, 4)


@given(st.data())
def test_append_never_loses_a_matching_entry_and_acknowledges_only_equal_ones(data):
    """Against random logs that share a prefix and where no other entry has the same index and
    term, as Raft guarantees (even terms are ours, odd ones theirs)."""
    def log_terms(name: str) -> list[int]:
        return sorted(data.draw(st.lists(st.integers(1, 4), max_size=6), label=name))

    shared = log_terms("shared")
    floor = shared[-1] if shared else 0
    ours = [0, *shared, *(2 * (t + floor) for t in log_terms("ours"))]
    theirs = [0, *shared, *(2 * (t + floor) + 1 for t in log_terms("theirs"))]
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    committed = data.draw(st.integers(1, same), label="committed")
    previous = data.draw(st.integers(1, len(theirs)), label="previous")
    stop = data.draw(st.integers(previous, len(theirs)), label="stop")
    sent = [Record(b"\x00", i, theirs[i - 1], 0) for i in range(previous + 1, stop + 1)]
    log = FakeLog(1, *ours)
    plan = rules.plan_append(log, committed, previous, theirs[previous - 1], sent, stop)
    if not plan.accepted:
        assert committed < plan.next_index <= len(ours) + 1
        return
    result = ours[:plan.previous_index] + [r.term for r in plan.entries]
    # PySyncObj drops everything behind previous_index before it appends.
    assert result[:plan.match_index] == theirs[:plan.match_index]
    assert result[:len(ours)] == ours or plan.truncates
    assert plan.commit_index <= plan.match_index


@pytest.mark.parametrize(("match", "durable", "expected"), [
    (7, 9, 7), (9, 7, 7), (0, 5, 0), (5, 5, 5)])
def test_acknowledged_index_waits_for_the_disk(match, durable, expected):
    assert rules.acknowledged_index(match, durable) == expected


TERMS = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
COMMITS = [
    ("three nodes, one follower has it", 3, 5, 6, [5, 2], True, 2, 5),
    ("the leader's own disk is behind", 3, 5, 4, [5, 2], True, 2, 4),
    ("never above the leader's own disk", 3, 5, 4, [5, 5], True, 2, 4),
    ("nobody has it", 3, 5, 6, [3, 3], True, 2, 3),
    ("an entry of an earlier term is not counted", 1, 3, 6, [3, 3], True, 2, 1),
    ("single node waits for its disk", 3, 6, 4, [], True, 2, 4),
    ("four voters need three", 3, 6, 6, [6, 4, 4], True, 2, 4),
    ("five voters need three", 3, 6, 6, [6, 5, 2, 2], True, 2, 5),
    ("a leader that leaves does not count itself", 3, 6, 6, [6, 4], False, 2, 4),
    ("nothing new is proposed", 5, 5, 6, [6, 6], True, 2, 5),
]


@pytest.mark.parametrize(
    ("previous", "last_index", "durable", "matches", "votes", "term", "expected"),
    [case[1:] for case in COMMITS], ids=[case[0] for case in COMMITS])
def test_commit(previous, last_index, durable, matches, votes, term, expected):
    assert rules.committed_index(previous, last_index, durable, matches, votes, TERMS.__getitem__,
                                 term) == expected


@pytest.mark.parametrize(("matches", "expected"), [
    pytest.param([8, 8], True, id="both others are ahead"),
    pytest.param([8, 7], False, id="one is no majority of three"),
    pytest.param([8, 8, 7, 7], False, id="nor are two of five"),
    pytest.param([8, 8, 9, 7], True, id="three of five"),
    pytest.param([8], False, id="one of two"),
    pytest.param([], False, id="alone"),
])
def test_who_holds_the_others_up(matches, expected):
    assert rules.is_held_up(7, matches) is expected


@pytest.mark.parametrize(("matches", "expected"), [
    pytest.param([7, 5], True, id="one has the whole log"),
    pytest.param([6, 6], False, id="neither has its last entry"),
    pytest.param([], False, id="nobody answers"),
])
def test_who_could_lead_in_its_place(matches, expected):
    assert rules.has_successor(7, matches) is expected


@pytest.mark.parametrize(("waiting", "leads", "awaited", "later"), [
    pytest.param(1, False, False, True, id="a follower collects"),
    pytest.param(8, False, False, True, id="up to the limit"),
    pytest.param(9, False, False, False, id="not more"),
    pytest.param(1, False, True, False, id="not while a read here waits"),
    pytest.param(1, True, False, False, id="a leader's clients wait"),
])
def test_what_may_be_applied_later(waiting, leads, awaited, later):
    assert rules.may_apply_later(waiting, leads=leads, awaited=awaited, most_entries=8) is later


@pytest.mark.parametrize(("before", "after", "match", "accepted", "expected"), [
    (9, 6, 5, True, 9), (6, 9, 8, True, 9), (9, 4, 5, False, 6), (9, 7, 5, False, 7)])
def test_next_index_is_not_rewound_by_an_acknowledgement(before, after, match, accepted, expected):
    assert rules.next_index_after_ack(before, after, match, accepted=accepted) == expected


US = Standing(term=5, last_index=10, last_term=4, leads_with_quorum=False, heard_from_leader=False)
PRE_VOTES = [
    ("fine", 6, 10, 4, {}, True),
    ("longer log", 6, 11, 4, {}, True),
    ("later last term, shorter log", 6, 2, 5, {}, True),
    ("shorter log", 6, 9, 4, {}, False),
    ("earlier last term, longer log", 6, 99, 3, {}, False),
    ("term not above ours", 5, 10, 4, {}, False),
    ("we hear a leader", 6, 10, 4, {"heard_from_leader": True}, False),
    ("we lead", 6, 10, 4, {"leads_with_quorum": True}, False),
]


@pytest.mark.parametrize(("term", "index", "last_term", "changes", "expected"),
                         [case[1:] for case in PRE_VOTES], ids=[case[0] for case in PRE_VOTES])
def test_pre_vote(term, index, last_term, changes, expected):
    assert rules.grants_pre_vote(term, index, last_term, US._replace(**changes)) is expected


@pytest.mark.parametrize(("transfer", "changes", "ignored"), [
    (False, {}, False),
    (False, {"leads_with_quorum": True}, True),
    (False, {"heard_from_leader": True}, True),
    (True, {"leads_with_quorum": True}, False),
    (True, {"heard_from_leader": True}, False)])
def test_live_leader_is_not_deposed(transfer, changes, ignored):
    assert rules.ignores_vote_request(transfer, US._replace(**changes)) is ignored


@pytest.mark.parametrize(("voter", "term", "already", "expected"), [
    ("n2", 5, set(), True), ("n2", 5, {"n3"}, True), ("n2", 5, {"n2"}, False),
    ("n2", 4, set(), False), ("n9", 5, set(), False)])
def test_each_voter_counts_once_in_its_term(voter, term, already, expected):
    assert rules.counts_vote(voter, term, 5, {"n1", "n2", "n3"}, already) is expected


@pytest.mark.parametrize(("count", "voters", "expected"), [
    (1, 1, True), (1, 2, False), (2, 2, True), (1, 3, False), (2, 3, True), (2, 4, False),
    (3, 4, True), (3, 5, True), (0, 0, False)])
def test_majority(count, voters, expected):
    assert rules.has_majority(count, voters) is expected


@pytest.mark.parametrize(("log", "committed", "term", "expected"), [
    pytest.param(LOG, 4, 2, True, id="an entry of the leader's term"),
    pytest.param(LOG, 3, 2, False, id="an entry of an earlier term"),
    pytest.param(LOG, 5, 3, False, id="a leader without an entry"),
    pytest.param(FakeLog(7, 2), 7, 2, True, id="the end of a snapshot"),
    pytest.param(FakeLog(7, 2), 7, 3, False, id="the end of a snapshot, of an earlier term"),
    pytest.param(FakeLog(7, 2, 2), 0, 2, False, id="below the start of the log"),
])
def test_shows_own_commit(log, committed, term, expected):
    assert rules.shows_own_commit(log, committed, term) is expected
