"""Modules of a whole model replaced, on tiny models with random weights."""

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from drone import (
    AboveBreakEvenWarning,
    BrokenTieWarning,
    FewTokensWarning,
    LowRankLinear,
    LowRankSelfAttention,
    NothingReplacedWarning,
    SecondMoment,
    attention_blocks,
    calibrate,
    compress,
    encoder_linears,
    factorize,
    factorize_attention,
    factorize_modules,
    load,
    report,
    save,
)
from drone.layers.attention import ATTENTION
from drone.model.compress import compress as compress_ranks
from drone.model.family import Shifted
from drone.search.costs import Costs
from drone.search.goal import Goal
from drone.search.plan import RankPlan

Batch = dict[str, Tensor]


def full_ranks(model: nn.Module) -> dict[str, int]:
    return {
        name: min(linear.weight.shape)
        for name, linear in encoder_linears(model).items()
    }


def storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.fixture
def first(tiny_model: PreTrainedModel) -> str:
    """Name of the first encoder Linear: 32×32, break-even 15."""
    return next(iter(encoder_linears(tiny_model)))


def test_compress_returns_a_copy_and_leaves_the_model_bit_for_bit(
    tiny_model: PreTrainedModel, first: str
) -> None:
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    small = compress(tiny_model, {first: 4})
    after = tiny_model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not storages(tiny_model) & storages(small)
    assert isinstance(small.get_submodule(first), LowRankLinear)
    assert isinstance(tiny_model.get_submodule(first), nn.Linear)


