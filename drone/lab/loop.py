"""A training loop with nothing around it: AdamW, warm-up and decay, clipping.

Trainer's own Python costs more than the step of a small model on a GPU; this loop's
does not. Chapter 7's cases are trained by it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from drone.lab.cache import own_randomness
from drone.lab.parts import Rows
from drone.lab.training import Recipe, bfloat16_gains
from drone.model.calibrate import frozen

POOL = 50  # batches whose rows are sorted by length together
CLIP = 1.0  # largest norm of all gradients together

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (rows, outputs), targets → number


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes; of one output the mean squared difference.

    Args:
        logits: (rows, outputs).
        labels: (rows,), int64 classes or float32 scores.
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)


def shuffled_batches(lengths: Tensor, size: int, draw: torch.Generator) -> list[Tensor]:
    """Draw batches of rows of about one length, so that few pads are computed.

    Args:
        lengths: (rows,) tokens of each.
        size: rows a batch; some are smaller.
        draw: where the randomness comes from.

    Returns:
        Row numbers of each batch; every row once.
    """
    found: list[Tensor] = []
    for pool in torch.randperm(len(lengths), generator=draw).split(POOL * size):
        by_length = pool[lengths[pool].argsort(stable=True)]
        found.extend(by_length.split(size))
    order = torch.randperm(len(found), generator=draw)
    return [found[number] for number in order]


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """Share of the full rate: rising linearly over `warmup` steps, then down to 0.

    >>> [rate_factor(step, 6, 2) for step in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return step / warmup
    return (steps - step) / max(1, steps - warmup)


def train(
    model: PreTrainedModel,
    rows: Rows,
    targets: Tensor,
    loss: Loss,
    recipe: Recipe,
    seed: int,
) -> None:
    """Train a model in place; it is in eval mode afterwards.

    bfloat16 where the processor has it, for products only: weights, logits and loss
    are float32. As in Trainer, biases and norms do not decay.

    Args:
        model: on the device of the rows.
        rows: to train on.
        targets: what the loss compares the logits with, one entry a row.
        loss: a mean over the rows of a batch.
        recipe: the hyperparameters; the rows are cut already.
        seed: of the order of the batches and of dropout.

    Raises:
        ValueError: rows and targets differ in number, or there are none.
    """
    if len(rows) != len(targets) or not len(rows):
        raise ValueError(
            f"{len(rows)} rows and {len(targets)} targets; as many of both."
        )
    decaying = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    device = rows.labels.device
    # counted as the batches are made, the small last ones of the pools included
    draw = torch.Generator().manual_seed(seed)
    epochs = [
        shuffled_batches(rows.lengths, recipe.batch_size, draw)
        for _ in range(recipe.epochs)
    ]
    steps = sum(map(len, epochs))
    warmup, step = round(recipe.warmup * steps), 0
    bf16 = bfloat16_gains()
    with own_randomness():
        torch.manual_seed(seed)
        model.train()
        for batches in epochs:
            # moved once an epoch: each move waits for the device
            order, start = torch.cat(batches).to(device), 0
            for batch in batches:
                index, start = order[start : start + len(batch)], start + len(batch)
                for group in optimizer.param_groups:
                    factor = rate_factor(step, steps, warmup)
                    group["lr"] = recipe.learning_rate * factor
                inputs = rows.batch(index, int(rows.lengths[batch].max()))
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = model(**inputs).logits
                loss(logits.float(), targets[index]).backward()
                clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    model.eval()


def logits_of(model: PreTrainedModel, rows: Rows, size: int = 128) -> Tensor:
    """Return logits (rows, outputs), float32, in the order of the rows; NaN may be.

    Args:
        model: on the device of the rows; its mode is restored.
        rows: to be scored.
        size: rows at once.
    """
    found: Tensor | None = None
    with frozen(model):
        for index, batch in rows.batches(size):
            batch.pop("labels")
            part = model(**batch).logits.float()
            if found is None:
                found = part.new_empty(len(rows), part.shape[1])
            found[index] = part
    assert found is not None  # `Rows` are never made of nothing
    return found
