"""The best rank-k replacement of a matrix, every k from one decomposition."""

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from drone.devices import double
from drone.math.moments import BLOCK, SecondMoment, add_gram

# Above it, Cholesky's Q would be orthogonal to less than eps · 1e4² ≈ 2e-8.
MAX_CONDITION = 1e4


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
        left_parts: matrices, float64, whose product is `left`, (out, r). Only the
            columns one asks for are ever multiplied out.
        right_parts: the same for `right`, (r, in), and its rows.
        errors: (r + 1,) float64, ‖(W − Ŵ_k) X‖_F for k = 0..r, falling to 0; without
            data, ‖W − Ŵ_k‖_F. The unit is that of an output, summed over all tokens.
        dtype: of the weight that was factorized, given back by `truncate`.
        weight_sha256: of the weight, if `factorize_modules` made it; else "".
    """

    left_parts: tuple[Tensor, ...]
    right_parts: tuple[Tensor, ...]
    errors: Tensor
    dtype: torch.dtype
    weight_sha256: str = ""

    @property
    def max_rank(self) -> int:
        """The largest rank there is, r = min(out, in)."""
        return len(self.errors) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.left_parts[0].shape[0], self.right_parts[-1].shape[1]

    @property
    def left(self) -> Tensor:
        """U, (out, r) float64, orthonormal columns, most important first."""
        return self._factors(self.max_rank)[0]

    @property
    def right(self) -> Tensor:
        """UᵀW, (r, in) float64."""
        return self._factors(self.max_rank)[1]

    @property
    def energy(self) -> Tensor:
        """(r + 1,) float64, the share of Σ ‖W x‖² that each rank keeps: 0 to 1.

        All 1 where there is nothing to keep.
        """
        total = self.errors[0]
        if total == 0:
            return torch.ones_like(self.errors)
        return 1 - (self.errors / total).square()

    def truncate(self, rank: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (left (out, rank), right (rank, in)), their product Ŵ_rank.

        Args:
            rank: from 1 to `max_rank`.
            like: a tensor whose dtype and device both take; None: the dtype of the
                weight that was factorized, on the device where that was done.

        Raises:
            ValueError: `rank` is not an integer from 1 to `max_rank`, or a factor does
                not fit into that dtype (float16 ends at 65,504).
        """
        check_rank(rank, self.max_rank)
        left, right = self._factors(rank)
        like = left.new_empty(0, dtype=self.dtype) if like is None else like
        return cast(left, like), cast(right, like)

    def _factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Multiply out the first `rank` columns of U and rows of UᵀW, in float64."""
        *before, last = self.left_parts
        first, *after = self.right_parts
        left, right = last[:, :rank], first[:rank]
        for part in reversed(before):
            left = part @ left
        for part in after:
            right = right @ part
        return left, right


def cast(factor: Tensor, like: Tensor) -> Tensor:
    """Return a copy in another tensor's dtype and on its device, laid out plainly.

    A copy even when nothing has to change: no two layers share a factor.

    Raises:
        ValueError: a number is beyond that dtype's range; a cast makes it infinite.
    """
    new = factor.to(like.dtype)
    if not new.isfinite().all():
        raise ValueError(
            f"a factor reaches {float(factor.abs().max()):.3g}, which {like.dtype} "
            "cannot hold; give factorize the weight in float32 or bfloat16."
        )
    new = new.to(like.device)
    return new.clone(memory_format=torch.contiguous_format)


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


def factorize(
    weight: Tensor, moment: SecondMoment | Tensor | None = None
) -> Factorization:
    """Decompose a weight so that truncation at any rank is optimal for its inputs.

    Ŵ_k = U_k U_kᵀ W with U_k the top k left singular vectors of W X is an exact
    minimiser of ‖WX − ŴX‖_F over all Ŵ of rank k: it keeps the leading principal
    components of the outputs. Its error is the norm of the singular values of W X that
    were cut (Eckart-Young). The U_k are the eigenvectors of W C Wᵀ, so only C = X Xᵀ
    is needed of the data, and nothing is inverted. Computed in float64, at the size of
    the smaller side of W. Chapter 2; the paper's form is `theorem1`.

    Args:
        weight: (out, in), any floating dtype, any device.
        moment: of the inputs, from `calibrate`; or C itself, (in, in), symmetric;
            None: every direction of the input counts alike, which is plain SVD.

    Returns:
        A `Factorization` with r = min(out, in).

    Raises:
        ValueError: `weight` is not a non-empty matrix of finite floating numbers, or
            the moment does not fit it, is empty, not finite or not symmetric.
    """
    matrix = checked_weight(weight)
    if moment is None:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        errors = tail_norms(sigma)
        return Factorization((left,), (sigma[:, None] * right,), errors, weight.dtype)
    second = checked_moment(moment, matrix)
    if matrix.shape[0] <= matrix.shape[1]:
        energy, vectors = largest_first(output_moment(matrix, second))
        left, right = (vectors,), (vectors.T, matrix)
    else:
        # W = Q R: the left singular vectors of W X are Q times those of R X.
        basis, change, triangle = _thin_qr(matrix)
        energy, vectors = largest_first(output_moment(triangle, second))
        left, right = (basis, change @ vectors), (vectors.T @ triangle,)
    errors = tail_norms(energy.clamp_min(0).sqrt())  # rounding leaves tiny negatives
    return Factorization(left, right, errors, weight.dtype)


def output_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """W C Wᵀ = Σ (Wx)(Wx)ᵀ, (out, out): the second moment of the outputs.

    C is symmetric, so C = T + Tᵀ with T lower triangular (half of the diagonal), and
    W C Wᵀ = W T Wᵀ + its transpose, at little more than half of the multiply-adds.

    Args:
        weight: (out, in) float64.
        moment: C, (in, in) float64; only the lower triangle of blocks is read.
    """
    columns = weight.T
    half = torch.empty_like(columns)  # T Wᵀ, (in, out)
    for start in range(0, len(moment), BLOCK):
        stop = start + BLOCK
        rows = moment[start:stop]
        half[start:stop] = rows[:, :start] @ columns[:start]
        half[start:stop] += rows[:, start:stop] @ columns[start:stop] / 2
    product = weight @ half  # W T Wᵀ, (out, out)
    return product + product.T


def theorem1(
    weight: Tensor, inputs: Tensor, rank: int, cutoff: float | None = None
) -> Tensor:
    """Return the paper's M*, (in, in): the best W M of rank k for these inputs.

    Theorem 1: with thin SVDs W = U_W S_W V_Wᵀ and X = U_X S_X V_Xᵀ, and Z_k the
    truncation of Z = S_W V_Wᵀ U_X S_X, M* = V_W S_W⁻¹ Z_k S_X⁻¹ U_Xᵀ. On the inputs it
    equals `factorize`; a direction they never took it sends to zero. It stores X and
    decomposes it again for every call, so it serves the derivation. Chapter 2.

    Args:
        weight: W, (out, in).
        inputs: X, (in, N), one column a token; on any device.
        rank: k, from 1 to min(out, in, N).
        cutoff: singular values below `cutoff` times the largest count as zero; None:
            the larger side of the matrix times the precision of float64.

    Raises:
        ValueError: a shape or a rank that does not fit, or a number that is not finite.
    """
    matrix = checked_weight(weight)
    tokens = checked_weight(inputs, "the inputs", "(in, N)").to(matrix.device)
    if tokens.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"the inputs have shape {tuple(inputs.shape)}; "
            f"({matrix.shape[1]}, N) is needed."
        )
    check_rank(rank, min(*matrix.shape, tokens.shape[1]))
    _, s_w, v_w = _kept_svd(matrix, cutoff)  # (r,), (r, in)
    u_x, s_x, _ = _kept_svd(tokens, cutoff)  # (in, t), (t,)
    z = s_w[:, None] * (v_w @ u_x) * s_x  # Z, (r, t)
    u_z, s_z, v_z = torch.linalg.svd(z, full_matrices=False)
    z_k = u_z[:, :rank] * s_z[:rank] @ v_z[:rank]
    best: Tensor = (v_w.T / s_w) @ (z_k / s_x) @ u_x.T
    return best


def checked_weight(
    weight: Tensor, what: str = "the weight", form: str = "(out, in)"
) -> Tensor:
    """Return a non-empty finite matrix in float64, or say what is wrong with it."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"{what}: shape {tuple(weight.shape)}; {form} is needed, at least 1 × 1."
        )
    if not weight.is_floating_point():
        raise ValueError(f"{what}: {weight.dtype}; a floating dtype is needed.")
    matrix = double(weight)
    if not matrix.sum().isfinite():  # NaN and Inf survive a sum; one pass, no copy
        raise ValueError(f"{what}: NaN or Inf; finite numbers are needed.")
    return matrix


