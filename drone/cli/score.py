"""What held rows say of two models: loss and accuracy, with an interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drone import progress
from drone.model.calibrate import to_device

DRAWS = 2000


@dataclass(frozen=True)
class Scores:
    """Of one model, row by row: loss, and whether it is right (None: a regression)."""

    losses: np.ndarray
    right: np.ndarray | None


def score(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Scores:
    """Run a classifier over batches; cross-entropy, or squared error of one output.

    Raises:
        ValueError: a loss is not finite.
    """
    losses, right = [], []
    with torch.inference_mode():
        for batch in progress.bar(batches, desc="held rows"):
            inputs = to_device(batch, model)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits.float()
            if logits.shape[1] == 1:
                losses.append((logits[:, 0] - labels) ** 2)
            else:
                losses.append(F.cross_entropy(logits, labels, reduction="none"))
                right.append(logits.argmax(-1) == labels)
    found = torch.cat(losses).double().cpu().numpy()
    if not np.isfinite(found).all():
        raise ValueError("the loss on a held row is not finite.")
    return Scores(found, torch.cat(right).cpu().numpy() if right else None)


def interval(
    dense: np.ndarray, small: np.ndarray, ratio: bool
) -> tuple[float, float, float]:
    """Compare two means over the same rows, with a 95 % interval.

    Args:
        dense: (rows,) one number a row.
        small: (rows,) the same rows.
        ratio: small over dense, less 1; else small less dense.

    Returns:
        (value, low, high), a percentile bootstrap over rows, both models' together.
    """
    rng = np.random.default_rng(0)
    draws = rng.integers(len(dense), size=(DRAWS, len(dense)))

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result: np.ndarray = b / np.maximum(a, 1e-300) - 1 if ratio else b - a
        return result

    value = compare(np.asarray(dense.mean()), np.asarray(small.mean()))
    drawn = compare(dense[draws].mean(1), small[draws].mean(1))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(value), float(low), float(high)
