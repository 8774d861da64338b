"""A thin table of word vectors: the best one for the words that occur."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from drone import LowRankEmbedding, factorize, factorize_embedding
from drone.layers.linear import parameters

seeds = st.integers(0, 10_000)


def gaussian(words: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(words, dim, generator=generator, dtype=torch.float64)


def drawn_counts(words: int, seed: int) -> Tensor:
    """Whole numbers from 0 to 4, a word in five never seen, one word seen for sure."""
    generator = torch.Generator().manual_seed(seed + 1)
    counts = torch.randint(5, (words,), generator=generator)
    counts[seed % words] = 3
    return counts


def tails(table: Tensor, counts: Tensor) -> np.ndarray:
    """Norms of the singular values beyond k of diag(√counts) E, by NumPy."""
    weighted = np.sqrt(counts.numpy().astype(np.float64))[:, None] * table.numpy()
    sigma = np.linalg.svd(weighted, compute_uv=False)
    return np.array([np.linalg.norm(sigma[k:]) for k in range(len(sigma) + 1)])


def weighted_error(table: Tensor, found: Tensor, counts: Tensor) -> float:
    """(Σ counts_v ‖e_v − ê_v‖²)^½, word by word."""
    squares = [
        float(count) * float((e - e_hat).square().sum())
        for e, e_hat, count in zip(table, found, counts, strict=True)
    ]
    return sum(squares) ** 0.5


# --- the optimum -----------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 12), seeds)
def test_the_weighted_error_is_the_least_there_is_at_every_rank(
    dim: int, more: int, seed: int
) -> None:
    words = dim + more
    table, counts = gaussian(words, dim, seed), drawn_counts(words, seed)
    best = tails(table, counts)  # Eckart-Young: no table of rank k has less
    found = factorize_embedding(table, counts)
    # Singular values come from eigenvalues: half of the digits are left of small ones.
    slack = 1e-6 * best[0]
    assert found.max_rank == dim and found.shape == (words, dim)
    np.testing.assert_allclose(found.errors.numpy(), best, rtol=0, atol=slack)
    for rank in range(1, dim + 1):
        left, right = found.truncate(rank)
        assert left.shape == (words, rank) and right.shape == (rank, dim)
        error = weighted_error(table, left @ right, counts)
        assert error == pytest.approx(best[rank], rel=1e-7, abs=slack)
        torch.testing.assert_close(right @ right.T, torch.eye(rank).double())


def test_frequent_words_are_met_better_than_by_plain_svd() -> None:
    table = gaussian(30, 6)
    counts = torch.arange(30, 0, -1) ** 3
    aware, plain = (
        torch.matmul(*factorize_embedding(table, c).truncate(2)) for c in (counts, None)
    )
    one, other = (weighted_error(table, each, counts) for each in (aware, plain))
    assert one < 0.99 * other
    ones = torch.ones(30)  # and where all words count alike, plain SVD is the best
    assert weighted_error(table, plain, ones) < weighted_error(table, aware, ones)


@pytest.mark.parametrize("shape", [(6, 6), (20, 5), (7, 1)])
def test_without_counts_it_is_plain_svd(shape: tuple[int, int]) -> None:
    table = gaussian(*shape)
    found, plain = factorize_embedding(table), factorize(table)
    slack = 1e-6 * float(plain.errors[0])
    torch.testing.assert_close(found.errors, plain.errors, rtol=0, atol=slack)
    for rank in range(1, found.max_rank + 1):
        torch.testing.assert_close(
            torch.matmul(*found.truncate(rank)),
            torch.matmul(*plain.truncate(rank)),
            rtol=0,
            atol=1e-8,
        )


@pytest.mark.parametrize("scale", [1e-6, 0.3, 7.0, 1e9])
def test_only_the_proportions_of_the_counts_matter(scale: float) -> None:
    table = gaussian(20, 5)
    counts = torch.arange(1, 21).double()
    one, other = (factorize_embedding(table, c) for c in (counts, scale * counts))
    torch.testing.assert_close(other.errors, one.errors * scale**0.5)
    for rank in range(1, 6):
        torch.testing.assert_close(
            torch.matmul(*other.truncate(rank)),
            torch.matmul(*one.truncate(rank)),
            rtol=0,
            atol=1e-8,
        )


def test_a_word_that_never_occurs_has_no_say() -> None:
    table, counts = gaussian(20, 5), drawn_counts(20, 0)
    other = table.clone()
    other[counts == 0] += 10
    assert (counts == 0).any()
    one, two = (factorize_embedding(t, counts) for t in (table, other))
    seen = counts > 0
    for rank in range(1, 6):
        torch.testing.assert_close(
            torch.matmul(*one.truncate(rank))[seen],
            torch.matmul(*two.truncate(rank))[seen],
            rtol=0,
            atol=1e-8,
        )


def test_counts_may_be_whole_numbers_as_bincount_gives_them() -> None:
    counts = torch.bincount(torch.tensor([0, 0, 3, 5]), minlength=6)
    whole, real = (
        factorize_embedding(gaussian(6, 3), each) for each in (counts, counts.double())
    )
    assert torch.equal(whole.errors, real.errors) and whole.errors[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_the_tables(dtype: torch.dtype) -> None:
    table = gaussian(9, 4).to(dtype)
    assert {part.dtype for part in factorize_embedding(table).truncate(2)} == {dtype}


# --- what is refused -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 5, 3)])
def test_a_table_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least as many words as dimensions"):
        factorize_embedding(torch.ones(shape))


@pytest.mark.parametrize(
    "counts",
    [
        torch.ones(5),
        torch.ones(6, 1),
        torch.zeros(6),
        torch.tensor([1, 1, 1, 1, 1, -1]),
    ],
    ids=["too few", "a matrix", "all 0", "below 0"],
)
def test_counts_that_do_not_fit_are_refused(counts: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(6,\) is needed, a number a word"):
        factorize_embedding(gaussian(6, 3), counts)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["table", "counts"])
def test_numbers_that_are_not_finite_are_refused(where: str, bad: float) -> None:
    arguments = {"table": gaussian(6, 3), "counts": torch.ones(6)}
    arguments[where].view(-1)[0] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        factorize_embedding(**arguments)


# --- the module ------------------------------------------------------------------


@pytest.mark.parametrize("counts", [None, drawn_counts(9, 0)], ids=["plain", "counts"])
@pytest.mark.parametrize("ids", [(), (4,), (2, 3), (0, 3)])
def test_at_full_rank_it_is_the_dense_embedding(
    counts: Tensor | None, ids: tuple[int, ...]
) -> None:
    dense = nn.Embedding(9, 4)
    thin = LowRankEmbedding.from_embedding(dense, 4, counts)
    words = torch.randint(9, ids)
    found = thin(words)
    assert found.shape == (*ids, 4) and thin.rank == 4
    torch.testing.assert_close(found, dense(words), rtol=0, atol=1e-5)


def test_a_word_is_looked_up_in_the_product_of_the_factors() -> None:
    dense, counts = nn.Embedding(9, 4), drawn_counts(9, 0)
    thin = LowRankEmbedding.from_embedding(dense, 2, counts)
    table, right = factorize_embedding(dense.weight, counts).truncate(2)
    assert torch.equal(thin.table, table) and torch.equal(thin.right, right)
    words = torch.tensor([[3, 3], [0, 8]])
    torch.testing.assert_close(thin(words), (table @ right)[words])
    assert parameters(thin) == 9 * 2 + 2 * 4 and thin.rank == 2


def test_both_factors_learn_and_the_dense_table_is_left_alone() -> None:
    dense = nn.Embedding(9, 4)
    before = dense.weight.detach().clone()
    thin = LowRankEmbedding.from_embedding(dense, 4)
    thin(torch.tensor([1, 2])).square().sum().backward()
    assert thin.right.grad.any()
    changed = thin.table.grad.any(dim=1)
    assert changed.tolist() == [number in (1, 2) for number in range(9)]
    with torch.no_grad():
        for parameter in thin.parameters():
            parameter += 1
    assert torch.equal(dense.weight, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mode_and_dtype_are_inherited(training: bool, dtype: torch.dtype) -> None:
    dense = nn.Embedding(9, 4, dtype=dtype).train(training)
    thin = LowRankEmbedding.from_embedding(dense, 2)
    assert thin.training is training
    assert {p.dtype for p in thin.parameters()} == {dtype}


@pytest.mark.parametrize("rank", [0, -1, 5, True, 2.0])
def test_a_rank_that_is_not_allowed_is_refused(rank: object) -> None:
    with pytest.raises(ValueError, match="1 to 4"):
        LowRankEmbedding.from_embedding(nn.Embedding(9, 4), rank)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "right"),
    [((9, 2), (3, 4)), ((2, 9), (9,)), ((9,), (9, 4)), ((1, 9, 2), (2, 4))],
)
def test_factors_that_do_not_fit_are_refused(
    table: tuple[int, ...], right: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="are needed"):
        LowRankEmbedding(torch.ones(table), torch.ones(right))
