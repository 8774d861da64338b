"""How sure a difference of two methods is, over seeds and over rows."""

import numpy as np

from drone.lab.metrics import METRICS
from drone.lab.tables import Estimate


def majority(task: str, labels: np.ndarray) -> float:
    """Score in points of a model that always gives the commonest label.

    Args:
        task: a name of `drone.lab.data.TASKS` with classes; its first metric counts.
        labels: (rows,) classes.

    >>> float(majority("mrpc", np.array([1, 1, 0, 1])))
    75.0
    """
    logits = np.zeros((len(labels), int(labels.max()) + 1))
    logits[:, np.bincount(labels).argmax()] = 1
    metric = next(iter(METRICS[task].values()))
    return 100 * metric(logits, labels)


def paired(
    task: str,
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    draws: int = 500,
    seed: int = 0,
) -> Estimate:
    """Points by which one method scores above another, with a 95 % interval.

    Both are judged on the same seeds and rows, so what a hard row or an unlucky seed
    costs both cancels. The bootstrap draws seeds and rows anew, for both alike.

    Args:
        task: a name of `drone.lab.data.TASKS`; its first metric counts.
        labels: (rows,).
        before: logits of one method, (seeds, rows, outputs).
        after: logits of the other, in the same order.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        The mean over the seeds of 100 times the metric of `after` minus that of
        `before`; of one seed the interval is over rows alone.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if before.shape != after.shape or before.shape[1:2] != labels.shape:
        raise ValueError(
            f"labels {labels.shape}, before {before.shape}, after {after.shape}; "
            "(rows,) and twice (seeds, rows, outputs) are needed."
        )
    metric = next(iter(METRICS[task].values()))

    def gain(which: np.ndarray, rows: np.ndarray) -> float:
        told = labels[rows]
        each = [
            metric(after[s, rows], told) - metric(before[s, rows], told) for s in which
        ]
        return 100 * float(np.mean(each))

    seeds, count = before.shape[:2]
    rng = np.random.default_rng(seed)
    drawn = [
        gain(rng.integers(seeds, size=(seeds,)), rng.integers(count, size=(count,)))
        for _ in range(draws)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = gain(np.arange(seeds), np.arange(count))
    return Estimate(value, float(low), float(high))


def within(lost: Estimate, bar: float, margin: float) -> str:
    """Say whether no more than so many points are lost: yes, no, or not decided.

    The intervals of a model that loses exactly `bar` hold it, however many the rows;
    so *yes* needs a margin above it, as in a trial of non-inferiority.

    Args:
        lost: points lost, with an interval.
        bar: what may be lost, in points.
        margin: how far above it an interval of *yes* may still reach, in points.

    Returns:
        `no`: the whole interval is above the bar. `yes`: it ends below bar and margin
        together. `not decided`: neither.

    Raises:
        ValueError: a negative margin.

    >>> within(Estimate(1.4, -0.2, 2.8), bar=1.5, margin=1.5)
    'yes'
    """
    if margin < 0:
        raise ValueError(f"margin is {margin}; at least 0.")
    if lost.low > bar:
        return "no"
    return "yes" if lost.high < bar + margin else "not decided"
