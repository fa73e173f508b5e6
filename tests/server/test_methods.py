"""elastickv.server.methods: what both fronts share."""

from __future__ import annotations

import pytest

from elastickv.server.methods import DEFAULT_TIMEOUT_S, time_for_call


@pytest.mark.parametrize(("remaining_s", "given_s"), [
    (None, DEFAULT_TIMEOUT_S), (10.0, 9.9), (1.0, 0.9), (0.1, 0.09), (0.0, 0.0),
    (3600.0, 300.0)])
def test_a_call_leaves_time_for_its_error(remaining_s: float | None, given_s: float) -> None:
    assert time_for_call(remaining_s) == pytest.approx(given_s)
