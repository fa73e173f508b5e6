"""Snapshots: the leader streams its state to a follower that is behind the log's start.

There is no snapshot file: the state machine's store is the snapshot, and a consistent read of it is
what travels. The receiver's steps, in this order, survive a crash between any two:

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
from pathlib import Path

import msgspec

from elastickv.durable import Disk
from elastickv.errors import (
    JOIN_ANEW_REMEDY,
    CorruptionError,
    DiskFull,
    ElasticKVError,
    Overloaded,
    StoreCorrupt,
)
from elastickv.logs import get_logger
from elastickv.raft import frames, rules
from elastickv.raft.core import Context
from elastickv.raft.engine import SnapshotExport, SnapshotImport, SnapshotSource
from elastickv.raft.hardstate import encode_checked, load_checked
from elastickv.raft.membership import Configuration, decode_members, encode_members

log = get_logger("elastickv.raft.snapshots")

MARKER_FILE_NAME = "install"
MARKER_KIND = b"EKIM"
STALLED_S = 10.0
"""A stream of which nothing was acknowledged for so long is begun anew."""
REFUSED_S = 1.0
"""A peer that refused a stream is offered the next one after so long."""
CATCH_UP_S = 30.0
"""How long a peer that has installed a snapshot, or may have, has for the entries that came
meanwhile."""


class InstallMarker(msgspec.Struct, array_like=True, frozen=True):
    """Where the log begins once the import is finished."""

    index: int
    term: int
    members_index: int
    members: bytes

    def configuration(self) -> Configuration:
        """The configuration at the snapshot. Raises `WireError`."""
        return Configuration(self.members_index, decode_members(self.members))


class MarkerFile:
    """The marker of step 2."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path

    def load(self) -> InstallMarker | None:
        """The marker, None when no installation was under way. Raises `JournalCorrupt`."""
        return load_checked(self._disk, self._path, MARKER_KIND, InstallMarker)

    def save(self, marker: InstallMarker) -> None:
        """Durably announce an installation."""
        self._disk.replace(self._path, encode_checked(MARKER_KIND,
                                                      msgspec.msgpack.encode(marker)))

    def remove(self) -> None:
        """The installation is complete, or did not happen."""
        self._disk.remove(self._path)


class _Stream:
    """One snapshot on its way to one peer."""

    def __init__(self, number: int, term: int, export: SnapshotExport, now: float) -> None:
        self.number = number
        self.term = term
        self.export = export
        self.sent = 0
        self.acked = 0
        self.finished = False
        self.progress_at = now


