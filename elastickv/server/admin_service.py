"""EncryptionAdmin over `kv.api.EncryptionApi`: request rules (pure) and translation."""

from __future__ import annotations

from collections.abc import Sequence

from elastickv.crypto.kek import WRAPPED_BYTES
from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import MAX_EPOCH, node_id16
from elastickv.errors import GateOff, InvalidArgument
from elastickv.kv.api import (
    Capability,
    DekStatus,
    EncryptionApi,
    SidecarState,
    WriterRow,
)
from elastickv.kv.turns import Turns
from elastickv.pb import encryption_admin_pb2 as pb
from elastickv.server.methods import Methods, unary

_PURPOSES = frozenset(int(purpose) for purpose in Purpose)
_LEADER_MAKES = "fill in every field, or none and let the leader make them"
MAX_WRITERS = 1024


def check_epoch(epoch: int, field: str) -> None:
    """Raise `InvalidArgument` for an epoch that is wider than the 16 bits of a nonce."""
    if epoch > MAX_EPOCH:
        raise InvalidArgument(f"{field} is {epoch}; the limit is {MAX_EPOCH:#06x}",
                              remedy="use an epoch of 0 to 65535")


def check_writers(entries: Sequence[pb.WriterRegistryEntry], field: str) -> list[WriterRow]:
    """The rows; `InvalidArgument` for a zero node, a wide epoch, or two of one 16-bit node id."""
    if len(entries) > MAX_WRITERS:
        raise InvalidArgument(f"{field} has {len(entries)} rows; the limit is {MAX_WRITERS}",
                              remedy="register them in several requests")
    rows: list[WriterRow] = []
    seen: set[int] = set()
    for entry in entries:
        check_epoch(entry.local_epoch, f"{field}.local_epoch")
        if entry.full_node_id == 0:
            raise InvalidArgument(f"{field}.full_node_id is 0",
                                  remedy="take ids from elastickv admin encryption probe-node-id")
        short = node_id16(entry.full_node_id)
        if short in seen:
            raise InvalidArgument(f"{field} names the 16-bit node id {short:#06x} twice",
                                  remedy="list every writer once")
        seen.add(short)
        rows.append(WriterRow(entry.full_node_id, entry.local_epoch))
    return rows


def check_dek_id(dek_id: int, field: str) -> None:
    """Raise `InvalidArgument` for 0, which means "not bootstrapped" and is never a key."""
    if dek_id == 0:
        raise InvalidArgument(f"{field} is 0, which is never a key",
                              remedy="name a DEK id of elastickv admin encryption status")


def check_wrapped(wrapped: bytes, field: str) -> None:
    """Raise `InvalidArgument` for a wrapped DEK of another length than the one that there is; b""
    is for the leader to make."""
    if wrapped and len(wrapped) != WRAPPED_BYTES:
        raise InvalidArgument(f"{field} has {len(wrapped)} bytes; it must have {WRAPPED_BYTES}",
                              remedy="give a DEK that is wrapped under the cluster's KEK, or leave"
                                     " every field empty and let the leader make it")


def all_or_none(fields: Sequence[tuple[str, object]]) -> bool:
    """True when every field is filled in, False when none is; `InvalidArgument` in between."""
    empty = [name for name, value in fields if not value]
    if empty and len(empty) != len(fields):
        raise InvalidArgument(f"half-filled request: {', '.join(empty)} left empty",
                              remedy=_LEADER_MAKES)
    return not empty


def check_bootstrap(request: pb.BootstrapEncryptionRequest) -> list[WriterRow]:
    """Raise `InvalidArgument` for a bootstrap that could never be proposed; the writer rows."""
    writers = check_writers(request.writer_batch, "writer_batch")
    filled = all_or_none([
        ("wrapped_storage_dek", request.wrapped_storage_dek),
        ("wrapped_raft_dek", request.wrapped_raft_dek),
        ("storage_dek_id", request.storage_dek_id), ("raft_dek_id", request.raft_dek_id),
        ("writer_batch", writers)])
    check_wrapped(request.wrapped_storage_dek, "wrapped_storage_dek")
    check_wrapped(request.wrapped_raft_dek, "wrapped_raft_dek")
    if filled and request.storage_dek_id == request.raft_dek_id:
        raise InvalidArgument(f"storage_dek_id and raft_dek_id are both {request.raft_dek_id}",
                              remedy="use two different ids")
    return writers


