"""A table of word vectors as two thin ones, frequent words counting more than rare."""

import torch
from torch import Tensor

from drone.devices import double
from drone.math.factorize import Factorization, largest_first, tail_norms


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
    matrix = double(table)
    weighted = matrix * counts.to(matrix)[:, None].sqrt()
    if not weighted.sum().isfinite():
        raise ValueError("the table or the counts have NaN or Inf.")
    energy, vectors = largest_first(weighted.T @ weighted)  # Eᵀ C E, (dim, dim)
    errors = tail_norms(energy.clamp_min(0).sqrt())
    return Factorization((matrix, vectors), (vectors.T,), errors, table.dtype)
