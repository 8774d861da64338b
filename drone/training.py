"""Fine-tuning and retraining, with a cache keyed by everything that goes into it."""

import copy
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from drone import data, models, progress
from drone.files import check_sha256, sha256, tensors_sha256, whole_folder
from drone.moments import frozen

FORMAT_VERSION = 2
TEMPERATURE = 2.0  # softens a teacher's probabilities
SOFT_TARGETS = "soft_targets"  # column of a teacher's outputs
DEFAULT_CACHE = Path.home() / ".cache" / "drone" / "fine-tuned"


def _score(correct: Callable[..., float]) -> Callable[..., float]:
    """Compare class predictions: the arg max of the logits."""
    return lambda logits, labels: float(correct(labels, logits.argmax(-1)))


def _correlation(measure: Callable[..., Any]) -> Callable[..., float]:
    """Compare scores: the single output of a regression."""
    return lambda logits, labels: float(measure(logits[:, 0], labels).statistic)


# The metrics GLUE defines; the first of a task is the one a figure shows.
# Each takes logits (rows, outputs) and labels (rows,).
METRICS: dict[str, dict[str, Callable[..., float]]] = {
    name: {"accuracy": _score(accuracy_score)} for name in data.TASKS
}
METRICS["cola"] = {"matthews": _score(matthews_corrcoef)}
METRICS["stsb"] = {
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
for _name in ("mrpc", "qqp"):
    METRICS[_name]["f1"] = _score(f1_score)


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned. Linear warm-up and decay, AdamW, clipping at 1."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.01
    max_length: int = 128  # tokens; longer inputs are cut


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model in eval mode, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    key: str  # SHA-256 over everything that went into it
    seconds: float  # its training took, when it was trained; since a resume, if any
    cached: bool


def bfloat16_gains() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32.

    One without such instructions emulates them, at a hundredth of the speed.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: str, max_length: int = 128
) -> Dataset:
    """Turn text columns into `input_ids`, `attention_mask`, ... and `labels`.

    Nothing is padded here: batches are padded to their own longest row.
    """
    columns = [list(rows[column]) for column in data.TASKS[task].columns]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return Dataset.from_dict(dict(encoded) | {"labels": list(rows["label"])})


def evaluate(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    batch_size: int = 32,
) -> dict[str, float]:
    """Score a model on tokenized rows with the task's GLUE metrics.

    Args:
        model: a classifier; its mode is restored.
        rows: from `tokenize`.
        tokenizer: pads each batch.
        task: one of `drone.data.TASKS`.
        batch_size: rows at once. Rows are sorted by length, so few pads are computed.

    Returns:
        A number per metric, each in [-1, 1] or [0, 1]; a correlation of constant
        predictions is NaN.

    Raises:
        ValueError: the rows are unlabelled (the hub's test splits) or none; the
            logits are not finite.
    """
    labels = np.asarray(rows["labels"])
    if data.TASKS[task].labels and (labels < 0).any():
        raise ValueError(f"{task}: these rows have no labels; score another split.")
    logits = predict(model, rows, tokenizer, batch_size)
    return {name: metric(logits, labels) for name, metric in METRICS[task].items()}


