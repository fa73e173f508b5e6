"""elastickv.server.admin_service: the rules of a request, and nothing proposed where they fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from memory_node import Faults, MemoryEncryption

from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import full_node_id, node_id16
from elastickv.errors import GateOff, InvalidArgument
from elastickv.kv.api import WriterRow
from elastickv.pb import encryption_admin_pb2 as pb
from elastickv.server.admin_service import (
    MAX_WRITERS,
    EncryptionAdmin,
    check_bootstrap,
    check_caller,
    check_dek_id,
    check_proposer,
    check_rotate,
    check_writers,
)

WRAPPED = b"w" * 60
N1 = full_node_id("n1")
N2 = full_node_id("n2")
SAME_16_BITS = N1 ^ (1 << 40)


def row(node: int = N1, epoch: int = 1) -> pb.WriterRegistryEntry:
    return pb.WriterRegistryEntry(full_node_id=node, local_epoch=epoch)


def bootstrap(**fields: object) -> pb.BootstrapEncryptionRequest:
    whole = {"wrapped_storage_dek": WRAPPED, "wrapped_raft_dek": WRAPPED, "storage_dek_id": 1,
             "raft_dek_id": 2, "writer_batch": [row()]}
    return pb.BootstrapEncryptionRequest(**{**whole, **fields})


def rotate(**fields: object) -> pb.RotateDEKRequest:
    whole = {"purpose": pb.RotateDEKRequest.PURPOSE_STORAGE, "wrapped_new_dek": WRAPPED,
             "new_dek_id": 3, "proposer_node_id": N1, "proposer_local_epoch": 4}
    return pb.RotateDEKRequest(**{**whole, **fields})


def test_the_16_bit_collision_is_one() -> None:
    assert node_id16(SAME_16_BITS) == node_id16(N1)
    assert SAME_16_BITS != N1


ACCEPTED: dict[str, tuple[Callable[[], object], object]] = {
    "bootstrap, filled in": (lambda: check_bootstrap(bootstrap()), [WriterRow(N1, 1)]),
    "bootstrap, left to the leader": (
        lambda: check_bootstrap(pb.BootstrapEncryptionRequest()), []),
    "largest epoch": (lambda: check_writers([row(epoch=0xFFFF)], "w"), [WriterRow(N1, 0xFFFF)]),
    "epoch 0": (lambda: check_writers([row(epoch=0)], "w"), [WriterRow(N1, 0)]),
    "two nodes": (lambda: check_writers([row(), row(N2, 9)], "w"),
                  [WriterRow(N1, 1), WriterRow(N2, 9)]),
    "rotation, filled in": (lambda: check_rotate(rotate()), Purpose.STORAGE),
    "rotation, epoch 0": (lambda: check_rotate(rotate(proposer_local_epoch=0)), Purpose.STORAGE),
    "rotation, left to the leader": (
        lambda: check_rotate(pb.RotateDEKRequest(purpose=pb.RotateDEKRequest.PURPOSE_RAFT)),
        Purpose.RAFT),
    "cutover, left to the leader": (lambda: check_proposer(0, 0), None),
    "cutover, named": (lambda: check_proposer(N1, 5), None),
    "cutover, named with epoch 0": (lambda: check_proposer(N1, 0), None),
    "a DEK": (lambda: check_dek_id(1, "dek_id"), None),
    "a caller": (lambda: check_caller(N1), None),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    check, expected = ACCEPTED[name]
    assert check() == expected


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "writer epoch of 17 bits": (lambda: check_writers([row(epoch=0x10000)], "w"), "0xffff"),
    "writer without a node": (lambda: check_writers([row(0)], "w"), "full_node_id is 0"),
    "the same writer twice": (lambda: check_writers([row(), row()], "w"), "twice"),
    "the same node at two epochs": (lambda: check_writers([row(), row(epoch=2)], "w"), "twice"),
    "two writers of one 16-bit id": (lambda: check_writers([row(), row(SAME_16_BITS)], "w"),
                                     "twice"),
    "too many writers": (
        lambda: check_writers([row(node) for node in range(1, MAX_WRITERS + 2)], "w"),
        str(MAX_WRITERS)),
    "bootstrap without the storage DEK": (
        lambda: check_bootstrap(bootstrap(wrapped_storage_dek=b"")), "wrapped_storage_dek"),
    "bootstrap without the raft DEK": (
        lambda: check_bootstrap(bootstrap(wrapped_raft_dek=b"")), "wrapped_raft_dek"),
    "bootstrap with a short storage DEK": (
        lambda: check_bootstrap(bootstrap(wrapped_storage_dek=WRAPPED[:59])), "must have 60"),
    "bootstrap with a long raft DEK": (
        lambda: check_bootstrap(bootstrap(wrapped_raft_dek=WRAPPED + b"w")), "must have 60"),
    "bootstrap with storage_dek_id 0": (
        lambda: check_bootstrap(bootstrap(storage_dek_id=0)), "storage_dek_id"),
    "bootstrap with raft_dek_id 0": (
        lambda: check_bootstrap(bootstrap(raft_dek_id=0)), "raft_dek_id"),
    "bootstrap without writers": (
        lambda: check_bootstrap(bootstrap(writer_batch=[])), "writer_batch"),
    "bootstrap with ids only": (
        lambda: check_bootstrap(pb.BootstrapEncryptionRequest(storage_dek_id=1, raft_dek_id=2)),
        "half-filled"),
    "bootstrap with writers only": (
        lambda: check_bootstrap(pb.BootstrapEncryptionRequest(writer_batch=[row()])),
        "half-filled"),
    "bootstrap with one id twice": (
        lambda: check_bootstrap(bootstrap(raft_dek_id=1)), "both 1"),
    "bootstrap with a wide epoch": (
        lambda: check_bootstrap(bootstrap(writer_batch=[row(epoch=1 << 31)])), "0xffff"),
    "bootstrap with duplicate writers": (
        lambda: check_bootstrap(bootstrap(writer_batch=[row(), row()])), "twice"),
    "rotation without a purpose": (lambda: check_rotate(rotate(purpose=0)), "purpose"),
    "rotation of an unknown purpose": (lambda: check_rotate(rotate(purpose=3)), "purpose"),
    "rotation with new_dek_id 0": (lambda: check_rotate(rotate(new_dek_id=0)), "new_dek_id"),
    "rotation without a wrapped key": (
        lambda: check_rotate(rotate(wrapped_new_dek=b"")), "wrapped_new_dek"),
    "rotation with a long key": (
        lambda: check_rotate(rotate(wrapped_new_dek=bytes(1 << 20))), "must have 60"),
    "rotation without a proposer": (
        lambda: check_rotate(rotate(proposer_node_id=0)), "proposer_node_id"),
    "rotation with a wide epoch": (
        lambda: check_rotate(rotate(proposer_local_epoch=0x10000)), "0xffff"),
    "rotation with an epoch only": (
        lambda: check_rotate(pb.RotateDEKRequest(
            purpose=pb.RotateDEKRequest.PURPOSE_RAFT, proposer_local_epoch=1)), "half-filled"),
    "rotation with a proposer only": (
        lambda: check_rotate(pb.RotateDEKRequest(
            purpose=pb.RotateDEKRequest.PURPOSE_RAFT, proposer_node_id=N1)), "half-filled"),
    "cutover with an epoch only": (lambda: check_proposer(0, 1), "half-filled"),
    "cutover with a wide epoch": (lambda: check_proposer(N1, 0x10000), "0xffff"),
    "DEK 0": (lambda: check_dek_id(0, "dek_id"), "dek_id is 0"),
    "resync for nobody": (lambda: check_caller(0), "caller_full_node_id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    check, named = REFUSED[name]
    with pytest.raises(InvalidArgument) as caught:
        check()
    assert named in str(caught.value)
    assert caught.value.remedy


MUTATIONS: dict[str, object] = {
    "bootstrap": pb.BootstrapEncryptionRequest(),
    "rotate_dek": rotate(),
    "register_writers": pb.RegisterEncryptionWriterRequest(dek_id=1, writers=[row()]),
    "resync_sidecar": pb.ResyncSidecarRequest(caller_full_node_id=N1),
    "enable_storage": pb.EnableStorageEnvelopeRequest(),
    "enable_raft": pb.EnableRaftEnvelopeRequest(),
}
INVALID: dict[str, object] = {
    "bootstrap": bootstrap(storage_dek_id=0),
    "rotate_dek": rotate(purpose=0),
    "register_writers": pb.RegisterEncryptionWriterRequest(dek_id=0, writers=[row()]),
    "resync_sidecar": pb.ResyncSidecarRequest(),
    "enable_storage": pb.EnableStorageEnvelopeRequest(proposer_local_epoch=1),
    "enable_raft": pb.EnableRaftEnvelopeRequest(proposer_local_epoch=1),
}


@pytest.mark.parametrize("requests", [MUTATIONS, INVALID], ids=["valid", "invalid"])
@pytest.mark.parametrize("method", MUTATIONS)
async def test_a_gate_that_is_off_comes_before_everything(
        method: str, requests: dict[str, object]) -> None:
    api = MemoryEncryption(Faults(), "n1", gate=False)
    with pytest.raises(GateOff) as caught:
        await getattr(EncryptionAdmin(api), method)(requests[method], 1.0)
    assert "--encryption-enabled" in caught.value.remedy
    assert api.proposals == []


@pytest.mark.parametrize("method", INVALID)
async def test_an_invalid_request_proposes_nothing(method: str) -> None:
    api = MemoryEncryption(Faults(), "n1", gate=True)
    await EncryptionAdmin(api).bootstrap(pb.BootstrapEncryptionRequest(), 1.0)
    proposed = list(api.proposals)
    with pytest.raises(InvalidArgument):
        await getattr(EncryptionAdmin(api), method)(INVALID[method], 1.0)
    assert api.proposals == proposed


async def test_reading_needs_no_gate() -> None:
    service = EncryptionAdmin(MemoryEncryption(Faults(), "n1", gate=False))
    assert not (await service.capability(pb.Empty(), 1.0)).encryption_capable
    assert (await service.sidecar_state(pb.Empty(), 1.0)).active_storage_id == 0
    assert len((await service.member_status(pb.Empty(), 1.0)).members) == 2
