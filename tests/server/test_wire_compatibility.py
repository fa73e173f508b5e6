"""proto/service.proto beside the Go project's: a client of either must work against this node."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor

from elastickv.pb import service_pb2 as pb

# Of the messages that both have, every field of the Go project. A field that is added here has a
# number from `FIRST_ADDED`.
SHARED: dict[str, str] = {
    "RawPutRequest": "bytes key=1, bytes value=2",
    "RawPutResponse": "uint64 commit_index=1, bool success=2",
    "RawGetRequest": "bytes key=1, uint64 ts=3, uint64 group_id=4",
    "RawGetResponse": "uint64 read_at_index=1, bytes value=2, bool exists=3",
    "RawDeleteRequest": "bytes key=1",
    "RawDeleteResponse": "uint64 commit_index=1, bool success=2",
    "RawLatestCommitTSRequest": "bytes key=1",
    "RawLatestCommitTSResponse": "uint64 ts=1, bool exists=2",
    "RawScanAtRequest": "bytes start_key=1, bytes end_key=2, int64 limit=3, uint64 ts=4,"
                        " bool reverse=5, uint64 group_id=6, bool keys_only=7",
    "RawKVPair": "bytes key=1, bytes value=2",
    "RawScanAtResponse": "repeated RawKVPair kv=1",
    "PutRequest": "bytes key=1, bytes value=2",
    "PutResponse": "uint64 commit_index=1, bool success=2",
    "GetRequest": "bytes key=1",
    "GetResponse": "uint64 read_at_index=1, bytes value=2",
    "DeleteRequest": "bytes key=1",
    "DeleteResponse": "uint64 commit_index=1, bool success=2",
    "ScanRequest": "bytes start_key=1, bytes end_key=2, uint64 limit=3",
    "ScanResponse": "repeated Kv kv=1",
    "Kv": "KeyError error=1, bytes key=2, bytes value=3",
    "KeyError": "string message=1, bool retryable=2",
    "PreWriteRequest": "repeated Kv mutations=2, uint64 start_ts=3, uint64 lock_ttl=4",
    "PreCommitResponse": "repeated KeyError errors=1",
    "CommitRequest": "uint64 start_ts=1, repeated bytes keys=2",
    "CommitResponse": "uint64 commit_index=1, bool success=2, repeated KeyError errors=3",
    "RollbackRequest": "uint64 start_ts=1",
    "RollbackResponse": "bool success=1",
    "RaftAdminStatusResponse": "RaftAdminState state=1, string leader_id=2,"
                               " string leader_address=3, uint64 term=4, uint64 commit_index=5,"
                               " uint64 applied_index=6, uint64 last_log_index=7,"
                               " uint64 last_snapshot_index=8, uint64 fsm_pending=9,"
                               " uint64 num_peers=10, int64 last_contact_nanos=11,"
                               " uint64 configuration_index=12, bool pending_conf_change=13",
    "RaftAdminMember": "string id=1, string address=2, string suffrage=3",
    "RaftAdminConfigurationResponse": "repeated RaftAdminMember servers=1",
    "RaftAdminAddVoterRequest": "string id=1, string address=2, uint64 previous_index=3",
    "RaftAdminAddLearnerRequest": "string id=1, string address=2, uint64 previous_index=3",
    "RaftAdminPromoteLearnerRequest": "string id=1, uint64 previous_index=2,"
                                      " uint64 min_applied_index=3,"
                                      " bool skip_min_applied_check=4",
    "RaftAdminRemoveServerRequest": "string id=1, uint64 previous_index=2",
    "RaftAdminConfigurationChangeResponse": "uint64 index=1",
    "RaftAdminTransferLeadershipRequest": "string target_id=1, string target_address=2",
}
FIRST_ADDED = 16
SCALARS = {FieldDescriptor.TYPE_BYTES: "bytes", FieldDescriptor.TYPE_STRING: "string",
           FieldDescriptor.TYPE_BOOL: "bool", FieldDescriptor.TYPE_UINT64: "uint64",
           FieldDescriptor.TYPE_INT64: "int64"}


def described(field: FieldDescriptor) -> str:
    named = field.message_type or field.enum_type
    kind = named.name if named else SCALARS[field.type]
    repeated = "repeated " if field.is_repeated else ""
    return f"{repeated}{kind} {field.name}={field.number}"


@pytest.mark.parametrize("name", SHARED)
def test_fields_keep_their_numbers(name: str) -> None:
    fields = pb.DESCRIPTOR.message_types_by_name[name].fields
    assert ", ".join(described(field) for field in fields
                     if field.number < FIRST_ADDED) == SHARED[name]
