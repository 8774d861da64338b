"""Replace named modules of a model by low-rank ones, and report what that changed."""

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from drone import progress
from drone.layers.attention import (
    ATTENTION,
    LowRankSelfAttention,
    attention_heads,
    query_and_key,
)
from drone.layers.linear import LowRankLinear, linear_multiply_adds, parameters
from drone.math.attention import AttentionFactorization, factorize_attention
from drone.math.factorize import Factorization, break_even_rank, check_rank, factorize
from drone.math.moments import SecondMoment
from drone.model.adapters import module_named
from drone.model.calibrate import frozen
from drone.model.storage import remember_ranks
from drone.model.walk import Walk, input_name

if TYPE_CHECKING:
    import pandas as pd


class AboveBreakEvenWarning(UserWarning):
    """Some layer got bigger and slower than the dense one it replaced."""


def factorize_modules(
    model: nn.Module,
    names: Iterable[str],
    moments: Mapping[str, SecondMoment] | None = None,
) -> dict[str, Factorization | AttentionFactorization]:
    """Decompose each named module once; `compress` then takes any rank from it.

    Args:
        model: any module.
        names: of Linear layers or self-attention blocks.
        moments: as in `compress`.

    Raises:
        ValueError: as in `compress`.
    """
    names = list(names)
    return {
        name: factorize_module(module_named(model, name), name, moments)
        for name in progress.bar(names, desc="factorize")
    }


def compress(
    model: nn.Module,
    ranks: Mapping[str, int],
    moments: Mapping[str, SecondMoment] | None = None,
    *,
    factorizations: Mapping[str, Factorization | AttentionFactorization] | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    sequential: bool = False,
) -> nn.Module:
    """Return a copy of the model with the named modules replaced. Algorithm 1.

    Args:
        model: any module; it is left as it was.
        ranks: {module name: rank}. Of a Linear, the inner dimension, from 1 to
            min(out, in); of a self-attention block, the inner dimension of each head's
            query-key product, from 1 to the head size. A rank above break-even is
            allowed, and warned of: that module gets bigger.
        moments: from `calibrate`, {module name: its inputs' moment}; an attention
            block's is that of its query. None: plain SVD.
        factorizations: from `factorize_modules`, to try several ranks without
            decomposing again; a module left out is decomposed here.
        batches: what `sequential` calibrates on, as in `calibrate`; read once.
        sequential: collect each module's inputs after the modules below it have been
            replaced, as the paper does; `moments` then stays None. The hidden states
            that enter a layer are kept in memory, so that the whole costs about two
            forward passes. Only modules inside the encoder's layers.

    Returns:
        The copy; `report(copy)` says what was changed and what was left.

    Raises:
        ValueError: a name the model does not have, a module that cannot be replaced, a
            rank that is not allowed, a moment that is missing or does not fit, a
            weight that is not finite. The message names the module.
    """
    for name, rank in ranks.items():
        check_module(model, ranks, name, rank)
    if sequential != (batches is not None):
        raise ValueError("sequential=True and batches go together; give both or none.")
    if sequential and not (moments is None and factorizations is None):
        raise ValueError("sequential=True collects its own moments; give none.")
    small = copy.deepcopy(model)
    if batches is not None:
        _compress_in_order(small, ranks, batches)
    else:
        given = dict(factorizations or {})
        for name, rank in progress.bar(ranks.items(), desc="compress"):
            module = small.get_submodule(name)
            found = given.get(name) or factorize_module(module, name, moments)
            replace_module(small, name, rank, found)
    for name, module in small.named_modules():  # calibration made new ones in eval mode
        module.training = model.get_submodule(name).training
    remember_ranks(small)
    _warn_above_break_even(small, ranks)
    return small


