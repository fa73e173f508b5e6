"""What the servers call: the key-value and the encryption operations of one node.

Any member answers any call: what only the leader can do is forwarded over the peer transport. Every
method raises `elastickv.errors` types only. Timeouts are in seconds and bound the whole call.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from elastickv.crypto.keystore import Purpose
from elastickv.errors import ResultTooLarge
from elastickv.store.mvcc import MAX_USER_KEY_BYTES

MAX_KEY_BYTES = MAX_USER_KEY_BYTES
MAX_TIMEOUT_S = 300.0
"""However long a caller would wait."""
MAX_TTL_MS = (1 << 63) - 1
"""An expiry, this much after any commit timestamp, still fits the 64 bits of a value header."""

PAIR_OVERHEAD_BYTES = 16
"""What a pair takes in an answer beside its key and value, at most: tags and lengths."""


class OpKind(enum.IntEnum):
    """What a batch operation does. The values are those of the log entry and of RawBatch."""

    PUT = 0
    DELETE = 1


class Op(NamedTuple):
    """One write. `ttl_ms` 0 = never expires; `value` is b"" for a delete."""

    kind: OpKind
    key: bytes
    value: bytes = b""
    ttl_ms: int = 0


class Condition(NamedTuple):
    """The batch applies only if the latest commit timestamp of `key` is `commit_ts` (0 = the key
    does not exist, was deleted or has expired)."""

    key: bytes
    commit_ts: int


class WriteResult(NamedTuple):
    """Where a write was committed: log index and HLC timestamp."""

    commit_index: int
    commit_ts: int


class ReadResult(NamedTuple):
    """`exists` False means no visible version; then `value` is b"" and `commit_ts` 0. `stale_ms` is
    the age of a stale read's answer, -1 = not known, and 0 for a linearizable read. `ttl_ms` is
    what the value has left at the moment of the read, 0 = it never expires."""

    value: bytes
    exists: bool
    read_at_index: int
    commit_ts: int
    stale_ms: int = 0
    ttl_ms: int = 0


Pair = tuple[bytes, bytes]
"""One result of a scan: key and value."""


class ScanResult(NamedTuple):
    """`stale_ms` as in `ReadResult`."""

    pairs: Sequence[Pair]
    stale_ms: int = 0


def result_too_large(max_bytes: int, fitting: int, *, keys_only: bool) -> ResultTooLarge:
    """What ends a scan of whose pairs only the first `fitting` have room."""
    remedies = [f"scan in pages of at most {fitting} pairs"] if fitting else []
    if not keys_only:
        remedies.append("scan with keys_only")
    return ResultTooLarge(
        f"the result has more than {max_bytes} bytes, the limit; {fitting} pairs fit",
        remedy=", or ".join(remedies))


class KvApi(Protocol):
    """The operations behind RawKV."""

    async def put(self, key: bytes, value: bytes, *, ttl_ms: int = 0,
                  timeout_s: float) -> WriteResult: ...

    async def delete(self, key: bytes, *, timeout_s: float) -> WriteResult: ...

    async def batch(self, ops: Sequence[Op], *, conditions: Sequence[Condition] = (),
                    timeout_s: float) -> WriteResult:
        """All of `ops` in one entry, or nothing. Raises `ConditionFailed`."""
        ...

    async def get(self, key: bytes, *, ts: int = 0, stale: bool = False,
                  timeout_s: float) -> ReadResult:
        """The version visible at `ts` (0 = latest); linearizable unless `stale`."""
        ...

    async def latest_commit_ts(self, key: bytes, *, timeout_s: float) -> tuple[int, bool]:
        """`(commit_ts, exists)` of the latest version, deletes included as not existing."""
        ...

    async def scan(self, start: bytes, end: bytes, *, limit: int, max_bytes: int, ts: int = 0,
                   reverse: bool = False, keys_only: bool = False, stale: bool = False,
                   timeout_s: float) -> ScanResult:
        """Visible pairs with start <= key < end (end b"" = unbounded), in key order, all as of one
        moment; linearizable unless `stale`. Raises `ResultTooLarge` as soon as they have more than
        `max_bytes`.
        """
        ...


class WriterRow(NamedTuple):
    """A writer: 64-bit node id and the epoch of its nonces."""

    full_node_id: int
    local_epoch: int


@dataclass(frozen=True, slots=True)
class Capability:
    """A node's answer to GetCapability, and one member's row in `status`."""

    full_node_id: int
    encryption_capable: bool
    build_sha: str
    sidecar_present: bool
    local_epoch: int


@dataclass(frozen=True, slots=True)
class SidecarState:
    """A node's answer to GetSidecarState. Wrapped keys only."""

    wrapped_deks_by_id: Mapping[int, bytes]
    active_storage_id: int
    active_raft_id: int
    storage_envelope_active: bool
    raft_envelope_cutover_index: int
    latest_applied_index: int
    writer_registry_for_caller: Mapping[int, int] = field(default_factory=dict)
    storage_envelope_cutover_index: int = 0
    sidecar_index: int = 0
    purposes_by_id: Mapping[int, int] = field(default_factory=dict)
    created_by_id: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DekStatus:
    """One DEK as one member sees it. `epoch` is confirmed in the member's present process, 0 = not
    (yet); `writes` is an upper bound over all members, `writes_left` what --dek-max-writes
    leaves; `refusal` says why the leader refuses to register the member."""

    dek_id: int
    purpose: int
    active: bool
    writer_state: str
    epoch: int
    local_epoch: int
    writes: int
    writes_left: int
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class MemberReport:
    """What a member says of itself for `status`."""

    capability: Capability
    sidecar: SidecarState
    deks: Sequence[DekStatus] = ()
    max_writes: int = 0


