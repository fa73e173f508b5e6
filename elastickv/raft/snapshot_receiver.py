"""Snapshots, the follower's side: receiving the state from its leader, and installing it.

These steps, in this order, survive a crash between any two:

1. chunks go where a half-received stream is never opened (`SnapshotImport`);
2. a durable marker names the log position and the configuration of the snapshot;
3. the import is finished: the state is the snapshot's, atomically;
4. the log begins anew behind the snapshot, with its configuration as the base;
5. the marker is removed.

A start that finds the marker repeats step 4 when step 3 had happened, and forgets it otherwise.
A disk that is full at step 4 leaves state and log in disagreement: the node takes no part until
the step has succeeded.

A snapshot of what the log holds anyway is not installed: entries behind it may be acknowledged, and
would be lost with the log (Raft, section 7). They may arrive while it is on its way.
"""

from __future__ import annotations

from collections.abc import Callable

from elastickv.errors import (
    JOIN_ANEW_REMEDY,
    CorruptionError,
    DiskFull,
    ElasticKVError,
    StoreCorrupt,
)
from elastickv.logs import get_logger
from elastickv.raft import frames, rules
from elastickv.raft.core import Context
from elastickv.raft.engine import SnapshotImport, SnapshotSource
from elastickv.raft.install_marker import InstallMarker, MarkerFile

log = get_logger("elastickv.raft.snapshots")

ABANDONED_S = 20.0
"""A stream of which nothing came for so long is dropped: its leader has given it up long ago, and
may begin none for a minute (`EngineSettings.full_disk_pause_s`)."""


class SnapshotReceiver:
    """The follower's side: one stream at a time, from its current leader."""

    def __init__(self, context: Context, source: SnapshotSource | None, marker: MarkerFile,
                 install: Callable[[InstallMarker], None]) -> None:
        """`install` performs steps 4 and 5, and may be called again after `DiskFull`."""
        self._context = context
        self._source = source
        self._marker = marker
        self._install = install
        self._target: SnapshotImport | None = None
        self._pending: InstallMarker | None = None
        self._cut_short: InstallMarker | None = None
        self._leader_id = ""
        self._term = 0
        self._stream = 0
        self._offset = 0
        self._progress_at = 0.0
        self.installed_count = 0
        self.received_bytes = 0

    def on_offer(self, peer_id: str, message: frames.SnapshotOffer) -> None:
        """Raises `WireError` on a configuration that does not parse."""
        core = self._context.core
        if message.term != core.term() or core.term_leader_id() != peer_id:
            self._context.send(peer_id, frames.SnapshotAck(
                message.term, message.stream, frames.REFUSED_OFFSET, False))
            return
        self.abort()
        self._leader_id, self._term = peer_id, message.term
        self._stream, self._offset = message.stream, 0
        if self._is_needless(message.index, message.last_term):
            self._acknowledge(done=True)
            return
        if self._source is None:
            self._offset = frames.REFUSED_OFFSET
            self._acknowledge(done=False)
            return
        pending = InstallMarker(message.index, message.last_term, message.members_index,
                                message.members)
        pending.configuration()
        try:
            self._target = self._source.open_import()
        except DiskFull as error:
            self._refuse(error)
            return
        self._pending = pending
        self._progress_at = self._context.now()
        self._acknowledge(done=False)

    def on_chunk(self, peer_id: str, message: frames.SnapshotChunk) -> None:
        """Take the next bytes; anything out of order refuses the stream.

        Raises `DiskFull` from step 4: `is_cut_short` then.
        """
        if self._target is None or peer_id != self._leader_id \
                or message.stream != self._stream or message.term != self._term:
            return
        try:
            if message.offset != self._offset:
                raise CorruptionError(f"chunk {message.offset} follows {self._offset}")
            self._target.write(message.data)
        except (CorruptionError, DiskFull) as error:
            self.abort()
            self._refuse(error)
            return
        self._offset += len(message.data)
        self._progress_at = self._context.now()
        self.received_bytes += len(message.data)
        if message.last:
            self._finish()
        else:
            self._acknowledge(done=False)

    def _finish(self) -> None:
        """Steps 2 to 5. They block the loop, as nothing may be applied or read in between."""
        target, pending = self._target, self._pending
        self._target = self._pending = None
        if target is None or pending is None:
            return
        if self._is_needless(pending.index, pending.term):
            target.abort()
            self._acknowledge(done=True)
            return
        try:
            self._marker.save(pending)
            applied_index = target.finish()
        except (CorruptionError, DiskFull) as error:
            # The import promised that the state is untouched.
            self._marker.remove()
            target.abort()
            self._refuse(error)
            return
        if applied_index != pending.index:
            raise StoreCorrupt(f"a snapshot of entry {pending.index} holds the state of entry "
                               f"{applied_index}",
                               remedy=JOIN_ANEW_REMEDY)
        self._cut_short = pending
        self.resume()
        self._acknowledge(done=True)

    @property
    def is_cut_short(self) -> bool:
        """Whether the state is that of a snapshot, and the log not yet behind it. Until `resume`
        has mended that nothing may be applied, acknowledged, voted or said about the log."""
        return self._cut_short is not None

    def resume(self) -> bool:
        """Steps 4 and 5, again if need be; whether they were to be done. Raises `DiskFull`."""
        if self._cut_short is None:
            return False
        self._install(self._cut_short)
        log.info("snapshot installed", index=self._cut_short.index)
        self._cut_short = None
        self.installed_count += 1
        return True

    def _is_needless(self, index: int, term: int) -> bool:
        return (index <= self._context.core.applied_index()
                or rules.holds_entry(self._context.journal, index, term))

    def _refuse(self, error: ElasticKVError) -> None:
        log.warning("snapshot refused", peer=self._leader_id, error=str(error))
        self._offset = frames.REFUSED_OFFSET
        self._acknowledge(done=False)

    def _acknowledge(self, *, done: bool) -> None:
        self._context.send(self._leader_id, frames.SnapshotAck(self._term, self._stream,
                                                               self._offset, done))

    def follows(self, leader_id: str, term: int) -> None:
        """This node follows `leader_id` in `term`: nothing more of another stream will come."""
        if self._target is not None and (leader_id, term) != (self._leader_id, self._term):
            self.abort()

    def expire(self) -> None:
        """Drop what was received of a stream that has ended in silence."""
        if self._target is not None \
                and self._context.now() - self._progress_at >= ABANDONED_S:
            self.abort()

    def abort(self) -> None:
        """Drop what was received."""
        if self._target is not None:
            self._target.abort()
            self._target = self._pending = None

    def lost_link(self, peer_id: str) -> None:
        """The link with `peer_id` broke."""
        if peer_id == self._leader_id:
            self.abort()
