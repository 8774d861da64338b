"""Fine-tuning and retraining, with a cache keyed by everything that goes into it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drone.lab import data, encoders, keys
from drone.lab.batches import predict, tokenize
from drone.lab.cache import Kept, cached_training
from drone.lab.trainer import CheckedTrainer, train_in_place
from drone.lab.trainer import Recipe as Recipe
from drone.lab.trainer import bfloat16_gains as bfloat16_gains

FORMAT_VERSION = 3
TEMPERATURE = 2.0  # softens a teacher's probabilities
SOFT_TARGETS = "soft_targets"  # column of a teacher's outputs


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model in eval mode, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    key: str  # SHA-256 over everything that went into it
    seconds: float  # its training took, when it was trained; since a resume, if any
    cached: bool


def fine_tune(
    encoder: str = "minilm",
    task: str = "agreement",
    *,
    encoder_source: str = "embedded",
    data_source: str = "embedded",
    rows: int | None = None,
    seed: int = 0,
    recipe: Recipe | None = None,
    cache: Path | None = None,
) -> FineTuned:
    """Fine-tune an encoder on a task's training split, or read it from the cache.

    Args:
        encoder: a name of `drone.lab.encoders.ENCODERS`.
        task: a name of `drone.lab.data.TASKS`.
        encoder_source: `embedded`, `local` or `hub`.
        data_source: `embedded`, `local` or `hub`.
        rows: train on so many rows, drawn at random with `seed`; None: on all.
        seed: of the head, the draw, the order of the batches and dropout.
        recipe: the hyperparameters; None: the defaults.
        cache: a folder; None: `$DRONE_CACHE`, else `~/.cache/drone/fine-tuned`.

    Returns:
        The model in eval mode, float32. The same inputs give the same weights on the
        same kind of processor. A hit in the cache is said aloud; a training that was
        cut off goes on from its last epoch.

    Raises:
        ValueError: `rows` is below 1 or above what the split has; a training that
            diverged; a damaged file in the cache; and whatever `drone.lab.data.load`
            and `drone.lab.encoders.encoder` raise.
    """
    recipe = recipe or Recipe()
    if task not in data.TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(data.TASKS)}.")
    outputs = len(data.TASKS[task].labels or ("score",))
    train = data.load(task, data_source, splits=["train"])["train"]
    if rows is not None:
        train = data.sample(train, rows, seed)
    model, tokenizer = encoders.encoder(
        encoder, encoder_source, num_labels=outputs, seed=seed
    )
    inputs = {
        "task": task,
        "encoder": encoder,
        "rows": keys.of_rows(train),
    } | _inputs(model, tokenizer, recipe, seed)

    def run(start: PreTrainedModel, checkpoints: Path) -> dict[str, float]:
        rows_ = tokenize(train, tokenizer, task, recipe.max_length)
        title = f"fine-tune on {task}"
        return _train(start, tokenizer, rows_, title, checkpoints, recipe, seed)

    title = f"{encoder} on {task}, seed {seed}"
    return _found(cached_training(title, model, inputs, run, cache), tokenizer)


def _inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seed: int,
) -> dict[str, Any]:
    """All that a training depends on, but for the rows."""
    return {
        "format": FORMAT_VERSION,
        "start": keys.of_model(model),
        "tokenizer": keys.of_tokenizer(tokenizer),
        "seed": seed,
        "recipe": asdict(recipe),
        "bfloat16": bfloat16_gains(),
    } | keys.of_machine("transformers", "tokenizers", "accelerate")


def _found(
    kept: Kept[PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> FineTuned:
    seconds = kept.record["seconds"]
    return FineTuned(kept.model, tokenizer, kept.key, seconds, kept.cached)


def retrain(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: PreTrainedModel | None = None,
    logits: np.ndarray | None = None,
    seed: int = 0,
    recipe: Recipe | None = None,
    cache: Path | None = None,
) -> FineTuned:
    """Train a model on, such as a compressed one; its low-rank factors stay low-rank.

    Args:
        model: a classifier or regression; it is left as it was.
        rows: of the training split, from `tokenize`.
        tokenizer: pads each batch.
        teacher: learn its outputs instead of the labels. Classes: the cross-entropy
            to its probabilities, both softened by the temperature 2. One output: the
            squared difference. Its outputs are computed once, before the training.
        logits: the teacher's outputs themselves, (rows, outputs), from `predict`: for
            a teacher with another tokenizer. Not together with `teacher`.
        seed: of the order of the batches and dropout.
        recipe: the hyperparameters (its `max_length` is the rows'); None: the defaults.
        cache: as in `fine_tune`; the key holds the weights the training starts from
            and the teacher's outputs too.

    Returns:
        A trained copy in eval mode.

    Raises:
        ValueError: a teacher and logits too, another number of outputs or rows than
            the model's and the data's, logits that are not finite; no rows; a training
            that diverged; a damaged file in the cache.
    """
    recipe = recipe or Recipe()
    if teacher is not None and logits is not None:
        raise ValueError("a teacher and its logits: give one of them.")
    if teacher is not None:
        logits = predict(teacher, rows, tokenizer)
    if logits is not None:
        count, outputs = len(rows), model.config.num_labels
        if logits.shape != (count, outputs):
            raise ValueError(
                f"the teacher has {logits.shape[1]} outputs for {logits.shape[0]} "
                f"rows, the model {outputs} for {count}."
            )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if bad.size:
            raise ValueError(
                f"row {bad[0]}: the teacher's outputs are {logits[bad[0]]}; finite "
                "ones are needed."
            )
        rows = rows.add_column(SOFT_TARGETS, logits.tolist())
    inputs = {"rows": keys.of_rows(rows)} | _inputs(model, tokenizer, recipe, seed)

    def run(start: PreTrainedModel, checkpoints: Path) -> dict[str, float]:
        return _train(start, tokenizer, rows, "retrain", checkpoints, recipe, seed)

    title = f"retrained, seed {seed}"
    return _found(cached_training(title, model, inputs, run, cache), tokenizer)


class _SoftTrainer(CheckedTrainer):
    """Learns a teacher's outputs, which the rows carry, instead of the labels."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> Tensor:
        soft = inputs.pop(SOFT_TARGETS)
        inputs.pop("labels")
        return teacher_loss(model(**inputs).logits, soft)


def teacher_loss(logits: Tensor, told: Tensor) -> Tensor:
    """Say how far opinions are from a teacher's: what `retrain` minimizes.

    Args:
        logits: the model's, (rows, outputs).
        told: the teacher's, (rows, outputs).

    Returns:
        A number. Classes: the cross-entropy to the teacher's probabilities, both
        softened by the temperature 2, times its square (Hinton et al., 2015). One
        output: the mean squared difference.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != told.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and the teacher's {tuple(told.shape)}; "
            "one shape, (rows, outputs), is needed."
        )
    if logits.shape[-1] == 1:
        return F.mse_loss(logits, told)
    target = (told / TEMPERATURE).softmax(-1)
    # times T²: the gradient's size does not depend on the temperature
    return TEMPERATURE**2 * F.cross_entropy(logits / TEMPERATURE, target)


def choose_rate(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    logits: np.ndarray,
    held: int,
    rates: Sequence[float],
    seed: int = 0,
    recipe: Recipe | None = None,
    cache: Path | None = None,
) -> float:
    """Choose the learning rate of a retraining, by rows kept out of it.

    At every rate the model is retrained on a teacher's outputs, on all but the last
    `held` rows; the best rate leaves the least `teacher_loss` on those. No labels and
    no development rows take part. Chapters 7 and 8.

    Args:
        model: as in `retrain`; it is left as it was.
        rows: of the training split, from `tokenize`.
        tokenizer: pads each batch.
        logits: the teacher's outputs on all `rows`, (rows, outputs).
        held: how many rows, the last ones, judge.
        rates: learning rates to try; of equals the first is chosen.
        seed: as in `retrain`.
        recipe: the other hyperparameters.
        cache: as in `retrain`: the model of the chosen rate is in it afterwards.

    Returns:
        One of `rates`.

    Raises:
        ValueError: no rates; `held` leaves no row to train or to judge on; and what
            `retrain` raises.
    """
    if not rates or not 0 < held < len(rows):
        raise ValueError(
            f"{len(rates)} rates, {held} of {len(rows)} rows held back; at least one "
            "rate is needed, and at least one row on either side."
        )
    kept = len(rows) - held
    judges = rows.select(range(kept, len(rows)))
    told = torch.from_numpy(logits[kept:])
    losses = {}
    for rate in rates:
        taught = retrain(
            model,
            rows.select(range(kept)),
            tokenizer,
            logits=logits[:kept],
            seed=seed,
            recipe=replace(recipe or Recipe(), learning_rate=rate),
            cache=cache,
        ).model
        said = torch.from_numpy(predict(taught, judges, tokenizer))
        losses[rate] = float(teacher_loss(said, told))
    return min(losses, key=losses.__getitem__)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    title: str,
    checkpoints: Path,
    recipe: Recipe,
    seed: int,
) -> dict[str, float]:
    """Train a classifier in place, by the rows' labels or their soft targets."""
    if not len(rows):
        raise ValueError("no rows to train on; at least one is needed.")
    kind = _SoftTrainer if SOFT_TARGETS in rows.column_names else CheckedTrainer
    seconds = train_in_place(
        model,
        rows,
        recipe,
        title,
        seed=seed,
        checkpoints=checkpoints,
        collator=DataCollatorWithPadding(tokenizer),
        trainer=kind,
        by_length=True,
    )
    # No step tells what the last one did: weights of 1e30 are finite, their logits not.
    first = rows.select(range(min(len(rows), recipe.batch_size)))
    extra = {SOFT_TARGETS} & set(rows.column_names)
    predict(model, first.remove_columns(sorted(extra)), tokenizer)
    return {"seconds": seconds}
