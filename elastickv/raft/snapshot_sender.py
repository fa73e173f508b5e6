"""Snapshots, the leader's side: it streams its state to a follower that is behind the log's start.

There is no snapshot file: the state machine's store is the snapshot, and a consistent read of it is
what travels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from elastickv.errors import DiskFull, Overloaded
from elastickv.logs import get_logger
from elastickv.raft import frames
from elastickv.raft.core import Context
from elastickv.raft.engine import SnapshotExport, SnapshotSource
from elastickv.raft.membership import encode_members
from elastickv.raft.offload import Offload

log = get_logger("elastickv.raft.snapshots")

STALLED_S = 10.0
"""A stream of which nothing was acknowledged for so long is begun anew."""
REFUSED_S = 1.0
"""A peer that refused a stream is offered the next one after so long."""
CATCH_UP_S = 30.0
"""How long a peer that has installed a snapshot, or may have, has for the entries that came
meanwhile."""


class _Stream:
    """One snapshot on its way to one peer."""

    def __init__(self, number: int, term: int, export: SnapshotExport, now: float) -> None:
        self.number = number
        self.term = term
        self.export = export
        self.sent = 0
        self.acked = 0
        self.finished = False
        self.is_reading_ahead = False
        self.progress_at = now


class SnapshotSender:
    """The leader's side: at most one stream per peer, a few chunks under way."""

    def __init__(self, context: Context, source: SnapshotSource | None,
                 installed: Callable[[str, int], None], *, read_ahead: Offload,
                 fail: Callable[[BaseException], None]) -> None:
        """`installed(peer_id, index)` is called when a peer's log begins behind `index`.
        `read_ahead` does what an export has to have done before it is read. `fail` stops the node.
        """
        self._context = context
        self._source = source
        self._installed = installed
        self._read_ahead = read_ahead
        self._fail = fail
        self._streams: dict[str, _Stream] = {}
        self._refused_at: dict[str, float] = {}
        self._installed_at: dict[str, tuple[int, float]] = {}
        self._paused_until = float("-inf")
        self._last_number = 0
        self.sent_bytes = 0

    def begin(self, peer_id: str) -> None:
        """The peer needs a snapshot; does nothing while one is on its way."""
        context = self._context
        stream = self._streams.get(peer_id)
        if stream is not None and not self._is_stalled(stream):
            return
        self.cancel(peer_id)
        if self._source is None or context.now() < self._paused_until \
                or context.now() - self._refused_at.get(peer_id, -REFUSED_S) < REFUSED_S:
            return
        try:
            export = self._source.open_export()
        except DiskFull as error:
            self.pause(error)
            return
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

    def _is_stalled(self, stream: _Stream) -> bool:
        """The peer is not to blame for what this node's disk takes."""
        return not stream.is_reading_ahead \
            and self._context.now() - stream.progress_at >= STALLED_S

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
        elif message.offset == frames.REFUSED_OFFSET:
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
                      if not self._is_stalled(stream)),
                    *(index for index, _ in self._installed_at.values())), default=None)

    def _fill(self, peer_id: str, stream: _Stream) -> None:
        """Send what there is room for; go on later where a thread has to read ahead first."""
        settings = self._context.settings
        window = settings.snapshot_chunk_bytes * settings.snapshot_window_chunks
        while self._streams.get(peer_id) is stream and not stream.is_reading_ahead \
                and not stream.finished and stream.sent - stream.acked < window:
            work = stream.export.read_ahead(settings.snapshot_chunk_bytes)
            if work is None:
                self._send_chunk(peer_id, stream)
            else:
                stream.is_reading_ahead = True
                self._read_ahead.submit(work, partial(self._has_read_ahead, peer_id, stream))

    def _has_read_ahead(self, peer_id: str, stream: _Stream, _: BaseException | None) -> None:
        stream.is_reading_ahead = False
        if self._streams.get(peer_id) is not stream:
            return
        stream.progress_at = self._context.now()
        try:
            self._send_chunk(peer_id, stream)
            self._fill(peer_id, stream)
        except Exception as error:
            self._fail(error)

    def _send_chunk(self, peer_id: str, stream: _Stream) -> None:
        """Send the next chunk, or end the stream."""
        try:
            data = stream.export.read(self._context.settings.snapshot_chunk_bytes)
        except Overloaded as error:
            log.info("snapshot begins anew", peer=peer_id, reason=str(error))
            self._refused(peer_id, stream)
            return
        except DiskFull as error:
            self.pause(error)
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

    def pause(self, error: DiskFull) -> None:
        """This node's disk is full: end every stream, and begin none for `full_disk_pause_s`. A
        stream keeps the store from using its old pages again, and the log from being dropped."""
        self._paused_until = self._context.now() + self._context.settings.full_disk_pause_s
        for peer_id in list(self._streams):
            log.warning("snapshot ends", peer=peer_id, reason=str(error))
            self.cancel(peer_id)

    def cancel_all(self) -> None:
        """This node does not lead any more, or stops."""
        for peer_id in list(self._streams):
            self.cancel(peer_id)
