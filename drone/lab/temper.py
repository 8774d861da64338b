"""Take a classifier's overconfidence away, so that its loss says what damage does.

On rows it was not fitted to, a fine-tuned model is too sure of itself: anything that
makes it less sure, damage too, lowers its loss, and a search that may raise the loss by
so much would cut without end. Dividing all logits by one temperature changes no
decision and removes that (Guo et al., 2017).
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from drone.model.calibrate import frozen

# Tried in turn: from four times as sure to sixteen times less sure, 3 % apart.
TEMPERATURES = tuple(2 ** (step / 24) for step in range(-48, 97))


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the divisor of the logits with which the cross-entropy is least.

    Args:
        logits: (rows, classes).
        labels: (rows,) classes.

    >>> sure = torch.tensor([[9.0, 0.0]] * 4)  # right three times of four
    >>> round(temperature(sure, torch.tensor([0, 0, 0, 1])))  # 9 / log 3
    8
    """
    losses = [float(F.cross_entropy(logits / t, labels)) for t in TEMPERATURES]
    return TEMPERATURES[losses.index(min(losses))]


def tempered(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[PreTrainedModel, float]:
    """Return a copy whose last layer is divided by the temperature of these rows.

    Args:
        model: a classifier; one with a single output, a regression, is copied as it is.
        batches: rows it was not fitted to, with `labels`.

    Returns:
        The copy in eval mode, and the temperature; 1 for a regression.
    """
    small = copy.deepcopy(model).eval()
    if small.config.num_labels == 1:
        return small, 1.0
    with frozen(small):
        logits = torch.cat([small(**batch).logits for batch in batches])
    divisor = temperature(logits, torch.cat([batch["labels"] for batch in batches]))
    head = last_linear(small)
    with torch.no_grad():
        head.weight.div_(divisor)
        if head.bias is not None:
            head.bias.div_(divisor)
    return small, divisor


def last_linear(model: nn.Module) -> nn.Linear:
    """Return the layer that makes the logits."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
