"""Turn the knob of a search, the allowed loss increase, until a goal is reached."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt

from drone.search.trials import Outcome

FIRST = 0.05  # the first increase that is tried
CLOSE = 1.01  # a goal passed by at most 1 % is reached well
FINE = 1.002  # increases nearer than that choose the same ranks, or nearly
RUNS = 24  # at most; bisection to FINE takes half of them


def smallest_budget(
    run: Callable[[float], Outcome], reached: Callable[[Mapping[str, int]], float]
) -> Outcome:
    """Find the smallest loss increase whose ranks reach a goal, by bisection.

    The increase grows fourfold until its ranks reach the goal, then the interval is
    halved (geometrically) until the goal is passed by at most 1 %, or the interval is
    too small to choose other ranks: a coarse grid steps over the goal.

    Args:
        run: increase → what the search chose with it.
        reached: ranks → what they reach over what is wanted; from 1 on it will do.

    Returns:
        Of the runs that reach the goal the one that passes it least, of these the one
        with the least increase; its `forwards` are those of all runs.

    Raises:
        ValueError: no run reaches the goal.
    """
    best: Outcome | None = None
    low, high, increase, forwards, closest = 0.0, 0.0, FIRST, 0, 0.0
    for _ in range(RUNS):
        found = run(increase)
        forwards += found.forwards
        here = reached(found.ranks)
        closest = max(closest, here)
        if here >= 1:
            high = increase
            if best is None or here <= reached(best.ranks):
                best = found
            if here <= CLOSE:
                break
        else:
            low = increase
        if not high:
            increase = low * 4
        elif not low:
            increase = high / 4
        elif high / low < FINE:
            break
        else:
            increase = sqrt(low * high)
    if best is None:
        raise ValueError(
            f"with a loss increase of {low:.3g} the search reaches {closest:.1%} of "
            "the goal, and no more with a larger one."
        )
    return replace(best, forwards=forwards)
