"""Who may become a member: pure rules, each refusal naming the node and the remedy.

They protect two promises. A member that cannot decrypt would stop at the first key entry that it
applies, so it must be shown capable before it is a member. Two members with the same 16-bit node
id would make the same nonces, so the id must be free, and is taken in the registry beforehand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from elastickv.crypto.nonce import MAX_EPOCH, full_node_id, node_id16
from elastickv.errors import EncryptionConflict, InvalidArgument, MembershipConflict, NotCapable
from elastickv.keys.registry import decode_row_key, decode_row_value, find_writer
from elastickv.kv.api import Capability
from elastickv.raft.engine import Member
from elastickv.raft.membership import LOOK_REMEDY, leads_to

MAX_OUTSIDERS = 1024
"""16-bit node ids that operators may register for nodes that are no members."""

_RENAME = ("give the new node another --raftId; elastickv admin encryption probe-node-id shows"
           " which ids collide")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a node that is to become a member answered. `raft_address` is its own --raftAddress;
    `unwraps` whether its KEK opens the cluster's DEKs."""

    node_id: str
    raft_address: str
    capability: Capability
    unwraps: bool


def require_free_node_id(node_id: str, members: Iterable[Member], rows: Mapping[bytes, bytes],
                         active: Collection[int] = ()) -> None:
    """Raise `MembershipConflict` if another member, or a writer that was ever registered, has the
    16-bit node id of `node_id`, or if the node has used every epoch of a DEK that is `active`.
    `rows` is the writer registry."""
    full_id = full_node_id(node_id)
    short_id = node_id16(full_id)
    for member in members:
        if member.node_id != node_id and node_id16(full_node_id(member.node_id)) == short_id:
            raise MembershipConflict(
                f"{node_id} has the 16-bit node id {short_id:#06x} of member {member.node_id}",
                remedy=_RENAME)
    for key, value in rows.items():
        dek_id, registered = decode_row_key(key)
        writer = decode_row_value(value).full_node_id
        if registered == short_id and writer != full_id:
            raise MembershipConflict(
                f"{node_id} has the 16-bit node id {short_id:#06x} of node {writer:#x}, which was"
                f" registered as a writer of DEK {dek_id}", remedy=_RENAME)
        if registered == short_id and dek_id in active \
                and decode_row_value(value).last_seen_epoch >= MAX_EPOCH:
            raise MembershipConflict(f"{node_id} has used every epoch of DEK {dek_id}",
                                     remedy="rotate that DEK first")


def require_no_member_shadowed(writers: Iterable[int], members: Iterable[Member]) -> None:
    """Raise `EncryptionConflict` if a writer that is to be registered (a 64-bit node id) has the
    16-bit id of a member and is no member: that one could never register, and would stop."""
    names = {full_node_id(member.node_id): member.node_id for member in members}
    short_ids = {node_id16(full_id): name for full_id, name in names.items()}
    for writer in writers:
        name = short_ids.get(node_id16(writer))
        if name is not None and writer not in names:
            raise EncryptionConflict(
                f"node {writer:#x} has the 16-bit node id {node_id16(writer):#06x} of member"
                f" {name}",
                remedy="name writers by their 64-bit node ids; elastickv admin encryption"
                       " probe-node-id shows them")


def require_epochs_left(writers: Iterable[tuple[int, int]], members: Iterable[Member]) -> None:
    """Raise `EncryptionConflict` if a member (its 64-bit node id and an epoch) is to be registered
    with the last epoch that there is: it takes the one after, and would stop."""
    names = {full_node_id(member.node_id): member.node_id for member in members}
    for writer, epoch in writers:
        if epoch >= MAX_EPOCH and writer in names:
            raise EncryptionConflict(
                f"epoch {epoch} is the last one, and member {names[writer]} takes the one after"
                " what is registered for it", remedy="name an epoch that the member has used, or 0")


