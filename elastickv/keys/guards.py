"""Start-up guards: when a node must not run, why, and what to do.

Pure: facts in, verdicts out. `startup.py` gathers the facts; the node refuses to start on the first
failure and `elastickv doctor` shows every verdict. The order of `GUARDS` is the order in which a
person would mend things: the machine first, then the KEK, then what the files say about each other.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from elastickv.crypto.nonce import MAX_EPOCH, node_id16
from elastickv.errors import JOIN_ANEW_REMEDY, StartupRefused
from elastickv.keys.provenance import Recorded, contradiction, may_have_refused
from elastickv.keys.registry import (
    WRITERS_PREFIX,
    decode_row_key,
    decode_row_value,
    own_epochs,
)
from elastickv.keys.sidecar import Sidecar

RESYNC_COMMAND = "elastickv admin encryption resync-sidecar"
WRONG_KEK_REMEDY = "start with the KEK that the cluster was bootstrapped with"
_ENCRYPTED_START = "start with --kekFile and --encryption-enabled"
_RESYNC = f"restore it from the leader: {RESYNC_COMMAND}"
_FOREIGN = ("move it away and put this node's own back; without one, the leader's is taken over at"
            f" the next start, or by {RESYNC_COMMAND}")
_REFUSED = ("remove this node and join it anew: it may lack writes that it refused under this"
            f" sidecar and the others applied; if it never ran with it, {_FOREIGN}")
_LEFT_OVER = "move it away: a node that holds nothing yet gets its keys with the log"
_RENAME = ("choose another --raftId; elastickv admin encryption probe-node-id shows which ids"
           " collide")


class GuardFailed(StartupRefused):
    """A start-up guard refused; each guard has its own class. `guard` is its name in `elastickv
    doctor` and in the documentation."""

    resync: ClassVar[bool] = False
    """Whether taking the key state from the leader mends it."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(f"start-up guard {self.guard}: {message}", remedy=remedy)
        self.problem = message


class DataDirectoryUnusable(GuardFailed):
    """The data directory cannot be used: it is none, or not this user's."""

    guard = "data-directory"


class AlreadyRunning(DataDirectoryUnusable):
    """Another process uses the data directory."""


class FileSystemUnsafe(GuardFailed):
    """The data directory's file system lacks write, fsync, rename or directory fsync."""

    guard = "file-system"


class DirectoryOfAnother(GuardFailed):
    """The data directory is another member's. What this node promised and what that one did would
    be mixed up; the data is sound."""

    guard = "raft-id"


class StoreUnreadable(GuardFailed):
    """The store cannot be opened, so nothing that it says can be compared."""

    guard = "store-readable"


class KekRequired(GuardFailed):
    """--encryption-enabled is set and no KEK is."""

    guard = "kek-required"


class KekInsecure(GuardFailed):
    """The KEK file can be accessed by others than its owner."""

    guard = "kek-insecure"


class KekUnreadable(GuardFailed):
    """The KEK cannot be read, or is not a KEK."""

    guard = "kek-readable"


class SidecarUnreadable(GuardFailed):
    """The sidecar is damaged."""

    guard = "sidecar-readable"
    resync = True


class SidecarWithoutFlag(GuardFailed):
    """The data directory holds wrapped keys and the node is started without encryption."""

    guard = "sidecar-without-flag"


class KekDoesNotUnwrap(GuardFailed):
    """The KEK is not the one that wrapped the keys in the sidecar."""

    guard = "kek-unwraps"


class EpochExhausted(GuardFailed):
    """This node has used every nonce epoch of an active DEK."""

    guard = "epoch-exhausted"
    resync = True


class EpochRolledBack(GuardFailed):
    """The sidecar's epoch is below what the registry has seen: the sidecar is an old copy."""

    guard = "epoch-rollback"
    resync = True


class SidecarForeign(GuardFailed):
    """The sidecar contradicts what this node has applied: it is of another cluster, or of a later
    state than its log. What such a node sealed as leader would stop every other member."""

    guard = "sidecar-foreign"

    @classmethod
    def beyond_log(cls, sidecar: Sidecar, recorded: Recorded) -> SidecarForeign:
        """For a leader. Its log holds all that was ever committed, and not what the sidecar says
        was."""
        return cls(f"the sidecar stands at index {sidecar.raft_applied_index}, and all that the"
                   f" cluster has committed ends at {recorded.applied_index}: it is not of this"
                   " log", remedy=foreign_remedy(sidecar, recorded))


def foreign_remedy(sidecar: Sidecar, recorded: Recorded) -> str:
    """What to do with a sidecar that is not of the log of a node whose own store says `recorded`.
    """
    return _REFUSED if may_have_refused(sidecar, recorded) else _FOREIGN


class SidecarBehindLog(GuardFailed):
    """The store has applied an encryption entry that the sidecar has not."""

    guard = "sidecar-behind-log"
    resync = True


class NodeIdTaken(GuardFailed):
    """Another node has the 16-bit node id that goes into this node's nonces."""

    guard = "node-id-collision"


