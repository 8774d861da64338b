"""The dense model beside its compressed copy: what a layer had, what it gets now."""

import torch

from drone.layers.linear import as_linear
from drone.math.factorize import Factorization
from drone.math.moments import SecondMoment
from drone.math.shifted import factorize_shifted
from drone.model.family import Shifted
from drone.model.walk import Walk


def paired_moment(before: Walk, now: Walk, group: list[str]) -> SecondMoment:
    """Sum, over all tokens, the moment of (x, x') of modules with one input.

    Args:
        before: a walk through the dense model.
        now: a walk through its copy, standing in front of the same layer.
        group: of `groups()` of both.

    Returns:
        A moment of dimension 2·in, as `factorize_shifted` takes it.

    Raises:
        ValueError: NaN or Inf in an input. The message names module and batch.
    """
    pairs: SecondMoment | None = None
    steps = zip(before.inputs(group), now.inputs(group), strict=True)
    for number, (had, gets) in enumerate(steps):
        for (x, counts, times), (shifted, _, _) in zip(had, gets, strict=True):
            both = torch.cat([x, shifted], dim=-1)
            if pairs is None:
                pairs = SecondMoment(both.shape[-1])
            try:
                for _ in range(times):
                    pairs.update(both, counts)
            except ValueError as error:
                raise ValueError(f"{group[0]}, batch {number}: {error}") from error
    assert pairs is not None  # a group is of modules that are reached
    return pairs


def factorize_module_shifted(
    now: Walk,
    name: str,
    pairs: SecondMoment,
    relative: Shifted,
    rows: SecondMoment | None,
) -> Factorization:
    """Decompose a Linear for its shifted inputs; name it in errors."""
    linear = as_linear(now.model.get_submodule(name))
    shift = pairs, relative.anchor, relative.ridge
    try:
        return factorize_shifted(linear.weight, *shift, rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
