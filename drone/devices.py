"""Where a model is, and what that place can do."""

from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Model = TypeVar("Model", bound=nn.Module)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's first tensor; None: it has none.

    Inputs belong there: of a model spread over several devices, the first parameter
    is that of the part that meets them.
    """
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device


def check_weights_are_here(model: nn.Module, where: str = "") -> None:
    """Refuse a model some of whose weights are elsewhere: offloaded, or never loaded.

    Args:
        model: or a module of it.
        where: its name, for the message.

    Raises:
        ValueError: a parameter or buffer is on the device "meta"; it is named.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        # A subclass that says so may keep its numbers elsewhere; a plain one has none.
        if tensor.is_meta and type(tensor) in (Tensor, nn.Parameter):
            full = f"{where}.{name}" if where else name
            raise ValueError(
                f"{full} is on the meta device: its numbers are offloaded or were "
                "never loaded. Load the whole model onto the CPU or a GPU: "
                "from_pretrained without device_map, or with one that offloads nothing."
            )


def to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Move a batch's tensors, nested ones too, to where the model is.

    >>> batch = to_device({"x": torch.ones(2)}, nn.Linear(2, 2, device="meta"))
    >>> batch["x"].device.type
    'meta'
    """
    device = device_of(model)
    if device is None:
        return dict(batch)
    # dict: of other mappings, such as a tokenizer's, tree_map sees no inside
    moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(batch))
    return dict(moved)


def placed(
    model: Model, device: torch.device | str, dtype: torch.dtype | None = None
) -> Model:
    """Move a model, in place, and return it, as the class it is.

    transformers wraps `to` so that a type checker takes its first argument for `self`.

    >>> placed(nn.Linear(2, 2), "meta", torch.float16).weight.dtype
    torch.float16
    """
    return model.to(device=device, dtype=dtype)


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, detached; on the CPU if its device has none (MPS)."""
    detached = tensor.detach()
    return (detached.cpu() if detached.device.type == "mps" else detached).double()


def multiplies_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether a device multiplies bfloat16 faster than float32.

    One without such instructions emulates them, at a hundredth of the speed.
    """
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
