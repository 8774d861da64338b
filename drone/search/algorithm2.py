"""Algorithm 2: choose the rank of every module so that the whole keeps its promise."""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn

from drone import progress
from drone.model.calibrate import frozen
from drone.model.compress import check_module, factorize_module, replace_module
from drone.model.loss import mean_loss
from drone.model.storage import remember_ranks
from drone.model.walk import Walk
from drone.search import rivals
from drone.search.costs import GRID, Costs, measure, searchable
from drone.search.plan import RankPlan
from drone.search.rivals import along_a_path
from drone.search.trials import (
    Trials,
    attempt_rank,
    check_dense_loss,
    search_key,
    smallest_option,
)

METHODS = ("drone", *rivals.PATHS)
TARGETS = ("loss", "parameters", "multiply_adds", "latency")


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
    book = Trials(
        trace,
        lambda: search_key(model, batches, names, budget, list(grid), method, target),
    )
    with frozen(model):
        costs = _costs(model, batches, names, grid, times, book)
        if target in ("loss", "latency"):
            costs = costs.faster()
        small = copy.deepcopy(model)
        if method == "drone":
            found = _algorithm_2(small, batches, budget, costs, book)
        else:
            found = along_a_path(small, batches, budget, costs, method, target, book)
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
    book: Trials,
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
    book: Trials,
) -> tuple[dict[str, int], float, int]:
    """Walk through the layers of `small`, replacing modules; see `search_ranks`."""
    ranks: dict[str, int] = {}
    last: dict[str, int] = {}  # where in the grid the last module of a kind ended
    exponents, spent = shares(costs), 0.0
    walk = Walk(small, batches, costs.modules)
    loss = dense_loss = book.loss("", None, walk.loss, len(walk.layers))
    check_dense_loss(dense_loss)
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
                attempt = partial(
                    attempt_rank, walk, book, name, module, found, allowed
                )
                option, loss = smallest_option(
                    len(module.ranks), attempt, loss, allowed, last.get(module.kind)
                )
                last[module.kind] = option
                if option < len(module.ranks):
                    ranks[name] = module.ranks[option]
                    replace_module(small, name, ranks[name], found)
        walk.advance()
    return ranks, dense_loss, walk.layer_forwards


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
