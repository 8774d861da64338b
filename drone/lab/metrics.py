"""The metrics GLUE defines, and how sure a difference of two models is."""

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drone.lab import data
from drone.lab.batches import predict


def _score(correct: Callable[..., float]) -> Callable[..., float]:
    """Compare class predictions: the arg max of the logits."""
    return lambda logits, labels: float(correct(labels, logits.argmax(-1)))


def _accuracy(labels: np.ndarray, told: np.ndarray) -> float:
    # Not scikit-learn's: a bootstrap asks a hundred thousand times, and its checks of
    # the arguments take a hundred times as long as the mean.
    return float(np.mean(labels == told))


def _matthews(labels: np.ndarray, told: np.ndarray) -> float:
    # Of two classes it is the correlation of two columns of 0 and 1; ours for the same
    # reason. Where a column is constant it is 0.
    one, other = labels - labels.mean(), told - told.mean()
    spread = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / spread if spread > 0 else 0.0


def _correlation(measure: Callable[..., Any]) -> Callable[..., float]:
    """Compare scores: the single output of a regression."""
    return lambda logits, labels: float(measure(logits[:, 0], labels).statistic)


# The metrics GLUE defines; the first of a task is the one a figure shows.
# Each takes logits (rows, outputs) and labels (rows,).
METRICS: dict[str, dict[str, Callable[..., float]]] = {
    name: {"accuracy": _score(_accuracy)} for name in data.TASKS
}
METRICS["cola"] = {"matthews": _score(_matthews)}
METRICS["stsb"] = {
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
for _name in ("mrpc", "qqp"):
    METRICS[_name]["f1"] = _score(f1_score)


def evaluate(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    batch_size: int = 32,
) -> dict[str, float]:
    """Score a model on tokenized rows with the task's GLUE metrics.

    Args:
        model: a classifier; its mode is restored.
        rows: from `tokenize`.
        tokenizer: pads each batch.
        task: one of `drone.lab.data.TASKS`.
        batch_size: rows at once. Rows are sorted by length, so few pads are computed.

    Returns:
        A number per metric, each in [-1, 1] or [0, 1]; a correlation of constant
        predictions is NaN.

    Raises:
        ValueError: the rows are unlabelled (the hub's test splits) or none; the
            logits are not finite.
    """
    labels = np.asarray(rows["labels"])
    if data.TASKS[task].labels and (labels < 0).any():
        raise ValueError(f"{task}: these rows have no labels; score another split.")
    logits = predict(model, rows, tokenizer, batch_size)
    return {name: metric(logits, labels) for name, metric in METRICS[task].items()}


def paired_bootstrap(
    task: str,
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    draws: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Say how sure a difference of two models is: draw the rows anew, for both alike.

    The percentiles of the result are an interval of the points lost: of what other
    rows of the kind would give, not of another training. Chapter 7.

    Args:
        task: one of `drone.lab.data.TASKS`; its first metric counts.
        labels: (rows,).
        before: logits of one model, (rows, outputs), from `predict`.
        after: logits of the other on the same rows.
        draws: how often.
        seed: of the rows drawn; calls with the same one draw the same rows.

    Returns:
        (draws,): 100 times the metric of `before` minus that of `after`, in points;
        NaN where a correlation of the drawn rows is not defined.

    Raises:
        ValueError: shapes that do not fit each other, no rows, or fewer than one draw.
    """
    shapes = [np.shape(each) for each in (labels, before, after)]
    if shapes[1] != shapes[2] or shapes[0] != shapes[1][:1] or 0 in shapes[1]:
        raise ValueError(
            f"labels, before and after have shapes {', '.join(map(str, shapes))}; "
            "(rows,) and twice (rows, outputs) are needed."
        )
    if draws < 1:
        raise ValueError(f"draws is {draws}; at least 1.")
    metric = next(iter(METRICS[task].values()))
    rng = np.random.default_rng(seed)
    lost = np.empty(draws)
    for number in range(draws):
        i = rng.integers(len(labels), size=len(labels))
        was, now = (metric(logits[i], labels[i]) for logits in (before, after))
        lost[number] = 100 * (was - now)
    return lost
