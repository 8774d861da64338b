"""The family's problem against brute force, its special cases, awkward weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drone import SecondMoment, factorize
from drone.math.weighted import factorize_weighted


def case(out: int, into: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=draw, dtype=torch.float64)
    return weight, torch.randn(into, tokens, generator=draw, dtype=torch.float64)


def error(a: Tensor, weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((a @ (weight - other) @ x).norm())


@given(
    out=st.integers(1, 9),
    into=st.integers(1, 9),
    tokens=st.integers(1, 20),
    kept=st.integers(1, 9),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 5),
)
def test_it_reaches_eckart_and_youngs_bound(
    out: int, into: int, tokens: int, kept: int, scale: float, seed: int
) -> None:
    """None of rank k does better than the tail of A W X; L may be singular."""
    weight, x = case(out, into, tokens, seed)
    a = scale * torch.randn(min(kept, out), out, dtype=torch.float64)
    found = factorize_weighted(weight, x @ x.T, a.T @ a)
    sigma = torch.linalg.svdvals(a @ weight @ x)
    size = float(sigma.norm()) + 1e-300
    for rank in range(1, found.max_rank + 1):
        left, right = found.truncate(rank)
        reached = error(a, weight, left @ right, x)
        assert reached == pytest.approx(float(sigma[rank:].norm()), abs=2e-6 * size)
        assert reached == pytest.approx(float(found.errors[rank]), abs=2e-6 * size)


def test_a_vector_of_rows_is_the_diagonal_matrix() -> None:
    weight, x = case(5, 7, 30)
    rows = torch.tensor([1.0, 4.0, 0.0, 0.25, 100.0])
    one = factorize_weighted(weight, x @ x.T, rows)
    other = factorize_weighted(weight, x @ x.T, torch.diag(rows))
    for rank in (1, 3, 5):
        thin, again = one.truncate(rank), other.truncate(rank)
        assert torch.allclose(thin[0] @ thin[1], again[0] @ again[1], atol=1e-9)
    left, right = one.truncate(5)
    assert not (left @ right)[2].any()  # an output that does not matter gets zero
    assert torch.allclose((left @ right)[[0, 1, 3, 4]], weight[[0, 1, 3, 4]])


def test_equal_rows_change_nothing() -> None:
    weight, x = case(6, 4, 30)
    plain, same = factorize(weight, x @ x.T), factorize_weighted(weight, x @ x.T)
    scaled = factorize_weighted(weight, x @ x.T, torch.full((6,), 9.0))
    for rank in (1, 2, 4):
        expected = plain.left[:, :rank] @ plain.right[:rank]
        for found in (same, scaled):
            left, right = found.truncate(rank)
            assert torch.allclose(left @ right, expected, atol=1e-10)
    assert torch.allclose(scaled.errors, 3 * plain.errors)


def test_fwsvd_is_scaling_rows_svd_and_scaling_back() -> None:
    """Hsu et al. 2022, (5) and (6): W = D⁻¹ SVD_k(D W)."""
    weight, _ = case(6, 8, 1)
    fisher = torch.rand(6, dtype=torch.float64) + 0.1
    d = fisher.sqrt()[:, None]
    u, s, v = torch.linalg.svd(d * weight)
    left, right = factorize_weighted(weight, rows=fisher).truncate(2)
    expected = (u[:, :2] * s[:2]) @ v[:2] / d
    assert torch.allclose(left @ right, expected, atol=1e-10)


def test_svd_llms_whitening_ends_at_the_same_place() -> None:
    """SVD-LLM: S Sᵀ = X Xᵀ by Cholesky, SVD of W S, times S⁻¹."""
    weight, x = case(6, 8, 40)
    s = torch.linalg.cholesky(x @ x.T)
    u, sigma, v = torch.linalg.svd(weight @ s)
    whitened = torch.linalg.solve_triangular(
        s, (u[:, :3] * sigma[:3]) @ v[:3], upper=False, left=False
    )
    left, right = factorize(weight, x @ x.T).truncate(3)
    assert torch.allclose(left @ right, whitened, atol=1e-9)


def test_a_moment_of_gradients_may_be_given() -> None:
    weight, x = case(4, 5, 20)
    gradients = torch.randn(30, 4, dtype=torch.float64)
    moment = SecondMoment(4)
    moment.update(gradients)
    one = factorize_weighted(weight, x @ x.T, moment)
    other = factorize_weighted(weight, x @ x.T, gradients.T @ gradients)
    assert torch.allclose(one.errors, other.errors)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        (torch.tensor([1.0, -1.0]), "values from -1"),
        (torch.tensor([1.0, torch.nan]), "finite"),
        (torch.ones(3, 3), r"\(2, 2\) is needed"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue of -1"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
    ],
)
def test_rows_that_are_no_weights_are_refused(rows: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        factorize_weighted(torch.ones(2, 4), rows=rows)
