"""Futures of the engine's callers: proposals by log index, waits for an applied index."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from typing import NamedTuple

from elastickv.errors import DeadlineExceeded, ElasticKVError, OutcomeUnknown
from elastickv.raft.engine import Entry


class _Proposal(NamedTuple):
    term: int
    future: asyncio.Future[object]
    deadline: float


class Proposals:
    """Proposals under way. Each future ends exactly once."""

    def __init__(self) -> None:
        self._by_index: dict[int, _Proposal] = {}

    def __len__(self) -> int:
        return len(self._by_index)

    def add(self, index: int, term: int, future: asyncio.Future[object], deadline: float) -> None:
        """The entry at `index` was appended in `term` for `future`."""
        self._by_index[index] = _Proposal(term, future, deadline)

    def applied(self, entries: Sequence[Entry], results: Sequence[object]) -> None:
        """Resolve the proposals of `entries`. One whose index was taken by an entry of another term
        ends as unknown."""
        for entry, result in zip(entries, results, strict=True):
            proposal = self._by_index.pop(entry.index, None)
            if proposal is None or proposal.future.done():
                continue
            if proposal.term != entry.term:
                proposal.future.set_exception(OutcomeUnknown("another leader took the log index"))
            elif isinstance(result, ElasticKVError):
                proposal.future.set_exception(result)
            else:
                proposal.future.set_result(result)

    def expire(self, now: float) -> None:
        """End what is past its deadline."""
        late = [i for i, proposal in self._by_index.items()
                if proposal.deadline <= now or proposal.future.done()]
        for index in late:
            self._fail(self._by_index.pop(index), "the deadline passed before it was applied")

    def fail_all(self, message: str) -> None:
        """This node no longer leads, or stops."""
        proposals, self._by_index = self._by_index, {}
        for proposal in proposals.values():
            self._fail(proposal, message)

    @staticmethod
    def _fail(proposal: _Proposal, message: str) -> None:
        if not proposal.future.done():
            proposal.future.set_exception(OutcomeUnknown(
                message, remedy="read the key to learn whether the write took effect"))


class _Waiter(NamedTuple):
    """In the heap's order: no two have the same sequence number."""

    index: int  # type: ignore[assignment]
    sequence: int
    future: asyncio.Future[None]
    deadline: float


class AppliedWaiters:
    """Waits for an applied index."""

    def __init__(self) -> None:
        self._heap: list[_Waiter] = []
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, index: int, future: asyncio.Future[None], deadline: float) -> None:
        """Complete `future` once `index` is applied."""
        self._sequence += 1
        heapq.heappush(self._heap, _Waiter(index, self._sequence, future, deadline))

    def advance(self, applied_index: int) -> None:
        """Everything up to `applied_index` is applied."""
        while self._heap and self._heap[0].index <= applied_index:
            future = heapq.heappop(self._heap).future
            if not future.done():
                future.set_result(None)

    def expire(self, now: float) -> None:
        """End what is past its deadline."""
        if not any(waiter.deadline <= now for waiter in self._heap):
            return
        for waiter in self._heap:
            if waiter.deadline <= now and not waiter.future.done():
                waiter.future.set_exception(DeadlineExceeded(
                    f"entry {waiter.index} was not applied in time"))
        self._heap = [waiter for waiter in self._heap if not waiter.future.done()]
        heapq.heapify(self._heap)

    def fail_all(self, error: ElasticKVError) -> None:
        """The node stops."""
        waiting, self._heap = self._heap, []
        for waiter in waiting:
            if not waiter.future.done():
                waiter.future.set_exception(error)
