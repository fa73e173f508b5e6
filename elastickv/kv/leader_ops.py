"""The leader's side of every operation that changes keys, one at a time.

One lock is held from validation until the entry is decided: the leader validates with the applier's
own rules against its applied state, so an entry that would stop the cluster cannot get into the
log through the API. Two operations that race are thereby two in a row.

Registrations take the same lock and are what makes a node a writer. Hence nothing may wait for a
writer while it holds the lock: an operation waits first, and starts anew when it was too early.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence

from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import node_id16
from elastickv.errors import (
    ElasticKVError,
    EncryptionConflict,
    EntryRejected,
    NodeIdCollision,
    NotBootstrapped,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
)
from elastickv.keys.applier import Applier
from elastickv.keys.epochs import FIRST_EPOCH
from elastickv.keys.registry import WRITERS_PREFIX, find_writer, writers_prefix
from elastickv.keys.sidecar import Sidecar
from elastickv.kv import forwarding
from elastickv.kv.admission import (
    require_epochs_left,
    require_no_member_shadowed,
    require_room,
)
from elastickv.kv.api import BootstrapResult, CutoverResult, RotateResult, WriterRow
from elastickv.kv.forwarding import RegisterReply, RegisterSelf
from elastickv.kv.key_operations import (
    BootstrapKeys,
    EnableRaftEnvelope,
    EnableStorageEnvelope,
    KeyOperation,
    RegisterWriters,
    RotateDek,
    SidecarStateFor,
)
from elastickv.kv.members import Members
from elastickv.kv.proposer import NotSealable, Proposer
from elastickv.kv.usage import NonceBudgets
from elastickv.kv.writers import WriterRegistrar
from elastickv.raft.engine import RaftEngine
from elastickv.store.mvcc_store import Store
from elastickv.wire import (
    Bootstrap,
    EncryptionEntry,
    Registration,
    RegistryRow,
    Rotation,
    RotationTag,
    encode_entry,
)

PREPARE_TIMEOUT_S = 10.0

MAX_UNDER_WAY = 32
"""Key changes that wait for one another, each to its end, also when its caller has given up: more
would hold up the registrations of writers, which wait behind them."""


class LeaderOperations:
    """Validates and proposes key changes. Every member has one; only the leader's does anything."""

    def __init__(self, engine: RaftEngine, store: Store, applier: Applier, proposer: Proposer,
                 writers: WriterRegistrar, budgets: NonceBudgets, members: Members, *,
                 full_node_id: int, require_gate: Callable[[], Kek]) -> None:
        self._engine = engine
        self._store = store
        self._applier = applier
        self._proposer = proposer
        self._writers = writers
        self._budgets = budgets
        self._members = members
        self._full_node_id = full_node_id
        self._require_gate = require_gate
        self.lock = asyncio.Lock()
        """Held while a key change is decided; a node is added under it too (`kv.membership`)."""
        self._term = 0
        """In which the operation that holds the lock began."""
        self._under_way = 0

    async def run(self, operation: KeyOperation) -> bytes:
        """Run an operation, once this node may; its msgpack result.

        Raises `NotLeader`, `Overloaded` and other `PeerError`s only where certainly nothing was
        proposed.
        """
        self._require_gate()
        if isinstance(operation, SidecarStateFor):
            return await self._run(operation)
        if self._under_way >= MAX_UNDER_WAY:
            raise Overloaded(f"{self._under_way} key changes are under way",
                             remedy="retry when they have ended")
        self._under_way += 1
        try:
            return await self._run(operation)
        finally:
            self._under_way -= 1

    async def _run(self, operation: KeyOperation) -> bytes:
        while True:
            self._proposer.require_leader()
            if operation.proposes:
                await self._prepare(operation.seals_under)
            async with self.lock:
                self._begin()
                try:
                    return forwarding.encode(await self._carry_out(operation))
                except (NotSealable, LedElsewhere):
                    continue

    async def _carry_out(self, operation: KeyOperation) -> object:
        match operation:
            case BootstrapKeys():
                return await self._bootstrap(operation)
            case RotateDek():
                return await self._rotate_dek(operation)
            case RegisterWriters():
                return await self._register_writers(operation)
            case EnableStorageEnvelope():
                return await self._enable_storage(operation)
            case EnableRaftEnvelope():
                return await self._enable_raft(operation)
            case SidecarStateFor():
                return self._members.sidecar_state(operation.caller_full_node_id)

    def _begin(self) -> None:
        """What follows is decided by what this leadership knows. Needs the lock, which is this
        process's alone: under another leadership anything may have been decided meanwhile."""
        self._proposer.require_leader()
        self._term = self._engine.status().term

    async def _prepare(self, purpose: Purpose | None) -> None:
        """Wait until the entry can be sealed and, for a cutover that is not made yet, until what
        follows it can be."""
        await self._proposer.wait_sealable(timeout_s=PREPARE_TIMEOUT_S)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PREPARE_TIMEOUT_S
        while purpose is not None and (sidecar := self._applier.sidecar) is not None \
                and not sidecar.is_cut_over(purpose):
            if self._budgets.take(sidecar.active(purpose), 1) is not None:
                return
            self._proposer.require_leader()
            if loop.time() >= deadline:
                raise NotSealable(f"the leader may not seal under the {purpose.label} DEK yet",
                                  remedy="retry; look at elastickv admin encryption status")
            await self._proposer.wait_change(timeout_s=0.1)

    # --- writer registration --------------------------------------------------------------------

    async def register_self(self, message: RegisterSelf) -> RegisterReply:
        """Commit a member's registration, if its epoch is above what the registry holds.

        Raises `NodeIdCollision` when another node has its 16-bit id, `EncryptionConflict` for a
        DEK that the cluster does not have.
        """
        async with self.lock:
            self._begin()
            row = find_writer(self._store.row, message.dek_id, message.full_node_id)
            if row is not None:
                if row.full_node_id != message.full_node_id:
                    raise NodeIdCollision(
                        f"node {row.full_node_id:#x} is registered for DEK {message.dek_id} under"
                        f" the 16-bit id {node_id16(message.full_node_id):#06x} of this node")
                if row.last_seen_epoch >= message.local_epoch:
                    return RegisterReply(0, row.last_seen_epoch)
            self._require_known(message.dek_id)
            index = await self._propose_validated(Registration(
                RegistryRow(message.dek_id, message.full_node_id, message.local_epoch)))
            return RegisterReply(index, message.local_epoch)

    async def _register_writers(self, operation: RegisterWriters) -> int:
        self._require_bootstrapped()
        self._require_known(operation.dek_id)
        rows = [RegistryRow(operation.dek_id, node, epoch) for node, epoch in operation.writers]
        self._require_registrable(operation.writers)
        require_no_member_shadowed([row.full_node_id for row in rows], self._engine.members())
        try:
            self._applier.validate_writers(rows)
        except EntryRejected as error:
            raise EncryptionConflict(error.message, remedy=error.remedy) from None
        index = 0
        for done, row in enumerate(rows):
            try:
                index = await self._propose_validated(Registration(row))
            except ElasticKVError as error:
                if not done or isinstance(error, OutcomeUnknown):
                    raise
                raise OutcomeUnknown(
                    f"{done} of {len(rows)} writers are registered: {error.message}",
                    remedy="register them again, which changes nothing for those that are"
                    ) from error
        return index

    def _require_registrable(self, writers: Sequence[tuple[int, int]]) -> None:
        """Raise `EncryptionConflict` for writers (64-bit node id, epoch) that a caller may not
        name."""
        members = self._engine.members()
        require_epochs_left(writers, members)
        require_room([writer for writer, _ in writers], members, self._store.rows(WRITERS_PREFIX))

    def _require_known(self, dek_id: int) -> None:
        if dek_id not in self._applier.keystore:
            raise EncryptionConflict(
                f"the cluster has no DEK {dek_id}",
                remedy="see elastickv admin encryption status for the ids; a member that asks for"
                       " another one needs elastickv admin encryption resync-sidecar")

    # --- proposing ------------------------------------------------------------------------------

    async def _propose_validated(self, entry: EncryptionEntry, *, barrier: bool = False,
                                 then: Callable[[], None] | None = None) -> int:
        """Validate against applied state, propose, and stay until decided. Needs the lock.

        `then()` runs when the entry is in the log and not yet decided. Raises `LedElsewhere` if
        what the caller found before may be out of date.
        """
        self._proposer.require_leader()
        if self._engine.status().term != self._term:
            raise LedElsewhere("another member led meanwhile; nothing was proposed")
        require_no_member_shadowed(_writers_of(entry), self._engine.members())
        try:
            self._applier.validate(self._engine.status().last_log_index + 1, entry)
        except EntryRejected as error:
            raise EncryptionConflict(error.message, remedy=error.remedy) from None
        payload = encode_entry(entry)
        if barrier:
            index = await self._proposer.propose_behind_barrier(payload)
        else:
            index = await self._proposer.propose_settled(
                payload, clear=isinstance(entry, Registration), then=then)
        if not isinstance(index, int):
            raise TypeError("an encryption entry must end in its index")
        return index

    # --- keys -----------------------------------------------------------------------------------

    async def _bootstrap(self, operation: BootstrapKeys) -> BootstrapResult:
        if not operation.storage_dek_id:
            operation = await self._own_bootstrap()
        storage_dek_id, wrapped_storage = operation.storage_dek_id, operation.wrapped_storage
        raft_dek_id, wrapped_raft = operation.raft_dek_id, operation.wrapped_raft
        await self._members.require_unwraps([wrapped_storage, wrapped_raft])
        self._require_registrable(operation.writers)
        rows = [RegistryRow(dek_id, node, epoch)
                for dek_id in (storage_dek_id, raft_dek_id) for node, epoch in operation.writers]
        sidecar = self._applier.sidecar
        if sidecar is not None and all(map(self._has_registered, rows)) \
                and sidecar.holds_active(Purpose.STORAGE, storage_dek_id, wrapped_storage) \
                and sidecar.holds_active(Purpose.RAFT, raft_dek_id, wrapped_raft):
            return BootstrapResult(sidecar.raft_applied_index, storage_dek_id, raft_dek_id)
        index = await self._propose_validated(Bootstrap(
            storage_dek_id, wrapped_storage, raft_dek_id, wrapped_raft, tuple(rows)))
        return BootstrapResult(index, storage_dek_id, raft_dek_id)

    async def _own_bootstrap(self) -> BootstrapKeys:
        """New keys, with every member as a writer."""
        if self._applier.sidecar is not None:
            raise EncryptionConflict(
                "the cluster is already bootstrapped",
                remedy="use elastickv admin encryption rotate-dek for new keys")
        kek = self._require_gate()
        capable = await self._members.require_all_capable()
        storage_dek_id = self._fresh_dek_id()
        return BootstrapKeys(
            kek.generate_wrapped_dek(), kek.generate_wrapped_dek(), storage_dek_id,
            self._fresh_dek_id(other_than=storage_dek_id),
            [WriterRow(member.full_node_id, member.local_epoch) for member in capable])

    async def _rotate_dek(self, operation: RotateDek) -> RotateResult:
        active = self._require_bootstrapped().active(operation.purpose)
        if operation.replaces not in (0, active):
            return RotateResult(0, active)
        if operation.new_dek_id:
            return await self._rotate_to(operation)
        return await self._rotate_own(operation.purpose)

    async def _rotate_to(self, operation: RotateDek) -> RotateResult:
        """To the DEK that the caller brings."""
        dek_id, wrapped = operation.new_dek_id, operation.wrapped
        row = RegistryRow(dek_id, operation.proposer_node_id, operation.proposer_local_epoch)
        await self._members.require_unwraps([wrapped])
        self._require_registrable([(row.full_node_id, row.local_epoch)])
        sidecar = self._require_bootstrapped()
        if sidecar.holds_active(operation.purpose, dek_id, wrapped) and self._has_registered(row):
            return RotateResult(sidecar.raft_applied_index, dek_id)
        return RotateResult(await self._propose_validated(Rotation(
            RotationTag.ROTATE_DEK, dek_id, int(operation.purpose), wrapped, row)), dek_id)

    async def _rotate_own(self, purpose: Purpose) -> RotateResult:
        """To a new DEK, which registers this process and reserves its first nonces."""
        dek_id, wrapped = self._fresh_dek_id(), self._require_gate().generate_wrapped_dek()
        await self._members.require_unwraps([wrapped])
        entry = Rotation(RotationTag.ROTATE_DEK, dek_id, int(purpose), wrapped,
                         RegistryRow(dek_id, self._full_node_id, FIRST_EPOCH))
        self._writers.begin_rotation(dek_id)
        applied = False
        try:
            index = await self._propose_validated(
                entry, then=lambda: self._budgets.reserve_first(dek_id, FIRST_EPOCH))
            applied = True
        finally:
            self._writers.end_rotation(dek_id, FIRST_EPOCH, applied=applied)
        return RotateResult(index, dek_id)

    # --- cutovers -------------------------------------------------------------------------------

    async def _enable_storage(self, operation: EnableStorageEnvelope) -> CutoverResult:
        sidecar = self._require_bootstrapped()
        if sidecar.storage_envelope_active:
            cutover = sidecar.storage_envelope_cutover_index
            return CutoverResult(cutover, [], True, cutover_index_unknown=cutover == 0)
        capable = await self._members.require_all_capable()
        index = await self._propose_cutover(
            RotationTag.ENABLE_STORAGE_ENVELOPE, Purpose.STORAGE, operation.proposer_node_id,
            operation.proposer_local_epoch)
        return CutoverResult(index, capable, False)

    async def _enable_raft(self, operation: EnableRaftEnvelope) -> CutoverResult:
        sidecar = self._require_bootstrapped()
        if sidecar.raft_envelope_cutover_index:
            return CutoverResult(sidecar.raft_envelope_cutover_index, [], True)
        if not sidecar.storage_envelope_active:
            raise EncryptionConflict(
                "the storage envelope is not active yet",
                remedy="run elastickv admin encryption enable-storage-envelope first")
        capable = await self._members.require_all_capable()
        index = await self._propose_cutover(
            RotationTag.ENABLE_RAFT_ENVELOPE, Purpose.RAFT, operation.proposer_node_id,
            operation.proposer_local_epoch)
        return CutoverResult(index, capable, False)

    async def _propose_cutover(self, tag: RotationTag, purpose: Purpose, node_id: int,
                               epoch: int) -> int:
        dek_id = self._require_bootstrapped().active(purpose)
        self._require_registrable([(node_id, epoch)] if node_id else [])
        if not node_id:
            # The row repeats what is registered already: a cutover makes nobody a writer.
            node_id = self._full_node_id
            epoch = self._members.registered_epoch(dek_id, node_id) or 0
        return await self._propose_validated(
            Rotation(tag, dek_id, int(purpose), b"", RegistryRow(dek_id, node_id, epoch)),
            barrier=tag is RotationTag.ENABLE_RAFT_ENVELOPE)

    def _has_registered(self, row: RegistryRow) -> bool:
        """Whether the registry holds a writer with this epoch or, as it goes on by itself, a later
        one. With the key in place, too, a request has been carried out before: its caller did not
        hear of that and asks again."""
        found = find_writer(self._store.row, row.dek_id, row.full_node_id)
        return (found is not None and found.full_node_id == row.full_node_id
                and found.first_seen_epoch <= row.local_epoch <= found.last_seen_epoch)

    # --- the rest -------------------------------------------------------------------------------

    def _require_bootstrapped(self) -> Sidecar:
        sidecar = self._applier.sidecar
        if sidecar is None:
            raise NotBootstrapped("the cluster has no DEKs yet",
                                  remedy="run elastickv admin encryption bootstrap first")
        return sidecar

    def _fresh_dek_id(self, *, other_than: int = 0) -> int:
        """A random 32-bit id that names no key and no registry row: ids are never used again."""
        sidecar = self._applier.sidecar
        taken = set(sidecar.keys) if sidecar else set()
        while True:
            dek_id = secrets.randbits(32)
            rows = self._store.rows(writers_prefix(dek_id))
            if dek_id and dek_id != other_than and dek_id not in taken and not rows:
                return dek_id


class LedElsewhere(NotLeader):
    """This node leads again: what an operation found out before may have changed under another
    leader. Certainly nothing was proposed."""


def _writers_of(entry: EncryptionEntry) -> list[int]:
    """The 64-bit ids of the nodes that the entry registers."""
    match entry:
        case Registration(row=row):
            return [row.full_node_id]
        case Bootstrap(rows=rows):
            return [row.full_node_id for row in rows]
        case Rotation(proposer=row):
            return [row.full_node_id]