class SnapshotSender:
    """The leader's side: at most one stream per peer, a few chunks under way."""

    def __init__(self, context: Context, source: SnapshotSource | None,
                 installed: Callable[[str, int], None]) -> None:
        """`installed(peer_id, index)` is called when a peer's log begins behind `index`."""
        self._context = context
        self._source = source
        self._installed = installed
        self._streams: dict[str, _Stream] = {}
        self._refused_at: dict[str, float] = {}
        self._installed_at: dict[str, tuple[int, float]] = {}
        self._last_number = 0
        self.sent_bytes = 0

    def begin(self, peer_id: str) -> None:
        """The peer needs a snapshot; does nothing while one is on its way."""
        context = self._context
        stream = self._streams.get(peer_id)
        if stream is not None and context.now() - stream.progress_at < STALLED_S:
            return
        self.cancel(peer_id)
        if self._source is None \
                or context.now() - self._refused_at.get(peer_id, -REFUSED_S) < REFUSED_S:
            return
        export = self._source.open_export()
        index = export.applied_index
        if not context.journal.anchor_index <= index <= context.journal.last_index:
            export.close()
            return
        self._last_number += 1
        stream = _Stream(self._last_number, context.core.term(), export, context.now())
        self._streams[peer_id] = stream
        configuration = context.membership.at(index)
        log.info("snapshot begins", peer=peer_id, index=index)
        context.send(peer_id, frames.SnapshotOffer(
            stream.term, stream.number, index, context.journal.term_at(index),
            configuration.index, encode_members(configuration.members)))

    def on_ack(self, peer_id: str, message: frames.SnapshotAck) -> None:
        """Send more, or finish."""
        stream = self._streams.get(peer_id)
        if stream is None or message.stream != stream.number or message.term != stream.term:
            return
        stream.progress_at = self._context.now()
        if message.done:
            index = self._close(peer_id, stream)
            self._installed_at[peer_id] = index, self._context.now()
            self._installed(peer_id, index)
        elif message.offset < 0:
            self._refused(peer_id, stream)
        else:
            stream.acked = max(stream.acked, message.offset)
            self._fill(peer_id, stream)

    def sent_index(self) -> int | None:
        """The log behind this index is needed by a peer that is being sent the state, or was
        within `CATCH_UP_S`; None when there is no such peer."""
        now = self._context.now()
        self._installed_at = {peer_id: (index, at) for peer_id, (index, at)
                              in self._installed_at.items() if now - at < CATCH_UP_S}
        return min((*(stream.export.applied_index for stream in self._streams.values()
                      if now - stream.progress_at < STALLED_S),
                    *(index for index, _ in self._installed_at.values())), default=None)

    def _fill(self, peer_id: str, stream: _Stream) -> None:
        settings = self._context.settings
        window = settings.snapshot_chunk_bytes * settings.snapshot_window_chunks
        while not stream.finished and stream.sent - stream.acked < window:
            try:
                data = stream.export.read(settings.snapshot_chunk_bytes)
            except Overloaded as error:
                log.info("snapshot begins anew", peer=peer_id, reason=str(error))
                self._refused(peer_id, stream)
                return
            stream.finished = not data
            self._context.send(peer_id, frames.SnapshotChunk(
                stream.term, stream.number, stream.sent, data, stream.finished))
            stream.sent += len(data)
            self.sent_bytes += len(data)

    def _refused(self, peer_id: str, stream: _Stream) -> None:
        self._close(peer_id, stream)
        self._refused_at[peer_id] = self._context.now()

    def cancel(self, peer_id: str) -> None:
        """The link broke, or the peer needs no snapshot any more. What was sent to its end may be
        installed all the same: that may take the peer longer than a silent link lasts."""
        stream = self._streams.get(peer_id)
        if stream is not None:
            index = self._close(peer_id, stream)
            if stream.finished:
                self._installed_at[peer_id] = index, self._context.now()

    def _close(self, peer_id: str, stream: _Stream) -> int:
        """The index of what was sent."""
        index = stream.export.applied_index
        del self._streams[peer_id]
        stream.export.close()
        return index

    def cancel_all(self) -> None:
        """This node does not lead any more, or stops."""
        for peer_id in list(self._streams):
            self.cancel(peer_id)

    @property
    def active(self) -> bool:
        """Whether any stream is under way."""
        return bool(self._streams)


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
        self.installed_count = 0
        self.received_bytes = 0

    def on_offer(self, peer_id: str, message: frames.SnapshotOffer) -> None:
        """Raises `WireError` on a configuration that does not parse."""
        core = self._context.core
        if message.term != core.term() or core.leader_id() != peer_id:
            self._context.send(peer_id, frames.SnapshotAck(message.term, message.stream, -1, False))
            return
        self.abort()
        self._leader_id, self._term = peer_id, message.term
        self._stream, self._offset = message.stream, 0
        if self._is_needless(message.index, message.last_term):
            self._acknowledge(done=True)
            return
        if self._source is None:
            self._offset = -1
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
        self._offset = -1
        self._acknowledge(done=False)

    def _acknowledge(self, *, done: bool) -> None:
        self._context.send(self._leader_id, frames.SnapshotAck(self._term, self._stream,
                                                               self._offset, done))

    def follows(self, leader_id: str, term: int) -> None:
        """This node follows `leader_id` in `term`: nothing more of another stream will come."""
        if self._target is not None and (leader_id, term) != (self._leader_id, self._term):
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
