"""The error tree: who must act, and the gRPC status that says so.

Four branches, by the party that can make the error go away:

* `CallerError`: the request is wrong; the same request will fail again.
* `PeerError`: another node must act (elect a leader, answer, catch up); a retry may help.
* `OperatorError`: a person must act (a flag, a file, a disk, a key).
* `CorruptionError`: bytes on a disk or a wire are not what was written.

Every class names its gRPC status (`grpc_status`, the name of a `grpc.StatusCode` member; this
layer does not import grpc) and whether a write that failed with it certainly left no effect
(`outcome`). `server/` translates once, at the edge; nothing below it knows gRPC.

Messages never hold key material or values: a failed decryption or parse raises `from None`.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Final

TRAILER_ERROR: Final = "elastickv-error"
TRAILER_OUTCOME: Final = "elastickv-outcome"
TRAILER_LEADER: Final = "elastickv-leader"
"""By these trailers of a status a client rebuilds the error (`elastickv.server.errors`)."""
REMEDY_FOLLOWS: Final = ". Remedy: "
"""Between the message and the remedy in an error's text."""

JOIN_ANEW_REMEDY = "remove this node and join it anew: it is sent everything"
"""What a member does whose log or state is damaged: the others hold all of it."""
DISK_FAILED_REMEDY = ("check the disk and the system's log, and let nothing restart the node on it"
                      " by itself; replace the disk and let the member join anew")


class Outcome(enum.Enum):
    """What is known of a write that ended in an error."""

    NOT_APPLIED = "not-applied"
    UNKNOWN = "unknown"


class ExitCode(enum.IntEnum):
    """Process exit codes of every elastickv command. Documented in docs/reference."""

    OK = 0
    ERROR = 1
    USAGE = 2
    STARTUP_REFUSED = 3
    APPLY_HALTED = 4
    CORRUPTION = 5
    BIND_FAILED = 6
    REMOVED = 7
    OUTCOME_UNKNOWN = 8
    UNAVAILABLE = 9
    DISK_FAILED = 10


class ElasticKVError(Exception):
    """Root of every error that this package raises on purpose.

    `remedy` is one sentence that tells the acting party what to do; it is part of `str(error)`.
    """

    grpc_status: ClassVar[str] = "INTERNAL"
    outcome: ClassVar[Outcome] = Outcome.NOT_APPLIED
    exit_code: ClassVar[ExitCode] = ExitCode.ERROR

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message + REMEDY_FOLLOWS + self.remedy if self.remedy else self.message


# --- the caller must act ---------------------------------------------------------------------


class CallerError(ElasticKVError):
    """The request is wrong as it stands."""

    grpc_status = "INVALID_ARGUMENT"


class InvalidArgument(CallerError):
    """A field is out of its range; the message names the field and the limit."""


class ResultTooLarge(InvalidArgument):
    """A scan's result is larger than one response may be; fewer pairs fit."""


class NotAuthorized(CallerError):
    """The caller's certificate is not that of an administrator (`--admin-names`)."""

    grpc_status = "PERMISSION_DENIED"


class Unimplemented(CallerError):
    """The method exists on the wire and is not served."""

    grpc_status = "UNIMPLEMENTED"


class ConditionFailed(CallerError):
    """A compare-and-set condition of an atomic batch did not hold; nothing was written."""

    grpc_status = "ABORTED"


class ClientClosed(CallerError):
    """The client was closed: a read, or a write that certainly was not sent."""

    grpc_status = "CANCELLED"


class ForkedProcess(CallerError):
    """A client was in use before this process was forked off, and what it needs does not survive
    that. Certainly nothing was sent."""

    grpc_status = "FAILED_PRECONDITION"


class EncryptionConflict(CallerError):
    """An encryption operation contradicts the committed state (a second bootstrap, a taken id)."""

    grpc_status = "FAILED_PRECONDITION"


class MembershipConflict(CallerError):
    """A membership change contradicts the configuration or needs a member that does not answer, or
    another change is under way."""

    grpc_status = "FAILED_PRECONDITION"


# --- another node must act -------------------------------------------------------------------


class PeerError(ElasticKVError):
    """Some other node has to do something first; retrying elsewhere or later may succeed."""

    grpc_status = "UNAVAILABLE"
    exit_code = ExitCode.UNAVAILABLE


class NotLeader(PeerError):
    """This node does not lead; certainly nothing was proposed. `leader_id` is "" when unknown."""

    def __init__(self, message: str = "this node is not the leader", *, leader_id: str = "",
                 leader_address: str = "", remedy: str | None = None) -> None:
        """Without a `remedy` it is to retry, on the leader when that is known."""
        if remedy is None:
            remedy = "retry on the leader" if leader_id else "retry shortly"
        super().__init__(message, remedy=remedy)
        self.leader_id = leader_id
        self.leader_address = leader_address


