"""The decisions that make the log safe, as pure functions.

Each closes one hazard of the underlying library; `docs/internals/engine.md` lists which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from elastickv.errors import ElasticKVError
from elastickv.raft.records import Record


class LogDiverged(ElasticKVError):
    """A leader's message would replace a committed entry: some replica broke its promises."""


class LogView(Protocol):
    """What the rules need to know of a log."""

    anchor_index: int
    last_index: int

    def term_at(self, index: int) -> int:
        """The term of an entry; `IndexError` outside the log."""
        ...

    def first_index_of_term(self, index: int) -> int:
        """Where the run of entries with the term of `index` begins."""
        ...


class AppendPlan(NamedTuple):
    """What to do with an `append_entries` message.

    Accepted: entries up to `match_index` equal the leader's once `entries` are appended behind
    `previous_index`. Only when `truncates` is there anything behind it to drop. Rejected: the
    leader must continue from `next_index`.
    """

    accepted: bool
    previous_index: int = 0
    previous_term: int = 0
    entries: Sequence[Record] = ()
    match_index: int = 0
    commit_index: int = 0
    truncates: bool = False
    next_index: int = 0


def plan_append(log: LogView, committed: int, previous_index: int, previous_term: int,
                entries: Sequence[Record], leader_commit: int) -> AppendPlan:
    """Trim what the log already has, so that only a real conflict truncates.

    Raises `LogDiverged` when the conflict is at or below `committed`.
    """
    if previous_index > log.last_index:
        return AppendPlan(accepted=False, next_index=log.last_index + 1)
    last_sent = previous_index + len(entries)
    if previous_index < log.anchor_index:
        # Everything up to the anchor is committed, so it equals what any leader has.
        entries = entries[log.anchor_index - previous_index:]
        previous_index, previous_term = log.anchor_index, log.term_at(log.anchor_index)
        last_sent = max(last_sent, log.anchor_index)
    if log.term_at(previous_index) != previous_term:
        _require_uncommitted(previous_index, committed)
        first_of_term = log.first_index_of_term(previous_index)
        return AppendPlan(accepted=False, next_index=max(first_of_term, committed + 1))
    common = previous_index
    for record in entries:
        if record.index > log.last_index or log.term_at(record.index) != record.term:
            break
        common = record.index
    fresh = entries[common - previous_index:]
    truncates = bool(fresh) and common < log.last_index
    if truncates:
        _require_uncommitted(common + 1, committed)
    elif not fresh:
        # Nothing to append: stand at the end of the log, where there is nothing to truncate.
        common = log.last_index
    return AppendPlan(accepted=True, previous_index=common, previous_term=log.term_at(common),
                      entries=fresh, match_index=last_sent,
                      commit_index=min(leader_commit, last_sent), truncates=truncates)


def holds_entry(log: LogView, index: int, term: int) -> bool:
    """Whether the log holds this very entry, and with it (log matching) everything before it."""
    return log.anchor_index <= index <= log.last_index and log.term_at(index) == term


def shows_own_commit(log: LogView, committed: int, term: int) -> bool:
    """Whether a log that equals that of the leader of `term` up to `committed`, which the leader
    has committed, shows that it has committed an entry of its own term. Before that it may not know
    of everything that was committed under earlier leaders (Raft, section 5.4.2)."""
    return committed >= log.anchor_index and log.term_at(committed) == term


def _require_uncommitted(index: int, committed: int) -> None:
    if index <= committed:
        raise LogDiverged(f"the leader's log differs at entry {index}, which is committed here "
                          f"(up to {committed})",
                          remedy="stop the cluster and compare the members' disks: one of them "
                                 "lost acknowledged data")


def acknowledged_index(match_index: int, durable_index: int) -> int:
    """The highest index that a follower may acknowledge: never above what survives a power cut."""
    return min(match_index, durable_index)


def committed_index(previous: int, last_index: int, durable_index: int, matches: Iterable[int],
                    leader_votes: bool, term_at: Callable[[int], int], current_term: int) -> int:
    """The leader's commit index.

    `last_index` is that of its log; `matches` are the other voters' acknowledged indexes. The
    leader counts up to its own `durable_index`, or not at all when it is being removed (not
    `leader_votes`), and only an entry of its own term commits by counting (Raft, section 5.4.2). It
    never commits above its own `durable_index`: followers conclude from its commit index what its
    disk must hold.
    """
    if last_index <= previous:
        return previous
    acknowledged = sorted((*matches, durable_index) if leader_votes else matches, reverse=True)
    limit = min(last_index, durable_index, acknowledged[len(acknowledged) // 2])
    if limit <= previous or term_at(limit) != current_term:
        return previous
    return limit


def is_held_up(durable_index: int, matches: Iterable[int]) -> bool:
    """Whether the other voters could commit more than this leader's disk lets it: a majority of
    all voters, it included, has acknowledged what is above its own `durable_index`."""
    acknowledged = list(matches)
    ahead = sum(match > durable_index for match in acknowledged)
    return has_majority(ahead, len(acknowledged) + 1)


def has_successor(last_index: int, matches: Iterable[int]) -> bool:
    """Whether one of the other voters, who acknowledged `matches`, can be elected by whoever would
    elect this leader: it has the whole log, up to `last_index`."""
    return any(match >= last_index for match in matches)


def may_apply_later(waiting_entries: int, *, leads: bool, awaited: bool,
                    most_entries: int) -> bool:
    """Whether committed entries may wait here for the next tick, to be applied several at once.

    Only a follower's: clients wait for the leader to apply. `awaited` says that a read here waits
    for an index as well.
    """
    return not leads and not awaited and waiting_entries <= most_entries


def next_index_after_ack(before: int, after: int, match_index: int, *, accepted: bool) -> int:
    """Where to send from next.

    The library rewinds it to what was just acknowledged although later entries are under way, and
    a late rejection may point below what has been acknowledged since.
    """
    return max(before, after) if accepted else max(after, match_index + 1)


class Standing(NamedTuple):
    """A node's view when somebody asks for its vote."""

    term: int
    last_index: int
    last_term: int
    leads_with_quorum: bool
    heard_from_leader: bool


def log_is_current(last_index: int, last_term: int, standing: Standing) -> bool:
    """Whether a candidate's log is at least as complete as ours (Raft, section 5.4.1)."""
    return (last_term, last_index) >= (standing.last_term, standing.last_index)


def grants_pre_vote(term: int, last_index: int, last_term: int, standing: Standing) -> bool:
    """Whether we would vote in `term`: there is no live leader and the log is complete."""
    return (term > standing.term
            and not standing.leads_with_quorum
            and not standing.heard_from_leader
            and log_is_current(last_index, last_term, standing))


def ignores_vote_request(transfer: bool, standing: Standing) -> bool:
    """A live leader is not deposed by a request, unless it asked for the election itself."""
    return not transfer and (standing.leads_with_quorum or standing.heard_from_leader)


def counts_vote(voter: str, term: int, current_term: int, voters: set[str],
                already: set[str]) -> bool:
    """Whether a received vote counts: right term, a voting member, and its first answer."""
    return term == current_term and voter in voters and voter not in already


def has_majority(count: int, voters: int) -> bool:
    """Whether `count` of `voters` is a majority."""
    return count > voters // 2
