import pytest
from ratios import Ratio, neighbour_ratios, percentile, summarize


def test_neighbours_with_the_baseline_first() -> None:
    # Turns: baseline 10, ours 20, baseline 40, ours 20.
    assert neighbour_ratios([20, 20], [10, 40]) == [2.0, 0.5, 0.5]


def test_neighbours_with_the_baseline_second() -> None:
    # Turns: ours 20, baseline 10, ours 30, baseline 40.
    assert neighbour_ratios([20, 30], [10, 40], baseline_first=False) == [2.0, 3.0, 0.75]


def test_one_turn_each_is_one_pair() -> None:
    assert neighbour_ratios([30], [20]) == [1.5]


@pytest.mark.parametrize(("rates", "baseline"), [([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_turns_that_do_not_pair_are_refused(rates: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError):
        neighbour_ratios(rates, baseline)


def test_summary_is_the_median_not_the_mean() -> None:
    assert summarize([1.0, 9.0, 1.2]) == Ratio(1.2, 1.0, 9.0, 3)


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        summarize([])


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 1), (0.5, 2), (0.75, 3), (0.99, 4)])
def test_nearest_rank(fraction: float, value: float) -> None:
    assert percentile([1, 2, 3, 4], fraction) == value
