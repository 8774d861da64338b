"""The best query-key product of each head at a smaller inner dimension."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drone.devices import double
from drone.math.factorize import cast, check_rank, output_moment, tail_norms
from drone.math.moments import SecondMoment


@dataclass(frozen=True)
class AttentionFactorization:
    """All ranks of the query-key product of each head. Made by `factorize_attention`.

    Attributes:
        query: (heads, head size, in + 1) float64, rows by falling importance; the last
            column is the bias. Rank k takes the first k rows of each head.
        key: the same for the keys.
        errors: (heads, head size + 1) float64, ‖X̃ᵀ(W̃_qᵀW̃_k − M_k)X̃‖_F for k = 0..head
            size: the change of all logits q·k, before the softmax scale.
        dtype: of the weights, given back by `truncate`.
        weight_sha256: of weights and biases, if `factorize_modules` made it; else "".
    """

    query: Tensor
    key: Tensor
    errors: Tensor
    dtype: torch.dtype
    weight_sha256: str = ""

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.query.shape[0]

    @property
    def max_rank(self) -> int:
        """The head size, the largest rank there is."""
        return self.query.shape[1]

    def truncate(
        self, rank: int, like: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query weight and bias, key weight and bias, of `rank` rows a head.

        Args:
            rank: from 1 to the head size.
            like: a tensor whose dtype and device all take; None: the dtype of the
                weights that were factorized, on the device where that was done.

        Returns:
            (heads · rank, in), (heads · rank,), and the same for the keys.

        Raises:
            ValueError: `rank` is not an integer from 1 to the head size, or a number
                does not fit into that dtype (float16 ends at 65,504).
        """
        check_rank(rank, self.max_rank)
        like = self.query.new_empty(0, dtype=self.dtype) if like is None else like
        parts = []
        for rows in (self.query, self.key):
            both = cast(rows[:, :rank].reshape(-1, rows.shape[-1]), like)
            parts += [both[:, :-1].contiguous(), both[:, -1].contiguous()]
        return parts[0], parts[1], parts[2], parts[3]


def factorize_attention(
    query: nn.Linear,
    key: nn.Linear,
    heads: int,
    moment: SecondMoment | None = None,
    *,
    centre_keys: bool = False,
) -> AttentionFactorization:
    """Find each head's best rank-k query-key product for the given inputs.

    A logit is x̃ᵢᵀ W̃_qᵀ W̃_k x̃ⱼ with x̃ = (x, 1) and W̃ = [W, b]. Over all pairs of tokens
    the change ‖X̃ᵀ(W̃_qᵀ W̃_k − M_k)X̃‖_F is least, by Eckart-Young, when the singular
    values of R_q R_kᵀ are cut, where R_qᵀR_q = W̃_q C̃ W̃_qᵀ is the second moment of the
    queries and R_k that of the keys. With R_q R_kᵀ = P Σ Tᵀ the new projections are
    Σ_k^-½ T_kᵀ R_k W̃_q and Σ_k^-½ P_kᵀ R_q W̃_k: only singular values that are kept are
    divided by. A direction the data never takes is left out, so calibrate on many more
    tokens than the head has numbers. Chapter 4.

    Args:
        query: Linear (in → heads · head size); its bias may be None.
        key: the same for the keys.
        heads: number of heads.
        moment: of the vectors both get; None: every direction counts alike, which is
            plain SVD of W_qᵀ W_k, biases counted as one more input.
        centre_keys: subtract the mean key first. A softmax does not see what all keys
            have in common, so nothing need be spent on it; needs a moment.

    Raises:
        ValueError: shapes or a moment that do not fit, or numbers that are not finite.
    """
    size = _checked_heads(query, key, heads, moment)
    dim = query.in_features
    if moment is None:
        if centre_keys:
            raise ValueError("the mean key is that of the data; a moment is needed.")
        extended = torch.eye(dim + 1, dtype=torch.float64)
    else:
        extended = extended_moment(moment)
    w_q, w_k = _with_bias(query), _with_bias(key)  # W̃, (heads · size, in + 1)
    extended = extended.to(w_q.device)
    if centre_keys and moment is not None:
        w_k[:, -1] = -w_k[:, :-1] @ moment.mean.to(w_k.device)  # b ← −Wμ
    w_q, w_k = w_q.view(heads, size, dim + 1), w_k.view(heads, size, dim + 1)
    new_q, new_k, errors = [], [], []
    for q, k in zip(w_q, w_k, strict=True):
        r_q, r_k = (_square_root(output_moment(w, extended)) for w in (q, k))
        p, sigma, t = torch.linalg.svd(r_q @ r_k.T)  # (size, size), (size,), Tᵀ
        # A direction the data never takes has σ = 0: it is left out, not divided by.
        kept = sigma > size * torch.finfo(sigma.dtype).eps * sigma[0]
        scale = torch.where(kept, sigma, torch.inf).rsqrt()[:, None]
        new_q.append(scale * (t @ r_k @ q))
        new_k.append(scale * (p.T @ r_q @ k))
        errors.append(tail_norms(sigma))
    return AttentionFactorization(
        torch.stack(new_q), torch.stack(new_k), torch.stack(errors), query.weight.dtype
    )


def extended_moment(moment: SecondMoment) -> Tensor:
    """C̃ = Σ x̃ x̃ᵀ with x̃ = (x, 1), (dim + 1, dim + 1) float64, where the sums are."""
    total = moment.total[:, None]
    count = total.new_full((1, 1), moment.count)
    above = torch.cat([moment.matrix, total], dim=1)
    return torch.cat([above, torch.cat([total.T, count], dim=1)])


def _checked_heads(
    query: nn.Linear, key: nn.Linear, heads: int, moment: SecondMoment | None
) -> int:
    """Return the head size, if queries, keys, heads and moment fit together."""
    if query.weight.shape != key.weight.shape:
        raise ValueError(
            f"queries are {tuple(query.weight.shape)} and keys "
            f"{tuple(key.weight.shape)}; equal shapes are needed."
        )
    if heads < 1 or query.out_features % heads:
        raise ValueError(
            f"{query.out_features} outputs do not divide into {heads} heads."
        )
    if moment is not None and (moment.dim != query.in_features or moment.count == 0):
        raise ValueError(
            f"the moment is {moment!r}; dim {query.in_features} and a count of at "
            "least 1 are needed."
        )
    for part in (*query.parameters(), *key.parameters()):
        if not part.isfinite().all():
            raise ValueError("a query or key weight has NaN or Inf.")
    return query.out_features // heads


def _with_bias(linear: nn.Linear) -> Tensor:
    """W̃ = [W, b], (out, in + 1) float64; no bias is a bias of 0."""
    weight = double(linear.weight)
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
    return torch.cat([weight, double(bias)[:, None]], dim=1)


def _square_root(moment: Tensor) -> Tensor:
    """R with RᵀR = the moment, also where that is singular: R = Λ^½ Vᵀ."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return root
