"""Rates are never chosen at the end of what was tried; a knob meets what is wanted."""

from math import inf, nan

import pytest

from drone.lab.ladder import RATES, START, Judged, aim, best_of, climb


@pytest.mark.parametrize("best", RATES)
def test_the_best_rate_has_a_worse_one_on_either_side(best: float) -> None:
    asked: list[float] = []

    def attempt(rate: float) -> Judged:
        asked.append(rate)
        return Judged(80.0 - abs(RATES.index(rate) - RATES.index(best)), 1.0)

    tried = climb(RATES, START, attempt)
    place = RATES.index(best)
    assert best_of(tried) == best
    assert set(RATES[max(0, place - 1) : place + 2]) <= set(tried)
    assert asked[: len(START)] == list(START)  # every arm begins with the same
    assert len(asked) == len(set(asked))  # and none is tried twice


def test_a_rate_that_diverged_is_never_the_best() -> None:
    told = {1: Judged(70, 5.0), 2: Judged(70, 4.0)}
    for gone in (Judged(nan, 1.0), Judged(99, nan), Judged(99, inf)):
        tried = climb([1, 2, 3], [2, 3], lambda rate, no=gone: told.get(rate, no))
        assert list(tried) == [1, 2, 3]
        assert best_of(tried) == 2


def test_a_better_score_beats_a_smaller_loss() -> None:
    # an overconfident classifier beside one that says the commonest label
    told = {1: Judged(78, 0.9), 2: Judged(72, 0.5), 3: Judged(72, 0.6)}
    tried = climb([1, 2, 3], [2, 3], told.__getitem__)
    assert tried == told
    assert best_of(tried) == 1


def test_between_equal_scores_the_loss_decides_then_the_lower_rate() -> None:
    losses = {1: 2.0, 2: 1.0, 3: 1.0, 4: 2.0}
    tried = climb([1, 2, 3, 4], [3], lambda rate: Judged(80, losses[rate]))
    assert best_of(tried) == 2
    assert list(tried) == [1, 2, 3, 4]


def test_all_diverged_and_a_foreign_start_are_errors() -> None:
    with pytest.raises(ValueError, match="diverged"):
        climb([1, 2], [1], lambda _: Judged(nan, nan))
    with pytest.raises(ValueError, match="start at"):
        climb([1, 2], [3], lambda _: Judged(0.0, 0.0))


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
