"""Rivals of Algorithm 2: each is a path from the smallest model to the dense one."""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from drone import progress
from drone.layers.linear import is_linear
from drone.math.attention import AttentionFactorization
from drone.math.factorize import Factorization
from drone.model.adapters import swap
from drone.model.calibrate import calibrate
from drone.model.compress import factorize_modules, replace_module
from drone.model.loss import mean_loss
from drone.model.walk import Walk, input_name
from drone.search.costs import Costs
from drone.search.trials import (
    Found,
    Trials,
    attempt_rank,
    check_dense_loss,
    smallest_option,
)

Ranks = dict[str, int]  # {module name: rank}; a module that is left out stays dense
LATENCIES = 60  # steps of the latency path


def relative_errors(
    factorization: Factorization | AttentionFactorization, ranks: Sequence[int]
) -> np.ndarray:
    """Return ‖(W − Ŵ_k)X‖² / ‖WX‖² at each rank, and 0 for the dense module.

    Of an attention block: of all logits of all heads. Shape (len(ranks) + 1,); zeros
    where there is nothing to lose.
    """
    errors = factorization.errors.numpy()
    squares = np.atleast_2d(errors**2).sum(axis=0)  # over heads, if there are any
    lost = np.append(squares[list(ranks)], 0.0)
    return lost / squares[0] if squares[0] > 0 else lost


