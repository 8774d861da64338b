"""Rivals of Algorithm 2: each is a path from the smallest model to the dense one."""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from drone.attention import AttentionFactorization
from drone.costs import Costs
from drone.factorize import Factorization

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
