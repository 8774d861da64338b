"""Replace named modules of a model by low-rank ones."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from drone import progress
from drone.callers import warn
from drone.devices import check_weights_are_here
from drone.files import tensors_sha256
from drone.layers.attention import (
    ATTENTION,
    LowRankSelfAttention,
    attention_heads,
    attention_names,
    query_and_key,
)
from drone.layers.linear import LowRankLinear, as_linear, is_linear
from drone.math.attention import AttentionFactorization, factorize_attention
from drone.math.factorize import Factorization, check_rank, factorize
from drone.math.moments import SecondMoment
from drone.model.adapters import module_named, swap, why_not
from drone.model.calibrate import alone, frozen
from drone.model.cautions import (
    NothingReplacedWarning,
    Seen,
    warn_above_break_even,
    warn_few_tokens,
    warn_ties,
)
from drone.model.family import Shifted, check_linears
from drone.model.inputs import check_moments, prepared
from drone.model.masks import warn_of_any_left_pads
from drone.model.shifted import factorize_module_shifted, paired_moment
from drone.model.storage import remember_ranks
from drone.model.walk import Walk, input_name


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
    made = {}
    for name in progress.bar(list(names), desc="factorize"):
        module = module_named(model, name)
        check_weights_are_here(module, name)
        found = factorize_module(module, name, moments)
        made[name] = replace(found, weight_sha256=_weight_sha256(module))
    return made


def compress(
    model: nn.Module,
    ranks: Mapping[str, int],
    moments: Mapping[str, SecondMoment] | None = None,
    *,
    factorizations: Mapping[str, Factorization | AttentionFactorization] | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    sequential: bool = False,
    layers: str | Iterable[str] | None = None,
    shifted: Shifted | None = None,
    rows: Mapping[str, SecondMoment] | None = None,
) -> nn.Module:
    """Return a copy of the model with the named modules replaced. Algorithm 1.

    Args:
        model: any module; it is left as it was.
        ranks: {module name: rank}. Of a Linear (or GPT-2's Conv1D), the inner
            dimension, from 1 to min(out, in); of a self-attention block, that of each
            head's query-key product, from 1 to the head size. A rank above break-even
            is allowed, and warned of: that module gets bigger. A module that stands in
            several places is replaced in all of them; one of its names is enough.
        moments: from `calibrate`, {module name: its inputs' moment}; an attention
            block's is that of its query. None: plain SVD.
        factorizations: from `factorize_modules` of this model, to try several ranks
            without decomposing again; a module left out is decomposed here.
        batches: what `sequential` calibrates on, as in `calibrate`; read once.
        sequential: collect each module's inputs after the modules below it have been
            replaced, as the paper does; `moments` then stays None. The hidden states
            that enter a layer are kept in memory, so that the whole costs a few forward
            passes; one of them proves that layers may be walked one by one. Where they
            cannot (see `Walk`), it costs a pass for each group of modules with the same
            input.
        layers: names of the lists of layers `sequential` walks through, where those
            that `encoder_layers` finds are not meant.
        shifted: with `sequential`, and Linears only: fit each module to the outputs it
            had in the dense model, which is walked beside the copy at twice the cost.
        rows: with `Shifted(gradients=True)`: {module name: how much an error in each
            output matters}, as in `factorize_weighted`.

    Returns:
        The copy; `report(copy)` says what was changed and what was left.

    Raises:
        ValueError: a name the model does not have, a module that cannot be replaced, a
            rank that is not allowed, a moment that is missing or does not fit, a
            factorization of another weight, a weight that is not finite, a module that
            `sequential` never reaches. The message names the module.

    Warns:
        AboveBreakEvenWarning, BrokenTieWarning, FewTokensWarning,
        NothingReplacedWarning, LeftPaddingWarning: each says what to do.

    >>> from torch import nn
    >>> small = compress(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"0": 2})
    >>> small[0]
    LowRankLinear(in_features=8, rank=2, out_features=8, bias=True)
    """
    check_moments(moments)
    if sequential != (batches is not None):
        raise ValueError("sequential=True and batches go together; give both or none.")
    if sequential and not (moments is None and factorizations is None):
        raise ValueError("sequential=True collects its own moments; give none.")
    if layers is not None and not sequential:
        raise ValueError("layers says what sequential=True walks through; give both.")
    if shifted is not None and not sequential:
        raise ValueError("shifted goes with sequential=True and batches.")
    if (shifted is not None and shifted.gradients) != (rows is not None):
        raise ValueError("rows and Shifted(gradients=True) go together; give both.")
    with alone(model):  # another thread's calibration hangs hooks on it, changes modes
        for name, rank in ranks.items():
            check_module(model, ranks, name, rank)
        ranks = _one_name_each(model, ranks)
        if shifted is not None:
            check_linears(model, ranks)
        unfelt = [name for name in ranks if rows is not None and name not in rows]
        if unfelt:
            raise ValueError(
                f"rows lack {', '.join(unfelt)}; every module needs its own."
            )
        ties = broken_ties(model, ranks)
        small = copy.deepcopy(model)
    seen: Seen = {}
    if batches is not None:
        if shifted is None:
            seen = _compress_in_order(small, ranks, batches, layers)
        else:
            told = shifted, dict(rows or {})
            seen = _compress_shifted(model, small, ranks, batches, layers, *told)
    else:
        given = dict(factorizations or {})
        for name, rank in progress.bar(ranks.items(), desc="compress"):
            module = small.get_submodule(name)
            found = given.get(name) or factorize_module(module, name, moments)
            made_of = found.weight_sha256
            if made_of and made_of != _weight_sha256(module):
                raise ValueError(
                    f"{name}: the factorization is of another weight, and the model "
                    "would get that one; make it anew, factorize_modules(model, names)."
                )
            replace_module(small, name, rank, found)
            source = input_name(model.get_submodule(name), name)
            if moments is not None and source in moments:
                seen[name] = moments[source].count, moments[source].dim
    settle(model, small, ties)
    warn_above_break_even(small, ranks)
    warn_few_tokens(seen)
    if not ranks:
        warn(
            "no module was given a rank: the copy is the dense model. Give ranks such "
            "as {name: rank}; drone.encoder_linears(model) lists the names.",
            NothingReplacedWarning,
        )
    return small


def settle(model: nn.Module, small: nn.Module, ties: Mapping[str, str]) -> None:
    """Give a copy whose modules were replaced the model's modes, and note its ties.

    Warns:
        BrokenTieWarning: see `broken_ties`.
    """
    with alone(model):  # its modes are its own where nobody calibrates it
        for name, module in small.named_modules():  # new ones were made in eval mode
            module.training = model.get_submodule(name).training
    for name, other in ties.items():
        thin = small.get_submodule(name)
        if isinstance(thin, LowRankLinear):
            thin.tied_to = other
    remember_ranks(small)
    warn_ties(ties)


def check_module(
    model: nn.Module, ranks: Mapping[str, int], name: str, rank: int
) -> None:
    """Refuse a module that cannot be replaced, or not at this rank, or twice.

    Raises:
        ValueError: as `compress`.
    """
    module = module_named(model, name)
    check_weights_are_here(module, name)
    _check_replaceable(model, name)
    if is_linear(module):
        check_rank(rank, min(as_linear(module).weight.shape), where=name)
        return
    names = attention_names(module)
    if names is None:
        kind = type(module)
        raise ValueError(
            f"{name} is a {kind.__name__} of {kind.__module__}; a Linear or a self-"
            f"attention block of transformers ({', '.join(ATTENTION)}) is needed."
        )
    parts = f"{name}.{names.query}", f"{name}.{names.key}"
    for part in parts:
        _check_replaceable(model, part)
    query, _ = _named_projections(module, name)
    check_rank(rank, query.out_features // attention_heads(module), where=name)
    for part in parts:
        if part in ranks:
            raise ValueError(f"{part} has a rank, and so has its block; give one.")


def _check_replaceable(model: nn.Module, name: str) -> None:
    reason = why_not(model, name)
    if reason is not None:
        raise ValueError(f"{name}: {reason}.")


def _named_projections(block: nn.Module, name: str) -> tuple[nn.Linear, nn.Linear]:
    try:
        return query_and_key(block)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _one_name_each(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Keep one name of each module: replaced once, it is replaced everywhere.

    Raises:
        ValueError: two names of one module have two ranks.
    """
    first: dict[nn.Module, str] = {}
    kept: dict[str, int] = {}
    for name, rank in ranks.items():
        other = first.setdefault(module_named(model, name), name)
        if ranks[other] != rank:
            raise ValueError(
                f"{other} and {name} are one module, and have ranks {ranks[other]} and "
                f"{rank}; give one."
            )
        kept[other] = rank
    return kept


def broken_ties(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, str]:
    """Name the replaced Linears whose weight another module has too, and that one.

    Of several that are replaced, the first is as good as alone: its factors take the
    place of the one weight there was.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim == 2:
                owners.setdefault(id(parameter), []).append((name, module))
    replaced: dict[nn.Module, str] = {module_named(model, n): n for n in ranks}
    ties: dict[str, str] = {}
    for owner in owners.values():
        kept = [name for name, module in owner if module not in replaced]
        thin = [replaced[module] for _, module in owner if module in replaced]
        partner = kept[0] if kept else thin[0] if thin else ""
        ties |= {name: partner for name in thin if name != partner}
    return ties


def factorize_module(
    module: nn.Module, name: str, moments: Mapping[str, SecondMoment] | None
) -> Factorization | AttentionFactorization:
    """Decompose a Linear, or the query-key product of a block; name it in errors."""
    source = input_name(module, name)
    if moments is not None and source not in moments and name in moments:
        source = name  # calibrated by the block's own name: the same inputs
    if moments is not None and source not in moments:
        raise ValueError(f"{name}: there is no moment for {source}; calibrate it too.")
    moment = None if moments is None else moments[source]
    try:
        if is_linear(module):
            return factorize(as_linear(module).weight, moment)
        query, key = query_and_key(module)
        return factorize_attention(query, key, attention_heads(module), moment)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _weight_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of what `factorize_module` decomposes."""
    if is_linear(module):
        return tensors_sha256({"weight": as_linear(module).weight})
    query, key = query_and_key(module)
    return tensors_sha256(nn.ModuleList([query, key]).state_dict())


def replace_module(
    small: nn.Module,
    name: str,
    rank: int,
    found: Factorization | AttentionFactorization,
) -> None:
    """Put the low-rank module in the dense one's place, wherever that stands.

    transformers hangs hooks on modules to collect attentions and hidden states when
    first asked for them: they go on with the new module. `check_module` has refused
    any others.
    """
    dense = module_named(small, name)
    new: nn.Module
    try:
        if is_linear(dense) and isinstance(found, Factorization):
            new = LowRankLinear.from_linear(dense, rank, found)
        elif isinstance(found, AttentionFactorization):
            new = LowRankSelfAttention.from_attention(dense, rank, found)
        else:
            raise ValueError(f"a {type(found).__name__} does not fit this module.")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    put_module(small, name, new)


def put_module(small: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in a dense one's place, with its hooks and the bias it shares."""
    dense = module_named(small, name)
    if isinstance(new, LowRankLinear):
        bias = dense.bias
        if isinstance(bias, nn.Parameter) and _is_shared(small, bias):
            new.bias = bias  # BERT's decoder shares it with the head; it still does
    new._forward_hooks.update(dense._forward_hooks)
    swap(small, name, new)


def _is_shared(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether several modules have this parameter."""
    every = [p for module in model.modules() for p in module._parameters.values()]
    return sum(p is parameter for p in every) > 1


def _compress_in_order(
    small: nn.Module,
    ranks: Mapping[str, int],
    batches: Iterable[Mapping[str, Any]],
    layers: str | Iterable[str] | None,
) -> Seen:
    """Replace modules in the order they run, each for the inputs it then gets.

    Returns:
        {module name: how many tokens it saw and inputs it has}.
    """
    seen: Seen = {}
    with frozen(small):
        walk = Walk(small, batches, ranks, layers)
        warn_of_any_left_pads(small, walk.batches)
        for _ in progress.bar(walk.layers, desc="compress in order"):
            for group in walk.groups():
                moments = walk.moments(group)
                for name in group:
                    module = small.get_submodule(name)
                    found = factorize_module(module, name, moments)
                    replace_module(small, name, ranks[name], found)
                    (moment,) = set(moments.values())
                    seen[name] = moment.count, moment.dim
            walk.advance()
    return seen


def _compress_shifted(
    model: nn.Module,
    small: nn.Module,
    ranks: Mapping[str, int],
    batches: Iterable[Mapping[str, Any]],
    layers: str | Iterable[str] | None,
    shifted: Shifted,
    rows: Mapping[str, SecondMoment],
) -> Seen:
    """Replace modules in order, each for the inputs it gets and the outputs it had.

    Returns:
        {module name: how many tokens it saw and inputs it has}.
    """
    seen: Seen = {}
    kept = list(batches)  # two models read them
    with alone(model), frozen(model), frozen(small):
        warn_of_any_left_pads(model, prepared(kept, model))
        before, now = Walk(model, kept, ranks, layers), Walk(small, kept, ranks, layers)
        for _ in progress.bar(now.layers, desc="compress in order"):
            before.groups()  # learns which modules are called once, as in the copy
            for group in now.groups():
                pairs = paired_moment(before, now, group)
                for name in group:
                    how = pairs, shifted, rows.get(name)
                    found = factorize_module_shifted(now, name, *how)
                    replace_module(small, name, ranks[name], found)
                    seen[name] = pairs.count, pairs.dim // 2
            before.advance()
            now.advance()
    return seen