class BootstrapResult(NamedTuple):
    applied_index: int
    storage_dek_id: int
    raft_dek_id: int


class RotateResult(NamedTuple):
    applied_index: int
    new_dek_id: int


@dataclass(frozen=True, slots=True)
class CutoverResult:
    """`applied_index` is the cutover index; 0 with `cutover_index_unknown` for old sidecars."""

    applied_index: int
    capabilities: Sequence[Capability]
    was_already_active: bool
    cutover_index_unknown: bool = False


@dataclass(frozen=True, slots=True)
class MemberEncryptionStatus:
    """One row of `elastickv admin encryption status`. `problems` has a line with its remedy for
    each thing that is wrong with the member."""

    node_id: str
    reachable: bool
    capability: Capability | None
    sidecar: SidecarState | None
    problems: Sequence[str] = ()
    deks: Sequence[DekStatus] = ()


class MembershipApi(Protocol):
    """The operations behind RaftAdmin that change something. `previous_index` other than 0 must be
    the index of the configuration in force (compare-and-set); one change at a time. Each returns
    the index of the new configuration.

    Raise `InvalidArgument`, `ConditionFailed`, `MembershipConflict`, `NotCapable`.
    """

    async def add_voter(self, node_id: str, address: str, *, previous_index: int,
                        timeout_s: float) -> int:
        """Add a voting member at its raft address."""
        ...

    async def add_learner(self, node_id: str, address: str, *, previous_index: int,
                          timeout_s: float) -> int:
        """Add a member that receives the log and does not vote."""
        ...

    async def promote_learner(self, node_id: str, *, previous_index: int, min_applied_index: int,
                              skip_min_applied_check: bool, timeout_s: float) -> int:
        """Let a learner vote. It must have applied `min_applied_index` (0 = what was committed when
        the request came) unless `skip_min_applied_check`."""
        ...

    async def remove_server(self, node_id: str, *, previous_index: int, timeout_s: float) -> int:
        """Remove a member, which then stops itself."""
        ...

    async def transfer_leadership(self, target_id: str, target_address: str = "", *,
                                  timeout_s: float) -> None:
        """Hand leadership to a member ("" and "" = the most complete voter)."""
        ...


class EncryptionApi(Protocol):
    """The operations behind EncryptionAdmin. Mutations raise `GateOff` when the gate is off."""

    def gate_open(self) -> bool:
        """True with a KEK and --encryption-enabled."""
        ...

    async def capability(self) -> Capability: ...

    async def sidecar_state(self) -> SidecarState: ...

    async def bootstrap(self, *, wrapped_storage: bytes, wrapped_raft: bytes, storage_dek_id: int,
                        raft_dek_id: int, writers: Sequence[WriterRow],
                        timeout_s: float) -> BootstrapResult:
        """Everything empty or zero: the leader makes keys, ids and the writer batch."""
        ...

    async def rotate_dek(self, *, purpose: Purpose, wrapped: bytes, new_dek_id: int,
                         proposer_node_id: int, proposer_local_epoch: int,
                         timeout_s: float) -> RotateResult: ...

    async def register_writers(self, *, dek_id: int, writers: Sequence[WriterRow],
                               timeout_s: float) -> int:
        """The applied index."""
        ...

    async def resync_sidecar(self, *, caller_full_node_id: int, timeout_s: float) -> SidecarState:
        """The leader's sidecar state, with the registry rows of the caller."""
        ...

    async def enable_storage_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                      timeout_s: float) -> CutoverResult: ...

    async def enable_raft_envelope(self, *, proposer_node_id: int, proposer_local_epoch: int,
                                   timeout_s: float) -> CutoverResult: ...

    async def member_status(self, *, timeout_s: float) -> Sequence[MemberEncryptionStatus]: ...
