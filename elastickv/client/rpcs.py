"""Every remote method once: its path, its message types, and whether it changes anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from elastickv.pb import encryption_admin_pb2 as admin_pb
from elastickv.pb import service_pb2 as pb


class Message(Protocol):
    """The one thing that a request must be able to do."""

    def SerializeToString(self) -> bytes: ...


RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT")


@dataclass(frozen=True, slots=True, eq=False)
class Rpc(Generic[RequestT, ResponseT]):
    """`path` is `/Service/Method`. `write` decides what may be retried."""

    path: str
    request: type[RequestT]
    parse: Callable[[bytes], ResponseT]
    write: bool


def _read(path: str, request: type[RequestT],
          parse: Callable[[bytes], ResponseT]) -> Rpc[RequestT, ResponseT]:
    return Rpc(path, request, parse, write=False)


def _write(path: str, request: type[RequestT],
           parse: Callable[[bytes], ResponseT]) -> Rpc[RequestT, ResponseT]:
    return Rpc(path, request, parse, write=True)


RAW_PUT = _write("/RawKV/RawPut", pb.RawPutRequest, pb.RawPutResponse.FromString)
RAW_GET = _read("/RawKV/RawGet", pb.RawGetRequest, pb.RawGetResponse.FromString)
RAW_DELETE = _write("/RawKV/RawDelete", pb.RawDeleteRequest, pb.RawDeleteResponse.FromString)
RAW_LATEST = _read("/RawKV/RawLatestCommitTS", pb.RawLatestCommitTSRequest,
                   pb.RawLatestCommitTSResponse.FromString)
RAW_SCAN = _read("/RawKV/RawScanAt", pb.RawScanAtRequest, pb.RawScanAtResponse.FromString)
RAW_BATCH = _write("/RawKV/RawBatch", pb.RawBatchRequest, pb.RawBatchResponse.FromString)

CAPABILITY = _read("/EncryptionAdmin/GetCapability", admin_pb.Empty,
                   admin_pb.CapabilityReport.FromString)
SIDECAR = _read("/EncryptionAdmin/GetSidecarState", admin_pb.Empty,
                admin_pb.SidecarStateReport.FromString)
MEMBERS = _read("/EncryptionAdmin/GetMemberStatus", admin_pb.Empty,
                admin_pb.MemberStatusReport.FromString)
RESYNC = _read("/EncryptionAdmin/ResyncSidecar", admin_pb.ResyncSidecarRequest,
               admin_pb.ResyncSidecarResponse.FromString)
BOOTSTRAP = _write("/EncryptionAdmin/BootstrapEncryption", admin_pb.BootstrapEncryptionRequest,
                   admin_pb.BootstrapEncryptionResponse.FromString)
ROTATE = _write("/EncryptionAdmin/RotateDEK", admin_pb.RotateDEKRequest,
                admin_pb.RotateDEKResponse.FromString)
REGISTER = _write("/EncryptionAdmin/RegisterEncryptionWriter",
                  admin_pb.RegisterEncryptionWriterRequest,
                  admin_pb.RegisterEncryptionWriterResponse.FromString)
ENABLE_STORAGE = _write("/EncryptionAdmin/EnableStorageEnvelope",
                        admin_pb.EnableStorageEnvelopeRequest,
                        admin_pb.EnableStorageEnvelopeResponse.FromString)
ENABLE_RAFT = _write("/EncryptionAdmin/EnableRaftEnvelope", admin_pb.EnableRaftEnvelopeRequest,
                     admin_pb.EnableRaftEnvelopeResponse.FromString)

RAFT_STATUS = _read("/RaftAdmin/Status", pb.RaftAdminStatusRequest,
                    pb.RaftAdminStatusResponse.FromString)
RAFT_CONFIGURATION = _read("/RaftAdmin/Configuration", pb.RaftAdminConfigurationRequest,
                           pb.RaftAdminConfigurationResponse.FromString)
_CHANGE = pb.RaftAdminConfigurationChangeResponse.FromString
ADD_VOTER = _write("/RaftAdmin/AddVoter", pb.RaftAdminAddVoterRequest, _CHANGE)
ADD_LEARNER = _write("/RaftAdmin/AddLearner", pb.RaftAdminAddLearnerRequest, _CHANGE)
PROMOTE = _write("/RaftAdmin/PromoteLearner", pb.RaftAdminPromoteLearnerRequest, _CHANGE)
REMOVE = _write("/RaftAdmin/RemoveServer", pb.RaftAdminRemoveServerRequest, _CHANGE)
TRANSFER = _write("/RaftAdmin/TransferLeadership", pb.RaftAdminTransferLeadershipRequest,
                  pb.RaftAdminTransferLeadershipResponse.FromString)
