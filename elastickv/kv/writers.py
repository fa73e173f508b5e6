"""Confirmed writers: no nonce before the epoch that makes it unique is committed.

A nonce is `node_id16 | local_epoch | counter`. It is unique under a DEK if no two processes ever
count under the same (node, epoch). For each DEK a node walks this life cycle:

    UNCONFIRMED --persist--> PERSISTED --propose--> PROPOSED --accepted--> CONFIRMED
         ^                                             |
         +------ stale (registry is ahead) ------------+
         +------ doubtful (lost answer, timeout) ------+

* The epoch is written to the sidecar before it is asked for, so a crash never asks for it again.
* The leader accepts only an epoch strictly above the registry's, so the registry is the judge even
  when this node's whole disk is an old copy.
* Only this process's own accepted registration confirms. A doubtful one may have been committed,
hence
  its epoch is abandoned and the next one asked for.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from elastickv.crypto.nonce import NonceFactory
from elastickv.errors import ElasticKVError, OutcomeUnknown, PeerError, StartupRefused

MAX_EPOCH = 0xFFFF


class WriterState(enum.Enum):
    """Where a DEK's registration stands in this process."""

    UNCONFIRMED = "unconfirmed"
    PERSISTED = "persisted"
    PROPOSED = "proposed"
    CONFIRMED = "confirmed"


class WriterEvent(enum.Enum):
    """What can happen to a registration."""

    PERSIST = "persist"
    PROPOSE = "propose"
    ACCEPTED = "accepted"
    STALE = "stale"
    DOUBTFUL = "doubtful"


TRANSITIONS: Mapping[tuple[WriterState, WriterEvent], WriterState] = {
    (WriterState.UNCONFIRMED, WriterEvent.PERSIST): WriterState.PERSISTED,
    (WriterState.PERSISTED, WriterEvent.PROPOSE): WriterState.PROPOSED,
    (WriterState.PROPOSED, WriterEvent.ACCEPTED): WriterState.CONFIRMED,
    (WriterState.PROPOSED, WriterEvent.STALE): WriterState.UNCONFIRMED,
    (WriterState.PROPOSED, WriterEvent.DOUBTFUL): WriterState.UNCONFIRMED,
}


class EpochExhausted(StartupRefused):
    """This node has used every epoch of a DEK."""

    guard = "epoch-exhausted"


@dataclass(frozen=True, slots=True)
class Registration:
    """Outcome of one attempt: `accepted`, or the registry's `last_seen` that stands in the way."""

    accepted: bool
    last_seen: int = 0


def next_epoch(dek_id: int, local_epoch: int, registry_last_seen: int | None) -> int:
    """The epoch to ask for: above what this node wrote down and above what the registry saw.

    Raises `EpochExhausted` past 0xFFFF (DESIGN section 5).
    """
    epoch = max(local_epoch, -1 if registry_last_seen is None else registry_last_seen) + 1
    if epoch > MAX_EPOCH:
        raise EpochExhausted(f"every epoch of DEK {dek_id} is used on this node",
                             remedy="rotate the DEK: elastickv admin encryption rotate-dek")
    return epoch


class WriterRegistrar:
    """Confirms this node as a writer of the DEKs it needs, one task per DEK.

    `persist(dek_id, epoch)` writes the epoch durably; `register(dek_id, epoch)` asks the leader and
    raises `OutcomeUnknown` or another `PeerError` when no answer came.
    """

    def __init__(self, node_id16: int, *, local_epoch: Callable[[int], int],
                 persist: Callable[[int, int], None],
                 register: Callable[[int, int], Awaitable[Registration]],
                 on_confirmed: Callable[[int], None],
                 on_fatal: Callable[[BaseException], None]) -> None:
        self._node_id16 = node_id16
        self._local_epoch = local_epoch
        self._persist = persist
        self._register = register
        self._on_confirmed = on_confirmed
        self._on_fatal = on_fatal
        self._states: dict[int, WriterState] = {}
        self._factories: dict[int, NonceFactory] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def nonces(self, dek_id: int) -> NonceFactory | None:
        """The nonce factory of a confirmed DEK; None, and work on it, when not confirmed yet."""
        factory = self._factories.get(dek_id)
        if factory is None:
            self.ensure(dek_id)
        return factory

    def epoch(self, dek_id: int) -> int | None:
        """The confirmed epoch of a DEK in this process."""
        factory = self._factories.get(dek_id)
        return factory.local_epoch if factory else None

    def ensure(self, dek_id: int) -> None:
        """Start confirming `dek_id` unless confirmed or under way."""
        if dek_id in self._factories or dek_id in self._tasks:
            return
        task = asyncio.get_running_loop().create_task(self._confirm(dek_id))
        self._tasks[dek_id] = task
        task.add_done_callback(lambda done: self._ended(dek_id, done))

    def accept_own_proposal(self, dek_id: int, epoch: int) -> None:
        """A rotation that this process proposed was applied and carried its first registration
        for a DEK that did not exist before: confirmed without another round."""
        if dek_id in self._factories:
            return
        self._persist(dek_id, epoch)
        self._states[dek_id] = WriterState.PROPOSED
        self._confirmed(dek_id, epoch)

    def stop(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks.values():
            task.cancel()

    def _ended(self, dek_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(dek_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_fatal(error)

    def _step(self, dek_id: int, event: WriterEvent) -> None:
        state = self._states.get(dek_id, WriterState.UNCONFIRMED)
        self._states[dek_id] = TRANSITIONS[(state, event)]

    def _confirmed(self, dek_id: int, epoch: int) -> None:
        self._step(dek_id, WriterEvent.ACCEPTED)
        self._factories[dek_id] = NonceFactory(self._node_id16, epoch)
        self._on_confirmed(dek_id)

    async def _confirm(self, dek_id: int) -> None:
        last_seen: int | None = None
        pause_s = 0.02
        while dek_id not in self._factories:
            epoch = next_epoch(dek_id, self._local_epoch(dek_id), last_seen)
            self._persist(dek_id, epoch)
            self._step(dek_id, WriterEvent.PERSIST)
            self._step(dek_id, WriterEvent.PROPOSE)
            outcome = await self._ask(dek_id, epoch)
            if dek_id in self._factories:  # a rotation of our own was faster
                return
            if outcome is None:
                self._step(dek_id, WriterEvent.DOUBTFUL)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 1.0)
            elif outcome.accepted:
                self._confirmed(dek_id, epoch)
            else:
                self._step(dek_id, WriterEvent.STALE)
                last_seen = outcome.last_seen

    async def _ask(self, dek_id: int, epoch: int) -> Registration | None:
        """None when doubtful. What certainly was not proposed is asked again with the same
        epoch."""
        while True:
            try:
                return await self._register(dek_id, epoch)
            except OutcomeUnknown:
                return None
            except PeerError:
                await asyncio.sleep(0.05)
            except ElasticKVError:
                # Refused by the leader for another reason (this DEK is not known there yet).
                await asyncio.sleep(0.2)