def check_module(
    model: nn.Module, ranks: Mapping[str, int], name: str, rank: int
) -> None:
    """Refuse a module that cannot be replaced, or not at this rank, or twice.

    Raises:
        ValueError: as `compress`.
    """
    module = module_named(model, name)
    if isinstance(module, nn.Linear):
        check_rank(rank, min(module.weight.shape), where=name)
        return
    if type(module).__name__ not in ATTENTION:
        raise ValueError(
            f"{name} is a {type(module).__name__}; a Linear or a self-attention block "
            f"({', '.join(ATTENTION)}) is needed."
        )
    query, _ = _named_projections(module, name)
    check_rank(rank, query.out_features // attention_heads(module), where=name)
    names = ATTENTION[type(module).__name__]
    for part in (f"{name}.{names.query}", f"{name}.{names.key}"):
        if part in ranks:
            raise ValueError(f"{part} has a rank, and so has its block; give one.")


def _named_projections(block: nn.Module, name: str) -> tuple[nn.Linear, nn.Linear]:
    try:
        return query_and_key(block)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def factorize_module(
    module: nn.Module, name: str, moments: Mapping[str, SecondMoment] | None
) -> Factorization | AttentionFactorization:
    """Decompose a Linear, or the query-key product of a block; name it in errors."""
    source = input_name(module, name)
    if moments is not None and source not in moments:
        raise ValueError(f"{name}: there is no moment for {source}; calibrate it too.")
    moment = None if moments is None else moments[source]
    try:
        if isinstance(module, nn.Linear):
            return factorize(module.weight, moment)
        query, key = query_and_key(module)
        return factorize_attention(query, key, attention_heads(module), moment)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def replace_module(
    small: nn.Module,
    name: str,
    rank: int,
    found: Factorization | AttentionFactorization,
) -> None:
    """Put the low-rank module in the dense one's place."""
    dense = small.get_submodule(name)
    new: nn.Module
    try:
        if isinstance(dense, nn.Linear) and isinstance(found, Factorization):
            new = LowRankLinear.from_linear(dense, rank, found)
        elif isinstance(found, AttentionFactorization):
            new = LowRankSelfAttention.from_attention(dense, rank, found)
        else:
            raise ValueError(f"a {type(found).__name__} does not fit this module.")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    small.set_submodule(name, new)


def _compress_in_order(
    small: nn.Module, ranks: Mapping[str, int], batches: Iterable[Mapping[str, Any]]
) -> None:
    """Replace modules in the order they run, each for the inputs it then gets."""
    with frozen(small):
        walk = Walk(small, batches, ranks)
        for _ in progress.bar(walk.layers, desc="compress in order"):
            for group in walk.groups():
                moments = walk.moments(group)
                for name in group:
                    module = small.get_submodule(name)
                    found = factorize_module(module, name, moments)
                    replace_module(small, name, ranks[name], found)
            walk.advance()


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


def report(model: nn.Module) -> "pd.DataFrame":
    """Say of each layer whether it was replaced, at what rank, and what that saved.

    Returns:
        One row a Linear or LowRankLinear, in network order, indexed by module name:
        `out`, `in`, `rank` (None: dense), `parameters` and `parameters_dense`,
        `multiply_adds` and `multiply_adds_dense` (a token), and `note`. The queries
        and keys of a LowRankSelfAttention have its rank, that of each head.

    Raises:
        ValueError: the model has no such layer.
    """
    rows = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | LowRankLinear):
            parent = model.get_submodule(name.rpartition(".")[0])
            rows[name] = _row(module, name.rpartition(".")[2], parent)
    if not rows:
        raise ValueError(f"{type(model).__name__} has no Linear to report on.")
    import pandas as pd  # half a second: only who asks for a table pays it

    return pd.DataFrame.from_dict(rows, orient="index").astype({"rank": "Int64"})


def _row(
    module: nn.Linear | LowRankLinear, name: str, parent: nn.Module
) -> dict[str, Any]:
    out, rank, note = module.out_features, None, "left dense: no rank was given for it"
    if isinstance(module, LowRankLinear):
        rank = module.rank
        note = "replaced" if module.saves else "replaced; above break-even: bigger"
    elif isinstance(parent, LowRankSelfAttention) and name in parent.projections:
        rank, out = parent.rank, parent.heads * parent.head_size
        note = f"replaced: {rank} of {parent.head_size} numbers a head"
        if parent.leaves_fused_kernel:
            note += "; slow here: not a multiple of 16 bytes"
    dense = out * module.in_features
    return {
        "out": out,
        "in": module.in_features,
        "rank": rank,
        "parameters": parameters(module),
        "parameters_dense": dense + (0 if module.bias is None else out),
        "multiply_adds": linear_multiply_adds(module),
        "multiply_adds_dense": dense,
        "note": note,
    }
