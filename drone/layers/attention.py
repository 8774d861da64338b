"""Self-attention whose query-key product has a smaller inner dimension."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from drone.math.attention import AttentionFactorization
from drone.math.factorize import check_rank


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
        names = attention_names(dense)
        if names is None:
            raise ValueError(f"{_unknown(dense)}.")
        if getattr(dense, "is_causal", False) or getattr(dense, "is_decoder", False):
            raise ValueError(f"this {kind} is a decoder's; an encoder's is needed.")
        self.names = names
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

        Device, dtype, mode and each parameter's `requires_grad` are those of the
        block, wherever and in whatever dtype the factorization was made.

        Raises:
            ValueError: the rank is not allowed, the factorization is of another
                shape, a number does not fit into the dtype, or the block is not of a
                known kind.
        """
        check_rank(rank, factorization.max_rank)
        query, key = query_and_key(dense)
        rows, dim = query.weight.shape
        heads, size, extended = factorization.query.shape
        if (heads * size, extended - 1) != (rows, dim):
            raise ValueError(
                f"the factorization is of {heads} heads of {size} with {extended - 1} "
                f"inputs; this block's projections are {rows}×{dim}."
            )
        parts = factorization.truncate(rank, like=query.weight)
        weight_q, bias_q, weight_k, bias_k = parts
        return cls.replacing(
            dense, _linear(weight_q, bias_q, query), _linear(weight_k, bias_k, key)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how to build a copy: the class is made by `_subclass`, in no module."""
        family = type(self).__bases__[-1]
        return _empty, (family,), self.__dict__

    @property
    def leaves_fused_kernel(self) -> bool:
        """Whether it is on a GPU whose fused attention cannot take this rank.

        That reads q and k 16 bytes at once: ranks of a multiple of 8 in half precision,
        of 4 in float32. With another the product is made unfused: on an H100 in half
        precision, rank 20 takes 181 µs where rank 24 takes 20.
        """
        query = getattr(self, self.names.query).weight
        whole = self.rank * query.element_size() % 16 == 0
        return query.device.type == "cuda" and self.names.interface and not whole

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


def _empty(family: type) -> LowRankSelfAttention:
    """Return a block of a family without its parts, for pickle and `copy` to fill."""
    plain = family is nn.Module  # made by `LowRankSelfAttention(...)` itself
    return object.__new__(LowRankSelfAttention if plain else _subclass(family))


def query_and_key(block: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Return the two projections of a known attention block.

    Raises:
        ValueError: the block is of another kind, or its projections are not dense.
    """
    names = attention_names(block)
    if names is None:
        raise ValueError(f"{_unknown(block)}.")
    query, key = getattr(block, names.query), getattr(block, names.key)
    if not isinstance(query, nn.Linear) or not isinstance(key, nn.Linear):
        raise ValueError("its queries or keys have been replaced already.")
    return query, key


def attention_heads(block: nn.Module) -> int:
    """Return a known block's number of heads."""
    names = attention_names(block)
    assert names is not None  # who asks has seen that it is known
    heads: int = getattr(block, names.heads)
    return heads


def _linear(weight: Tensor, bias: Tensor, dense: nn.Linear) -> nn.Linear:
    """Return a Linear with these parameters, on their device and in their dtype.

    Each trains if the dense one's does; a bias where there was none, as the weight.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    before: Tensor = dense.weight if dense.bias is None else dense.bias
    linear.weight = nn.Parameter(weight, requires_grad=dense.weight.requires_grad)
    linear.bias = nn.Parameter(bias, requires_grad=before.requires_grad)
    return linear


@dataclass(frozen=True)
class AttentionNames:
    """What a family of models calls the parts of one self-attention block.

    Attributes:
        heads: of the attribute with the number of heads.
        query, key, value: of the projections.
        output: of the projection after the heads; None if it lies outside the block.
        interface: whether the block heeds the model's choice of attention kernel
            (SDPA or eager); one that does not is always computed eagerly.
    """

    heads: str
    query: str
    key: str
    value: str
    output: str | None
    interface: bool


# By class name: a class of the same family in another version keeps its name.
ATTENTION = {
    "BertSelfAttention": AttentionNames(
        "num_attention_heads", "query", "key", "value", None, True
    ),
    "RobertaSelfAttention": AttentionNames(
        "num_attention_heads", "query", "key", "value", None, True
    ),
    "DistilBertSelfAttention": AttentionNames(
        "n_heads", "q_lin", "k_lin", "v_lin", "out_lin", True
    ),
    "MPNetSelfAttention": AttentionNames(
        "num_attention_heads", "q", "k", "v", "o", False
    ),
}


def attention_names(block: nn.Module) -> AttentionNames | None:
    """Return the names of a known attention block's parts; None: it is not known.

    A block of the same name with a forward of its own is another one.
    """
    code = getattr(type(block).forward, "__module__", "") or ""
    ours = code.startswith("transformers.models.")
    return ATTENTION.get(type(block).__name__) if ours else None


def _unknown(block: nn.Module) -> str:
    """Say why a module is no known attention block."""
    kind = type(block).__name__
    whose = " with a forward of its own" if kind in ATTENTION else ""
    return f"a {kind}{whose}; one of {', '.join(ATTENTION)} is needed"
