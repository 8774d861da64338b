"""Weights of 8 bits on top of thin ones, for a CPU."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from drone.devices import check_weights_are_here
from drone.layers.linear import LowRankLinear
from drone.model.adapters import swap


def as_linears(model: nn.Module) -> nn.Module:
    """Return a copy with two `nn.Linear` in a row for each `LowRankLinear`.

    For tools that know no other layer, such as quantizers and exporters. The outputs
    are the same.
    """
    plain = copy.deepcopy(model)
    if isinstance(plain, LowRankLinear):
        return _two(plain)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LowRankLinear):
            swap(plain, name, _two(module))
    return plain


def _two(module: LowRankLinear) -> nn.Sequential:
    """Make R and L modules of their own: L (R x) + b."""
    m, k, n = module.out_features, module.rank, module.in_features
    first = nn.Linear(n, k, bias=False, device="meta")
    second = nn.Linear(k, m, bias=module.bias is not None, device="meta")
    first.weight, second.weight = module.right, module.left
    if module.bias is not None:
        second.bias = module.bias
    return TwoLinears(first, second).train(module.training)


class TwoLinears(nn.Sequential):
    """R and L as modules of their own, which tell what code asks of a Linear.

    T5 asks for its dtype and `nn.TransformerEncoder` for its device. After `int8` it is
    the product of the rounded factors.
    """

    @property
    def weight(self) -> Tensor:
        """Ŵ = L R, (out, in), read-only."""
        right, left = (_tensor(each.weight) for each in self)
        return left @ right

    @property
    def bias(self) -> Tensor | None:
        """That of L."""
        bias: Any = self[1].bias
        found: Tensor | None = bias() if callable(bias) else bias
        return found


def _tensor(weight: Any) -> Tensor:
    """Return a factor; a layer of 8 bits gives its own by a method."""
    found: Tensor = weight if isinstance(weight, Tensor) else weight().dequantize()
    return found


def unit_rows(model: nn.Module) -> nn.Module:
    """Return a copy whose thin layers share out their product another way.

    L R = (L S⁻¹)(S R) for any diagonal S. Here every row of S R has length 1, so that
    the k numbers between the factors are of like size: rounded with one scale for all
    of them, the small ones survive. Rows of zeros stay. The outputs are the same.
    Chapter 9.

    >>> thin = LowRankLinear(torch.ones(3, 1), torch.tensor([[3.0, 4.0]]))
    >>> unit_rows(thin).left[0].item()  # R's one row had length 5
    5.0
    """
    even = copy.deepcopy(model)
    for module in even.modules():
        if isinstance(module, LowRankLinear):
            length = module.right.detach().norm(dim=1)  # (k,)
            length = torch.where(length > 0, length, torch.ones_like(length))
            # new ones, not in place: another module may hold the same factor
            module.right = nn.Parameter(module.right.detach() / length[:, None])
            module.left = nn.Parameter(module.left.detach() * length)
    return even


def int8(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers keep 8-bit weights: dynamic quantization.

    Each row of a weight matrix is kept as 8-bit integers with a scale of its own;
    inputs are rounded to 8 bits as they arrive, those between two factors after
    `unit_rows`. Everything else stays as it is, the projections inside of an
    `nn.MultiheadAttention` too. Chapters 8 and 9.

    Args:
        model: dense or compressed, float32, in eval mode, on a CPU.

    Raises:
        ValueError: the model is in training mode, not float32, or not on the CPU.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call its eval() first.")
    check_weights_are_here(model)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes - {torch.float32}:
        odd = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"the model is in {odd}; float32 is needed.")
    elsewhere = {p.device.type for p in model.parameters()} - {"cpu"}
    if elsewhere:
        raise ValueError(
            f"the model is on {', '.join(sorted(elsewhere))}; 8-bit layers run on the "
            "processor only: move the model to the CPU first."
        )
    with warnings.catch_warnings():
        # Deprecated in favour of the package torchao; this one needs no other package.
        for words in ("torch.ao.quantization is", "torch.quantize_per"):
            warnings.filterwarnings("ignore", words)
        eight: nn.Module = torch.ao.quantization.quantize_dynamic(
            as_linears(unit_rows(model)),
            # One scale for a whole matrix would let its largest row coarsen the rest.
            {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig},
        )
    for module in eight.modules():
        # On their fused path they take weights for a kernel of floats; no module runs.
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # of neither: the slow path's own one
    return eight.eval()
