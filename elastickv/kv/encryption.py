"""The encryption control plane of one node: puts its parts together and takes the calls.

    sealing      what the leader seals, under which DEK          (kv.sealing, kv.usage)
    writers      who may make nonces: confirmed epochs           (kv.writers)
    members      what every member says of itself                (kv.members, kv.member_rules)
    operations   validated proposals, under the leader's lock    (kv.leader_ops)
    rotation     DEKs that are due for a successor               (kv.rotation)

Any member takes any call; what only the leader can do is forwarded over the peer transport.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from elastickv.clock import Clock, SystemClock
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import full_node_id as full_id_of
from elastickv.crypto.nonce import node_id16
from elastickv.errors import (
    DeadlineExceeded,
    DekExhausted,
    GateOff,
    InvalidArgument,
    OutcomeUnknown,
    PeerError,
)
from elastickv.keys.applier import Applier
from elastickv.keys.guards import SidecarForeign, foreign_remedy
from elastickv.keys.registry import decode_row_value, writers_prefix
from elastickv.kv import forwarding
from elastickv.kv.api import (
    BootstrapResult,
    Capability,
    CutoverResult,
    MemberEncryptionStatus,
    RotateResult,
    SidecarState,
    WriterRow,
)
from elastickv.kv.forwarding import RegisterReply, RegisterSelf
from elastickv.kv.fsm import recorded_keys
from elastickv.kv.key_operations import (
    BootstrapKeys,
    EnableRaftEnvelope,
    EnableStorageEnvelope,
    KeyOperation,
    RegisterWriters,
    RotateDek,
    SidecarStateFor,
    decode_call,
    encode_call,
)
from elastickv.kv.leader_ops import LeaderOperations
from elastickv.kv.leading import Decisions, on_leader, require_leader_id
from elastickv.kv.members import Members
from elastickv.kv.own_entries import OwnEntries
from elastickv.kv.proposer import Proposer
from elastickv.kv.rotation import AutomaticRotation, DekFacts, RotationSettings, View, age_s
from elastickv.kv.sealing import Sealing
from elastickv.kv.txn import Sealer
from elastickv.kv.usage import NonceBudgets
from elastickv.kv.writers import WriterRegistrar
from elastickv.raft.engine import RaftEngine, Role
from elastickv.store.mvcc_store import Store

REGISTER_TIMEOUT_S = 10.0
RESERVE_TIMEOUT_S = 30.0
LOOK_FIRST = "look at elastickv admin encryption status before a retry"

T = TypeVar("T")


class EncryptionController:
    """Keys and writers of one node. Implements `kv.api.EncryptionApi`."""

    def __init__(self, engine: RaftEngine, store: Store, applier: Applier, *, full_node_id: int,
                 kek: Kek | None, gate: bool, build_sha: str,
                 on_fatal: Callable[[BaseException], None], rotation: RotationSettings,
                 clock: Clock | None = None, own_entries: OwnEntries | None = None) -> None:
        self._engine = engine
        self._store = store
        self._applier = applier
        self._kek = kek
        self._gate = gate and kek is not None
        self._full_node_id = full_node_id
        self._clock = clock or SystemClock()
        self._on_fatal = on_fatal
        self._decisions = Decisions()
        self._known_cutover_index = 0
        self.writers = WriterRegistrar(
            node_id16(full_node_id), local_epoch=lambda dek_id: self.members.local_epoch(dek_id),
            persist=applier.set_local_epoch, register=self._register_through_leader,
            on_confirmed=lambda dek_id: self._changed(), on_fatal=on_fatal)
        self.budgets = NonceBudgets(
            store, self.writers, full_node_id, rotation.limits,
            propose=lambda payload: self.proposer.submit_clear(payload,
                                                               timeout_s=RESERVE_TIMEOUT_S),
            on_change=self._changed)
        self.sealing = Sealing(applier, self.budgets, own_entries)
        self.proposer = Proposer(engine, self.sealing)
        self.members = Members(engine, store, applier, self.writers, self.budgets,
                                full_node_id=full_node_id, kek=kek, gate=self._gate,
                                build_sha=build_sha)
        self.operations = LeaderOperations(
            engine, store, applier, self.proposer, self.writers, self.budgets, self.members,
            full_node_id=full_node_id, require_gate=self.require_kek)
        self.rotation = AutomaticRotation(rotation, self._rotation_view, self.rotate_own,
                                          self._clock, on_fatal=on_fatal,
                                          on_failed=self.proposer.notify)
        engine.handle(forwarding.METHOD_REGISTER_SELF, self._serve_register_self,
                      members_only=True)
        engine.handle(forwarding.METHOD_ADMIN, self._serve_admin, members_only=True)
        engine.on_role_change(self._role_changed)

    def start(self) -> None:
        """The engine runs: become a writer, and watch for DEKs that are due."""
        self._shed_clear_entries()
        self.ensure_writers()
        if self._gate:
            self.rotation.start()

    def stop(self) -> None:
        """No new registration and no new rotation; what is in the log is decided by the log."""
        self.rotation.stop()
        self.writers.stop()

    # --- what the write path asks ---------------------------------------------------------------

    def record_sealer(self, count: int = 1) -> Sealer | None:
        """See `Sealing.record_sealer`."""
        return self.sealing.record_sealer(count)

    def refusal(self) -> DekExhausted | None:
        """Why writes are refused for now: a DEK is spent, and no successor is under way."""
        refusal = self.sealing.refusal()
        if refusal is None or not self._gate:
            return refusal
        spent = [purpose for purpose, dek_id in self.sealing.active_deks().items()
                 if self.budgets.is_spent(dek_id)]
        if all(self.rotation.relieves(purpose) for purpose in spent):
            self.rotation.poke()
            return None
        return refusal

    # --- what changes ---------------------------------------------------------------------------

    def keys_changed(self, index: int) -> None:
        """After an encryption entry: become a writer of what is active now."""
        self._shed_clear_entries()
        self.ensure_writers()
        self._changed()

    def _shed_clear_entries(self) -> None:
        """From the raft cutover on, entries in the clear leave the log. The sidecar may know of the
        cutover before its entry is applied here."""
        sidecar = self._applier.sidecar
        cutover_index = sidecar.raft_envelope_cutover_index if sidecar else 0
        if cutover_index != self._known_cutover_index:
            self._known_cutover_index = cutover_index
            self._engine.shed_clear_entries(cutover_index)

    def ensure_writers(self) -> None:
        """Start confirming this node for the active DEKs."""
        sidecar = self._applier.sidecar
        if sidecar is None or not self._gate:
            return
        for dek_id in sidecar.active_ids:
            self.writers.ensure(dek_id)

    def _role_changed(self, role: Role, term: int) -> None:
        if role is Role.LEADER:
            if self._is_sidecar_foreign():
                return
            if self._gate:
                self.sealing.prepare()
        self.rotation.poke()

    def _is_sidecar_foreign(self) -> bool:
        """Whether this leader's keys are not those of its log; then it seals nothing and stops. A
        leader has applied everything that was committed, hence every entry that its sidecar can
        have come from."""
        sidecar = self._applier.sidecar
        if sidecar is None:
            return False
        recorded = recorded_keys(self._store.applied_index, self._store.meta)
        if sidecar.raft_applied_index > recorded.applied_index:
            failure = SidecarForeign.beyond_log(sidecar, recorded)
        elif (found := self._applier.contradiction(recorded)) is not None:
            failure = SidecarForeign(found.message, remedy=foreign_remedy(sidecar, recorded))
        else:
            return False
        self.proposer.close()
        self.stop()
        self._on_fatal(failure)
        return True

    def _changed(self) -> None:
        self.proposer.notify()
        self.rotation.poke()

    # --- writer registration --------------------------------------------------------------------

    async def _register_through_leader(self, dek_id: int, epoch: int) -> RegisterReply:
        message = RegisterSelf(dek_id, self._full_node_id, epoch)
        if self._engine.is_leader():
            return await self._register_as_leader(message)
        return _result(
            await self._engine.call(
                require_leader_id(self._engine), forwarding.METHOD_REGISTER_SELF,
                forwarding.encode(message), timeout_s=REGISTER_TIMEOUT_S), RegisterReply)

    async def _serve_register_self(self, peer_id: str, method: str, payload: bytes) -> bytes:
        message = forwarding.decode(payload, RegisterSelf)
        if message.full_node_id != full_id_of(peer_id):
            raise InvalidArgument(f"{peer_id} asks to register node {message.full_node_id:#x},"
                                  " which is not its own id")
        return forwarding.encode(await self._register_as_leader(message))

    async def _register_as_leader(self, message: RegisterSelf) -> RegisterReply:
        return await self._decisions.run(partial(self.operations.register_self, message))

    # --- automatic rotation ---------------------------------------------------------------------

    def _rotation_view(self) -> View:
        leads, sidecar = self._engine.is_leader(), self._applier.sidecar
        return View(leads, self._engine.status().leader_id not in ("", self._engine.node_id),
                    dict(self._dek_facts()) if leads else {},
                    {purpose: sidecar.active(purpose) for purpose in Purpose} if sidecar else {})

    def _dek_facts(self) -> Iterator[tuple[Purpose, DekFacts]]:
        sidecar = self._applier.sidecar
        if sidecar is None:
            return
        for purpose in Purpose:
            dek_id = sidecar.active(purpose)
            rows = self._store.rows(writers_prefix(dek_id))
            yield purpose, DekFacts(
                dek_id, age_s(sidecar.keys[dek_id].created, self._clock.wall_ms()),
                self.budgets.total(dek_id),
                max((decode_row_value(value).last_seen_epoch for _, value in rows), default=0),
                self.budgets.is_spent(dek_id))

    async def rotate_own(self, purpose: Purpose, dek_id: int) -> None:
        """Replace a DEK if it is still the active one. This node must lead."""
        await self._run_operation(RotateDek(purpose, b"", 0, 0, 0, replaces=dek_id))

    # --- gate, leader and deadlines -------------------------------------------------------------

    def gate_open(self) -> bool:
        return self._gate

    def require_kek(self) -> Kek:
        """The KEK. Raises `GateOff` where encryption is switched off."""
        if not self._gate or self._kek is None:
            raise GateOff("encryption is switched off on this node",
                          remedy="start every node with --kekFile and --encryption-enabled")
        return self._kek

    async def _run_operation(self, operation: KeyOperation) -> bytes:
        """Run an operation here, to its end; its msgpack result. This node must lead."""
        try:
            return await self._decisions.run(partial(self.operations.run, operation))
        finally:
            self.ensure_writers()

    async def _serve_admin(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return await self._run_operation(decode_call(payload))

    async def _on_leader(self, operation: KeyOperation, timeout_s: float) -> bytes:
        """Run an operation where it belongs; its msgpack result."""
        self.require_kek()

        def ask(leader_id: str, remaining_s: float) -> Awaitable[bytes]:
            return self._engine.call(leader_id, forwarding.METHOD_ADMIN, encode_call(operation),
                                     timeout_s=remaining_s)

        return await on_leader(
            self._engine, lambda remaining_s: self._run_operation(operation), ask,
            what=operation.name, timeout_s=timeout_s, remedy=LOOK_FIRST, retried=(PeerError,))

    # --- the calls ------------------------------------------------------------------------------

    async def bootstrap(self, *, wrapped_storage: bytes, wrapped_raft: bytes, storage_dek_id: int,
                        raft_dek_id: int, writers: Sequence[WriterRow],
                        timeout_s: float) -> BootstrapResult:
        reply = await self._on_leader(BootstrapKeys(
            wrapped_storage, wrapped_raft, storage_dek_id, raft_dek_id, list(writers)), timeout_s)
        return _result(reply, BootstrapResult)

    async def rotate_dek(self, *, purpose: Purpose, wrapped: bytes, new_dek_id: int,
                         proposer_node_id: int, proposer_local_epoch: int,
                         timeout_s: float) -> RotateResult:
        reply = await self._on_leader(RotateDek(
            purpose, wrapped, new_dek_id, proposer_node_id, proposer_local_epoch), timeout_s)
        return _result(reply, RotateResult)

    async def register_writers(self, *, dek_id: int, writers: Sequence[WriterRow],
                               timeout_s: float) -> int:
        reply = await self._on_leader(RegisterWriters(dek_id, list(writers)), timeout_s)
        return _result(reply, int)

    async def enable_storage_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                      timeout_s: float) -> CutoverResult:
        reply = await self._on_leader(
            EnableStorageEnvelope(proposer_node_id, proposer_local_epoch), timeout_s)
        return _result(reply, CutoverResult)

    async def enable_raft_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                   timeout_s: float) -> CutoverResult:
        reply = await self._on_leader(
            EnableRaftEnvelope(proposer_node_id, proposer_local_epoch), timeout_s)
        return _result(reply, CutoverResult)

    async def resync_sidecar(self, *, caller_full_node_id: int, timeout_s: float) -> SidecarState:
        try:
            reply = await self._on_leader(SidecarStateFor(caller_full_node_id), timeout_s)
        except OutcomeUnknown as error:  # of what is only read
            raise DeadlineExceeded(error.message, remedy="retry") from None
        return forwarding.decode(reply, SidecarState)

    async def capability(self) -> Capability:
        return self.members.capability()

    async def sidecar_state(self) -> SidecarState:
        return self.members.sidecar_state()

    async def member_status(self, *, timeout_s: float) -> Sequence[MemberEncryptionStatus]:
        return await self.members.status(timeout_s)


def _result(reply: bytes, result_type: type[T]) -> T:
    """What the leader answered to an operation that it has carried out."""
    return forwarding.decode_outcome(reply, result_type, LOOK_FIRST)
