"""Moment files: sums that no vectors have are refused by the moment's name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drone import SecondMoment, load_moments, save_moments
from drone.model.moment_files import FORMAT_VERSION

Tensors = dict[str, Tensor]


def moment_of(x: Tensor) -> SecondMoment:
    moment = SecondMoment(x.shape[-1])
    moment.update(x)
    return moment


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "moments.safetensors"
    save_moments({"layer.query": moment_of(torch.randn(9, 4) + 3)}, path)
    return path


def change(path: Path, **parts: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(path)
    for part, made in parts.items():
        tensors[f"layer.query/{part}"] = made(tensors[f"layer.query/{part}"])
    save_file(tensors, path, {"drone_moments": str(FORMAT_VERSION)})


def asymmetric(c: Tensor) -> Tensor:
    c[0, 1] += 1
    return c


def indefinite(c: Tensor) -> Tensor:
    return c - torch.eye(4) * c.trace()


def without_spread(c: Tensor) -> Tensor:
    return c / 4  # below n μ μᵀ: no nine vectors have this and the total


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"matrix": asymmetric}, "not symmetric"),
        ({"matrix": indefinite}, "an eigenvalue is negative"),
        ({"matrix": without_spread}, "an eigenvalue is negative"),
        ({"matrix": lambda c: -c}, "an eigenvalue is negative"),
        ({"matrix": lambda c: c * float("nan")}, "NaN or Inf in its matrix"),
        ({"total": lambda t: t * float("inf")}, "NaN or Inf in its total"),
        ({"matrix": lambda c: c.float()}, r"matrix of torch\.float32; float64"),
        ({"total": lambda t: t.long()}, r"total of torch\.int64; float64"),
        ({"total": lambda t: t[:, None].clone()}, r"total of shape \(4, 1\)"),
        ({"total": lambda t: t[:3].clone()}, r"matrix of shape \(4, 4\); 3 rows"),
        ({"count": lambda n: -n}, "count of -9"),
        ({"count": lambda n: n.double()}, r"count of 9\.0 \(torch\.float64\)"),
        ({"count": lambda n: n.expand(2).clone()}, r"count of \[9, 9\]"),
        ({"count": lambda n: n * 0}, "seen no vector, but"),
        ({"count": lambda n: n * 0 + 1}, "an eigenvalue is negative"),
    ],
)
def test_sums_that_no_vectors_have_are_refused(
    saved: Path, parts: dict[str, Callable[[Tensor], Tensor]], message: str
) -> None:
    change(saved, **parts)
    with pytest.raises(ValueError, match=rf"{saved.name}: layer\.query .*{message}"):
        load_moments(saved)


def test_a_tensor_that_is_no_part_of_a_moment_is_named(saved: Path) -> None:
    tensors = load_file(saved) | {"layer.query/mean": torch.ones(4)}
    save_file(tensors, saved, {"drone_moments": str(FORMAT_VERSION)})
    with pytest.raises(ValueError, match=r"'layer\.query/mean' is no part"):
        load_moments(saved)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("tokens", [1, 3, 1000])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_what_vectors_have_is_read(
    tmp_path: Path, scale: float, tokens: int, shift: float
) -> None:
    """Rank-deficient sums, one vector, all vectors alike, a mean beyond the spread."""
    x = (torch.randn(tokens, 200) + shift).double() * scale
    written = {"x": moment_of(x), "same": moment_of(x[:1].expand(7, -1))}
    written["none"] = SecondMoment(3)
    save_moments(written, str(tmp_path / "file"))
    found = load_moments(str(tmp_path / "file"))
    for name, moment in written.items():
        assert torch.equal(found[name].matrix, moment.matrix)
        assert found[name].count == moment.count
