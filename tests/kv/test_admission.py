"""elastickv.kv.admission: who may become a member."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from elastickv.crypto.nonce import MAX_EPOCH, full_node_id, node_id16
from elastickv.errors import EncryptionConflict, InvalidArgument, MembershipConflict, NotCapable
from elastickv.keys.registry import WriterRecord, encode_row_value, row_key
from elastickv.kv.admission import (
    MAX_OUTSIDERS,
    Candidate,
    require_admissible,
    require_applied,
    require_free_node_id,
    require_room,
    transfer_target,
    unreachable,
    unregistered,
)
from elastickv.kv.api import Capability
from elastickv.raft.engine import Member

N1, N4 = full_node_id("n1"), full_node_id("n4")
MEMBERS = [Member("n1", "h1:1"), Member("n2", "h2:1"), Member("n3", "h3:1")]


def other_node_with_id_of(node_id: str) -> str:
    """Another name whose 16-bit node id is the same."""
    wanted = node_id16(full_node_id(node_id))
    return next(name for name in (f"x{number}" for number in range(1 << 20))
                if node_id16(full_node_id(name)) == wanted)


TWIN_OF_N1, TWIN_OF_N4 = other_node_with_id_of("n1"), other_node_with_id_of("n4")


def rows(*writers: tuple[int, int]) -> dict[bytes, bytes]:
    """Registry rows of `(dek_id, full_node_id)`."""
    return {row_key(dek_id, node_id16(node)): encode_row_value(WriterRecord(node, 1, 3))
            for dek_id, node in writers}


class Claim(NamedTuple):
    node_id: str
    registry: dict[bytes, bytes]
    refusal: tuple[str, ...]


CLAIMS: dict[str, Claim] = {
    "a free id": Claim("n4", rows((7, N1)), ()),
    "a member itself": Claim("n1", rows((7, N1)), ()),
    "registered before, under the same name": Claim("n4", rows((7, N4), (8, N4)), ()),
    "the id of a member": Claim(TWIN_OF_N1, {}, (TWIN_OF_N1, "member n1", "--raftId")),
    "the id of a writer that is no member":
        Claim("n4", rows((7, N1), (8, full_node_id(TWIN_OF_N4))), ("n4", "DEK 8", "--raftId")),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_node_id_must_be_free(name: str) -> None:
    claim = CLAIMS[name]
    if not claim.refusal:
        require_free_node_id(claim.node_id, MEMBERS, claim.registry)
        return
    with pytest.raises(MembershipConflict) as caught:
        require_free_node_id(claim.node_id, MEMBERS, claim.registry)
    assert all(word in str(caught.value) for word in claim.refusal), str(caught.value)
    assert caught.value.remedy


CAPABLE = Capability(N4, True, "build", False, 0)
GOOD = Candidate("n4", "h4:1", CAPABLE, True)

CANDIDATES: dict[str, tuple[Candidate, tuple[str, ...]]] = {
    "capable": (GOOD, ()),
    "capable, with keys from before": (replace(GOOD, capability=replace(
        CAPABLE, sidecar_present=True, local_epoch=9)), ()),
    "somebody else": (replace(GOOD, capability=replace(CAPABLE, full_node_id=N1)),
                      ("h4:1", "is not n4")),
    "at another address": (replace(GOOD, raft_address="h5:1"), ("n4", "h5:1", "--raftAddress")),
    "without encryption": (replace(GOOD, capability=replace(CAPABLE, encryption_capable=False)),
                           ("n4", "--kekFile", "--encryption-enabled")),
    "with another KEK": (replace(GOOD, unwraps=False), ("KEK of n4", "start n4")),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidate(name: str) -> None:
    candidate, refusal = CANDIDATES[name]
    if not refusal:
        require_admissible(candidate, "h4:1")
        return
    with pytest.raises(NotCapable) as caught:
        require_admissible(candidate, "h4:1")
    assert all(word in str(caught.value) for word in refusal), str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("encrypted", [True, False])
def test_who_does_not_answer_is_to_be_started_as_the_cluster_is(encrypted: bool) -> None:
    error = unreachable("n4", "h4:1", "no link", encrypted=encrypted)
    assert "n4 at h4:1" in error.message
    assert "start n4 with --raftJoin" in error.remedy
    assert ("--kekFile" in error.remedy, "--encryption-enabled" in error.remedy) \
        == (encrypted, encrypted)


@pytest.mark.parametrize(("registry", "missing"), [
    ({}, [7, 8, 9]),
    (rows((8, N4)), [7, 9]),
    (rows((7, N1), (8, N1), (9, N1)), [7, 8, 9]),
    (rows((7, N4), (8, N4), (9, N4)), []),
], ids=["none", "one", "only another's", "all"])
def test_unregistered(registry: dict[bytes, bytes], missing: list[int]) -> None:
    assert unregistered("n4", [7, 8, 9], registry) == missing


@pytest.mark.parametrize(("target_id", "address", "expected"), [
    ("", "", ""), ("n2", "", "n2"), ("", "h3:1", "n3"), ("n2", "h2:1", "n2"),
], ids=["the leader's choice", "by id", "by address", "by both"])
def test_transfer_target(target_id: str, address: str, expected: str) -> None:
    assert transfer_target(MEMBERS, target_id, address) == expected


@pytest.mark.parametrize(("target_id", "address"), [("n9", ""), ("", "h9:1"), ("n2", "h3:1")],
                         ids=["unknown id", "unknown address", "they do not belong together"])
def test_transfer_target_that_is_none(target_id: str, address: str) -> None:
    with pytest.raises(InvalidArgument, match="is no member"):
        transfer_target(MEMBERS, target_id, address)


@pytest.mark.parametrize(("applied", "required", "refused"), [
    (10, 10, False), (11, 10, False), (9, 10, True), (0, 0, False)])
def test_require_applied(applied: int, required: int, refused: bool) -> None:
    if not refused:
        require_applied("n4", applied, required)
        return
    with pytest.raises(MembershipConflict, match=f"n4 has applied entry {applied}, {required}"):
        require_applied("n4", applied, required)


@pytest.mark.parametrize(("active", "refused"), [((7, 8), True), ((8, 9), False), ((), False)])
def test_a_node_needs_an_epoch_of_every_active_dek(active: tuple[int, ...], refused: bool) -> None:
    """Of a DEK that is not active any more it makes no nonces: a rotation is remedy enough."""
    key = row_key(7, node_id16(N4))
    registry = {key: encode_row_value(WriterRecord(N4, 1, MAX_EPOCH))}
    if not refused:
        require_free_node_id("n4", MEMBERS, registry, active)
        return
    with pytest.raises(MembershipConflict, match="every epoch of DEK 7"):
        require_free_node_id("n4", MEMBERS, registry, active)


def outsiders(first: int, count: int) -> list[int]:
    """64-bit node ids with 16-bit ids of their own, none of them a member's."""
    taken = {node_id16(full_node_id(member.node_id)) for member in MEMBERS}
    free = [short for short in range(1, 1 << 16) if short not in taken]
    return [1 << 40 | short for short in free[first:first + count]]


