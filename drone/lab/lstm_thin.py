"""Thin weights for an LSTM language model: which matrices, at which share, by what."""

import torch
from torch import Tensor, nn

from drone.lab.lstm_step import Parts
from drone.layers.linear import LowRankLinear
from drone.math.embedding import factorize_embedding
from drone.math.factorize import Factorization, break_even_rank, factorize
from drone.math.moments import SecondMoment
from drone.search.costs import grid_ranks

METHODS = ("SVD", "data-aware")
EMBEDDING = "embedding.weight"
# What is made thin together. Data-aware means for the embedding: its words counted.
ALONE = ("embedding", "input", "recurrent", "decoder")
KINDS = (*ALONE, "products", "but recurrent", "all")


def names_of(kind: str, parts: Parts) -> list[str]:
    """Name the weights of a kind, one of `KINDS`; `products` are all but the embedding.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; there are {', '.join(KINDS)}.")
    products = [
        name for name in parts if name.endswith(".weight") and name != EMBEDDING
    ]
    if kind == "embedding":
        return [EMBEDDING]
    if kind == "products":
        return products
    if kind == "all":
        return [EMBEDDING, *products]
    if kind == "but recurrent":
        return [name for name in products if ".recurrent." not in name]
    return [name for name in products if f".{kind}." in name]


def factorize_all(
    parts: Parts, moments: dict[str, SecondMoment], counts: Tensor, method: str
) -> dict[str, Factorization]:
    """Decompose every matrix once; any rank can be taken from it.

    Args:
        parts: dense weights.
        moments: {module's name: of its inputs}, from `drone.calibrate`.
        counts: (words,), of the training text, for the embedding.
        method: one of `METHODS`.
    """
    found = {}
    for name in names_of("all", parts):
        (weight,) = parts[name]
        if name == EMBEDDING:
            counted = counts if method == "data-aware" else None
            found[name] = factorize_embedding(weight, counted)
        elif method == "data-aware":
            found[name] = factorize(weight, moments[name.removesuffix(".weight")])
        else:
            # Inputs of which every direction counts alike: plain SVD, by eigenvectors
            # of the smaller side, which a GPU finds in a tenth of the time of an SVD
            same = torch.eye(weight.shape[1], dtype=torch.float64)
            found[name] = factorize(weight, same.to(weight.device))
    return found


def rank_at(weight: Tensor, share: float) -> int:
    """Return the rank at a share of break-even, in multiples of 8 as a search has."""
    return grid_ranks(break_even_rank(*weight.shape), [share])[-1]


def thinned(
    parts: Parts, found: dict[str, Factorization], kind: str, share: float
) -> Parts:
    """Replace the weights of a kind by two thin ones; the others stay, not copied."""
    new = dict(parts)
    for name in names_of(kind, parts):
        new[name] = found[name].truncate(rank_at(parts[name][0], share))
    return new


def weights_of(parts: Parts) -> dict[str, int]:
    """Count the numbers in all matrices, and in those that multiply, a word each."""
    sizes = {n: sum(f.numel() for f in parts[n]) for n in names_of("all", parts)}
    total = sum(sizes.values())
    return {"parameters": total, "multiply_adds": total - sizes[EMBEDDING]}


def balanced(parts: Parts) -> Parts:
    """Share the singular values of each product out over both factors, by their roots.

    L is orthonormal as `factorize` makes it: with R = U S Vᵀ, L R = (L U √S)(√S Vᵀ).
    The same function; a step of training moves the product less wildly. Chapter 6.
    """
    new: Parts = {}
    for name, factors in parts.items():
        if len(factors) == 1:
            new[name] = (factors[0].clone(),)
            continue
        # The embedding has its orthonormal factor on the right: made general by QR
        left, right = (factor.double() for factor in factors)
        basis, triangle = torch.linalg.qr(left)
        u, s, vt = torch.linalg.svd(triangle @ right, full_matrices=False)
        roots = s.sqrt()
        new[name] = (
            (basis @ u * roots).to(factors[0].dtype),
            (roots[:, None] * vt).to(factors[0].dtype),
        )
    return new


def parts_of_plan(parts: Parts, modules: dict[str, nn.Module]) -> Parts:
    """Take over the thin products that a search found, `RankPlan.modules`.

    Raises:
        TypeError: one of them is no `LowRankLinear`.
    """
    new = dict(parts)
    for name, module in modules.items():
        if not isinstance(module, LowRankLinear):
            raise TypeError(
                f"{name} is a {type(module).__name__}; LowRankLinear needed."
            )
        device = parts[f"{name}.weight"][0].device
        new[f"{name}.weight"] = (
            module.left.detach().to(device),
            module.right.detach().to(device),
        )
    return new
