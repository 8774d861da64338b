"""The loss of a model over batches: what a search may let grow."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from drone.model.calibrate import to_device


def batch_loss(
    model: nn.Module, batch: Mapping[str, Any], number: int
) -> tuple[float, int]:
    """Return a batch's mean loss, and over how many labels it is a mean.

    Raises:
        ValueError: the batch has no labels or only -100, or the model returns no loss.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"batch {number} has no labels; the loss needs them.")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss for batch {number}.")
    count = int((labels != -100).sum())  # -100 marks what the loss leaves out
    if count == 0:
        raise ValueError(f"batch {number}: every label is -100; there is no loss.")
    return float(loss.detach()), count


def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean loss of a model over batches, each label counting alike.

    Use inside `frozen(model)`.

    Raises:
        ValueError: as `batch_loss`.
    """
    pairs = [
        batch_loss(model, to_device(batch, model), number)
        for number, batch in enumerate(batches)
    ]
    return mean(pairs)


def mean(pairs: list[tuple[float, int]]) -> float:
    """Mean of batch losses, each with its weight; the same bits wherever it is used."""
    return sum(loss * count for loss, count in pairs) / sum(n for _, n in pairs)
