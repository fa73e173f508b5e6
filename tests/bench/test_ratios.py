import pytest
from ratios import (
    Ratio,
    in_slices,
    in_turns,
    nearest_ratios,
    percentile,
    summarize,
    with_ratios,
)


@pytest.mark.parametrize(("rates", "baseline", "ratios"), [
    pytest.param({1: 20, 3: 20}, {0: 10, 2: 40}, [2.0, 0.5, 0.5], id="in turns, baseline first"),
    pytest.param({0: 20, 2: 30}, {1: 10, 3: 40}, [2.0, 3.0, 0.75], id="in turns, baseline second"),
    pytest.param({1: 20, 4: 30}, {0: 10, 3: 40}, [2.0, 0.75], id="a third one after it"),
    pytest.param({2: 20, 5: 30}, {0: 10, 3: 40}, [0.5, 0.75], id="a third one before it"),
    pytest.param({1: 20, 2: 30, 5: 60}, {0: 10, 3: 40, 4: 20}, [2.0, 0.75, 3.0],
                 id="slices of which the first changes"),
    pytest.param({1: 30}, {0: 20}, [1.5], id="one turn each"),
    pytest.param({1: 30}, {}, [], id="no baseline"),
])
def test_each_turn_is_compared_with_the_nearest(
        rates: dict[int, float], baseline: dict[int, float], ratios: list[float]) -> None:
    assert nearest_ratios(rates, baseline) == ratios


def test_a_baseline_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline"):
        nearest_ratios({1: 1.0}, {0: 0.0})


def test_places_are_those_of_the_order_of_measuring() -> None:
    assert in_turns([7, 8], 1, 3) == {1: 7, 4: 8}
    assert in_turns([7, 8], 2, 3) == {2: 7, 5: 8}
    # off, on; on, off; off, on
    assert in_slices([7, 8, 9], 0) == {0: 7, 3: 8, 4: 9}
    assert in_slices([7, 8, 9], 1) == {1: 7, 2: 8, 5: 9}


def turns(*rates: float) -> list[dict[str, float]]:
    return [{"rate": rate} for rate in rates]


def test_ratios_of_a_document_are_those_of_its_turns() -> None:
    side_by_side = {"etcd": turns(10, 40), "elastickv": turns(20, 30)}
    found = with_ratios({
        "plan": {}, "plain": {"put": {**side_by_side, "ratio": {"median": 99}}},
        "plain_aio": {"put": side_by_side}, "tls": {"put": side_by_side},
        "encryption": {"put": {"off": turns(10, 40, 20), "on": turns(20, 30, 60)}},
        "encryption_aio": {"put": {"off": turns(10, 40), "on": turns(20, 20)}}})
    assert found["plan"] == {}
    assert found["plain"]["put"]["ratio"] == Ratio(1.375, 0.75, 2.0, 2)._asdict()
    assert found["plain_aio"]["put"]["ratio"] == Ratio(0.625, 0.5, 0.75, 2)._asdict()
    assert found["tls"]["put"]["ratio"] == Ratio(0.75, 0.5, 2.0, 3)._asdict()
    assert found["encryption"]["put"]["ratio"] == Ratio(2.0, 0.75, 3.0, 3)._asdict()
    assert found["encryption_aio"]["put"]["ratio"] == Ratio(1.25, 0.5, 2.0, 2)._asdict()
    assert with_ratios(found) == found


def test_summary_is_the_median_not_the_mean() -> None:
    assert summarize([1.0, 9.0, 1.2]) == Ratio(1.2, 1.0, 9.0, 3)


def test_a_ratio_is_printed_with_its_spread() -> None:
    assert f"{Ratio(0.834, 0.676, 0.9, 3)}" == "0.83 [0.68 to 0.90]"


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        summarize([])


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 1), (0.5, 2), (0.75, 3), (0.99, 4)])
def test_nearest_rank(fraction: float, value: float) -> None:
    assert percentile([1, 2, 3, 4], fraction) == value