@pytest.mark.filterwarnings("ignore::drone.AboveBreakEvenWarning")
def test_full_rank_gives_the_same_logits_on_a_padded_batch(
    tiny_model: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    small = compress(tiny_model, full_ranks(tiny_model))
    with torch.inference_mode():
        expected, found = tiny_model(**padded_batch), small(**padded_batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


def test_a_low_rank_changes_the_logits_and_pads_still_do_not(
    tiny_model: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    small = compress(tiny_model, {name: 1 for name in encoder_linears(tiny_model)})
    alone = {k: v[2:, :3] for k, v in padded_batch.items()}  # row 2 has 3 tokens
    with torch.inference_mode():
        dense, found = tiny_model(**padded_batch).logits, small(**padded_batch).logits
        torch.testing.assert_close(found[2:], small(**alone).logits)
    assert not torch.allclose(dense, found, rtol=0, atol=1e-4)


def test_ranks_may_be_empty(tiny_model: PreTrainedModel) -> None:
    with pytest.warns(NothingReplacedWarning, match="encoder_linears"):
        small = compress(tiny_model, {})
    assert small is not tiny_model
    assert not storages(tiny_model) & storages(small)


@pytest.mark.parametrize("rank", [0, -3, 33, True, 4.0])
def test_a_rank_that_is_not_allowed_is_refused_and_its_module_named(
    tiny_model: PreTrainedModel, first: str, rank: object
) -> None:
    with pytest.raises(ValueError, match=first):
        compress(tiny_model, {first: rank})  # type: ignore[dict-item]


def test_an_unknown_module_is_refused_and_near_names_given(
    tiny_model: PreTrainedModel, first: str
) -> None:
    with pytest.raises(ValueError, match=first) as error:
        compress(tiny_model, {first + "z": 4})
    assert repr(first + "z") in str(error.value)


def test_a_module_that_is_no_linear_is_refused_and_named(
    tiny_bert: PreTrainedModel,
) -> None:
    name = "bert.encoder.layer.0.output.LayerNorm"
    with pytest.raises(ValueError, match=f"{name} is a LayerNorm"):
        compress(tiny_bert, {name: 4})


def test_a_replaced_module_is_not_replaced_again(
    tiny_model: PreTrainedModel, first: str
) -> None:
    with pytest.raises(ValueError, match=f"{first} is a LowRankLinear"):
        compress(compress(tiny_model, {first: 4}), {first: 2})


def test_above_break_even_is_warned_of_at_the_callers_line(
    tiny_model: PreTrainedModel, first: str
) -> None:
    with pytest.warns(AboveBreakEvenWarning, match=first) as caught:
        compress(tiny_model, {first: 16})  # 16 · 64 = 32²: no gain
    assert [w.filename for w in caught] == [__file__]


def test_at_break_even_nothing_is_warned_of(
    tiny_model: PreTrainedModel, first: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AboveBreakEvenWarning)
        compress(tiny_model, {first: 15})


def test_report_says_what_was_replaced_and_counts_as_torch_does(
    tiny_model: PreTrainedModel, first: str
) -> None:
    with pytest.warns(AboveBreakEvenWarning):
        small = compress(tiny_model, {first: 4, second(tiny_model): 20})
    table = report(small)
    replaced = table.loc[first]
    assert (replaced["rank"], replaced["out"], replaced["in"]) == (4, 32, 32)
    assert replaced["multiply_adds"] == 4 * 64
    assert replaced["multiply_adds_dense"] == 32 * 32
    assert replaced["parameters"] == 4 * 64 + 32
    assert replaced["parameters_dense"] == 32 * 32 + 32
    assert replaced["note"] == "replaced"
    assert "bigger" in table.loc[second(tiny_model), "note"]
    others = table.drop([first, second(tiny_model)])
    assert others["rank"].isna().all() and others["note"].str.contains("dense").all()
    assert (others["parameters"] == others["parameters_dense"]).all()
    # What the table does not list (embeddings, norms) is the same in both models.
    saved = table["parameters_dense"].sum() - table["parameters"].sum()
    assert tiny_model.num_parameters() - small.num_parameters() == saved
    linears = [n for n, m in tiny_model.named_modules() if isinstance(m, nn.Linear)]
    assert list(table.index) == linears


def second(model: nn.Module) -> str:
    return list(encoder_linears(model))[1]


def test_report_of_an_untouched_model_has_no_rank(tiny_model: PreTrainedModel) -> None:
    assert report(tiny_model)["rank"].isna().all()


def test_a_bfloat16_model_stays_one_and_full_rank_is_near(
    tiny_model: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    model = tiny_model.to(torch.bfloat16)
    with pytest.warns(AboveBreakEvenWarning):
        small = compress(model, full_ranks(model))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        expected, found = model(**padded_batch).logits, small(**padded_batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


def test_a_weight_that_is_not_finite_is_named(tiny_bert: PreTrainedModel) -> None:
    name = next(iter(encoder_linears(tiny_bert)))
    tiny_bert.get_submodule(name).weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=name):
        compress(tiny_bert, {name: 4})


def test_a_rank_computed_with_numpy_is_allowed(tiny_bert: PreTrainedModel) -> None:
    name = next(iter(encoder_linears(tiny_bert)))
    assert compress(tiny_bert, {name: np.int64(4)}).get_submodule(name).rank == 4


def test_a_model_without_linear_layers_has_no_report() -> None:
    with pytest.raises(ValueError, match="no Linear"):
        report(nn.Sequential(nn.ReLU()))


# --- with moments, and attention blocks -------------------------------------------


@pytest.fixture
def batches() -> list[Batch]:
    """Four batches of three rows of 5 to 12 tokens, padded with 1."""
    found = []
    for _ in range(4):
        mask = (torch.arange(12) < torch.randint(5, 13, (3, 1))).long()
        ids = torch.randint(5, 100, (3, 12)) * mask + (1 - mask)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def source_of(model: nn.Module, name: str) -> str:
    """The Linear whose inputs matter for a module: a block's are its query's."""
    names = ATTENTION.get(type(model.get_submodule(name)).__name__)
    return name if names is None else f"{name}.{names.query}"


def whole_plan(model: nn.Module) -> dict[str, int]:
    """Each block, and each Linear that is not in it as query or key, as they run."""
    taken = {}
    for name, block in attention_blocks(model).items():
        names = ATTENTION[type(block).__name__]
        taken[f"{name}.{names.query}"], taken[f"{name}.{names.key}"] = name, None
    plan = {taken.get(n, n): 10 for n in encoder_linears(model)}
    plan.pop(None, None)
    return {n: 3 if n in attention_blocks(model) else rank for n, rank in plan.items()}


def test_each_module_gets_the_truncated_factors_of_its_own_moment(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    plan, moments = whole_plan(family), calibrate(family, batches)
    small = compress(family, plan, moments)
    for name, rank in plan.items():
        old, new = family.get_submodule(name), small.get_submodule(name)
        if isinstance(old, nn.Linear):
            left, right = factorize(old.weight, moments[name]).truncate(rank)
            assert torch.equal(new.left, left) and torch.equal(new.right, right)
            assert torch.equal(new.bias, old.bias)
        else:
            names = ATTENTION[type(old).__name__]
            query, key = getattr(old, names.query), getattr(old, names.key)
            moment = moments[f"{name}.{names.query}"]
            parts = factorize_attention(query, key, 4, moment).truncate(rank)
            thin = getattr(new, names.query), getattr(new, names.key)
            found = [p for layer in thin for p in (layer.weight, layer.bias)]
            assert all(map(torch.equal, found, parts))


def test_a_missing_moment_names_the_module_and_what_is_missing(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    (block, *_), linear = attention_blocks(family), list(encoder_linears(family))[-1]
    moments = calibrate(family, batches)
    for name in (block, linear):
        source = source_of(family, name)
        rest = {n: m for n, m in moments.items() if n != source}
        with pytest.raises(
            ValueError, match=f"^{name}: there is no moment for {source}"
        ):
            compress(family, {name: 3}, rest)


def test_a_moment_that_does_not_fit_names_the_module(family: PreTrainedModel) -> None:
    (block, *_) = attention_blocks(family)
    query = source_of(family, block)
    small = SecondMoment(5)
    small.update(torch.randn(9, 5))
    for name in (block, query):
        with pytest.raises(ValueError, match=f"^{name}: .*32"):
            compress(family, {name: 3}, {query: small})


def test_a_block_and_its_own_query_or_key_cannot_both_have_a_rank(
    family: PreTrainedModel,
) -> None:
    for name, block in attention_blocks(family).items():
        names = ATTENTION[type(block).__name__]
        for part in (f"{name}.{names.query}", f"{name}.{names.key}"):
            for ranks in ({name: 3, part: 4}, {part: 4, name: 3}):
                with pytest.raises(ValueError, match=f"{part} has a rank, and so has"):
                    compress(family, ranks)


@pytest.mark.parametrize("rank", [0, 9, True])
def test_a_blocks_rank_is_at_most_the_head_size(
    family: PreTrainedModel, rank: int
) -> None:
    (block, *_) = attention_blocks(family)
    with pytest.raises(ValueError, match=f"{block}: .* 1 to 8"):
        compress(family, {block: rank})


def test_a_block_is_not_replaced_again(family: PreTrainedModel) -> None:
    (block, *_) = attention_blocks(family)
    small = compress(family, {block: 3})
    with pytest.raises(ValueError, match=f"{block} is a LowRank"):
        compress(small, {block: 2})
    small = compress(family, {source_of(family, block): 3})
    with pytest.raises(ValueError, match=f"{block}: .* replaced already"):
        compress(small, {block: 2})


def test_given_factorizations_are_used_and_give_the_identical_model(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    plan, moments = whole_plan(family), calibrate(family, batches)
    anew = compress(family, plan, moments).state_dict()
    known = factorize_modules(family, plan, moments)
    assert list(known) == list(plan)
    # Without moments: had it decomposed again, that would be another model.
    given = compress(family, plan, factorizations=known).state_dict()
    assert list(given) == list(anew)
    assert all(torch.equal(given[name], anew[name]) for name in anew)


def test_a_left_out_factorization_is_computed_from_the_moments(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    plan, moments = whole_plan(family), calibrate(family, batches)
    known = factorize_modules(family, list(plan)[:1], moments)
    found = compress(family, plan, moments, factorizations=known).state_dict()
    expected = compress(family, plan, moments).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_factorization_of_another_kind_or_shape_is_refused_and_named(
    tiny_bert: PreTrainedModel,
) -> None:
    (block, *_) = attention_blocks(tiny_bert)
    wide = next(n for n in encoder_linears(tiny_bert) if "intermediate" in n)
    known = factorize_modules(tiny_bert, [block, wide])
    for name, other in [
        (wide, block),
        (block, wide),
        (source_of(tiny_bert, block), wide),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            compress(tiny_bert, {name: 3}, factorizations={name: known[other]})


@pytest.mark.parametrize("which", [0, 1], ids=["block", "linear"])
def test_the_factorization_of_another_model_is_refused_and_named(
    tiny_bert: PreTrainedModel, which: int
) -> None:
    linear = next(n for n in encoder_linears(tiny_bert) if "intermediate" in n)
    name = [next(iter(attention_blocks(tiny_bert))), linear][which]
    known = factorize_modules(tiny_bert, [name])
    other = copy.deepcopy(tiny_bert)
    compress(other, {name: 3}, factorizations=known)  # equal weights
    with torch.no_grad():
        next(other.get_submodule(name).parameters())[0, 0] += 1
    with pytest.raises(ValueError, match=f"^{name}: the factorization is of another"):
        compress(other, {name: 3}, factorizations=known)


def test_the_report_shows_a_blocks_queries_and_keys_at_its_rank(
    family: PreTrainedModel,
) -> None:
    (name, block), *_ = attention_blocks(family).items()
    names = ATTENTION[type(block).__name__]
    small = compress(family, {name: 3, f"{name}.{names.value}": 5})
    table = report(small)
    for part in (names.query, names.key):
        row = table.loc[f"{name}.{part}"]
        assert (row["rank"], row["out"], row["in"]) == (3, 32, 32)
        assert row["multiply_adds"] == 3 * 4 * 32 and row["parameters"] == 12 * 33
        assert row["multiply_adds_dense"] == 32 * 32
        assert row["parameters_dense"] == 32 * 33
        assert row["note"] == "replaced: 3 of 8 numbers a head"
    value = table.loc[f"{name}.{names.value}"]
    assert (value["rank"], value["note"]) == (5, "replaced")
    assert table["rank"].notna().sum() == 3
    assert list(table.index) == list(report(family).index)
    saved = table["parameters_dense"].sum() - table["parameters"].sum()
    assert family.num_parameters() - small.num_parameters() == saved


# --- in order: each module for the inputs it then gets ---------------------------


def step_by_step(
    model: PreTrainedModel, plan: dict[str, int], batches: list[Batch]
) -> PreTrainedModel:
    """Algorithm 1 as it is told: calibrate all anew before each module's turn."""
    for name, rank in plan.items():
        moments = calibrate(model, batches, [source_of(model, name)])
        model = compress(model, {name: rank}, moments)
    return model


def thin_products(model: nn.Module) -> dict[str, Tensor]:
    """What does not depend on signs: products of factors, of queries and keys."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            found[name] = module.dense_weight.detach()
        if isinstance(module, LowRankSelfAttention):
            query, key = (
                torch.cat([layer.weight, layer.bias[:, None]], 1).view(4, -1, 33)
                for part in module.projections
                for layer in [module.get_submodule(part)]
            )
            found[name] = (query.mT @ key).detach()
    return found


def distance(found: nn.Module, expected: nn.Module) -> dict[str, float]:
    a, b = thin_products(found), thin_products(expected)
    assert list(a) == list(b)
    return {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in a}


@pytest.mark.parametrize("only", ["blocks", "linears", "both", "some"])
def test_in_order_each_module_is_fitted_above_the_compressed_ones(
    family: PreTrainedModel, batches: list[Batch], only: str
) -> None:
    blocks = attention_blocks(family)
    plan = {
        "blocks": {name: 3 for name in blocks},
        "linears": {name: 10 for name in encoder_linears(family)},
        "both": whole_plan(family),
        "some": dict(list(whole_plan(family).items())[2:-1:2]),
    }[only]
    # They are told in any order and must be done in the order they run.
    told = dict(reversed(plan.items()))
    found = compress(family, told, batches=batches, sequential=True)
    expected = step_by_step(family, plan, batches)
    assert max(distance(found, expected).values()) < 1e-5
    # All at once is another model: the test would see moments of the dense one.
    at_once = compress(family, plan, calibrate(family, batches))
    assert max(distance(at_once, expected).values()) > 1e-3


@pytest.mark.filterwarnings("ignore::drone.AboveBreakEvenWarning")
def test_in_order_at_full_rank_is_the_dense_model(
    family: PreTrainedModel, batches: list[Batch], padded_batch: Batch
) -> None:
    linears, blocks = encoder_linears(family), attention_blocks(family)
    plan = {
        name: 8 if name in blocks else min(linears[name].weight.shape)
        for name in whole_plan(family)
    }
    small = compress(family, plan, batches=batches, sequential=True)
    with torch.inference_mode():
        found, expected = small(**padded_batch).logits, family(**padded_batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_in_order_a_model_that_is_compressed_already_goes_on(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    plan = list(whole_plan(family).items())
    below = step_by_step(family, dict(plan[:3]), batches)
    found = compress(below, dict(plan[3:]), batches=batches, sequential=True)
    expected = compress(family, dict(plan), batches=batches, sequential=True)
    assert max(distance(found, expected).values()) < 1e-5


def test_in_order_pads_do_not_count(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    plan = whole_plan(family)
    expected = compress(family, plan, batches=batches, sequential=True)
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batch["input_ids"] = torch.where(mask == 1, ids, 77)
    found = compress(family, plan, batches=batches, sequential=True)
    assert max(distance(found, expected).values()) < 1e-5


def test_in_order_batches_are_read_once(
    tiny_model: PreTrainedModel, batches: list[Batch]
) -> None:
    read = []

    def generator() -> Iterator[Batch]:
        for batch in batches:
            read.append(batch)
            yield batch

    plan = whole_plan(tiny_model)
    found = compress(tiny_model, plan, batches=generator(), sequential=True)
    expected = compress(tiny_model, plan, batches=batches, sequential=True)
    assert len(read) == len(batches)
    assert set(distance(found, expected).values()) == {0.0}


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[object]]:
    """Weights, and whatever a pass could leave behind: modes, hooks, gradients."""
    rest = [
        (name, m.training, len(m._forward_pre_hooks), len(m._forward_hooks))
        for name, m in model.named_modules()
    ]
    return copy.deepcopy(model.state_dict()), rest


def assert_same_state(model: nn.Module, before: tuple[object, ...]) -> None:
    weights, rest = state_of(model)
    assert rest == before[1]
    assert all(torch.equal(weights[key], before[0][key]) for key in weights)


def test_in_order_leaves_the_model_and_the_modes_as_they_were(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    family.train()
    next(iter(encoder_linears(family).values())).eval()
    before = state_of(family)
    plan = whole_plan(family)
    small = compress(family, plan, batches=batches, sequential=True)
    assert_same_state(family, before)
    assert not storages(family) & storages(small)
    for name, module in small.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        if name in dict(family.named_modules()):
            assert module.training is family.get_submodule(name).training, name
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert torch.is_grad_enabled()
    # In training, too, the inputs are collected without dropout.
    expected = compress(family.eval(), plan, batches=batches, sequential=True)
    assert set(distance(small, expected).values()) == {0.0}


def test_in_order_an_error_leaves_the_model_as_it_was_and_is_told(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    family.train()
    *_, last = encoder_linears(family)
    family.get_submodule(last).weight.data[0, 0] = float("nan")
    before = state_of(family)
    with pytest.raises(ValueError, match=f"^{last}: "):
        compress(family, whole_plan(family), batches=batches, sequential=True)
    assert torch.is_grad_enabled()
    weights, rest = state_of(family)
    assert rest == before[1]
    assert all(weights[k].equal(v) for k, v in before[0].items() if last not in k)


def test_in_order_costs_a_few_forward_passes(
    tiny_bert: PreTrainedModel, batches: list[Batch]
) -> None:
    multiplied = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], _: object) -> None:
        # A thin layer is counted as the dense one it replaces.
        nonlocal multiplied
        if isinstance(module, nn.Linear | LowRankLinear):
            tokens = args[0].numel() // module.in_features
            multiplied += tokens * module.in_features * module.out_features

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        with torch.no_grad():
            for batch in batches * 4:
                tiny_bert(**batch)
        once, multiplied = multiplied, 0
        plan = whole_plan(tiny_bert)
        compress(tiny_bert, plan, batches=batches * 4, sequential=True)
    finally:
        handle.remove()
    assert (
        1 < multiplied / once <= 5
    )  # two of them to prove the walk and see the groups


def test_in_order_needs_batches_with_masks_and_nothing_else(
    tiny_bert: PreTrainedModel, batches: list[Batch]
) -> None:
    plan = whole_plan(tiny_bert)
    moments = calibrate(tiny_bert, batches)
    known = factorize_modules(tiny_bert, plan)
    unmasked = [*batches, {"input_ids": batches[0]["input_ids"]}]
    for arguments, message in [
        ({"sequential": True}, "go together"),
        ({"batches": batches}, "go together"),
        ({"batches": [], "sequential": True}, "no batch"),
        ({"batches": unmasked, "sequential": True}, "batch 4 has input_ids and no"),
        (
            {"moments": moments, "batches": batches, "sequential": True},
            "collects its own moments",
        ),
        (
            {"factorizations": known, "batches": batches, "sequential": True},
            "collects its own moments",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(tiny_bert, plan, **arguments)


def test_in_order_modules_outside_the_layers_have_their_turn_too(
    tiny_bert: PreTrainedModel, batches: list[Batch]
) -> None:
    plan = whole_plan(tiny_bert) | {"bert.pooler.dense": 4, "classifier": 1}
    told = dict(reversed(plan.items()))
    found = compress(tiny_bert, told, batches=batches, sequential=True)
    expected = step_by_step(tiny_bert, plan, batches)
    assert max(distance(found, expected).values()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_in_half_precision_stays_one_and_is_near_at_high_ranks(
    family: PreTrainedModel, batches: list[Batch], dtype: torch.dtype, sequential: bool
) -> None:
    model = family.to(dtype)
    blocks = attention_blocks(model)
    plan = {name: 8 if name in blocks else 15 for name in whole_plan(model)}
    if sequential:
        small = compress(model, plan, batches=batches, sequential=True)
    else:
        small = compress(model, plan, calibrate(model, batches))
    assert {p.dtype for p in small.parameters()} == {dtype}
    float32 = family.to(torch.float32)
    exact = compress(float32, plan, calibrate(float32, batches))
    with torch.inference_mode():
        found, expected = small(**batches[0]).logits, exact(**batches[0]).logits
    assert found.isfinite().all()
    assert (found - expected).norm() < 0.2 * expected.norm()


# --- what stands in several places, what shares a weight --------------------------


class Two(nn.Module):
    """One Linear by two names, and a table whose weight is a decoder's too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.a = self.b = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, 40)
        self.decoder.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.b(torch.relu(self.a(self.table(ids)))))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("ranks", [{"a": 3}, {"b": 3}, {"a": 3, "b": 3}])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_module_with_two_names_is_replaced_under_both(
    ranks: dict[str, int], sequential: bool
) -> None:
    model, ids = Two().eval(), torch.randint(40, (5, 6))
    batches = [{"ids": ids}]
    if sequential:
        small = compress(model, ranks, batches=batches, sequential=True)
    else:
        small = compress(model, ranks, calibrate(model, batches, list(ranks)))
    assert isinstance(small.a, LowRankLinear) and small.b is small.a
    assert size(small) == size(model) - 16 * 16 + 3 * 32
    table = report(small)
    assert table.totals == {"parameters": size(small), "parameters_dense": size(model)}
    assert table.loc["a", "note"] == "replaced; also b" and "b" not in table.index
    # Its inputs are those of both calls.
    moment = SecondMoment(16)
    with torch.no_grad():
        first = model.table(ids)
        moment.update(first)
        moment.update(torch.relu(model.a(first)))
    left, right = factorize(model.a.weight, moment).truncate(3)
    torch.testing.assert_close(small.a.weight, left @ right, rtol=1e-4, atol=1e-5)


def test_two_ranks_for_one_module_are_refused() -> None:
    with pytest.raises(
        ValueError, match="a and b are one module, and have ranks 3 and 4"
    ):
        compress(Two(), {"a": 3, "b": 4})


def test_a_broken_tie_is_warned_of_and_counted() -> None:
    model = Two()
    with pytest.warns(BrokenTieWarning, match=r"decoder \(with table\)") as caught:
        small = compress(model, {"decoder": 4})
    assert [w.filename for w in caught] == [__file__]
    table = report(small)
    assert size(small) == size(model) + 4 * (16 + 40)
    assert table.totals == {"parameters": size(small), "parameters_dense": size(model)}
    note = table.loc["decoder", "note"]
    assert note == "replaced; table keeps the dense weight: the model grows"
    assert "decoder: replaced; table keeps" in str(table)


def test_the_tie_of_a_hugging_face_decoder_is_known_after_loading(
    tmp_path: Path,
) -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    with pytest.warns(BrokenTieWarning, match=r"word_embeddings"):
        small = compress(model, {"cls.predictions.decoder": 4})
    save(small, tmp_path / "small")
    for each in (small, load(tmp_path / "small")):
        table = report(each)
        assert table.totals == {
            "parameters": size(small),
            "parameters_dense": size(model),
        }
        assert "the model grows" in table.loc["cls.predictions.decoder", "note"]


def test_two_tied_linears_both_replaced_count_as_one_before() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.warns(BrokenTieWarning, match=r"1 \(with 0\)"):
        small = compress(model, {"0": 2, "1": 2})
    totals = report(small).totals
    assert totals == {"parameters": size(small), "parameters_dense": size(model)}


# --- kinds of modules -------------------------------------------------------------


def test_a_conv1d_becomes_a_low_rank_linear() -> None:
    conv = Conv1D(6, 9)  # six outputs, nine inputs: its weight is (9, 6)
    nn.init.normal_(conv.bias)
    model, x = nn.Sequential(conv), torch.randn(4, 3, 9)
    full = compress(model, {"0": 6})
    torch.testing.assert_close(full(x), model(x), rtol=0, atol=1e-5)
    moments = calibrate(model, [{"input": x}], ["0"])
    small = compress(model, {"0": 2}, moments)
    assert (small[0].left.shape, small[0].right.shape) == ((6, 2), (2, 9))
    left, right = factorize(conv.weight.T, moments["0"]).truncate(2)
    assert torch.equal(small[0].left, left) and torch.equal(small[0].right, right)
    assert report(small).loc["0", ["out", "in", "rank"]].to_list() == [6, 9, 2]
    assert report(model).loc["0", ["out", "in", "parameters"]].to_list() == [6, 9, 60]
    with pytest.raises(ValueError, match="1 to 6"):
        compress(model, {"0": 7})


@pytest.mark.parametrize("pads", [False, True])
def test_torchs_own_transformer_reads_the_weight(pads: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1:, 3:] = pads
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    full = compress(model, {n: 16 for n in names})
    small = compress(model, {n: 3 for n in names})
    slow = copy.deepcopy(small).requires_grad_(True)
    with torch.no_grad():  # its fused kernel, which calls no module inside
        found, dense = (m(x, src_key_padding_mask=mask)[~mask] for m in (full, model))
        torch.testing.assert_close(found, dense, rtol=0, atol=1e-4)
        fast = small(x, src_key_padding_mask=mask)[~mask]
    called = slow(x, src_key_padding_mask=mask)[~mask]
    torch.testing.assert_close(fast, called, rtol=0, atol=1e-4)
    notes = report(small)["note"]
    assert all("reads its weight: smaller, not faster" in note for note in notes)


def test_few_tokens_are_warned_of_once_with_the_worst() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 80), nn.Linear(80, 40))
    batches, ranks = [{"input": torch.randn(9, 40)}], {"0": 2, "1": 2, "2": 2}
    moments = calibrate(model, batches, list(ranks))
    for more in ({"moments": moments}, {"batches": batches, "sequential": True}):
        with pytest.warns(FewTokensWarning, match="3 of 3 modules: 2 has 80") as caught:
            compress(model, ranks, **more)
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewTokensWarning)
        compress(model, ranks, calibrate(model, batches * 3, list(ranks)))


# --- wrappers ---------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["DataParallel", "compiled", "Sequential"])
def test_a_wrapped_model_is_compressed_and_its_inner_one_saved(
    tiny_bert: PreTrainedModel, padded_batch: Batch, wrap: str, tmp_path: Path
) -> None:
    wrapped: nn.Module = {
        "DataParallel": nn.DataParallel,
        "compiled": lambda m: torch.compile(m, backend="eager"),
        "Sequential": lambda m: nn.Sequential(OrderedDict(model=m)),
    }[wrap](tiny_bert)
    names = list(encoder_linears(wrapped))
    assert len(names) == 12
    small = compress(wrapped, dict.fromkeys(names, 5))
    (inner,) = [m for m in small.modules() if isinstance(m, type(tiny_bert))]
    inner.save_pretrained(tmp_path / "small")
    again = type(tiny_bert).from_pretrained(tmp_path / "small")
    with torch.no_grad():
        found, expected = again(**padded_batch).logits, inner(**padded_batch).logits
    assert torch.equal(found, expected)


# --- the printed report -----------------------------------------------------------


def test_a_printed_report_has_80_columns_few_rows_and_totals(
    family: PreTrainedModel,
) -> None:
    small = compress(family, dict.fromkeys(encoder_linears(family), 4))
    text = str(report(small))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 20
    assert lines[-1] == (
        f"12 of {len(report(small))} layers replaced; whole model: {size(family):,} → "
        f"{size(small):,} parameters, {100 * size(small) / size(family):.1f} %"
    )
    assert "more rows" in text and "…" in text and " 4 " in lines[1]
    assert lines[-1] in report(small)._repr_html_()


# --- beside another thread -------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "in order", "shifted", "plan", "same"])
def test_a_copy_has_no_part_of_a_calibration_in_another_thread(how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).train()
    batch = {"input": torch.randn(20, 6)}
    begun, done = threading.Event(), threading.Event()

    def batches() -> Iterator[dict[str, Tensor]]:
        yield batch
        begun.set()
        done.wait(0.3)  # as long as nobody waits for this calibration
        yield batch

    found: list[SecondMoment] = []

    def work() -> None:
        found.append(calibrate(model, batches(), ["0"])["0"])

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    ranks = {"0" if how == "same" else "2": 2}
    ordered: dict[str, Any] = {"batches": [batch], "sequential": True}
    if how == "plan":
        told = "uniform", Goal(loss_increase=0.1), ranks, 1.0, 1.0, Costs(1.0, {})
        thin = {"2": LowRankLinear.from_linear(model[2], 2)}
        small = RankPlan(*told, [], 1, 1, 1.0, modules=thin).apply(model)
    elif how in ("plain", "same"):
        small = compress(model, ranks)
    elif how == "in order":
        small = compress(model, ranks, **ordered)
    else:
        small = compress_ranks(model, ranks, **ordered, shifted=Shifted())
    done.set()
    thread.join()
    assert found[0].count == 40
    for module in (*small.modules(), *model.modules()):
        assert module.training
        assert not module._forward_pre_hooks and not module._forward_hooks
