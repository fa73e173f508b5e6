"""Confirmed writers: no nonce before the epoch that makes it unique is committed.

A nonce is `node_id16 | local_epoch | counter`. It is unique under a DEK if no two processes ever
count under the same (node, epoch). For each DEK a node walks this life cycle (`TRANSITIONS`):

    UNCONFIRMED --persist--> PERSISTED --propose--> PROPOSED --accepted--> CONFIRMED
         |                                          ^  |
         +------ propose in a rotation -------------+  |
         ^                     ^                       |
         |                     +------ refused --------+
         +------ stale (registry is ahead) ------------+
         +------ doubtful (lost answer, timeout) ------+

* The epoch is written to the sidecar before it is asked for, so a crash never asks for it again. A
  rotation's DEK is in no sidecar before its entry applies, which writes DEK and epoch together.
* The leader accepts only an epoch strictly above the registry's, so the registry is the judge even
  when this node's whole disk is an old copy.
* Only this process's own accepted registration confirms. A doubtful one may have been committed,
  hence its epoch is abandoned and the next one asked for. After a refusal, which certainly
  registered nothing, the same epoch is asked for again: a refusal may last, and epochs run out.
* A 16-bit node id that another node holds can never be confirmed: the node stops.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping

from elastickv.crypto.nonce import NonceFactory
from elastickv.errors import (
    DiskFull,
    ElasticKVError,
    NodeIdCollision,
    Outcome,
    OutcomeUnknown,
    PeerError,
)
from elastickv.keys.epochs import next_epoch
from elastickv.keys.guards import NodeIdTaken
from elastickv.kv.forwarding import RegisterReply

FIRST_PAUSE_S = 0.02
MAX_PAUSE_S = 1.0
RETRY_S = 0.05


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
    PROPOSE_IN_ROTATION = "propose in a rotation"
    ACCEPTED = "accepted"
    STALE = "stale"
    DOUBTFUL = "doubtful"
    REFUSED = "refused"


TRANSITIONS: Mapping[tuple[WriterState, WriterEvent], WriterState] = {
    (WriterState.UNCONFIRMED, WriterEvent.PERSIST): WriterState.PERSISTED,
    (WriterState.PERSISTED, WriterEvent.PROPOSE): WriterState.PROPOSED,
    (WriterState.UNCONFIRMED, WriterEvent.PROPOSE_IN_ROTATION): WriterState.PROPOSED,
    (WriterState.PROPOSED, WriterEvent.ACCEPTED): WriterState.CONFIRMED,
    (WriterState.PROPOSED, WriterEvent.STALE): WriterState.UNCONFIRMED,
    (WriterState.PROPOSED, WriterEvent.DOUBTFUL): WriterState.UNCONFIRMED,
    (WriterState.PROPOSED, WriterEvent.REFUSED): WriterState.PERSISTED,
}


class WriterRegistrar:
    """Confirms this node as a writer of the DEKs it needs, one task per DEK.

    `persist(dek_id, epoch)` writes the epoch durably; `register(dek_id, epoch)` asks the leader and
    raises `OutcomeUnknown` or another `PeerError` when no answer came, `NodeIdCollision` when the
    id is another node's, and any other typed error when the leader refuses this DEK.
    """

    def __init__(self, node_id16: int, *, local_epoch: Callable[[int], int],
                 persist: Callable[[int, int], None],
                 register: Callable[[int, int], Awaitable[RegisterReply]],
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
        self._problems: dict[int, str] = {}
        self._stopped = False

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

    def state(self, dek_id: int) -> WriterState:
        """Where the DEK's registration stands."""
        return self._states.get(dek_id, WriterState.UNCONFIRMED)

    def problem(self, dek_id: int) -> str:
        """Why this node could last not be registered for a DEK: what the leader refused, or a full
        disk; "" when nothing is known against it."""
        return self._problems.get(dek_id, "")

    def ensure(self, dek_id: int) -> None:
        """Start confirming `dek_id` unless confirmed or under way."""
        if self._stopped or dek_id in self._tasks \
                or self.state(dek_id) is not WriterState.UNCONFIRMED:
            return
        task = asyncio.get_running_loop().create_task(self._confirm(dek_id))
        self._tasks[dek_id] = task
        task.add_done_callback(lambda done: self._ended(dek_id, done))

    def begin_rotation(self, dek_id: int) -> None:
        """This process proposes a rotation to the new DEK `dek_id`, whose entry registers it:
        nothing else asks for the DEK until the rotation has ended."""
        self._step(dek_id, WriterEvent.PROPOSE_IN_ROTATION)

    def end_rotation(self, dek_id: int, epoch: int, *, applied: bool) -> None:
        """What the rotation came to. Applied, it confirms without another round. Otherwise it may
        still be in the log, so its epoch is abandoned."""
        if not applied:
            self._step(dek_id, WriterEvent.DOUBTFUL)
            return
        self._persist(dek_id, epoch)
        self._confirmed(dek_id, epoch)

    def stop(self) -> None:
        """Cancel what is under way; nothing is confirmed afterwards."""
        self._stopped = True
        for task in self._tasks.values():
            task.cancel()

    def _ended(self, dek_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(dek_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_fatal(error)

    def _step(self, dek_id: int, event: WriterEvent) -> None:
        self._states[dek_id] = TRANSITIONS[(self.state(dek_id), event)]

    def _confirmed(self, dek_id: int, epoch: int) -> None:
        self._step(dek_id, WriterEvent.ACCEPTED)
        self._problems.pop(dek_id, None)
        self._factories[dek_id] = NonceFactory(self._node_id16, epoch)
        self._on_confirmed(dek_id)

    async def _confirm(self, dek_id: int) -> None:
        last_seen: int | None = None
        pause_s = FIRST_PAUSE_S
        epoch = 0
        while True:
            if self.state(dek_id) is WriterState.UNCONFIRMED:
                epoch = next_epoch(dek_id, self._local_epoch(dek_id), last_seen)
                try:
                    self._persist(dek_id, epoch)
                    self._step(dek_id, WriterEvent.PERSIST)
                except DiskFull as error:
                    # Nothing was asked for yet; a full disk is no reason to stop.
                    self._problems[dek_id] = str(error)
            if self.state(dek_id) is WriterState.PERSISTED:
                self._step(dek_id, WriterEvent.PROPOSE)
                event, seen = await self._ask(dek_id, epoch)
                if event is WriterEvent.ACCEPTED:
                    self._confirmed(dek_id, epoch)
                    return
                self._step(dek_id, event)
                if event is WriterEvent.STALE:
                    last_seen = seen
                    continue
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def _ask(self, dek_id: int, epoch: int) -> tuple[WriterEvent, int]:
        """What came of asking, and the registry's epoch if it is ahead. What certainly was not
        proposed is asked again with the same epoch."""
        while True:
            try:
                reply = await self._register(dek_id, epoch)
            except OutcomeUnknown:
                return WriterEvent.DOUBTFUL, 0
            except PeerError:
                await asyncio.sleep(RETRY_S)
            except NodeIdCollision as error:
                raise NodeIdTaken(error.message, remedy="give this node another --raftId and a new"
                                  " data directory, and join it again") from None
            except ElasticKVError as error:
                # For example a DEK that the leader does not know, or the leader's disk is full.
                self._problems[dek_id] = str(error)
                certain = error.outcome is Outcome.NOT_APPLIED
                return WriterEvent.REFUSED if certain else WriterEvent.DOUBTFUL, 0
            else:
                event = WriterEvent.ACCEPTED if reply.accepted else WriterEvent.STALE
                return event, reply.last_seen_epoch
