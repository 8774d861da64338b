"""One decomposition, every rank optimal: the mathematics, checked from outside."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drone import break_even_rank, factorize

sizes = st.integers(1, 400)
small = st.integers(1, 8)
seeds = st.integers(0, 10_000)


def gaussian(out: int, into: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, into, generator=generator, dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(size, size, seed)).Q


def tails(matrix: np.ndarray) -> list[float]:
    """Norms of the singular values beyond k, by NumPy; hypot does not overflow."""
    sigma = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return [math.hypot(*sigma[k:]) for k in range(len(sigma) + 1)]


def assert_errors(weight: Tensor) -> None:
    """`errors` are the singular tails, and what multiplying out measures."""
    found = factorize(weight)
    expected = tails(weight.double().numpy())
    slack = 1e-12 * expected[0]
    np.testing.assert_allclose(found.errors.numpy(), expected, rtol=1e-10, atol=slack)
    for k in range(found.max_rank + 1):
        rest = weight.double() - found.left[:, :k] @ found.right[:k]
        measured = math.hypot(*rest.flatten().tolist())
        assert measured == pytest.approx(expected[k], rel=1e-10, abs=slack)


# --- break-even ------------------------------------------------------------------


@given(sizes, sizes)
def test_break_even_is_the_largest_rank_that_multiplies_less(
    out: int, into: int
) -> None:
    cheaper = [k for k in range(out * into + 1) if k * (out + into) < out * into]
    assert break_even_rank(out, into) == cheaper[-1]


def test_break_even_of_known_layers() -> None:
    assert break_even_rank(768, 768) == 383  # 384 · 1536 = 768²: no gain
    assert break_even_rank(3072, 768) == 614
    assert break_even_rank(1, 5) == 0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (-1, 3)])
def test_break_even_refuses_sizes_below_one(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        break_even_rank(*shape)


# --- errors ----------------------------------------------------------------------


@given(small, small, seeds)
def test_errors_are_the_singular_tails_and_the_measured_errors(
    out: int, into: int, seed: int
) -> None:
    assert_errors(gaussian(out, into, seed))


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (40, 24), (24, 40)])
def test_errors_for_thin_and_for_larger_matrices(shape: tuple[int, int]) -> None:
    assert_errors(gaussian(*shape))


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e-3, 1e3, 1e6, 1e150])
def test_errors_at_any_scale(scale: float) -> None:
    assert_errors(scale * gaussian(9, 6))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_errors_are_exact_for_each_dtype(dtype: torch.dtype) -> None:
    assert_errors(gaussian(9, 6).to(dtype))


def test_float32_is_not_decomposed_in_float32() -> None:
    sigma = torch.tensor([1.0, 1e-10])
    weight = torch.diag(sigma)  # float32 would see 1e-10 as noise next to 1
    rotated = torch.tensor([[0.6, -0.8], [0.8, 0.6]]) @ weight
    assert factorize(rotated).errors[1] == pytest.approx(
        np.linalg.svd(rotated.double().numpy())[1][1], rel=1e-5
    )


def test_a_weight_that_needs_gradients_is_decomposed_without_them() -> None:
    found = factorize(gaussian(4, 3).requires_grad_())
    assert not found.left.requires_grad and not found.right.requires_grad


def test_rank_deficient_weight_has_no_error_from_its_rank_on() -> None:
    weight = gaussian(9, 2) @ gaussian(2, 7, seed=1)
    errors = factorize(weight).errors
    assert errors[1] > 0.01 * errors[0]
    assert (errors[2:] <= 1e-14 * errors[0]).all()
    assert_errors(weight)


def test_zero_matrix_has_no_error_at_any_rank() -> None:
    found = factorize(torch.zeros(4, 3))
    assert torch.equal(found.errors, torch.zeros(4, dtype=torch.float64))
    left, right = found.truncate(2)
    assert torch.equal(left @ right, torch.zeros(4, 3))


@given(small, small, seeds, st.sampled_from([1e-150, 1e-6, 1.0, 1e6, 1e150]))
def test_errors_never_rise_and_end_at_exactly_zero(
    out: int, into: int, seed: int, scale: float
) -> None:
    errors = factorize(scale * gaussian(out, into, seed)).errors
    assert len(errors) == min(out, into) + 1
    assert (errors.diff() <= 0).all()
    assert errors[-1] == 0


# --- the optimum -----------------------------------------------------------------


@given(st.integers(2, 8), st.integers(2, 8), seeds, st.data())
def test_no_competitor_of_the_same_rank_is_nearer(
    out: int, into: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(out, into) - 1))
    weight = gaussian(out, into, seed).numpy()
    best = factorize(torch.from_numpy(weight)).errors[rank].item()
    right = gaussian(rank, into, seed + 1).numpy()
    for _ in range(20):  # alternating least squares, from a random start
        left = np.linalg.lstsq(right.T, weight.T, rcond=None)[0].T
        assert np.linalg.norm(weight - left @ right) >= best * (1 - 1e-9)
        right = np.linalg.lstsq(left, weight, rcond=None)[0]
        assert np.linalg.norm(weight - left @ right) >= best * (1 - 1e-9)


def test_the_truncation_is_no_worse_than_its_small_changes() -> None:
    weight = gaussian(8, 6)
    left, right = factorize(weight).truncate(3)
    best = (weight - left @ right).norm()
    for seed in range(50):
        near = left + 1e-3 * gaussian(8, 3, seed)
        assert (weight - near @ right).norm() > best


@given(small, small, seeds)
def test_orthogonal_changes_leave_errors_alone_and_turn_the_truncation(
    out: int, into: int, seed: int
) -> None:
    weight = gaussian(out, into, seed)
    p, q = orthogonal(out, seed + 1), orthogonal(into, seed + 2)
    plain, turned = factorize(weight), factorize(p @ weight @ q)
    torch.testing.assert_close(turned.errors, plain.errors, rtol=1e-10, atol=1e-12)
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)
    for k in range(1, plain.max_rank):
        if sigma[k - 1] > 1.05 * sigma[k]:  # else the optimum is not unique
            left, right = plain.truncate(k)
            other_left, other_right = turned.truncate(k)
            torch.testing.assert_close(
                other_left @ other_right, p @ left @ right @ q, rtol=0, atol=1e-8
            )


@given(small, small, seeds, st.floats(1e-6, 1e6), st.sampled_from([-1, 1]))
def test_errors_scale_with_the_weight(
    out: int, into: int, seed: int, factor: float, sign: int
) -> None:
    weight = gaussian(out, into, seed)
    scaled = factorize(sign * factor * weight).errors / factor
    torch.testing.assert_close(
        scaled, factorize(weight).errors, rtol=1e-9, atol=1e-12 * len(scaled)
    )


def test_left_is_orthonormal_and_right_is_sorted() -> None:
    found = factorize(gaussian(7, 5))
    torch.testing.assert_close(
        found.left.T @ found.left, torch.eye(5, dtype=torch.float64)
    )
    norms = found.right.norm(dim=1)
    assert (norms.diff() <= 0).all()


# --- truncate --------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncate_gives_contiguous_factors_of_the_weights_dtype(
    dtype: torch.dtype, rank: int
) -> None:
    left, right = factorize(gaussian(7, 5).to(dtype)).truncate(rank)
    assert (left.shape, right.shape) == ((7, rank), (rank, 5))
    assert left.dtype == right.dtype == dtype
    assert left.is_contiguous() and right.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 5e-3), (torch.bfloat16, 4e-2), (torch.float32, 1e-5)],
)
def test_full_rank_gives_the_weight_back_up_to_rounding(
    dtype: torch.dtype, tolerance: float
) -> None:
    weight = gaussian(7, 5).to(dtype)
    left, right = factorize(weight).truncate(5)
    back = left.double() @ right.double()
    torch.testing.assert_close(back, weight.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [0, -1, 6, True, 2.0, "2", None])
def test_truncate_refuses_a_rank_that_is_not_allowed(rank: object) -> None:
    with pytest.raises(ValueError, match=r"allowed are integers 1 to 5"):
        factorize(gaussian(7, 5)).truncate(rank)  # type: ignore[arg-type]


# --- what is refused -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3), (3, 0)])
def test_what_is_not_a_non_empty_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(out, in\) is needed"):
        factorize(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_dtype_that_is_not_floating_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="floating"):
        factorize(torch.ones(3, 2, dtype=dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(value: float) -> None:
    weight = torch.ones(3, 2)
    weight[1, 1] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        factorize(weight)
