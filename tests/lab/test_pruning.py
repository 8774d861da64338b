"""Heads and neurons: importance by finite differences, removal against zeroed parts."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone import compress
from drone.lab.pruning import MIXED, OUT, Importance, importances, prune

LAYER = "bert.encoder.layer"
Task = Callable[..., list[dict[str, Tensor]]]


def rows(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss of each row, alone and without its pads, float64."""
    losses = []
    for number in range(len(batch["input_ids"])):
        mask = batch["attention_mask"][number].bool()
        row = {"input_ids": batch["input_ids"][number][mask][None]}
        losses.append(model(**row, labels=batch["labels"][number, None]).loss)
    return losses


def scaled(module: nn.Module, columns: Sequence[int], factor: float) -> ExitStack:
    """Scale some inputs of a module inside."""
    stack = ExitStack()

    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., list(columns)] *= factor
        return (x,)

    stack.callback(module.register_forward_pre_hook(hook).remove)
    return stack


def test_importance_is_the_slope_of_each_rows_loss(
    tiny_bert: PreTrainedModel, task: Task
) -> None:
    model = tiny_bert.double().eval()
    batches = task(model)
    found = importances(model, batches)
    heads = model.config.num_attention_heads
    size = model.config.hidden_size // heads
    step = 1e-5
    with torch.no_grad():
        for layer, head in [(0, 1), (1, 0)]:
            mixed = model.get_submodule(f"{LAYER}.{layer}.{MIXED}")
            columns = range(head * size, (head + 1) * size)
            losses = {}
            for factor in (1 - step, 1 + step):
                with scaled(mixed, columns, factor):
                    every = [loss for b in batches for loss in rows(model, b)]
                    losses[factor] = torch.stack(every)
            slope = (losses[1 + step] - losses[1 - step]) / (2 * step)
            wanted = float(slope.abs().sum())
            assert float(found[layer].heads[head]) == pytest.approx(wanted, rel=1e-4)
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_pruned_model_is_the_dense_one_with_parts_at_zero(
    tiny_bert: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    model = tiny_bert.eval()
    heads, neurons = model.config.num_attention_heads, model.config.intermediate_size
    size = model.config.hidden_size // heads
    found = [
        Importance(torch.rand(heads).double(), torch.rand(neurons).double())
        for _ in range(model.config.num_hidden_layers)
    ]
    small = prune(model, 0.5, found)
    with ExitStack() as stack, torch.no_grad():
        for number, each in enumerate(found):
            layer = model.get_submodule(f"{LAYER}.{number}")
            thin = small.get_submodule(f"{LAYER}.{number}")
            left = thin.get_submodule(OUT).in_features
            gone = each.neurons.argsort()[: neurons - left].tolist()
            stack.enter_context(scaled(layer.get_submodule(OUT), gone, 0.0))
            left = thin.get_submodule(MIXED).in_features // size
            assert left == heads // 2
            lost = each.heads.argsort()[: heads - left].tolist()
            columns = [h * size + i for h in lost for i in range(size)]
            stack.enter_context(scaled(layer.get_submodule(MIXED), columns, 0.0))
        wanted = model(**padded_batch).logits
        assert torch.allclose(small(**padded_batch).logits, wanted, atol=1e-5)
    dense = model(**padded_batch).logits
    assert not torch.allclose(dense, wanted, atol=1e-3)  # the parts did something


@pytest.mark.parametrize("share", [0.4, 0.6, 1.0])
def test_it_has_the_share_it_was_asked_for(
    tiny_bert: PreTrainedModel, task: Task, share: float
) -> None:
    found = importances(tiny_bert, task(tiny_bert))
    small = prune(tiny_bert, share, found)
    sizes = [
        sum(
            w.weight.numel()
            for w in m.bert.encoder.modules()
            if isinstance(w, nn.Linear)
        )
        for m in (tiny_bert, small)
    ]
    most = 2 * tiny_bert.config.hidden_size * tiny_bert.config.num_hidden_layers
    assert 0 <= share * sizes[0] - sizes[1] < most  # less than a neuron a layer


def test_what_it_cannot_prune_is_said(
    tiny_bert: PreTrainedModel, tiny_distilbert: PreTrainedModel, task: Task
) -> None:
    batches = task(tiny_bert)
    with pytest.raises(ValueError, match=r"no attention\.self\.query; layers built as"):
        importances(tiny_distilbert, batches)
    thin = compress(tiny_bert, {f"{LAYER}.1.{OUT}": 4})
    with pytest.raises(ValueError, match=r"1\.output\.dense: a LowRankLinear; dense"):
        importances(thin, batches)
    with pytest.raises(ValueError, match="at least one is needed"):
        importances(tiny_bert, [])
    found = importances(tiny_bert, batches)
    for share in (0.0, 1.1, 0.05):
        with pytest.raises(ValueError, match="share"):
            prune(tiny_bert, share, found)
