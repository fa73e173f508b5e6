"""The leader's sending side: what goes to which peer, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from elastickv.raft import records, rules
from elastickv.raft.core import Context
from elastickv.raft.frames import NO_SEQUENCE, Ack, AppendEntries, encode_message
from elastickv.raft.peer_memory import PeerMemory
from elastickv.raft.progress import PeerProgress


class _Encoded(NamedTuple):
    """The message sent last, for the next peer that needs the same."""

    key: tuple[int, int, int, int]
    sequence: int
    body: bytes
    carried: int


class Replication:
    """Sends entries and heartbeats. A batch is encoded once for all peers that are equally far."""

    def __init__(self, context: Context, needs_snapshot: Callable[[str], None],
                 needs_none: Callable[[str], None], memory: PeerMemory) -> None:
        """`needs_snapshot` is told of a peer that is behind the log's start, `needs_none` of one
        that was and is no more."""
        self._context = context
        self._journal = context.journal
        self._core = context.core
        self._needs_snapshot = needs_snapshot
        self._needs_none = needs_none
        self._memory = memory
        self._peers: dict[str, PeerProgress] = {}
        self._sequence = 0
        self._encoded: _Encoded | None = None

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

    def connected(self, peer_id: str) -> None:
        """A new link: what was under way on the old one is lost."""
        match_index = self._core.match_index(peer_id) or self._journal.last_index
        self._core.set_next_index(peer_id, match_index + 1)
        self.restart(peer_id)

    def lead(self) -> None:
        """A new leadership: nothing is known of anybody."""
        self._peers.clear()
        self._encoded = None

    def replicate(self, *, heartbeat: bool = False, announce: bool = False) -> bool:
        """Send what each connected member lacks; with `heartbeat`, at least an empty message.

        A commit index travels with entries. Only with `announce` does it get a message of its own;
        without, True says that a member does not know it yet.
        """
        is_unknown = False
        for member in self._context.configuration.members:
            if member.node_id in self._context.connected:
                is_unknown |= self._replicate_to(member.node_id, heartbeat, announce)
        return is_unknown

    def announce_to(self, peer_id: str) -> None:
        """Tell `peer_id` now what is committed, unless it knows, or is no member any more, or needs
        a snapshot first."""
        progress, next_index = self.progress(peer_id), self._core.next_index(peer_id)
        if self._context.configuration.find(peer_id) is not None \
                and next_index > self._journal.anchor_index \
                and not progress.probing and progress.sent_commit < self._announced_commit():
            self._send_append(peer_id, progress, next_index, empty=True)

    def owes_nothing_to(self, peer_id: str) -> bool:
        """Whether nothing is left to commit or to send because of what `peer_id` acknowledged."""
        core = self._core
        return (core.match_index(peer_id) <= core.commit_index()
                and core.next_index(peer_id) > self._journal.last_index)

    def on_ack(self, peer_id: str, message: Ack) -> None:
        """Raises `LogDiverged` when the peer claims entries that its leader never had."""
        core = self._core
        if not core.is_leading() or message.term != core.term() \
                or self._context.configuration.find(peer_id) is None:
            return
        if message.sequence == NO_SEQUENCE:
            core.shows_life(peer_id)
            return
        match_index = message.next_index - 1
        if message.accepted and match_index > self._journal.last_index:
            raise rules.LogDiverged(f"member {peer_id} acknowledges entry {match_index}, the log "
                                    f"of its leader ends at {self._journal.last_index}")
        progress = self.progress(peer_id)
        if message.accepted:
            self._on_accepted(peer_id, message, progress)
        elif message.sequence >= progress.min_sequence:
            self._on_rejected(peer_id, message, progress)

    def _on_accepted(self, peer_id: str, message: Ack, progress: PeerProgress) -> None:
        core, match_index = self._core, message.next_index - 1
        progress.acknowledged(match_index)
        if message.counted:
            core.receive_ack(peer_id, message.next_index, accepted=True)
            if match_index >= self._journal.anchor_index:
                self._memory.acknowledged(peer_id, match_index,
                                          self._journal.term_at(match_index))
            self._memory.spoke(peer_id, message.term)
        else:
            core.heard_from(peer_id)
            core.set_next_index(peer_id, max(core.next_index(peer_id), message.next_index))
        if progress.is_behind and core.next_index(peer_id) > self._journal.anchor_index:
            progress.is_behind = False
            self._needs_none(peer_id)

    def _on_rejected(self, peer_id: str, message: Ack, progress: PeerProgress) -> None:
        core = self._core
        self.restart(peer_id)
        if not message.counted:
            core.heard_from(peer_id)
            core.set_match_index(peer_id, 0)
            core.set_next_index(peer_id, message.next_index)
        elif message.next_index - 1 < core.match_index(peer_id):
            # It acknowledged more than it has. The next greeting tells it so.
            self._context.drop(peer_id)
        else:
            core.receive_ack(peer_id, message.next_index, accepted=False)
        if core.next_index(peer_id) <= self._journal.anchor_index:
            progress.rejected_behind()

    def _replicate_to(self, peer_id: str, heartbeat: bool, announce: bool) -> bool:
        progress = self.progress(peer_id)
        next_index = self._core.next_index(peer_id)
        if next_index <= self._journal.anchor_index:
            if heartbeat or not progress.probe_sent:
                # Before the offer: the peer must know its leader to take a snapshot from it, and
                # may have more by now than it had acknowledged.
                self._send_append(peer_id, progress, self._journal.anchor_index + 1, empty=True)
                progress.probe_sent = True
            if progress.is_behind:
                self._needs_snapshot(peer_id)
            return False
        sent = False
        while next_index <= self._journal.last_index \
                and progress.may_send(self._context.settings.window_bytes):
            last_index = self._send_append(peer_id, progress, next_index, empty=False)
            if last_index == 0:
                return False
            sent = True
            if progress.probing:
                break
            next_index = last_index + 1
            self._core.set_next_index(peer_id, next_index)
        if sent:
            return False
        is_unknown = progress.sent_commit < self._announced_commit() and not progress.probing
        if heartbeat or (announce and is_unknown):
            self._send_append(peer_id, progress, next_index, empty=True)
            return False
        return is_unknown

    def _send_append(self, peer_id: str, progress: PeerProgress, next_index: int, *,
                     empty: bool) -> int:
        """Send one message; the last index it carries (0 when it could not be queued)."""
        last_index = next_index - 1 if empty else self._journal.last_index
        encoded = self._encode(next_index, last_index, progress.min_sequence)
        if not self._context.send_body(peer_id, encoded.body):
            return 0
        progress.sent_commit = self._announced_commit()
        if encoded.carried >= next_index:
            progress.sent(encoded.carried, len(encoded.body))
        return encoded.carried

    def _announced_commit(self) -> int:
        """The commit index that peers hear of: they remember that this leader has it on its disk.
        As a follower it may have learnt of more than it had synced."""
        return min(self._core.commit_index(), self._journal.durable_index)

    def _encode(self, first: int, last: int, min_sequence: int) -> _Encoded:
        """The message with entries `first..last`, as many as fit a batch."""
        commit_index = self._announced_commit()
        key = (first, last, self._core.term(), commit_index)
        known = self._encoded
        if known is not None and known.key == key and known.sequence >= min_sequence:
            return known
        carried = first - 1
        blob = b""
        if first <= last:
            entries = self._journal.entries(first, last, self._context.settings.batch_bytes)
            parts: list[bytes] = []
            for command, index, term in entries:
                parts.append(records.encode_header(index, term, command, 0))
                parts.append(command)
            blob = b"".join(parts)
            carried = entries[-1][1]
        self._sequence += 1
        body = encode_message(AppendEntries(
            self._core.term(), self._sequence, commit_index, first - 1,
            self._journal.term_at(first - 1), blob))
        self._encoded = _Encoded(key, self._sequence, body, carried)
        return self._encoded