def checked_moment(moment: SecondMoment | Tensor, weight: Tensor) -> Tensor:
    """Return C, (in, in) float64, on the weight's device, if it fits the weight."""
    size = weight.shape[1]
    if isinstance(moment, SecondMoment):
        if moment.count == 0:
            raise ValueError("the moment has seen no vector; calibrate first.")
        second = moment.matrix
    else:
        second = double(moment)
    if second.shape != (size, size):
        raise ValueError(
            f"the moment has shape {tuple(second.shape)}; ({size}, {size}) is needed, "
            f"for a weight with {size} inputs."
        )
    # Unequal by more than rounding: not Σ x xᵀ, perhaps X itself.
    if not isinstance(moment, SecondMoment):
        uneven = (second - second.T).abs().max()
        if uneven > 1e-6 * second.abs().max():
            raise ValueError("the moment is not symmetric; Σ x xᵀ is needed.")
    if not second.sum().isfinite():
        raise ValueError("the moment has NaN or Inf; finite numbers are needed.")
    return second.to(weight.device)


def largest_first(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (n, n), the largest first."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0), vectors.flip(1)


def _thin_qr(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W = Q R, R (in, in) upper triangular, as (basis, change, R): Q = basis @ change.

    Cholesky of WᵀW = RᵀR gives R and Q = W R⁻¹ in a third of the time Householder's
    QR takes, and Q itself need not be formed. But Q is orthogonal only to
    eps · cond(W)², so an ill-conditioned weight goes through Householder's.
    """
    gram = tall.new_zeros(tall.shape[1], tall.shape[1])
    add_gram(gram, tall)
    lower, failed = torch.linalg.cholesky_ex(gram)  # reads the lower triangle only
    identity = torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    condition = lower.norm() * inverse.norm()  # an upper bound of cond(W)
    if failed or not condition < MAX_CONDITION:  # NaN goes to the sure way too
        q, r = torch.linalg.qr(tall)
        return q, identity, r
    return tall, inverse.T, lower.T


def _kept_svd(matrix: Tensor, cutoff: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD without the singular values that count as zero: a pseudo-inverse's."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    if cutoff is None:
        cutoff = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    kept = sigma > cutoff * sigma[0]
    return left[:, kept], sigma[kept], right[kept]


def tail_norms(sigma: Tensor) -> Tensor:
    """(Σ_{i>k} σ_i²)^½ for k = 0..r, summed from the small end."""
    # Divided by σ₁ first: the squares of a tiny or huge matrix would leave float64.
    scale = sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny)
    squares = (sigma / scale).square().flip(0).cumsum(0).flip(0)
    return scale * torch.cat([squares, squares.new_zeros(1)]).sqrt()