def require_room(writers: Iterable[int], members: Iterable[Member],
                 rows: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise `EncryptionConflict` if registering `writers` (64-bit node ids) would take more 16-bit
    ids for nodes that are no members than a cluster can need: rows are never removed, and without a
    free id no member can be added. `rows` is the writer registry."""
    own = {node_id16(full_node_id(member.node_id)) for member in members}
    wanted = {node_id16(writer) for writer in writers} - own
    if not wanted:
        return
    known = {decode_row_key(key)[1] for key, _ in rows} - own
    if not wanted <= known and len(wanted | known) > MAX_OUTSIDERS:
        raise EncryptionConflict(
            f"{len(known)} nodes that are no members are registered as writers; the limit is"
            f" {MAX_OUTSIDERS}",
            remedy="add a node before it is registered: elastickv admin raft add-learner registers"
                   " it")


def require_admissible(candidate: Candidate, address: str) -> None:
    """Raise `NotCapable` unless the node is who and where the request says, and can decrypt."""
    name = candidate.node_id
    if candidate.capability.full_node_id != full_node_id(name):
        raise NotCapable(f"the node at {address} is not {name}",
                         remedy="check the id and the raft address in the request")
    require_reached_as(candidate.raft_address, name, address)
    if not candidate.capability.encryption_capable:
        raise NotCapable(f"{name} runs without a KEK or without --encryption-enabled",
                         remedy=f"start {name} with --kekFile and --encryption-enabled, then"
                                " repeat the request")
    if not candidate.unwraps:
        raise NotCapable(f"the KEK of {name} does not open the cluster's DEKs",
                         remedy=f"start {name} with the KEK that the other members have, then"
                                " repeat the request")


def require_reached_as(raft_address: str, name: str, address: str) -> None:
    """Raise `NotCapable` unless the node's own --raftAddress is the one in the request."""
    if raft_address != address:
        raise NotCapable(
            f"{name} is reached by members at {raft_address}, not at {address}",
            remedy=f"repeat the request with {raft_address}, or start the node with"
                   f" --raftAddress {address}")


def require_known_address(member: Member | None, raft_address: str) -> None:
    """Raise `MembershipConflict` for a learner that the members know by another address than its
    --raftAddress: it would not start again (`raft.membership.require_own_address`)."""
    if member is not None and not leads_to(member.address, raft_address):
        raise MembershipConflict(
            f"{member.node_id} was added at {member.address}, and its --raftAddress is"
            f" {raft_address}: it could not be started again",
            remedy=f"start it with --raftAddress {member.address}, or remove it and add it at"
                   f" {raft_address}")


def unreachable(node_id: str, address: str, reason: str, *, encrypted: bool) -> NotCapable:
    """The refusal of a node that did not answer; `encrypted`: the cluster that it is to join is."""
    flags = "--raftJoin, --kekFile and --encryption-enabled" if encrypted else "--raftJoin"
    return NotCapable(
        f"{node_id} at {address} does not answer ({reason})",
        remedy=f"start {node_id} with {flags}, check its address and its certificate, then repeat"
               " the request")


def unregistered(node_id: str, dek_ids: Iterable[int], rows: Mapping[bytes, bytes]) -> list[int]:
    """Those of `dek_ids` for which the registry has no row of the node."""
    return [dek_id for dek_id in dek_ids
            if find_writer(rows.get, dek_id, full_node_id(node_id)) is None]


def transfer_target(members: Sequence[Member], target_id: str, target_address: str) -> str:
    """The member that a TransferLeadership request names, "" for the leader's choice.

    Raises `InvalidArgument` for a node that is no member, and for an id and an address that do
    not belong together.
    """
    if not target_id and not target_address:
        return ""
    for member in members:
        if target_id in ("", member.node_id) and target_address in ("", member.address):
            return member.node_id
    named = " at ".join(text for text in (target_id, target_address) if text)
    raise InvalidArgument(f"{named} is no member", remedy=LOOK_REMEDY)


def require_applied(node_id: str, applied_index: int, required_index: int) -> None:
    """Raise `MembershipConflict` while a learner has not applied what its promotion asks for."""
    if applied_index < required_index:
        raise MembershipConflict(
            f"{node_id} has applied entry {applied_index}, {required_index} is required",
            remedy="retry when it has caught up; elastickv admin raft status shows how far it is")