def check_rotate(request: pb.RotateDEKRequest) -> Purpose:
    """Raise `InvalidArgument` for a rotation that could never be proposed; the purpose."""
    if int(request.purpose) not in _PURPOSES:
        raise InvalidArgument(f"purpose is {request.purpose}",
                              remedy="use PURPOSE_STORAGE (1) or PURPOSE_RAFT (2)")
    check_epoch(request.proposer_local_epoch, "proposer_local_epoch")
    filled = all_or_none([("wrapped_new_dek", request.wrapped_new_dek),
                          ("new_dek_id", request.new_dek_id),
                          ("proposer_node_id", request.proposer_node_id)])
    check_wrapped(request.wrapped_new_dek, "wrapped_new_dek")
    if not filled and request.proposer_local_epoch:
        raise InvalidArgument("half-filled request: only proposer_local_epoch is set",
                              remedy=_LEADER_MAKES)
    return Purpose(int(request.purpose))


def check_proposer(node_id: int, epoch: int) -> None:
    """Raise `InvalidArgument` for a cutover's proposer with an epoch and no node. With neither the
    leader proposes; 0 is an epoch, too."""
    check_epoch(epoch, "proposer_local_epoch")
    if not node_id and epoch:
        raise InvalidArgument("half-filled request: proposer_local_epoch without proposer_node_id",
                              remedy=_LEADER_MAKES)


def check_caller(full_node_id: int) -> None:
    """Raise `InvalidArgument` for nobody. A resync is for one node: without its registry rows it
    could take an epoch that was used."""
    if full_node_id == 0:
        raise InvalidArgument("caller_full_node_id is 0",
                              remedy="take it from elastickv admin encryption probe-node-id")


class EncryptionAdmin:
    """The EncryptionAdmin service."""

    def __init__(self, api: EncryptionApi) -> None:
        self._api = api
        self._turns = Turns()

    def methods(self) -> Methods:
        """Methods by name."""
        return {
            "GetCapability": unary(self.capability, pb.Empty, pb.CapabilityReport),
            "GetSidecarState": unary(self.sidecar_state, pb.Empty, pb.SidecarStateReport),
            "BootstrapEncryption": unary(self.bootstrap, pb.BootstrapEncryptionRequest,
                                         pb.BootstrapEncryptionResponse, turns=self._turns),
            "RotateDEK": unary(self.rotate_dek, pb.RotateDEKRequest, pb.RotateDEKResponse),
            "RegisterEncryptionWriter": unary(self.register_writers,
                                              pb.RegisterEncryptionWriterRequest,
                                              pb.RegisterEncryptionWriterResponse,
                                              turns=self._turns),
            "ResyncSidecar": unary(self.resync_sidecar, pb.ResyncSidecarRequest,
                                   pb.ResyncSidecarResponse),
            "EnableStorageEnvelope": unary(self.enable_storage, pb.EnableStorageEnvelopeRequest,
                                           pb.EnableStorageEnvelopeResponse),
            "EnableRaftEnvelope": unary(self.enable_raft, pb.EnableRaftEnvelopeRequest,
                                        pb.EnableRaftEnvelopeResponse),
            "GetMemberStatus": unary(self.member_status, pb.Empty, pb.MemberStatusReport),
        }

    def _require_gate(self) -> None:
        if not self._api.gate_open():
            raise GateOff("encryption is switched off on this node",
                          remedy="start every node with --kekFile and --encryption-enabled")

    async def capability(self, request: pb.Empty, timeout_s: float) -> pb.CapabilityReport:
        return _report(await self._api.capability())

    async def sidecar_state(self, request: pb.Empty, timeout_s: float) -> pb.SidecarStateReport:
        return _sidecar_report(await self._api.sidecar_state())

    async def bootstrap(self, request: pb.BootstrapEncryptionRequest,
                        timeout_s: float) -> pb.BootstrapEncryptionResponse:
        self._require_gate()
        writers = check_bootstrap(request)
        result = await self._api.bootstrap(
            wrapped_storage=request.wrapped_storage_dek, wrapped_raft=request.wrapped_raft_dek,
            storage_dek_id=request.storage_dek_id, raft_dek_id=request.raft_dek_id,
            writers=writers, timeout_s=timeout_s)
        return pb.BootstrapEncryptionResponse(
            applied_index=result.applied_index, storage_dek_id=result.storage_dek_id,
            raft_dek_id=result.raft_dek_id)

    async def rotate_dek(self, request: pb.RotateDEKRequest,
                         timeout_s: float) -> pb.RotateDEKResponse:
        self._require_gate()
        purpose = check_rotate(request)
        result = await self._api.rotate_dek(
            purpose=purpose, wrapped=request.wrapped_new_dek, new_dek_id=request.new_dek_id,
            proposer_node_id=request.proposer_node_id,
            proposer_local_epoch=request.proposer_local_epoch, timeout_s=timeout_s)
        return pb.RotateDEKResponse(applied_index=result.applied_index,
                                    new_dek_id=result.new_dek_id)

    async def register_writers(self, request: pb.RegisterEncryptionWriterRequest,
                               timeout_s: float) -> pb.RegisterEncryptionWriterResponse:
        self._require_gate()
        check_dek_id(request.dek_id, "dek_id")
        writers = check_writers(request.writers, "writers")
        if not writers:
            raise InvalidArgument("writers is empty", remedy="name at least one writer")
        index = await self._api.register_writers(dek_id=request.dek_id, writers=writers,
                                                 timeout_s=timeout_s)
        return pb.RegisterEncryptionWriterResponse(applied_index=index)

    async def resync_sidecar(self, request: pb.ResyncSidecarRequest,
                             timeout_s: float) -> pb.ResyncSidecarResponse:
        self._require_gate()
        check_caller(request.caller_full_node_id)
        state: SidecarState = await self._api.resync_sidecar(
            caller_full_node_id=request.caller_full_node_id, timeout_s=timeout_s)
        return pb.ResyncSidecarResponse(
            wrapped_deks_by_id=state.wrapped_deks_by_id,
            active_storage_id=state.active_storage_id, active_raft_id=state.active_raft_id,
            leader_latest_applied_index=state.latest_applied_index,
            writer_registry_for_caller=state.writer_registry_for_caller,
            storage_envelope_active=state.storage_envelope_active,
            storage_envelope_cutover_index=state.storage_envelope_cutover_index,
            raft_envelope_cutover_index=state.raft_envelope_cutover_index,
            sidecar_index=state.sidecar_index, purposes_by_id=state.purposes_by_id,
            created_by_id=state.created_by_id)

    async def enable_storage(self, request: pb.EnableStorageEnvelopeRequest,
                             timeout_s: float) -> pb.EnableStorageEnvelopeResponse:
        self._require_gate()
        check_proposer(request.proposer_node_id, request.proposer_local_epoch)
        result = await self._api.enable_storage_envelope(
            proposer_node_id=request.proposer_node_id,
            proposer_local_epoch=request.proposer_local_epoch, timeout_s=timeout_s)
        return pb.EnableStorageEnvelopeResponse(
            applied_index=result.applied_index,
            capability_summary=[_verdict(c) for c in result.capabilities],
            cutover_index_unknown=result.cutover_index_unknown,
            was_already_active=result.was_already_active)

    async def enable_raft(self, request: pb.EnableRaftEnvelopeRequest,
                          timeout_s: float) -> pb.EnableRaftEnvelopeResponse:
        self._require_gate()
        check_proposer(request.proposer_node_id, request.proposer_local_epoch)
        result = await self._api.enable_raft_envelope(
            proposer_node_id=request.proposer_node_id,
            proposer_local_epoch=request.proposer_local_epoch, timeout_s=timeout_s)
        return pb.EnableRaftEnvelopeResponse(
            applied_index=result.applied_index,
            capability_summary=[_verdict(c) for c in result.capabilities],
            was_already_active=result.was_already_active)

    async def member_status(self, request: pb.Empty, timeout_s: float) -> pb.MemberStatusReport:
        return pb.MemberStatusReport(members=[
            pb.MemberStatus(
                node_id=member.node_id, reachable=member.reachable,
                problem=next(iter(member.problems), ""), problems=member.problems,
                deks=[_dek(dek) for dek in member.deks],
                capability=_report(member.capability) if member.capability else None,
                sidecar=_sidecar_report(member.sidecar) if member.sidecar else None)
            for member in await self._api.member_status(timeout_s=timeout_s)])