def uniform(costs: Costs, errors: Mapping[str, np.ndarray]) -> list[Ranks]:
    """Give every module the same share of its largest rank that saves.

    Args:
        costs: of the modules.
        errors: {name: `relative_errors` at the ranks of `costs`}; not looked at here.

    Returns:
        Ranks from the smallest model to the dense one, costs never falling.
    """
    count = {name: len(module.ranks) for name, module in costs.modules.items()}
    steps = max(*count.values(), 1)  # with no rank anywhere: dense, twice
    return [
        _pick(costs, {name: -(-step * n // steps) for name, n in count.items()})
        for step in range(steps + 1)
    ]


def energy(costs: Costs, errors: Mapping[str, np.ndarray]) -> list[Ranks]:
    """Give every module the smallest rank that keeps a share of its outputs' energy.

    Args and result: as `uniform`. One entry for each share at which a rank changes.
    """
    levels = sorted({float(e) for each in errors.values() for e in each}, reverse=True)
    path = [
        _pick(costs, {n: int(np.argmax(errors[n] <= level)) for n in costs.modules})
        for level in levels
    ]
    # Where a rank makes no error at all, the dense module is never needed; add it.
    return [*path, {}] if path[-1] else path


def greedy(costs: Costs, errors: Mapping[str, np.ndarray]) -> list[Ranks]:
    """Go one rank up where the relative error falls most per weight, again and again.

    Args and result: as `uniform`. One entry for each step.
    """
    at = dict.fromkeys(costs.modules, 0)
    path = [_pick(costs, at)]
    while any(at[name] < len(module.ranks) for name, module in costs.modules.items()):
        gains = {
            name: (errors[name][i] - errors[name][i + 1])
            / (module.weights[i + 1] - module.weights[i])
            for name, module in costs.modules.items()
            if (i := at[name]) < len(module.ranks)
        }
        at[max(gains, key=gains.__getitem__)] += 1
        path.append(_pick(costs, at))
    return path


class LatencyPath(Sequence[Ranks]):
    """Ranks with the least loss within a number of measured seconds, for each of many.

    For each of `LATENCIES` times T, from the shortest possible to the dense model's:
    min Σ increase(module, rank) subject to Σ seconds(module, rank) ≤ T, one rank a
    module. A multiple-choice knapsack, solved by scipy's integer programs when asked
    for; the least loss is exact to the solver's tolerance of 1e-6.
    """

    def __init__(self, costs: Costs, increases: Mapping[str, np.ndarray]) -> None:
        """Set up the programs.

        Args:
            costs: of the modules.
            increases: {name: (ranks + 1,) loss each rank costs alone, 0 for dense}.
        """
        from scipy.sparse import csr_array  # only this rival needs scipy

        self.costs = costs
        names = list(costs.modules)
        # One 0-1 variable for each module and each of its options.
        self.variables = [
            (name, option)
            for name, module in costs.modules.items()
            for option in range(len(module.seconds))
        ]
        self.seconds = np.array(
            [costs.modules[n].seconds[o] for n, o in self.variables]
        )
        lost = np.array([increases[n][o] for n, o in self.variables])
        owner = np.array([names.index(n) for n, _ in self.variables])
        count = len(self.variables)
        self.one_each = csr_array(
            (np.ones(count), (owner, np.arange(count))), shape=(len(names), count)
        )
        shortest = sum(self.seconds[owner == i].min() for i in range(len(names)))
        dense = sum(module.seconds[-1] for module in costs.modules.values())
        self.limits = np.linspace(shortest, dense, LATENCIES)
        # Of equal losses the faster; in units in which the solver's tolerances work.
        self.price = lost / max(lost.max(), 1e-300) + 1e-7 * self.seconds / dense

    def __len__(self) -> int:
        """Return `LATENCIES`."""
        return LATENCIES

    def __getitem__(self, place: Any) -> Any:
        """Solve for one of the times; the last is the dense model's."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        place = range(LATENCIES)[place]  # counts from the end too, as a list does
        if place == LATENCIES - 1:
            return {}  # all dense fits, and nothing loses less
        limit = self.limits[place]
        with _silent_solver():
            found = milp(
                self.price,
                integrality=np.ones(len(self.price)),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(self.one_each, 1, 1),
                    LinearConstraint(self.seconds[None] / limit, ub=1 + 1e-9),
                ],
                options={"mip_rel_gap": 1e-6},
            )
        assert found.success, found.message  # the fastest options always fit
        chosen = zip(self.variables, found.x, strict=True)
        return _pick(self.costs, dict(v for v, x in chosen if x > 0.5))


@contextmanager
def _silent_solver() -> Iterator[None]:
    """Keep what the solver prints from C, against its settings, out of a notebook."""
    if os.name != "posix":
        yield
        return
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    flush = ctypes.CDLL(None).fflush  # what C has printed and not yet written
    flush(None)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _pick(costs: Costs, options: Mapping[str, int]) -> Ranks:
    """Turn the index of each module's option into ranks; the last option is dense."""
    return {
        name: module.ranks[options[name]]
        for name, module in costs.modules.items()
        if options[name] < len(module.ranks)
    }


# Each takes costs and, for each module, what its ranks lose.
PATHS: dict[str, Callable[[Costs, Mapping[str, np.ndarray]], Sequence[Ranks]]] = {
    "uniform": uniform,
    "energy": energy,
    "greedy": greedy,
    "latency": LatencyPath,
}


def along_a_path(
    small: nn.Module,
    batches: list[Mapping[str, Any]],
    budget: float,
    costs: Costs,
    method: str,
    target: str,
    book: Trials,
) -> tuple[dict[str, int], float, int]:
    """Find the place on a rival's path and compress `small`; see `search_ranks`."""
    dense = {name: small.get_submodule(name) for name in costs.modules}
    sources = {name: input_name(module, name) for name, module in dense.items()}
    moments = calibrate(small, batches, sources.values())
    found = factorize_modules(small, costs.modules, moments)
    walk = Walk(small, batches, costs.modules)
    dense_loss = book.loss("", None, walk.loss, len(walk.layers))
    check_dense_loss(dense_loss)
    errors = {
        name: relative_errors(found[name], module.ranks)
        for name, module in costs.modules.items()
    }
    if method == "latency":
        errors = _increases(walk, costs, found, errors, dense_loss, book)
    path = PATHS[method](costs, errors)
    forwards = walk.layer_forwards + len(walk.layers)  # and calibration

    def put(ranks: Mapping[str, int]) -> None:
        # Blocks first: the low-rank block takes over the values it holds.
        for name in sorted(dense, key=lambda n: is_linear(dense[n])):
            swap(small, name, dense[name])
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
    found: Found,
    errors: Mapping[str, np.ndarray],
    dense_loss: float,
    book: Trials,
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
                loss = attempt_rank(walk, book, name, module, found[name], None, option)
                grown = max(loss - dense_loss, 1e-3 * dense_loss)
                scale = errors[name][option] or 1.0  # no error, no increase
                increases[name] = errors[name] / scale * grown
        walk.advance()
    return increases


def _largest_within(
    path: Sequence[Ranks], costs: Costs, share: float, target: str
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
