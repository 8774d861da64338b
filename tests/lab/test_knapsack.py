"""The knapsack against all there is to choose from."""

from itertools import product
from math import inf

import numpy as np
import pytest

from drone.lab.knapsack import least_loss
from drone.search.costs import Costs, ModuleCosts


def make_costs(seed: int, modules: int = 5, options: int = 3) -> tuple[Costs, dict]:
    draw = np.random.default_rng(seed)
    made, lost = {}, {}
    for number in range(modules):
        seconds = np.sort(draw.uniform(0.1, 1, options + 1))
        if number == 0:
            seconds[1] = 1.1 * seconds[-1]  # one slower than dense
        ranks = tuple(range(1, options + 1))
        weights = tuple(range(1, options + 2))
        made[f"m{number}"] = ModuleCosts("k", ranks, weights, tuple(seconds))
        falling = -np.sort(-draw.uniform(0, 1, options))
        lost[f"m{number}"] = np.append(falling, 0.0)
    whole = 0.3 + sum(m.seconds[-1] for m in made.values())
    return Costs(whole, made), lost


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("speedup", [1.05, 1.3, 1.6])
def test_nothing_loses_less_at_that_speed(seed: int, speedup: float) -> None:
    costs, lost = make_costs(seed)
    names = list(costs.modules)
    everything = []  # (speed-up, loss) of all there is to choose from
    for options in product(range(4), repeat=len(names)):
        pairs = list(zip(names, options, strict=True))
        ranks = {n: o + 1 for n, o in pairs if o < 3}
        everything.append((costs.speedup(ranks), sum(lost[n][o] for n, o in pairs)))

    def best(wanted: float) -> float:
        return min((loss for speed, loss in everything if speed >= wanted), default=inf)

    if best(speedup) == inf:
        with pytest.raises(ValueError, match="smallest ranks reach"):
            least_loss(costs, lost, speedup)
        return
    ranks = least_loss(costs, lost, speedup)
    found = sum(lost[n][costs.modules[n].option(ranks.get(n))] for n in names)
    # times are rounded: a choice a thousandth too slow may be taken
    assert best(0.999 * speedup) - 1e-9 <= found <= best(1.001 * speedup) + 1e-9
    assert costs.speedup(ranks) >= 0.999 * speedup


def test_a_speed_below_the_dense_models_is_no_speed_up() -> None:
    costs, lost = make_costs(0)
    with pytest.raises(ValueError, match="above 1"):
        least_loss(costs, lost, 1.0)
