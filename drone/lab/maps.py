"""Where tokens look: attention maps of a model, and how far two of them differ."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drone.model.calibrate import frozen


def attention_maps(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the attention of every head: (layers, batch, heads, length, length).

    Row i of a map says how token i shares its attention out; pads get none. A fused
    kernel keeps no maps, so the model computes them step by step for this call.

    Args:
        model: an encoder, dense or compressed; it is left as it was.
        batch: keyword arguments of the model, without labels.
    """
    fused = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with frozen(model):
            found = model(**batch, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(fused)
    return torch.stack(found)


def moved(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Share of each head's attention that goes to another token than before.

    The total variation ½ Σ_j |p_ij - p̂_ij|, averaged over the real tokens i.

    Args:
        before: maps, (layers, batch, heads, length, length).
        after: maps of another model on the same batch.
        mask: (batch, length), 1 at real tokens.

    Returns:
        (layers, heads), each from 0 to 1.
    """
    shares = (before - after).abs().sum(-1) / 2  # (layers, batch, heads, length)
    return _mean_over_tokens(shares, mask)


def share_on(maps: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Share of each head's attention that goes to some tokens.

    Args:
        maps: (layers, batch, heads, length, length).
        targets: (batch, length, length) bool, entry ij: is j a target for i? Only
            tokens i that have one count.
        mask: (batch, length), 1 at real tokens.

    Returns:
        (layers, heads), each from 0 to 1.
    """
    shares = (maps * targets[None, :, None]).sum(-1)
    return _mean_over_tokens(shares, mask.bool() & targets.any(-1))


def same_word(batch: Mapping[str, Tensor], special: Tensor) -> Tensor:
    """Mark the same word in the other sentence of a pair: (batch, length, length) bool.

    Args:
        batch: tokenized pairs, with `token_type_ids`.
        special: ids that are no words, such as pads and separators.
    """
    ids, sentence = batch["input_ids"], batch["token_type_ids"]
    word = ~torch.isin(ids, special)
    same = ids[:, :, None] == ids[:, None, :]
    other = sentence[:, :, None] != sentence[:, None, :]
    return same & other & word[:, :, None]


def _mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(layers, batch, heads, length) → (layers, heads), over the tokens of a mask."""
    weight = mask.to(values.dtype)[None, :, None]
    return (values * weight).sum((1, 3)) / weight.sum()