def _report(capability: Capability) -> pb.CapabilityReport:
    return pb.CapabilityReport(
        encryption_capable=capability.encryption_capable, build_sha=capability.build_sha,
        sidecar_present=capability.sidecar_present, full_node_id=capability.full_node_id,
        local_epoch=capability.local_epoch)


def _sidecar_report(state: SidecarState) -> pb.SidecarStateReport:
    return pb.SidecarStateReport(
        wrapped_deks_by_id=state.wrapped_deks_by_id,
        active_storage_id=state.active_storage_id, active_raft_id=state.active_raft_id,
        storage_envelope_active=state.storage_envelope_active,
        raft_envelope_cutover_index=state.raft_envelope_cutover_index,
        latest_applied_index=state.latest_applied_index,
        writer_registry_for_caller=state.writer_registry_for_caller,
        storage_envelope_cutover_index=state.storage_envelope_cutover_index,
        sidecar_index=state.sidecar_index, purposes_by_id=state.purposes_by_id,
        created_by_id=state.created_by_id)


def _dek(dek: DekStatus) -> pb.DekStatus:
    return pb.DekStatus(
        dek_id=dek.dek_id, purpose=dek.purpose, active=dek.active, writer_state=dek.writer_state,
        epoch=dek.epoch, local_epoch=dek.local_epoch, writes=dek.writes,
        writes_left=dek.writes_left)


def _verdict(capability: Capability) -> pb.CapabilityVerdict:
    return pb.CapabilityVerdict(
        full_node_id=capability.full_node_id, encryption_capable=capability.encryption_capable,
        build_sha=capability.build_sha, sidecar_present=capability.sidecar_present)
