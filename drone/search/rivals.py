"""Rivals of Algorithm 2: each is a path from the smallest model to the dense one."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from drone import progress
from drone.layers.linear import is_linear
from drone.math.attention import AttentionFactorization
from drone.math.factorize import Factorization
from drone.model.adapters import swap
from drone.model.calibrate import calibrate
from drone.model.compress import factorize_modules, replace_module
from drone.model.loss import LossFunction, mean_loss
from drone.model.walk import Walk, input_name
from drone.search.costs import Costs
from drone.search.goal import Goal
from drone.search.trials import (
    Found,
    Outcome,
    Trials,
    attempt_rank,
    check_dense_loss,
    smallest_option,
)

Ranks = dict[str, int]  # {module name: rank}; a module that is left out stays dense
LATENCIES = 60  # steps of the latency path
STATES = 10_000  # sums of seconds and loss the latency path looks at, after a module


def relative_errors(
    factorization: Factorization | AttentionFactorization, ranks: Sequence[int]
) -> np.ndarray:
    """Return ‖(W − Ŵ_k)X‖² / ‖WX‖² at each rank, and 0 for the dense module.

    Of an attention block: of all logits of all heads. Shape (len(ranks) + 1,); zeros
    where there is nothing to lose.
    """
    errors = factorization.errors.cpu().numpy()
    squares = np.atleast_2d(errors**2).sum(axis=0)  # over heads, if there are any
    lost = np.append(squares[list(ranks)], 0.0)
    return lost / squares[0] if squares[0] > 0 else lost


def uniform(costs: Costs, errors: Mapping[str, np.ndarray]) -> list[Ranks]:
    """Give every module the same share of its largest rank that saves.

    Shares are places on the whole grids. Where `costs.faster()` has left a rank out,
    its module takes its next larger one, or stays dense; the others do not move.

    Args:
        costs: of the modules.
        errors: {name: `relative_errors` at the ranks of `costs`}; not looked at here.

    Returns:
        Ranks from the smallest model to the dense one, costs never falling.
    """
    grids = {name: m.grid or m.ranks for name, m in costs.modules.items()}
    steps = max(*(len(grid) for grid in grids.values()), 1)  # no rank: dense, twice
    path = []
    for step in range(steps + 1):
        options = {}
        for name, grid in grids.items():
            place = -(-step * len(grid) // steps)
            ranks = costs.modules[name].ranks
            wanted = grid[place] if place < len(grid) else np.inf
            options[name] = int(np.searchsorted(ranks, wanted))
        path.append(_pick(costs, options))
    return path


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


def latency(costs: Costs, increases: Mapping[str, np.ndarray]) -> list[Ranks]:
    """Lose least within a number of measured seconds, for each of many numbers.

    For each of `LATENCIES` times T, from the shortest possible to the dense model's:
    min Σ increase(module, rank) subject to Σ seconds(module, rank) ≤ T, one rank a
    module: a multiple-choice knapsack, solved for all T at once by dynamic programming.
    Module by module, only those sums (seconds, loss) are kept of which none is as fast
    and loses no more; where there are more than `STATES`, the one that loses least in
    each of `STATES` equal spans of time. Seconds are summed as they are, so T is never
    exceeded; the loss is the least possible, or, of more states, at most the least
    within T less one span a module.

    Args:
        costs: of the modules.
        increases: {name: (ranks + 1,) loss each rank costs alone, 0 for dense}.

    Returns:
        As `uniform`; of equal losses the faster, the last place dense.
    """
    dense = sum(module.seconds[-1] for module in costs.modules.values())
    limit = dense * (1 + 1e-9)  # sums differ by rounding
    shortest = sum(min(module.seconds) for module in costs.modules.values())
    left = shortest  # the modules still to come take this long at least
    seconds, lost = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # state it came from, option taken
    for name, module in costs.modules.items():
        left -= min(module.seconds)
        # (states, options): every option added to every state, fastest first.
        times = np.add.outer(seconds, module.seconds).ravel()
        losses = np.add.outer(lost, increases[name]).ravel()
        order = np.lexsort((losses, times))
        order = order[times[order] + left <= limit]
        least = np.minimum.accumulate(losses[order])
        better = np.append(True, losses[order][1:] < least[:-1])
        kept = order[better]
        if len(kept) > STATES:
            span = (times[kept] / (limit / STATES)).astype(int)
            # Losses fall with time: the last of a span loses least. The fastest stays.
            kept = kept[np.append(span[1:] != span[:-1], True) | (kept == kept[0])]
        seconds, lost = times[kept], losses[kept]
        steps.append(np.divmod(kept, len(module.seconds)))
    path = []
    for within in np.linspace(shortest, dense, LATENCIES)[:-1]:
        state = int(np.searchsorted(seconds, within * (1 + 1e-9), side="right")) - 1
        options = {}
        for name, (source, option) in zip(
            reversed(costs.modules), reversed(steps), strict=True
        ):
            options[name], state = int(option[state]), int(source[state])
        path.append(_pick(costs, options))
    return [*path, {}]  # all dense fits, and nothing loses less


def _pick(costs: Costs, options: Mapping[str, int]) -> Ranks:
    """Turn the index of each module's option into ranks; the last option is dense."""
    return {
        name: module.ranks[options[name]]
        for name, module in costs.modules.items()
        if options[name] < len(module.ranks)
    }


# Each takes costs and, for each module, what its ranks lose.
PATHS: dict[str, Callable[[Costs, Mapping[str, np.ndarray]], list[Ranks]]] = {
    "uniform": uniform,
    "energy": energy,
    "greedy": greedy,
    "latency": latency,
}


def along_a_path(
    walk: Walk,
    costs: Costs,
    method: str,
    goal: Goal,
    book: Trials,
    loss: LossFunction | None = None,
) -> Outcome:
    """Find the place on a rival's path and compress a copy; see `search_ranks`."""
    small, batches = walk.model, walk.batches
    dense = {name: small.get_submodule(name) for name in costs.modules}
    sources = {name: input_name(module, name) for name, module in dense.items()}
    moments = calibrate(small, batches, sources.values())
    found = factorize_modules(small, costs.modules, moments)
    dense_loss = book.loss("", None, walk.loss, len(walk.layers))
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

    def evaluate() -> float:
        nonlocal forwards
        forwards += len(walk.layers)
        return mean_loss(small, batches, loss)

    if goal.loss_increase is not None:
        check_dense_loss(dense_loss)
        allowed = dense_loss * (1 + goal.loss_increase)

        def attempt(place: int) -> float:
            put(path[place])
            return book.loss("", place, evaluate, len(walk.layers), allowed)

        place, _ = smallest_option(len(path) - 1, attempt, dense_loss, allowed)
    else:
        goal.check(costs, path[0])
        # From above, place by place: measured times need not grow with the rank.
        places = reversed(range(len(path)))
        place = next(p for p in places if goal.reached(costs, path[p]) >= 1)
    put(path[place])
    seen = {n: (moments[at].count, moments[at].dim) for n, at in sources.items()}
    return Outcome(small, path[place], dense_loss, forwards, seen)


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
