"""The configuration: who is a member, and the rules for changing it.

A configuration is a log entry like any other and takes effect when it is **appended**, on every
member alike (Raft, section 6 of the dissertation's single-server changes): each change adds or
removes one voter, so any two majorities of consecutive configurations overlap.

The entry's command is `0x02` and then, as msgpack, `[version, [[id, address, suffrage], ...]]`.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Sequence
from dataclasses import dataclass

import msgspec

from elastickv.config import parse_address
from elastickv.errors import (
    ConditionFailed,
    ConfigError,
    InvalidArgument,
    MembershipConflict,
    StartupRefused,
    WireError,
)
from elastickv.raft.engine import Member, Suffrage
from elastickv.raft.rules import has_majority

LOOK_REMEDY = "see elastickv admin raft status for ids and raft addresses"

CONFIGURATION_KIND = b"\x02"
FORMAT_VERSION = 1


class _StoredMember(msgspec.Struct, array_like=True, frozen=True):
    node_id: str
    address: str
    suffrage: Suffrage


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    version: int
    members: list[_StoredMember]


def encode_members(members: Sequence[Member]) -> bytes:
    """The body of a configuration."""
    return msgspec.msgpack.encode(_Stored(FORMAT_VERSION, [
        _StoredMember(member.node_id, member.address, member.suffrage) for member in members]))


def decode_members(body: bytes) -> tuple[Member, ...]:
    """The members in a configuration's body. Raises `WireError`."""
    try:
        stored = msgspec.msgpack.decode(body, type=_Stored)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise WireError("a configuration does not parse") from None
    if stored.version != FORMAT_VERSION:
        raise WireError(f"a configuration has version {stored.version}")
    return tuple(Member(m.node_id, m.address, m.suffrage) for m in stored.members)


@dataclass(frozen=True, slots=True)
class Configuration:
    """The members as of the log entry `index`; 0 = the configuration that the node began with."""

    index: int
    members: tuple[Member, ...]

    def find(self, node_id: str) -> Member | None:
        """The member with this id."""
        for member in self.members:
            if member.node_id == node_id:
                return member
        return None

    def ids(self, suffrage: Suffrage) -> list[str]:
        """Sorted ids of the members with `suffrage`."""
        return sorted(m.node_id for m in self.members if m.suffrage is suffrage)


class RaftAddressChanged(StartupRefused):
    """The members reach this node at another address than its --raftAddress. Only a node that is
    added anew gets another one."""

    guard = "raft-address"


def require_own_address(configuration: Configuration, node_id: str, raft_address: str) -> None:
    """Raise `RaftAddressChanged` if the members know this node by another address than its own.

    With one such member the links that it makes itself still work. Two cannot link with each other,
    and without a majority no change of the membership could tell the others.
    """
    member = configuration.find(node_id)
    if member is not None and raft_address and not leads_to(member.address, raft_address):
        raise RaftAddressChanged(
            f"the other members reach {node_id} at {member.address}, and --raftAddress is"
            f" {raft_address}",
            remedy=f"give --raftAddress {member.address} (where it listens is"
                   " --raft-listen-address), or remove this node and join it anew at the new"
                   " address")


def leads_to(stored: str, raft_address: str) -> bool:
    """Whether a member's address is a node's --raftAddress; earlier versions stored any spelling.
    """
    try:
        return str(parse_address(stored, "the raft address")) == raft_address
    except ConfigError:
        return stored == raft_address


class MembershipLog:
    """The configurations that the log holds, above the one that the log begins with."""

    def __init__(self, base: Configuration) -> None:
        self._stack = [base]

    @property
    def base(self) -> Configuration:
        """The configuration that the log begins with."""
        return self._stack[0]

    @property
    def current(self) -> Configuration:
        """The configuration in force: the latest, committed or not."""
        return self._stack[-1]

    def at(self, index: int) -> Configuration:
        """The configuration in force at `index`."""
        return next((c for c in reversed(self._stack) if c.index <= index), self._stack[0])

    def has_held(self, node_id: str, index: int) -> bool:
        """Whether a node is in any of the configurations up to that of `index`."""
        return any(c.find(node_id) is not None for c in self._stack if c.index <= index)

    def appended(self, index: int, command: bytes) -> None:
        """The entry at `index` is a configuration. One that the base already covers is ignored."""
        if index > self.current.index:
            self._stack.append(Configuration(index, decode_members(command[1:])))

    def back_to_base(self) -> None:
        """Forget every change."""
        del self._stack[1:]

    def rebase(self, base: Configuration) -> None:
        """The log begins with `base`."""
        self._stack = [base, *(c for c in self._stack if c.index > base.index)]


