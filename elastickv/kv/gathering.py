"""When a group of writes goes: at once, or after a moment for the callers of the last one.

Theory of operation. When a group ends, its callers get their answers and most of them write again;
but their writes come one by one, as fast as the RPC layer reads them, and a pump that takes the
first of them makes a tiny group, during which the others queue up. So group sizes swing between
one and all, and what a group costs whatever its size (an fsync on every member, a round of
messages) is paid twice as often as it need be.

The remedy is to remember, when a group ends, how many callers there were: those of the group, and
those who waited meanwhile. The next group goes as soon as `SHARE` of them wait, and in any case
after `PATIENCE` times the time that the last group took, at most `LIMIT_S`. From this follows

* that a lone caller never waits, but once for those who were there before;
* that after a pause nobody waits: the time counts from the end of the last group;
* that a guess which was wrong (callers who do not come back) costs a known multiple of what a
  group costs anyway, and that the next guess is made from what came;
* that writers who come at times of their own, faster than groups end, wait for one another again
  and again: at most those times, in exchange for fewer and larger groups;
* that where groups are fast, on a machine at rest, waits are short, and that they are long only
  where there is most to gain.
"""

from __future__ import annotations

# All but a straggler or two: waiting for the last one would cost every caller what it takes.
SHARE = 0.9
PATIENCE = 2.0
LIMIT_S = 0.012


class Gathering:
    """The memory of one pump. Times are in seconds of any one monotonic clock."""

    __slots__ = ("_started_s", "_until_s", "_wanted")

    def __init__(self) -> None:
        self._started_s = 0.0
        self._until_s = 0.0
        self._wanted = 0.0

    def group_started(self, now_s: float) -> None:
        """A group was proposed."""
        self._started_s = now_s

    def group_ended(self, now_s: float, size: int, waiting: int) -> None:
        """The group, of `size` writes, was answered while `waiting` others were in the queue."""
        self._wanted = SHARE * (size + waiting)
        self._until_s = now_s + min(LIMIT_S, PATIENCE * (now_s - self._started_s))

    def wait_s(self, now_s: float, waiting: int) -> float:
        """How long the `waiting` writes should wait for company; 0 = they go now."""
        if waiting >= self._wanted:
            return 0.0
        return max(0.0, self._until_s - now_s)
