"""Train an LSTM language model, dense or thin, on any device; it goes on if cut."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drone.files import sha256, whole_folder
from drone.lab.language import windows
from drone.lab.lstm_model import LSTMLanguageModel
from drone.lab.lstm_read import mean_losses, read_texts
from drone.lab.lstm_step import Parts, Step, checked_step, tf32

TRIED = 23  # windows on which a step is checked and timed
HEARD = 40  # parts of the validation text side by side after an epoch: fast, near


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Zaremba et al., 2014, in units of a mean loss.

    They sum the loss over the steps of a window: their rate 1 and norm 10 are here
    35 and 10 / 35.

    Attributes:
        rate: of the first `hold` epochs; then it is multiplied by `decay` an epoch.
        linear: instead of the decay, the rate falls linearly to 0 over all steps.
        precision, capture: as in `checked_step`.

    Raises:
        ValueError: fewer than one epoch, step or row, or a rate or clip that is not
            above 0.
    """

    epochs: int
    rate: float
    clip: float
    hold: int = 0
    decay: float = 1.0
    linear: bool = False
    batch_size: int = 20
    steps: int = 35
    precision: str = "float32"
    capture: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.steps) < 1:
            raise ValueError(f"{self}: at least one epoch, row and step are needed.")
        if not (0 < self.rate < math.inf and 0 < self.clip < math.inf):
            raise ValueError(f"{self}: rate and clip must be above 0.")

    def rate_at(self, epoch: int, step: int, steps: int) -> float:
        """Return the rate of a step, both counted from 0; `steps` an epoch."""
        if self.linear:
            return self.rate * (1 - (epoch * steps + step) / (self.epochs * steps))
        return self.rate * self.decay ** max(epoch + 1 - self.hold, 0)


@dataclass(frozen=True)
class Size:
    """One of the sizes of Zaremba et al., and their recipe for it.

    Attributes:
        init: weights are drawn uniformly from ±init.
        published: its test perplexity.
    """

    hidden: int
    dropout: float
    init: float
    epochs: int
    hold: int
    decay: float
    norm: float  # largest norm of the gradient of a loss summed over 35 steps
    published: float

    def recipe(self, epochs: int | None = None, **others: Any) -> Recipe:
        """Return their recipe; for fewer epochs every phase is shorter by as much."""
        epochs = epochs or self.epochs
        hold = round(self.hold * epochs / self.epochs)
        # The last epoch has the same rate however many there are
        falls = (self.epochs - self.hold) / max(epochs - hold, 1)
        return Recipe(epochs, 35.0, self.norm / 35, hold, self.decay**-falls, **others)


SIZES = {
    "tiny": Size(32, 0.1, 0.1, 4, 2, 2.0, 5.0, math.nan),  # for tests; not theirs
    "small": Size(200, 0.0, 0.1, 13, 4, 2.0, 5.0, 114.5),
    "medium": Size(650, 0.5, 0.05, 39, 6, 1.2, 5.0, 82.7),
    "large": Size(1500, 0.65, 0.04, 55, 14, 1.15, 10.0, 78.4),
}


def draw(shell: LSTMLanguageModel, init: float, seed: int) -> Parts:
    """Draw all weights uniformly from ±init: the same ones on every device."""
    draws = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.empty(weight.shape)
            .uniform_(-init, init, generator=draws)
            .to(shell.device),
        )
        for name, weight in shell.state_dict().items()
    }


@dataclass(frozen=True)
class Ready:
    """A step that was checked, with the windows of the training text.

    Attributes:
        step: its parts are what is trained.
        cut: inputs and labels of each window, on the device.
        report: what `checked_step` says.
    """

    step: Step
    cut: list[tuple[Tensor, Tensor]]
    report: dict[str, Any]


def prepare(
    shell: LSTMLanguageModel, parts: Parts, ids: Tensor, recipe: Recipe
) -> Ready:
    """Cut a training text into windows, and make and check the step.

    Args:
        shell: a dense model, for its structure, device and dropout.
        parts: the weights that will be trained, in place; thin ones stay thin.
        ids: (tokens,) of the training text.
        recipe: the hyperparameters.

    Raises:
        ValueError: as `drone.language.windows` and `checked_step`.
    """
    cut = [
        (before.to(shell.device), labels.to(shell.device))
        for before, labels in windows(ids, recipe.batch_size, recipe.steps)
    ]
    shell.train()
    with tf32(True):
        step, report = checked_step(
            shell, parts, cut[:TRIED], recipe.clip, recipe.precision, recipe.capture
        )
    return Ready(step, cut, report)


