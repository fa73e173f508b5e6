"""Start-up guards: when a node must not run, why, and what to do (DESIGN section 5).

Pure: facts in, verdicts out. `node.py` gathers the facts and refuses to start on the first failure;
`elastickv doctor` shows every verdict. The order of `GUARDS` is the order in which a person would
mend things: the machine first, then the KEK, then what the files say about each other.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from elastickv.crypto.nonce import MAX_EPOCH, node_id16
from elastickv.errors import StartupRefused
from elastickv.keys.registry import decode_row_key, decode_row_value
from elastickv.keys.sidecar import Sidecar

_RESYNC = "restore it from the leader: elastickv admin encryption resync-sidecar"


class GuardFailed(StartupRefused):
    """A guard refused. `guard_name` is its name in `elastickv doctor` and the documentation."""

    def __init__(self, guard_name: str, message: str, *, remedy: str) -> None:
        super().__init__(f"start-up guard {guard_name}: {message}", remedy=remedy)
        self.guard_name = guard_name


class Status(enum.StrEnum):
    """What a guard came to."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One guard's result; `message` and `remedy` are empty unless it failed."""

    guard: str
    status: Status
    message: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known before the node runs. Problem texts are "" when there is none.

    `registry` holds this node's own copy of the writer rows, key to value. `last_encryption_index`
    and `store_cutover_index` are what the store (or the snapshot it came from) recorded.
    """

    full_node_id: int
    encryption_enabled: bool
    kek_configured: bool
    file_system_problem: str = ""
    kek_problem: str = ""
    sidecar: Sidecar | None = None
    sidecar_problem: str = ""
    unwrap_problem: str = ""
    registry: Mapping[bytes, bytes] = field(default_factory=dict)
    last_encryption_index: int = 0
    store_cutover_index: int = 0
    member_ids: Mapping[str, int] = field(default_factory=dict)


Problem = tuple[str, str]
"""`(message, remedy)`."""

Check = Callable[[Facts], Problem | None]


def _file_system(facts: Facts) -> Problem | None:
    if facts.file_system_problem:
        return facts.file_system_problem, "put --raftDataDir on a local ext4 or xfs file system"
    return None


def _kek_required(facts: Facts) -> Problem | None:
    if facts.encryption_enabled and not facts.kek_configured:
        return "--encryption-enabled is set and no KEK is", "name the KEK with --kekFile"
    return None


def _kek_readable(facts: Facts) -> Problem | None:
    if facts.kek_problem:
        return facts.kek_problem, "give the node an owner-only regular file of exactly 32 bytes"
    return None


def _sidecar_readable(facts: Facts) -> Problem | None:
    return (facts.sidecar_problem, _RESYNC) if facts.sidecar_problem else None


def _sidecar_without_flag(facts: Facts) -> Problem | None:
    if facts.sidecar is not None and not facts.encryption_enabled:
        return ("the data directory holds wrapped keys and encryption is off",
                "start with --kekFile and --encryption-enabled")
    return None


def _kek_unwraps(facts: Facts) -> Problem | None:
    if facts.unwrap_problem and facts.kek_configured and not facts.kek_problem:
        return facts.unwrap_problem, "start with the KEK that the cluster was bootstrapped with"
    return None


def _epoch_exhausted(facts: Facts) -> Problem | None:
    for dek_id in _active(facts):
        key = facts.sidecar.keys[dek_id] if facts.sidecar else None
        if key is not None and key.local_epoch >= MAX_EPOCH:
            return (f"this node has used every epoch of active DEK {dek_id}",
                    "rotate it on another node: elastickv admin encryption rotate-dek")
    return None


def _epoch_rollback(facts: Facts) -> Problem | None:
    if facts.sidecar is None:
        return None
    for row_dek_id, node, last_seen in _rows(facts):
        key = facts.sidecar.keys.get(row_dek_id)
        if node == facts.full_node_id and key is not None and key.local_epoch < last_seen:
            return (f"the sidecar's epoch {key.local_epoch} for DEK {row_dek_id} is below"
                    f" {last_seen}, which the registry has seen: the sidecar is an old copy",
                    _RESYNC)
    return None


def _sidecar_behind_log(facts: Facts) -> Problem | None:
    applied = facts.sidecar.raft_applied_index if facts.sidecar else 0
    if facts.last_encryption_index > applied:
        return (f"the sidecar stands at index {applied} and the store has applied the encryption"
                f" entry {facts.last_encryption_index}", _RESYNC)
    return None


def _node_id_collision(facts: Facts) -> Problem | None:
    own16 = node_id16(facts.full_node_id)
    for name, other in facts.member_ids.items():
        if other != facts.full_node_id and node_id16(other) == own16:
            return (f"member {name} has the same 16-bit node id {own16:#06x}",
                    "choose another --raftId (elastickv admin encryption probe-node-id)")
    for dek_id, node, _ in _rows(facts):
        if node != facts.full_node_id and node_id16(node) == own16:
            return (f"another node is registered for DEK {dek_id} under this node's 16-bit id"
                    f" {own16:#06x}",
                    "choose another --raftId (elastickv admin encryption probe-node-id)")
    return None


def _cutover_divergence(facts: Facts) -> Problem | None:
    if facts.sidecar is None or facts.sidecar.raft_applied_index > facts.last_encryption_index:
        return None  # the sidecar may be one entry ahead; replay decides
    sidecar_index = facts.sidecar.raft_envelope_cutover_index
    if facts.store_cutover_index != sidecar_index:
        return (f"the store says the raft cutover is at index {facts.store_cutover_index},"
                f" the sidecar {sidecar_index}", _RESYNC)
    return None


def _active(facts: Facts) -> list[int]:
    sidecar = facts.sidecar
    if sidecar is None:
        return []
    return [dek_id for dek_id in (sidecar.active_storage, sidecar.active_raft) if dek_id]


def _rows(facts: Facts) -> list[tuple[int, int, int]]:
    """`(dek_id, full_node_id, last_seen_epoch)` of every registry row."""
    rows = []
    for key, value in facts.registry.items():
        record = decode_row_value(value)
        rows.append((decode_row_key(key)[0], record.full_node_id, record.last_seen_epoch))
    return rows


def _always(facts: Facts) -> bool:
    return True


def _has_kek(facts: Facts) -> bool:
    return facts.kek_configured


def _has_sidecar(facts: Facts) -> bool:
    return facts.sidecar is not None


GUARDS: Sequence[tuple[str, Callable[[Facts], bool], Check]] = (
    ("file-system", _always, _file_system),
    ("kek-required", _always, _kek_required),
    ("kek-readable", _has_kek, _kek_readable),
    ("sidecar-readable", _always, _sidecar_readable),
    ("sidecar-without-flag", _has_sidecar, _sidecar_without_flag),
    ("kek-unwraps", _has_sidecar, _kek_unwraps),
    ("epoch-exhausted", _has_sidecar, _epoch_exhausted),
    ("epoch-rollback", _has_sidecar, _epoch_rollback),
    ("sidecar-behind-log", _always, _sidecar_behind_log),
    ("node-id-collision", _always, _node_id_collision),
    ("cutover-divergence", _has_sidecar, _cutover_divergence),
)
"""`(name, applies, check)`."""


def run_guards(facts: Facts) -> list[Verdict]:
    """Every guard's verdict, in order."""
    verdicts = []
    for name, applies, check in GUARDS:
        if not applies(facts):
            verdicts.append(Verdict(name, Status.NOT_APPLICABLE))
        elif (problem := check(facts)) is not None:
            verdicts.append(Verdict(name, Status.FAIL, *problem))
        else:
            verdicts.append(Verdict(name, Status.PASS))
    return verdicts


def require_safe(facts: Facts) -> None:
    """Raise `GuardFailed` for the first guard that fails."""
    for verdict in run_guards(facts):
        if verdict.status is Status.FAIL:
            raise GuardFailed(verdict.guard, verdict.message, remedy=verdict.remedy)