class CutoverDiverged(GuardFailed):
    """Store and sidecar name different indexes for a cutover."""

    guard = "cutover-divergence"
    resync = True


class Status(enum.StrEnum):
    """What a guard came to."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    WARN = "warn"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One guard's result; `message` and `remedy` are empty unless it failed or warns. A warning
    keeps no node from starting."""

    guard: str
    status: Status
    message: str = ""
    remedy: str = ""


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known before the node runs. Problem texts are "" when there is none. `kek_insecure`:
    `kek_problem` is that others than its owner can access the file.

    `registry` holds this node's own copy of the writer rows, key to value. `recorded` is what the
    store (or the snapshot it came from) says. `has_no_log`: the node has neither a log nor a term
    and vote.
    `rewrapped` are the DEKs that sidecar and store hold in different wrappings of the same key: a
    rotation to a DEK that is known already may bring another one.
    """

    full_node_id: int
    encryption_enabled: bool
    kek_configured: bool
    directory_problem: Problem | None = None
    raft_id: str = ""
    directory_owner: str = ""
    file_system_problem: Problem | None = None
    store_problem: str = ""
    kek_problem: Problem | None = None
    kek_insecure: bool = False
    sidecar: Sidecar | None = None
    sidecar_problem: str = ""
    unwrap_problem: str = ""
    registry: Mapping[bytes, bytes] = field(default_factory=dict)
    recorded: Recorded = field(default_factory=Recorded)
    has_no_log: bool = False
    rewrapped: Collection[int] = ()
    member_ids: Mapping[str, int] = field(default_factory=dict)


Check = Callable[[Facts], Problem | None]


def _data_directory(facts: Facts) -> Problem | None:
    return facts.directory_problem


def _file_system(facts: Facts) -> Problem | None:
    return facts.file_system_problem


def _directory_of_another(facts: Facts) -> Problem | None:
    if facts.directory_owner not in ("", facts.raft_id):
        return Problem(
            f"the data directory is that of member {facts.directory_owner}, and --raftId is"
            f" {facts.raft_id}",
            f"start it with --raftId {facts.directory_owner}, or choose another --raftDataDir;"
            " the directory is sound, do not empty it")
    return None


def _store_readable(facts: Facts) -> Problem | None:
    return Problem(facts.store_problem, JOIN_ANEW_REMEDY) if facts.store_problem else None


def _kek_required(facts: Facts) -> Problem | None:
    if facts.encryption_enabled and not facts.kek_configured:
        return Problem("--encryption-enabled is set and no KEK is", "name the KEK with --kekFile")
    return None


def _kek_insecure(facts: Facts) -> Problem | None:
    return facts.kek_problem if facts.kek_insecure else None


def _kek_readable(facts: Facts) -> Problem | None:
    return None if facts.kek_insecure else facts.kek_problem


def _sidecar_readable(facts: Facts) -> Problem | None:
    return Problem(facts.sidecar_problem, _restoring(facts)) if facts.sidecar_problem else None


def _restoring(facts: Facts) -> str:
    """How an old, damaged or missing sidecar is restored."""
    if facts.sidecar is None and facts.recorded.sidecar is not None:
        start = ("start the node: it" if facts.kek_configured and facts.encryption_enabled
                 else f"{_ENCRYPTED_START}: the node")
        return (f"{start} takes the leader's, or the copy in its own store when no leader answers;"
                f" or: {RESYNC_COMMAND}")
    return _RESYNC


def _sidecar_without_flag(facts: Facts) -> Problem | None:
    if facts.sidecar is not None and not facts.encryption_enabled:
        return Problem("the data directory holds wrapped keys and encryption is off",
                       _ENCRYPTED_START)
    return None


def _kek_unwraps(facts: Facts) -> Problem | None:
    if facts.unwrap_problem and facts.kek_configured and facts.kek_problem is None:
        return Problem(facts.unwrap_problem, WRONG_KEK_REMEDY)
    return None


def _epoch_exhausted(facts: Facts) -> Problem | None:
    if facts.sidecar is None:
        return None
    for dek_id in facts.sidecar.active_ids:
        if facts.sidecar.keys[dek_id].local_epoch >= MAX_EPOCH:
            return Problem(
                f"this node has used every epoch of active DEK {dek_id}",
                "rotate it on another node (elastickv admin encryption rotate-dek), then take"
                f" the new key over here: {RESYNC_COMMAND}")
    return None


def _epoch_rollback(facts: Facts) -> Problem | None:
    if facts.sidecar is None:
        return None
    for dek_id, last_seen in own_epochs(facts.registry.items(), facts.full_node_id).items():
        key = facts.sidecar.keys.get(dek_id)
        if key is not None and key.local_epoch < last_seen:
            return Problem(
                f"the sidecar's epoch {key.local_epoch} for DEK {dek_id} is below"
                f" {last_seen}, which the registry has seen: the sidecar is an old copy", _RESYNC)
    return None


def _sidecar_foreign(facts: Facts) -> Problem | None:
    sidecar = facts.sidecar
    if sidecar is None:
        return None
    if facts.has_no_log and not facts.recorded.applied_index:
        return Problem("there is a sidecar and neither log nor store: it was left over",
                       _LEFT_OVER)
    found = contradiction(sidecar, facts.recorded, facts.rewrapped)
    if found is None or (found.of_cutover and not _is_ahead(facts, sidecar)):
        return None
    return Problem(found.message, foreign_remedy(sidecar, facts.recorded))


def _is_ahead(facts: Facts, sidecar: Sidecar) -> bool:
    """Whether the sidecar says more than the store of what the log holds."""
    return sidecar.raft_applied_index > facts.recorded.last_encryption_index


def _sidecar_behind_log(facts: Facts) -> Problem | None:
    applied = facts.sidecar.raft_applied_index if facts.sidecar else 0
    last_index = facts.recorded.last_encryption_index
    if last_index > applied and not facts.sidecar_problem:
        what = f"the sidecar stands at index {applied}" if facts.sidecar else "there is no sidecar"
        return Problem(f"{what} and the store has applied the encryption entry {last_index}",
                       _restoring(facts))
    return None


def _node_id_collision(facts: Facts) -> Problem | None:
    own16 = node_id16(facts.full_node_id)
    for name, other in facts.member_ids.items():
        if other != facts.full_node_id and node_id16(other) == own16:
            return Problem(f"member {name} has the same 16-bit node id {own16:#06x}", _RENAME)
    for dek_id, node in _writers(facts):
        if node != facts.full_node_id and node_id16(node) == own16:
            return Problem(f"another node is registered for DEK {dek_id} under this node's 16-bit"
                           f" id {own16:#06x}", _RENAME)
    return None


def _cutover_divergence(facts: Facts) -> Problem | None:
    if facts.sidecar is None or _is_ahead(facts, facts.sidecar):
        return None
    found = contradiction(facts.sidecar, facts.recorded, facts.rewrapped)
    return Problem(found.message, _RESYNC) if found is not None and found.of_cutover else None


def _writers(facts: Facts) -> list[tuple[int, int]]:
    """`(dek_id, full_node_id)` of every registry row."""
    return [(decode_row_key(key)[0], decode_row_value(value).full_node_id)
            for key, value in facts.registry.items() if key.startswith(WRITERS_PREFIX)]


def _always(facts: Facts) -> bool:
    return True


def _has_kek(facts: Facts) -> bool:
    return facts.kek_configured


def _has_sidecar(facts: Facts) -> bool:
    return facts.sidecar is not None


class Guard(NamedTuple):
    """One guard: when it says anything at all, and what it checks."""

    error: type[GuardFailed]
    applies: Callable[[Facts], bool]
    check: Check

    @property
    def name(self) -> str:
        return self.error.guard


GUARDS: Sequence[Guard] = (
    Guard(DataDirectoryUnusable, _always, _data_directory),
    Guard(FileSystemUnsafe, _always, _file_system),
    Guard(DirectoryOfAnother, _always, _directory_of_another),
    Guard(StoreUnreadable, _always, _store_readable),
    Guard(KekRequired, _always, _kek_required),
    Guard(KekInsecure, _has_kek, _kek_insecure),
    Guard(KekUnreadable, _has_kek, _kek_readable),
    Guard(SidecarUnreadable, _always, _sidecar_readable),
    Guard(SidecarWithoutFlag, _has_sidecar, _sidecar_without_flag),
    Guard(KekDoesNotUnwrap, _has_sidecar, _kek_unwraps),
    Guard(EpochExhausted, _has_sidecar, _epoch_exhausted),
    Guard(EpochRolledBack, _has_sidecar, _epoch_rollback),
    Guard(SidecarForeign, _has_sidecar, _sidecar_foreign),
    Guard(SidecarBehindLog, _always, _sidecar_behind_log),
    Guard(NodeIdTaken, _always, _node_id_collision),
    Guard(CutoverDiverged, _has_sidecar, _cutover_divergence),
)


def run_guards(facts: Facts) -> list[Verdict]:
    """Every guard's verdict, in order."""
    verdicts = []
    for guard in GUARDS:
        if not guard.applies(facts):
            verdicts.append(Verdict(guard.name, Status.NOT_APPLICABLE))
        elif (problem := guard.check(facts)) is not None:
            verdicts.append(Verdict(guard.name, Status.FAIL, *problem))
        else:
            verdicts.append(Verdict(guard.name, Status.PASS))
    return verdicts


def failures(facts: Facts) -> list[GuardFailed]:
    """The errors of all guards that fail, in order."""
    return [guard.error(problem.message, remedy=problem.remedy) for guard in GUARDS
            if guard.applies(facts) and (problem := guard.check(facts)) is not None]


def require_safe(facts: Facts) -> None:
    """Raise the `GuardFailed` of the first guard that fails."""
    failed = failures(facts)
    if failed:
        raise failed[0]
