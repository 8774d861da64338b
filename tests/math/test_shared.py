"""A shared basis against alternating least squares, and against one layer's own."""

import pytest
import torch
from torch import Tensor

from drone.math.factorize import factorize
from drone.math.shared import factorize_shared

OUTS, INTO = (6, 4, 5), 5


def drawn() -> tuple[list[Tensor], list[Tensor]]:
    """Three weights, and the moments of their inputs."""
    torch.manual_seed(0)
    weights = [torch.randn(out, INTO).double() for out in OUTS]
    inputs = [torch.randn(INTO, 30).double() * torch.rand(INTO, 1) for _ in OUTS]
    return weights, [x @ x.T for x in inputs]


def cost(weights: list[Tensor], made: list[Tensor], second: Tensor) -> float:
    pairs = zip(weights, made, strict=True)
    return sum(float(torch.trace((w - m) @ second @ (w - m).T)) for w, m in pairs)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_basis_is_better_for_all(rank: int) -> None:
    weights, moments = drawn()
    total = torch.stack(moments).sum(0)
    root = torch.linalg.cholesky(total)
    made = []
    found = factorize_shared(weights, moments)
    for each in found:
        left, right = each.truncate(rank)
        made.append(left @ right)
    ours = cost(weights, made, total)
    wanted = torch.cat(weights) @ root
    best = float("inf")
    for _ in range(5):
        b = torch.randn(rank, INTO).double()
        for _ in range(100):
            a = wanted @ torch.linalg.pinv(b)
            b = torch.linalg.pinv(a) @ wanted
        best = min(best, float((wanted - a @ b).square().sum()))
    assert ours == pytest.approx(best, rel=1e-6)
    assert ours == pytest.approx(sum(float(f.errors[rank]) ** 2 for f in found))


def test_errors_are_each_layers_own() -> None:
    weights, moments = drawn()
    root = torch.linalg.cholesky(torch.stack(moments).sum(0))
    for weight, found in zip(weights, factorize_shared(weights, moments), strict=True):
        for rank in range(found.max_rank + 1):
            made = found.left[:, :rank] @ found.right[:rank]
            error = ((weight - made) @ root).norm()
            assert torch.isclose(found.errors[rank], error, atol=1e-9)


def test_one_layer_alone_is_drone_and_no_moment_is_svd() -> None:
    weights, moments = drawn()
    for moment in (moments[0], None):
        (found,) = factorize_shared(weights[:1], None if moment is None else [moment])
        plain = factorize(weights[0], moment)
        ours, theirs = found.truncate(2), plain.truncate(2)
        assert torch.allclose(ours[0] @ ours[1], theirs[0] @ theirs[1])
        assert torch.allclose(found.errors, plain.errors, atol=1e-7)


def test_what_does_not_fit_is_refused() -> None:
    weights, moments = drawn()
    for bad, given in [
        ([], None),
        (weights, moments[:1]),
        ([weights[0], weights[1].T], None),
    ]:
        with pytest.raises(ValueError, match="at least one weight"):
            factorize_shared(bad, given)
