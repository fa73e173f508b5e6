"""RaftAdmin over `raft.engine.RaftEngine` (what this member sees) and `kv.api.MembershipApi` (what
the cluster does)."""

from __future__ import annotations

from elastickv.kv.api import MembershipApi
from elastickv.pb import service_pb2 as pb
from elastickv.raft.engine import RaftEngine
from elastickv.server.methods import Methods, unary


class RaftAdmin:
    """The RaftAdmin service."""

    def __init__(self, engine: RaftEngine, membership: MembershipApi) -> None:
        self._engine = engine
        self._membership = membership

    def methods(self) -> Methods:
        """Methods by name."""
        change = pb.RaftAdminConfigurationChangeResponse
        return {
            "Status": unary(self.status, pb.RaftAdminStatusRequest, pb.RaftAdminStatusResponse),
            "Configuration": unary(self.configuration, pb.RaftAdminConfigurationRequest,
                                   pb.RaftAdminConfigurationResponse),
            "AddVoter": unary(self.add_voter, pb.RaftAdminAddVoterRequest, change),
            "AddLearner": unary(self.add_learner, pb.RaftAdminAddLearnerRequest, change),
            "PromoteLearner": unary(self.promote_learner, pb.RaftAdminPromoteLearnerRequest,
                                    change),
            "RemoveServer": unary(self.remove_server, pb.RaftAdminRemoveServerRequest, change),
            "TransferLeadership": unary(self.transfer, pb.RaftAdminTransferLeadershipRequest,
                                        pb.RaftAdminTransferLeadershipResponse),
        }

    async def status(self, request: pb.RaftAdminStatusRequest,
                     timeout_s: float) -> pb.RaftAdminStatusResponse:
        status = self._engine.status()
        return pb.RaftAdminStatusResponse(
            state=pb.RaftAdminState.ValueType(int(status.role)), leader_id=status.leader_id,
            leader_address=status.leader_address, term=status.term,
            commit_index=status.commit_index, applied_index=status.applied_index,
            last_log_index=status.last_log_index, last_snapshot_index=status.last_snapshot_index,
            fsm_pending=max(0, status.commit_index - status.applied_index),
            num_peers=status.peers, last_contact_nanos=status.last_contact_ns,
            configuration_index=status.configuration_index,
            pending_conf_change=status.pending_configuration, node_id=status.node_id)

    async def configuration(self, request: pb.RaftAdminConfigurationRequest,
                            timeout_s: float) -> pb.RaftAdminConfigurationResponse:
        return pb.RaftAdminConfigurationResponse(servers=[
            pb.RaftAdminMember(id=member.node_id, address=member.address,
                               suffrage=member.suffrage.value,
                               client_address=member.client_address)
            for member in self._engine.members()])

    async def add_voter(self, request: pb.RaftAdminAddVoterRequest,
                        timeout_s: float) -> pb.RaftAdminConfigurationChangeResponse:
        return pb.RaftAdminConfigurationChangeResponse(index=await self._membership.add_voter(
            request.id, request.address, previous_index=request.previous_index,
            timeout_s=timeout_s))

    async def add_learner(self, request: pb.RaftAdminAddLearnerRequest,
                          timeout_s: float) -> pb.RaftAdminConfigurationChangeResponse:
        return pb.RaftAdminConfigurationChangeResponse(index=await self._membership.add_learner(
            request.id, request.address, previous_index=request.previous_index,
            timeout_s=timeout_s))

    async def promote_learner(self, request: pb.RaftAdminPromoteLearnerRequest,
                              timeout_s: float) -> pb.RaftAdminConfigurationChangeResponse:
        return pb.RaftAdminConfigurationChangeResponse(
            index=await self._membership.promote_learner(
                request.id, previous_index=request.previous_index,
                min_applied_index=request.min_applied_index,
                skip_min_applied_check=request.skip_min_applied_check, timeout_s=timeout_s))

    async def remove_server(self, request: pb.RaftAdminRemoveServerRequest,
                            timeout_s: float) -> pb.RaftAdminConfigurationChangeResponse:
        return pb.RaftAdminConfigurationChangeResponse(index=await self._membership.remove_server(
            request.id, previous_index=request.previous_index, timeout_s=timeout_s))

    async def transfer(self, request: pb.RaftAdminTransferLeadershipRequest,
                       timeout_s: float) -> pb.RaftAdminTransferLeadershipResponse:
        await self._membership.transfer_leadership(request.target_id, request.target_address,
                                                   timeout_s=timeout_s)
        return pb.RaftAdminTransferLeadershipResponse()
