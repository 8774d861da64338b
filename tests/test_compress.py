"""Layers of a whole model replaced, on two architectures with random weights."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone import (
    AboveBreakEvenWarning,
    LowRankLinear,
    compress,
    encoder_linears,
    factorize_linears,
    layers,
    report,
)

BERT = ["attention.self.query", "attention.self.key", "attention.self.value"]
BERT += ["attention.output.dense", "intermediate.dense", "output.dense"]
MPNET = ["attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"]
MPNET += ["intermediate.dense", "output.dense"]


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


def test_encoder_linears_are_all_of_the_encoder_and_nothing_else(
    tiny_bert: PreTrainedModel, tiny_mpnet: PreTrainedModel
) -> None:
    for model, prefix, kinds in [
        (tiny_bert, "bert", BERT),
        (tiny_mpnet, "mpnet", MPNET),
    ]:
        expected = [f"{prefix}.encoder.layer.{i}.{k}" for i in range(2) for k in kinds]
        assert list(encoder_linears(model)) == expected


def test_encoder_linears_refuses_a_model_without_an_encoder() -> None:
    with pytest.raises(ValueError, match="Sequential has no Linear"):
        encoder_linears(nn.Sequential(nn.Linear(2, 2)))


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


def test_given_factorizations_are_used_and_give_the_identical_model(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {name: 5 for name in encoder_linears(tiny_model)}
    plain = compress(tiny_model, ranks).state_dict()
    known = factorize_linears(encoder_linears(tiny_model))
    monkeypatch.setattr(layers, "factorize", lambda weight: pytest.fail("again"))
    given = compress(tiny_model, ranks, known).state_dict()
    assert list(given) == list(plain)
    assert all(torch.equal(given[name], plain[name]) for name in plain)


def test_a_left_out_factorization_is_computed(
    tiny_model: PreTrainedModel, first: str
) -> None:
    other = second(tiny_model)
    known = factorize_linears({first: encoder_linears(tiny_model)[first]})
    small = compress(tiny_model, {first: 4, other: 4}, known)
    assert isinstance(small.get_submodule(other), LowRankLinear)


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


def test_a_weight_that_is_not_finite_is_named(tiny_bert):
    name = next(iter(encoder_linears(tiny_bert)))
    tiny_bert.get_submodule(name).weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=name):
        compress(tiny_bert, {name: 4})


def test_a_rank_computed_with_numpy_is_allowed(tiny_bert):
    name = next(iter(encoder_linears(tiny_bert)))
    assert compress(tiny_bert, {name: np.int64(4)}).get_submodule(name).rank == 4


def test_a_model_without_linear_layers_has_no_report():
    with pytest.raises(ValueError, match="no Linear"):
        report(nn.Sequential(nn.ReLU()))
