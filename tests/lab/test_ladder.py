"""Rates are never chosen at the end of what was tried; a knob meets what is wanted."""

from math import inf, nan

import pytest

from drone.lab.ladder import RATES, START, aim, best_of, climb


@pytest.mark.parametrize("best", RATES)
def test_the_best_rate_has_a_worse_one_on_either_side(best: float) -> None:
    asked: list[float] = []

    def attempt(rate: float) -> float:
        asked.append(rate)
        return abs(RATES.index(rate) - RATES.index(best))

    tried = climb(RATES, START, attempt)
    place = RATES.index(best)
    assert best_of(tried) == best
    assert set(RATES[max(0, place - 1) : place + 2]) <= set(tried)
    assert asked[: len(START)] == list(START)  # every arm begins with the same
    assert len(asked) == len(set(asked))  # and none is tried twice


def test_a_rate_that_diverged_is_never_the_best() -> None:
    tried = climb([1, 2, 3], [2, 3], lambda rate: {1: 5.0, 2: 4.0}.get(rate, nan))
    assert tried == {1: 5.0, 2: 4.0, 3: inf}


def test_of_equal_rates_the_lowest_is_best_and_has_a_worse_one_below() -> None:
    losses = {1: 2.0, 2: 1.0, 3: 1.0, 4: 2.0}
    tried = climb([1, 2, 3, 4], [3], losses.__getitem__)
    assert best_of(tried) == 2
    assert tried == losses


def test_all_diverged_and_a_foreign_start_are_errors() -> None:
    with pytest.raises(ValueError, match="diverged"):
        climb([1, 2], [1], lambda _: nan)
    with pytest.raises(ValueError, match="start at"):
        climb([1, 2], [3], lambda _: 0.0)


@pytest.mark.parametrize("start", [1e-3, 0.3, 40.0])
@pytest.mark.parametrize("wanted", [1.5, 2.0, 3.0])
def test_the_knob_is_turned_until_it_fits(start: float, wanted: float) -> None:
    def speedup(budget: float) -> float:
        return 1 + 3 * budget / (budget + 1)  # from 1 to 4, bent

    tried = aim(speedup, wanted, start, tries=14)
    assert next(iter(tried.values())) == pytest.approx(wanted, rel=0.01)


def test_where_nothing_fits_the_nearest_try_comes_first() -> None:
    tried = aim(lambda budget: 1.0 if budget < 1 else 3.0, 2.2, 0.5, tries=6)
    assert len(tried) == 6
    assert next(iter(tried.values())) == 3.0
