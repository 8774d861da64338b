"""Losses tried during a search: written down as they are made, and never made twice."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from drone.files import tensors_sha256, whole_file
from drone.math.attention import AttentionFactorization
from drone.math.factorize import Factorization
from drone.model.adapters import swap
from drone.model.cautions import Seen
from drone.model.compress import replace_module
from drone.model.walk import Walk
from drone.search.costs import VERSION, Costs, ModuleCosts
from drone.search.described import attributes

Found = dict[str, Factorization | AttentionFactorization]
Trial = tuple[str, str, int | None]  # what is replaced already, module, rank


@dataclass(frozen=True)
class Outcome:
    """What a method found: the compressed copy, and what finding it took.

    Attributes:
        small: the copy.
        ranks: {module name: rank}.
        dense_loss: of the model as it was.
        forwards: passes of all batches through one layer.
        seen: {module name: (tokens it was factorized for, inputs it has)}.
    """

    small: nn.Module
    ranks: dict[str, int]
    dense_loss: float
    forwards: int
    seen: Seen = field(default_factory=dict)


def ranks_sha256(ranks: Mapping[str, int]) -> str:
    """Name what has been replaced, in a few characters; "" for nothing."""
    text = json.dumps(dict(ranks))
    return hashlib.sha256(text.encode()).hexdigest()[:16] if ranks else ""


def attempt_rank(
    walk: Walk,
    book: "Trials",
    name: str,
    module: ModuleCosts,
    found: Factorization | AttentionFactorization,
    allowed: float | None,
    option: int,
) -> float:
    """Return the loss with one module at one of its ranks; it is dense again after."""
    dense, rank = walk.model.get_submodule(name), module.ranks[option]
    replace_module(walk.model, name, rank, found)
    try:
        above = len(walk.layers) - walk.number
        return book.loss(name, rank, walk.loss, above, allowed)
    finally:
        swap(walk.model, name, dense)


def smallest_option(
    count: int,
    attempt: Callable[[int], float],
    dense: float,
    allowed: float,
    guess: int | None = None,
) -> tuple[int, float]:
    """Find the first of `count` options, by growing rank, whose loss is allowed.

    By bisection, from the guess outwards; that is right if the loss falls as the rank
    grows. Where some loss seen is above that of a smaller rank, by δ at most, every
    option is tried that may be allowed if losses can be out of order by δ.

    Args:
        count: options; option `count` is the dense module, which is always allowed.
        attempt: option → loss. Called at most once for each.
        dense: loss with the dense module.
        allowed: the largest loss allowed.
        guess: an option near which the answer is expected.

    Returns:
        (option, its loss).
    """
    seen = {count: dense}
    low, high = -1, count  # not allowed, allowed
    while high - low > 1:
        if guess is not None and len(seen) == 1:
            middle = min(guess, count - 1)
        elif guess is not None and len(seen) == 2:
            middle = high - 1 if low == -1 else low + 1  # its neighbour, most likely
        else:
            middle = (low + high) // 2
        seen[middle] = attempt(middle)
        low, high = (low, middle) if seen[middle] <= allowed else (middle, high)
    tried = [seen[option] for option in sorted(seen) if option < count]
    disorder = max((b - a for a, b in combinations(tried, 2)), default=0.0)
    for option in range(high):
        if option not in seen:
            above = max(seen[o] for o in seen if option < o < count)
            if above - max(disorder, 0.0) > allowed:
                continue  # so much out of order nothing was seen to be
            seen[option] = attempt(option)
        if seen[option] <= allowed:
            return option, seen[option]
    return high, seen[high]


class Trials:
    """All losses evaluated, in order; in a file too, if there is one.

    Use as a context manager: inside, the file is this search's alone.

    Attributes:
        trace: one entry a trial, as made.
        after: names the modules replaced so far. Only a search that walks through the
            model several times sets it: to it one module at one rank is not one trial.
        costs: of an interrupted search.
        spared_seconds: that the trials read back had taken.
        spared_layers: passes of all batches through one layer that they had made.
    """

    def __init__(self, path: Path | None, key: Callable[[], str]) -> None:
        self.path, self.key = path, key() if path is not None else ""
        self.trace: list[dict[str, Any]] = []
        self.after = ""
        self.costs: Costs | None = None
        self.known: dict[Trial, float] = {}
        self.read: dict[Trial, float] = {}  # seconds of what was not made here
        self.spared_seconds, self.spared_layers = 0.0, 0

    def __enter__(self) -> "Trials":
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # On Windows a locked file cannot be replaced, so another one is locked.
            self.lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            try:
                self.lock.acquire(blocking=False)
            except Timeout as error:
                raise ValueError(
                    f"{self.path}: another search is writing this trace; wait for it "
                    "or name another file."
                ) from error
            try:
                if self.path.is_file():
                    self._read(self.path)
            except ValueError:
                self.lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self.lock.release()

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A search that is killed can leave half a line; that trial is made again.
            whole = [line for line in lines if line.endswith("\n")]
            header, *trials = [json.loads(line) for line in whole]
            same = header["search"] == self.key
            self.costs = Costs.from_json(header["costs"])
            for t in trials:
                trial = (t.get("after", ""), t["module"], t["rank"])
                self.known[trial], self.read[trial] = t["loss"], t["seconds"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: no trace of a search ({error!r}); delete it."
            ) from error
        if not same:
            raise ValueError(
                f"{path}: the trace of another model, data, goal, grid, method or "
                "version; delete it or name another file."
            )

    def begin(self, costs: Costs) -> None:
        """Write the header and what is known, so that the file has whole lines only."""
        self.costs = costs
        if self.path is None:
            return
        lines = [json.dumps({"search": self.key, "costs": costs.to_json()})]
        lines += [_line(t, loss, self.read[t]) for t, loss in self.known.items()]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")

    def loss(
        self,
        module: str,
        rank: int | None,
        evaluate: Callable[[], float],
        layers: int,
        allowed: float | None = None,
    ) -> float:
        """Return the loss of a trial, evaluated unless it is known, and note it."""
        trial = (self.after, module, rank)
        if trial in self.known:
            loss = self.known[trial]
            if trial not in self.read:
                return loss  # made, and noted, earlier in this search
            self.spared_seconds += self.read.pop(trial)
            self.spared_layers += layers
        else:
            started = time.perf_counter()
            loss = evaluate()
            seconds = time.perf_counter() - started
            if not isfinite(loss):
                where = f"{module} at rank {rank}" if module else "the model"
                raise ValueError(
                    f"{where}: the loss is {loss}; a finite one is needed."
                )
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line(trial, loss, seconds) + "\n")
            self.known[trial] = loss
        fits = allowed is None or loss <= allowed
        self.trace.append(
            {
                "module": module,
                "rank": rank,
                "loss": loss,
                "allowed": allowed,
                "fits": fits,
            }
        )
        return loss


def _line(trial: Trial, loss: float, seconds: float) -> str:
    """Write one trial as a line of the file."""
    after, module, rank = trial
    line: dict[str, Any] = {"module": module, "rank": rank, "loss": loss}
    return json.dumps(line | {"seconds": seconds} | ({"after": after} if after else {}))


def check_dense_loss(loss: float) -> None:
    """Refuse a dense loss of 0: the budget is a ratio to it."""
    if loss <= 0:
        raise ValueError(
            f"the dense model's loss on these batches is {loss:.3g}; the budget is a "
            "ratio, so it must be above 0."
        )


def _config(config: Any, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a config's settings, without what names a folder or fills itself in."""
    settings: dict[str, Any] = config.to_dict()
    settings.pop("_name_or_path", None)
    labels = batches[0].get("labels")
    if settings.get("problem_type", "") is None and isinstance(labels, Tensor):
        # transformers writes it into the config at the first pass with labels.
        kind = "multi_label_classification"
        if getattr(config, "num_labels", 2) == 1:
            kind = "regression"
        elif labels.dtype in (torch.long, torch.int):
            kind = "single_label_classification"
        settings["problem_type"] = kind
    return settings


def search_key(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *settings: Any
) -> str:
    """SHA-256 over all that decides the losses of a search, and not the clock.

    Weights alone do not: dropout, an activation, any attribute of a module, the
    attention's kernel, a class of its own with another forward, half precision, a
    release with another rounding, do too.
    """
    config = getattr(model, "config", None)
    parts = [str(setting) for setting in settings]
    parts += [
        str(_config(config, batches) if hasattr(config, "to_dict") else config),
        str(getattr(config, "_attn_implementation", None)),
        str(model),  # the modules' classes, activations and dropouts
        *(f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()),
        *attributes(model),
        *(f"{name} {t.device.type}" for name, t in model.named_parameters()),
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        f"drone {version('drone')}, costs {VERSION}",
    ]
    # Also what state_dict leaves out: buffers that are not saved decide losses too.
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    parts.append(tensors_sha256(state | dict(model.named_buffers())))
    for batch in batches:
        leaves, shape = tree_flatten(dict(batch))
        parts.append(str(shape))
        tensors = {str(i): x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        parts.append(tensors_sha256(tensors))
        parts += [repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
