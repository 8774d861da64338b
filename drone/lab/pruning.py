"""Whole heads and neurons removed: structured pruning, low rank's rival. Chapter 10.

Give each head and each neuron z a gate ξ = 1 that scales it. |∂L_b/∂ξ| = |Σ z ∂L_b/∂z|
says, to first order, what the loss of row b would feel without it (Molchanov et al.,
2017; Michel et al., 2019, for heads). Those with the least sum over rows go. Written
here because Torch-Pruning 1.6 finds no head in the BERT of transformers 5, and prunes
none without a word.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drone import progress
from drone.model.adapters import encoder_layers
from drone.model.calibrate import frozen
from drone.model.inputs import prepared
from drone.model.loss import LossFunction, loss_tensor

QUERY, KEY, VALUE = (f"attention.self.{n}" for n in ("query", "key", "value"))
MIXED, INTO, OUT = "attention.output.dense", "intermediate.dense", "output.dense"


class Importance(NamedTuple):
    """What the loss feels of one layer's parts, summed over rows.

    Attributes:
        heads: (heads,) float64.
        neurons: (neurons,) float64.
    """

    heads: Tensor
    neurons: Tensor


def importances(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: LossFunction | None = None,
) -> list[Importance]:
    """Sum |∂L_b/∂ξ| of every head and neuron over the rows b, one pass forth and back.

    Args:
        model: with layers built as BERT's; it is left as it was.
        batches: as in `drone.calibrate`, with labels; rows first.
        loss: as in `drone.model.gradients.calibrate_gradients`.

    Raises:
        ValueError: layers that are not BERT's, no batch, no labels.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    >>> config = BertConfig(vocab_size=50, num_attention_heads=4, **sizes)
    >>> model = BertForSequenceClassification(config)
    >>> batch = {"input_ids": torch.randint(5, 50, (8, 6)), "labels": torch.ones(8)}
    >>> batch["labels"] = batch["labels"].long()
    >>> (layer,) = importances(model, [batch])
    >>> tuple(layer.heads.shape), tuple(layer.neurons.shape)
    ((4,), (64,))
    """
    layers = _layers(model)
    sums = [
        Importance(
            torch.zeros(_heads(layer), dtype=torch.float64),
            torch.zeros(_linear(layer, OUT).in_features, dtype=torch.float64),
        )
        for layer in layers
    ]
    gates: dict[nn.Module, Tensor] = {}

    def gated(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]  # (rows, tokens, in)
        gates[module] = x.new_ones(len(x), 1, x.shape[-1]).requires_grad_()
        return (x * gates[module], *args[1:])

    watched = [layer.get_submodule(n) for layer in layers for n in (MIXED, OUT)]
    handles = [module.register_forward_pre_hook(gated) for module in watched]
    number = -1
    try:
        with frozen(model), torch.enable_grad():
            stream = prepared(batches, model)
            for number, batch in enumerate(progress.bar(stream, desc="importance")):
                value, count = loss_tensor(model, batch, number, loss)
                # of the sum of the rows' own losses: a gate belongs to one row
                wanted = [gates[module] for module in watched]
                found = torch.autograd.grad(value.float() * count, wanted)
                slopes = [each[:, 0].double().cpu() for each in found]  # (rows, in)
                for each, heads, neurons in zip(
                    sums, slopes[::2], slopes[1::2], strict=True
                ):
                    by_head = heads.reshape(len(heads), len(each.heads), -1).sum(2)
                    each.heads.add_(by_head.abs().sum(0))
                    each.neurons.add_(neurons.abs().sum(0))
    finally:
        for handle in handles:
            handle.remove()
    if number < 0:
        raise ValueError("no batch to judge heads by; at least one is needed.")
    return sums


def prune(model: nn.Module, share: float, found: Iterable[Importance]) -> nn.Module:
    """Return a copy whose layers keep this share of their weights, in whole parts.

    Every layer keeps the same share of heads, rounded, and as many neurons as fill it.

    Args:
        model: with layers built as BERT's; it is left as it was.
        share: of the weights of a layer's six Linears, in (0, 1].
        found: from `importances` of this model.

    Returns:
        The copy. Its `config` still has the dense sizes, so it is to be measured here,
        not saved.

    Raises:
        ValueError: layers that are not BERT's; a share out of range, or so small that
            a layer would keep no neuron.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    >>> model = BertModel(BertConfig(vocab_size=50, num_attention_heads=4, **sizes))
    >>> found = [Importance(torch.arange(4.0), torch.arange(64.0))]
    >>> layer = prune(model, 0.5, found).encoder.layer[0]
    >>> layer.attention.self.query.out_features, layer.output.dense.in_features
    (16, 32)
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; more than 0, at most 1 is needed.")
    small = copy.deepcopy(model)
    for layer, each in zip(_layers(small), found, strict=True):
        query = _linear(layer, QUERY)
        width, size = query.in_features, query.out_features // len(each.heads)
        heads = max(1, round(share * len(each.heads)))
        # a head has 4 · size · width weights, a neuron 2 · width
        whole = 4 * width * size * len(each.heads) + 2 * width * len(each.neurons)
        neurons = int((share * whole - 4 * width * size * heads) / (2 * width))
        if neurons < 1:
            raise ValueError(f"a share of {share} leaves a layer no neuron; give more.")
        best = each.heads.topk(heads).indices.sort().values
        kept = (best[:, None] * size + torch.arange(size)).flatten()
        for name in (QUERY, KEY, VALUE):
            _keep(layer, name, kept, 0)
        _keep(layer, MIXED, kept, 1)
        kept = each.neurons.topk(neurons).indices.sort().values
        _keep(layer, INTO, kept, 0)
        _keep(layer, OUT, kept, 1)
        block: Any = layer.get_submodule("attention.self")
        block.num_attention_heads, block.all_head_size = heads, heads * size
    return small


def _keep(layer: nn.Module, name: str, kept: Tensor, side: int) -> None:
    """Replace a Linear by its outputs (side 0) or inputs (side 1) of these numbers."""
    dense = _linear(layer, name)
    kept = kept.to(dense.weight.device)
    weight = dense.weight.detach().index_select(side, kept)
    thin = nn.Linear(weight.shape[1], weight.shape[0], dense.bias is not None)
    thin.weight = nn.Parameter(weight)
    if dense.bias is not None:
        bias = dense.bias.detach()
        thin.bias = nn.Parameter(bias[kept] if side == 0 else bias.clone())
    layer.set_submodule(name, thin.train(dense.training))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The encoder's layers; refuse what is not built as BERT's."""
    found = encoder_layers(model)
    for name, layer in found.items():
        for part in (QUERY, KEY, VALUE, MIXED, INTO, OUT):
            try:
                _linear(layer, part)
            except AttributeError as error:
                raise ValueError(
                    f"{name}: no {part}; layers built as BERT's are needed."
                ) from error
            except TypeError as error:
                raise ValueError(f"{name}.{part}: {error}") from error
    return list(found.values())


def _linear(layer: nn.Module, part: str) -> nn.Linear:
    """A layer's Linear of that name."""
    module = layer.get_submodule(part)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"a {type(module).__name__}; dense Linears are needed.")
    return module


def _heads(layer: nn.Module) -> int:
    """How many heads a layer's attention has."""
    block: Any = layer.get_submodule("attention.self")
    return int(block.num_attention_heads)
