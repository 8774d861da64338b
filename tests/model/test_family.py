"""Gradients against autograd a row, each relative against its own optimum, the verb."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import drone
from drone.model.family import (
    ASVD,
    DRONE,
    FWSVD,
    SVD,
    BothSides,
    Relative,
    WeightedInputs,
    factorize_relative,
)
from drone.model.gradients import calibrate_gradients

NAME = "bert.encoder.layer.0.intermediate.dense"
RELATIVES: list[Relative] = [
    SVD(),
    DRONE(),
    ASVD(),
    ASVD(1.0),
    FWSVD(),
    BothSides(),
    WeightedInputs(),
]


def rows() -> list[dict[str, Tensor]]:
    lengths = [9, 5, 2, 7]
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 100, (4, 9)) * mask
    whole = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    return [{k: v[:3] for k, v in whole.items()}, {k: v[3:] for k, v in whole.items()}]


def one_by_one(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same rows, alone and without pads."""
    alone = []
    for batch in batches:
        for r, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone.append(
                {
                    "input_ids": batch["input_ids"][r : r + 1, :length],
                    "attention_mask": batch["attention_mask"][r : r + 1, :length],
                    "labels": batch["labels"][r : r + 1],
                }
            )
    return alone


def test_sums_are_those_of_autograd_row_by_row(tiny_bert: PreTrainedModel) -> None:
    batches = rows()
    found = calibrate_gradients(tiny_bert, batches, [NAME])[NAME]
    tiny_bert.eval()
    module = tiny_bert.get_submodule(NAME)
    assert isinstance(module, nn.Linear)
    outputs, inputs = torch.zeros(64, 64), torch.zeros(32, 32)
    fisher = torch.zeros(64)
    seen: dict[str, Tensor] = {}

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.update(x=args[0], y=output)

    handle = module.register_forward_hook(note)
    for row in one_by_one(batches):
        tiny_bert.zero_grad()
        tiny_bert(**row).loss.backward()
        assert module.weight.grad is not None
        gradient = seen["y"].grad
        assert gradient is not None
        x, g = seen["x"].detach()[0], gradient[0]
        fisher += module.weight.grad.square().sum(1)
        outputs += g.T @ g
        inputs += (x * g.square().sum(1, keepdim=True)).T @ x
    handle.remove()
    for ours, right in [
        (found.fisher, fisher),
        (found.outputs.matrix, outputs),
        (found.inputs.matrix, inputs),
    ]:
        assert torch.allclose(ours.float(), right, rtol=2e-4, atol=1e-5 * right.max())


def test_the_model_is_left_as_it_was(tiny_bert: PreTrainedModel) -> None:
    tiny_bert.train()
    tiny_bert.get_submodule(NAME).requires_grad_(False)
    before = [p.requires_grad for p in tiny_bert.parameters()]
    calibrate_gradients(tiny_bert, rows(), [NAME])
    assert [p.requires_grad for p in tiny_bert.parameters()] == before
    assert all(p.grad is None for p in tiny_bert.parameters())
    assert tiny_bert.training
    assert not tiny_bert.get_submodule(NAME)._forward_hooks


@pytest.mark.parametrize("relative", RELATIVES, ids=str)
def test_each_is_the_best_of_its_own_weights(
    tiny_bert: PreTrainedModel, relative: Relative
) -> None:
    """By its own measure none of the others is better, at any rank."""
    batches = rows()
    moment = drone.calibrate(tiny_bert, batches, [NAME])[NAME]
    found = calibrate_gradients(tiny_bert, batches, [NAME])[NAME]
    right, left = relative.weights(moment, found)
    c = getattr(right, "matrix", torch.eye(32) if right is None else right).double()
    g = getattr(left, "matrix", torch.ones(64) if left is None else left).double()
    g = torch.diag(g) if g.ndim == 1 else g
    module = tiny_bert.get_submodule(NAME)
    assert isinstance(module, nn.Linear)
    weight = module.weight.detach().double()

    def measured(other: Relative, rank: int) -> float:
        factors = factorize_relative(tiny_bert, [NAME], other, batches)[NAME]
        difference = weight - (factors.left[:, :rank] @ factors.right[:rank])
        return float(torch.trace(g @ difference @ c @ difference.T).clamp_min(0))

    total = float(torch.trace(g @ weight @ c @ weight.T))
    for rank in (1, 4):
        own = measured(relative, rank)
        assert all(
            own <= measured(other, rank) + 1e-9 * total
            for other in RELATIVES
            if other != relative
        )


