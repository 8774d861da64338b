"""Whether two passes through a model gave the same."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Relative distance of what the walk gives from what the model gives. The operations
# are the same; what lies between two layers and is forgotten changes far more.
PROOF = 1e-4


def equal(a: Any, b: Any) -> bool:
    """Whether two arguments, or nests of them, are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a is b:
            return True
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        # A mask holds -inf, or the lowest number, whose square is no number: replace.
        x, y = (t.double().clamp(-1e9, 1e9) for t in (a, b))
        return bool((x - y).norm() <= PROOF * y.norm())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return a is b or (isinstance(a, str | int | float | bool) and a == b)


def results(output: Any) -> list[Tensor]:
    """Return the tensors a model returns, without those of each of its layers."""
    if isinstance(output, Mapping):
        output = list(output.values())
    elif not isinstance(output, tuple | list):
        output = [output]
    return [each for each in output if isinstance(each, Tensor)]
