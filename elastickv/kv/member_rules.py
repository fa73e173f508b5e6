"""What is wrong with a member, seen from another: pure rules for fan-outs and `status`.

Each rule compares a member's own report with the leader's and says at most one line, which ends in
its remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import MAX_EPOCH
from elastickv.keys.usage import Limits
from elastickv.kv.api import Capability, DekStatus, MemberReport, SidecarState

NEAR_END_OF_EPOCHS = MAX_EPOCH * 9 // 10


def incapable(capability: Capability) -> str:
    """Why a member may not be part of a cutover; "" when it may."""
    if capability.encryption_capable:
        return ""
    return ("runs without --kekFile or without --encryption-enabled:"
            " start it with both")


def unreachable(message: str) -> str:
    """The line for a member that did not answer."""
    return f"does not answer ({message}): start it, or remove it from the cluster"


def _version(member: MemberReport, leader: MemberReport) -> str:
    own, other = member.capability.build_sha, leader.capability.build_sha
    if own == other:
        return ""
    return f"runs version {own}, the leader {other}: run the same version on every member"


def _key_state(member: MemberReport, leader: MemberReport) -> str:
    own, wanted = member.sidecar, leader.sidecar
    if own.sidecar_index < wanted.sidecar_index:
        what = "has no keys yet" if not own.active_storage_id else \
            f"has applied key changes up to entry {own.sidecar_index}"
        return (f"{what}, the leader up to {wanted.sidecar_index}: wait until it has caught up;"
                " if it does not, read its log")
    if own.sidecar_index == wanted.sidecar_index and _keys(own) != _keys(wanted):
        return ("holds other keys than the leader for the same entry: stop it and run elastickv"
                " admin encryption resync-sidecar")
    return ""


def _keys(state: SidecarState) -> tuple[object, ...]:
    return (state.active_storage_id, state.active_raft_id, state.storage_envelope_active,
            state.storage_envelope_cutover_index, state.raft_envelope_cutover_index,
            state.wrapped_deks_by_id)


def _writer(member: MemberReport, leader: MemberReport) -> str:
    for dek in _active(member):
        if dek.refusal:
            return f"is refused as a writer of DEK {dek.dek_id}: {dek.refusal}"
        if not dek.epoch:
            return (f"is not yet confirmed as a writer of DEK {dek.dek_id}"
                    f" ({dek.writer_state}): wait; if it stays so, check that there is a leader")
    return ""


def _epochs(member: MemberReport, leader: MemberReport) -> str:
    for dek in _active(member):
        if dek.local_epoch >= NEAR_END_OF_EPOCHS:
            return (f"has used {dek.local_epoch} of {MAX_EPOCH} epochs of DEK {dek.dek_id}:"
                    f" {_rotate(dek)}")
    return ""


def _usage(member: MemberReport, leader: MemberReport) -> str:
    limits = Limits(member.max_writes)
    dek = max(_active(member), key=lambda dek: dek.writes, default=None)
    if dek is None or not limits.rotation_due(dek.writes):
        return ""
    if dek.writes_left == 0:
        return f"refuses writes, DEK {dek.dek_id} is used up: {_rotate(dek)}"
    return f"has {dek.writes_left} writes left under DEK {dek.dek_id}: {_rotate(dek)}"


def _limit(member: MemberReport, leader: MemberReport) -> str:
    if member.max_writes == leader.max_writes:
        return ""
    return (f"has --dek-max-writes {member.max_writes}, the leader {leader.max_writes}:"
            " give every member the same")


def _active(member: MemberReport) -> list[DekStatus]:
    return [dek for dek in member.deks if dek.active]


def _rotate(dek: DekStatus) -> str:
    return f"elastickv admin encryption rotate-dek --purpose {Purpose(dek.purpose).label}"


Rule = Callable[[MemberReport, MemberReport], str]
RULES: Sequence[Rule] = (_version, _key_state, _writer, _epochs, _usage, _limit)


def problems(member: MemberReport, leader: MemberReport | None) -> list[str]:
    """Every line for a member that answered. Without a leader's report only the member's own
    capability can be judged."""
    lines = [incapable(member.capability)]
    if leader is not None:
        lines += [rule(member, leader) for rule in RULES]
    return [line for line in lines if line]
