"""Settings of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elastickv.raft.engine import Member


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One member's settings. Times are seconds unless the name says otherwise.

    `members` is the initial configuration; a stored one takes precedence. A node that is started
    for `joining` is no founding member: until it is one, `members` are those whom it asks for the
    configuration. `raft_address` is its own. `path` is the directory for the journal and its
    records. A new commit index waits up to `commit_delay_s` for entries to travel with before it
    gets a message of its own. Up to `inline_sync_bytes` (a lone small write) are synced in the
    loop, which is faster than a thread while nobody else waits for the loop. A follower leaves up
    to `apply_lag_entries` committed entries until its next tick, unless somebody waits for them
    there. A leader gives way when its fsync takes `stalled_sync_s` and the others could commit
    without it, or when its state has taken nothing and made nothing durable for `stalled_state_s`
    and another voter could lead: a slow flush takes seconds, and the others' disks may be no
    faster. A node whose disk was full sends nobody its state for `full_disk_pause_s`. What it
    remembers of peers is written, and the log compacted, every `housekeeping_s`.
    """

    node_id: str
    members: Sequence[Member]
    path: Path
    client_address: str = ""
    raft_address: str = ""
    joining: bool = False
    tick_s: float = 0.020
    heartbeat_s: float = 0.100
    commit_delay_s: float = 0.005
    election_min_s: float = 0.5
    election_max_s: float = 1.0
    leader_fallback_s: float = 1.0
    max_entry_bytes: int = 16 << 20
    segment_bytes: int = 64 << 20
    cache_bytes: int = 16 << 20
    batch_bytes: int = 1 << 20
    window_bytes: int = 4 << 20
    apply_group_bytes: int = 4 << 20
    apply_group_entries: int = 512
    apply_lag_entries: int = 64
    max_pending: int = 4096
    inline_sync_bytes: int = 2 << 10
    stalled_sync_s: float = 5.0
    stalled_state_s: float = 30.0
    compact_bytes: int = 256 << 20
    compact_entries: int = 1_000_000
    keep_entries: int = 10_000
    snapshot_chunk_bytes: int = 256 << 10
    snapshot_window_chunks: int = 4
    full_disk_pause_s: float = 60.0
    housekeeping_s: float = 1.0
    greeting_grace_s: float = 0.5

    @property
    def max_command_bytes(self) -> int:
        """The largest command in the log: an entry behind its kind."""
        return self.max_entry_bytes + 1
