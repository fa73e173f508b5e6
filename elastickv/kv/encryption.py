"""The encryption control plane of one node: sealing, confirmed writers, and the admin operations.

Admin operations run on the leader, under one lock that is held from validation until the entry is
decided: the leader validates with the applier's own rules against its applied state, so an
entry that would stop the cluster cannot get into the log through the API (DESIGN section 5).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from elastickv.crypto.cipher import seal_raft
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.crypto.nonce import node_id16
from elastickv.errors import (
    DeadlineExceeded,
    ElasticKVError,
    EncryptionConflict,
    EntryRejected,
    GateOff,
    IntegrityError,
    InvalidArgument,
    NoLeader,
    NotBootstrapped,
    NotCapable,
    OutcomeUnknown,
    PeerError,
)
from elastickv.keys.applier import Applier
from elastickv.keys.registry import WRITERS_PREFIX, decode_row_value, row_key
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
from elastickv.kv.forwarding import AdminCall, RegisterReply, RegisterSelf
from elastickv.kv.proposer import Proposer
from elastickv.kv.txn import Sealer
from elastickv.kv.writers import Registration as WriterRegistration
from elastickv.kv.writers import WriterRegistrar
from elastickv.raft.engine import RaftEngine
from elastickv.store.mvcc_store import Store
from elastickv.store.values import plain_record, seal_record
from elastickv.wire import (
    Bootstrap,
    Registration,
    RegistryRow,
    Rotation,
    RotationTag,
    encode_entry,
)

MEMBER_TIMEOUT_S = 2.0
FIRST_EPOCH = 1

Entry = Registration | Bootstrap | Rotation


class EncryptionController:
    """Keys and writers of one node. Implements `kv.api.EncryptionApi`."""

    def __init__(self, engine: RaftEngine, store: Store, applier: Applier, *, full_node_id: int,
                 kek: Kek | None, gate: bool, build_sha: str,
                 on_fatal: Callable[[BaseException], None]) -> None:
        self._engine = engine
        self._store = store
        self._applier = applier
        self._kek = kek
        self._gate = gate and kek is not None
        self._full_node_id = full_node_id
        self._build_sha = build_sha
        self._lock = asyncio.Lock()
        self._rotating_dek_id = 0
        self._wake: Callable[[], None] = lambda: None
        self._running: set[asyncio.Task[object]] = set()
        self.proposer = Proposer(engine, self.seal_entry)
        self.writers = WriterRegistrar(
            node_id16(full_node_id), local_epoch=self._local_epoch,
            persist=applier.set_local_epoch, register=self._register_through_leader,
            on_confirmed=self._writer_confirmed, on_fatal=on_fatal)
        engine.handle(forwarding.METHOD_CAPABILITY, self._serve_capability)
        engine.handle(forwarding.METHOD_SIDECAR_STATE, self._serve_sidecar_state)
        engine.handle(forwarding.METHOD_REGISTER_SELF, self._serve_register_self)
        engine.handle(forwarding.METHOD_ADMIN, self._serve_admin)

    def set_wake(self, wake: Callable[[], None]) -> None:
        """`wake()` is called when something that writes wait for has changed."""
        self._wake = wake

    # --- sealing (hot path) ---------------------------------------------------------------------

    def record_sealer(self) -> Sealer | None:
        """What makes records now: plain before the storage cutover, sealed after it; None while
        this node's writer of the active storage DEK is not confirmed."""
        sidecar = self._applier.sidecar
        if sidecar is None or not sidecar.storage_envelope_active:
            return _plain_sealer
        dek_id = sidecar.active_storage
        nonces = self.writers.nonces(dek_id)
        if nonces is None:
            return None
        keystore = self._applier.keystore
        handle = _require_handle(keystore, dek_id)
        next_nonce = nonces.next

        def seal(user_key: bytes, commit_ts: int, plaintext: bytes, expiry_ms: int) -> bytes:
            return seal_record(handle, next_nonce(), user_key, commit_ts, plaintext, expiry_ms)

        return seal

    def seal_entry(self, payload: bytes) -> bytes | None:
        """The form in which `payload` goes into the log; None while it may not be sealed."""
        sidecar = self._applier.sidecar
        if sidecar is None or sidecar.raft_envelope_cutover_index == 0:
            return payload
        dek_id = sidecar.active_raft
        nonces = self.writers.nonces(dek_id)
        if nonces is None:
            return None
        keystore = self._applier.keystore
        return seal_raft(_require_handle(keystore, dek_id), nonces.next(), payload)

    def keys_changed(self, index: int) -> None:
        """After an encryption entry: become a writer of what is active now."""
        self.ensure_writers()
        self.proposer.notify()
        self._wake()

    def ensure_writers(self) -> None:
        """Start confirming this node for the active DEKs."""
        sidecar = self._applier.sidecar
        if sidecar is None or not self._gate:
            return
        for dek_id in (sidecar.active_storage, sidecar.active_raft):
            if dek_id and dek_id != self._rotating_dek_id:
                self.writers.ensure(dek_id)

    def _writer_confirmed(self, dek_id: int) -> None:
        self.proposer.notify()
        self._wake()

    def _local_epoch(self, dek_id: int) -> int:
        sidecar = self._applier.sidecar
        key = sidecar.keys.get(dek_id) if sidecar else None
        return key.local_epoch if key else 0

    # --- writer registration --------------------------------------------------------------------

    async def _register_through_leader(self, dek_id: int, epoch: int) -> WriterRegistration:
        message = RegisterSelf(dek_id, self._full_node_id, epoch)
        if self._engine.is_leader():
            reply = await self._register_self(message)
        else:
            leader_id = self._leader_id()
            reply = forwarding.decode(
                await self._engine.call(leader_id, forwarding.METHOD_REGISTER_SELF,
                                        forwarding.encode(message), timeout_s=10.0),
                RegisterReply)
        return WriterRegistration(reply.applied_index != 0, reply.last_seen_epoch)

    async def _serve_register_self(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return forwarding.encode(
            await self._decided(self._register_self(forwarding.decode(payload, RegisterSelf))))

    async def _register_self(self, message: RegisterSelf) -> RegisterReply:
        async with self._lock:
            self.proposer.require_leader()
            value = self._store.row(row_key(message.dek_id, node_id16(message.full_node_id)))
            if value is not None:
                row = decode_row_value(value)
                if row.full_node_id == message.full_node_id \
                        and row.last_seen_epoch >= message.local_epoch:
                    return RegisterReply(0, row.last_seen_epoch)
            index = await self._propose_validated(Registration(
                RegistryRow(message.dek_id, message.full_node_id, message.local_epoch)))
            return RegisterReply(index, message.local_epoch)

    async def _propose_validated(self, entry: Entry, *, barrier: bool = False) -> int:
        """Validate against applied state, propose, and stay until decided. Needs the lock."""
        self.proposer.require_leader()
        try:
            self._applier.validate(self._engine.status().last_log_index + 1, entry)
        except EntryRejected as error:
            raise EncryptionConflict(error.message, remedy=error.remedy) from None
        payload = encode_entry(entry)
        if barrier:
            index = await self.proposer.propose_behind_barrier(payload)
        else:
            index = await self.proposer.propose_settled(payload,
                                                        clear=isinstance(entry, Registration))
        if not isinstance(index, int):
            raise TypeError("an encryption entry must end in its index")
        return index

    # --- gate, leader and deadlines -------------------------------------------------------------

    def gate_open(self) -> bool:
        return self._gate

    def _require_gate(self) -> Kek:
        if not self._gate or self._kek is None:
            raise GateOff("encryption is switched off on this node",
                          remedy="start every node with --kekFile and --encryption-enabled")
        return self._kek

    def _leader_id(self) -> str:
        leader_id = self._engine.status().leader_id
        if not leader_id or leader_id == self._engine.node_id:
            raise NoLeader("the cluster has no leader now; nothing was proposed",
                           remedy="retry; check elastickv admin raft status if it persists")
        return leader_id

    async def _decided(self, operation: Awaitable[object]) -> object:
        """Run to the end even if the caller gives up: the lock must cover the decision."""
        task = asyncio.ensure_future(operation)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()

    async def _on_leader(self, operation: str, arguments: dict[str, object],
                         timeout_s: float) -> bytes:
        """Run an admin operation where it belongs; its msgpack result."""
        self._require_gate()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            remaining_s = deadline - loop.time()
            try:
                if self._engine.is_leader():
                    return await asyncio.wait_for(
                        self._decided_bytes(operation, arguments), remaining_s)
                return await self._engine.call(
                    self._leader_id(), forwarding.METHOD_ADMIN,
                    forwarding.encode(AdminCall(operation, arguments)), timeout_s=remaining_s)
            except TimeoutError:
                raise OutcomeUnknown(
                    f"{operation} was not decided within the deadline",
                    remedy="look at elastickv admin encryption status before a retry") from None
            except (OutcomeUnknown, DeadlineExceeded):
                raise
            except PeerError:  # certainly not proposed: no leader yet, or it moved
                if deadline - loop.time() <= 0.1:
                    raise
                await asyncio.sleep(0.05)

    async def _decided_bytes(self, operation: str, arguments: dict[str, object]) -> bytes:
        result = await self._decided(self._run_admin(operation, arguments))
        if not isinstance(result, bytes):
            raise TypeError("an admin operation must return msgpack bytes")
        return result

    async def _serve_admin(self, peer_id: str, method: str, payload: bytes) -> bytes:
        call = forwarding.decode(payload, AdminCall)
        return await self._decided_bytes(call.operation, call.arguments)

    async def _run_admin(self, operation: str, arguments: dict[str, object]) -> bytes:
        self._require_gate()
        handler = _ADMIN_OPERATIONS.get(operation)
        if handler is None:
            raise InvalidArgument(f"unknown admin operation {operation!r}",
                                  remedy="run the same version on every node")
        self.proposer.require_leader()
        async with self._lock:
            self.proposer.require_leader()
            return forwarding.encode(await handler(self, **arguments))

    # --- admin operations: the calling node's side ----------------------------------------------

    async def bootstrap(self, *, wrapped_storage: bytes, wrapped_raft: bytes, storage_dek_id: int,
                        raft_dek_id: int, writers: Sequence[WriterRow],
                        timeout_s: float) -> BootstrapResult:
        reply = await self._on_leader("bootstrap", {
            "wrapped_storage": wrapped_storage, "wrapped_raft": wrapped_raft,
            "storage_dek_id": storage_dek_id, "raft_dek_id": raft_dek_id,
            "writers": list(writers)}, timeout_s)
        return BootstrapResult(*forwarding.decode(reply, tuple[int, int, int]))

    async def rotate_dek(self, *, purpose: Purpose, wrapped: bytes, new_dek_id: int,
                         proposer_node_id: int, proposer_local_epoch: int,
                         timeout_s: float) -> RotateResult:
        reply = await self._on_leader("rotate_dek", {
            "purpose": int(purpose), "wrapped": wrapped, "new_dek_id": new_dek_id,
            "proposer_node_id": proposer_node_id,
            "proposer_local_epoch": proposer_local_epoch}, timeout_s)
        return RotateResult(*forwarding.decode(reply, tuple[int, int]))

    async def register_writers(self, *, dek_id: int, writers: Sequence[WriterRow],
                               timeout_s: float) -> int:
        reply = await self._on_leader("register_writers", {
            "dek_id": dek_id, "writers": list(writers)}, timeout_s)
        return forwarding.decode(reply, int)

    async def enable_storage_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                      timeout_s: float) -> CutoverResult:
        return await self._cutover("enable_storage_envelope", proposer_node_id,
                                   proposer_local_epoch, timeout_s)

    async def enable_raft_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                   timeout_s: float) -> CutoverResult:
        return await self._cutover("enable_raft_envelope", proposer_node_id,
                                   proposer_local_epoch, timeout_s)

    async def _cutover(self, operation: str, node_id: int, epoch: int,
                       timeout_s: float) -> CutoverResult:
        reply = await self._on_leader(operation, {
            "proposer_node_id": node_id, "proposer_local_epoch": epoch}, timeout_s)
        return forwarding.decode(reply, CutoverResult)

    async def resync_sidecar(self, *, caller_full_node_id: int, timeout_s: float) -> SidecarState:
        reply = await self._on_leader("sidecar_state_for", {
            "caller_full_node_id": caller_full_node_id}, timeout_s)
        return forwarding.decode(reply, SidecarState)

    # --- admin operations: the leader's side (under the lock) -----------------------------------

    async def _lead_bootstrap(self, *, wrapped_storage: bytes, wrapped_raft: bytes,
                              storage_dek_id: int, raft_dek_id: int,
                              writers: list[tuple[int, int]]) -> tuple[int, int, int]:
        if not storage_dek_id:
            if self._applier.sidecar is not None:
                raise EncryptionConflict(
                    "the cluster is already bootstrapped",
                    remedy="use elastickv admin encryption rotate-dek for new keys")
            kek = self._require_gate()
            capable = await self._require_all_capable()
            storage_dek_id = self._fresh_dek_id()
            raft_dek_id = self._fresh_dek_id(other_than=storage_dek_id)
            wrapped_storage = kek.generate_wrapped_dek()
            wrapped_raft = kek.generate_wrapped_dek()
            writers = [(member.full_node_id, member.local_epoch) for member in capable]
        rows = [RegistryRow(dek_id, node, epoch)
                for dek_id in (storage_dek_id, raft_dek_id) for node, epoch in writers]
        index = await self._propose_validated(Bootstrap(
            storage_dek_id, wrapped_storage, raft_dek_id, wrapped_raft, tuple(rows)))
        return index, storage_dek_id, raft_dek_id

    async def _lead_rotate_dek(self, *, purpose: int, wrapped: bytes, new_dek_id: int,
                               proposer_node_id: int,
                               proposer_local_epoch: int) -> tuple[int, int]:
        kek = self._require_gate()
        self._require_bootstrapped()
        own = not new_dek_id
        if own:
            new_dek_id = self._fresh_dek_id()
            wrapped = kek.generate_wrapped_dek()
            proposer_node_id, proposer_local_epoch = self._full_node_id, FIRST_EPOCH
            self._rotating_dek_id = new_dek_id
        try:
            index = await self._propose_validated(Rotation(
                RotationTag.ROTATE_DEK, new_dek_id, purpose, wrapped,
                RegistryRow(new_dek_id, proposer_node_id, proposer_local_epoch)))
            if own:
                self.writers.accept_own_proposal(new_dek_id, FIRST_EPOCH)
        finally:
            self._rotating_dek_id = 0
            self.ensure_writers()
        return index, new_dek_id

    async def _lead_register_writers(self, *, dek_id: int,
                                     writers: list[tuple[int, int]]) -> int:
        self._require_bootstrapped()
        keystore = self._applier.keystore
        if dek_id not in keystore:
            raise EncryptionConflict(f"DEK {dek_id} does not exist",
                                     remedy="see elastickv admin encryption status for the ids")
        index = 0
        for node, epoch in writers:
            index = await self._propose_validated(Registration(RegistryRow(dek_id, node, epoch)))
        return index

    async def _lead_enable_storage(self, *, proposer_node_id: int,
                                   proposer_local_epoch: int) -> CutoverResult:
        self._require_bootstrapped()
        sidecar = self._applier.sidecar
        if sidecar is not None and sidecar.storage_envelope_active:
            cutover = sidecar.storage_envelope_cutover_index
            return CutoverResult(cutover, [], True, cutover_index_unknown=cutover == 0)
        capable = await self._require_all_capable()
        index = await self._propose_cutover(
            RotationTag.ENABLE_STORAGE_ENVELOPE, Purpose.STORAGE, proposer_node_id,
            proposer_local_epoch)
        return CutoverResult(index, capable, False)

    async def _lead_enable_raft(self, *, proposer_node_id: int,
                                proposer_local_epoch: int) -> CutoverResult:
        self._require_bootstrapped()
        sidecar = self._applier.sidecar
        if sidecar is not None and sidecar.raft_envelope_cutover_index:
            return CutoverResult(sidecar.raft_envelope_cutover_index, [], True)
        if sidecar is None or not sidecar.storage_envelope_active:
            raise EncryptionConflict(
                "the storage envelope is not active yet",
                remedy="run elastickv admin encryption enable-storage-envelope first")
        capable = await self._require_all_capable()
        index = await self._propose_cutover(
            RotationTag.ENABLE_RAFT_ENVELOPE, Purpose.RAFT, proposer_node_id,
            proposer_local_epoch)
        return CutoverResult(index, capable, False)

    async def _propose_cutover(self, tag: RotationTag, purpose: Purpose, node_id: int,
                               epoch: int) -> int:
        sidecar = self._applier.sidecar
        if sidecar is None:
            raise NotBootstrapped("the cluster has no DEKs")
        dek_id = sidecar.active_storage if purpose is Purpose.STORAGE else sidecar.active_raft
        if not node_id:
            # The row repeats what is registered already: a cutover makes nobody a writer.
            node_id = self._full_node_id
            epoch = self._registered_epoch(dek_id)
        return await self._propose_validated(
            Rotation(tag, dek_id, int(purpose), b"", RegistryRow(dek_id, node_id, epoch)),
            barrier=tag is RotationTag.ENABLE_RAFT_ENVELOPE)

    def _registered_epoch(self, dek_id: int) -> int:
        value = self._store.row(row_key(dek_id, node_id16(self._full_node_id)))
        return decode_row_value(value).last_seen_epoch if value else 0

    async def _lead_sidecar_state_for(self, *, caller_full_node_id: int) -> SidecarState:
        return await self.sidecar_state(caller_full_node_id)

    def _require_bootstrapped(self) -> None:
        if self._applier.sidecar is None:
            raise NotBootstrapped("the cluster has no DEKs yet",
                                  remedy="run elastickv admin encryption bootstrap first")

    def _fresh_dek_id(self, *, other_than: int = 0) -> int:
        """A random 32-bit id that names no key and no registry row: ids are never used again."""
        sidecar = self._applier.sidecar
        taken = set(sidecar.keys) if sidecar else set()
        while True:
            dek_id = secrets.randbits(32)
            rows = self._store.rows(WRITERS_PREFIX + dek_id.to_bytes(4, "big"))
            if dek_id and dek_id != other_than and dek_id not in taken and not rows:
                return dek_id

    # --- members --------------------------------------------------------------------------------

    async def _require_all_capable(self) -> list[Capability]:
        """Every member's capability; raises `NotCapable` naming each member that stands in the
        way."""
        statuses = await self._ask_members(MEMBER_TIMEOUT_S, with_sidecar=False)
        problems = [f"{status.node_id}: {status.problem}" for status in statuses if status.problem]
        if problems:
            raise NotCapable("not every member is ready for encryption: " + "; ".join(problems),
                             remedy="start each of them with --kekFile and --encryption-enabled")
        return [status.capability for status in statuses if status.capability is not None]

    async def member_status(self, *, timeout_s: float) -> Sequence[MemberEncryptionStatus]:
        return await self._ask_members(min(timeout_s, MEMBER_TIMEOUT_S), with_sidecar=True)

    async def _ask_members(self, timeout_s: float, *,
                           with_sidecar: bool) -> list[MemberEncryptionStatus]:
        return list(await asyncio.gather(
            *(self._ask_member(member.node_id, timeout_s, with_sidecar)
              for member in self._engine.members())))

    async def _ask_member(self, node_id: str, timeout_s: float,
                          with_sidecar: bool) -> MemberEncryptionStatus:
        sidecar: SidecarState | None = None
        try:
            if node_id == self._engine.node_id:
                capability = await self.capability()
                sidecar = await self.sidecar_state() if with_sidecar else None
            else:
                capability = forwarding.decode(
                    await self._engine.call(node_id, forwarding.METHOD_CAPABILITY, b"",
                                            timeout_s=timeout_s), Capability)
                if with_sidecar:
                    sidecar = forwarding.decode(
                        await self._engine.call(node_id, forwarding.METHOD_SIDECAR_STATE, b"",
                                                timeout_s=timeout_s), SidecarState)
        except ElasticKVError as error:
            return MemberEncryptionStatus(node_id, False, None, None,
                                          f"unreachable ({error.message})")
        problem = "" if capability.encryption_capable else \
            "runs without --kekFile or without --encryption-enabled"
        return MemberEncryptionStatus(node_id, True, capability, sidecar, problem)

    async def capability(self) -> Capability:
        sidecar = self._applier.sidecar
        epoch = 0
        if sidecar is not None:
            confirmed = self.writers.epoch(sidecar.active_storage)
            epoch = confirmed if confirmed is not None \
                else self._local_epoch(sidecar.active_storage)
        return Capability(self._full_node_id, self._gate, self._build_sha, sidecar is not None,
                          epoch)

    async def sidecar_state(self, caller_full_node_id: int = 0) -> SidecarState:
        sidecar = self._applier.sidecar
        if sidecar is None:
            return SidecarState({}, 0, 0, False, 0, self._store.applied_index)
        caller16 = node_id16(caller_full_node_id or self._full_node_id)
        registry: dict[int, int] = {}
        for dek_id in sidecar.keys:
            value = self._store.row(row_key(dek_id, caller16))
            if value is not None:
                registry[dek_id] = decode_row_value(value).last_seen_epoch
        return SidecarState(
            {dek_id: key.wrapped for dek_id, key in sidecar.keys.items()},
            sidecar.active_storage, sidecar.active_raft, sidecar.storage_envelope_active,
            sidecar.raft_envelope_cutover_index, self._store.applied_index, registry)

    async def _serve_capability(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return msgspec.msgpack.encode(await self.capability())

    async def _serve_sidecar_state(self, peer_id: str, method: str, payload: bytes) -> bytes:
        return msgspec.msgpack.encode(await self.sidecar_state())


def _require_handle(keystore: Keystore, dek_id: int) -> KeyHandle:
    handle = keystore.get(dek_id)
    if handle is None:
        raise IntegrityError(f"active DEK {dek_id} is not in the keystore",
                             remedy="restore this node's sidecar from the leader")
    return handle


def _plain_sealer(user_key: bytes, commit_ts: int, plaintext: bytes, expiry_ms: int) -> bytes:
    return plain_record(plaintext, expiry_ms)


_ADMIN_OPERATIONS: dict[str, Callable[..., Awaitable[object]]] = {
    "bootstrap": EncryptionController._lead_bootstrap,
    "rotate_dek": EncryptionController._lead_rotate_dek,
    "register_writers": EncryptionController._lead_register_writers,
    "enable_storage_envelope": EncryptionController._lead_enable_storage,
    "enable_raft_envelope": EncryptionController._lead_enable_raft,
    "sidecar_state_for": EncryptionController._lead_sidecar_state_for,
}
