"""Moments at which many clients act: whoever wants to meet calls under way acts just after one."""

from __future__ import annotations

TICK_S = 0.1


def until_tick_s(now_s: float, pause_s: float) -> float:
    """A pause of about `pause_s` that ends at a tick, which is the same for all."""
    return max(0.0, round((now_s + pause_s) / TICK_S) * TICK_S - now_s)
