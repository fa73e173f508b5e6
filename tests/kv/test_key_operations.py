"""elastickv.kv.key_operations: what a member asks of the leader, as bytes."""

from __future__ import annotations

import msgspec
import pytest

from elastickv.crypto.keystore import Purpose
from elastickv.errors import InvalidArgument, WireError
from elastickv.kv.api import WriterRow
from elastickv.kv.forwarding import METHOD_ADMIN, encode
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
from tests.kv.key_cluster import TIMEOUT_S, MakeCluster

WIDE = (1 << 64) - 1
ROTATION = {"purpose": 2, "wrapped": b"w" * 60, "new_dek_id": 7, "proposer_node_id": WIDE,
            "proposer_local_epoch": 3}

CALLS: dict[str, tuple[KeyOperation, dict[str, object]]] = {
    "bootstrap": (
        BootstrapKeys(b"s" * 60, b"r" * 60, 1, 2, [WriterRow(WIDE, 0), WriterRow(5, 6)]),
        {"wrapped_storage": b"s" * 60, "wrapped_raft": b"r" * 60, "storage_dek_id": 1,
         "raft_dek_id": 2, "writers": [(WIDE, 0), (5, 6)]}),
    "rotate_dek": (RotateDek(Purpose.RAFT, b"w" * 60, 7, WIDE, 3), ROTATION),
    "register_writers": (RegisterWriters(9, [WriterRow(5, 6)]),
                         {"dek_id": 9, "writers": [(5, 6)]}),
    "enable_storage_envelope": (EnableStorageEnvelope(5, 6),
                                {"proposer_node_id": 5, "proposer_local_epoch": 6}),
    "enable_raft_envelope": (EnableRaftEnvelope(0, 0),
                             {"proposer_node_id": 0, "proposer_local_epoch": 0}),
    "sidecar_state_for": (SidecarStateFor(WIDE), {"caller_full_node_id": WIDE}),
}

MALFORMED: dict[str, object] = {
    "an argument is missing": ["rotate_dek", {"purpose": 1, "wrapped": b""}],
    "an argument is unknown": ["rotate_dek", ROTATION | {"urgent": True}],
    "an argument has another type": ["rotate_dek", ROTATION | {"new_dek_id": "7"}],
    "the purpose is unknown": ["rotate_dek", ROTATION | {"purpose": 3}],
    "a writer has no epoch": ["register_writers", {"dek_id": 9, "writers": [[5]]}],
    "there are no arguments": ["rotate_dek"],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_a_name_and_a_map_of_arguments(name: str) -> None:
    """Members of earlier versions read and write the same bytes."""
    operation, arguments = CALLS[name]
    assert encode_call(operation) == msgspec.msgpack.encode([name, arguments])
    assert decode_call(encode_call(operation)) == operation


def test_the_dek_to_be_replaced_is_named_only_where_there_is_one() -> None:
    own = RotateDek(Purpose.RAFT, b"w" * 60, 7, WIDE, 3, replaces=4)
    assert encode_call(own) == msgspec.msgpack.encode(["rotate_dek", ROTATION | {"replaces": 4}])
    assert decode_call(encode_call(own)) == own


def test_an_operation_of_a_newer_version_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="unknown admin operation 'retire_dek'"):
        decode_call(encode(["retire_dek", {}]))


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_call_certainly_changes_nothing(make_cluster: MakeCluster,
                                                          name: str) -> None:
    node = (await make_cluster(1)).nodes["n1"]
    await node.bootstrap()
    before = set(node.sidecar.keys)
    with pytest.raises(WireError, match="malformed"):
        await node.engine.call("n1", METHOD_ADMIN, encode(MALFORMED[name]), timeout_s=TIMEOUT_S)
    assert set(node.sidecar.keys) == before
