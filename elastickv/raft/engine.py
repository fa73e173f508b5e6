"""What the rest of the node sees of Raft: a log of payloads, applied in order, exactly once.

The engine is driven by one asyncio loop and calls the state machine from that loop only, so a state
machine needs no locks. Time comes from `loop.time()`, so a simulated loop simulates the engine.

Contract, which `pysyncobj_engine.py` keeps and every user may rely on:

* `propose` ends in exactly one of: a result (applied here), a typed rejection raised by the state
  machine as an *outcome*, `NotLeader` / `NoLeader` / `Overloaded` / `InvalidArgument` (too large) /
  `DiskFull` (all of them: certainly not proposed), or `OutcomeUnknown`. It never hangs past its
  deadline.
* An entry is passed to `StateMachine.apply` in index order, once per process, only when it is
  committed; nothing at or below `StateMachine.applied_index` is passed after a restart.
* A full disk is waited out: what does not fit is passed to `apply` again, in the same order, until
  it does, and a leader hands its office to another voter meanwhile.
* If `apply` raises anything else, nothing later is applied, the applied index stays, and the engine
  reports the error through `on_fatal`.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from elastickv.raft.membership import MembershipChange


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed log entry. `payload` is b"" for Raft's own entries (no-op, membership)."""

    index: int
    term: int
    payload: bytes


class Role(enum.IntEnum):
    """The values equal `RaftAdminState` of the wire interface."""

    UNKNOWN = 0
    FOLLOWER = 1
    CANDIDATE = 2
    LEADER = 3
    SHUTDOWN = 4


class Suffrage(enum.StrEnum):
    """Whether a member counts towards the quorum."""

    VOTER = "voter"
    LEARNER = "learner"


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its node id (`--raftId`), its raft address `host:port`, and its suffrage.

    `client_address` is learned from the transport handshake and "" until then.
    """

    node_id: str
    address: str
    suffrage: Suffrage = Suffrage.VOTER
    client_address: str = ""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot of the engine's counters; indexes are log indexes, 0 = none."""

    node_id: str
    role: Role
    term: int
    leader_id: str
    leader_address: str
    commit_index: int
    applied_index: int
    last_log_index: int
    last_snapshot_index: int
    durable_log_index: int
    pending_proposals: int
    peers: int
    last_contact_ns: int
    configuration_index: int
    pending_configuration: bool
    log_bytes: int = 0
    snapshot_sent_bytes: int = 0
    snapshot_received_bytes: int = 0
    snapshots_installed: int = 0


class StateMachine(Protocol):
    """What the engine drives. Called from the engine's loop only."""

    @property
    def applied_index(self) -> int:
        """The highest index whose effects this process can see."""
        ...

    @property
    def durable_index(self) -> int:
        """The highest index whose effects survive a power cut; the journal is kept above it."""
        ...

    def may_apply(self) -> bool:
        """Asked before each group: False while the state takes no more, until what it holds in
        memory is durable, or what it reads first is in memory. Raises `DiskFull` when it waits for
        space."""
        ...

    def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        """Apply committed entries as one group, in order, or the first of them: as many as take no
        long time, none while the state is not ready; a result for each. The rest is passed again.

        A result that is an `ElasticKVError` instance is a deterministic rejection of that entry and
        is raised to its proposer. An entry whose effects find the disk full ends the group: it and
        what follows it have no effect and no result, and are passed again later; if it is the first
        one, `DiskFull` is raised. Raising anything else halts the node (fail-stop) with no entry of
        the group counted as applied.
        """
        ...


class SnapshotSource(Protocol):
    """Streams the state machine for a lagging follower, and installs such a stream."""

    def open_export(self) -> SnapshotExport:
        """A consistent snapshot at some applied index, streamed lazily. Raises `DiskFull` while the
        state waits for space."""
        ...

    def open_import(self) -> SnapshotImport:
        """Receives a stream into a place where a half-received one is never opened. Raises
        `DiskFull`."""
        ...


class SnapshotExport(Protocol):
    """One consistent snapshot being read."""

    applied_index: int

    def read_ahead(self, max_bytes: int) -> Callable[[], None] | None:
        """Work for any thread that should be done before the next `read`, so that this finds in
        memory what it reads; None where there is no need. It raises nothing."""
        ...

    def read(self, max_bytes: int) -> bytes:
        """The next chunk, b"" at the end. Raises `StoreCorrupt`, `Overloaded` when it has to be
        begun anew, and `DiskFull` while the state waits for space that this keeps from it."""
        ...

    def close(self) -> None:
        """Release the read transaction. Idempotent."""
        ...


