import pytest
from disturbances import longest_pause_ms


@pytest.mark.parametrize(("calls", "pause_ms"), [
    pytest.param([], 10.0, id="nothing ended in the window"),
    pytest.param([(1_000, 1.0), (4_000, 1.0)], 5.0, id="from the last end to the window's"),
    pytest.param([(0, 6.0), (1_000, 7.0)], 6.0, id="from the window's beginning to the first end"),
    pytest.param([(0, 1.0), (0, 9.0)], 8.0, id="between two ends"),
    pytest.param([(0, 5.0), (9_000, 20.0)], 5.0, id="what ends later does not count"),
])
def test_longest_pause(calls: list[tuple[int, float]], pause_ms: float) -> None:
    assert longest_pause_ms(calls, 0, 10_000) == pytest.approx(pause_ms)
