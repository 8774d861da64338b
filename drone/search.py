"""Algorithm 2: choose the rank of every module so that the whole keeps its promise."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from drone import allocate, progress
from drone.attention import AttentionFactorization
from drone.compress import (
    check_module,
    compress,
    factorize_module,
    factorize_modules,
    replace_module,
)
from drone.costs import GRID, Costs, ModuleCosts, measure, searchable
from drone.factorize import Factorization
from drone.files import tensors_sha256, whole_file
from drone.moments import calibrate, frozen
from drone.storage import remember_ranks
from drone.walk import Walk, input_name, mean_loss

METHODS = ("drone", *allocate.PATHS)
TARGETS = ("loss", "parameters", "multiply_adds", "latency")
FORMAT_VERSION = 1

_Found = dict[str, Factorization | AttentionFactorization]


@dataclass(frozen=True)
class RankPlan:
    """The ranks a search chose, what they cost and what they cost to find.

    Attributes:
        method: one of `METHODS`.
        target: one of `TARGETS`.
        budget: as given.
        ranks: {module name: rank}; a searched module that is not here stays dense.
        loss: of the compressed model on the search batches, evaluated afresh.
        dense_loss: of the dense model on the same batches.
        costs: of the modules at the ranks that were candidates, with their times.
        trace: one entry a trial, as made: `module`, `rank`, `loss`, `allowed`, `fits`.
            The dense model's has no module and no rank; a rival's trial of a whole
            model has no module, and as rank its place on the path.
        trials: losses evaluated, those read back from an interrupted search included.
        layer_forwards: passes of all batches through one encoder layer, so made.
        seconds: the search took, factorizations included. Of an interrupted search,
            both count its trials, and the rest of the work once.
    """

    method: str
    target: str
    budget: float
    ranks: dict[str, int]
    loss: float
    dense_loss: float
    costs: Costs
    trace: list[dict[str, Any]]
    trials: int
    layer_forwards: int
    seconds: float
    # The low-rank modules themselves; a plan read from a file has none.
    modules: dict[str, nn.Module] = field(
        default_factory=dict, repr=False, compare=False
    )

    def apply(
        self, model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None
    ) -> nn.Module:
        """Return a copy of the model with the plan's ranks.

        Args:
            model: the one searched; it is left as it was.
            batches: collect the inputs of each module from them anew, as the search
                did; needed for a plan read from JSON. None: the very modules the
                search found.

        Raises:
            ValueError: the plan was read from JSON and no batches are given; and what
                `compress` raises.
        """
        if batches is not None:
            if self.method == "drone":
                return compress(model, self.ranks, batches=batches, sequential=True)
            sources = [input_name(model.get_submodule(n), n) for n in self.ranks]
            return compress(model, self.ranks, calibrate(model, batches, sources))
        if not self.modules and self.ranks:
            raise ValueError(
                "a plan read from JSON has ranks and no weights; give apply the "
                "batches to collect inputs from."
            )
        small = copy.deepcopy(model)
        for name, module in self.modules.items():
            small.set_submodule(name, copy.deepcopy(module))
        for name, module in small.named_modules():  # the search ran in eval mode
            module.training = model.get_submodule(name).training
        remember_ranks(small)
        return small

    @property
    def predicted_speedup(self) -> float:
        """The dense model's time over the compressed one's, from measured modules."""
        return self.costs.speedup(self.ranks)

    @property
    def weights_share(self) -> float:
        """What is left of the searched modules' weights, and multiply-adds a token."""
        return self.costs.weights(self.ranks) / self.costs.weights({})

    def table(self) -> pd.DataFrame:
        """Return the trace as a table, one row a trial."""
        return pd.DataFrame(self.trace)

    def to_json(self) -> str:
        """Write everything but the modules as text; `from_json` reads it back."""
        fields = {k: v for k, v in vars(self).items() if k != "modules"}
        fields |= {"drone_plan": FORMAT_VERSION, "costs": self.costs.to_json()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no plan, or one of another format.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("drone_plan")
            if version == FORMAT_VERSION:
                fields["costs"] = Costs.from_json(fields["costs"])
                return cls(**fields)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no plan written by to_json ({error!r}).") from error
        raise ValueError(
            f"a plan of format {version}; {FORMAT_VERSION} is what this version of "
            "drone reads."
        )


def search_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    budget: float,
    *,
    modules: Iterable[str] | None = None,
    grid: Sequence[float] = GRID,
    times: Costs | None = None,
    method: str = "drone",
    target: str = "loss",
    trace: Path | None = None,
) -> RankPlan:
    """Choose a rank for every module, within a budget. Algorithm 2. Chapter 5.

    `drone`, the paper's search: the loss may grow by the factor 1 + budget in all. The
    factor is a product of shares, one a module, whose exponents are proportional to
    the modules' measured times. In network order each module takes the smallest rank
    of the grid that keeps the loss within the product of the shares so far, for the
    inputs it gets from the compressed layers below; what one does not spend, the later
    ones may. If no rank does, it stays dense.

    The rivals walk a path from the smallest model to the dense one and take the
    smallest that keeps the loss, or the largest within the target; all modules are
    factorized for the dense model's inputs: `uniform`, `energy`, `greedy`, `latency`,
    described in `drone.allocate`.

    Args:
        model: an encoder with a head; it is left as it was.
        batches: of training rows, with `labels` and `attention_mask`; calibration and
            loss both use them. All are kept in memory.
        budget: for the target `loss`, how much the loss may grow, 0.1 being 10 %; for
            the others the share to keep, in (0, 1]: of the modules' `parameters` or
            `multiply_adds`, or of the whole model's `latency`.
        modules: names; None: attention blocks, and Linears outside queries and keys.
        grid: ranks as shares of the largest one that saves multiply-adds.
        times: from `drone.costs.measure`, whose grid then counts; None: measured here
            on the batch in the middle of `batches`.
        method: one of `drone uniform energy greedy latency`.
        target: one of `loss parameters multiply_adds latency`; `drone` needs `loss`.
        trace: a file to which each trial is written as it is made. If it exists, its
            trials are not made again: a search that was stopped goes on and ends at
            the same plan.

    Returns:
        A `RankPlan`. Ranks measured no faster than the dense module are not tried,
        unless the target is a share of parameters or multiply-adds.

    Raises:
        ValueError: a budget, method, target or module that is not allowed, batches
            without labels, a dense loss that is not above 0, a loss that is not
            finite, a target below the smallest model, a trace of another search, a
            model whose loss differs from one pass to the next.
    """
    _check_arguments(budget, method, target)
    started = time.perf_counter()
    batches = list(batches)
    names = searchable(model) if modules is None else list(modules)
    if not batches or not names:
        raise ValueError("at least one batch and one module are needed.")
    for name in names:
        check_module(model, dict.fromkeys(names, 1), name, 1)
    book = _Trials(
        trace, lambda: _key(model, batches, names, budget, list(grid), method, target)
    )
    with frozen(model):
        costs = _costs(model, batches, names, grid, times, book)
        if target in ("loss", "latency"):
            costs = costs.faster()
        small = copy.deepcopy(model)
        if method == "drone":
            found = _algorithm_2(small, batches, budget, costs, book)
        else:
            found = _along_a_path(small, batches, budget, costs, method, target, book)
        ranks, dense_loss, forwards = found
        loss = mean_loss(small, batches)
    if target == "loss" and not loss <= dense_loss * (1 + budget):
        last = book.trace[-1]
        raise ValueError(
            f"the plan's loss is {loss:.6g} when evaluated afresh, above the allowed "
            f"{dense_loss * (1 + budget):.6g}; {last['module'] or 'the model'}, the "
            f"last tried, had {last['loss']:.6g}. The model's loss differs from one "
            "pass to the next."
        )
    remember_ranks(small)
    return RankPlan(
        method,
        target,
        budget,
        ranks,
        loss,
        dense_loss,
        costs,
        book.trace,
        len(book.trace),
        forwards + book.spared_layers,
        time.perf_counter() - started + book.spared_seconds,
        {name: small.get_submodule(name) for name in ranks},
    )


