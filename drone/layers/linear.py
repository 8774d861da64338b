"""What replaces a dense module."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from drone.math.factorize import Factorization, break_even_rank, check_rank, factorize


class LowRankLinear(nn.Module):
    """Two thin products in place of one: y = left (right x) + bias. Chapter 1.

    Attributes:
        right: (rank, in), applied first.
        left: (out, rank), applied second.
        bias: (out,) or None.
        tied_to: name of the module that still has the dense weight, where the two
            shared it; None: nobody does. For `report`; not saved.

    >>> from torch import nn
    >>> thin = LowRankLinear.from_linear(nn.Linear(6, 4), rank=2)
    >>> tuple(thin.left.shape), tuple(thin.right.shape), tuple(thin.weight.shape)
    ((4, 2), (2, 6), (4, 6))
    """

    tied_to: str | None = None

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
        """Wrap the factors as they are: shapes (out, rank), (rank, in) and (out,).

        Raises:
            ValueError: the shapes do not fit each other.
        """
        super().__init__()
        shapes = [tuple(t.shape) for t in (left, right)]
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(
                f"left and right have shapes {shapes[0]} and {shapes[1]}; "
                "(out, rank) and (rank, in) are needed."
            )
        if bias is not None and bias.shape != left.shape[:1]:
            raise ValueError(
                f"the bias has shape {tuple(bias.shape)}; ({left.shape[0]},) is needed."
            )
        self.right = nn.Parameter(right)
        self.left = nn.Parameter(left)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rank: int, factorization: Factorization | None = None
    ) -> "LowRankLinear":
        """Replace a dense layer by its best rank-`rank` factors.

        Device, dtype, mode, `requires_grad` and the bias (or its absence) are those of
        `linear`; nothing is shared with it.

        Args:
            linear: weight (out, in), or a Conv1D, whose weight is (in, out).
            rank: from 1 to min(out, in).
            factorization: of `linear.weight`, made on any device and in any dtype;
                None computes it.

        Raises:
            ValueError: the rank is not allowed, the factorization is of another shape,
                or a factor does not fit into the dtype.
            TypeError: `linear` is neither.
        """
        linear = as_linear(linear)
        check_rank(rank, min(linear.weight.shape))
        if factorization is None:
            factorization = factorize(linear.weight)
        if factorization.shape != tuple(linear.weight.shape):
            raise ValueError(
                "the factorization is of a "
                f"{factorization.shape[0]}×{factorization.shape[1]} weight; "
                f"this layer's is {linear.out_features}×{linear.in_features}."
            )
        left, right = factorization.truncate(rank, like=linear.weight)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        new = cls(left, right, bias).train(linear.training)
        new.right.requires_grad_(linear.weight.requires_grad)
        new.left.requires_grad_(linear.weight.requires_grad)
        if new.bias is not None:
            new.bias.requires_grad_(linear.bias.requires_grad)
        return new

    @property
    def in_features(self) -> int:
        """Size of an input vector."""
        return self.right.shape[1]

    @property
    def out_features(self) -> int:
        """Size of an output vector."""
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.right.shape[0]

    @property
    def saves(self) -> bool:
        """Whether the rank is at or below break-even."""
        return self.rank <= break_even_rank(self.out_features, self.in_features)

    @property
    def dense_weight(self) -> Tensor:
        """Ŵ = left @ right, (out, in)."""
        return self.left @ self.right

    @property
    def weight(self) -> Tensor:
        """Ŵ again, read-only, for code that reads a Linear's weight. Chapter 1.

        T5 asks for its dtype, `nn.TransformerEncoder` and `nn.MultiheadAttention`
        multiply with it: whoever does so is right, but gains no speed, since the two
        thin products are then not what runs. `report` says so.
        """
        return self.dense_weight

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to set `weight`, which a Linear would allow.

        Raises:
            AttributeError: it is computed; `left` and `right` can be set.
        """
        if name == "weight":
            raise AttributeError(
                "the weight of a LowRankLinear is computed, left @ right; set left "
                "and right."
            )
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) → (…, rank) → (…, out)."""
        return F.linear(F.linear(input, self.right), self.left, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, rank={self.rank}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense Linear, or GPT-2's Conv1D, which is one transposed.

    >>> from torch import nn
    >>> is_linear(nn.Linear(2, 3)), is_linear(nn.Conv1d(2, 3, 1))
    (True, False)
    """
    return isinstance(module, nn.Linear | Conv1D)


def as_linear(module: nn.Module) -> nn.Linear:
    """Return a Linear itself, and of a Conv1D a Linear that shares its tensors.

    Raises:
        TypeError: `module` is neither.
    """
    if isinstance(module, nn.Linear):
        return module
    if not isinstance(module, Conv1D):
        raise TypeError(f"{type(module).__name__}; Linear or Conv1D is needed.")
    into, out = module.weight.shape
    linear = nn.Linear(into, out, device="meta").train(module.training)
    # (in, out) is stored; the transpose is a view, so nothing is copied.
    trains = module.weight.requires_grad
    linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=trains)
    linear.bias = module.bias
    return linear


def linear_multiply_adds(module: nn.Module) -> int:
    """Multiply-adds of one token through a dense or low-rank layer.

    Raises:
        TypeError: `module` is neither.
    """
    if isinstance(module, LowRankLinear):
        return module.rank * (module.in_features + module.out_features)
    if is_linear(module):
        return as_linear(module).weight.numel()
    raise TypeError(f"{type(module).__name__}; Linear or LowRankLinear is needed.")


def parameters(module: nn.Module) -> int:
    """Number of parameters of a module, each tensor counted once."""
    return sum(p.numel() for p in module.parameters())


def moved(module: nn.Module, like: Tensor) -> nn.Module:
    """Move a module, itself, to a tensor's device and dtype.

    Raises:
        ValueError: a number is beyond that dtype's range; a cast makes it infinite.
    """
    module.to(like.dtype)
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} has a number that {like.dtype} cannot hold.")
    return module.to(like.device)
