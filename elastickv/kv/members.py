"""Asking the members: capability, key state, whether they could unwrap a key. All at once, bounded.

Every question has a time limit of its own, and a member that does not answer is a finding, not a
failure of the question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from elastickv.crypto.kek import Kek
from elastickv.errors import ElasticKVError, KekError, NotCapable
from elastickv.keys.applier import Applier
from elastickv.keys.registry import find_writer
from elastickv.kv import forwarding, member_rules
from elastickv.kv.api import (
    Capability,
    DekStatus,
    MemberEncryptionStatus,
    MemberReport,
    SidecarState,
)
from elastickv.kv.usage import NonceBudgets
from elastickv.kv.writers import WriterRegistrar
from elastickv.raft.engine import RaftEngine
from elastickv.store.mvcc_store import Store

MEMBER_TIMEOUT_S = 2.0
_CAPABLE_REMEDY = ("mend what is named, then repeat the command; a member that is gone for good can"
                   " be removed with elastickv admin raft")

T = TypeVar("T")


class Members:
    """Both sides of the questions: what this node answers, and what it asks of the others."""

    def __init__(self, engine: RaftEngine, store: Store, applier: Applier,
                 writers: WriterRegistrar, budgets: NonceBudgets, *, full_node_id: int,
                 kek: Kek | None, gate: bool, build_sha: str) -> None:
        self._engine = engine
        self._store = store
        self._applier = applier
        self._writers = writers
        self._budgets = budgets
        self._full_node_id = full_node_id
        self._kek = kek
        self._gate = gate
        self._build_sha = build_sha
        engine.handle(forwarding.METHOD_CAPABILITY, self._serve_capability)
        engine.handle(forwarding.METHOD_REPORT, self._serve_report)
        engine.handle(forwarding.METHOD_CAN_UNWRAP, self._serve_can_unwrap)

    # --- what this node answers -----------------------------------------------------------------

    def capability(self) -> Capability:
        """This node's own; the epoch is that of the active storage DEK."""
        sidecar = self._applier.sidecar
        epoch = 0
        if sidecar is not None:
            confirmed = self._writers.epoch(sidecar.active_storage)
            epoch = confirmed if confirmed is not None \
                else self.local_epoch(sidecar.active_storage)
        return Capability(self._full_node_id, self._gate, self._build_sha, sidecar is not None,
                          epoch)

    def local_epoch(self, dek_id: int) -> int:
        """The epoch in this node's sidecar; 0 for a DEK that it does not hold."""
        sidecar = self._applier.sidecar
        key = sidecar.keys.get(dek_id) if sidecar else None
        return key.local_epoch if key else 0

    def registered_epoch(self, dek_id: int, full_node_id: int) -> int | None:
        """The last epoch that the applied registry holds for a node."""
        record = find_writer(self._store.row, dek_id, full_node_id)
        if record is None or record.full_node_id != full_node_id:
            return None
        return record.last_seen_epoch

    def sidecar_state(self, caller_full_node_id: int = 0) -> SidecarState:
        """This node's key state, with the registry's epochs for the caller (default: itself)."""
        sidecar = self._applier.sidecar
        if sidecar is None:
            return SidecarState({}, 0, 0, False, 0, self._store.applied_index)
        caller = caller_full_node_id or self._full_node_id
        registry = {dek_id: epoch for dek_id in sidecar.keys
                    if (epoch := self.registered_epoch(dek_id, caller)) is not None}
        return SidecarState(
            {dek_id: key.wrapped for dek_id, key in sidecar.keys.items()},
            sidecar.active_storage, sidecar.active_raft, sidecar.storage_envelope_active,
            sidecar.raft_envelope_cutover_index, self._store.applied_index, registry,
            sidecar.storage_envelope_cutover_index, sidecar.raft_applied_index,
            {dek_id: int(key.purpose) for dek_id, key in sidecar.keys.items()},
            {dek_id: key.created for dek_id, key in sidecar.keys.items()})

    def report(self) -> MemberReport:
        """Everything that `status` shows of this node."""
        sidecar = self._applier.sidecar
        limits = self._budgets.limits
        totals = self._budgets.totals()
        deks: list[DekStatus] = []
        for dek_id, key in (sidecar.keys.items() if sidecar else ()):
            writes = totals.get(dek_id, 0)
            deks.append(DekStatus(
                dek_id, int(key.purpose), sidecar is not None
                and dek_id == sidecar.active(key.purpose), self._writers.state(dek_id).value,
                self._writers.epoch(dek_id) or 0, key.local_epoch, writes, limits.left(writes),
                self._writers.problem(dek_id)))
        return MemberReport(self.capability(), self.sidecar_state(), deks, limits.max_writes)

    async def _serve_capability(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return forwarding.encode(self.capability())

    async def _serve_report(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return forwarding.encode(self.report())

    async def _serve_can_unwrap(self, peer_id: str, method: str, payload: bytes) -> bytes:
        wrapped = forwarding.decode(payload, list[bytes])
        return forwarding.encode(self._kek is not None and _unwraps(self._kek, wrapped))

    # --- what it asks of the others -------------------------------------------------------------

    async def require_all_capable(self) -> list[Capability]:
        """Every member's capability; raises `NotCapable` naming each member that stands in the
        way and why."""
        answers = await self._ask_all(forwarding.METHOD_CAPABILITY, b"", Capability,
                                      self.capability)
        problems: list[str] = []
        capable: list[Capability] = []
        for node_id, answer in answers.items():
            problem = member_rules.unreachable(answer.message) \
                if isinstance(answer, ElasticKVError) else member_rules.incapable(answer)
            if problem:
                problems.append(f"{node_id} {problem}")
            elif isinstance(answer, Capability):
                capable.append(answer)
        if problems:
            raise NotCapable("not every member is ready for encryption: " + "; ".join(problems),
                             remedy=_CAPABLE_REMEDY)
        return capable

    async def require_unwraps(self, wrapped: Sequence[bytes]) -> None:
        """Raise `NotCapable` naming each reachable member whose KEK does not unwrap new DEKs.

        Applying them would stop that member. One that cannot be asked now is no obstacle: it
        finds out when it starts, or stops at the entry and goes on from there with the right KEK.
        """
        answers = await self._ask_all(forwarding.METHOD_CAN_UNWRAP,
                                      forwarding.encode(list(wrapped)), bool, lambda: True)
        names = [node_id for node_id, answer in answers.items() if answer is False]
        if names:
            raise NotCapable(f"the KEK of {', '.join(names)} does not unwrap the new key",
                             remedy="start every member with the same --kekFile")

    async def status(self, timeout_s: float) -> list[MemberEncryptionStatus]:
        """A row for every member."""
        answers = await self._ask_all(forwarding.METHOD_REPORT, b"", MemberReport, self.report,
                                      timeout_s=min(timeout_s, MEMBER_TIMEOUT_S))
        leader = answers.get(self._engine.status().leader_id)
        reference = leader if isinstance(leader, MemberReport) else None
        return [_row(node_id, answer, reference) for node_id, answer in answers.items()]

    async def _ask_all(self, method: str, payload: bytes, reply_type: type[T],
                       own: Callable[[], T], *, timeout_s: float = MEMBER_TIMEOUT_S
                       ) -> dict[str, T | ElasticKVError]:
        names = [member.node_id for member in self._engine.members()]

        async def ask(node_id: str) -> T | ElasticKVError:
            if node_id == self._engine.node_id:
                return own()
            try:
                return forwarding.decode(
                    await self._engine.call(node_id, method, payload, timeout_s=timeout_s),
                    reply_type)
            except ElasticKVError as error:
                return error

        return dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))


def _unwraps(kek: Kek, wrapped: Sequence[bytes]) -> bool:
    try:
        for each in wrapped:
            # Only whether it opens matters; the key is dropped at once.
            kek.unwrap(each)
    except KekError:
        return False
    return True


def _row(node_id: str, answer: MemberReport | ElasticKVError,
         leader: MemberReport | None) -> MemberEncryptionStatus:
    if isinstance(answer, ElasticKVError):
        return MemberEncryptionStatus(node_id, False, None, None,
                                      [member_rules.unreachable(answer.message)])
    return MemberEncryptionStatus(node_id, True, answer.capability, answer.sidecar,
                                  member_rules.problems(answer, leader), answer.deks)
