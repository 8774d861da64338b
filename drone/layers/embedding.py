"""A low-rank layer for a table of word vectors."""

from torch import Tensor, nn
from torch.nn import functional as F

from drone.math.embedding import factorize_embedding
from drone.math.factorize import check_rank


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
        factors = found.truncate(rank, like=embedding.weight)
        new = cls(*factors, embedding.padding_idx)
        new.requires_grad_(embedding.weight.requires_grad)
        return new.train(embedding.training)

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.right.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """(…) → (…, rank) → (…, dim)."""
        return F.embedding(ids, self.table, self.padding_idx) @ self.right
