"""A table of word vectors as two thin ones, frequent words counting more than rare."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drone.factorize import Factorization, check_rank, largest_first, tail_norms


def factorize_embedding(table: Tensor, counts: Tensor | None = None) -> Factorization:
    """Decompose a table so that the words that occur most are met best. Chapter 6.

    min Σ_v counts_v ‖e_v − ê_v‖² over all tables Ê of rank k: a word enters as a
    one-hot vector, whose second moment is C = diag(counts). Ê = E V_k V_kᵀ, with V_k
    the top eigenvectors of Eᵀ C E (Eckart-Young); the words × words matrix C is never
    made. Counting words is the observation of GroupReduce (Chen et al., 2018).

    Args:
        table: E, (words, dim), with words ≥ dim.
        counts: (words,), how often each occurs; None: all alike, which is plain SVD.

    Returns:
        `truncate(k)` gives (words, k) and (k, dim); of the two, `right` has the
        orthonormal rows. `errors` are the square roots of the sums above.

    Raises:
        ValueError: shapes or counts that do not fit.
    """
    if table.ndim != 2 or table.shape[0] < table.shape[1]:
        raise ValueError(
            f"the table has shape {tuple(table.shape)}; (words, dim) is needed, with "
            "at least as many words as dimensions."
        )
    if counts is None:
        counts = torch.ones(len(table))
    if counts.shape != table.shape[:1] or (counts < 0).any() or not counts.any():
        raise ValueError(
            f"counts has shape {tuple(counts.shape)}; ({len(table)},) is needed, a "
            "number a word, none below 0 and not all 0."
        )
    matrix = table.detach().double()
    weighted = matrix * counts.to(matrix)[:, None].sqrt()
    if not weighted.sum().isfinite():
        raise ValueError("the table or the counts have NaN or Inf.")
    energy, vectors = largest_first(weighted.T @ weighted)  # Eᵀ C E, (dim, dim)
    errors = tail_norms(energy.clamp_min(0).sqrt())
    return Factorization((matrix, vectors), (vectors.T,), errors, table.dtype)


class LowRankEmbedding(nn.Module):
    """Look a word up in a thin table, then multiply: e_v = right.T @ table[v].

    Attributes:
        table: (words, rank).
        right: (rank, dim).
        padding_idx: as in `nn.Embedding`: a row that gets no gradient.
    """

    def __init__(
        self, table: Tensor, right: Tensor, padding_idx: int | None = None
    ) -> None:
        """Wrap the factors as they are.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        super().__init__()
        if table.ndim != 2 or right.ndim != 2 or table.shape[1] != right.shape[0]:
            raise ValueError(
                f"shapes {tuple(table.shape)} and {tuple(right.shape)}; (words, rank) "
                "and (rank, dim) are needed."
            )
        self.table = nn.Parameter(table)
        self.right = nn.Parameter(right)
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, rank: int, counts: Tensor | None = None
    ) -> "LowRankEmbedding":
        """Replace a dense table by its best factors; see `factorize_embedding`.

        Raises:
            ValueError: a rank outside 1..dim, a table with `max_norm` (which changes
                its rows as they are looked up), or as `factorize_embedding`.
        """
        check_rank(rank, embedding.embedding_dim)
        if embedding.max_norm is not None:
            raise ValueError("the embedding has a max_norm; None is needed.")
        found = factorize_embedding(embedding.weight, counts)
        new = cls(*found.truncate(rank), embedding.padding_idx)
        new.requires_grad_(embedding.weight.requires_grad)
        return new.train(embedding.training)

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.right.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """(…) → (…, rank) → (…, dim)."""
        return F.embedding(ids, self.table, self.padding_idx) @ self.right
