"""Everything that one member keeps under its raft directory, opened and cross-checked.

    hardstate   term, vote, boot epoch, suspicion      (hardstate.py)
    members     the configuration the log begins with  (configuration_file.py)
    peers       what is remembered of peers            (peer_memory.py)
    install     a snapshot is being installed          (install_marker.py)
    log/        the journal                            (journal.py, segment.py)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

from elastickv.durable import Disk
from elastickv.errors import JOIN_ANEW_REMEDY, DiskFull, JournalCorrupt, StartupRefused
from elastickv.raft import configuration_file, peer_memory
from elastickv.raft.configuration_file import ConfigurationFile, follow_log, replay_membership
from elastickv.raft.hardstate import FILE_NAME, HardStateFile
from elastickv.raft.install_marker import MARKER_FILE_NAME, InstallMarker, MarkerFile
from elastickv.raft.journal import FIRST_ANCHOR_INDEX, Journal
from elastickv.raft.membership import Configuration
from elastickv.raft.offload import Offload
from elastickv.raft.peer_memory import PeerMemory, Position
from elastickv.raft.replaced import NOTHING_REPLACED, LogEnd, replaced_tail
from elastickv.raft.rules import holds_entry
from elastickv.raft.settings import EngineSettings

BOOTS_PER_ENTRY = 1 << 20
"""More than a member ever starts."""


class RaftStorage:
    """The files of one member."""

    def __init__(self, settings: EngineSettings, disk: Disk, state_index: int,
                 generator: random.Random, cleanup: Offload,
                 cleanup_failed: Callable[[BaseException], None]) -> None:
        """Open. `state_index` is the state machine's applied index; `cleanup` deletes what the log
        no longer needs, and `cleanup_failed` is told why it could not. Raises `JournalCorrupt`,
        `WireError`, `StartupRefused` or `DiskFull`."""
        self._node_id = settings.node_id
        disk.make_directory(settings.path)
        self.marker = MarkerFile(disk, settings.path / MARKER_FILE_NAME)
        self.hard_state = HardStateFile(disk, settings.path / FILE_NAME)
        owner = self.hard_state.state.node_id
        if owner not in ("", settings.node_id):
            raise StartupRefused(f"{settings.path} belongs to member {owner}, not to "
                                 f"{settings.node_id}", remedy="start that member here")
        self.memory = PeerMemory(disk, settings.path / peer_memory.FILE_NAME)
        self.journal = Journal(disk, settings.path / "log", segment_bytes=settings.segment_bytes,
                               max_command_bytes=settings.max_command_bytes,
                               cache_bytes=settings.cache_bytes, cleanup=cleanup,
                               cleanup_failed=cleanup_failed)
        if not self.hard_state.existed and self.journal.last_index > FIRST_ANCHOR_INDEX:
            raise JournalCorrupt(f"{settings.path} holds a log but no term and vote",
                                 remedy=JOIN_ANEW_REMEDY)
        self._base_file = ConfigurationFile(disk, settings.path / configuration_file.FILE_NAME)
        base = self._base_file.load()
        if base is None:
            base = Configuration(0, () if settings.joining else tuple(settings.members))
            if not settings.joining:
                self._base_file.save(base)
        self.membership = replay_membership(base, self.journal)
        self._finish_install(state_index)
        applied_index = self.applied_index_at_start = max(state_index, FIRST_ANCHOR_INDEX)
        if not self.journal.anchor_index <= applied_index <= self.journal.last_index:
            raise JournalCorrupt(
                f"the state is that of entry {applied_index}, the log in {settings.path} "
                f"holds {self.journal.anchor_index + 1} to {self.journal.last_index}",
                remedy=JOIN_ANEW_REMEDY)
        self.hard_state.begin_boot(settings.node_id)
        if self.hard_state.state.replaced.is_obsolete(self._end(applied_index)):
            self.hard_state.set_replaced(NOTHING_REPLACED)
        self.boot_id = generator.getrandbits(63)

    def position(self) -> Position:
        """What this node has, for comparison with what peers remember."""
        state, end = self.hard_state.state, self._end(self.journal.durable_index)
        return Position(state.boot_epoch, self.boot_id, state.term, end.index, end.term,
                        state.replaced)

    def _end(self, index: int) -> LogEnd:
        return LogEnd(self.journal.term_at(index), index)

    def replacing(self, kept: LogEnd, committed: LogEnd) -> None:
        """The log is about to lose what is behind `kept`, by order of a leader; it is durable and
        committed up to `committed`. Durable on return. Raises `DiskFull`."""
        self.hard_state.set_replaced(replaced_tail(
            self.journal, kept, self.hard_state.state.replaced, committed))

    def truncating(self, kept_index: int, commit_index: int) -> None:
        """As `replacing`, for entries of the log behind `kept_index`."""
        self.replacing(self._end(kept_index),
                       self._end(min(commit_index, self.journal.durable_index)))

    def was_member(self, index: int) -> bool:
        """Whether this node was in the configuration before that of entry `index`."""
        return self.membership.at(index - 1).find(self._node_id) is not None

    def has_joined(self, applied_index: int) -> bool:
        """Whether this node is or was a member. Until then it gets entries as well, those before
        the one that makes it one, and may be restarted between them."""
        return self.hard_state.state.joined \
            or self.membership.has_held(self._node_id, applied_index)

    def remember_joining(self, applied_index: int) -> None:
        """Remember durably that this node is a member, before the log forgets it. Raises
        `DiskFull`."""
        if self.has_joined(applied_index):
            self.hard_state.set_joined()

    def count_boots_as_newcomer(self, commit_index: int) -> None:
        """A node that joins and has caught up counts its boots on from where those of no former
        member of its name can have come to: that one was removed in an entry up to `commit_index`.
        So who remembers the former one misses no boot of this one. Durable on return. Raises
        `DiskFull`."""
        self.hard_state.raise_boot(commit_index * BOOTS_PER_ENTRY)

    def adopt(self, base: Configuration) -> None:
        """Let the history of the membership start at `base`, durably."""
        self._base_file.save(base)
        self.membership.rebase(base)

    def compact_to(self, index: int) -> None:
        """Drop whole segments up to `index`, which the state machine has made durable."""
        base = self.membership.at(index)
        if base.index > self.membership.base.index:
            self.remember_joining(index)
            self.adopt(base)
        self.journal.compact_to(index)

    def install(self, marker: InstallMarker) -> None:
        """The state is that of `marker`: let the log follow, and forget the marker."""
        if not holds_entry(self.journal, marker.index, marker.term):
            end = LogEnd(marker.term, marker.index)
            self.replacing(end, end)
            self.journal.reset(marker.index, marker.term)
            # With every entry go the configurations: those below the snapshot may be entries that
            # a deposed leader never committed.
            follow_log(self.membership, self.journal)
        base = marker.configuration()
        if base.index >= self.membership.base.index:
            # Not below what a node that joins was told.
            self.adopt(base)
        self.marker.remove()

    def _finish_install(self, state_index: int) -> None:
        """An installation was cut short: complete it if the state was replaced already."""
        marker = self.marker.load()
        if marker is None:
            return
        if state_index >= marker.index:
            self.install(marker)
        else:
            self.marker.remove()

    def close(self, *, sync: bool) -> None:
        """Close the journal; with `sync`, make everything durable first, but for what is remembered
        of peers where there is no space: a crash may lose the last of that as well."""
        try:
            if sync:
                with contextlib.suppress(DiskFull):
                    self.memory.flush()
                if self.journal.needs_sync:
                    self.journal.sync()
        finally:
            self.journal.close()
