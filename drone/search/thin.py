"""Thin modules and whole thin models of random numbers, to be timed."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from drone.layers.attention import (
    LowRankSelfAttention,
    attention_heads,
    query_and_key,
)
from drone.layers.linear import LowRankLinear, as_linear, is_linear
from drone.math.attention import AttentionFactorization
from drone.model.adapters import module_named, swap


def thin_module(module: nn.Module, rank: int) -> nn.Module:
    """Make a module of this rank to be timed, where the dense one is."""
    draw = torch.Generator().manual_seed(rank)  # the caller's random state is kept
    if is_linear(module):
        module = as_linear(module)
        weight = module.weight
        # of about the size of what comes in, so that a whole pass does not overflow
        left = torch.randn(weight.shape[0], rank, generator=draw) / rank**0.5
        right = torch.randn(rank, weight.shape[1], generator=draw)
        left, right = left.to(weight), (right / weight.shape[1] ** 0.5).to(weight)
        return LowRankLinear(left, right, module.bias).eval()
    query, _ = query_and_key(module)
    rows, dim = query.weight.shape
    heads = attention_heads(module)
    factor = torch.randn(heads, rows // heads, dim + 1, generator=draw).double() / dim
    errors = torch.zeros(heads, rows // heads + 1, dtype=torch.float64)
    found = AttentionFactorization(factor, factor, errors, query.weight.dtype)
    return LowRankSelfAttention.from_attention(module, rank, found)


def thin_model(
    model: nn.Module, ranks: Mapping[str, int]
) -> tuple[nn.Module, list[str]]:
    """Return a copy with random factors of these ranks, to be timed, and what is thin.

    Blocks come first, for a thin block takes over the values it holds. Queries and keys
    of a block that is thin are thin with it and left out; of several names of one
    module the first counts. What stays dense shares its numbers with the model.

    Args:
        model: whose modules are dense.
        ranks: {module name: rank}.

    Raises:
        ValueError: a name the model does not have, a module that cannot be thin.

    >>> small, put = thin_model(nn.Sequential(nn.Linear(8, 4)), {"0": 2})
    >>> put, tuple(small(torch.ones(3, 8)).shape)
    (['0'], (3, 4))
    """
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, kept)
    modules: dict[nn.Module, str] = {}
    for name in ranks:
        modules.setdefault(module_named(model, name), name)
    blocks = [module for module in modules if not is_linear(module)]
    inside = {part for block in blocks for part in query_and_key(block)}
    linears = [m for m in modules if is_linear(m) and m not in inside]
    put = [modules[module] for module in blocks + linears]
    for name in put:
        dense = small.get_submodule(name)
        new = thin_module(dense, ranks[name])
        new._forward_hooks.update(dense._forward_hooks)  # others may watch it
        swap(small, name, new)
    small.eval()
    return small, put
