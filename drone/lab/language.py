"""Language modelling on words: vocabulary, perplexity, and training that resumes."""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from drone import progress
from drone.devices import placed
from drone.files import tensors_sha256, whole_folder
from drone.lab import keys
from drone.lab.cache import cached_training, newest_whole, refuse_diverged, seal
from drone.lab.lstm_model import LSTMConfig, LSTMLanguageModel
from drone.lab.ranges import check_fields
from drone.lab.training import bfloat16_gains
from drone.layers.lstm import State
from drone.model.calibrate import frozen

FORMAT_VERSION = 2
END, UNKNOWN = "<eos>", "<unk>"
STEPS = 70  # of one call when a text is only read
PARTS = 10  # read side by side then
KEPT = (
    "The checkpoint of the last good epoch, if there is one, is kept; a smaller "
    "learning_rate or clip may help."
)


@dataclass(frozen=True)
class Vocabulary:
    """The words of a corpus; a word's number is its place.

    Attributes:
        words: `<eos>` first, which ends every sentence, then the most frequent ones.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Iterable[str]) -> "Vocabulary":
        """Collect the words of a training split.

        Raises:
            ValueError: there is no word.
        """
        counts = Counter(word for line in sentences for word in line.split())
        if not counts:
            raise ValueError("the corpus has no word; at least one is needed.")
        counts.pop(END, None)
        frequent_first = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((END, *frequent_first))

    def __len__(self) -> int:
        """Return the number of words."""
        return len(self.words)

    def encode(self, sentences: Iterable[str]) -> Tensor:
        """Turn sentences into one stream of word numbers, `<eos>` after each.

        A word that is not in the vocabulary becomes `<unk>` if the corpus has that.

        Returns:
            (tokens,) int64.

        Raises:
            ValueError: an unknown word and no `<unk>`, or no sentence at all. The
                message names the word and the sentence.
        """
        ids = {word: number for number, word in enumerate(self.words)}
        unknown = ids.get(UNKNOWN)
        stream = []
        for number, sentence in enumerate(sentences):
            for word in [*sentence.split(), END]:
                at = ids.get(word, unknown)
                if at is None:
                    raise ValueError(
                        f"sentence {number}: {word!r} is not in the vocabulary of "
                        f"{len(ids)} words, and that has no {UNKNOWN}."
                    )
                stream.append(at)
        if not stream:
            raise ValueError("no sentence to encode; at least one is needed.")
        return torch.tensor(stream)


def windows(
    ids: Tensor, batch_size: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a stream into parts side by side, and those into windows, one after another.

    Every token is a label exactly once; the first one's input is `<eos>`, number 0.

    Args:
        ids: (tokens,).
        batch_size: parts; part i + 1 begins where part i ends.
        steps: length of a window; the last may be shorter.

    Yields:
        Inputs and labels, both (batch, steps); -100 where the last part has ended.

    Raises:
        ValueError: fewer tokens than parts, or `steps` below 1.
    """
    if not 1 <= batch_size <= len(ids):
        raise ValueError(f"batch_size is {batch_size}; 1 to {len(ids)} are allowed.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1.")
    length = -(-len(ids) // batch_size)
    short = batch_size * length - len(ids)
    before = F.pad(ids[:-1], (1, short)).view(batch_size, length)
    labels = F.pad(ids, (0, short), value=-100).view(batch_size, length)
    for start in range(0, length, steps):
        yield before[:, start : start + steps], labels[:, start : start + steps]


def batches(
    ids: Tensor, batch_size: int = 20, steps: int = STEPS
) -> list[dict[str, Tensor]]:
    """Make batches for `drone.calibrate` and `drone.search_ranks`, each from zeros.

    Only whole windows: what is left over at the end is not used.

    Args and errors:
        As `windows`.

    Returns:
        `input_ids`, `labels` and an `attention_mask` of ones, each (batch, steps).
    """
    return [
        {
            "input_ids": before,
            "labels": labels,
            "attention_mask": torch.ones_like(before),
        }
        for before, labels in windows(ids, batch_size, steps)
        if before.shape[1] == steps and (labels >= 0).all()
    ]


def token_losses(
    model: LSTMLanguageModel, ids: Tensor, batch_size: int = PARTS
) -> Tensor:
    """Return -log p of every token of a text given all before it, in nats.

    The state is carried through the whole text; with `batch_size` parts read side by
    side, it is lost at the beginning of each part but the first.

    Args:
        model: a language model; its mode is restored.
        ids: (tokens,), from `Vocabulary.encode`.
        batch_size: parts read side by side.

    Returns:
        (tokens,) float32, in order.

    Raises:
        ValueError: fewer tokens than parts, or a loss that is not finite.
    """
    parts = []
    states = None
    total = math.ceil(math.ceil(len(ids) / batch_size) / STEPS)
    with frozen(model):
        cut = windows(ids, batch_size, STEPS)
        for before, labels in progress.bar(cut, desc="perplexity", total=total):
            output = model(before.to(model.device), states=states)
            states = output.states
            losses = F.cross_entropy(
                output.logits.transpose(1, 2).float(),
                labels.to(model.device),
                reduction="none",
            )
            parts.append(losses.cpu())
    losses = torch.cat(parts, dim=1).flatten()[: len(ids)]
    if not losses.isfinite().all():
        raise ValueError(
            f"token {int((~losses.isfinite()).nonzero()[0])}: no finite loss."
        )
    return losses


def perplexity(model: LSTMLanguageModel, ids: Tensor, batch_size: int = PARTS) -> float:
    """Return exp of the mean of `token_losses`: as if choosing among so many words."""
    return float(token_losses(model, ids, batch_size).double().mean().exp())


@dataclass(frozen=True)
class Recipe:
    """How a language model is trained: gradient descent, clipped; Zaremba et al., 2014.

    Plain steps, the same size for every weight: an adaptive rate moves the rows of rare
    words far at each of their few occurrences, and soon knows the text by heart.
    Back-propagation is truncated: a gradient goes `steps` words back, the state on.

    Raises:
        ValueError: a value out of its range; the message names it.
        TypeError: a value of another type, such as True for a number.
    """

    epochs: int = 10
    batch_size: int = 20
    steps: int = 35
    learning_rate: float = 20.0
    hold: float = 0.3  # share of all steps at this rate; then it falls linearly to 0
    clip: float = 0.25  # largest norm of a gradient

    def __post_init__(self) -> None:
        check_fields(
            self,
            counts=("epochs", "batch_size", "steps"),
            positive=("learning_rate", "clip"),
        )
        if not 0 <= self.hold <= 1:
            raise ValueError(f"hold is {self.hold}; a share from 0 to 1.")


@dataclass(frozen=True)
class Trained:
    """A language model in eval mode, and how its training went.

    Attributes:
        model: after the last epoch.
        history: one entry an epoch: `epoch`, `train` and `validation` perplexity,
            `seconds`.
        key: SHA-256 over everything that went into it.
        cached: whether it was read rather than trained.
    """

    model: LSTMLanguageModel
    history: list[dict[str, float]]
    key: str
    cached: bool


def language_model(config: LSTMConfig, seed: int = 0) -> LSTMLanguageModel:
    """Return a model with random weights; the caller's random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LSTMLanguageModel(config)
    model.eval()
    return model


def train(
    model: LSTMLanguageModel,
    ids: Tensor,
    validation: Tensor,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    cache: Path | None = None,
) -> Trained:
    """Train a language model, dense or thin, or read it from the cache.

    Each epoch is kept in a checkpoint; a training that was cut off goes on from its
    last whole epoch and ends with the same numbers. Randomness (dropout) depends on
    the seed and the epoch alone.

    Args:
        model: the start; it is left as it was. Thin factors stay thin. The copy is
            trained on a GPU if there is one, and comes back there.
        ids: (tokens,) of the training split.
        validation: (tokens,); its perplexity is reported after each epoch.
        recipe: the hyperparameters; None: the defaults.
        seed: of dropout.
        cache: as in `drone.lab.training.fine_tune`.

    Returns:
        A trained copy.

    Raises:
        ValueError: a corpus shorter than a batch, a validation text shorter than the
            parts it is read in, a damaged result in the cache, or a loss that is not
            finite: the message says at which step, and the checkpoint of the last good
            epoch stays.
    """
    recipe = recipe or Recipe()
    # Both before the first epoch: the validation text is read after it only.
    if len(ids) < recipe.batch_size:
        raise ValueError(
            f"batch_size is {recipe.batch_size}; 1 to {len(ids)} are allowed."
        )
    if len(validation) < PARTS:
        raise ValueError(
            f"the validation text has {len(validation)} tokens; at least {PARTS}."
        )
    inputs = {
        "format": FORMAT_VERSION,
        "start": keys.of_model(model),
        "ids": tensors_sha256({"train": ids, "validation": validation}),
        "seed": seed,
        "recipe": asdict(recipe),
        "bfloat16": bfloat16_gains(),
    } | keys.of_machine()

    def run(start: LSTMLanguageModel, checkpoints: Path) -> dict[str, Any]:
        if torch.cuda.is_available():  # as Trainer does
            placed(start, "cuda")
        return _train(start, ids, validation, recipe, seed, checkpoints)

    kept = cached_training(f"language model, seed {seed}", model, inputs, run, cache)
    return Trained(kept.model, kept.record["history"], kept.key, kept.cached)


def _train(
    model: LSTMLanguageModel,
    ids: Tensor,
    validation: Tensor,
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
) -> dict[str, Any]:
    """Train in place, from the newest whole checkpoint; tell how each epoch went."""
    history = _resume(model, checkpoints)
    optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate)
    for epoch in range(len(history), recipe.epochs):
        torch.manual_seed(1_000_003 * seed + epoch)
        started = time.perf_counter()
        loss = _epoch(model, optimizer, ids, recipe, epoch)
        try:
            heard = perplexity(model, validation)
        except ValueError as error:
            raise ValueError(f"after epoch {epoch + 1}: {error} {KEPT}") from error
        history.append(
            {
                "epoch": epoch + 1,
                "train": _exp(loss),
                "validation": heard,
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        if len(history) < recipe.epochs:
            _keep(model, history, checkpoints)
    return {"history": history, "seconds": sum(each["seconds"] for each in history)}


def _keep(
    model: LSTMLanguageModel, history: list[dict[str, float]], checkpoints: Path
) -> None:
    """Write a checkpoint whole; keep the one before, should this one be damaged."""
    refuse_diverged(model)
    epoch = len(history)
    with whole_folder(checkpoints / f"epoch-{epoch:03d}") as temporary:
        save_model(model, str(temporary / "model.safetensors"))
        (temporary / "history.json").write_text(json.dumps(history))
        seal(temporary)
    for old in checkpoints.glob("epoch-*"):
        if int(old.name.removeprefix("epoch-")) < epoch - 1:
            shutil.rmtree(old)


def _resume(model: LSTMLanguageModel, checkpoints: Path) -> list[dict[str, float]]:
    """Read the newest whole epoch, if there is one; return the history so far."""
    folder = newest_whole(checkpoints)
    if folder is None:
        return []
    load_model(model, folder / "model.safetensors")
    history: list[dict[str, float]] = json.loads((folder / "history.json").read_text())
    print(f"goes on after epoch {len(history)}")
    return history


def _epoch(
    model: LSTMLanguageModel,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    recipe: Recipe,
    epoch: int,
) -> float:
    """Go through the text once; return the mean loss."""
    model.train()
    total, count = 0.0, 0
    states: list[State] | None = None
    cut = list(windows(ids, recipe.batch_size, recipe.steps))
    shown = progress.bar(cut, desc=f"epoch {epoch + 1} of {recipe.epochs}")
    for number, (before, labels) in enumerate(shown):
        step = epoch * len(cut) + number
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe.epochs * len(cut), recipe)
        if states is not None:  # the state goes on, the gradient does not
            states = [(h.detach(), c.detach()) for h, c in states]
        half = bfloat16_gains(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, half):
            output = model(
                before.to(model.device), labels.to(model.device), states=states
            )
        states = output.states
        loss = float(output.loss.detach())
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {number} of epoch {epoch + 1}. {KEPT}"
            )
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        here = int((labels >= 0).sum())
        total, count = total + loss * here, count + here
        if number % 20 == 0:
            shown.set_postfix(perplexity=f"{_exp(total / count):.0f}")
    model.eval()
    return total / count


def _exp(loss: float) -> float:
    """Perplexity of a mean loss; infinite where a float ends."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def _learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Hold the rate, then let it fall linearly, to 0 after the last step."""
    held = recipe.hold * steps
    if step < held:
        return recipe.learning_rate
    return recipe.learning_rate * (steps - step) / (steps - held)
