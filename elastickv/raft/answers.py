"""Answers to what peers ask.

Each process numbers its requests from 1 on. Behind another link than that on which a request came
there may be a new process, whose requests have the same numbers: an answer leaves on the link of
its request or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Answers(Generic[Message]):
    """Sends answers with `send(peer_id, message)`."""

    def __init__(self, send: Callable[[str, Message], bool]) -> None:
        self._send = send
        self._lost_links: Counter[str] = Counter()

    def lost(self, peer_id: str) -> None:
        """The link with `peer_id` broke: what was asked on it gets no answer."""
        self._lost_links[peer_id] += 1

    def to(self, peer_id: str) -> Callable[[Message], None]:
        """What sends the answer to a request that came from `peer_id` now."""
        lost_links = self._lost_links[peer_id]

        def answer(message: Message) -> None:
            if lost_links == self._lost_links[peer_id]:
                self._send(peer_id, message)

        return answer