def train(
    shell: LSTMLanguageModel,
    parts: Parts,
    texts: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    ready: Ready | None = None,
    checkpoints: Path | None = None,
    every: int = 1,
    title: str = "",
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train weights in place.

    Randomness (dropout) depends on the seed and the epoch alone, so a training that
    was cut off goes on from its last checkpoint as if it had not been.

    Args:
        shell: a dense model, for its structure, device and dropout.
        parts: the weights, changed in place; thin ones stay thin.
        texts: `train` and `valid`, each (tokens,).
        recipe: the hyperparameters.
        ready: from `prepare`, with the same parts; None: made here.
        checkpoints: a folder of this training alone; None: none are kept.
        every: epochs from one checkpoint to the next; the last is always kept.
        title: begins each line that is printed.

    Returns:
        The history, one entry an epoch (`epoch`, `train` and `valid` mean losses in
        nats, `rate`, `seconds`), and what `checked_step` reports.

    Raises:
        ValueError: a loss that is not finite, a damaged checkpoint, a text shorter than
            a batch.
    """
    wanted = {"recipe": asdict(recipe), "title": title}
    record = _resume(parts, checkpoints, wanted) or {"history": [], "step": {}}
    history: list[dict[str, float]] = record["history"]
    if history:
        print(f"{title} goes on after epoch {len(history)}", flush=True)
    if len(history) < recipe.epochs:
        ready = ready or prepare(shell, parts, texts["train"], recipe)
        record["step"] = ready.report
        each = ready.report["milliseconds"]["taken"] * len(ready.cut) / 1000
        left = each * (recipe.epochs - len(history))
        print(f"{title} about {each:.1f} s an epoch, {left:.0f} s in all", flush=True)
    for epoch in range(len(history), recipe.epochs):
        assert ready is not None  # made above
        started = time.perf_counter()
        torch.manual_seed(1_000_003 * recipe.seed + epoch)
        loss = _epoch(ready, recipe, epoch)
        heard = read_texts(shell, parts, {"valid": texts["valid"]}, HEARD)
        entry = {
            "epoch": epoch + 1,
            "train": round(loss, 5),
            "valid": round(mean_losses(heard)["valid"], 5),
            "rate": round(recipe.rate_at(epoch, 0, len(ready.cut)), 6),
            "seconds": round(time.perf_counter() - started, 2),
        }
        history.append(entry)
        print(
            f"{datetime.now():%H:%M:%S} {title} epoch {epoch + 1}/{recipe.epochs} "
            f"train {math.exp(loss):.1f} valid {math.exp(entry['valid']):.1f} "
            f"rate {entry['rate']:.3g} {entry['seconds']:.1f} s",
            flush=True,
        )
        last = len(history) == recipe.epochs
        if checkpoints is not None and (last or len(history) % every == 0):
            _keep(parts, checkpoints, wanted | record)
    shell.eval()
    return history, record["step"]


def _epoch(ready: Ready, recipe: Recipe, epoch: int) -> float:
    """Go through the text once; return the mean loss."""
    step, cut = ready.step, ready.cut
    step.shell.train()
    step.start()
    with tf32(True):
        for number, (before, labels) in enumerate(cut):
            step.rate.fill_(recipe.rate_at(epoch, number, len(cut)))
            step(before, labels)
    loss = float(step.total / step.count)
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} in epoch {epoch + 1}; a smaller rate or clip may help."
        )
    return loss


def _keep(parts: Parts, folder: Path, record: dict[str, Any]) -> None:
    """Write a checkpoint whole; then remove the one before."""
    new = folder / f"epoch-{len(record['history']):03d}"
    with whole_folder(new) as temporary:
        save_parts(parts, temporary / "parts.safetensors")
        record = record | {"sha256": sha256(temporary / "parts.safetensors")}
        (temporary / "record.json").write_text(json.dumps(record))
    for old in sorted(folder.glob("epoch-*")):
        if old != new:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()


def _resume(
    parts: Parts, folder: Path | None, wanted: dict[str, Any]
) -> dict[str, Any] | None:
    """Read the last whole checkpoint into `parts`; return its record."""
    found = sorted(folder.glob("epoch-*")) if folder is not None else []
    if not found:
        return None
    last = found[-1]
    try:
        record: dict[str, Any] = json.loads((last / "record.json").read_text())
        digest = record.pop("sha256")
        same = {name: record[name] for name in wanted} == wanted
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{last}: no checkpoint ({error!r}); delete it.") from error
    if not same or digest != sha256(last / "parts.safetensors"):
        raise ValueError(f"{last}: damaged or of another training; delete it.")
    kept = load_parts(last / "parts.safetensors")
    for name, factors in parts.items():
        for factor, old in zip(factors, kept[name], strict=True):
            factor.copy_(old)
    return record


def save_parts(parts: Parts, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights; a thin one's factors are numbered, `name/0` and `name/1`."""
    save_file(
        {
            f"{name}/{number}": factor.detach().to("cpu", dtype).contiguous()
            for name, factors in parts.items()
            for number, factor in enumerate(factors)
        },
        path,
    )


def load_parts(path: Path, device: torch.device | str = "cpu") -> Parts:
    """Read weights that `save_parts` wrote, in float32.

    Raises:
        FileNotFoundError: there is no such file.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for key, factor in load_file(path).items():
        name, _, number = key.rpartition("/")
        parts.setdefault(name, {})[int(number)] = factor.to(device, torch.float32)
    return {
        name: tuple(factors[i] for i in sorted(factors))
        for name, factors in parts.items()
    }
