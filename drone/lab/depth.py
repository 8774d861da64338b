"""Smaller dense models: some of an encoder's layers."""

import copy
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from drone.model.adapters import encoder_layers


def only_layers(model: PreTrainedModel, numbers: Iterable[int]) -> PreTrainedModel:
    """Return a copy that keeps these encoder layers, in their order.

    Args:
        model: an encoder with a list of layers; it is left as it was.
        numbers: of the layers kept, from 0.

    Raises:
        ValueError: no number, one twice, or one that the model has no layer for.
    """
    kept = sorted(numbers)
    small = copy.deepcopy(model)
    layers = encoder_layers(small)
    if not kept or len(set(kept)) < len(kept) or not set(kept) <= {*range(len(layers))}:
        raise ValueError(
            f"layers {kept}; different ones from 0 to {len(layers) - 1} are needed."
        )
    where = next(iter(layers)).rpartition(".")[0]
    whole = small.get_submodule(where)
    fewer = nn.ModuleList([list(layers.values())[number] for number in kept])
    fewer.training = whole.training  # a new list starts in training mode
    small.set_submodule(where, fewer)
    small.config.num_hidden_layers = len(kept)
    return small


def first_layers(layers: int, count: int) -> list[int]:
    """Name the first `count` of so many layers.

    >>> first_layers(12, 4)
    [0, 1, 2, 3]
    """
    return list(range(count))


def alternate_layers(layers: int, count: int) -> list[int]:
    """Name `count` of so many layers, evenly spread, the first and last among them.

    >>> alternate_layers(12, 6)
    [0, 2, 4, 7, 9, 11]
    """
    if count == 1:
        return [0]
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]
