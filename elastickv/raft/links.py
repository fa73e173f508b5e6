"""The network seam: authenticated, ordered, message-wise links between members.

`tls_links.py` is the real one; the simulator has its own. A `Links` promises:

* `received` callbacks of one peer come in the order in which that peer sent them, none twice, and
  none of an earlier connection after `connected` for a later one: the old connection is closed and
  what it had not delivered is dropped first.
* Callbacks never come from within a call of `send`, `set_peers` or `drop`.
* Nothing blocks. A peer that does not read is dropped, not waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from elastickv.raft.frames import Hello


class LinkEvents(Protocol):
    """What the engine hears from its links."""

    def make_hello(self, peer_id: str) -> Hello:
        """The greeting for `peer_id`; "" when the other end is not known yet."""
        ...

    def connected(self, peer_id: str, hello: Hello) -> None:
        """Both greetings were exchanged; `peer_id` is authenticated."""
        ...

    def disconnected(self, peer_id: str) -> None:
        """The link is gone; what was under way may or may not have arrived."""
        ...

    def receiving(self, peer_id: str) -> None:
        """Bytes of a message have come that is not whole yet; of a large one, again and again."""
        ...

    def received(self, peer_id: str, body: bytes) -> None:
        """One message body."""
        ...


class Links(Protocol):
    """Connections to all peers."""

    async def start(self, events: LinkEvents) -> None:
        """Listen, and keep dialling. Raises `BindFailed`."""
        ...

    async def stop(self) -> None:
        """Close everything. Idempotent."""
        ...

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        """Whom to keep a link with: node id -> `host:port`. Others may still connect to us."""
        ...

    def send(self, peer_id: str, body: bytes) -> bool:
        """Queue one message body; False when there is no link or its queue is full."""
        ...

    def flush(self) -> None:
        """Hand everything queued to the operating system now."""
        ...

    def drop(self, peer_id: str) -> None:
        """Hand what is queued for `peer_id` to the operating system, and close the link with it, if
        any; it may be dialled again."""
        ...
