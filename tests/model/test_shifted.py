"""The dense model beside its copy: what a layer gets, and what it is to give."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import drone
from drone.math.factorize import factorize
from drone.math.moments import SecondMoment
from drone.math.shifted import factorize_shifted
from drone.model.compress import compress
from drone.model.family import SharedBasis, Shifted

LAYER = "bert.encoder.layer"
FIRST, THEN = f"{LAYER}.0.intermediate.dense", f"{LAYER}.1.output.dense"
INSIDE = f"{LAYER}.0.output.dense"  # of the same layer as FIRST
RANKS = {FIRST: 4, INSIDE: 5, THEN: 3}


def batches() -> list[dict[str, Tensor]]:
    mask = (torch.arange(9) < torch.tensor([9, 5, 2, 7])[:, None]).long()
    ids = torch.randint(5, 100, (4, 9)) * mask
    whole = {"input_ids": ids, "attention_mask": mask}
    return [{k: v[:3] for k, v in whole.items()}, {k: v[3:] for k, v in whole.items()}]


def inputs(model: nn.Module, name: str, rows: list[dict[str, Tensor]]) -> Tensor:
    """What a module gets, without pads, (tokens, in)."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0].detach())
    )
    model.eval()
    for row in rows:
        model(**row)
    handle.remove()
    pairs = zip(found, rows, strict=True)
    return torch.cat([x[row["attention_mask"].bool()] for x, row in pairs]).double()


@pytest.mark.parametrize("relative", [Shifted(ridge=0.0), Shifted(0.5, 0.01)])
def test_each_is_fitted_to_what_it_gets_and_what_it_gave(
    tiny_bert: PreTrainedModel, relative: Shifted
) -> None:
    rows = batches()
    small = drone.compress(tiny_bert, RANKS, batches=rows, relative=relative)
    assert small.compressed.asked == f"given ranks by {relative}"
    for name in RANKS:
        # up to this module the copy is as it was when the module was replaced
        x, now = inputs(tiny_bert, name, rows), inputs(small, name, rows)
        assert torch.equal(x, now) == (name == FIRST)
        pairs = SecondMoment(2 * x.shape[1])
        pairs.update(torch.cat([x, now], 1))
        weight = tiny_bert.get_submodule(name).weight
        best = factorize_shifted(weight, pairs, relative.anchor, relative.ridge)
        left, right = best.truncate(RANKS[name])
        made = small.get_submodule(name).dense_weight
        assert torch.allclose(made, left @ right, rtol=1e-3, atol=1e-5)


def test_its_outputs_count_as_the_loss_of_the_dense_model_feels_them(
    tiny_bert: PreTrainedModel,
) -> None:
    plain = batches()
    rows = [b | {"labels": torch.arange(len(b["input_ids"])) % 2} for b in plain]
    felt = drone.model.gradients.calibrate_gradients(tiny_bert, rows, RANKS)
    small = drone.compress(
        tiny_bert, RANKS, batches=rows, relative=Shifted(1.0, 0.01, gradients=True)
    )
    for name in RANKS:
        x, now = inputs(tiny_bert, name, plain), inputs(small, name, plain)
        pairs = SecondMoment(2 * x.shape[1])
        pairs.update(torch.cat([x, now], 1))
        weight = tiny_bert.get_submodule(name).weight
        best = factorize_shifted(weight, pairs, 1.0, 0.01, felt[name].outputs)
        left, right = best.truncate(RANKS[name])
        made = small.get_submodule(name).dense_weight
        assert torch.allclose(made, left @ right, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="no labels"):
        drone.compress(
            tiny_bert, RANKS, batches=plain, relative=Shifted(gradients=True)
        )
    weighed = {name: each.outputs for name, each in felt.items()}
    for relative, given, said in [
        (Shifted(gradients=True), None, "go together"),
        (Shifted(), weighed, "go together"),
        (Shifted(gradients=True), {FIRST: weighed[FIRST]}, f"rows lack {INSIDE}, "),
    ]:
        how = {"sequential": True, "shifted": relative, "rows": given}
        with pytest.raises(ValueError, match=said):
            compress(tiny_bert, RANKS, batches=rows, **how)


def test_without_an_anchor_it_is_the_papers_order(tiny_bert: PreTrainedModel) -> None:
    rows = batches()
    ours = drone.compress(
        tiny_bert, RANKS, batches=rows, relative=Shifted(anchor=0.0, ridge=0.0)
    )
    paper = drone.compress(tiny_bert, RANKS, batches=rows, sequential=True)
    for name in RANKS:
        made = [m.get_submodule(name).dense_weight for m in (ours, paper)]
        assert torch.allclose(*made, rtol=1e-3, atol=1e-5)


def test_the_verb_takes_a_share_and_says_what_it_cannot(
    tiny_bert: PreTrainedModel,
) -> None:
    rows = batches()
    small = drone.compress(tiny_bert, 0.5, batches=rows, relative=Shifted())
    assert small.compressed.kept <= 0.5
    assert not tiny_bert.get_submodule(FIRST)._forward_pre_hooks
    with pytest.raises(ValueError, match="needs batches"):
        drone.compress(tiny_bert, 0.5, relative=Shifted())
    with pytest.raises(ValueError, match="knows Linears only"):
        block = f"{LAYER}.0.attention.self"
        drone.compress(tiny_bert, {block: 2}, batches=rows, relative=Shifted())
    with pytest.raises(ValueError, match="goes with sequential"):
        compress(tiny_bert, RANKS, shifted=Shifted())
    with pytest.raises(ValueError, match="anchor is 2"):
        Shifted(2)


def test_neighbours_share_one_tensor(tiny_bert: PreTrainedModel) -> None:
    rows, relative = batches(), SharedBasis(2)
    names = [f"{LAYER}.{n}.output.dense" for n in (0, 1)]
    small = drone.compress(
        tiny_bert, dict.fromkeys(names, 6), batches=rows, relative=relative
    )
    first, second = (small.get_submodule(name) for name in names)
    assert first.right is second.right
    # and it is the best for the stacked weights on all of their inputs
    x = torch.cat([inputs(tiny_bert, name, rows) for name in names])
    weights = [tiny_bert.get_submodule(name).weight for name in names]
    best = factorize(torch.cat([w.double() for w in weights]), x.T @ x)
    lost = sum(
        float(((w.double() - m.dense_weight.double()) @ x.T).square().sum())
        for w, m in zip(weights, (first, second), strict=True)
    )
    assert lost == pytest.approx(float(best.errors[6]) ** 2, rel=1e-4)
    ranks, alone = dict.fromkeys(names, 6), drone.family.DRONE()
    thin = drone.compress(tiny_bert, ranks, batches=rows, relative=alone)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (thin, small)]
    assert sizes[0] - sizes[1] == first.right.numel()


def test_a_shared_basis_has_one_rank_and_several_layers(
    tiny_bert: PreTrainedModel,
) -> None:
    names = [f"{LAYER}.{n}.output.dense" for n in (0, 1)]
    with pytest.raises(ValueError, match="one basis, and several ranks"):
        drone.compress(
            tiny_bert,
            dict(zip(names, (3, 4), strict=True)),
            batches=batches(),
            relative=SharedBasis(2),
        )
    with pytest.raises(ValueError, match="at least 2"):
        SharedBasis(1)
