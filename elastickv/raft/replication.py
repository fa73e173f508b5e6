"""The leader's sending side: what goes to which peer, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from elastickv.raft import records
from elastickv.raft.frames import AppendEntries, encode_message
from elastickv.raft.journal import Journal
from elastickv.raft.progress import PeerProgress
from elastickv.raft.settings import EngineSettings


class LeaderView(Protocol):
    """What replication reads and moves of the leader's state."""

    def term(self) -> int: ...

    def commit_index(self) -> int: ...

    def next_index(self, peer_id: str) -> int: ...

    def set_next_index(self, peer_id: str, index: int) -> None: ...


class Replication:
    """Sends entries and heartbeats. A batch is encoded once for all peers that are equally far."""

    def __init__(self, settings: EngineSettings, journal: Journal, leader: LeaderView,
                 send: Callable[[str, bytes], bool],
                 needs_snapshot: Callable[[str], None]) -> None:
        self._settings = settings
        self._journal = journal
        self._leader = leader
        self._send = send
        self._needs_snapshot = needs_snapshot
        self._peers: dict[str, PeerProgress] = {}
        self._sequence = 0
        self._encoded: tuple[tuple[int, int, int, int], bytes, int] | None = None

    def progress(self, peer_id: str) -> PeerProgress:
        """The progress of `peer_id`."""
        found = self._peers.get(peer_id)
        if found is None:
            found = self._peers[peer_id] = PeerProgress()
            found.restart(self._sequence)
        return found

    def restart(self, peer_id: str) -> None:
        """Where the logs meet must be found again."""
        self.progress(peer_id).restart(self._sequence)

    def lead(self) -> None:
        """A new leadership: nothing is known of anybody."""
        self._peers.clear()
        self._encoded = None

    def forget(self, peer_id: str) -> None:
        """The peer is no member any more."""
        self._peers.pop(peer_id, None)

    def replicate(self, peer_ids: Iterable[str], *, heartbeat: bool) -> None:
        """Send what each peer lacks; with `heartbeat`, at least an empty message."""
        for peer_id in peer_ids:
            self._replicate_to(peer_id, heartbeat)

    def _replicate_to(self, peer_id: str, heartbeat: bool) -> None:
        progress = self.progress(peer_id)
        next_index = self._leader.next_index(peer_id)
        if next_index <= self._journal.anchor_index:
            self._needs_snapshot(peer_id)
            if heartbeat:
                self._send_append(peer_id, progress, self._journal.anchor_index + 1, empty=True)
            return
        sent = False
        while next_index <= self._journal.last_index \
                and progress.may_send(self._settings.window_bytes):
            last_index = self._send_append(peer_id, progress, next_index, empty=False)
            if last_index == 0:
                return
            sent = True
            if progress.probing:
                break
            next_index = last_index + 1
            self._leader.set_next_index(peer_id, next_index)
        if not sent and (heartbeat or (progress.sent_commit < self._leader.commit_index()
                                       and not progress.probing)):
            self._send_append(peer_id, progress, next_index, empty=True)

    def _send_append(self, peer_id: str, progress: PeerProgress, next_index: int, *,
                     empty: bool) -> int:
        """Send one message; the last index it carries (0 when it could not be queued)."""
        last_index = next_index - 1 if empty else self._journal.last_index
        body, carried = self._encode(next_index, last_index)
        if not self._send(peer_id, body):
            return 0
        progress.sent_commit = self._leader.commit_index()
        if carried >= next_index:
            progress.sent(carried, len(body))
        return carried

    def _encode(self, first: int, last: int) -> tuple[bytes, int]:
        """The message with entries `first..last`, as many as fit a batch, and the last it holds."""
        key = (first, last, self._leader.term(), self._leader.commit_index())
        if self._encoded is not None and self._encoded[0] == key:
            return self._encoded[1], self._encoded[2]
        carried = first - 1
        blob = b""
        if first <= last:
            entries = self._journal.entries(first, last, self._settings.batch_bytes)
            parts: list[bytes] = []
            for command, index, term in entries:
                parts.append(records.encode_header(index, term, command, 0))
                parts.append(command)
            blob = b"".join(parts)
            carried = entries[-1][1]
        self._sequence += 1
        body = encode_message(AppendEntries(
            self._leader.term(), self._sequence, self._leader.commit_index(), first - 1,
            self._journal.term_at(first - 1), blob))
        self._encoded = (key, body, carried)
        return body, carried
