"""Replace named layers of a model by low-rank ones, and report what that changed."""

import copy
import difflib
import warnings
from collections.abc import Mapping

import pandas as pd
from torch import nn

from drone import progress
from drone.factorize import Factorization, break_even_rank, check_rank, factorize
from drone.layers import LowRankLinear, linear_multiply_adds, parameters


class AboveBreakEvenWarning(UserWarning):
    """Some layer got bigger and slower than the dense one it replaced."""


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name every `nn.Linear` of a transformer's encoder, in network order.

    The pooler and the task's head are not part of the encoder: they see one token a
    sentence and cost next to nothing.

    Raises:
        ValueError: the model has no `encoder` with a Linear in it.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "encoder" in name.split(".")
    }
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no Linear inside a module named 'encoder'; "
            "name the modules to compress yourself."
        )
    return linears


def factorize_linears(
    linears: Mapping[str, nn.Linear],
) -> dict[str, Factorization]:
    """Decompose each weight once; `compress` then takes any rank from it."""
    return {
        name: factorize(linear.weight)
        for name, linear in progress.bar(linears.items(), desc="factorize")
    }


def compress(
    model: nn.Module,
    ranks: Mapping[str, int],
    factorizations: Mapping[str, Factorization] | None = None,
) -> nn.Module:
    """Return a copy of the model with the named Linear layers replaced.

    Args:
        model: any module; it is left as it was.
        ranks: {module name: rank}, each rank from 1 to min(out, in). A rank above
            break-even is allowed, and warned of: that layer gets bigger.
        factorizations: {module name: what `factorize` gave}, to try several ranks
            without decomposing again; None, or a name left out: computed here.

    Returns:
        The copy; `report(copy)` says what was changed and what was left.

    Raises:
        ValueError: a name the model does not have, a module that is no `nn.Linear`, a
            rank that is not allowed, a weight that is not finite, or a factorization
            of another shape. The message names the module.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        _check(modules, name, rank)
    small = copy.deepcopy(model)
    given = factorizations or {}
    for name, rank in progress.bar(ranks.items(), desc="compress"):
        linear = small.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # _check has seen it
        try:
            new = LowRankLinear.from_linear(linear, rank, given.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        small.set_submodule(name, new)
    _warn_above_break_even(small, ranks)
    return small


def _check(modules: Mapping[str, nn.Module], name: str, rank: int) -> None:
    if name not in modules:
        linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        near = difflib.get_close_matches(name, linears, n=3) or linears[:3]
        raise ValueError(
            f"the model has no module {name!r}; its Linear layers are named like "
            f"{', '.join(near)}."
        )
    module = modules[name]
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__}; a Linear is needed.")
    check_rank(rank, min(module.weight.shape), where=name)


def _warn_above_break_even(small: nn.Module, ranks: Mapping[str, int]) -> None:
    worse = [
        f"{name} (rank {rank}, break-even {break_even_rank(out, into)})"
        for name, rank in ranks.items()
        for module in [small.get_submodule(name)]
        if isinstance(module, LowRankLinear) and not module.saves
        for out, into in [(module.out_features, module.in_features)]
    ]
    if worse:
        more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        warnings.warn(
            f"{len(worse)} of {len(ranks)} layers are bigger than the dense ones they "
            f"replace: {', '.join(worse[:3])}{more}.",
            AboveBreakEvenWarning,
            stacklevel=3,
        )


def report(model: nn.Module) -> pd.DataFrame:
    """Say of each layer whether it was replaced, at what rank, and what that saved.

    Returns:
        One row a Linear or LowRankLinear, in network order, indexed by module name:
        `out`, `in`, `rank` (None: dense), `parameters` and `parameters_dense`,
        `multiply_adds` and `multiply_adds_dense` (a token), and `note`.

    Raises:
        ValueError: the model has no such layer.
    """
    rows = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | LowRankLinear):
            continue
        low = isinstance(module, LowRankLinear)
        dense = module.out_features * module.in_features
        bias = 0 if module.bias is None else module.out_features
        note = "left dense: no rank was given for it"
        if isinstance(module, LowRankLinear):
            note = "replaced" if module.saves else "replaced; above break-even: bigger"
        rows[name] = {
            "out": module.out_features,
            "in": module.in_features,
            "rank": module.rank if low else None,
            "parameters": parameters(module),
            "parameters_dense": dense + bias,
            "multiply_adds": linear_multiply_adds(module),
            "multiply_adds_dense": dense,
            "note": note,
        }
    if not rows:
        raise ValueError(f"{type(model).__name__} has no Linear to report on.")
    return pd.DataFrame.from_dict(rows, orient="index").astype({"rank": "Int64"})
