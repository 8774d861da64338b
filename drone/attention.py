"""The query-key product of multi-head attention at a smaller inner dimension."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from drone.adapters import ATTENTION
from drone.factorize import check_rank, output_moment, tail_norms
from drone.moments import SecondMoment


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
    """

    query: Tensor
    key: Tensor
    errors: Tensor
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.query.shape[0]

    @property
    def max_rank(self) -> int:
        """The head size, the largest rank there is."""
        return self.query.shape[1]

    def truncate(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query weight and bias, key weight and bias, of `rank` rows a head.

        Returns:
            (heads · rank, in), (heads · rank,), and the same for the keys, in the
            weights' own dtype.

        Raises:
            ValueError: `rank` is not an integer from 1 to the head size.
        """
        check_rank(rank, self.max_rank)
        parts = []
        for rows in (self.query, self.key):
            both = rows[:, :rank].reshape(-1, rows.shape[-1]).to(self.dtype)
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
    extended = extended.to(query.weight.device)
    w_q, w_k = _with_bias(query), _with_bias(key)  # W̃, (heads · size, in + 1)
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
    """C̃ = Σ x̃ x̃ᵀ with x̃ = (x, 1), (dim + 1, dim + 1) float64."""
    total = moment.total[:, None]
    count = torch.tensor([[moment.count]], dtype=torch.float64)
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
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
    return torch.cat([weight, bias.detach().double()[:, None]], dim=1)


def _square_root(moment: Tensor) -> Tensor:
    """R with RᵀR = the moment, also where that is singular: R = Λ^½ Vᵀ."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return root


class LowRankSelfAttention(nn.Module):
    """Self-attention whose queries and keys have `rank` numbers a head. Chapter 4.

    Values, softmax scale, masks and position bias are the original's, and so are the
    names of its parts: the block of a BERT still has `query`, `key` and `value`.

    Attributes:
        heads: their number.
        head_size: numbers a head of the values, and of the dense queries and keys.
        rank: numbers a head of the queries and keys.
        in_features: size of an input vector.
    """

    heads: int
    head_size: int
    rank: int
    in_features: int
    dropout: nn.Dropout

    def __init__(self, dense: nn.Module, query: nn.Linear, key: nn.Linear) -> None:
        """Replace a known block's queries and keys; its other parts are taken over.

        Args:
            dense: a self-attention block of `drone.adapters.ATTENTION`.
            query: Linear (in → heads · rank).
            key: the same for the keys.

        Raises:
            ValueError: a block of another kind, one that looks only back, or shapes
                that do not fit.
        """
        nn.Module.__init__(self)  # not the family's: that would make dense projections
        kind = type(dense).__name__
        if kind not in ATTENTION:
            known = ", ".join(ATTENTION)
            raise ValueError(f"a {kind}; one of {known} is needed.")
        if getattr(dense, "is_causal", False) or getattr(dense, "is_decoder", False):
            raise ValueError(f"this {kind} is a decoder's; an encoder's is needed.")
        self.names = names = ATTENTION[kind]
        self.heads = attention_heads(dense)
        self.head_size = getattr(dense, names.value).out_features // self.heads
        self.in_features = query.in_features
        if query.out_features % self.heads or key.out_features != query.out_features:
            raise ValueError(
                f"queries have {query.out_features} outputs and keys "
                f"{key.out_features}; the same multiple of {self.heads} is needed."
            )
        self.rank = query.out_features // self.heads
        self.config = getattr(dense, "config", None)
        self.is_causal = False
        dropout = dense.get_submodule("dropout")
        assert isinstance(dropout, nn.Dropout)  # so it is in every family above
        self.dropout = dropout
        setattr(self, names.query, query)
        setattr(self, names.key, key)
        setattr(self, names.value, getattr(dense, names.value))
        if names.output is not None:
            setattr(self, names.output, getattr(dense, names.output))
        self.train(dense.training)

    @staticmethod
    def replacing(
        dense: nn.Module, query: nn.Linear, key: nn.Linear
    ) -> "LowRankSelfAttention":
        """Return the block with these projections, as one of its family's class too."""
        family: type = type(dense)
        return _subclass(family)(dense, query, key)

    @classmethod
    def from_attention(
        cls, dense: nn.Module, rank: int, factorization: AttentionFactorization
    ) -> "LowRankSelfAttention":
        """Replace a block by its best version with `rank` numbers a head.

        Device, dtype, mode and `requires_grad` are inherited.

        Raises:
            ValueError: the rank is not allowed, the factorization is of another
                shape, or the block is not of a known kind.
        """
        check_rank(rank, factorization.max_rank)
        query, _ = query_and_key(dense)
        rows, dim = query.weight.shape
        heads, size, extended = factorization.query.shape
        if (heads * size, extended - 1) != (rows, dim):
            raise ValueError(
                f"the factorization is of {heads} heads of {size} with {extended - 1} "
                f"inputs; this block's projections are {rows}×{dim}."
            )
        weight_q, bias_q, weight_k, bias_k = factorization.truncate(rank)
        trains = query.weight.requires_grad
        return cls.replacing(
            dense, _linear(weight_q, bias_q, trains), _linear(weight_k, bias_k, trains)
        )

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the two parts that got smaller."""
        return self.names.query, self.names.key

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, length, in) → (batch, length, heads · head size), as the original.

        Returns:
            The block's output, and the attention weights (None under SDPA).

        Raises:
            ValueError: called as a decoder's block, with a cache or with another
                model's hidden states.
        """
        for decoding in ("past_key_values", "encoder_hidden_states"):
            if kwargs.pop(decoding, None) is not None:
                raise ValueError(f"{decoding} was given; this block only encodes.")
        batch, length, _ = hidden_states.shape
        names = self.names
        shape = (batch, length, self.heads, -1)
        q = getattr(self, names.query)(hidden_states).view(shape).transpose(1, 2)
        k = getattr(self, names.key)(hidden_states).view(shape).transpose(1, 2)
        v = getattr(self, names.value)(hidden_states).view(shape).transpose(1, 2)
        # q and k: (batch, heads, length, rank); v: (batch, heads, length, head size)
        if position_bias is not None:  # MPNet's mask is additive, as its bias is
            position_bias = position_bias.expand(batch, -1, -1, -1)
            if attention_mask is not None:
                position_bias = position_bias + attention_mask
            attention_mask = position_bias
        attend = eager_attention_forward
        if names.interface and self.config is not None:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        mixed, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=float(self.dropout.p) if self.training else 0.0,
            scaling=self.head_size**-0.5,  # the original's, not that of the rank
            **kwargs,
        )
        output = mixed.reshape(batch, length, -1).contiguous()
        if names.output is not None:
            output = getattr(self, names.output)(output)
        return output, weights

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"heads={self.heads}, rank={self.rank}, head_size={self.head_size}"


@cache
def _subclass(family: type) -> type[LowRankSelfAttention]:
    """Derive from the family's class too: transformers records attention by class."""
    return type(f"LowRank{family.__name__}", (LowRankSelfAttention, family), {})


def query_and_key(block: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Return the two projections of a known attention block.

    Raises:
        ValueError: the block is of another kind, or its projections are not dense.
    """
    names = ATTENTION.get(type(block).__name__)
    if names is None:
        raise ValueError(
            f"a {type(block).__name__}; one of {', '.join(ATTENTION)} is needed."
        )
    query, key = getattr(block, names.query), getattr(block, names.key)
    if not isinstance(query, nn.Linear) or not isinstance(key, nn.Linear):
        raise ValueError("its queries or keys have been replaced already.")
    return query, key


def attention_heads(block: nn.Module) -> int:
    """Return a known block's number of heads."""
    heads: int = getattr(block, ATTENTION[type(block).__name__].heads)
    return heads


def _linear(weight: Tensor, bias: Tensor, trains: bool) -> nn.Linear:
    """Return a Linear with these parameters, on their device and in their dtype."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trains)
    linear.bias = nn.Parameter(bias, requires_grad=trains)
    return linear
