"""The loss of a model over batches: what a search may let grow."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drone.callers import warn
from drone.model.inputs import LABELS, flat, prepared, run

# Computes a batch's mean loss where the model does not return it.
LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class OneClassWarning(UserWarning):
    """A classifier predicts one class for all rows, though their labels differ."""


def batch_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    number: int,
    loss: LossFunction | None = None,
) -> tuple[float, int]:
    """Return a batch's mean loss, and over how many labels it is a mean.

    The loss is what the model returns: `.loss`, `["loss"]`, or the first of a tuple
    where the batch has labels.

    Args:
        model: run on the batch.
        batch: its arguments, on its device.
        number: of the batch, for messages.
        loss: (model, batch) → a scalar; None: the model's own.

    Returns:
        (loss, its weight): the labels that are not -100, without those a causal
        language model does not predict; the rows, where labels are no tensor of these.

    Raises:
        ValueError: the batch has no labels or only -100, or the model returns no loss,
            or one that is no scalar.

    >>> model = torch.nn.Linear(3, 1)
    >>> batch = {"input": torch.zeros(4, 3), "labels": torch.zeros(4)}
    >>> batch_loss(model, batch, 0, lambda model, batch: torch.tensor(0.5))
    (0.5, 4)
    """
    value, count, _ = _loss_of(model, batch, number, loss)
    return float(value.detach()), count


def loss_tensor(
    model: nn.Module,
    batch: Mapping[str, Any],
    number: int,
    loss: LossFunction | None = None,
) -> tuple[Tensor, int]:
    """As `batch_loss`, with the loss as a scalar tensor, for its gradients.

    >>> model = torch.nn.Linear(3, 1)
    >>> batch = {"input": torch.zeros(4, 3), "labels": torch.zeros(4)}
    >>> loss_tensor(model, batch, 0, lambda m, b: m(b["input"]).mean())[0].requires_grad
    True
    """
    value, count, _ = _loss_of(model, batch, number, loss)
    return value, count


def _loss_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    number: int,
    loss: LossFunction | None,
) -> tuple[Tensor, int, Any]:
    """The loss, its weight, and what the model returned."""
    given = flat(batch)
    named = [key for key in given if _names_labels(key) and given[key] is not None]
    output = run(model, batch) if loss is None else None
    value = _returned(output, bool(named)) if loss is None else loss(model, batch)
    if value is None and not named:
        raise ValueError(
            f"batch {number} has no labels; the loss needs them, or loss=."
        )
    if value is None:
        raise ValueError(
            f"{type(model).__name__} returns no loss for batch {number}; give loss=, "
            "(model, batch) → a scalar."
        )
    if torch.as_tensor(value).numel() != 1:
        raise ValueError(
            f"batch {number}: the loss has shape {tuple(value.shape)}; a scalar, the "
            "mean over the batch, is needed."
        )
    count = _weight(model, given, named)
    if count == 0:
        raise ValueError(f"batch {number}: every label is -100; there is no loss.")
    return torch.as_tensor(value), count, output


def _names_labels(key: str) -> bool:
    return key in LABELS or key.endswith(("label", "labels"))


def _returned(output: Any, labelled: bool) -> Any:
    """Take the loss out of what a model returns; None if there is none."""
    value = getattr(output, "loss", None)
    if value is None and isinstance(output, Mapping):
        value = output.get("loss")
    if value is None and labelled and isinstance(output, tuple) and output:
        first = output[0]
        value = first if isinstance(first, Tensor) and first.ndim == 0 else None
    return value


def _weight(model: nn.Module, given: Mapping[str, Any], named: list[str]) -> int:
    """Over how many labels the model's loss is a mean."""
    labels = given.get("labels", given[named[0]] if named else None)
    if isinstance(labels, Tensor) and labels.ndim > 0:
        if _shifts(model) and labels.ndim == 2:
            labels = labels[:, 1:]  # the first token of a row is not predicted
        return int((labels != -100).sum())  # -100 marks what the loss leaves out
    sizes = [len(v) for v in given.values() if isinstance(v, Tensor) and v.ndim > 0]
    return sizes[0] if sizes else 1


def _shifts(model: nn.Module) -> bool:
    """Whether the model is a causal language model that shifts its labels itself.

    So does transformers' own loss of such models; XLNet, say, has another.
    """
    if not hasattr(model, "loss_type") or not hasattr(model, "can_generate"):
        return False
    known: Any = model  # to nn.Module's types, these are tensors or modules
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    own_loss = code is None or "loss_function" not in code.co_names
    if own_loss or getattr(known.config, "is_encoder_decoder", False):
        return False
    return known.loss_type in (None, "ForCausalLM") and bool(known.can_generate())


def mean_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: LossFunction | None = None,
) -> float:
    """Mean loss of a model over batches, each label counting alike.

    Use inside `frozen(model)`.

    Args:
        model: any that returns a loss, or `loss` computes it.
        batches: as in `calibrate`, with labels.
        loss: as in `batch_loss`.

    Raises:
        ValueError: no batch, or as `batch_loss`.

    Warns:
        OneClassWarning: all rows get one class, and their labels are of several.

    >>> rows = {"input": torch.zeros(4, 3), "labels": torch.zeros(4)}
    >>> squares = lambda m, b: (m(b["input"])[:, 0] - b["labels"]).square().mean()
    >>> bool(mean_loss(torch.nn.Linear(3, 1), [rows], squares) >= 0)
    True
    """
    pairs, labels, predicted = [], set[int](), set[int]()
    for number, batch in enumerate(prepared(batches, model)):
        value, count, output = _loss_of(model, batch, number, loss)
        pairs.append((float(value.detach()), count))
        _note_classes(batch, output, labels, predicted)
    if not pairs:
        raise ValueError("no batch to compute a loss on; at least one is needed.")
    if len(predicted) == 1 and len(labels) > 1:
        warn(
            f"{type(model).__name__} predicts class {next(iter(predicted))} for every "
            f"row, and the labels are of {len(labels)} classes: its loss says little. "
            "Train it longer, or give batches that it tells apart.",
            OneClassWarning,
        )
    return mean(pairs)


def _note_classes(
    batch: Mapping[str, Any], output: Any, labels: set[int], predicted: set[int]
) -> None:
    """Add the classes of a classifier's rows and of its predictions to the sets."""
    right, logits = batch.get("labels"), getattr(output, "logits", None)
    if not isinstance(right, Tensor) or right.ndim != 1 or right.is_floating_point():
        return
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1:
        labels.update(right.unique().cpu().tolist())
        predicted.update(logits.argmax(1).unique().cpu().tolist())


def mean(pairs: list[tuple[float, int]]) -> float:
    """Mean of batch losses, each with its weight; the same bits wherever it is used."""
    return sum(loss * count for loss, count in pairs) / sum(n for _, n in pairs)
