"""The one verb: compress a model to a size, a rank, a speed, or at given ranks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from torch import nn

from drone.layers.linear import is_linear, linear_multiply_adds
from drone.math.attention import AttentionFactorization
from drone.math.factorize import Factorization, break_even_rank
from drone.math.moments import SecondMoment
from drone.model import compress as by_ranks
from drone.model.adapters import as_names, encoder_linears
from drone.model.calibrate import calibrate
from drone.model.family import (
    Relative,
    SharedBasis,
    Shifted,
    check_linears,
    factorize_relative,
)
from drone.model.gradients import calibrate_gradients
from drone.model.loss import LossFunction
from drone.search.algorithm2 import search_ranks
from drone.search.costs import ALIGNED, searchable
from drone.search.goal import Goal
from drone.search.plan import RankPlan

Filter = Callable[[str, nn.Module], bool]
STEPS = 1000  # fractions that are tried for a share
WAYS = (
    "compress(model, 0.5, batches=b) keeps a share of the parameters, "
    "compress(model, 64, batches=b) gives one rank, "
    "compress(model, speedup=2.0, batches=b) and "
    "compress(model, loss_increase=0.1, batches=b) search, "
    "compress(model, {name: rank}, moments) takes your ranks"
)


@dataclass(frozen=True)
class Compressed:
    """What `compress` made of what was asked; the copy has it as `compressed`.

    Attributes:
        asked: for what, in words.
        ranks: {module name: rank}.
        kept: share of the parameters in the candidates' matrices that is left; of
            given ranks, the candidates are the modules named.
        candidates: how many modules could have been replaced.
        plan: of a search, without its modules; else None.
    """

    asked: str
    ranks: dict[str, int]
    kept: float
    candidates: int
    plan: RankPlan | None = None

    def __str__(self) -> str:
        if not self.ranks:
            return f"asked for {self.asked}: no module replaced"
        low, high = min(self.ranks.values()), max(self.ranks.values())
        return (
            f"asked for {self.asked}: {len(self.ranks)} of {self.candidates} modules "
            f"replaced, ranks {low} to {high}, {self.kept:.1%} of their weights kept"
        )


def compress(
    model: nn.Module,
    ranks: Mapping[str, int] | float | None = None,
    moments: Mapping[str, SecondMoment] | None = None,
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    speedup: float | None = None,
    loss_increase: float | None = None,
    filter: Filter | None = None,
    method: str | None = None,
    factorizations: Mapping[str, Factorization | AttentionFactorization] | None = None,
    sequential: bool = False,
    layers: str | Iterable[str] | None = None,
    loss: LossFunction | None = None,
    relative: Relative | SharedBasis | Shifted | None = None,
) -> nn.Module:
    """Return a smaller copy of a model: to a size, a rank, a speed, or your ranks.

    - `compress(model, 0.5, batches=b)`: half of the parameters in the Linears of the
      model's layers; each has the same fraction of the largest rank that saves.
    - `compress(model, 64, batches=b)`: one rank for all; a Linear too small to gain
      from it stays dense.
    - `compress(model, speedup=2.0, batches=b)`: ranks that `search_ranks` chooses for a
      predicted speed; `loss_increase=0.1` for a loss. Batches need labels.
    - `compress(model, {name: rank}, moments)`: your ranks, attention blocks too.
      Algorithm 1, described in `drone.model.compress`.

    Args:
        model: any module; it is left as it was.
        ranks: {module name: rank}; or a share, a float in (0, 1]; or a rank, an int
            from 2.
        moments: from `calibrate`, {module name: its inputs' moment}. None, and no
            batches: plain SVD.
        batches: of training rows, keyword arguments of the model; inputs are collected
            from them.
        speedup: the dense model's predicted time over the copy's, 2 being twice as
            fast.
        loss_increase: by how much the loss on the batches may grow, 0.1 being 10 %.
        filter: (name, module) → whether it may be replaced; None: all. With a share, a
            rank, a speed or a loss.
        method: of the search, as in `search_ranks`; with a speed or a loss None is the
            paper's. With a share, ranks are not the same fraction but what this method
            chooses; batches then need labels.
        factorizations: from `factorize_modules`, as in Algorithm 1.
        sequential: with batches: collect each module's inputs after those below it have
            been replaced, as the paper does. A search by `drone` always does.
        layers: names of the lists of layers, where those that are found by themselves
            are not meant.
        loss: of a search, or of a relative that needs gradients: (model, batch) → a
            scalar; None: what the model returns.
        relative: which of DRONE's family factorizes the Linears, such as `FWSVD()` of
            `drone.family`; None: DRONE, or plain SVD without data. With a share, a
            rank or your ranks.

    Returns:
        The copy. `copy.compressed` says what the number became, `report(copy)` what
        was changed in each module and what was left.

    Raises:
        TypeError: an argument of the wrong kind, as moments where batches belong.
        ValueError: none or more than one of a size, a rank, a speed, a loss; the number
            1; a number that is not allowed; nothing to compress; and what `calibrate`,
            `search_ranks` and Algorithm 1 raise.

    >>> import torch, transformers
    >>> config = transformers.BertConfig(vocab_size=50, hidden_size=32,
    ...     num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = transformers.BertModel(config)
    >>> ids = torch.randint(5, 50, (8, 6))
    >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    >>> small = compress(model, 0.5, batches=[batch])
    >>> print(small.compressed)  # doctest: +NORMALIZE_WHITESPACE
    asked for a share of 0.5: 6 of 6 modules replaced, ranks 8 to 10,
    48.4% of their weights kept
    """
    _check_kinds(ranks, moments, batches, filter)
    lists = as_names(layers)
    wishes = {"ranks": ranks, "speedup": speedup, "loss_increase": loss_increase}
    given = [name for name, value in wishes.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"give one of ranks, speedup and loss_increase; {len(given)} were given. "
            f"{WAYS}."
        )
    if relative is not None:
        if any((moments, factorizations, sequential)) or ranks is None or method:
            raise ValueError(
                f"{relative} factorizes by itself: give it batches and a share, a rank "
                "or {name: rank}, and no moments, factorizations, sequential or method."
            )
        if loss is not None and not relative.gradients:
            raise ValueError(f"{relative} takes no gradients; leave out loss.")
        if isinstance(ranks, Mapping):
            if filter is not None:
                raise ValueError("filter goes with a number; your ranks have chosen.")
            asked, chosen = "given ranks", dict(ranks)
        else:
            linears = _allowed(encoder_linears(model, lists), filter)
            asked, chosen = _by_number(linears, ranks)
        small = _by_relative(model, chosen, relative, batches, lists, loss)
        return _told(small, model, f"{asked} by {relative}", chosen, list(chosen))
    if isinstance(ranks, Mapping):
        if any(each is not None for each in (filter, method, loss)):
            raise ValueError(
                "filter, method and loss go with a number; {name: rank} has chosen "
                "already."
            )
        small = by_ranks.compress(
            model,
            ranks,
            moments,
            factorizations=factorizations,
            batches=batches,
            sequential=sequential,
            layers=lists,
        )
        return _told(small, model, "given ranks", ranks, list(ranks))
    if ranks is None or method is not None:
        if moments is not None or factorizations is not None or sequential:
            raise ValueError(
                "a search collects its own moments, and in its own order; leave out "
                "moments, factorizations and sequential."
            )
        if isinstance(ranks, Integral):
            raise ValueError("a method chooses ranks; for one rank leave method out.")
        goal = Goal(loss_increase, speedup, None if ranks is None else float(ranks))
        return _searched(model, goal, batches, filter, method or "drone", lists, loss)
    if loss is not None:
        raise ValueError("loss goes with a search: speedup, loss_increase or a method.")
    linears = _allowed(encoder_linears(model, lists), filter)
    asked, chosen = _by_number(linears, ranks)
    if batches is not None and not sequential:
        if moments is not None:
            raise ValueError("moments and batches were given; one of them will do.")
        moments, batches = calibrate(model, batches, chosen), None
    small = by_ranks.compress(
        model,
        chosen,
        moments,
        factorizations=factorizations,
        batches=batches,
        sequential=sequential,
        layers=lists if sequential else None,
    )
    return _told(small, model, asked, chosen, list(linears))


def _by_relative(
    model: nn.Module,
    ranks: Mapping[str, int],
    relative: Relative | SharedBasis | Shifted,
    batches: Iterable[Mapping[str, Any]] | None,
    layers: list[str] | None,
    loss: LossFunction | None,
) -> nn.Module:
    """Let one of the family replace the modules at these ranks."""
    if isinstance(relative, Shifted):
        if batches is None:
            raise ValueError(f"{relative} needs batches; give batches=….")
        kept, rows = list(batches), None
        if relative.gradients:
            check_linears(model, ranks)  # before a pass over the data is spent
            felt = calibrate_gradients(model, kept, ranks, loss)
            rows = {name: each.outputs for name, each in felt.items()}
        return by_ranks.compress(
            model,
            ranks,
            batches=kept,
            sequential=True,
            layers=layers,
            shifted=relative,
            rows=rows,
        )
    if isinstance(relative, SharedBasis):
        relative.check(ranks)
    made = factorize_relative(model, ranks, relative, batches, loss)
    small = by_ranks.compress(model, ranks, factorizations=made)
    if isinstance(relative, SharedBasis):
        relative.tie(small, ranks)
    return small


def _check_kinds(ranks: Any, moments: Any, batches: Any, filter: Any) -> None:
    """Refuse arguments of the wrong kind, in words: places are easily mixed up.

    Raises:
        TypeError, ValueError: as `compress`.
    """
    if isinstance(ranks, Mapping):
        if any(isinstance(each, SecondMoment) for each in ranks.values()):
            raise TypeError(f"ranks are moments; moments come third. {WAYS}.")
    elif isinstance(ranks, bool) or not (ranks is None or isinstance(ranks, Real)):
        kind = type(ranks).__name__
        more = " Batches go by name: batches=…." if isinstance(ranks, list) else ""
        raise TypeError(f"ranks are a {kind} ({str(ranks)[:40]}).{more} {WAYS}.")
    elif isinstance(ranks, Integral):
        if ranks == 1:
            raise ValueError(
                "1 could be a rank or the whole; write {name: 1} for rank 1, 1.0 for "
                "all that saves."
            )
        if int(ranks) < 1:
            raise ValueError(f"a rank of {ranks}; at least 2 is needed.")
    elif ranks is not None and not 0 < float(ranks) <= 1:
        raise ValueError(
            f"a share of {ranks}; in (0, 1] is needed. A rank is an int: {WAYS}."
        )
    if moments is not None and not (
        isinstance(moments, Mapping)
        and all(isinstance(each, SecondMoment) for each in moments.values())
    ):
        raise TypeError(
            f"moments are a {type(moments).__name__}, not {{name: SecondMoment}} from "
            "drone.calibrate. Batches go by name: batches=…."
        )
    if isinstance(batches, Mapping) and any(
        isinstance(each, SecondMoment) for each in batches.values()
    ):
        raise TypeError("batches are moments; those go by moments=….")
    if isinstance(batches, str | int | float):
        raise TypeError(
            f"batches are a {type(batches).__name__}; an iterable of the model's "
            "keyword arguments is needed."
        )
    if filter is not None and not callable(filter):
        raise TypeError(
            f"filter is a {type(filter).__name__}; a function of (name, module) is "
            "needed."
        )


def _allowed(modules: Mapping[str, Any], filter: Filter | None) -> dict[str, Any]:
    """Leave out the modules that the filter does not want.

    Raises:
        ValueError: none is left.
    """
    kept = {n: m for n, m in modules.items() if filter is None or filter(n, m)}
    if not kept:
        raise ValueError(
            f"filter leaves none of the {len(modules)} modules; they are named like "
            f"{', '.join(list(modules)[:3])}."
        )
    return kept


def _by_number(linears: Mapping[str, Any], number: float) -> tuple[str, dict[str, int]]:
    """Return what a number asks for, in words, and the ranks it gives."""
    if isinstance(number, Integral):
        return f"rank {number}", _one_rank(linears, int(number))
    return f"a share of {number:g}", _one_share(linears, float(number))


def _one_rank(linears: Mapping[str, Any], rank: int) -> dict[str, int]:
    """Give a rank to all Linears that gain from it.

    Raises:
        ValueError: none does.
    """
    largest = {n: break_even_rank(*m.weight.shape) for n, m in linears.items()}
    if rank > max(largest.values()):
        raise ValueError(
            f"rank {rank} saves nothing in any of {len(linears)} modules; the largest "
            f"that saves is {max(largest.values())}."
        )
    return {name: rank for name, limit in largest.items() if rank <= limit}


def _one_share(linears: Mapping[str, Any], share: float) -> dict[str, int]:
    """Give every Linear the same fraction of its largest rank that saves.

    The largest fraction that keeps at most this share of all their parameters. Ranks
    of larger modules are multiples of 8, as kernels like them.

    Raises:
        ValueError: even the smallest ranks keep more.
    """
    sizes: dict[str, tuple[int, int]] = {n: m.weight.shape for n, m in linears.items()}
    largest = {name: break_even_rank(*size) for name, size in sizes.items()}
    dense = sum(out * into for out, into in sizes.values())

    def at(fraction: float) -> dict[str, int]:
        ranks = {}
        for name, limit in largest.items():
            step = ALIGNED if limit >= 4 * ALIGNED else 1
            rank = max(round(fraction * limit / step) * step, step)
            if limit > 0:  # else no rank saves
                ranks[name] = min(rank, limit // step * step)
        return ranks

    def left(ranks: Mapping[str, int]) -> float:
        saved = sum(
            out * into - ranks[name] * (out + into)
            for name, (out, into) in sizes.items()
            if name in ranks
        )
        return 1 - saved / dense

    for step in range(STEPS, 0, -1):
        ranks = at(step / STEPS)
        if ranks and left(ranks) <= share:
            return ranks
    raise ValueError(
        f"a share of {share:g} of the parameters; with the smallest ranks "
        f"{left(at(1 / STEPS)):.3g} is left."
    )


def _searched(
    model: nn.Module,
    goal: Goal,
    batches: Iterable[Mapping[str, Any]] | None,
    filter: Filter | None,
    method: str,
    layers: list[str] | None,
    loss: LossFunction | None,
) -> nn.Module:
    """Let a search choose the ranks, and apply its plan."""
    if batches is None:
        raise ValueError("a search needs batches with labels; give batches=….")
    modules = {name: model.get_submodule(name) for name in searchable(model, layers)}
    names = _allowed(modules, filter)
    plan = search_ranks(
        model,
        batches,
        loss_increase=goal.loss_increase,
        speedup=goal.speedup,
        keep=goal.keep,
        modules=names,
        method=method,
        layers=layers,
        loss=loss,
    )
    if not plan.ranks:
        raise ValueError(
            f"{goal}: the search left all {len(names)} modules dense; ask for less, or "
            "take `search_ranks` to look at its trials."
        )
    small = plan.apply(model)
    told = Compressed(
        str(goal), plan.ranks, plan.weights_share, len(names), replace(plan, modules={})
    )
    small.compressed = told  # type: ignore[assignment]  # no module: left out of state
    return small


def _told(
    small: nn.Module,
    model: nn.Module,
    asked: str,
    ranks: Mapping[str, int],
    candidates: list[str],
) -> nn.Module:
    """Note on the copy what was asked for and what became of it."""
    pairs = [
        (model.get_submodule(name), small.get_submodule(name))
        for name in candidates
        if is_linear(model.get_submodule(name))
    ]
    before = sum(linear_multiply_adds(old) for old, _ in pairs)
    after = sum(linear_multiply_adds(new) for _, new in pairs)
    kept = after / before if before else 1.0
    told = Compressed(asked, dict(ranks), kept, len(candidates))
    small.compressed = told  # type: ignore[assignment]
    return small
