"""What the library must know about an architecture: its layers and attention blocks."""

import difflib

from torch import nn

from drone.layers.attention import ATTENTION

# Where a model's layers are: a list of them whose name ends so.
LAYER_LISTS = ("encoder.layer", "transformer.layer", "stack")


def encoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name the layers of an encoder or an LSTM language model, in network order.

    Raises:
        ValueError: the model is not built like BERT, RoBERTa, MPNet, DistilBERT or
            `drone.LSTMLanguageModel`, with one of `LAYER_LISTS`.
    """
    for name, module in model.named_modules():
        ends = [f".{name}".endswith(f".{each}") for each in LAYER_LISTS]
        if isinstance(module, nn.ModuleList) and any(ends):
            return {f"{name}.{i}": layer for i, layer in enumerate(module)}
    raise ValueError(
        f"{type(model).__name__} has no list {', '.join(LAYER_LISTS)}; name the "
        "modules yourself."
    )


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name every `nn.Linear` of a model's layers, in network order.

    The pooler and the task's head are not part of the encoder: they see one token a
    sentence and cost next to nothing.

    Raises:
        ValueError: the model has no encoder layers, or they have no Linear.
    """
    linears = {
        f"{prefix}.{name}": module
        for prefix, layer in encoder_layers(model).items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not linears:
        raise ValueError(f"{type(model).__name__}: no Linear in the encoder's layers.")
    return linears


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name the self-attention blocks that can be compressed, in network order.

    Raises:
        ValueError: there are none; the message names the families that are known.
    """
    blocks = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ATTENTION
    }
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no attention block of a known kind: "
            f"{', '.join(ATTENTION)}."
        )
    return blocks


def module_named(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that name.

    Raises:
        ValueError: the model has none; the message names those that are near.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        near = difflib.get_close_matches(name, linears, n=3) or linears[:3]
        raise ValueError(
            f"the model has no module {name!r}; its Linear layers are named like "
            f"{', '.join(near)}."
        )
    return modules[name]
