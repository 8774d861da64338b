"""Turn a knob until it fits: a learning rate, or a budget that meets a speed."""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from typing import NamedTuple

# Each about three times the one before. The paper retrains at the lowest.
RATES = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
START = (3e-5, 1e-4)
AS_IS = 0.0  # a rate that changes nothing: the model before any retraining


class Judged(NamedTuple):
    """What held rows say of a model.

    The score decides and not the loss: a classifier that is too sure of itself has a
    larger loss than one that says the commonest label of every row, and is better.

    Attributes:
        score: the task's, in points; higher is better.
        loss: between equal scores the lower is better.
    """

    score: float
    loss: float

    @property
    def learnt(self) -> bool:
        """Whether the training gave numbers; it diverged otherwise."""
        return isfinite(self.score) and isfinite(self.loss)


def climb(
    rates: Sequence[float], start: Sequence[float], attempt: Callable[[float], Judged]
) -> dict[float, Judged]:
    """Try neighbouring rates until the best one has a worse one on either side.

    No choice stands at the end of what was tried, unless the list itself ends there.

    Args:
        rates: all that may be tried, ascending.
        start: those tried first.
        attempt: rate → score and loss; not finite: the training diverged.

    Returns:
        {rate: score and loss} of all that were tried, ascending.

    Raises:
        ValueError: a start that is not among the rates, or every rate diverged.

    >>> found = climb([1, 2, 3, 4, 5], [3], lambda rate: Judged(80, (rate - 2) ** 2))
    >>> {rate: judged.loss for rate, judged in found.items()}
    {1: 1, 2: 0, 3: 1, 4: 4}
    """
    if not start or not set(start) <= set(rates):
        raise ValueError(f"start at {list(start)}; some of {list(rates)} are needed.")
    tried: dict[float, Judged] = {}
    ahead = list(start)
    while ahead:
        for rate in ahead:
            tried[rate] = attempt(rate)
        place = rates.index(best_of(tried))
        beside = rates[max(0, place - 1) : place + 2]
        ahead = [rate for rate in beside if rate not in tried]
    if not any(judged.learnt for judged in tried.values()):
        raise ValueError(f"every rate of {sorted(tried)} diverged.")
    return dict(sorted(tried.items()))


def best_of(tried: Mapping[float, Judged]) -> float:
    """Return the rate with the highest score; of equals the least loss, the lowest.

    >>> best_of({1e-5: Judged(78.0, 0.9), 1e-4: Judged(72.0, 0.5)})
    1e-05
    """

    def order(rate: float) -> tuple[float, float, float]:
        judged = tried[rate]
        if not judged.learnt:
            return inf, inf, rate
        return -judged.score, judged.loss, rate

    return min(tried, key=order)


def aim(
    attempt: Callable[[float], float],
    wanted: float,
    start: float,
    tolerance: float = 0.01,
    tries: int = 6,
) -> dict[float, float]:
    """Turn a knob above 0 until what it gives is what is wanted.

    By false position in the knob's logarithm, once two values lie on either side;
    before that by factors of 4. What it gives should rise with the knob; where it
    does not quite, the nearest of the tries is what one gets.

    Args:
        attempt: knob → value above 0.
        wanted: the value.
        start: the knob's first setting.
        tolerance: relative; nearer is good enough.
        tries: at most.

    Returns:
        {knob: value} of all tries, the nearest first.

    >>> next(iter(aim(lambda knob: knob**2, wanted=2.0, start=1.0).values())) > 1.98
    True
    """
    tried: dict[float, float] = {}
    knob = start
    for _ in range(tries):
        tried[knob] = attempt(knob)
        if abs(tried[knob] / wanted - 1) <= tolerance:
            break
        below = [each for each, value in tried.items() if value < wanted]
        above = [each for each, value in tried.items() if value >= wanted]
        if not below:
            knob = min(tried) / 4
        elif not above:
            knob = max(tried) * 4
        else:
            low, high = max(below), min(above)
            share = (wanted - tried[low]) / (tried[high] - tried[low])
            # never next to an end: a curved function would creep
            knob = low * (high / low) ** min(max(share, 0.15), 0.85)
        if knob in tried:  # a function that jumps over what is wanted
            break
    return dict(sorted(tried.items(), key=lambda pair: abs(pair[1] / wanted - 1)))
