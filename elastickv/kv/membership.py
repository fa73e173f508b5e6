"""Membership changes from end to end: admission, preconditions, forwarding to the leader.

The engine commits a change and keeps Raft's own rules (one change at a time, compare-and-set on the
configuration index). Here is what comes before. Once encryption is bootstrapped a node is added
only after, in this order:

1. its 16-bit node id is free among members and registered writers;
2. it answered on the peer transport, at the address of the request, that it can decrypt;
3. its writer registration for every DEK is committed;
4. and, under the lock that key changes hold, none of this has changed.

The lock is what keeps a bootstrap or a cutover, which asks every member first, from missing a
member that is being added. The epoch registered in step 3 is 0, under which no nonce is ever made;
the node confirms a higher one itself when it has the keys.

A leader that is to be removed hands the leadership over first: its successor commits the removal,
and the answer does not go down with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import msgspec

from elastickv.config import parse_address, parse_node_id, require_certifiable
from elastickv.crypto.nonce import full_node_id
from elastickv.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidArgument,
    MembershipConflict,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    PeerError,
    RemovedFromCluster,
    Unreachable,
)
from elastickv.keys.applier import Applier
from elastickv.keys.registry import WRITERS_PREFIX
from elastickv.kv import forwarding
from elastickv.kv.admission import (
    Candidate,
    require_admissible,
    require_applied,
    require_free_node_id,
    require_known_address,
    require_reached_as,
    transfer_target,
    unreachable,
    unregistered,
)
from elastickv.kv.api import Capability
from elastickv.kv.forwarding import RegisterSelf
from elastickv.kv.leader_ops import LeaderOperations
from elastickv.kv.leading import RETRY_S, Decisions, on_leader
from elastickv.raft.engine import RaftEngine
from elastickv.raft.membership import (
    ChangeContext,
    ChangeKind,
    Configuration,
    MembershipChange,
    plan_change,
)
from elastickv.store.mvcc_store import Store

T = TypeVar("T")

METHOD_CHANGE = "membership.change"
METHOD_IDENTITY = "membership.identity"

TRANSFER = "transfer"
LOOK_FIRST = "look at elastickv admin raft status before a retry"
UNUSED_EPOCH = 0
ASK_TIMEOUT_S = 8.0
"""How long a node that is to be added may take to be reached and to answer. A first dial to a node
with a lower id waits a second for that node to dial."""
CATCH_UP_TIMEOUT_S = 2.0

ADDITIONS = (ChangeKind.ADD_VOTER, ChangeKind.ADD_LEARNER)


class _Call(msgspec.Struct, array_like=True):
    """An operation for the leader: a `ChangeKind` or `TRANSFER`. `address` of a transfer is the
    target's raft address, "" = any."""

    operation: str
    node_id: str
    address: str = ""
    previous_index: int = 0
    min_applied_index: int = 0
    skip_min_applied_check: bool = False
    timeout_ms: int = 0


class _Identity(msgspec.Struct, array_like=True):
    """What a node says of itself."""

    raft_address: str
    applied_index: int


