"""Shifted inputs against least squares from random starts, and DRONE's own form."""

import pytest
import torch
from torch import Tensor

from drone.math.factorize import factorize
from drone.math.moments import SecondMoment
from drone.math.shifted import factorize_shifted

OUT, INTO, TOKENS = 6, 5, 40


def drawn(tokens: int = TOKENS, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """W, X and X', columns tokens: the shift is a turn and some noise."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, INTO).double()
    x = torch.randn(INTO, tokens).double() * torch.tensor([[4.0], [3], [2], [1], [0.5]])
    turn = torch.eye(INTO).double() + 0.3 * torch.randn(INTO, INTO).double()
    return weight, scale * x, scale * (turn @ x + 0.2 * torch.randn_like(x))


def paired(x: Tensor, now: Tensor) -> SecondMoment:
    pairs = SecondMoment(2 * len(x))
    pairs.update(torch.cat([x, now]).T)
    return pairs


def searched(target: Tensor, now: Tensor, rank: int) -> float:
    """The least ‖target − A B X'‖ alternating least squares finds from 5 starts."""
    best = float("inf")
    for _ in range(5):
        b = torch.randn(rank, INTO).double()
        for _ in range(100):
            a = torch.linalg.lstsq((b @ now).T, target.T).solution.T
            b = torch.linalg.lstsq(a, target).solution @ torch.linalg.pinv(now)
        best = min(best, float((target - a @ b @ now).norm()))
    return best


@pytest.mark.parametrize("anchor", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_nobody_is_nearer_to_the_wanted_outputs(anchor: float, rank: int) -> None:
    weight, x, now = drawn()
    target = weight @ (anchor * x + (1 - anchor) * now)
    found = factorize_shifted(weight, paired(x, now), anchor)
    left, right = found.truncate(rank)
    error = float((target - left @ right @ now).norm())
    assert error == pytest.approx(float(found.errors[rank]), rel=1e-9)
    assert error == pytest.approx(searched(target, now, rank), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_outputs_may_count_differently(rank: int) -> None:
    """One output matters 25 times as much, another not at all, two go together."""
    weight, x, now = drawn()
    scale = torch.diag(torch.tensor([5.0, 1, 1, 2, 0, 1]).double())
    scale[1, 2] = scale[2, 1] = 0.7
    found = factorize_shifted(weight, paired(x, now), rows=scale.T @ scale)
    left, right = found.truncate(rank)
    error = float((scale @ (weight @ x - left @ right @ now)).norm())
    assert error == pytest.approx(float(found.errors[rank]), rel=1e-9)
    assert error == pytest.approx(searched(scale @ weight @ x, now, rank), rel=1e-6)
    alike = factorize_shifted(weight, paired(x, now)).truncate(rank)
    other = float((scale @ (weight @ x - alike[0] @ alike[1] @ now)).norm())
    assert error < 0.99 * other


def test_rows_are_a_vector_a_matrix_or_a_moment() -> None:
    weight, x, now = drawn()
    gradients = torch.diag(torch.tensor([5.0, 1, 1, 2, 0, 1]).double())
    felt = SecondMoment(OUT)
    felt.update(gradients)
    each = gradients.diagonal().square()
    pairs = paired(x, now)
    wanted = factorize_shifted(weight, pairs, rows=torch.diag(each))
    for rows in (each, felt):
        found = factorize_shifted(weight, pairs, rows=rows)
        assert torch.allclose(found.errors, wanted.errors)
    with pytest.raises(ValueError, match="rows have shape"):
        factorize_shifted(weight, pairs, rows=-each)


def test_full_rank_is_least_squares_and_loses_what_has_shifted() -> None:
    weight, x, now = drawn()
    found = factorize_shifted(weight, paired(x, now))
    solved = torch.linalg.lstsq(now.T, (weight @ x).T)
    left, right = found.truncate(INTO)
    assert torch.allclose(left @ right, solved.solution.T)
    lost = (weight @ x - solved.solution.T @ now).norm()
    assert float(found.errors[-1]) == pytest.approx(float(lost))
    assert lost > 0.1  # the test would say nothing of a shift that can be undone


def test_nothing_shifted_or_no_anchor_is_drone() -> None:
    weight, x, now = drawn()
    for made, inputs in [
        (factorize_shifted(weight, paired(x, x)), x),
        (factorize_shifted(weight, paired(x, now), anchor=0.0), now),
    ]:
        plain = factorize(weight, inputs @ inputs.T)
        assert torch.allclose(made.errors, plain.errors, atol=1e-6)
        for rank in (1, 4):
            ours, theirs = made.truncate(rank), plain.truncate(rank)
            assert torch.allclose(ours[0] @ ours[1], theirs[0] @ theirs[1])


def test_a_ridge_is_as_many_more_tokens() -> None:
    weight, x, now = drawn(tokens=7)
    ridge = 0.05
    more = (ridge * now.square().sum() / INTO).sqrt() * torch.eye(INTO).double()
    augmented = paired(torch.cat([x, more], 1), torch.cat([now, more], 1))
    with_ridge = factorize_shifted(weight, paired(x, now), ridge=ridge)
    by_tokens = factorize_shifted(weight, augmented)
    assert torch.allclose(with_ridge.errors, by_tokens.errors)
    for ours, theirs in zip(with_ridge.truncate(2), by_tokens.truncate(2), strict=True):
        assert torch.allclose(ours.abs(), theirs.abs())  # but for a sign


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_units_of_the_inputs_do_not_matter(scale: float) -> None:
    """Public code adds an absolute ridge, and breaks down at either end."""
    weight, x, now = drawn()
    small = factorize_shifted(weight, paired(x, now), ridge=1e-3)
    scaled = drawn(scale=scale)
    large = factorize_shifted(weight, paired(*scaled[1:]), ridge=1e-3)
    assert torch.allclose(scale * small.errors, large.errors)


def test_directions_nobody_took_keep_the_weight() -> None:
    """Three tokens in five dimensions: no crash, no noise, and W where none went."""
    weight, x, now = drawn(tokens=3)
    left, right = factorize_shifted(weight, paired(x, now)).truncate(INTO)
    assert torch.allclose(left @ right @ now, weight @ x)
    unseen = torch.linalg.svd(now).U[:, 3:]
    assert torch.allclose(left @ right @ unseen, weight @ unseen)


@pytest.mark.parametrize(
    ("anchor", "ridge"), [(1.1, 0.0), (-0.1, 0.0), (1.0, -1e-9), (1.0, float("nan"))]
)
def test_numbers_out_of_range_are_refused(anchor: float, ridge: float) -> None:
    weight, x, now = drawn()
    with pytest.raises(ValueError, match="anchor is"):
        factorize_shifted(weight, paired(x, now), anchor, ridge)


def test_pairs_that_do_not_fit_are_refused() -> None:
    weight, _, _ = drawn()
    with pytest.raises(ValueError, match="dimension 5; 10 is needed"):
        factorize_shifted(weight, SecondMoment(INTO))
    with pytest.raises(ValueError, match="seen no vector"):
        factorize_shifted(weight, SecondMoment(2 * INTO))
