"""What `compress` warns of is warned of where a search chooses the ranks, too."""

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor

from drone import (
    BrokenTieWarning,
    FewTokensWarning,
    LeftPaddingWarning,
    LowRankLinear,
    NothingReplacedWarning,
    RankPlan,
    compress,
    report,
    search_ranks,
)

Batch = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::drone.OneClassWarning")


@pytest.mark.parametrize("method", ["drone", "uniform"])
def test_a_search_on_few_tokens_says_so(
    tiny_bert: hf.PreTrainedModel, task: Callable[..., list[Batch]], method: str
) -> None:
    few = [
        {k: v[:1, :2] if v.ndim == 2 else v[:1] for k, v in task(tiny_bert)[0].items()}
    ]
    few[0]["attention_mask"][:] = 1

    def search() -> object:
        return search_ranks(tiny_bert, few, keep=0.5, method=method)

    def make() -> object:
        return compress(tiny_bert, 0.5, batches=few, method=method)

    for each in (search, make):
        with pytest.warns(FewTokensWarning, match="saw 2 tokens") as caught:
            each()
        said = [w for w in caught if w.category is FewTokensWarning]
        assert [w.filename for w in said] == [__file__]


def left_padded() -> tuple[hf.PreTrainedModel, Batch]:
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).eval()
    ids = torch.randint(5, 100, (4, 12))
    mask = torch.ones_like(ids)
    mask[:2, :4] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("method", ["drone", "uniform", "sequential"])
def test_pads_on_the_left_are_warned_of_once(method: str) -> None:
    model, batch = left_padded()
    with pytest.warns(LeftPaddingWarning, match="wpe") as caught:
        if method == "sequential":
            ranks = {"transformer.h.0.mlp.c_fc": 4}
            compress(model, ranks, batches=[batch, batch], sequential=True)
        else:
            search_ranks(model, [batch, batch], loss_increase=0.5, method=method)
    assert sum(w.category is LeftPaddingWarning for w in caught) == 1


def test_a_plan_that_replaces_nothing_says_so(
    tiny_bert: hf.PreTrainedModel, task: Callable[..., list[Batch]]
) -> None:
    batches = task(tiny_bert)
    with pytest.warns(NothingReplacedWarning, match="left all 1 modules dense"):
        plan = search_ranks(
            tiny_bert,
            batches,
            loss_increase=1e-9,
            method="uniform",
            modules=["bert.encoder.layer.0.output.dense"],
        )
    assert plan.ranks == {}
    with pytest.warns(NothingReplacedWarning):
        plan.apply(tiny_bert)


def test_a_plan_breaks_ties_as_compress_does() -> None:
    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model, name = hf.BertForMaskedLM(config).eval(), "cls.predictions.decoder"
    ids = torch.randint(5, 40, (8, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    plan: RankPlan = search_ranks(
        model, [batch], keep=0.5, modules=[name], method="uniform"
    )
    with pytest.warns(BrokenTieWarning, match="word_embeddings"):
        small = plan.apply(model)
    with pytest.warns(BrokenTieWarning):
        by_hand = compress(model, plan.ranks)
    thin = small.get_submodule(name)
    assert isinstance(thin, LowRankLinear)
    assert thin.bias is small.get_parameter("cls.predictions.bias")
    assert report(small).totals == report(by_hand).totals


def test_a_search_with_nothing_to_say_says_nothing(
    tiny_bert: hf.PreTrainedModel, task: Callable[..., list[Batch]]
) -> None:
    with warnings.catch_warnings():
        for kind in (FewTokensWarning, LeftPaddingWarning, NothingReplacedWarning):
            warnings.simplefilter("error", kind)
        batches = task(tiny_bert)
        plan = search_ranks(tiny_bert, batches, keep=0.5, method="uniform")
        assert plan.ranks
        plan.apply(tiny_bert)
