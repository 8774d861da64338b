"""Inputs that have shifted: the layers below are compressed, outputs as before.

    min over Ŵ of rank k of ‖W T − Ŵ X'‖_F,   T = a X + (1 − a) X'

X are the inputs a layer had in the dense model, X' those it gets now. The best Ŵ of any
rank is a regression, B = W T X'ᵀ (X'X'ᵀ)⁺. What it leaves is orthogonal to all of X',
so that ‖W T − Ŵ X'‖² = ‖W T − B X'‖² + ‖(B − Ŵ) X'‖², and the second term is DRONE's
problem for the weight B (`factorize`). With a = 0, or where nothing has shifted, B = W
and it is DRONE's itself. Outputs may count differently, ‖A (W T − Ŵ X')‖: a regression
is one for each output by itself, so B stays, and the second term becomes
‖A (B − Ŵ) X'‖² (`factorize_weighted`). Chapter 10.
"""

from dataclasses import replace

import torch
from torch import Tensor

from drone.math.factorize import (
    MAX_CONDITION,
    Factorization,
    checked_weight,
    largest_first,
)
from drone.math.moments import SecondMoment
from drone.math.weighted import factorize_weighted


def factorize_shifted(
    weight: Tensor,
    pairs: SecondMoment,
    anchor: float = 1.0,
    ridge: float = 0.0,
    rows: SecondMoment | Tensor | None = None,
) -> Factorization:
    """Decompose a weight for shifted inputs and (nearly) original outputs.

    Args:
        weight: W, (out, in).
        pairs: of vectors (x, x') one after the other, dim 2·in: a token's input in the
            dense model, then the same token's input now.
        anchor: a, from 0 (the outputs W would now give) to 1 (those it gave).
        ridge: relative to the mean square of an input: λ = ridge · tr(X'X'ᵀ) / in. As
            if `in` more tokens had been seen, √λ in one input each, and not shifted.
            Few tokens do not suffice to learn a regression of `in` inputs.
        rows: AᵀA, how much an error in each output matters, as in
            `factorize_weighted`; None: all alike.

    Returns:
        A `Factorization` whose `errors` are (‖W T − Ŵ_k X'‖² + λ ‖W − Ŵ_k‖²)^½, both
        of A times what stands there. They need not fall to 0: what has shifted may be
        lost.

    Raises:
        ValueError: as `factorize_weighted`; pairs of another size; an anchor outside
            [0, 1] or a ridge below 0.

    >>> x = torch.randn(50, 3, dtype=torch.float64)
    >>> pairs = SecondMoment(6)
    >>> pairs.update(torch.cat([x, x / 2], dim=1))  # every input has become half
    >>> weight = torch.eye(3, dtype=torch.float64)
    >>> left, right = factorize_shifted(weight, pairs).truncate(3)
    >>> torch.allclose(left @ right, 2 * weight)  # so the weight becomes twice
    True
    """
    matrix = checked_weight(weight)
    size = matrix.shape[1]
    check_shift(anchor, ridge)
    if pairs.dim != 2 * size:
        raise ValueError(
            f"the pairs have dimension {pairs.dim}; {2 * size} is needed, (x, x') of a "
            f"weight with {size} inputs."
        )
    if pairs.count == 0:
        raise ValueError("the moment has seen no vector; calibrate first.")
    both = pairs.matrix.to(matrix.device)
    now = both[size:, size:]  # X'X'ᵀ, (in, in)
    extra = ridge * now.trace() / size * torch.eye(size).to(now)
    now = now + extra
    then, cross = both[:size, :size] + extra, both[:size, size:] + extra  # XXᵀ, XX'ᵀ
    mixed = anchor * cross + (1 - anchor) * now  # T X'ᵀ
    # B = W + W (T X'ᵀ − X'X'ᵀ)(X'X'ᵀ)⁺: directions that X' never took keep W.
    change = _divided(mixed - now, now, ridge)
    best = matrix + matrix @ change
    # ‖W T − B X'‖² with T − (I + change) X' = a (X − X') − change X'.
    shift = then - cross - cross.T + now  # Σ (x − x')(x − x')ᵀ
    other = (cross - now) @ change.T  # (X − X') (change X')ᵀ
    left_over = anchor**2 * shift - anchor * (other + other.T) + change @ now @ change.T
    found = factorize_weighted(best, now, rows)
    lost = (_felt(matrix, rows) * (matrix @ left_over)).sum().clamp_min(0)
    errors = (found.errors.square() + lost).sqrt()
    return replace(found, errors=errors, dtype=weight.dtype)


def _felt(weight: Tensor, rows: SecondMoment | Tensor | None) -> Tensor:
    """AᵀA W, so that ‖A W S‖² = Σ (AᵀA W) ∘ (W S Sᵀ) needs no root."""
    if rows is None:
        return weight
    if isinstance(rows, SecondMoment):
        rows = rows.matrix
    rows = rows.to(weight)
    return rows[:, None] * weight if rows.ndim == 1 else rows @ weight


def check_shift(anchor: float, ridge: float) -> None:
    """Refuse an anchor outside [0, 1] and a ridge below 0.

    Raises:
        ValueError: one of them is.
    """
    if not 0 <= anchor <= 1 or not 0 <= ridge < float("inf"):
        raise ValueError(
            f"anchor is {anchor} and ridge {ridge}; 0 to 1, and a number from 0, are "
            "allowed."
        )


def _divided(matrix: Tensor, symmetric: Tensor, ridge: float) -> Tensor:
    """M C⁺, C with its ridge."""
    size = len(symmetric)
    # With a ridge C's condition number is below in / ridge: where float64 leaves half
    # of its digits Cholesky is precise, in a fraction of the time.
    if ridge * MAX_CONDITION**2 > size and symmetric.trace() > 0:
        lower = torch.linalg.cholesky(symmetric)
        return torch.cholesky_solve(matrix.T, lower).T
    values, vectors = largest_first(symmetric)
    # Eigenvalues that are rounding count as 0, whatever the scale of C is.
    kept = values > size * torch.finfo(values.dtype).eps * values[0]
    return matrix @ vectors[:, kept] / values[kept] @ vectors[:, kept].T