def _costs(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    names: list[str],
    grid: Sequence[float],
    times: Costs | None,
    book: "_Trials",
) -> Costs:
    """Return the costs of an interrupted search, those given, or measure them."""
    if times is not None:
        if set(times.modules) != set(names):
            odd = sorted(set(times.modules) ^ set(names))
            raise ValueError(f"times and modules differ in {', '.join(odd[:3])}.")
        if book.costs not in (None, times):
            raise ValueError(f"{book.path}: the trace has other times; delete it.")
    costs = book.costs or times
    if costs is None:
        costs = measure(model, batches[len(batches) // 2], names, grid)
    book.begin(costs)
    return costs


def shares(costs: Costs) -> dict[str, float]:
    """Exponent of each module's share of the allowed factor; they sum to 1.

    Proportional to the measured time of the module, dense: the allowed factor of a
    kind is then (1 + budget) to the kind's share of the time. The time of an attention
    block is what remains when that of the modules inside it is taken off, but at least
    a hundredth: clocks are noisy. Algorithm 2.
    """
    dense = {name: module.seconds[-1] for name, module in costs.modules.items()}
    own = {
        name: max(
            seconds
            - sum(s for inner, s in dense.items() if inner.startswith(f"{name}.")),
            seconds / 100,
        )
        for name, seconds in dense.items()
    }
    return {name: seconds / sum(own.values()) for name, seconds in own.items()}


def _algorithm_2(
    small: nn.Module,
    batches: list[Mapping[str, Any]],
    budget: float,
    costs: Costs,
    book: "_Trials",
) -> tuple[dict[str, int], float, int]:
    """Walk through the layers of `small`, replacing modules; see `search_ranks`."""
    ranks: dict[str, int] = {}
    last: dict[str, int] = {}  # where in the grid the last module of a kind ended
    exponents, spent = shares(costs), 0.0
    walk = Walk(small, batches, costs.modules)
    loss = dense_loss = book.loss("", None, walk.loss, len(walk.layers))
    _check_dense_loss(dense_loss)
    for _ in progress.bar(walk.layers, desc="search"):
        for group in walk.groups():
            moments = walk.moments(group)
            for name in group:
                spent += exponents[name]
                allowed = dense_loss * (1 + budget) ** min(spent, 1.0)
                module = costs.modules[name]
                if not module.ranks:  # none saves anything: it stays dense
                    continue
                found = factorize_module(small.get_submodule(name), name, moments)
                attempt = partial(_attempt, walk, book, name, module, found, allowed)
                option, loss = smallest_option(
                    len(module.ranks), attempt, loss, allowed, last.get(module.kind)
                )
                last[module.kind] = option
                if option < len(module.ranks):
                    ranks[name] = module.ranks[option]
                    replace_module(small, name, ranks[name], found)
        walk.advance()
    return ranks, dense_loss, walk.layer_forwards


def _attempt(
    walk: Walk,
    book: "_Trials",
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
        walk.model.set_submodule(name, dense)


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


def _along_a_path(
    small: nn.Module,
    batches: list[Mapping[str, Any]],
    budget: float,
    costs: Costs,
    method: str,
    target: str,
    book: "_Trials",
) -> tuple[dict[str, int], float, int]:
    """Find the place on a rival's path and compress `small`; see `search_ranks`."""
    dense = {name: small.get_submodule(name) for name in costs.modules}
    sources = {name: input_name(module, name) for name, module in dense.items()}
    moments = calibrate(small, batches, sources.values())
    found = factorize_modules(small, costs.modules, moments)
    walk = Walk(small, batches, costs.modules)
    dense_loss = book.loss("", None, walk.loss, len(walk.layers))
    _check_dense_loss(dense_loss)
    errors = {
        name: allocate.relative_errors(found[name], module.ranks)
        for name, module in costs.modules.items()
    }
    if method == "latency":
        errors = _increases(walk, costs, found, errors, dense_loss, book)
    path = allocate.PATHS[method](costs, errors)
    forwards = walk.layer_forwards + len(walk.layers)  # and calibration

    def put(ranks: Mapping[str, int]) -> None:
        # Blocks first: the low-rank block takes over the values it holds.
        for name in sorted(dense, key=lambda n: isinstance(dense[n], nn.Linear)):
            small.set_submodule(name, dense[name])
            if name in ranks:
                replace_module(small, name, ranks[name], found[name])

    allowed = dense_loss * (1 + budget)

    def attempt(place: int) -> float:
        put(path[place])
        return book.loss("", place, evaluate, len(walk.layers), allowed)

    def evaluate() -> float:
        nonlocal forwards
        forwards += len(walk.layers)
        return mean_loss(small, batches)

    if target == "loss":
        place, _ = smallest_option(len(path) - 1, attempt, dense_loss, allowed)
    else:
        place = _largest_within(path, costs, budget, target)
    put(path[place])
    return path[place], dense_loss, forwards


def _increases(
    walk: Walk,
    costs: Costs,
    found: _Found,
    errors: Mapping[str, np.ndarray],
    dense_loss: float,
    book: "_Trials",
) -> dict[str, np.ndarray]:
    """Measure what compressing each module alone adds to the loss.

    At one rank, a third up its grid; between ranks the increase goes as the squared
    error, which is what a loss near its minimum does. Where the loss happens to fall,
    a thousandth of the dense loss stands for "little".
    """
    increases = {}
    for _ in progress.bar(walk.layers, desc="loss of each module alone"):
        for group in walk.groups():
            for name in group:
                module, option = (
                    costs.modules[name],
                    len(costs.modules[name].ranks) // 3,
                )
                if not module.ranks:  # always dense
                    increases[name] = errors[name]
                    continue
                loss = _attempt(walk, book, name, module, found[name], None, option)
                grown = max(loss - dense_loss, 1e-3 * dense_loss)
                scale = errors[name][option] or 1.0  # no error, no increase
                increases[name] = errors[name] / scale * grown
        walk.advance()
    return increases


def _largest_within(
    path: Sequence[allocate.Ranks], costs: Costs, share: float, target: str
) -> int:
    """Return the last place on a path whose cost is at most a share of the dense's.

    Searched from above, place by place: measured times need not grow with the rank.
    """

    def left(place: int) -> float:
        if target == "latency":
            return 1 / costs.speedup(path[place])
        return costs.weights(path[place]) / costs.weights({})

    for place in reversed(range(len(path))):
        if left(place) <= share:
            return place
    raise ValueError(
        f"the target is {share:.3g} of the {target}; with the smallest ranks "
        f"{left(0):.3g} is left."
    )


class _Trials:
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


def _check_arguments(budget: float, method: str, target: str) -> None:
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}.")
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}; there are {', '.join(TARGETS)}.")
    if method == "drone" and target != "loss":
        raise ValueError(
            "Algorithm 2 (method='drone') shares out a loss; for another target take "
            f"one of {', '.join(METHODS[1:])}."
        )
    if not isfinite(budget) or budget < 0:
        raise ValueError(f"the budget is {budget}; a finite number ≥ 0 is needed.")
    if target != "loss" and not 0 < budget <= 1:
        raise ValueError(f"the budget is {budget}; a share to keep, in (0, 1].")


def _check_dense_loss(loss: float) -> None:
    if loss <= 0:
        raise ValueError(
            f"the dense model's loss on these batches is {loss:.3g}; the budget is a "
            "ratio, so it must be above 0."
        )


def _key(model: nn.Module, batches: list[Mapping[str, Any]], *settings: Any) -> str:
    """SHA-256 over all that decides a search but the clock."""
    parts = [str(setting) for setting in settings]
    parts.append(tensors_sha256(model.state_dict()))
    for batch in batches:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        parts.append(tensors_sha256(tensors))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
