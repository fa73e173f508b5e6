"""What the owner of an engine knows of its role."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from elastickv.raft.core import CANDIDATE, FOLLOWER, LEADER, Core
from elastickv.raft.engine import Role

RoleCallback = Callable[[Role, int], None]

_ROLES = {FOLLOWER: Role.FOLLOWER, CANDIDATE: Role.CANDIDATE, LEADER: Role.LEADER}


def role_of(core: Core) -> Role:
    """The role as the rest of the node names it."""
    return _ROLES[core.role()]


def may_serve(core: Core) -> bool:
    """Whether this node leads and has applied an entry of its term, and all before it with that."""
    return core.is_leading() and core.applied_index() >= core.noop_index()


class _Announcement(NamedTuple):
    role: Role
    term: int
    leader_id: str


class Roles:
    """Tells the owner of every change of role, term or leader, once."""

    def __init__(self) -> None:
        self._callbacks: list[RoleCallback] = []
        self._announced = _Announcement(Role.UNKNOWN, 0, "")

    def subscribe(self, callback: RoleCallback) -> None:
        """`callback(role, term)` from the next change on."""
        self._callbacks.append(callback)

    def is_announced_leader(self) -> bool:
        """Whether the owner was told last that this node leads."""
        return self._announced.role is Role.LEADER

    def is_due(self, core: Core) -> bool:
        """Whether there is something that the owner was not told."""
        return self._announced != (role_of(core), core.term(), core.leader_id())

    def announce(self, core: Core) -> None:
        """Tell what is due; of a leadership only once it is safe to serve."""
        if may_serve(core) or not core.is_leading():
            self._announce(role_of(core), core)

    def announce_shutdown(self, core: Core) -> None:
        """This node takes part no longer."""
        self._announce(Role.SHUTDOWN, core)

    def _announce(self, role: Role, core: Core) -> None:
        announcement = _Announcement(role, core.term(), core.leader_id())
        if announcement != self._announced:
            self._announced = announcement
            for callback in self._callbacks:
                callback(role, announcement.term)
