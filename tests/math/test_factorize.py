"""One decomposition, every rank optimal: the mathematics, checked from outside."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drone import Factorization, SecondMoment, break_even_rank, factorize, theorem1
from drone.math import moments
from drone.math.factorize import output_moment

sizes = st.integers(1, 400)
small = st.integers(1, 8)
seeds = st.integers(0, 10_000)


def gaussian(out: int, into: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, into, generator=generator, dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(size, size, seed)).Q


def with_spectrum(out: int, into: int, last: float, seed: int = 0) -> Tensor:
    """Singular values from 1 down to `last`, evenly on a logarithmic scale."""
    r = min(out, into)
    sigma = torch.logspace(0, math.log10(last), r, dtype=torch.float64)
    u, v = orthogonal(out, seed)[:, :r], orthogonal(into, seed + 1)[:, :r]
    return u * sigma @ v.T


def of_rank(out: int, into: int, rank: int) -> Tensor:
    return gaussian(out, rank) @ gaussian(rank, into, seed=1)


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


# --- with data: the optimum --------------------------------------------------------

# (in, N) for a number of inputs: what layers see, and what breaks a careless form.
INPUTS: dict[str, Callable[[int], Tensor]] = {
    "full rank": lambda n: gaussian(n, n + 30, 2),
    "spectrum 1 to 1e-4": lambda n: with_spectrum(n, n + 30, 1e-4),
    "rank deficient": lambda n: of_rank(n, n + 30, -(-n // 3)),
    "few tokens": lambda n: gaussian(n, -(-n // 2), 2),
    "mean shifted": lambda n: gaussian(n, n + 30, 2) + 10 * gaussian(n, 1),
    "times 1e-6": lambda n: 1e-6 * gaussian(n, n + 30, 2),
    "times 1e6": lambda n: 1e6 * gaussian(n, n + 30, 2),
    "tokens repeated": lambda n: gaussian(n, n // 2 + 1, 2).repeat(1, 3),
    "an input always 0": lambda n: (
        gaussian(n, n + 30, 2) * (torch.arange(n) > 0)[:, None]
    ),
}
SHAPES = [(24, 16), (16, 24), (20, 20), (1, 9), (9, 1)]
LARGE = [(250, 40), (40, 250), (210, 200)]  # above a block on either side or on both
# The moment holds squares: what is below √ε = 1.5e-8 of the largest output is rounding.
ROOT_EPS = 5e-8

inputs = pytest.mark.parametrize("kind", INPUTS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def moment_of(x: Tensor) -> SecondMoment:
    moment = SecondMoment(len(x))
    moment.update(x.T)
    return moment


def optimum(weight: Tensor, x: Tensor) -> np.ndarray:
    """‖WX − (WX)_k‖_F for k = 0..min(out, in), by NumPy."""
    found = tails((weight.double() @ x).numpy())
    ranks = min(weight.shape) + 1
    return np.array((found + [0.0] * ranks)[:ranks])


def measured(weight: Tensor, found: Factorization, x: Tensor) -> np.ndarray:
    """‖(W − left_k right_k) X‖_F for every k, multiplied out one rank at a time."""
    rest, left, thin = weight.double() @ x, found.left, found.right @ x
    norms = [float(rest.norm())]
    for k in range(found.max_rank):
        rest = rest - torch.outer(left[:, k], thin[k])
        norms.append(float(rest.norm()))
    return np.array(norms)


def assert_optimal(weight: Tensor, x: Tensor, slack: float = 1e-12) -> None:
    """No rank errs by more than the optimum, and `errors` say what each errs by.

    `slack` is a share of ‖WX‖, for optima that are 0 but for rounding.
    """
    found = factorize(weight, moment_of(x))
    best, got = optimum(weight, x), measured(weight, found, x)
    assert (got <= best * (1 + 1e-6) + slack * best[0]).all()
    np.testing.assert_allclose(found.errors, got, rtol=1e-6, atol=ROOT_EPS * best[0])
    gram = found.left.T @ found.left
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-8)


@inputs
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_every_rank_is_optimal_for_the_inputs(
    shape: tuple[int, int], kind: str
) -> None:
    assert_optimal(gaussian(*shape).float(), INPUTS[kind](shape[1]))


@inputs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_rank_is_optimal_for_weights_of_half_precision(
    dtype: torch.dtype, kind: str
) -> None:
    assert_optimal(gaussian(24, 16).to(dtype), INPUTS[kind](16))


def takes_cholesky(weight: Tensor) -> bool:
    """Whether the basis of a tall weight's columns is the weight itself, times R⁻¹."""
    found = factorize(weight, torch.eye(weight.shape[1]))
    return torch.equal(found.left_parts[0], weight.double())