FULL = [(7, node) for node in outsiders(0, MAX_OUTSIDERS)]

ROOM: dict[str, tuple[list[int], dict[bytes, bytes], bool]] = {
    "nobody": ([], rows(*FULL), True),
    "as many as there may be": (outsiders(0, MAX_OUTSIDERS), rows((7, N1)), True),
    "one more": (outsiders(0, MAX_OUTSIDERS + 1), rows((7, N1)), False),
    "the last that there may be": (outsiders(MAX_OUTSIDERS - 1, 1), rows(*FULL[:-1]), True),
    "one more than are registered": (outsiders(MAX_OUTSIDERS, 1), rows(*FULL), False),
    "one that is registered, for another DEK": (outsiders(5, 1), rows(*FULL), True),
    "a member": ([N1], rows(*FULL), True),
    "members do not count": (outsiders(MAX_OUTSIDERS - 1, 1), rows((7, N1), *FULL[:-1]), True),
}


@pytest.mark.parametrize("name", ROOM)
def test_registered_strangers_leave_room_for_members(name: str) -> None:
    writers, registry, allowed = ROOM[name]
    if allowed:
        require_room(writers, MEMBERS, registry.items())
        return
    with pytest.raises(EncryptionConflict, match=str(MAX_OUTSIDERS)) as caught:
        require_room(writers, MEMBERS, registry.items())
    assert caught.value.remedy
