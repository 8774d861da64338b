"""Turn the knob of a search, the allowed loss increase, until a goal is reached."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import log

from drone.search.trials import Outcome

FIRST = 0.1  # the first increase that is tried
STEP = 4  # from one increase to the next, until two lie on either side of the goal
# A goal passed by at most 3 % is reached well. A rank is a tenth of a module's largest,
# and what one module takes moves all those behind it: finer is not to be had.
CLOSE = 1.03
NEAR = 1.02  # increases no further apart are one wish: the grid steps over the goal
RUNS = 20  # at most; where speed goes as a power of the increase, two to six


@dataclass(frozen=True)
class _Try:
    """One run: the increase it was allowed, and what its ranks reach of the goal."""

    increase: float
    reached: float


def smallest_budget(
    run: Callable[[float], Outcome], reached: Callable[[Mapping[str, int]], float]
) -> Outcome:
    """Find the smallest loss increase whose ranks reach a goal.

    The increase goes by factors of 4 until one misses the goal and one reaches it.
    Between them the next is where a power law would meet the goal; every second one is
    in the middle instead, so that the two close in whatever the curve. It ends at the
    first run that passes the goal by at most 3 %, or when the two increases are within
    2 %: a coarse grid steps over the goal. Two runs in a row that choose the same ranks
    cost next to nothing: the second makes no trial.

    Args:
        run: increase → what the search chose with it. Each is a whole search.
        reached: ranks → what they reach over what is wanted; from 1 on it will do.

    Returns:
        Of the runs that reach the goal the one that passes it least, of these the one
        with the least increase; its `forwards` are those of all runs.

    Raises:
        ValueError: no run reaches the goal.
    """
    best: Outcome | None = None
    low: _Try | None = None  # misses the goal
    high: _Try | None = None  # reaches it
    increase, forwards, closest, between = FIRST, 0, 0.0, 0
    for _ in range(RUNS):
        found = run(increase)
        forwards += found.forwards
        here = _Try(increase, reached(found.ranks))
        closest = max(closest, here.reached)
        if here.reached >= 1:
            high = here
            if best is None or here.reached <= reached(best.ranks):
                best = found
            if here.reached <= CLOSE:
                break
        else:
            low = here
        if high is None:
            increase *= STEP
        elif low is None:
            increase /= STEP
        elif high.increase / low.increase < NEAR:
            break
        else:
            increase = _between(low, high, halve=between % 2 == 1)
            between += 1
    if best is None:
        raise ValueError(
            f"with a loss increase of {increase / STEP:.3g} the search reaches "
            f"{closest:.1%} of the goal, and no more with a larger one."
        )
    return replace(best, forwards=forwards)


def _between(low: _Try, high: _Try, halve: bool) -> float:
    """Choose the next increase: where reached ~ increase^p passes half of CLOSE."""
    part = 0.5
    if not halve:
        wanted = log(CLOSE) / 2
        part = (wanted - log(low.reached)) / log(high.reached / low.reached)
    # Next to an end a step would teach nothing.
    step: float = (high.increase / low.increase) ** min(max(part, 0.2), 0.8)
    return low.increase * step
