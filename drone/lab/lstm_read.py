"""Read texts with an LSTM language model: losses of every word, and their summary."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from drone.lab.cases import pack
from drone.lab.language import STEPS, windows
from drone.lab.lstm_model import LSTMLanguageModel
from drone.lab.lstm_step import Parts, multiplied, tf32
from drone.model.calibrate import frozen

PARTS = 10  # of a text read side by side, as `drone.language.perplexity` does
BLOCKS = 200  # of the test text, for a paired block bootstrap
# Words by how often they occur in the training text; the bounds of chapter 6.
BANDS = (0, 10, 100, 1000, 10_000)


def read_texts(
    shell: LSTMLanguageModel,
    parts: Parts,
    texts: Mapping[str, Tensor],
    side_by_side: int = PARTS,
) -> dict[str, Tensor]:
    """Return -log p of every token of several texts, in nats, read all at once.

    Each text is cut into `side_by_side` parts as `drone.language.token_losses` does,
    and all parts of all texts make one batch: as many steps as the longest text alone.
    In float32; a thin weight is multiplied out, which is the same function.

    Args:
        shell: a dense model, for its structure.
        parts: its weights.
        texts: {name: (tokens,)}.
        side_by_side: parts of each text.

    Returns:
        {name: (tokens,) float32}, on the CPU.

    Raises:
        ValueError: fewer tokens than parts, or a loss that is not finite.
    """
    cuts = [
        next(windows(ids, side_by_side, -(-len(ids) // side_by_side)))
        for ids in texts.values()
    ]
    length = max(before.shape[1] for before, _ in cuts)
    device = shell.device
    before, labels = (
        torch.cat(
            [F.pad(cut[i], (0, length - cut[i].shape[1]), value=fill) for cut in cuts]
        ).to(device)
        for i, fill in ((0, 0), (1, -100))
    )
    found, states = [], None
    with frozen(shell), tf32(False):
        weights = multiplied(parts, torch.float32)
        for start in range(0, length, STEPS):
            here = slice(start, start + STEPS)
            output = functional_call(
                shell, weights, (before[:, here],), {"states": states}
            )
            states = output.states
            found.append(
                F.cross_entropy(
                    output.logits.transpose(1, 2), labels[:, here], reduction="none"
                )
            )
    rows = torch.cat(found, dim=1).cpu().split(side_by_side)
    losses = {}
    for (name, ids), (cut, _), row in zip(texts.items(), cuts, rows, strict=True):
        losses[name] = row[:, : cut.shape[1]].flatten()[: len(ids)]
        odd = ~losses[name].isfinite()
        if odd.any():
            raise ValueError(f"{name}, token {int(odd.nonzero()[0])}: no finite loss.")
    return losses


def mean_losses(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean of each text, and of both halves of `valid`, in nats.

    Searches see the first half of the validation text, choices are made on the second,
    the test text only reports.
    """
    half = len(losses["valid"]) // 2
    pieces = dict(losses) | {
        "valid_first": losses["valid"][:half],
        "valid_second": losses["valid"][half:],
    }
    return {name: float(piece.double().mean()) for name, piece in pieces.items()}


def compared(
    losses: Mapping[str, Tensor], dense: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return mean losses, and the test text's in `BLOCKS`, less the dense model's.

    The mean difference of each block is what a paired block bootstrap draws from.
    """
    gaps = (losses["test"] - dense["test"]).double().numpy()
    blocks = [block.mean() for block in np.array_split(gaps, BLOCKS)]
    return mean_losses(losses) | {"test_blocks": pack(blocks)}


def by_band(
    losses: Tensor, dense: Tensor, ids: Tensor, counts: Tensor
) -> list[dict[str, float]]:
    """Say which words became more surprising, by their frequency in training.

    Args:
        losses: (tokens,), of a model.
        dense: (tokens,), of the trained one on the same text.
        ids: (tokens,), the text.
        counts: (words,), how often each occurs in the training text.

    Returns:
        One entry a band of `BANDS`, rarest first: `from` (the least count), `tokens`,
        `mean` difference in nats and its standard error `sem`; both 0 where a band has
        fewer than two tokens.
    """
    gaps = (losses - dense).double().numpy()
    band = np.digitize(counts[ids].numpy(), BANDS[1:])
    found = []
    for number, least in enumerate(BANDS):
        mine = gaps[band == number]
        few = len(mine) < 2
        found.append(
            {
                "from": float(least),
                "tokens": float(len(mine)),
                "mean": 0.0 if few else float(mine.mean()),
                "sem": 0.0 if few else float(mine.std(ddof=1) / len(mine) ** 0.5),
            }
        )
    return found
