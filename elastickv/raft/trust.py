"""Whether this node may vote and be counted, and the greetings that decide it.

After a start it waits a moment for every voter's greeting, since any of them may remember more of
this node than its own disk does (`peer_memory.py`). A node that joins learns first who they are. A
node found to have lost data is suspect, and durably so, until its log holds everything that was
committed.
"""

from __future__ import annotations

import contextlib

from elastickv.errors import DiskFull
from elastickv.logs import get_logger
from elastickv.raft.core import Core
from elastickv.raft.frames import PROTOCOL_VERSION, Hello, PeerRecord
from elastickv.raft.peer_memory import (
    is_past_boot,
    known_term,
    missing_floor,
    what_was_lost,
)
from elastickv.raft.settings import EngineSettings
from elastickv.raft.storage import RaftStorage

log = get_logger("elastickv.raft.trust")


class Trust:
    """This node's standing in its own eyes."""

    def __init__(self, settings: EngineSettings, storage: RaftStorage, core: Core) -> None:
        self._settings = settings
        self._storage = storage
        self._core = core
        # And what they said of this node was heeded.
        self._greeted = {settings.node_id}
        # What those said who have links and are no members.
        self._strangers: dict[str, Hello] = {}
        # The term of the leader with whom this process has caught up, 0 for none.
        self._caught_up_term = 0
        self._counts_as_newcomer = False
        self._grace_ends: float | None = None
        self._waiting = True
        # What a full disk has kept from being durable: the term and the boot of a suspicion, and
        # the floor.
        self._unwritten_loss: tuple[int, int] | None = None
        self._unwritten_floor = 0, 0

    def started(self, now: float) -> None:
        """The node has begun to listen."""
        self._grace_ends = None
        self.may_vote(now)

    @property
    def suspect(self) -> bool:
        """Whether this node has lost data and not yet caught up."""
        return self._unwritten_loss is not None or self._storage.hard_state.state.suspect

    def may_vote(self, now: float) -> bool:
        """Whether this node may vote and be counted. The first call with known voters starts the
        time for which their greetings are waited for."""
        if self._waiting and (voters := self._core.voters()):
            if self._grace_ends is None:
                self._grace_ends = now + self._settings.greeting_grace_s
            self._waiting = now < self._grace_ends and not self._greeted.issuperset(voters)
        return not self._waiting and not self.suspect

    def hello(self, peer_id: str) -> Hello:
        """The greeting for `peer_id`."""
        state = self._storage.hard_state.state
        return Hello(PROTOCOL_VERSION, "", self._settings.node_id, self._settings.client_address,
                     state.boot_epoch, self._storage.boot_id, state.term, self.suspect,
                     self._storage.memory.of(peer_id))

    def greeted(self, peer_id: str, hello: Hello) -> None:
        """A peer greeted: learn what it remembers of us, remember it if it is a member.

        Raises `DiskFull` when that cannot be made durable; then it has not greeted.
        """
        if self._storage.membership.current.find(peer_id) is not None:
            self._believe(peer_id, hello)
        else:
            self._strangers[peer_id] = hello
            # The configuration of a disk from the past is from then, too. Who has yet to join is
            # told it first.
            if hello.remembered is not None and not self._has_yet_to_join():
                self._heed(peer_id, hello.remembered, boots=False)

    def admit(self, peer_id: str) -> None:
        """It is a member, and may have greeted before it was one. Raises `DiskFull` when what it
        said cannot be made durable; then it has not greeted."""
        hello = self._strangers.get(peer_id)
        if hello is not None:
            self._believe(peer_id, hello)
            del self._strangers[peer_id]

    def _has_yet_to_join(self) -> bool:
        return self._settings.joining and not self._storage.has_joined(self._core.applied_index())

    def _believe(self, peer_id: str, hello: Hello) -> None:
        if hello.remembered is not None:
            self._heed(peer_id, hello.remembered, boots=not self._is_of_the_past(peer_id, hello))
            if is_past_boot(hello.remembered, self._storage.position()):
                self._storage.hard_state.raise_boot(hello.remembered.boot_epoch + 1)
            if peer_id in self._core.voters() and not hello.suspect:
                # What only others have cannot be committed, and no election could reach it.
                self._raise_floor(hello.remembered)
        self._remember(peer_id, hello)
        self._greeted.add(peer_id)

    def _is_of_the_past(self, peer_id: str, hello: Hello) -> bool:
        """Whether a member's disk was put back from an old copy. Then no other one was, and it may
        remember members from before their disks were replaced."""
        known = self._storage.memory.of(peer_id)
        return hello.suspect or (known is not None and known_term(known) > hello.term)

    def _heed(self, peer_id: str, remembered: PeerRecord, *, boots: bool) -> None:
        """Find out what was lost. Without `boots`: a member that was removed knows of the boots of
        members whose disks have been replaced since, and it knows that of all of them at once."""
        own, is_complete = self._storage.position(), self._is_complete(known_term(remembered))
        reason = what_was_lost(remembered, own, boots=boots and not is_complete,
                               entries=not is_complete)
        if reason:
            self._become_suspect(peer_id, reason, remembered.boot_epoch, known_term(remembered))

    def _is_complete(self, term: int) -> bool:
        """Whether this process has held everything that was committed up to `term`: whatever was
        lost of that before, a suspect would be trusted again. A leader that it caught up with may
        have been one of the past, with another in a later term."""
        core = self._core
        leads = core.is_leading() and core.commit_index() >= core.noop_index()
        return term <= max(self._caught_up_term, core.term() if leads else 0)

    def lost_link(self, peer_id: str) -> None:
        """The link with `peer_id` broke. What it said as no member is nothing to its next process:
        a removed one greets until it has stopped, and with an empty disk another joins under its
        name, which has lost nothing."""
        self._strangers.pop(peer_id, None)

    def _remember(self, peer_id: str, hello: Hello) -> None:
        memory = self._storage.memory
        known = memory.of(peer_id)
        if known is None or hello.boot_epoch > known.boot_epoch:
            memory.booted(peer_id, hello.boot_epoch, hello.boot_id,
                          0 if hello.suspect else hello.term)
        elif hello.boot_id != known.boot_id:
            log.error("peer came back with an older disk", peer=peer_id,
                      remembered_boot=known.boot_epoch, boot=hello.boot_epoch)

    def _become_suspect(self, peer_id: str, reason: str, boot_epoch: int, term: int) -> None:
        if self._unwritten_loss is None:
            log.error("this node has lost data: it neither votes nor counts until it has caught "
                      "up with a leader", node=self._settings.node_id, peer=peer_id,
                      reason=reason)
        spent_term, next_boot = self._unwritten_loss or (0, 0)
        self._unwritten_loss = max(term, spent_term), max(boot_epoch + 1, next_boot)
        self._core.follow_nobody()
        self._write_loss()

    def _write_loss(self) -> None:
        if self._unwritten_loss is not None:
            # It may have voted in this term and have forgotten: it must never vote in it again.
            term = max(self._unwritten_loss[0], self._core.term())
            self._storage.hard_state.lost_data(term, self._settings.node_id,
                                               self._unwritten_loss[1])
            self._unwritten_loss = None
            self._core.spend_vote(term)

    def write(self) -> None:
        """Make durable what the disk had no space for. Raises `DiskFull`."""
        self._write_loss()
        self._write_floor()

    def _raise_floor(self, remembered: PeerRecord) -> None:
        missing = missing_floor(remembered, self._storage.position())
        if missing is not None and missing > self._floor():
            log.warning("a peer has entries that this node sent and lost", index=missing[1],
                        term=missing[0], node=self._settings.node_id)
            self._unwritten_floor = missing
            self._write_floor()

    def _write_floor(self) -> None:
        self._storage.hard_state.set_floor(*self._floor())
        self._unwritten_floor = 0, 0

    def _floor(self) -> tuple[int, int]:
        state = self._storage.hard_state.state
        return max((state.floor_term, state.floor_index), self._unwritten_floor)

    def current_floor(self) -> tuple[int, int]:
        """(term, index) that a log must reach to be elected with this node's help. One that this
        node's own log has reached is forgotten, durably: may raise `DiskFull`."""
        floor = self._floor()
        if floor != (0, 0):
            position = self._storage.position()
            if (position.last_term, position.last_index) >= floor:
                self._unwritten_floor = 0, 0
                self._storage.hard_state.set_floor(0, 0)
                return 0, 0
        return floor

    def caught_up(self) -> None:
        """The durable log holds everything that any leader had committed up to this term."""
        self._caught_up_term = self._core.term()
        if self._storage.hard_state.state.suspect:
            log.warning("this node has caught up and counts again",
                        node=self._settings.node_id)
            self._storage.hard_state.regained_data()
        if self._settings.joining and not self._counts_as_newcomer:
            # Another acknowledgement will do: whoever is full still confirms reads.
            with contextlib.suppress(DiskFull):
                self._storage.count_boots_as_newcomer(self._core.commit_index())
                self._counts_as_newcomer = True