class NoLeader(PeerError):
    """No leader was known within the deadline; certainly nothing was proposed."""


class Unreachable(PeerError):
    """A named member did not answer; certainly nothing was sent to it."""


class Overloaded(PeerError):
    """A queue is full; certainly nothing was proposed."""

    grpc_status = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(PeerError):
    """A read, a wait or a write not yet proposed ran out of time; nothing was changed by it."""

    grpc_status = "DEADLINE_EXCEEDED"


class OutcomeUnknown(PeerError):
    """A proposal may or may not be committed: the leader was lost or time ran out while it was
    under way. Never retried blindly."""

    grpc_status = "UNKNOWN"
    outcome = Outcome.UNKNOWN
    exit_code = ExitCode.OUTCOME_UNKNOWN


class StorageEnvelopeRequired(PeerError):
    """Apply refused a plaintext value because the storage cutover took effect before it.

    Deterministic on every replica and without effect; the coordinator seals the value and proposes
    it again, so that callers never see this.
    """


# --- the operator must act -------------------------------------------------------------------


class OperatorError(ElasticKVError):
    """A person must change a flag, a file, a disk or a key."""

    grpc_status = "FAILED_PRECONDITION"


class DekExhausted(OperatorError):
    """A DEK has been used for as many writes as `--dek-max-writes` allows; a new one is needed."""

    grpc_status = "RESOURCE_EXHAUSTED"


class GateOff(OperatorError):
    """Encryption RPCs are switched off on this node (no KEK or no --encryption-enabled)."""


class NotBootstrapped(OperatorError):
    """The operation needs DEKs and the cluster has none yet."""


class NotCapable(OperatorError):
    """A member is unreachable or lacks encryption; a cutover may not go on without it."""


class ConfigError(OperatorError):
    """A flag, variable or configuration file is wrong."""

    exit_code = ExitCode.USAGE


class BindFailed(OperatorError):
    """A listening address could not be bound."""

    exit_code = ExitCode.BIND_FAILED


class StartupRefused(OperatorError):
    """A start-up guard refuses to run the node. `guard` names it in documents and logs."""

    exit_code = ExitCode.STARTUP_REFUSED
    guard: ClassVar[str] = "startup"


class KekError(StartupRefused):
    """The KEK cannot be read, is not 32 bytes, is too open, or does not unwrap a DEK."""

    guard = "kek"


class KekTooOpen(KekError):
    """Others than its owner can access the KEK file."""


class UnsupportedFileSystem(StartupRefused):
    """The data directory's file system lacks fsync, rename or directory fsync."""

    guard = "file-system"


class DiskFull(OperatorError):
    """The disk refuses writes; reads go on and nothing acknowledged is lost."""

    grpc_status = "RESOURCE_EXHAUSTED"


class DiskFailed(OperatorError):
    """The disk failed a read, a write or an fsync: what it holds is not known until it was checked.
    A full disk is `DiskFull`."""

    grpc_status = "INTERNAL"
    exit_code = ExitCode.DISK_FAILED


class RemovedFromCluster(OperatorError):
    """This node is no longer a member. `index` is the entry that removed it, 0 = unknown."""

    exit_code = ExitCode.REMOVED
    index = 0


# --- corruption ------------------------------------------------------------------------------


class CorruptionError(ElasticKVError):
    """Bytes are not what was written. Never answered with an empty or a guessed value."""

    grpc_status = "DATA_LOSS"
    exit_code = ExitCode.CORRUPTION


class IntegrityError(CorruptionError):
    """A ciphertext, tag or AAD does not authenticate, or its key id is unknown."""


class WireError(CorruptionError):
    """An encoded entry, frame or record does not parse: unknown code, short, or trailing bytes."""


class JournalCorrupt(CorruptionError):
    """A journal segment or the hard-state record is damaged other than by a torn tail."""


class SidecarCorrupt(CorruptionError):
    """The sidecar does not parse or contradicts itself."""


class StoreCorrupt(CorruptionError):
    """The store's file is damaged."""


class ApplyHalted(CorruptionError):
    """A committed entry cannot be applied; the node stops without advancing its applied index."""

    exit_code = ExitCode.APPLY_HALTED


class EntryRejected(ApplyHalted):
    """An encryption entry breaks a rule, and does so on every replica alike.

    The leader raises it before it proposes, without effect; met in the log it halts apply.
    """

    grpc_status = "FAILED_PRECONDITION"


class EpochRollback(EntryRejected):
    """A writer announced an epoch below the one the registry has seen for it."""


class NodeIdCollision(EntryRejected):
    """Two nodes share the 16-bit node id that goes into nonces."""


class EntryNotApplicable(ApplyHalted):
    """This node cannot apply an encryption entry that others may be able to apply: its KEK is
    missing or another one, or it is only partly wired for encryption."""

    grpc_status = "FAILED_PRECONDITION"
