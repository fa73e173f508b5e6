"""When to drop the beginning of the log, and up to where."""

from __future__ import annotations

from typing import NamedTuple

from elastickv.raft.settings import EngineSettings


class LogSize(NamedTuple):
    """What the rule looks at. `durable_state_index` is the state machine's durable index. Without
    the segments up to `surplus_index` the log would be within its limit of bytes; it is the anchor
    where the log is within it already. Up to `clear_index` go segments with entries in the clear
    (at most the anchor: there are none). A peer that was sent the state needs what follows
    `sent_index` (None: there is none)."""

    anchor_index: int
    last_index: int
    durable_state_index: int
    surplus_index: int
    clear_index: int = 0
    sent_index: int | None = None


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

    Never above what the state machine has made durable. A tail is kept for slow followers: so many
    entries, but no more bytes of them than the log may have. Whoever is sent the state is slower
    than that, and what follows it is kept whatever it takes: else it would have to be sent again,
    and under load for ever. Of what is in the clear no tail is kept: a member that joins is to be
    sent the state, and not that.
    """
    tail_index = size.clear_index
    if size.last_index - size.anchor_index > settings.compact_entries \
            or size.surplus_index > size.anchor_index:
        tail_index = max(tail_index, size.surplus_index, size.last_index - settings.keep_entries)
    target = min(size.durable_state_index, tail_index)
    if size.sent_index is not None:
        target = min(target, size.sent_index)
    return target if target > size.anchor_index else 0
