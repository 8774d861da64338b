"""The best rank-k replacement of a matrix, every k from one decomposition."""

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor


def break_even_rank(out_features: int, in_features: int) -> int:
    """Return the largest rank at which two thin layers multiply less than one dense.

    Dense: out·in multiply-adds a token. Rank k: k·(out + in). So the largest integer
    k with k·(out + in) < out·in. Chapter 1.

    Raises:
        ValueError: a size is below 1.
    """
    if out_features < 1 or in_features < 1:
        raise ValueError(f"sizes are {out_features} and {in_features}; at least 1.")
    return (out_features * in_features - 1) // (out_features + in_features)


@dataclass(frozen=True)
class Factorization:
    """W ≈ left[:, :k] @ right[:k] for every k at once. Made by `factorize`.

    Attributes:
        left: (out, r) float64, orthonormal columns U.
        right: (r, in) float64, the rows of UᵀW, most important first.
        errors: (r + 1,) float64, ‖W − Ŵ_k‖_F for k = 0..r; falls to 0.
        dtype: of the weight that was factorized, given back by `truncate`.
    """

    left: Tensor
    right: Tensor
    errors: Tensor
    dtype: torch.dtype

    @property
    def max_rank(self) -> int:
        """The largest rank there is, r = min(out, in)."""
        return self.right.shape[0]

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return (left (out, rank), right (rank, in)), their product Ŵ_rank.

        Both are in the weight's own dtype and on its device.

        Raises:
            ValueError: `rank` is not an integer from 1 to `max_rank`.
        """
        check_rank(rank, self.max_rank)
        left, right = self.left[:, :rank], self.right[:rank]
        # Copied even when nothing has to change: no two layers share a factor.
        plain = torch.contiguous_format
        return (
            left.to(self.dtype).clone(memory_format=plain),
            right.to(self.dtype).clone(memory_format=plain),
        )


def check_rank(rank: int, max_rank: int, where: str = "rank") -> None:
    """Refuse a rank outside 1..max_rank; `where` begins the message.

    Raises:
        ValueError: `rank` is not an integer from 1 to `max_rank`.
    """
    # Integral: a rank computed with numpy is as good as a Python int; True is not.
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    if not whole or not 1 <= rank <= max_rank:
        raise ValueError(
            f"{where}: the rank is {rank!r}; allowed are integers 1 to {max_rank}."
        )


def factorize(weight: Tensor) -> Factorization:
    """Decompose a weight so that truncation at any rank is optimal.

    Eckart-Young: with the SVD W = U Σ Vᵀ, the truncation U_k U_kᵀ W = U_k Σ_k V_kᵀ is
    the nearest rank-k matrix in the Frobenius norm, and its error is the norm of the
    singular values that were cut, (Σ_{i>k} σ_i²)^½. Computed in float64. Chapter 1.

    Args:
        weight: (out, in), any floating dtype, any device.

    Returns:
        A `Factorization` with r = min(out, in).

    Raises:
        ValueError: `weight` is not a non-empty matrix of finite floating numbers.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        shape = tuple(weight.shape)
        raise ValueError(f"the weight has shape {shape}; (out, in) is needed.")
    if not weight.is_floating_point():
        raise ValueError(f"the weight is {weight.dtype}; a floating dtype is needed.")
    matrix = weight.detach().double()
    if not matrix.isfinite().all():
        raise ValueError("the weight has NaN or Inf; finite numbers are needed.")
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return Factorization(left, sigma[:, None] * right, _tail_norms(sigma), weight.dtype)


def _tail_norms(sigma: Tensor) -> Tensor:
    """(Σ_{i>k} σ_i²)^½ for k = 0..r, summed from the small end."""
    # Divided by σ₁ first: the squares of a tiny or huge matrix would leave float64.
    scale = sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny)
    squares = (sigma / scale).square().flip(0).cumsum(0).flip(0)
    return scale * torch.cat([squares, squares.new_zeros(1)]).sqrt()
