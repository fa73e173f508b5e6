"""One node's part in the cluster: following the configuration, joining, leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec

from elastickv.errors import DiskFull, NoLeader, PeerError, RemovedFromCluster, WireError
from elastickv.raft import frames
from elastickv.raft.calls import PeerCalls
from elastickv.raft.configuration_file import pack_configuration, unpack_configuration
from elastickv.raft.core import Context
from elastickv.raft.engine import Suffrage
from elastickv.raft.membership import Configuration
from elastickv.raft.storage import RaftStorage
from elastickv.raft.transfer import Transfer
from elastickv.raft.trust import Trust

CONFIGURATION_METHOD = "raft.configuration"


class Members:
    """Applies the configuration in force to the core and the links."""

    def __init__(self, context: Context, storage: RaftStorage, trust: Trust, calls: PeerCalls,
                 transfer: Transfer, set_peers: Callable[[Mapping[str, str]], None],
                 note_full_disk: Callable[[DiskFull], None],
                 halt: Callable[[BaseException], None]) -> None:
        """`set_peers` says whom to link with; `halt` stops this node."""
        self._context = context
        self._storage = storage
        self._trust = trust
        self._calls = calls
        self._transfer = transfer
        self._set_peers = set_peers
        self._note_full_disk = note_full_disk
        self._halt = halt
        self._asking: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._told_by = "", 0
        self._guests: dict[str, str] = {}
        calls.handle(CONFIGURATION_METHOD, self._tell)

    def is_member(self) -> bool:
        """Whether this node is in the configuration in force."""
        return self._context.configuration.find(self._context.node_id) is not None

    def changed(self) -> None:
        """The configuration in force is another one."""
        context, configuration = self._context, self._context.configuration
        context.core.set_members(configuration.ids(Suffrage.VOTER),
                                 configuration.ids(Suffrage.LEARNER))
        for member in configuration.members:
            if member.node_id in context.connected:
                context.core.connected(member.node_id)
                self._admit(member.node_id)
        members = configuration.members if self.is_member() \
            else (*context.settings.members, *configuration.members)
        self._set_peers({**self._guests, **{m.node_id: m.address for m in members
                                            if m.node_id != context.node_id}})

    def _admit(self, peer_id: str) -> None:
        try:
            self._trust.admit(peer_id)
        except DiskFull as error:
            # It has to greet again, on another link.
            self._note_full_disk(error)
            self._context.drop(peer_id)
        except OSError as error:
            # A failed fsync is never retried.
            self._halt(error)

    def introduce(self, addresses: Mapping[str, str]) -> None:
        """See `RaftEngine.introduce`."""
        self._guests = dict(addresses)
        self.changed()

    def committed(self, index: int) -> None:
        """The configuration of entry `index` is committed: those who left hear of it."""
        context = self._context
        configuration = self._storage.membership.at(index)
        for peer_id in list(context.connected):
            if configuration.find(peer_id) is None:
                context.send(peer_id, frames.Removed(index))
        self.forget_others(index)
        if index == context.configuration.index and self._storage.was_member(index) \
                and not self.is_member():
            self._leave(index)

    def forget_others(self, index: int) -> None:
        """Entry `index` is committed: who is no member by then is forgotten, also one that is down.
        One that was added again since is remembered. Durable on return unless the disk is full: a
        crash could bring back the memory of somebody who has been added again by then."""
        memory, current = self._storage.memory, self._context.configuration
        configuration = self._storage.membership.at(index)
        others = [peer_id for peer_id in memory.peers()
                  if configuration.find(peer_id) is None and current.find(peer_id) is None]
        for peer_id in others:
            memory.forget(peer_id)
        try:
            if others:
                memory.flush()
        except DiskFull as error:
            self._note_full_disk(error)
        except OSError as error:
            # A failed fsync is never retried.
            self._halt(error)

    def _leave(self, index: int) -> None:
        """This node is no member any more. A leader passes the leadership on first."""
        context = self._context
        target = self._transfer.best_target() if context.core.is_leading() else ""
        if target:
            self._transfer.ask(target)
        error = RemovedFromCluster(
            f"entry {index} removed member {context.node_id} from the cluster",
            remedy="it may join again with an empty data directory")
        error.index = index
        self._halt(error)

    def on_removed(self, peer_id: str, message: frames.Removed) -> None:
        """A peer says that this node is no member; believed when it knows a later configuration.
        Who has not become one yet asks again and goes on waiting, whatever it was before under the
        same name."""
        if self.is_member() and message.index > self._context.configuration.index:
            if self._storage.has_joined(self._context.core.applied_index()):
                self._leave(message.index)
            else:
                self.ask()

    def tell_stranger(self, peer_id: str) -> None:
        """Whoever is no member may not know that it was removed."""
        configuration = self._context.configuration
        if configuration.find(peer_id) is None \
                and 0 < configuration.index <= self._context.core.commit_index():
            self._context.send(peer_id, frames.Removed(configuration.index))

    # --- joining ------------------------------------------------------------------------------

    @property
    def _joins(self) -> bool:
        """Whether this node was started to join and has not become a member yet."""
        return self._context.settings.joining and not self._storage.hard_state.state.joined

    def met(self) -> None:
        """A peer has greeted. With all whom this node was told of, it need not wait to ask."""
        if self._joins and not self._context.configuration.members and all(
                member.node_id in self._context.connected
                for member in self._context.settings.members):
            self.ask()

    def ask(self) -> None:
        """While joining: ask everybody within reach for the configuration. The latest answer
        counts: a member that is behind may know this node from before."""
        if self._joins:
            for peer_id in sorted(self._context.connected):
                self._ask(peer_id)

    def may_follow(self, leader_id: str, term: int) -> bool:
        """Whether entries of a leader may be taken now. Not before it has told the configuration,
        and that is stored: what this node was before, under the same name, is in that log as well,
        and over."""
        if not self._joins or self._told_by == (leader_id, term):
            return True
        self._ask(leader_id, term)
        return False

    def _ask(self, peer_id: str, term: int = 0) -> None:
        asking = self._asking.get((peer_id, term))
        if asking is None or asking.done():
            self._asking[peer_id, term] = asyncio.get_running_loop().create_task(
                self._learn(peer_id, term))

    async def _learn(self, peer_id: str, term: int) -> None:
        """Ask `peer_id`, as the leader of `term` unless that is 0."""
        try:
            configuration = unpack_configuration(await self._calls.call(
                peer_id, CONFIGURATION_METHOD, b"",
                timeout_s=self._context.settings.election_max_s))
        except (PeerError, WireError, msgspec.MsgspecError):
            return
        known = self._context.configuration
        # One that joins itself knows none.
        if self._joins and configuration.members \
                and (not known.members or configuration.index > known.index) \
                and not self._adopt(configuration):
            return
        if term:
            self._told_by = peer_id, term

    def _adopt(self, configuration: Configuration) -> bool:
        """Whether it is in force now, durably."""
        try:
            self._storage.adopt(configuration)
        except DiskFull as error:
            self._note_full_disk(error)
        except OSError as error:
            # A failed fsync is never retried.
            self._halt(error)
        else:
            self.changed()
            return True
        return False

    async def _tell(self, peer_id: str, method: str, payload: bytes) -> bytes:
        """The committed configuration, for a node that joins. A new leader does not know what is
        committed before an entry of its own term is; it is asked again. A voter hears what there
        is, since that entry may not be committed without it."""
        core = self._context.core
        if core.is_leading() and core.commit_index() < core.noop_index() \
                and peer_id not in core.voters():
            raise NoLeader(f"member {self._context.node_id} has only just been elected",
                           remedy="ask again")
        return pack_configuration(self._storage.membership.at(core.commit_index()))

    def close(self) -> None:
        """Ask no more."""
        for asking in self._asking.values():
            asking.cancel()
