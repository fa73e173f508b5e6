from __future__ import annotations

import threading
from pathlib import Path

import disturbances
import pytest
from disturbances import longest_pause_ms, under_load
from h2load import LoadFailed


@pytest.mark.parametrize(("calls", "pause_ms"), [
    pytest.param([], 10.0, id="nothing ended in the window"),
    pytest.param([(1_000, 1.0), (4_000, 1.0)], 5.0, id="from the last end to the window's"),
    pytest.param([(0, 6.0), (1_000, 7.0)], 6.0, id="from the window's beginning to the first end"),
    pytest.param([(0, 1.0), (0, 9.0)], 8.0, id="between two ends"),
    pytest.param([(0, 5.0), (9_000, 20.0)], 5.0, id="what ends later does not count"),
])
def test_longest_pause(calls: list[tuple[int, float]], pause_ms: float) -> None:
    assert longest_pause_ms(calls, 0, 10_000) == pytest.approx(pause_ms)


def test_operations_have_ended_when_a_load_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    began, failed, ended, following = (threading.Event() for _ in range(4))

    def measure_calls(*arguments: object, **options: object) -> None:
        began.wait()
        failed.set()
        raise LoadFailed("a put failed")

    def operate() -> None:
        began.set()
        failed.wait()
        ended.set()

    monkeypatch.setattr(disturbances, "WARM_UP_S", 0.0)
    monkeypatch.setattr(disturbances, "measure_calls", measure_calls)
    with pytest.raises(LoadFailed):
        under_load(None, 1, Path("nowhere"), quiet_s=0.0,  # type: ignore[arg-type]
                   operations=[operate, following.set], every_s=60.0)
    assert ended.is_set()
    assert not following.is_set()