@pytest.mark.parametrize("relative", RELATIVES, ids=str)
def test_the_verb_takes_each(tiny_bert: PreTrainedModel, relative: Relative) -> None:
    batches = rows()
    small = drone.compress(tiny_bert, 0.5, batches=batches, relative=relative)
    assert small.compressed.kept <= 0.5
    assert small.compressed.asked == f"a share of 0.5 by {relative}"
    same = drone.compress(tiny_bert, {NAME: 5}, batches=batches, relative=relative)
    left, right = factorize_relative(tiny_bert, [NAME], relative, batches)[
        NAME
    ].truncate(5)
    assert torch.equal(same.get_submodule(NAME).left, left)
    assert torch.equal(same.get_submodule(NAME).right, right)


def test_drone_by_its_own_name_is_the_default(tiny_bert: PreTrainedModel) -> None:
    batches = rows()
    one = drone.compress(tiny_bert, 8, batches=batches, relative=DRONE())
    other = drone.compress(tiny_bert, 8, batches=batches)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_it_cannot_do_is_said(tiny_bert: PreTrainedModel) -> None:
    batches = rows()
    with pytest.raises(ValueError, match="factorizes by itself"):
        drone.compress(tiny_bert, speedup=1.5, batches=batches, relative=FWSVD())
    with pytest.raises(ValueError, match="needs batches"):
        drone.compress(tiny_bert, 0.5, relative=FWSVD())
    with pytest.raises(ValueError, match="has no labels"):
        unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
        drone.compress(tiny_bert, 0.5, batches=unlabelled, relative=FWSVD())
    with pytest.raises(ValueError, match="knows Linears only"):
        block = "bert.encoder.layer.0.attention.self"
        drone.compress(tiny_bert, {block: 2}, batches=batches, relative=FWSVD())
    with pytest.raises(ValueError, match="alpha is 2"):
        ASVD(2)
    with pytest.raises(ValueError, match="leave out loss"):
        drone.compress(
            tiny_bert,
            0.5,
            batches=batches,
            relative=ASVD(),
            loss=lambda model, batch: model(**batch).loss,
        )
    with pytest.raises(ValueError, match="your ranks have chosen"):
        drone.compress(
            tiny_bert,
            {NAME: 4},
            batches=batches,
            relative=ASVD(),
            filter=lambda name, module: True,
        )


def test_an_axis_that_may_not_be_the_rows_is_refused() -> None:
    """XLNet has tokens first: a Fisher information over that axis would be wrong."""
    sizes = {"vocab_size": 100, "d_model": 32, "n_layer": 1, "n_head": 4}
    xlnet = XLNetForSequenceClassification(XLNetConfig(**sizes, d_inner=48))
    with pytest.raises(ValueError, match=r"layer_1, batch 0.*with 3 rows"):
        calibrate_gradients(xlnet, rows(), ["transformer.layer.0.ff.layer_1"])
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=32, num_attention_heads=4)
    )
    square = {
        "input_ids": torch.randint(5, 100, (6, 6)),
        "labels": torch.ones(6).long(),
    }
    square["attention_mask"] = torch.ones_like(square["input_ids"])
    with pytest.raises(ValueError, match="another number of tokens"):
        calibrate_gradients(bert, [square], ["bert.encoder.layer.0.output.dense"])


def test_an_input_may_go_by_its_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(input=x)
            return out

    batch = {"x": torch.ones(4, 3), "labels": torch.ones(4)}
    found = calibrate_gradients(
        Model(), [batch], ["inner"], lambda m, b: m(b["x"]).square().mean()
    )
    assert found["inner"].inputs.count == 4


def test_a_module_that_the_loss_does_not_reach_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    batch = {"x": torch.ones(4, 3), "labels": torch.ones(4)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        mean: Tensor = model(batch["x"]).square().mean()
        return mean

    with pytest.raises(ValueError, match="unused: the loss of batch 0 does not"):
        calibrate_gradients(Model(), [batch], ["used", "unused"], loss)


def test_a_module_that_runs_twice_is_named() -> None:
    layer = nn.Linear(3, 3)
    batch = {"input": torch.ones(4, 3), "labels": torch.ones(4)}
    with pytest.raises(ValueError, match="0: runs twice"):
        calibrate_gradients(
            nn.Sequential(layer, layer),
            [batch],
            ["0"],
            lambda model, batch: model(batch["input"]).mean(),
        )
