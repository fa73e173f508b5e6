"""What the client library takes and returns. Plain values: nothing here knows gRPC."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Put(NamedTuple):
    """A batch operation: write `value`. `ttl_ms` 0 = never expires."""

    key: bytes
    value: bytes
    ttl_ms: int = 0


class Delete(NamedTuple):
    """A batch operation: remove `key`."""

    key: bytes


class Condition(NamedTuple):
    """The batch applies only if the latest commit timestamp of `key` is `commit_ts`; 0 = absent."""

    key: bytes
    commit_ts: int


class WriteResult(NamedTuple):
    """Where a write was committed: log index and hybrid timestamp."""

    commit_index: int
    commit_ts: int


class ReadResult(NamedTuple):
    """`exists` False: no visible version; then `value` is b"" and `commit_ts` 0.

    `stale_ms`, for a stale read: the member that answered was last known to have everything
    that many milliseconds before; -1 = never. 0 for a linearizable read. `ttl_ms` is what the value
    had left at the moment of the read; 0 = it never expires.
    """

    value: bytes
    exists: bool
    commit_ts: int
    read_at_index: int
    stale_ms: int = 0
    ttl_ms: int = 0


class Pair(NamedTuple):
    """One scan result; `value` is b"" when only keys were asked for."""

    key: bytes
    value: bytes


class Purpose(enum.IntEnum):
    """What a DEK encrypts."""

    STORAGE = 1
    RAFT = 2


class Writer(NamedTuple):
    """A writer of nonces: 64-bit node id and epoch (0 to 0xFFFF)."""

    full_node_id: int
    local_epoch: int


@dataclass(frozen=True, slots=True)
class Capability:
    """What a member answers when asked whether it can encrypt. `local_epoch` 0 = not a writer yet,
    or not told (the verdicts of a cutover)."""

    full_node_id: int
    encryption_capable: bool
    build_sha: str
    sidecar_present: bool
    local_epoch: int = 0


@dataclass(frozen=True, slots=True)
class SidecarState:
    """A member's sidecar. Wrapped keys only; ids and indexes are 0 before bootstrap.

    `writer_registry` maps DEK ids to the epoch last seen there for the caller, `purposes_by_id` to
    1 (storage) or 2 (raft). `sidecar_index` is the last log entry that changed the sidecar.
    """

    wrapped_deks_by_id: Mapping[int, bytes]
    active_storage_id: int
    active_raft_id: int
    storage_envelope_active: bool
    raft_envelope_cutover_index: int
    latest_applied_index: int
    writer_registry: Mapping[int, int]
    storage_envelope_cutover_index: int = 0
    sidecar_index: int = 0
    purposes_by_id: Mapping[int, int] = field(default_factory=dict)
    created_by_id: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DekStatus:
    """One DEK as one member sees it. `epoch` is confirmed in the member's present process, 0 = not
    (yet); `writes` is an upper bound over all members; `writes_left` counts to --dek-max-writes."""

    dek_id: int
    purpose: Purpose
    active: bool
    writer_state: str
    epoch: int
    local_epoch: int
    writes: int
    writes_left: int


@dataclass(frozen=True, slots=True)
class MemberEncryption:
    """One member as the member that was asked sees it. `problems` has a line with its remedy for
    each thing that is wrong, `problem` the first of them or ""."""

    node_id: str
    reachable: bool
    capability: Capability | None
    sidecar: SidecarState | None
    problem: str
    problems: Sequence[str] = ()
    deks: Sequence[DekStatus] = ()


class BootstrapResult(NamedTuple):
    """The log index of the bootstrap and the ids of the two DEKs."""

    applied_index: int
    storage_dek_id: int
    raft_dek_id: int


class RotateResult(NamedTuple):
    """The log index of the rotation and the id of the new DEK."""

    applied_index: int
    new_dek_id: int


@dataclass(frozen=True, slots=True)
class CutoverResult:
    """`applied_index` is the cutover's log index, 0 when `cutover_index_unknown`; `members`, the
    verdicts, is empty when the cutover `was_already_active`."""

    applied_index: int
    was_already_active: bool
    cutover_index_unknown: bool
    members: Sequence[Capability]


class Role(enum.IntEnum):
    """A member's part in Raft."""

    UNKNOWN = 0
    FOLLOWER = 1
    CANDIDATE = 2
    LEADER = 3
    SHUTDOWN = 4


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """One member's counters; indexes are log indexes, 0 = none. `leader_address` is the leader's
    client address, "" when unknown."""

    node_id: str
    role: Role
    leader_id: str
    leader_address: str
    term: int
    commit_index: int
    applied_index: int
    last_log_index: int
    last_snapshot_index: int
    fsm_pending: int
    num_peers: int
    last_contact_ns: int
    configuration_index: int
    pending_configuration: bool


@dataclass(frozen=True, slots=True)
class RaftMember:
    """One member: raft address, client address ("" until learned), "voter" or "learner"."""

    node_id: str
    address: str
    suffrage: str
    client_address: str