class SnapshotImport(Protocol):
    """One snapshot being received."""

    def write(self, chunk: bytes) -> None:
        """Append a chunk. Raises a `CorruptionError` when the stream is malformed, and `DiskFull`.
        """
        ...

    def finish(self) -> int:
        """Verify the whole stream, make it the state atomically and durably; the applied index.

        Raises a `CorruptionError` (`WireError` for a stream that is not whole, among others) or
        `DiskFull`. Whatever it raises, the state is as it was; another error stops the node.
        """
        ...

    def abort(self) -> None:
        """Drop everything received. Idempotent."""
        ...


PeerHandler = Callable[[str, str, bytes], Awaitable[bytes]]
"""`(peer_node_id, method, payload) -> reply`; an `ElasticKVError` it raises reaches the caller."""


class RaftEngine(Protocol):
    """One member of the Raft group."""

    node_id: str

    async def start(self) -> None:
        """Open the journal, listen, and take part.

        Raises a `CorruptionError`, `StartupRefused`, `RemovedFromCluster`, `BindFailed`, or
        `DiskFull`.
        """
        ...

    async def stop(self) -> None:
        """Hand leadership over when leading, flush, and close."""
        ...

    def propose(self, payload: bytes, *, timeout_s: float) -> asyncio.Future[object]:
        """Append `payload` on this leader; resolves to what `apply` returned for it, or to an error
        (see above). Itself it raises nothing."""
        ...

    async def read_index(self, *, timeout_s: float) -> int:
        """An index such that state applied up to it is linearizable for a read that starts now.

        Works on every member: followers ask the leader. Raises `NoLeader` or `DeadlineExceeded`.
        """
        ...

    async def wait_applied(self, index: int, *, timeout_s: float) -> None:
        """Return once `index` is applied here. Raises `NoLeader` when this node takes no part, or
        `DeadlineExceeded`."""
        ...

    async def call(self, node_id: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        """One request to a peer's registered handler over the mutual-TLS peer transport.

        Raises `Unreachable` when it certainly was not sent, `OutcomeUnknown` when the connection
        was lost or time ran out afterwards, or the peer's own typed error.
        """
        ...

    def handle(self, method: str, handler: PeerHandler, *, members_only: bool = False) -> None:
        """Serve `method` for peers: for whoever has a node's certificate, or with `members_only`
        for those in the configuration in force here; the others get `NotLeader`."""
        ...

    def is_leader(self) -> bool:
        """True when this node leads and has committed an entry of its own term."""
        ...

    def status(self) -> EngineStatus:
        """Counters for RaftAdmin.Status, health and metrics."""
        ...

    def members(self) -> Sequence[Member]:
        """The current configuration, this node included."""
        ...

    def state_age_s(self) -> float:
        """Seconds since the applied state here is known to have been complete; inf = never."""
        ...

    def introduce(self, addresses: Mapping[str, str]) -> None:
        """Keep links with these nodes (id -> raft `host:port`) too, members or not; replaces the
        nodes introduced before."""
        ...

    def require_possible(self, change: MembershipChange) -> None:
        """Raise what `change_members` would raise now, before it appends anything."""
        ...

    async def change_members(self, change: MembershipChange, *, timeout_s: float) -> int:
        """Commit one change; the configuration's index. The entry is appended before this first
        yields to the loop.

        Raises what `propose` ends in, or what `raft.membership.plan_change` and
        `require_majority_up` raise.
        """
        ...

    async def transfer_leadership(self, target_id: str, *, timeout_s: float) -> None:
        """Hand leadership to `target_id` ("" = the most complete voter); returns when this node
        leads no more. New proposals are refused meanwhile.

        Raises `NotLeader` or `NoLeader`, `InvalidArgument` when the target cannot lead,
        `MembershipConflict` when it does not answer, or `DeadlineExceeded` when this node goes on
        leading.
        """
        ...

    def shed_clear_entries(self, index: int) -> None:
        """Entries up to `index` are in the clear and the later ones are not: the former leave the
        log once the state machine has made them durable, and no file that has held one of them, or
        anything that is in the log now, is used for later entries."""
        ...

    def on_role_change(self, callback: Callable[[Role, int], None]) -> None:
        """`callback(role, term)` after every change of role, term or known leader: what waits for
        any of them looks again. LEADER is announced once `is_leader()`."""
        ...

    def on_fatal(self, callback: Callable[[BaseException], None]) -> None:
        """`callback(error)` once, when the node must stop."""
        ...
