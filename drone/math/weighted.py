"""The problem a whole family solves: outputs weighted on the left, inputs on the right.

    min over Ŵ of rank k of ‖A (W − Ŵ) X‖_F

With A = I it is DRONE's (Theorem 2); with X orthonormal and A diagonal, FWSVD's; with X
diagonal, ASVD's. Substitute N = A Ŵ: the nearest N of rank k to A W on the inputs X is
U_k U_kᵀ A W, U_k the top k left singular vectors of A W X (`factorize`). N lies in the
range of A, so Ŵ = A⁺ N reaches it. Only A is inverted, never X. Chapter 10.
"""

import torch
from torch import Tensor

from drone.math.factorize import (
    Factorization,
    checked_moment,
    checked_weight,
    factorize,
    largest_first,
)
from drone.math.moments import SecondMoment


def factorize_weighted(
    weight: Tensor,
    moment: SecondMoment | Tensor | None = None,
    rows: SecondMoment | Tensor | None = None,
) -> Factorization:
    """Decompose a weight so that truncation minimises ‖A (W − Ŵ) X‖_F, AᵀA = `rows`.

    Args:
        weight: W, (out, in).
        moment: C = X Xᵀ of the inputs, as in `factorize`; None: all directions alike.
        rows: L = AᵀA, how much an error in each output matters: (out,) for each output
            by itself, not negative; (out, out) symmetric, positive semidefinite, or a
            moment of vectors of the outputs' size, say of the loss's gradients; None:
            all alike, which is `factorize`.

    Returns:
        A `Factorization` with r = min(out, in), whose `errors` are ‖A (W − Ŵ_k) X‖_F.
        Outputs that do not matter at all get zero.

    Raises:
        ValueError: as `factorize`; rows that do not fit, are negative or not finite.

    >>> weight = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> best = factorize_weighted(weight, rows=torch.tensor([1.0, 9.0]))
    >>> left, right = best.truncate(1)
    >>> (left @ right).tolist()  # the second output matters more, though it is smaller
    [[0.0, 0.0], [0.0, 2.0]]
    """
    if rows is None:
        return factorize(weight, moment)
    matrix = checked_weight(weight)
    root, inverse = _root(rows, matrix)
    best = factorize(root @ matrix, moment)  # A W: (out, in)
    return Factorization(
        (inverse, *best.left_parts), best.right_parts, best.errors, weight.dtype
    )


def _root(rows: SecondMoment | Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return A = L^½ and A⁺, both (out, out) float64, on the weight's device."""
    out = len(weight)
    if isinstance(rows, Tensor) and rows.ndim == 1:
        if rows.shape != (out,) or not rows.isfinite().all() or (rows < 0).any():
            raise ValueError(
                f"rows have shape {tuple(rows.shape)} and values from "
                f"{float(rows.min()):.3g}; ({out},) finite numbers from 0 are needed."
            )
        values, vectors = (
            rows.double().to(weight.device),
            torch.eye(out, dtype=torch.float64, device=weight.device),
        )
    else:
        second = checked_moment(rows, weight.T)  # of vectors as long as an output
        values, vectors = largest_first(second)
        if values[-1] < -1e-6 * values[0].abs():
            raise ValueError(
                f"rows have an eigenvalue of {float(values[-1]):.3g}; a sum of g gᵀ "
                "has none below 0."
            )
    # Eigenvalues that are rounding count as 0, as in a pseudo-inverse.
    least = out * torch.finfo(torch.float64).eps * values.max()
    scale = values.clamp_min(0).sqrt() * (values > least)
    inverse = torch.where(
        scale > 0, 1 / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0
    )
    return vectors * scale @ vectors.T, vectors * inverse @ vectors.T