def paired_bootstrap(
    task: str,
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    draws: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Say how sure a difference of two models is: draw the rows anew, for both alike.

    The percentiles of the result are an interval of the points lost: of what other
    rows of the kind would give, not of another training. Chapter 7.

    Args:
        task: one of `drone.data.TASKS`; its first metric counts.
        labels: (rows,).
        before: logits of one model, (rows, outputs), from `predict`.
        after: logits of the other on the same rows.
        draws: how often.
        seed: of the rows drawn; calls with the same one draw the same rows.

    Returns:
        (draws,): 100 times the metric of `before` minus that of `after`, in points;
        NaN where a correlation of the drawn rows is not defined.

    Raises:
        ValueError: shapes that do not fit each other, no rows, or fewer than one draw.
    """
    shapes = [np.shape(each) for each in (labels, before, after)]
    if shapes[1] != shapes[2] or shapes[0] != shapes[1][:1] or 0 in shapes[1]:
        raise ValueError(
            f"labels, before and after have shapes {', '.join(map(str, shapes))}; "
            "(rows,) and twice (rows, outputs) are needed."
        )
    if draws < 1:
        raise ValueError(f"draws is {draws}; at least 1.")
    metric = next(iter(METRICS[task].values()))
    rng = np.random.default_rng(seed)
    lost = np.empty(draws)
    for number in range(draws):
        i = rng.integers(len(labels), size=len(labels))
        was, now = (metric(logits[i], labels[i]) for logits in (before, after))
        lost[number] = 100 * (was - now)
    return lost


def batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    labels: bool = False,
) -> list[BatchEncoding]:
    """Pad tokenized rows into batches: what `predict` and `drone.calibrate` run on.

    Args:
        rows: from `tokenize`.
        tokenizer: pads each batch to its own longest row.
        batch_size: rows at once. Rows are sorted by length, so few pads are computed.
        labels: keep them, as `drone.search_ranks` needs, or leave them out.

    Returns:
        Batches of `input_ids`, `attention_mask`, ..., each (batch, length).

    Raises:
        ValueError: there are no rows.
    """
    if not len(rows):
        raise ValueError("no rows to make batches of; at least one is needed.")
    order = _by_length(rows)
    columns = [name for name in rows.column_names if labels or name != "labels"]
    wanted = rows.select_columns(columns)
    return [
        tokenizer.pad(
            wanted.select(order[start : start + batch_size])[:], return_tensors="pt"
        )
        for start in range(0, len(rows), batch_size)
    ]


def _by_length(rows: Dataset) -> list[int]:
    """Row numbers from the shortest to the longest; equals keep their order."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sorted(range(len(rows)), key=lengths.__getitem__)


def predict(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> np.ndarray:
    """Return logits (rows, outputs), float32, in the order of `rows`.

    Raises:
        ValueError: there are no rows, or some logit is not finite; the message names
            the row.
    """
    parts = []
    padded = batches(rows, tokenizer, batch_size)
    with frozen(model):
        for batch in progress.bar(padded, desc="evaluate"):
            parts.append(model(**batch.to(model.device)).logits.float().cpu())
    # back into the order of rows
    logits = torch.cat(parts).numpy()[np.argsort(_by_length(rows))]
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise ValueError(
            f"row {bad[0]}: the logits are {logits[bad[0]]}; finite ones are needed."
        )
    return logits


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


@contextmanager
def own_randomness() -> Iterator[None]:
    """Give the caller's random state back, so a cache hit leaves the same one."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def cache_key(inputs: Mapping[str, Any], rows: Dataset) -> str:
    """SHA-256 over all that goes into a training, the rows themselves included."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


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
        encoder: a name of `drone.models.ENCODERS`.
        task: a name of `drone.data.TASKS`.
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
        ValueError: `rows` is below 1 or above what the split has; a damaged file in
            the cache; and whatever `drone.data.load` and `drone.models.encoder` raise.
    """
    recipe = recipe or Recipe()
    if task not in data.TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(data.TASKS)}.")
    outputs = len(data.TASKS[task].labels or ("score",))
    train = data.load(task, data_source, splits=["train"])["train"]
    if rows is not None:
        train = data.sample(train, rows, seed)
    model, tokenizer = models.encoder(
        encoder, encoder_source, num_labels=outputs, seed=seed
    )
    bf16 = bfloat16_gains()
    inputs = {
        "format": FORMAT_VERSION,
        "encoder": encoder,
        "weights": models.ENCODERS[encoder].sha256,
        "task": task,
        "seed": seed,
        "recipe": asdict(recipe),
        "bfloat16": bf16,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    key = cache_key(inputs, train)
    folder = cache_folder(cache, key)
    cached = folder.is_dir()
    if cached:
        print(f"cache hit: {encoder} on {task}, seed {seed}, key {key[:12]}")
    else:
        rows_ = tokenize(train, tokenizer, task, recipe.max_length)
        with own_randomness():
            _train(model, tokenizer, rows_, f"fine-tune on {task}", folder, inputs)
    record = read_record(folder, inputs)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return FineTuned(model.eval(), tokenizer, key, record["seconds"], cached)


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
            the model's and the data's; a damaged file in the cache.
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
        rows = rows.add_column(SOFT_TARGETS, logits.tolist())
    inputs = {
        "format": FORMAT_VERSION,
        "start": tensors_sha256(model.state_dict()),
        "seed": seed,
        "recipe": asdict(recipe),
        "bfloat16": bfloat16_gains(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    key = cache_key(inputs, rows)
    folder = cache_folder(cache, key)
    cached = folder.is_dir()
    if cached:
        print(f"cache hit: retrained, seed {seed}, key {key[:12]}")
    else:
        with own_randomness():
            _train(model, tokenizer, rows, "retrain", folder, inputs)
    record = read_record(folder, inputs)
    trained = copy.deepcopy(model)
    trained.load_state_dict(load_file(folder / "model.safetensors"))
    return FineTuned(trained.eval(), tokenizer, key, record["seconds"], cached)


class _SoftTrainer(Trainer):
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


def cache_folder(cache: Path | None, key: str) -> Path:
    """Where a model of this key is kept: below `cache`, or the default folder."""
    root = cache or Path(os.environ.get("DRONE_CACHE", DEFAULT_CACHE))
    return root / key[:20]


def read_record(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Read what was kept beside a trained model, and check both.

    Raises:
        ValueError: the record or the model is damaged, or made from other inputs.
    """
    path = folder / "record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); delete {folder}."
        ) from error
    whole = isinstance(record, dict) and {"inputs", "seconds", "sha256"} <= set(record)
    if not whole:
        raise ValueError(f"{path}: a field is missing; delete {folder}.")
    if record["inputs"] != inputs:
        raise ValueError(f"{path}: made from other inputs; delete {folder}.")
    check_sha256(folder / "model.safetensors", record["sha256"])
    return record


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    title: str,
    folder: Path,
    inputs: Mapping[str, Any],
) -> None:
    """Train a copy and write `folder` whole; checkpoints wait beside it until then."""
    # A copy: with bfloat16 Trainer leaves the forward it wrapped in it for good.
    model = copy.deepcopy(model)
    recipe, seed = Recipe(**inputs["recipe"]), inputs["seed"]
    checkpoints = folder.with_name(folder.name + ".checkpoints")
    checkpoints.mkdir(parents=True, exist_ok=True)
    steps = -(-len(rows) // recipe.batch_size) * recipe.epochs
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=round(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        bf16=inputs["bfloat16"],
        use_cpu=not torch.cuda.is_available(),  # else it refuses bfloat16 there
        seed=seed,
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the soft targets are no input of the model
    )
    set_seed(seed)
    kind = _SoftTrainer if SOFT_TARGETS in rows.column_names else Trainer
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[_Progress(title)],
    )
    trainer.remove_callback(PrinterCallback)  # it would print a dict at the end
    started = time.perf_counter()
    with models.quiet():
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)))
    seconds = time.perf_counter() - started
    with whole_folder(folder) as temporary:
        weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors")
        record = {
            "inputs": inputs,
            "seconds": round(seconds, 1),
            "sha256": sha256(temporary / "model.safetensors"),
        }
        (temporary / "record.json").write_text(json.dumps(record, indent=2))
    shutil.rmtree(checkpoints)
