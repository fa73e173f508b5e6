"""How far a leader is with each peer. Pure bookkeeping, nothing is sent from here."""

from __future__ import annotations

from collections import deque


class PeerProgress:
    """One peer, as seen by the leader.

    While `probing`, where the peer's log meets ours is not known: one message at a time, repeated
    with every heartbeat. Afterwards messages are pipelined up to a window of unacknowledged bytes.
    `is_behind`: it has said that its log ends before ours begins.
    """

    def __init__(self) -> None:
        self.probing = True
        self.probe_sent = False
        self.is_behind = False
        self.min_sequence = 0
        self.sent_commit = 0
        self._in_flight: deque[tuple[int, int]] = deque()
        self._in_flight_bytes = 0

    def restart(self, sequence: int) -> None:
        """A new leadership, a new link or a rejection: rejections of messages up to `sequence`
        are old news."""
        self.probing = True
        self.probe_sent = False
        self.is_behind = False
        self.min_sequence = sequence + 1
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def rejected_behind(self) -> None:
        """The peer lacks what our log no longer holds. It has just heard its leader: the next
        heartbeat is time enough for another message."""
        self.is_behind = self.probe_sent = True

    def may_send(self, window_bytes: int) -> bool:
        """Whether entries may be sent now."""
        return not self.probe_sent if self.probing else self._in_flight_bytes < window_bytes

    def sent(self, last_index: int, size: int) -> None:
        """Entries up to `last_index`, `size` bytes, are under way."""
        if self.probing:
            self.probe_sent = True
        else:
            self._in_flight.append((last_index, size))
            self._in_flight_bytes += size

    def acknowledged(self, match_index: int) -> None:
        """The peer has everything up to `match_index`."""
        self.probing = False
        self.probe_sent = False
        while self._in_flight and self._in_flight[0][0] <= match_index:
            self._in_flight_bytes -= self._in_flight.popleft()[1]
