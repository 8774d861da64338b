"""What the library knows of each architecture, on tiny models with random weights."""

import pytest
from torch import nn
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from drone.layers.attention import ATTENTION
from drone.model.adapters import (
    attention_blocks,
    encoder_layers,
    encoder_linears,
    module_named,
)

BERT = [f"attention.self.{part}" for part in ("query", "key", "value")]
BERT += ["attention.output.dense", "intermediate.dense", "output.dense"]
# fixture: (list of layers, attention block, Linears of a layer in the order they run)
KNOWN = {
    "tiny_bert": ("bert.encoder.layer", "attention.self", BERT),
    "tiny_roberta": ("roberta.encoder.layer", "attention.self", BERT),
    "tiny_mpnet": (
        "mpnet.encoder.layer",
        "attention.attn",
        [f"attention.attn.{part}" for part in "qkvo"]
        + ["intermediate.dense", "output.dense"],
    ),
    "tiny_distilbert": (
        "distilbert.transformer.layer",
        "attention",
        [f"attention.{part}_lin" for part in ("q", "k", "v", "out")]
        + ["ffn.lin1", "ffn.lin2"],
    ),
}


@pytest.fixture(params=KNOWN)
def known(
    request: pytest.FixtureRequest,
) -> tuple[PreTrainedModel, str, str, list[str]]:
    return request.getfixturevalue(request.param), *KNOWN[request.param]


def test_layers_blocks_and_linears_are_those_of_the_encoder_in_order(
    known: tuple[PreTrainedModel, str, str, list[str]],
) -> None:
    model, layers, block, linears = known
    prefixes = [f"{layers}.{i}" for i in range(2)]
    found = encoder_layers(model)
    assert list(found) == prefixes
    assert all(found[name] is model.get_submodule(name) for name in found)
    assert list(attention_blocks(model)) == [f"{p}.{block}" for p in prefixes]
    expected = [f"{prefix}.{name}" for prefix in prefixes for name in linears]
    assert list(encoder_linears(model)) == expected


def test_the_names_of_a_blocks_parts_are_right(family: PreTrainedModel) -> None:
    for block in attention_blocks(family).values():
        names = ATTENTION[type(block).__name__]
        assert getattr(block, names.heads) == 4
        parts = [names.query, names.key, names.value, names.output]
        linears = [name for name, m in block.named_modules() if type(m) is nn.Linear]
        assert linears == [part for part in parts if part is not None]


def test_an_encoder_without_a_head_has_names_without_a_prefix(
    tiny_bert: PreTrainedModel,
) -> None:
    model = tiny_bert.bert
    assert list(encoder_layers(model)) == [f"encoder.layer.{i}" for i in range(2)]
    assert next(iter(attention_blocks(model))) == "encoder.layer.0.attention.self"


def test_a_model_without_a_known_block_is_told_which_are_known() -> None:
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match="no attention block") as error:
        attention_blocks(model)
    assert type(model).__name__ in str(error.value)
    assert all(name in str(error.value) for name in ATTENTION)


def test_layers_without_a_linear_are_refused() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList()})})
    for function in (encoder_layers, encoder_linears):
        with pytest.raises(ValueError, match=r"no list of layers.*nothing to compress"):
            function(model)


def test_a_module_is_found_by_its_name(family: PreTrainedModel) -> None:
    for name, linear in encoder_linears(family).items():
        assert module_named(family, name) is linear


def test_an_unknown_name_gets_those_that_are_near(tiny_bert: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no module 'bert") as error:
        module_named(tiny_bert, "bert.encoder.layer.1.intermediat.dense")
    assert "bert.encoder.layer.1.intermediate.dense" in str(error.value)


def test_an_unknown_name_near_to_none_gets_the_first_ones(
    tiny_bert: PreTrainedModel,
) -> None:
    with pytest.raises(ValueError, match="no module '§'") as error:
        module_named(tiny_bert, "§")
    assert all(
        name in str(error.value) for name in list(encoder_linears(tiny_bert))[:3]
    )
