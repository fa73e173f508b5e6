"""Between messages and the client's own values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from elastickv.client.model import (
    Capability,
    Condition,
    CutoverResult,
    DekStatus,
    Delete,
    MemberEncryption,
    Purpose,
    Put,
    RaftMember,
    RaftStatus,
    Role,
    SidecarState,
    Writer,
)
from elastickv.errors import WireError
from elastickv.pb import encryption_admin_pb2 as admin_pb
from elastickv.pb import service_pb2 as pb

MAX_EPOCH = 0xFFFF


def batch_request(ops: Iterable[Put | Delete],
                  conditions: Iterable[Condition]) -> pb.RawBatchRequest:
    """A batch as it goes over the wire."""
    return pb.RawBatchRequest(
        ops=[pb.RawBatchOp(kind=pb.RawBatchOp.DELETE, key=op.key) if isinstance(op, Delete)
             else pb.RawBatchOp(kind=pb.RawBatchOp.PUT, key=op.key, value=op.value,
                                ttl_ms=op.ttl_ms)
             for op in ops],
        conditions=[pb.RawBatchCondition(key=condition.key, commit_ts=condition.commit_ts)
                    for condition in conditions])


def writer_entries(writers: Sequence[Writer]) -> list[admin_pb.WriterRegistryEntry]:
    """Registry rows as they go over the wire."""
    return [admin_pb.WriterRegistryEntry(full_node_id=writer.full_node_id,
                                         local_epoch=writer.local_epoch) for writer in writers]


def registry(rows: Mapping[int, int]) -> dict[int, int]:
    """DEK id to epoch. Raises `WireError` for an epoch that does not fit a nonce."""
    for dek_id, epoch in rows.items():
        if epoch > MAX_EPOCH:
            raise WireError(f"the registry gives epoch {epoch} for DEK {dek_id}; the limit is "
                            f"{MAX_EPOCH}", remedy="run the same version on every member")
    return dict(rows)


def capability(report: admin_pb.CapabilityReport) -> Capability:
    """A member's answer to GetCapability."""
    return Capability(report.full_node_id, report.encryption_capable, report.build_sha,
                      report.sidecar_present, report.local_epoch)


def sidecar(report: admin_pb.SidecarStateReport) -> SidecarState:
    """A member's answer to GetSidecarState."""
    return SidecarState(
        dict(report.wrapped_deks_by_id), report.active_storage_id, report.active_raft_id,
        report.storage_envelope_active, report.raft_envelope_cutover_index,
        report.latest_applied_index, registry(report.writer_registry_for_caller),
        report.storage_envelope_cutover_index, report.sidecar_index,
        dict(report.purposes_by_id), dict(report.created_by_id))


def resync(response: admin_pb.ResyncSidecarResponse) -> SidecarState:
    """The leader's answer to ResyncSidecar."""
    return SidecarState(
        dict(response.wrapped_deks_by_id), response.active_storage_id, response.active_raft_id,
        response.storage_envelope_active, response.raft_envelope_cutover_index,
        response.leader_latest_applied_index, registry(response.writer_registry_for_caller),
        response.storage_envelope_cutover_index, response.sidecar_index,
        dict(response.purposes_by_id), dict(response.created_by_id))


def dek(status: admin_pb.DekStatus) -> DekStatus:
    """One DEK of a member. Raises `WireError` for a purpose that this version does not know."""
    if status.purpose not in {int(purpose) for purpose in Purpose}:
        raise WireError(f"DEK {status.dek_id} has the unknown purpose {status.purpose}",
                        remedy="use the version of the members")
    return DekStatus(status.dek_id, Purpose(status.purpose), status.active, status.writer_state,
                     status.epoch, status.local_epoch, status.writes, status.writes_left)


def member(status: admin_pb.MemberStatus) -> MemberEncryption:
    """One member's row."""
    return MemberEncryption(
        status.node_id, status.reachable,
        capability(status.capability) if status.HasField("capability") else None,
        sidecar(status.sidecar) if status.HasField("sidecar") else None, status.problem,
        tuple(status.problems), tuple(map(dek, status.deks)))


def cutover(response: admin_pb.EnableStorageEnvelopeResponse
            | admin_pb.EnableRaftEnvelopeResponse) -> CutoverResult:
    """The result of either cutover."""
    unknown = (isinstance(response, admin_pb.EnableStorageEnvelopeResponse)
               and response.cutover_index_unknown)
    return CutoverResult(
        response.applied_index, response.was_already_active, unknown,
        tuple(Capability(verdict.full_node_id, verdict.encryption_capable, verdict.build_sha,
                         verdict.sidecar_present) for verdict in response.capability_summary))


def raft_status(response: pb.RaftAdminStatusResponse) -> RaftStatus:
    """A member's Raft counters; a state that this version does not know is UNKNOWN."""
    known = response.state in {int(role) for role in Role}
    return RaftStatus(
        response.node_id, Role(response.state) if known else Role.UNKNOWN, response.leader_id,
        response.leader_address, response.term, response.commit_index, response.applied_index,
        response.last_log_index, response.last_snapshot_index, response.fsm_pending,
        response.num_peers, response.last_contact_nanos, response.configuration_index,
        response.pending_conf_change)


def raft_member(message: pb.RaftAdminMember) -> RaftMember:
    """One member of the configuration."""
    return RaftMember(message.id, message.address, message.suffrage, message.client_address)
