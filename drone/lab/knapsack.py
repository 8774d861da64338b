"""One rank for each module: the least loss within a number of seconds."""

from collections.abc import Mapping

import numpy as np

from drone.search.costs import Costs

STEPS = 10_000  # the seconds that may be saved are counted in so many steps


def least_loss(
    costs: Costs, increases: Mapping[str, np.ndarray], speedup: float
) -> dict[str, int]:
    """Choose ranks that add least to the loss and meet a predicted speed-up.

    min Σ increase(module, rank) subject to Σ saved(module, rank) ≥ what the speed-up
    asks for: a multiple-choice knapsack, solved by dynamic programming. With L(s) the
    least increase of the modules so far that saves s steps of time,
    L'(s) = min over ranks of L(s − saved(rank)) + increase(rank).

    Args:
        costs: of the modules.
        increases: {name: (ranks + 1,)}, what each rank alone adds to the loss, dense
            last.
        speedup: of the whole model, above 1.

    Returns:
        {name: rank}; a module that stays dense is left out. Times are rounded to
        `STEPS`, so the prediction is met within a few thousandths.

    Raises:
        ValueError: the speed-up is not above 1, or the smallest ranks do not reach it.
    """
    if not speedup > 1:
        raise ValueError(f"the speed-up is {speedup}; a number above 1 is needed.")
    needed = costs.whole * (1 - 1 / speedup)
    unit = needed / STEPS
    best = np.full(STEPS + 1, np.inf)
    best[0] = 0.0
    choices = []
    for name, module in costs.modules.items():
        seconds = np.array(module.seconds)
        saved = np.round((seconds[-1] - seconds) / unit).astype(int)
        after = np.full_like(best, np.inf)
        choice = np.zeros(STEPS + 1, dtype=int)
        for option, gain in enumerate(saved):
            # a rank slower than dense moves back; more than is needed counts as all
            reached = _moved(best, int(gain)) + increases[name][option]
            better = reached < after
            after[better], choice[better] = reached[better], option
        choices.append((name, saved, choice, best))
        best = after
    if not np.isfinite(best[STEPS]):
        most = sum(c.seconds[-1] - min(c.seconds) for c in costs.modules.values())
        raise ValueError(
            f"a speed-up of {speedup} is asked for; the smallest ranks reach "
            f"{costs.whole / (costs.whole - most):.3f}."
        )
    ranks, place = {}, STEPS
    for name, saved, choice, before in reversed(choices):
        option = choice[place]
        module = costs.modules[name]
        if option < len(module.ranks):
            ranks[name] = module.ranks[option]
        place = _came_from(before, place, int(saved[option]))
    return {name: ranks[name] for name in costs.modules if name in ranks}


def _moved(best: np.ndarray, gain: int) -> np.ndarray:
    """L(s − gain) for every s; the last entry stands for "at least all"."""
    moved = np.full_like(best, np.inf)
    if gain <= 0:
        moved[: STEPS + 1 + gain] = best[-gain:]
        return moved
    gain = min(gain, STEPS)
    moved[gain:] = best[: STEPS + 1 - gain]
    moved[STEPS] = best[STEPS - gain :].min()
    return moved


def _came_from(before: np.ndarray, place: int, gain: int) -> int:
    """Where `_moved` took the entry at `place` from."""
    if gain > 0 and place == STEPS:
        first = STEPS - min(gain, STEPS)
        return first + int(before[first:].argmin())
    return place - gain
