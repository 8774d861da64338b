"""Three disjoint parts of a training split, and rows padded once on a device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

CALIBRATION = 0.1  # the paper's share of the training rows
MOST_HELD = 1000  # rows; more would judge no better and cost time at every rate


@dataclass(frozen=True)
class Split:
    """Row numbers of a training split, each in one part or in none.

    Attributes:
        fit: for fine-tuning and retraining.
        calibration: for calibration and rank search; no model is ever fitted to them.
        held: they judge rates, epochs and early choices.
    """

    fit: np.ndarray
    calibration: np.ndarray
    held: np.ndarray


def split(rows: int, seed: int) -> Split:
    """Draw the three parts: a tenth to calibrate, a tenth (1,000 at most) to judge.

    Args:
        rows: of the training split, at least 3.
        seed: of the draw; the same one gives the same parts.

    Raises:
        ValueError: too few rows.

    >>> parts = split(50, seed=0)
    >>> len(parts.fit), len(parts.calibration), len(parts.held)
    (40, 5, 5)
    """
    if rows < 3:
        raise ValueError(f"{rows} rows; at least 3, one for each part, are needed.")
    order = np.random.default_rng(seed).permutation(rows)
    tenth = max(1, round(CALIBRATION * rows))
    judges = min(tenth, MOST_HELD)
    calibration, held, fit = np.split(order, [tenth, tenth + judges])
    return Split(fit, calibration, held)


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of equal width on one device.

    Attributes:
        inputs: {name: (rows, width)}, what the model is called with.
        lengths: (rows,) tokens of each, on the CPU.
        labels: (rows,) classes, int64, or scores, float32.
    """

    inputs: dict[str, Tensor]
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def select(self, numbers: Sequence[int] | np.ndarray) -> "Rows":
        """Return some of the rows, in the order of `numbers`."""
        index = torch.as_tensor(np.asarray(numbers))
        there = index.to(self.labels.device)
        inputs = {name: tensor[there] for name, tensor in self.inputs.items()}
        return Rows(inputs, self.lengths[index], self.labels[there])

    def batch(self, index: Tensor, length: int) -> dict[str, Tensor]:
        """Return some rows as keyword arguments of a model, cut to a length."""
        return {name: tensor[index, :length] for name, tensor in self.inputs.items()}

    def batches(self, size: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return all rows, the short ones first, so that few pads are computed.

        Returns:
            Pairs of row numbers and a batch with `labels`, as `drone.search_ranks`
            takes it.
        """
        found = []
        for index in self.lengths.argsort(stable=True).split(size):
            there = index.to(self.labels.device)
            batch = self.batch(there, int(self.lengths[index].max()))
            found.append((there, batch | {"labels": self.labels[there]}))
        return found


def pad_rows(
    columns: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Rows:
    """Pad tokenized rows to their longest one and move them to a device.

    Args:
        columns: of lists, from `tokenize(...)[:]`, `labels` with them.
        tokenizer: knows the padding.
        device: where they stay.

    Raises:
        ValueError: a tokenizer that pads on the left; cutting would cut tokens off.
    """
    if tokenizer.padding_side != "right":
        raise ValueError("this tokenizer pads on the left; on the right is needed.")
    texts = {name: column for name, column in columns.items() if name != "labels"}
    padded = tokenizer.pad(texts, return_tensors="pt")
    lengths = padded["attention_mask"].sum(1)
    inputs = {name: tensor.to(device) for name, tensor in padded.items()}
    return Rows(inputs, lengths, torch.tensor(columns["labels"]).to(device))
