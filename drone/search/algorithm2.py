"""Algorithm 2: choose the rank of every module so that the whole keeps its promise."""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drone import progress
from drone.model.adapters import as_names
from drone.model.calibrate import alone, frozen
from drone.model.cautions import Seen, warn_few_tokens
from drone.model.compress import check_module, factorize_module, replace_module
from drone.model.inputs import prepare
from drone.model.loss import LossFunction, mean_loss
from drone.model.masks import warn_of_any_left_pads
from drone.model.storage import remember_ranks
from drone.model.walk import Walk
from drone.search import rivals
from drone.search.aim import smallest_budget
from drone.search.costs import GRID, Costs, measure, searchable
from drone.search.described import described
from drone.search.goal import TARGETS, Goal
from drone.search.plan import RankPlan, warn_of_an_empty_plan, weights_sha256
from drone.search.rivals import along_a_path
from drone.search.trials import (
    Found,
    Outcome,
    Trials,
    attempt_rank,
    check_dense_loss,
    ranks_sha256,
    search_key,
    smallest_option,
)

METHODS = ("drone", *rivals.PATHS)

__all__ = ["METHODS", "TARGETS", "search_ranks", "shares"]


def search_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    budget: float | None = None,
    *,
    loss_increase: float | None = None,
    speedup: float | None = None,
    keep: float | None = None,
    modules: Iterable[str] | None = None,
    grid: Sequence[float] = GRID,
    times: Costs | None = None,
    method: str = "drone",
    target: str | None = None,
    trace: Path | str | None = None,
    layers: str | Iterable[str] | None = None,
    loss: LossFunction | None = None,
) -> RankPlan:
    """Choose a rank for every module: for a loss, a speed or a size. Algorithm 2.

    `drone`, the paper's search: the loss may grow by the factor 1 + loss_increase in
    all. The factor is a product of shares, one a module, whose exponents are
    proportional to the modules' measured times. In network order each module takes the
    smallest rank of the grid that keeps the loss within the product of the shares so
    far, for the inputs it gets from the compressed layers below; what one does not
    spend, the later ones may. If no rank does, it stays dense. For a speed or a size,
    an allowed increase is looked for that reaches it and passes it by at most 3 %, in a
    few such walks; a coarse grid may step over that. Chapter 5.

    The rivals walk a path from the smallest model to the dense one and take the
    smallest that keeps the loss, or the largest that has the speed or the size; all
    modules are factorized for the dense model's inputs: `uniform`, `energy`, `greedy`,
    `latency`, described in `drone.search.rivals`.

    Args:
        model: an encoder with a head; it is left as it was.
        batches: of training rows, with `labels` and `attention_mask`; calibration and
            loss both use them. All are kept in memory.
        budget: the old spelling, with `target`: how much the loss may grow, or the
            share of the parameters or of the whole model's latency to keep.
        loss_increase: how much the loss may grow, 0.1 being 10 %.
        speedup: the dense model's predicted time over the small one's, 2 being twice
            as fast.
        keep: the share of the parameters in the searched modules' matrices to keep, in
            (0, 1]. It is the share of their multiply-adds a token too.
        modules: names; None: attention blocks, and Linears outside queries and keys.
        grid: ranks as shares of the largest one that saves multiply-adds.
        times: from `drone.costs.measure`, whose grid then counts; None: measured here
            on the batch in the middle of `batches`.
        method: one of `drone uniform energy greedy latency`.
        target: of `budget`: one of `loss parameters multiply_adds latency`; None: loss.
        trace: a file to which each trial is written as it is made. If it exists, its
            trials are not made again: a search that was stopped goes on and ends at
            the same plan.
        layers: names of the lists of layers to walk through, where those that are
            found by themselves are not meant.
        loss: (model, batch) → a scalar; None: what the model returns.

    Returns:
        A `RankPlan`. Ranks measured no faster than the dense module are not tried,
        unless the goal is a share of the parameters.

    Raises:
        ValueError: not exactly one goal, a number, method or module that is not
            allowed, batches without labels, a dense loss that is not above 0, a loss
            that is not finite, a goal below the smallest model, a trace of another
            search or one that another search is writing, a model whose loss differs
            from one pass to the next.

    Warns:
        FewTokensWarning, LeftPaddingWarning, NoMaskWarning: as `compress` and
            `calibrate`.
        NothingReplacedWarning: every module stays dense.

    >>> import torch, transformers
    >>> _ = torch.manual_seed(0)
    >>> config = transformers.BertConfig(vocab_size=50, hidden_size=32,
    ...     num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = transformers.BertForSequenceClassification(config).eval()
    >>> ids = torch.randint(5, 50, (8, 6))
    >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
    ...          "labels": torch.arange(8) % 2}
    >>> plan = search_ranks(model, [batch], keep=0.5, method="greedy")
    >>> plan.weights_share <= 0.5
    True
    """
    goal = _goal(
        budget, target, loss_increase=loss_increase, speedup=speedup, keep=keep
    )
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}.")
    started = time.perf_counter()
    batches = prepare(batches, model)
    lists = as_names(layers)
    names = searchable(model, lists) if modules is None else list(modules)
    if not batches or not names:
        raise ValueError("at least one batch and one module are needed.")
    for name in names:
        check_module(model, dict.fromkeys(names, 1), name, 1)
    book = Trials(
        None if trace is None else Path(trace),
        lambda: search_key(
            model, batches, names, goal, list(grid), method, lists, described(loss)
        ),
    )
    own = _apart(model)
    with book, frozen(own), _random_state_kept(own):
        costs = _costs(own, batches, names, grid, times, book)
        if goal.keep is None:
            costs = costs.faster()
        if goal.loss_increase is None:  # said now, not after minutes of trials
            goal.check(costs, costs.smallest(by_seconds=goal.speedup is not None))
        if method == "drone":
            known: Found = {}
            seen: Seen = {}
            warn_of_any_left_pads(own, batches)

            def run(increase: float) -> Outcome:
                walk = Walk(copy.deepcopy(own), batches, costs.modules, lists, loss)
                return _algorithm_2(walk, increase, costs, book, known, seen)

            if goal.loss_increase is not None:
                found = run(goal.loss_increase)
            else:
                found = smallest_budget(run, lambda r: goal.reached(costs, r))
        else:
            walk = Walk(copy.deepcopy(own), batches, costs.modules, lists, loss)
            found = along_a_path(walk, costs, method, goal, book, loss)
        afresh = mean_loss(found.small, batches, loss)
    if goal.loss_increase is not None:
        _check_promise(afresh, found.dense_loss * (1 + goal.loss_increase), book)
    remember_ranks(found.small)
    warn_few_tokens({name: found.seen[name] for name in found.ranks})
    if not found.ranks:
        warn_of_an_empty_plan(len(names))
    return RankPlan(
        method=method,
        goal=goal,
        ranks=found.ranks,
        loss=afresh,
        dense_loss=found.dense_loss,
        costs=costs,
        trace=book.trace,
        trials=len(book.trace),
        layer_forwards=found.forwards + book.spared_layers,
        seconds=time.perf_counter() - started + book.spared_seconds,
        model_sha256=weights_sha256(model),
        layers=lists,
        modules={name: found.small.get_submodule(name) for name in found.ranks},
    )