class ChangeKind(enum.Enum):
    """What a membership change does."""

    ADD_VOTER = "add-voter"
    ADD_LEARNER = "add-learner"
    PROMOTE = "promote"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class MembershipChange:
    """One change. `address` is for additions. `previous_index` other than 0 must be the index of
    the configuration in force. `min_applied_index` is for promotions, 0 = the leader's commit index
    at the time of the request; `skip_min_applied_check` promotes whatever the learner has."""

    kind: ChangeKind
    node_id: str
    address: str = ""
    previous_index: int = 0
    min_applied_index: int = 0
    skip_min_applied_check: bool = False


@dataclass(frozen=True, slots=True)
class ChangeContext:
    """What the leader knows when it is asked for a change. `match_index` is the target's."""

    configuration: Configuration
    commit_index: int
    leader_ready: bool
    match_index: int = 0


def plan_change(change: MembershipChange, context: ChangeContext) -> tuple[Member, ...]:
    """The members after `change`.

    Raises `InvalidArgument`, `ConditionFailed`, `MembershipConflict`.
    """
    current = context.configuration
    if not context.leader_ready or current.index > context.commit_index:
        raise MembershipConflict("another membership change is under way",
                                 remedy="retry when it is committed")
    if change.previous_index not in (0, current.index):
        raise ConditionFailed(f"the configuration is that of entry {current.index}, "
                              f"not {change.previous_index}",
                              remedy="read the configuration again")
    if change.kind in (ChangeKind.ADD_VOTER, ChangeKind.ADD_LEARNER):
        return _add(change, current)
    member = current.find(change.node_id)
    if member is None:
        raise InvalidArgument(f"{change.node_id!r} is not a member", remedy=LOOK_REMEDY)
    others = tuple(m for m in current.members if m.node_id != change.node_id)
    if change.kind is ChangeKind.PROMOTE:
        _require_promotable(change, member, context)
        return (*others, Member(member.node_id, member.address, Suffrage.VOTER))
    if member.suffrage is Suffrage.VOTER and len(current.ids(Suffrage.VOTER)) == 1:
        raise MembershipConflict(f"{change.node_id!r} is the only voter",
                                 remedy="add another voter first")
    return others


def _add(change: MembershipChange, current: Configuration) -> tuple[Member, ...]:
    if not change.node_id or not change.address:
        raise InvalidArgument("a new member needs an id and a raft address")
    suffrage = Suffrage.VOTER if change.kind is ChangeKind.ADD_VOTER else Suffrage.LEARNER
    for member in current.members:
        if member.node_id == change.node_id:
            raise InvalidArgument(f"{change.node_id!r} is a member already",
                                  remedy="promote a learner; remove a member to change its address")
        if member.address == change.address:
            raise InvalidArgument(f"{change.address} is the address of {member.node_id!r}",
                                  remedy=LOOK_REMEDY)
    return (*current.members, Member(change.node_id, change.address, suffrage))


def _require_promotable(change: MembershipChange, member: Member, context: ChangeContext) -> None:
    if member.suffrage is Suffrage.VOTER:
        raise InvalidArgument(f"{member.node_id!r} is a voter already",
                              remedy="nothing is left to do")
    required = change.min_applied_index or context.commit_index
    if not change.skip_min_applied_check and context.match_index < required:
        raise MembershipConflict(
            f"{member.node_id!r} has entries up to {context.match_index}, {required} are required",
            remedy="retry when it has caught up")


def require_majority_up(before: Sequence[Member], after: Sequence[Member],
                        answering: Container[str]) -> None:
    """Raise `MembershipConflict` unless a majority of the voters after a change of voters is
    `answering`.

    The change is in force from the moment when it is appended. Without that majority it cannot be
    committed, nor can anything else, nor can another leader be elected that never heard of it.
    """
    voters = sorted(m.node_id for m in after if m.suffrage is Suffrage.VOTER)
    if voters == sorted(m.node_id for m in before if m.suffrage is Suffrage.VOTER):
        return
    silent = [voter for voter in voters if voter not in answering]
    if not has_majority(len(voters) - len(silent), len(voters)):
        names = ", ".join(silent)
        raise MembershipConflict(
            f"the {len(voters)} voters after this change would have no majority without an answer "
            f"from {names}",
            remedy=f"start {names}; if a member is lost for good, remove that one first")
