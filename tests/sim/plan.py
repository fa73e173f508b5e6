"""What one run does, drawn from its seed before it starts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

FAULTS = (
    "crash", "crash-at-fsync", "crash-at-rename", "crash-at-send", "power-cut", "stop", "pause",
    "partition", "isolate-leader", "one-way", "flapping", "weather", "narrow", "reset",
    "fsync-error", "disk-full", "clock-step", "bit-flip", "old-disk", "long-absence", "transfer",
    "stranded-change",
)
"""Every fault that a run can draw; `nemesis.py` carries them out."""

SIZES = (3, 3, 3, 3, 5)

STORIES = ("", "", "", "", "", "promote", "dismiss", "leave", "join", "join-learner")
"""What becomes of the membership during a run: a learner is promoted or dismissed, a voter leaves
(perhaps the leader), or a node joins as a voter, or as a learner that is promoted then."""

BEGIN_WITH = {"leave": (3, 4), "join": (1, 2, 3), "join-learner": (1, 2, 3)}
"""How many voters there are before such a story."""

ENCRYPTION = ("none", "bootstrap", "storage", "full-early", "full-late")
"""How far a run takes the encryption life cycle, and when."""


@dataclass(frozen=True)
class Plan:
    """One run. Times are virtual seconds; `settings` are those of every engine. `size` counts the
    voters that it begins with."""

    seed: int
    size: int
    settings: dict[str, Any]
    encryption: str
    faults: tuple[str, ...]
    fault_gap_s: float
    fault_s: float
    clients: int
    flush_interval_ms: int
    sync_delay_s: float
    network_s: float
    rates: tuple[float, ...] = field(default=())
    story: str = ""
    max_overlay_bytes: int = 1 << 20

    @property
    def others(self) -> int:
        """How many nodes there are that do not vote at the beginning."""
        return int(self.story not in ("", "leave"))

    @property
    def fewest_voters(self) -> int:
        """How many voters there are at least at any time."""
        return self.size - (self.story == "leave")

    @property
    def joins(self) -> bool:
        """Whether the node that does not vote at the beginning is no member either."""
        return self.story.startswith("join")


def draw_plan(seed: int, generator: random.Random, enabled: tuple[str, ...] = FAULTS,
              sizes: tuple[int, ...] = SIZES) -> Plan:
    """The plan of `seed`. Small segments and logs make rolls, compaction and snapshots frequent."""
    size = generator.choice(sizes)
    heartbeat_s = generator.choice((0.05, 0.07))
    election_s = heartbeat_s * generator.choice((3.2, 4.5))
    compact_entries = generator.choice((12, 30, 1000))
    settings = {
        "tick_s": generator.choice((0.02, 0.035)),
        "heartbeat_s": heartbeat_s,
        "election_min_s": election_s,
        "election_max_s": 2 * election_s,
        "leader_fallback_s": 2 * election_s,
        "max_entry_bytes": 1 << 16,
        "segment_bytes": generator.choice((600, 3000, 1 << 20)),
        "cache_bytes": generator.choice((1, 1 << 20)),
        "batch_bytes": generator.choice((300, 1 << 16)),
        "window_bytes": generator.choice((600, 1 << 18)),
        "apply_group_entries": generator.choice((1, 7, 512)),
        "apply_lag_entries": generator.choice((0, 3, 64)),
        "inline_sync_bytes": generator.choice((0, 0, 1 << 20)),
        "compact_entries": compact_entries,
        "keep_entries": generator.choice((2, 8)) if compact_entries < 1000 else 1000,
        "snapshot_chunk_bytes": generator.choice((64, 1000, 1 << 16)),
        "housekeeping_s": 0.2,
        "greeting_grace_s": 2 * election_s,
        "full_disk_pause_s": 1.0,
    }
    story = generator.choice(STORIES) if size == min(SIZES) else ""
    size = generator.choice(BEGIN_WITH.get(story, (size,)))
    count = min(len(enabled), generator.choice((1, 2, 3, 4)))
    encryption = generator.choice(ENCRYPTION)
    faults = tuple(generator.sample(enabled, count))
    if not {"long-absence", "stranded-change"}.isdisjoint(faults):
        # Who was away is to be sent the state, not the log.
        settings |= {"segment_bytes": min(settings["segment_bytes"], 3000),
                     "compact_entries": 12, "keep_entries": 2}
    return Plan(
        seed=seed, size=size, settings=settings, encryption=encryption, faults=faults,
        fault_gap_s=generator.choice((0.1, 0.2, 0.35)), fault_s=generator.choice((0.8, 1.2, 1.8)),
        clients=generator.choice((2, 2, 4)), flush_interval_ms=generator.choice((15, 60, 150)),
        sync_delay_s=generator.choice((0.0005, 0.003, 0.01)),
        network_s=generator.choice((0.0005, 0.002, 0.008)),
        rates=tuple(generator.choice((1.0, 1.0, 0.95, 1.05)) for _ in range(size + 1)),
        story=story,
        max_overlay_bytes=generator.choice((1, 2000, 1 << 20)))
