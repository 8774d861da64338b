"""A second device on a machine that has none: tensors that say they are on `meta`.

Each keeps its numbers in an ordinary CPU tensor and is computed there, so results are
real; but as on a GPU, it cannot be mixed with a tensor of the CPU and gives nothing to
NumPy. With it, what forgets to move a tensor fails here too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")


class Away(Tensor):
    """A tensor on `meta` whose numbers are those of `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Away":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Away({self.inner})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert meta device type tensor to numpy.")

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(op, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Inside, tensors can be made on and moved to `meta`."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(op, args, kwargs or {})


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what was asked for, if all tensors are on one device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = any(isinstance(each, Away) for each in tensors)
    name = op._schema.name.removeprefix("aten::")
    moves = name in ("_to_copy", "copy_", "index_put_", "_index_put_impl_", "index")
    # A single number may come from the CPU; a place to look up, too.
    here = [t for t in tensors if not isinstance(t, Away) and t.ndim]
    if away and here and not moves:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got meta "
            "and cpu."
        )
    wanted = kwargs.get("device")
    if wanted is not None:
        away = torch.device(wanted).type == DEVICE.type
        kwargs = kwargs | ({"device": torch.device("cpu")} if away else {})
    elif name == "copy_":
        away = isinstance(args[0], Away)
    inner = tree_map(lambda x: x.inner if isinstance(x, Away) else x, (args, kwargs))
    result = op(*inner[0], **inner[1])
    if name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]
    if not away:
        return result
    return tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, result)