class MembershipController:
    """One node's membership operations. Implements `kv.api.MembershipApi`."""

    def __init__(self, engine: RaftEngine, store: Store, applier: Applier, keys: LeaderOperations,
                 *, raft_address: str) -> None:
        self._engine = engine
        self._store = store
        self._applier = applier
        self._keys = keys
        self._raft_address = raft_address
        self._under_way = ""
        self._removed_at = 0
        self._decisions = Decisions()
        engine.handle(METHOD_CHANGE, self._serve_change, members_only=True)
        engine.handle(METHOD_IDENTITY, self._serve_identity)
        engine.on_fatal(self._note_removal)

    def _note_removal(self, error: BaseException) -> None:
        if isinstance(error, RemovedFromCluster):
            self._removed_at = error.index

    # --- the calls ------------------------------------------------------------------------------

    async def add_voter(self, node_id: str, address: str, *, previous_index: int,
                        timeout_s: float) -> int:
        return await self._on_leader(
            _Call(ChangeKind.ADD_VOTER.value, node_id, address, previous_index), timeout_s)

    async def add_learner(self, node_id: str, address: str, *, previous_index: int,
                          timeout_s: float) -> int:
        return await self._on_leader(
            _Call(ChangeKind.ADD_LEARNER.value, node_id, address, previous_index), timeout_s)

    async def promote_learner(self, node_id: str, *, previous_index: int, min_applied_index: int,
                              skip_min_applied_check: bool, timeout_s: float) -> int:
        return await self._on_leader(
            _Call(ChangeKind.PROMOTE.value, node_id, "", previous_index, min_applied_index,
                  skip_min_applied_check), timeout_s)

    async def remove_server(self, node_id: str, *, previous_index: int, timeout_s: float) -> int:
        return await self._on_leader(
            _Call(ChangeKind.REMOVE.value, node_id, "", previous_index), timeout_s)

    async def transfer_leadership(self, target_id: str, target_address: str = "", *,
                                  timeout_s: float) -> None:
        """Returns when this member knows the new leader, or after `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        target_id = transfer_target(self._engine.members(), target_id, target_address)
        before = self._engine.status().leader_id
        await self._on_leader(_Call(TRANSFER, target_id), timeout_s)
        while loop.time() < deadline:
            if target_id == before or self._engine.status().leader_id not in ("", before):
                return
            await asyncio.sleep(RETRY_S)

    # --- where the leader is ----------------------------------------------------------------------

    async def _on_leader(self, call: _Call, timeout_s: float) -> int:
        """Run `call` where it belongs, as often as it certainly was not begun."""

        def lead(remaining_s: float) -> Awaitable[int]:
            return self._decisions.run(partial(self._lead, _limited(call, remaining_s)))

        async def ask(leader_id: str, remaining_s: float) -> int:
            try:
                return forwarding.decode_outcome(
                    await self._engine.call(leader_id, METHOD_CHANGE,
                                            forwarding.encode(_limited(call, remaining_s)),
                                            timeout_s=remaining_s), int, LOOK_FIRST)
            except OutcomeUnknown:
                # The answer to a node's own removal is lost with its links, yet it knows.
                if self._removed_at and (call.operation, call.node_id) == (
                        ChangeKind.REMOVE.value, self._engine.node_id):
                    return self._removed_at
                raise

        return await on_leader(
            self._engine, lead, ask, what=call.operation, timeout_s=timeout_s, remedy=LOOK_FIRST,
            retried=(NotLeader, NoLeader, Unreachable))

    async def _serve_change(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return forwarding.encode(await self._decisions.run(
            partial(self._lead, forwarding.decode(payload, _Call))))

    async def _serve_identity(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return forwarding.encode(_Identity(self._raft_address, self._store.applied_index))

    # --- the leader's side ------------------------------------------------------------------------

    async def _lead(self, call: _Call) -> int:
        status = self._engine.status()
        if not self._engine.is_leader():
            raise NotLeader(leader_id=status.leader_id, leader_address=status.leader_address)
        deadline = asyncio.get_running_loop().time() + call.timeout_ms / 1000
        if call.operation == TRANSFER:
            await self._engine.transfer_leadership(call.node_id,
                                                   timeout_s=call.timeout_ms / 1000)
            return 0
        if self._under_way:
            raise MembershipConflict(f"another membership change is under way: {self._under_way}",
                                     remedy="retry when it has ended")
        change = _change_of(call)
        self._under_way = f"{change.kind.value} {change.node_id}"
        try:
            return await self._change(change, deadline)
        finally:
            self._under_way = ""

    async def _change(self, change: MembershipChange, deadline: float) -> int:
        if change.kind is ChangeKind.PROMOTE:
            return await self._promote(change, deadline)
        if change.kind in ADDITIONS:
            self._require_possible(change)
            return await self._add(change, deadline)
        self._engine.require_possible(change)
        if change.node_id == self._engine.node_id:
            await self._engine.transfer_leadership("", timeout_s=_remaining_s(deadline))
            raise NotLeader("this leader is to be removed and has handed over")
        return await self._engine.change_members(change, timeout_s=_remaining_s(deadline))

    def _require_possible(self, change: MembershipChange) -> None:
        """Raise what the engine would raise of a change, before anything is done for it. Whether
        the node that is added or promoted answers, and what it has, shows later."""
        plan_change(replace(change, skip_min_applied_check=True),
                    ChangeContext(self._configuration(), self._engine.status().commit_index,
                                  self._engine.is_leader()))

    def _configuration(self) -> Configuration:
        return Configuration(self._engine.status().configuration_index,
                             tuple(self._engine.members()))

    async def _promote(self, change: MembershipChange, deadline: float) -> int:
        self._require_possible(change)
        if not change.skip_min_applied_check:
            change = await self._await_applied(change, deadline)
        return await self._engine.change_members(change, timeout_s=_remaining_s(deadline))

    async def _await_applied(self, change: MembershipChange, deadline: float) -> MembershipChange:
        """The change with its index made explicit, once the learner has applied that.

        An index that the caller gave is a precondition and checked once. Otherwise it is the
        commit index of now, which a learner that keeps up reaches in a moment.
        """
        required_index = change.min_applied_index or self._engine.status().commit_index
        patience_s = 0.0 if change.min_applied_index else CATCH_UP_TIMEOUT_S
        loop = asyncio.get_running_loop()
        until = min(deadline, loop.time() + patience_s)
        while True:
            identity = await self._learner_identity(change.node_id, _remaining_s(deadline))
            require_known_address(self._configuration().find(change.node_id),
                                  identity.raft_address)
            try:
                require_applied(change.node_id, identity.applied_index, required_index)
            except MembershipConflict:
                if loop.time() >= until:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return replace(change, min_applied_index=required_index)

    async def _learner_identity(self, node_id: str, timeout_s: float) -> _Identity:
        try:
            return await self._identity(node_id, min(timeout_s, ASK_TIMEOUT_S))
        except PeerError as error:
            raise MembershipConflict(
                f"{node_id} does not say what it has applied ({error.message})",
                remedy=f"start {node_id}, or promote it with --skip-min-applied-check") from None

    # --- admission --------------------------------------------------------------------------------

    async def _add(self, change: MembershipChange, deadline: float) -> int:
        node_id = change.node_id
        asked = met = False
        while True:
            self._require_free(node_id)
            if self._applier.sidecar is not None:
                if not asked:
                    require_admissible(await self._ask(change, deadline, self._questions),
                                       change.address)
                    asked = True
                await self._register(node_id)
            elif change.kind is ChangeKind.ADD_VOTER and not met:
                # It counts from the moment when its entry is in the log: a majority may need it.
                identity = await self._ask(change, deadline, self._identity)
                require_reached_as(identity.raft_address, node_id, change.address)
                met = True
            async with self._keys.lock:
                if self._applier.sidecar is not None and (not asked or self._missing(node_id)):
                    continue
                self._require_free(node_id)  # an operator may have registered another node
                return await self._engine.change_members(change,
                                                         timeout_s=_remaining_s(deadline))

    def _require_free(self, node_id: str) -> None:
        sidecar = self._applier.sidecar
        require_free_node_id(node_id, self._engine.members(), self._rows(),
                             sidecar.active_ids if sidecar is not None else ())

    def _rows(self) -> dict[bytes, bytes]:
        return dict(self._store.rows(WRITERS_PREFIX))

    def _missing(self, node_id: str) -> list[int]:
        sidecar = self._applier.sidecar
        return unregistered(node_id, sidecar.keys if sidecar else (), self._rows())

    async def _register(self, node_id: str) -> None:
        for dek_id in self._missing(node_id):
            await self._keys.register_self(
                RegisterSelf(dek_id, full_node_id(node_id), UNUSED_EPOCH))

    async def _ask(self, change: MembershipChange, deadline: float,
                   questions: Callable[[str, float], Awaitable[T]]) -> T:
        """Dial the node and ask it. Raises `NotCapable` if it does not answer."""
        loop = asyncio.get_running_loop()
        until = min(deadline - RETRY_S, loop.time() + ASK_TIMEOUT_S)
        self._engine.introduce({change.node_id: change.address})
        try:
            while True:
                try:
                    return await questions(change.node_id, until - loop.time())
                except PeerError as error:
                    if loop.time() + RETRY_S >= until:
                        raise unreachable(
                            change.node_id, change.address, error.message,
                            encrypted=self._applier.sidecar is not None) from None
                    await asyncio.sleep(RETRY_S)
        finally:
            self._engine.introduce({})

    async def _identity(self, node_id: str, timeout_s: float) -> _Identity:
        return forwarding.decode(
            await self._engine.call(node_id, METHOD_IDENTITY, b"", timeout_s=timeout_s), _Identity)

    async def _questions(self, node_id: str, timeout_s: float) -> Candidate:
        def call(method: str, payload: bytes) -> Awaitable[bytes]:
            return self._engine.call(node_id, method, payload, timeout_s=timeout_s)

        sidecar = self._applier.sidecar
        wrapped = [key.wrapped for key in sidecar.keys.values()] if sidecar else []
        identity = await self._identity(node_id, timeout_s)
        capability = forwarding.decode(await call(forwarding.METHOD_CAPABILITY, b""), Capability)
        unwraps = forwarding.decode(
            await call(forwarding.METHOD_CAN_UNWRAP, forwarding.encode(wrapped)), bool)
        return Candidate(node_id, identity.raft_address, capability, unwraps)


def _limited(call: _Call, remaining_s: float) -> _Call:
    return msgspec.structs.replace(call, timeout_ms=max(1, int(remaining_s * 1000)))


def _change_of(call: _Call) -> MembershipChange:
    try:
        kind = ChangeKind(call.operation)
    except ValueError:
        raise InvalidArgument(f"unknown membership operation {call.operation!r}",
                              remedy="run the same version on every node") from None
    address = call.address
    if kind in ADDITIONS:
        try:
            require_certifiable(parse_node_id(call.node_id, "the id of a new member"))
            # As the member itself writes it: the two are compared as text.
            address = str(parse_address(address, "the raft address of a new member"))
        except ConfigError as error:
            raise InvalidArgument(error.message, remedy=error.remedy) from None
    return MembershipChange(kind, call.node_id, address, call.previous_index,
                            call.min_applied_index, call.skip_min_applied_check)


def _remaining_s(deadline: float) -> float:
    """Seconds until `deadline`. Raises `DeadlineExceeded`: then nothing was proposed."""
    remaining_s = deadline - asyncio.get_running_loop().time()
    if remaining_s <= 0:
        raise DeadlineExceeded("the deadline passed before the change was proposed",
                               remedy="retry with a longer deadline")
    return remaining_s
