"""What the library must know about an architecture: its layers and what can be thin."""

import difflib
from collections.abc import Callable, Iterable, Iterator

from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from drone.callers import warn
from drone.layers.attention import ATTENTION, attention_names
from drone.layers.linear import LowRankLinear, is_linear

# Subclasses of nn.Linear that write its forward anew and compute the same.
SAME_AS_LINEAR = ("FalconLinear",)
# How transformers collects hidden states and attentions: carried over, not refused.
CAPTURING = "output_capturing_hook"
MERGE = "merge the adapter first: model.merge_and_unload()"


class SkippedModuleWarning(UserWarning):
    """Some Linear is left out of the defaults, because it cannot be replaced."""


# --- the layers, found by structure ------------------------------------------------


def as_names(names: str | Iterable[str] | None) -> list[str] | None:
    """Return names as a list, one alone too; None, they are to be found, stays None.

    >>> as_names("encoder.layer")
    ['encoder.layer']
    """
    if names is None:
        return None
    return [names] if isinstance(names, str) else list(names)


def encoder_layers(
    model: nn.Module, layers: str | Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """Name the layers of all towers of a model, in the order they were built.

    The layers are what stands in its outermost `nn.ModuleList`s of blocks, a block
    being a module with parts, a Linear among them: BERT's `encoder.layer`, LLaMA's
    `layers`, T5's `encoder.block` and `decoder.block`. Where there is none, what
    stands in an `nn.Sequential` or `nn.ModuleDict` of blocks counts, and last what
    stands in such a container of bare Linears. A list in a list is taken apart.

    Args:
        model: any module.
        layers: names of the lists that count instead.

    Raises:
        ValueError: nothing is built so; a name of `layers` is none of a container.

    >>> list(encoder_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    ['0', '1']
    """
    lists = as_names(layers)
    if lists is None:
        lists = _lists(model)
    else:
        for name in lists:
            if not isinstance(module_named(model, name), _CONTAINERS):
                raise ValueError(
                    f"layers: {name} is a {type(module_named(model, name)).__name__}; "
                    "a ModuleList, ModuleDict or Sequential is needed."
                )
    return {
        name: layer
        for each in lists
        for name, layer in _flat(each, module_named(model, each))
    }


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _has_linear(module: nn.Module) -> bool:
    return any(is_linear(m) or isinstance(m, LowRankLinear) for m in module.modules())


def _is_block(module: nn.Module) -> bool:
    """Whether a module has parts, a Linear among them."""
    parts = [m for child in module.children() for m in child.modules()]
    return any(is_linear(m) or isinstance(m, LowRankLinear) for m in parts)


def _lists(model: nn.Module) -> list[str]:
    """Names of the outermost containers of layers; see `encoder_layers`."""
    # In this order, so that a head built as a Sequential is no layer of a BERT.
    rules: list[tuple[tuple[type, ...], Callable[[nn.Module], bool]]] = [
        ((nn.ModuleList,), _is_block),
        ((nn.Sequential, nn.ModuleDict), _is_block),
        (_CONTAINERS, _has_linear),
    ]
    for kinds, holds in rules:
        found = list(_outermost("", model, kinds, holds))
        if found:
            return found
    linears = [name for name, m in model.named_modules() if is_linear(m)][:3]
    remedy = (
        f"name the modules yourself, such as {', '.join(linears)}."
        if linears
        else "and no Linear outside of one: there is nothing to compress."
    )
    raise ValueError(
        f"{type(model).__name__} has no list of layers with a Linear in it; {remedy}"
    )


def _outermost(
    name: str,
    module: nn.Module,
    kinds: tuple[type, ...],
    holds: Callable[[nn.Module], bool],
) -> Iterator[str]:
    if isinstance(module, kinds) and any(map(holds, module.children())):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _outermost(f"{name}.{child_name}".strip("."), child, kinds, holds)


def _flat(name: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what stands in a list, and in the lists that stand in it."""
    for child_name, child in container.named_children():
        full = f"{name}.{child_name}".strip(".")
        if isinstance(child, nn.ModuleList):
            yield from _flat(full, child)
        else:
            yield full, child


# --- what can be replaced ------------------------------------------------------------


def encoder_linears(
    model: nn.Module, layers: str | Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """Name every Linear (or Conv1D) of a model's layers, in the order of the layers.

    A pooler and the task's head are not among them: they see one token a sentence and
    cost next to nothing. What cannot be replaced, an adapter for one, is left out with
    a `SkippedModuleWarning`. A module that stands in several places comes once.

    Args:
        model: any module.
        layers: as in `encoder_layers`.

    Raises:
        ValueError: the model has no layers, or they have no Linear that can be
            replaced.
    """
    linears: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    seen: set[nn.Module] = set()
    for prefix, layer in encoder_layers(model, layers).items():
        for name, module in layer.named_modules(prefix=prefix):
            if not is_linear(module) or module in seen:
                continue
            seen.add(module)
            reason = why_not(model, name) or _never_called(model, name)
            if reason is None:
                linears[name] = module
            else:
                refused[name] = reason
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        text = f"{name}{more}: {reason}."
        if not linears:
            raise ValueError(text)
        warn(f"left out: {text}", SkippedModuleWarning)
    if not linears:
        raise ValueError(f"{type(model).__name__}: no Linear in the encoder's layers.")
    return linears


def _never_called(model: nn.Module, name: str) -> str | None:
    """Say why a Linear never sees an input; None: it does."""
    parent, _, own = name.rpartition(".")
    if own == "out_proj" and isinstance(
        module_named(model, parent), nn.MultiheadAttention
    ):
        return (
            "nn.MultiheadAttention multiplies with its weight and never calls it, so "
            "that its inputs cannot be seen; by name, plain SVD can replace it"
        )
    return None


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name the self-attention blocks that can be compressed, in network order.

    Those of a decoder, which look only back, are not among them.

    Raises:
        ValueError: there are none; the message names the families that are known.
    """
    blocks = known_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no attention block of a known kind: "
            f"{', '.join(ATTENTION)}."
        )
    return blocks


def known_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name the blocks of `attention_blocks`; empty where there are none."""
    return {
        name: module
        for name, module in model.named_modules()
        if attention_names(module) is not None
        and not getattr(module, "is_decoder", False)
        and not getattr(module, "is_causal", False)
    }


def why_not(model: nn.Module, name: str) -> str | None:
    """Say why a Linear or a block cannot be replaced, and what to do; None: it can.

    A thin module computes W x + b and nothing else. Whatever would be lost with the
    dense one, an adapter, a hook, a forward of its own, is a reason.
    """
    module = module_named(model, name)
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        above = ".".join(parts[:end])
        if _is_adapter(module_named(model, above)):
            return f"{above} is an adapter ({type(module).__name__}); {MERGE}"
    if parametrize.is_parametrized(module):
        return (
            "its weight is computed by a parametrization; call "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
        )
    if "forward" in vars(module):
        return (
            "its forward was replaced on the instance; undo that first (accelerate: "
            "accelerate.hooks.remove_hook_from_submodules(model))"
        )
    hooks = {
        getattr(hook, "__name__", type(hook).__name__)
        for kind in ("forward_pre", "forward", "backward_pre", "backward")
        for hook in getattr(module, f"_{kind}_hooks").values()
    } - {CAPTURING}
    if hooks:
        return (
            f"it has hooks ({', '.join(sorted(hooks))}) that its replacement would not "
            "run; remove them first (handle.remove(), "
            "torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)"
        )
    if is_linear(module) and not _plain(module):
        kind = type(module).__name__
        return (
            f"a {kind} has a forward of its own, which a LowRankLinear would not run; "
            "put a plain nn.Linear that computes the same in its place first"
        )
    return None


def _plain(linear: nn.Module) -> bool:
    """Whether a Linear or Conv1D computes what its class says, no more."""
    return (
        type(linear).forward in (nn.Linear.forward, Conv1D.forward)
        or type(linear).__name__ in SAME_AS_LINEAR
    )


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module is PEFT's, or built like it: a base layer and what is added."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return "BaseTunerLayer" in kinds or "base_layer" in module._modules


# --- modules by name -----------------------------------------------------------------


def module_named(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that name; any of its names, if it stands in several places.

    Raises:
        ValueError: the model has none; the message names those that are near.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        pass  # which part of the name is wrong does not help; near names do
    linears = [n for n, m in model.named_modules() if is_linear(m)]
    near = difflib.get_close_matches(name, linears, n=3) or linears[:3]
    raise ValueError(
        f"the model has no module {name!r}; its Linear layers are named like "
        f"{', '.join(near)}."
    )


def names_of(model: nn.Module, module: nn.Module) -> list[str]:
    """All names under which a module stands in a model."""
    every = model.named_modules(remove_duplicate=False)
    return [name for name, each in every if each is module]


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the named one, wherever that stands in the model.

    >>> shared = nn.Linear(2, 2)
    >>> model = nn.Sequential(shared, nn.ReLU(), shared)
    >>> swap(model, "0", nn.Identity())
    >>> type(model[2]).__name__
    'Identity'
    """
    for each in names_of(model, module_named(model, name)):
        model.set_submodule(each, new)
