"""When to drop the beginning of the log, and up to where."""

from __future__ import annotations

from typing import NamedTuple

from elastickv.raft.settings import EngineSettings


class LogSize(NamedTuple):
    """What the rule looks at. `durable_state_index` is the state machine's durable index."""

    anchor_index: int
    last_index: int
    total_bytes: int
    durable_state_index: int


FEW_SEGMENTS = 8
MOST_AT_ONCE = 4


def segments_to_drop(droppable: int) -> int:
    """How many of `droppable` segments go now; asked for again a second later.

    One, so that deleting them is spread: a file system may tell the disk of every freed extent, and
    the disk then lets fsyncs wait. More when they come faster than one a second.
    """
    return min(droppable, 1 if droppable < FEW_SEGMENTS else MOST_AT_ONCE)


def compaction_target(size: LogSize, settings: EngineSettings) -> int:
    """The index up to which the log may be dropped now; 0 = leave it.

    Never above what the state machine has made durable, and a tail is kept for slow followers.
    """
    entries = size.last_index - size.anchor_index
    if entries <= settings.compact_entries and size.total_bytes <= settings.compact_bytes:
        return 0
    target = min(size.durable_state_index, size.last_index - settings.keep_entries)
    return target if target > size.anchor_index else 0
