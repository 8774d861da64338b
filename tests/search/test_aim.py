"""The knob of a search: a goal is reached, little passed, and in few searches."""

from collections.abc import Callable
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drone.search.aim import CLOSE, NEAR, RUNS, smallest_budget
from drone.search.trials import Outcome

Curve = Callable[[float], float]


class Search:
    """Stands for a search: an increase gives a speed, told by one module's rank."""

    def __init__(self, curve: Curve) -> None:
        self.curve, self.runs = curve, dict[float, float]()

    def run(self, increase: float) -> Outcome:
        assert increase not in self.runs  # none is made twice
        speed = self.runs[increase] = self.curve(increase)
        return Outcome(nn.Identity(), {"m": round(speed * 1e9)}, 1.0, 5)

    def aim(self, wanted: float) -> tuple[float, Outcome]:
        found = smallest_budget(self.run, lambda ranks: ranks["m"] / 1e9 / wanted)
        return found.ranks["m"] / 1e9, found


@given(
    power=st.floats(0.05, 0.6), at=st.floats(1e-3, 30.0), wanted=st.floats(1.0, 10.0)
)
def test_a_smooth_goal_is_met_within_the_tolerance_in_few_searches(
    power: float, at: float, wanted: float
) -> None:
    # speed = wanted · (increase / at)^power reaches the goal at exactly `at`. A steeper
    # one may change by more than the tolerance within the nearest two increases.
    search = Search(lambda increase: wanted * (increase / at) ** power)
    speed, found = search.aim(wanted)
    assert wanted * (1 - 1e-8) <= speed <= wanted * (CLOSE + 1e-8)
    assert found.forwards == 5 * len(search.runs)
    # To go from 0.1 to `at` by factors of 4, then to close in.
    assert len(search.runs) <= 9
    if 0.05 < at < 1:
        assert len(search.runs) <= 6


@given(
    steps=st.lists(
        st.tuples(st.floats(1e-2, 10.0), st.floats(1.0, 1.5)), min_size=1, max_size=20
    ),
    wanted=st.floats(1.0, 3.0),
)
def test_a_coarse_grid_ends_at_the_smallest_increase_that_reaches(
    steps: list[tuple[float, float]], wanted: float
) -> None:
    def staircase(increase: float) -> float:
        speed = 0.9
        for place, factor in steps:
            speed *= factor if increase >= place else 1.0
        return speed

    search = Search(staircase)
    if staircase(inf) < wanted:
        with pytest.raises(ValueError, match="of the goal, and no more"):
            search.aim(wanted)
        return
    speed, _ = search.aim(wanted)
    reaching = [i for i, s in search.runs.items() if s >= wanted]
    missing = [i for i, s in search.runs.items() if s < wanted]
    assert speed == pytest.approx(min(search.runs[i] for i in reaching), abs=1e-8)
    # It was passed little, or no smaller increase, within 2 %, reaches it.
    if speed > wanted * CLOSE:
        assert min(reaching) / max(missing) < NEAR
    assert len(search.runs) <= RUNS


def test_where_no_increase_misses_the_goal_the_ranks_are_those_of_hardly_any() -> None:
    search = Search(lambda increase: 1.5)
    speed, _ = search.aim(1.2)
    assert speed == 1.5 and len(search.runs) == RUNS and min(search.runs) < 1e-9


def test_a_plateau_of_smallest_ranks_is_left() -> None:
    # From 0.001 on all modules have their smallest rank; less is enough.
    search = Search(lambda increase: min(3.0, 3.0 * (increase / 0.001) ** 0.3))
    speed, _ = search.aim(2.0)
    assert 2.0 * (1 - 1e-8) <= speed <= 2.0 * CLOSE


def test_a_goal_out_of_reach_tells_how_far_the_search_came() -> None:
    search = Search(lambda increase: 1.9)
    with pytest.raises(ValueError, match=r"reaches 95\.0% of the goal, and no more"):
        search.aim(2.0)
    assert len(search.runs) == RUNS
