"""What the library knows of each architecture, on tiny models with random weights."""

import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from drone import SkippedModuleWarning, compress
from drone.layers.attention import ATTENTION
from drone.model.adapters import (
    attention_blocks,
    encoder_layers,
    encoder_linears,
    module_named,
    swap,
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


def test_a_block_of_a_known_name_with_its_own_forward_is_another(
    tiny_bert: PreTrainedModel,
) -> None:
    """Full rank would not give back what such a block computes."""
    name, block = next(iter(attention_blocks(tiny_bert).items()))

    def forward(self: nn.Module, x: Tensor, *_: object, **__: object) -> object:
        return 2 * self.value(x), None

    own = type(type(block).__name__, (type(block),), {"forward": forward})
    block.__class__ = own
    assert name not in attention_blocks(tiny_bert)
    with pytest.raises(ValueError, match=f"{name} is a {own.__name__} of .*test_adapt"):
        compress(tiny_bert, {name: 3})


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


# --- found by structure ------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)


def test_outermost_lists_of_blocks_count_and_heads_do_not() -> None:
    model = nn.ModuleDict(
        {
            "text": nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}),
            "image": nn.ModuleList(
                [nn.ModuleList([Block()]), nn.ModuleList([Block()])]
            ),
            "heads": nn.ModuleList([nn.Linear(4, 2)]),
            "head": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        }
    )
    expected = ["text.layers.0", "text.layers.1", "image.0.0", "image.1.0"]
    assert list(encoder_layers(model)) == expected
    assert list(encoder_linears(model)) == [f"{name}.part" for name in expected]
    assert list(encoder_layers(model, "head")) == ["head.0", "head.1", "head.2"]
    assert list(encoder_linears(model, ["heads"])) == ["heads.0"]
    with pytest.raises(ValueError, match=r"layers: heads\.0 is a Linear; a Mod"):
        encoder_layers(model, "heads.0")


def test_a_sequential_of_blocks_counts_where_there_is_no_list() -> None:
    model = Block()
    model.blocks = nn.Sequential(Block(), Block())
    assert list(encoder_layers(model)) == ["blocks.0", "blocks.1"]
    assert list(encoder_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))) == ["0", "1"]


def test_a_conv1d_is_among_the_linears() -> None:
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    parts = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(encoder_linears(model)) == [f"h.0.{part}" for part in parts]


# --- what cannot be replaced ---------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A Linear by another name computes what a Linear does."""


class LoraLike(nn.Module):
    """As PEFT wraps a Linear: the base layer, and two thin ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4)})

    def forward(self, x: Tensor) -> Tensor:
        added = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + added


def hooked() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda *_: None)
    return linear


def patched() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


REFUSED = {
    "own forward": (lambda: Scaled(4, 4), "a Scaled has a forward of its own"),
    "hook": (hooked, "it has hooks"),
    "instance": (patched, "its forward was replaced"),
    "parametrization": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "remove_parametrizations",
    ),
    "old weight norm": (old_weight_norm, "remove_weight_norm"),
    "pruned": (
        lambda: nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        "prune.remove",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_by_name_and_left_out_of_defaults(
    case: str,
) -> None:
    make, message = REFUSED[case]
    model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(ValueError, match=f"^1: .*{message}"):
        compress(model, {"1": 2})
    with pytest.warns(SkippedModuleWarning, match=f"left out: 1: .*{message}"):
        assert list(encoder_linears(model)) == ["0"]
    with pytest.raises(ValueError, match=message):  # nothing else is there
        encoder_linears(nn.Sequential(make()))


def test_an_adapter_is_left_out_and_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LoraLike())
    with pytest.warns(
        SkippedModuleWarning, match=r"1.base_layer \(and 2 more\).*merge"
    ):
        assert list(encoder_linears(model)) == ["0"]
    for name in ("1", "1.base_layer", "1.lora_A.default"):
        with pytest.raises(ValueError, match=rf"^{name}: 1 is an adapter.*unload\(\)"):
            compress(model, {name: 2})


def test_a_block_with_an_adapter_or_a_hook_is_refused(
    tiny_bert: PreTrainedModel,
) -> None:
    name, block = next(iter(attention_blocks(tiny_bert).items()))
    handle = block.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"^{name}: it has hooks"):
        compress(tiny_bert, {name: 2})
    handle.remove()
    block.query = LoraLike()
    with pytest.raises(ValueError, match=rf"^{name}\.query: .* is an adapter"):
        compress(tiny_bert, {name: 2})


def test_a_subclass_without_a_forward_of_its_own_is_a_linear() -> None:
    model = nn.Sequential(Renamed(4, 4))
    small, x = compress(model, {"0": 4}), torch.randn(3, 4)
    torch.testing.assert_close(small(x), model(x))


def test_hooks_by_which_transformers_collects_attentions_are_carried(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    asked = {"output_hidden_states": True, "output_attentions": True}
    family.set_attn_implementation("eager")
    family(**padded_batch, **asked)
    blocks = attention_blocks(family)
    small = compress(family, dict.fromkeys(blocks, 8))
    found, expected = small(**padded_batch, **asked), family(**padded_batch, **asked)
    for key in ("attentions", "hidden_states"):
        assert len(found[key]) == len(expected[key])
        for a, b in zip(found[key], expected[key], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_swap_puts_a_module_wherever_the_old_one_stands() -> None:
    shared = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model = nn.ModuleDict({"x": shared, "y": shared, "z": shared["a"]})
    swap(model, "y.a", nn.Identity())
    for name in ("x.a", "y.a", "z"):
        assert isinstance(model.get_submodule(name), nn.Identity)
