"""Losses tried during a search: written down as they are made, and never made twice."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from drone.files import tensors_sha256, whole_file
from drone.math.attention import AttentionFactorization
from drone.math.factorize import Factorization
from drone.model.adapters import swap
from drone.model.compress import replace_module
from drone.model.walk import Walk
from drone.search.costs import Costs, ModuleCosts

Found = dict[str, Factorization | AttentionFactorization]


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
    """All losses evaluated, in order; in a file too, if there is one."""

    def __init__(self, path: Path | None, key: Callable[[], str]) -> None:
        self.path, self.key = path, key() if path is not None else ""
        self.trace: list[dict[str, Any]] = []
        self.costs: Costs | None = None
        self.known: dict[tuple[str, int | None], tuple[float, float]] = {}
        self.spared_seconds, self.spared_layers = 0.0, 0
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text().splitlines(keepends=True)
            # A search that is killed can leave half a line; that trial is made again.
            whole = [line for line in lines if line.endswith("\n")]
            header, *trials = [json.loads(line) for line in whole]
            same = header["search"] == self.key
            self.costs = Costs.from_json(header["costs"])
            self.known = {
                (t["module"], t["rank"]): (t["loss"], t["seconds"]) for t in trials
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: no trace of a search ({error!r}); delete it."
            ) from error
        if not same:
            raise ValueError(
                f"{path}: the trace of another model, data, budget, grid or method; "
                "delete it or name another file."
            )

    def begin(self, costs: Costs) -> None:
        """Write the header and what is known, so that the file has whole lines only."""
        self.costs = costs
        if self.path is None:
            return
        lines: list[dict[str, Any]] = [{"search": self.key, "costs": costs.to_json()}]
        lines += [
            {"module": module, "rank": rank, "loss": loss, "seconds": seconds}
            for (module, rank), (loss, seconds) in self.known.items()
        ]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def loss(
        self,
        module: str,
        rank: int | None,
        evaluate: Callable[[], float],
        layers: int,
        allowed: float | None = None,
    ) -> float:
        """Return the loss of a trial, evaluated unless it is known, and note it."""
        if (module, rank) in self.known:
            loss, seconds = self.known[module, rank]
            self.spared_seconds += seconds
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
                line = {"module": module, "rank": rank, "loss": loss}
                line["seconds"] = seconds
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
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


def check_dense_loss(loss: float) -> None:
    """Refuse a dense loss of 0: the budget is a ratio to it."""
    if loss <= 0:
        raise ValueError(
            f"the dense model's loss on these batches is {loss:.3g}; the budget is a "
            "ratio, so it must be above 0."
        )


def search_key(
    model: nn.Module, batches: list[Mapping[str, Any]], *settings: Any
) -> str:
    """SHA-256 over all that decides a search but the clock."""
    parts = [str(setting) for setting in settings]
    parts.append(tensors_sha256(model.state_dict()))
    for batch in batches:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        parts.append(tensors_sha256(tensors))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
