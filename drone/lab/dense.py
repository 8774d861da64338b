"""The dense models that chapters 1, 3 and 4 share: one call, one recipe a task.

Rows of the training split have three parts (`drone.lab.parts`). Models are fitted to
*fit*; *held* judges early choices; *calibration* stays unseen by any training, for it
calibrates and judges ranks; the development rows only report.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drone.lab import data, encoders, parts
from drone.lab.batches import tokenize
from drone.lab.training import Recipe, retrain

# Of MiniLM. MRPC: as many epochs as two processor cores do in a quarter of an hour.
RECIPES = {
    "agreement": Recipe(epochs=1, batch_size=8, learning_rate=5e-5),
    "mrpc": Recipe(epochs=3, batch_size=16, learning_rate=1e-4),
    "sst2": Recipe(epochs=2, batch_size=32, learning_rate=1e-4),
}


@dataclass(frozen=True)
class Dense:
    """A fine-tuned model in eval mode, and its task's tokenized rows by their use.

    Attributes:
        model: fitted to `fit` alone.
        tokenizer: pads batches of the rows.
        fit: for fine-tuning and retraining.
        calibration: for calibration and rank search.
        held: for early choices.
        dev: development rows, to report on.
        key: SHA-256 over all that went into the training.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fit: Dataset
    calibration: Dataset
    held: Dataset
    dev: Dataset
    key: str


def dense_model(
    task: str,
    seed: int = 0,
    *,
    data_source: str = "embedded",
    encoder: str = "minilm",
    encoder_source: str = "embedded",
    rows: int = 0,
    recipe: Recipe | None = None,
    cache: Path | None = None,
) -> Dense:
    """Fine-tune an encoder on a task's fit rows, or read it from the cache.

    Args:
        task: a name of `drone.lab.data.TASKS`.
        seed: of the parts, the head, the order of the batches and dropout.
        data_source: `embedded`, `local` or `hub`.
        encoder: a name of `drone.lab.encoders.ENCODERS`.
        encoder_source: `embedded`, `local` or `hub`.
        rows: use so many of the training split, the same for every seed; 0: all.
        recipe: the hyperparameters; None: those of `RECIPES`.
        cache: as in `drone.lab.training.fine_tune`.

    Raises:
        ValueError: a task that has no recipe, when none is given; and what loading
            data and encoder, splitting and training raise.
    """
    if recipe is None:
        if task not in RECIPES:
            raise ValueError(
                f"no recipe for {task!r}; there are {', '.join(RECIPES)}. Give one."
            )
        recipe = RECIPES[task]
    dev = data.TASKS[task].dev_split
    corpus = data.load(task, data_source, ["train", dev])
    train = data.sample(corpus["train"], rows, 0) if rows else corpus["train"]
    outputs = len(data.TASKS[task].labels or ("score",))
    start, tokenizer = encoders.encoder(
        encoder, encoder_source, num_labels=outputs, seed=seed
    )
    text = tokenize(train, tokenizer, task, recipe.max_length)
    numbers = parts.split(len(text), seed)
    fit = text.select(numbers.fit)
    tuned = retrain(start, fit, tokenizer, seed=seed, recipe=recipe, cache=cache)
    return Dense(
        model=tuned.model,
        tokenizer=tokenizer,
        fit=fit,
        calibration=text.select(numbers.calibration),
        held=text.select(numbers.held),
        dev=tokenize(corpus[dev], tokenizer, task, recipe.max_length),
        key=tuned.key,
    )
