"""One training by Trainer: its recipe, its steps, its checkpoints."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from drone import progress
from drone.devices import multiplies_bfloat16
from drone.lab.cache import newest_whole, refuse_diverged, seal
from drone.lab.ranges import check_fields


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned. Linear warm-up and decay, AdamW, clipping at 1.

    Raises:
        ValueError: a value out of its range; the message names it.
        TypeError: a value of another type, such as True for a number.

    >>> Recipe(epochs=0)
    Traceback (most recent call last):
    ValueError: epochs is 0; at least 1.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.01
    max_length: int = 128  # tokens; longer inputs are cut

    def __post_init__(self) -> None:
        check_fields(self, counts=("epochs", "batch_size"), positive=("learning_rate",))
        check_fields(self, shares=("warmup",), not_negative=("weight_decay",))
        # a word between what marks the beginning and the end
        check_fields(self, counts=("max_length",), least=3)


def bfloat16_gains(device: torch.device | str | None = None) -> bool:
    """Whether training on a device gains by bfloat16; None: where `Trainer` trains."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return multiplies_bfloat16(device)


class CheckedTrainer(Trainer):
    """Stops at the first loss that is not finite; the steps are Trainer's own."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take Trainer's step, and look at its loss.

        Raises:
            ValueError: it is not finite.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise ValueError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}: the "
                "training has diverged, and nothing of it is kept as finished. A "
                "smaller learning_rate may help."
            )
        return loss


def train_in_place(
    model: PreTrainedModel,
    rows: Dataset,
    recipe: Recipe,
    title: str,
    *,
    seed: int,
    checkpoints: Path,
    collator: Callable[[list[dict[str, Any]]], Any],
    trainer: type[CheckedTrainer] = CheckedTrainer,
    by_length: bool = False,
) -> float:
    """Train a model in place, from its newest whole checkpoint if there is one.

    Args:
        model: a copy: with bfloat16 Trainer leaves the forward it wrapped in it.
        rows: all their columns are given to the model, or to `trainer`.
        recipe: the hyperparameters; `max_length` is not used.
        title: of the bar that shows how far it is.
        seed: of the order of the rows and dropout.
        checkpoints: a folder; one is kept there after each epoch.
        collator: makes a batch of rows.
        trainer: what a step is.
        by_length: whether rows of one batch are of about one length, as padding asks.

    Returns:
        The seconds it took; since a resume, if any.

    Raises:
        ValueError: a loss or a weight that is not finite.
    """
    steps = -(-len(rows) // recipe.batch_size) * recipe.epochs
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=round(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        bf16=bfloat16_gains(),
        use_cpu=not torch.cuda.is_available(),  # else it refuses bfloat16 there
        seed=seed,
        save_strategy="epoch",
        save_total_limit=2,  # should the newest be cut off, one epoch is lost
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        train_sampling_strategy="group_by_length" if by_length else "random",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # a teacher's outputs are no input of the model
    )
    set_seed(seed)
    loop = trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[_Progress(title), _Seal()],
    )
    loop.remove_callback(PrinterCallback)  # it would print a dict at the end
    last = newest_whole(checkpoints)
    started = time.perf_counter()
    with progress.quiet():
        loop.train(resume_from_checkpoint=None if last is None else str(last))
    return round(time.perf_counter() - started, 1)


class _Progress(TrainerCallback):
    """One line that advances with the steps and shows the loss."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.bar = progress.bar(total=state.max_steps, desc=self.title)
        self.bar.update(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.bar.update(1)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.bar.close()


class _Seal(TrainerCallback):
    """Says of each checkpoint, once all its files are written, that it is whole."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        refuse_diverged(given["model"])
        seal(Path(args.output_dir or "") / f"checkpoint-{state.global_step}")