@inputs
@pytest.mark.parametrize(
    ("weight", "cholesky"),
    [
        (gaussian(24, 16), True),
        (with_spectrum(24, 16, 1e-3), True),
        (with_spectrum(24, 16, 1e-6), False),
        (with_spectrum(24, 16, 1e-10), False),
        (of_rank(24, 16, 8), False),
        (torch.zeros(24, 16), False),
    ],
    ids=["ordinary", "to 1e-3", "to 1e-6", "to 1e-10", "of rank 8", "zero"],
)
def test_tall_weights_are_exact_however_ill_conditioned(
    weight: Tensor, cholesky: bool, kind: str
) -> None:
    assert takes_cholesky(weight) is cholesky
    assert_optimal(weight, INPUTS[kind](16), ROOT_EPS)


@inputs
@pytest.mark.parametrize("shape", [(16, 24), (20, 20)], ids=str)
def test_wide_weights_are_exact_however_ill_conditioned(
    shape: tuple[int, int], kind: str
) -> None:
    for weight in (with_spectrum(*shape, last=1e-10), of_rank(*shape, rank=8)):
        assert_optimal(weight, INPUTS[kind](shape[1]), ROOT_EPS)


def test_inputs_that_are_all_zero_leave_no_error() -> None:
    found = factorize(gaussian(4, 3), moment_of(torch.zeros(3, 5)))
    assert torch.equal(found.errors, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(found.energy, torch.ones(4, dtype=torch.float64))
    assert found.left.isfinite().all() and found.right.isfinite().all()


# --- with data: properties ---------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight and the inputs it sees: W (out, in) and X (in, N)."""
    out, into, tokens = draw(small), draw(small), draw(st.integers(1, 12))
    seed = draw(seeds)
    return gaussian(out, into, seed), gaussian(into, tokens, seed + 1)


@given(layers())
def test_errors_fall_to_zero_and_energy_rises_from_0_to_1(
    layer: tuple[Tensor, Tensor],
) -> None:
    weight, x = layer
    found = factorize(weight, moment_of(x))
    assert len(found.errors) == len(found.energy) == min(weight.shape) + 1
    assert (found.errors.diff() <= 0).all() and found.errors[-1] == 0
    assert found.energy[0] == 0 and found.energy[-1] == 1
    assert (found.energy.diff() >= 0).all()
    expected = 1 - (found.errors / found.errors[0]) ** 2
    torch.testing.assert_close(found.energy, expected)


@given(layers())
def test_it_is_never_above_plain_svd_on_its_own_inputs(
    layer: tuple[Tensor, Tensor],
) -> None:
    weight, x = layer
    plain = measured(weight, factorize(weight), x)
    aware = measured(weight, factorize(weight, moment_of(x)), x)
    assert (aware <= plain + 1e-12 * plain[0]).all()


@given(layers(), seeds)
def test_orthogonal_changes_of_outputs_tokens_or_inputs_leave_errors_alone(
    layer: tuple[Tensor, Tensor], seed: int
) -> None:
    weight, x = layer
    p, q = orthogonal(len(weight), seed), orthogonal(len(x), seed + 1)
    turn = orthogonal(x.shape[1], seed + 2)
    errors = factorize(weight, moment_of(x)).errors
    for turned in (
        factorize(p @ weight, moment_of(x)),
        factorize(weight, moment_of(x @ turn)),
        factorize(weight @ q.T, moment_of(q @ x)),
    ):
        slack = ROOT_EPS * float(errors[0])
        torch.testing.assert_close(turned.errors, errors, rtol=1e-6, atol=slack)


@given(layers(), st.floats(1e-6, 1e6), st.sampled_from([-1, 1]))
def test_errors_scale_with_the_inputs(
    layer: tuple[Tensor, Tensor], factor: float, sign: int
) -> None:
    weight, x = layer
    errors = factorize(weight, moment_of(x)).errors
    scaled = factorize(weight, moment_of(sign * factor * x)).errors / factor
    slack = ROOT_EPS * float(errors[0])
    torch.testing.assert_close(scaled, errors, rtol=1e-6, atol=slack)


@given(layers())
def test_inputs_of_every_direction_alike_give_plain_svd(
    layer: tuple[Tensor, Tensor],
) -> None:
    weight, _ = layer
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    found, plain = factorize(weight, identity), factorize(weight)
    slack = ROOT_EPS * float(plain.errors[0])
    torch.testing.assert_close(found.errors, plain.errors, rtol=1e-6, atol=slack)


def test_a_moment_and_its_matrix_are_the_same() -> None:
    weight, moment = gaussian(7, 5), moment_of(gaussian(5, 30))
    for a, b in zip(
        factorize(weight, moment).truncate(3),
        factorize(weight, moment.matrix).truncate(3),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("out", [5, 7, 200, 300])
@pytest.mark.parametrize("into", [1, moments.BLOCK - 1, moments.BLOCK, 400])
def test_the_moment_of_the_outputs_is_that_of_w_x(out: int, into: int) -> None:
    weight, x = gaussian(out, into), gaussian(into, 30, 1)
    second = x @ x.T
    for start in range(0, into, moments.BLOCK):  # above the blocks nothing is read
        second[start : start + moments.BLOCK, start + moments.BLOCK :] = torch.nan
    outputs = (weight @ x).numpy()
    expected = outputs @ outputs.T
    slack = 1e-13 * float(np.linalg.norm(expected))
    found = output_moment(weight, second)
    np.testing.assert_allclose(found, expected, rtol=0, atol=slack)


# --- with data: truncate -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_truncated_factors_share_nothing_and_are_of_the_weights_dtype(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = gaussian(*shape).to(dtype)
    moment = moment_of(gaussian(shape[1], 30))
    found, untouched = factorize(weight, moment), weight.clone()
    full = min(shape)
    pairs = [found.truncate(rank) for rank in (2, full, full)]
    for (left, right), rank in zip(pairs, (2, full, full), strict=True):
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        for factor in (left, right):
            assert factor.dtype == dtype and factor.device == weight.device
            assert factor.is_contiguous()
    factors = [factor for pair in pairs for factor in pair]
    kept = [weight, moment.matrix, *found.left_parts, *found.right_parts]
    storages = {t.untyped_storage().data_ptr() for t in factors}
    assert len(storages) == len(factors)
    assert not storages & {t.untyped_storage().data_ptr() for t in kept}
    assert torch.equal(weight, untouched)


def test_a_factor_too_large_for_float16_is_refused() -> None:
    weight = torch.full((4, 4), 6e4, dtype=torch.float16)
    moment = moment_of(gaussian(4, 30))
    for found in (factorize(weight), factorize(weight, moment)):
        with pytest.raises(ValueError, match=r"1\.2e\+05, which torch\.float16 cannot"):
            found.truncate(1)
    assert factorize(weight.bfloat16(), moment).truncate(1)[1].isfinite().all()


# --- with data: what is refused ----------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [torch.eye(7), torch.ones(5), torch.ones(5, 9), torch.ones(0, 0), SecondMoment(7)],
    ids=["of the outputs", "a vector", "inputs", "empty", "other size"],
)
def test_a_moment_that_does_not_fit_is_refused(moment: Tensor | SecondMoment) -> None:
    if isinstance(moment, SecondMoment):
        moment.update(torch.ones(1, moment.dim))
    with pytest.raises(ValueError, match=r"\(5, 5\) is needed"):
        factorize(gaussian(7, 5), moment)


def test_a_moment_that_is_not_symmetric_is_refused() -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        factorize(gaussian(7, 5), gaussian(5, 5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_moment_with_nan_or_inf_is_refused(value: float) -> None:
    moment = torch.eye(5)
    moment[2, 2] = value
    with pytest.raises(ValueError, match="the moment has NaN or Inf"):
        factorize(gaussian(7, 5), moment)


def test_a_moment_of_no_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate first"):
        factorize(gaussian(7, 5), SecondMoment(5))


# --- the paper's form --------------------------------------------------------------


@inputs
@shapes
def test_theorem_1_is_optimal_at_every_rank(shape: tuple[int, int], kind: str) -> None:
    x = INPUTS[kind](shape[1])
    weights = [gaussian(*shape)]
    weights += [with_spectrum(*shape, last=1e-10), of_rank(*shape, -(-min(shape) // 2))]
    for weight in weights:
        best = optimum(weight, x)
        for k in range(1, min(*shape, x.shape[1]) + 1):
            error = float((weight @ x - weight @ theorem1(weight, x, k) @ x).norm())
            assert error <= best[k] * (1 + 1e-9) + 1e-12 * best[0]


@pytest.mark.parametrize("tokens", [8, 40])
@shapes
def test_theorem_1_equals_factorize_on_the_inputs(
    shape: tuple[int, int], tokens: int
) -> None:
    weight, x = gaussian(*shape), gaussian(shape[1], tokens, 1)
    found = factorize(weight, moment_of(x))
    sigma = np.linalg.svd((weight @ x).numpy(), compute_uv=False)
    for k in range(1, min(*shape, tokens)):
        assert sigma[k - 1] > 1.001 * sigma[k]  # else the optimum is not unique
        left, right = found.truncate(k)
        mine, paper = left @ right @ x, weight @ theorem1(weight, x, k) @ x
        torch.testing.assert_close(paper, mine, rtol=0, atol=1e-8)


def test_theorem_1_sends_unseen_directions_to_zero_and_factorize_does_not() -> None:
    weight, x = gaussian(24, 16), gaussian(16, 6, 1)
    unseen = torch.linalg.qr(x, mode="complete").Q[:, 6:]
    assert (theorem1(weight, x, 4) @ unseen).norm() < 1e-12
    left, right = factorize(weight, moment_of(x)).truncate(4)
    assert (left @ right @ unseen).norm() > 0.1 * (weight @ unseen).norm()


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (4, 4), (6, 5), (8, 5)])
def test_theorem_1_has_the_rank_asked_for_or_that_of_w_x(
    rank: int, expected: int
) -> None:
    weight, x = gaussian(12, 8), of_rank(8, 30, 5)
    assert torch.linalg.matrix_rank(theorem1(weight, x, rank)) == expected


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_cutoff_is_a_share_of_the_largest_singular_value(scale: float) -> None:
    weight, x = gaussian(9, 6), with_spectrum(6, 40, 1e-5)
    u = torch.linalg.svd(x).U
    for cutoff, kept in [(1e-7, 6), (3e-4, 4), (0.05, 2)]:  # 1, 0.1, ..., 1e-5
        best = theorem1(scale * weight, scale * x, 6, cutoff)
        sizes = (best @ u).norm(dim=0)
        assert (sizes[:kept] > 0.1).all() and (sizes[kept:] < 1e-9).all()


def test_theorem_1_cuts_small_singular_values_of_the_weight_too() -> None:
    weight, x = with_spectrum(9, 6, 1e-5), gaussian(6, 40)
    assert torch.linalg.matrix_rank(theorem1(weight, x, 6)) == 6
    assert torch.linalg.matrix_rank(theorem1(weight, x, 6, cutoff=3e-4)) == 4


def test_theorem_1_of_inputs_that_are_all_zero_is_zero() -> None:
    assert not theorem1(gaussian(4, 3), torch.zeros(3, 5), 2).any()


@pytest.mark.parametrize("rank", [0, -1, 5, True, 2.0])
def test_theorem_1_refuses_a_rank_that_is_not_allowed(rank: object) -> None:
    with pytest.raises(ValueError, match="integers 1 to 4"):
        theorem1(gaussian(7, 5), gaussian(5, 4), rank)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "x", "message"),
    [
        (torch.ones(7, 5), torch.ones(9, 5), r"inputs have shape \(9, 5\); \(5, N\)"),
        (torch.ones(7, 5), torch.ones(5), r"the inputs: .* \(in, N\) is needed"),
        (torch.ones(7, 5), torch.ones(5, 0), r"the inputs: .* \(in, N\) is needed"),
        (torch.ones(7), torch.ones(5, 9), r"the weight: .* \(out, in\) is needed"),
        (torch.ones(7, 5), torch.full((5, 9), torch.nan), "the inputs: NaN or Inf"),
        (torch.full((7, 5), torch.inf), torch.ones(5, 9), "the weight: NaN or Inf"),
    ],
)
def test_theorem_1_refuses_what_does_not_fit(
    weight: Tensor, x: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        theorem1(weight, x, 1)