def _apart(model: nn.Module) -> nn.Module:
    """Return a copy that shares the model's numbers, but none of its modes.

    Another thread may use the model, or search it too, and put it into train mode when
    it is done. While a calibration has hooks on it, no copy is made.
    """
    with alone(model):
        numbers = {id(t): t for t in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, numbers)


def _goal(budget: float | None, target: str | None, **wishes: float | None) -> Goal:
    """Read what is wanted, in the new spelling or the old one."""
    if budget is None and target is None:
        return Goal(**wishes)
    if any(value is not None for value in wishes.values()):
        raise ValueError(
            "budget and target are the old spelling of loss_increase, speedup and "
            "keep; give one of those three only."
        )
    if budget is None:
        raise ValueError(f"target {target!r} needs a budget; or give speedup or keep.")
    return Goal.old(budget, "loss" if target is None else target)


def _check_promise(loss: float, allowed: float, book: Trials) -> None:
    """Refuse a plan whose loss, evaluated afresh, is above what was allowed."""
    if not loss <= allowed:
        last = book.trace[-1]
        raise ValueError(
            f"the plan's loss is {loss:.6g} when evaluated afresh, above the allowed "
            f"{allowed:.6g}; {last['module'] or 'the model'}, the last tried, had "
            f"{last['loss']:.6g}. The model's loss differs from one pass to the next."
        )


def _random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, random numbers may be drawn, as thin modules to be timed do."""
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(gpus))


def _costs(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
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
    walk: Walk,
    increase: float,
    costs: Costs,
    book: Trials,
    known: Found,
    seen: Seen,
) -> Outcome:
    """Walk through the layers of a copy, replacing modules; see `search_ranks`.

    `known` holds the factorizations of the last walk, by module and by what was
    replaced below it: they serve a walk with another increase as long as both choose
    alike, and are exact there. `seen` goes on from walk to walk, too.
    """
    small = walk.model
    ranks: dict[str, int] = {}
    last: dict[str, int] = {}  # where in the grid the last module of a kind ended
    exponents, spent, before = shares(costs), 0.0, dict(known)
    known.clear()
    book.after = ""
    loss = dense_loss = book.loss("", None, walk.loss, len(walk.layers))
    check_dense_loss(dense_loss)
    for _ in progress.bar(walk.layers, desc=f"search, loss +{increase:.1%}"):
        for group in walk.groups():
            below, moments = ranks_sha256(ranks), {}
            wanted = [name for name in group if costs.modules[name].ranks]
            if any(f"{name} {below}" not in before for name in wanted):
                before.clear()  # what follows has other inputs than last time
                moments = walk.moments(group)
                for moment in moments.values():
                    seen |= dict.fromkeys(group, (moment.count, moment.dim))
            for name in group:
                spent += exponents[name]
                allowed = dense_loss * (1 + increase) ** min(spent, 1.0)
                module = costs.modules[name]
                if not module.ranks:  # none saves anything: it stays dense
                    continue
                found = before.get(f"{name} {below}") or factorize_module(
                    small.get_submodule(name), name, moments
                )
                known[f"{name} {below}"] = found
                book.after = ranks_sha256(ranks)
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
    return Outcome(small, ranks, dense_loss, walk.layer_forwards, seen)
