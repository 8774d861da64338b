"""The lean training loop against a plain one, and against Trainer's schedule."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from drone.lab import loop
from drone.lab.parts import Rows
from drone.lab.training import Recipe


def make_rows(count: int = 50, seed: int = 0) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=draw)
    lengths[0] = 12
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 100, (count, 12), generator=draw) * mask + (1 - mask)
    labels = torch.randint(0, 2, (count,), generator=draw)
    return Rows({"input_ids": ids, "attention_mask": mask}, lengths, labels)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "bfloat16_gains", lambda: False)


def test_every_row_is_in_one_batch_with_rows_of_its_length() -> None:
    lengths = torch.randint(3, 100, (1000,))
    draw = torch.Generator().manual_seed(1)
    batches = loop.shuffled_batches(lengths, 16, draw)
    assert sorted(torch.cat(batches).tolist()) == list(range(1000))
    assert max(map(len, batches)) == 16
    pads = sum(int((lengths[b].max() - lengths[b]).sum()) for b in batches)
    assert pads < 0.1 * lengths.sum()
    ordered = [int(lengths[b].max()) for b in batches]
    assert ordered != sorted(ordered)  # the batches themselves are shuffled


def test_batches_depend_on_the_seed_alone() -> None:
    lengths = torch.randint(3, 100, (200,))

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [b.tolist() for b in loop.shuffled_batches(lengths, 8, generator)]

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 3), (1, 0), (7, 7)])
def test_the_rate_is_that_of_transformers_schedule(steps: int, warmup: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        ours = loop.rate_factor(step, steps, warmup)
        assert ours == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_it_does_what_adamw_and_the_schedule_say(tiny_bert: PreTrainedModel) -> None:
    rows, recipe = make_rows(), Recipe(epochs=3, batch_size=8, learning_rate=1e-2)
    tiny_bert.config.hidden_dropout_prob = 0.0
    for module in tiny_bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, ours = copy.deepcopy(tiny_bert), copy.deepcopy(tiny_bert)
    loop.train(ours, rows, rows.labels, loop.task_loss, recipe, seed=3)

    # a reference as one would write it on a blackboard
    flat = [p for n, p in plain.named_parameters() if n.endswith("bias") or "Norm" in n]
    full = [p for p in plain.parameters() if all(p is not q for q in flat)]
    groups = [
        {"params": full, "weight_decay": 0.01},
        {"params": flat, "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False, fused=False)
    draw = torch.Generator().manual_seed(3)
    epochs = [loop.shuffled_batches(rows.lengths, 8, draw) for _ in range(3)]
    steps = sum(map(len, epochs))
    warmup = round(0.1 * steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    plain.train()
    for batches in epochs:
        for batch in batches:
            optimizer.zero_grad()
            logits = plain(**{k: v[batch] for k, v in rows.inputs.items()}).logits
            F.cross_entropy(logits, rows.labels[batch]).backward()
            norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
            for p in plain.parameters():
                p.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
            optimizer.step()
            schedule.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if name.endswith("key.bias"):
            continue  # a softmax does not see it: its gradient is rounding alone
        assert torch.allclose(a, b, atol=2e-5), name
    assert not ours.training


def test_the_same_seed_gives_the_same_weights(tiny_bert: PreTrainedModel) -> None:
    rows, recipe = make_rows(), Recipe(epochs=1, batch_size=8, learning_rate=1e-3)
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(tiny_bert)
        loop.train(model, rows, rows.labels, loop.task_loss, recipe, seed)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own


def test_logits_come_in_the_order_of_the_rows(tiny_bert: PreTrainedModel) -> None:
    rows = make_rows(20)
    found = loop.logits_of(tiny_bert, rows, size=3)
    for i, length in enumerate(rows.lengths.tolist()):
        alone = {k: v[i : i + 1, :length] for k, v in rows.inputs.items()}
        with torch.no_grad():
            assert torch.allclose(found[i], tiny_bert(**alone).logits[0], atol=1e-5)


def test_one_output_is_a_regression() -> None:
    logits, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0])
    assert loop.task_loss(logits, labels) == 2.0


def test_rows_and_targets_must_be_as_many(tiny_bert: PreTrainedModel) -> None:
    rows = make_rows(20)
    with pytest.raises(ValueError, match="20 rows and 19 targets"):
        loop.train(tiny_bert, rows, rows.labels[1:], loop.task_loss, Recipe(), 0)
