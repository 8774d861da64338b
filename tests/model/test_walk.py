"""A model layer by layer: what is kept must give what a whole pass would give."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from drone import LowRankLinear, attention_blocks, calibrate, compress, encoder_linears
from drone.layers.attention import ATTENTION
from drone.model.adapters import encoder_layers
from drone.model.calibrate import frozen
from drone.model.walk import Walk, input_name, mean_loss

Batch = dict[str, Tensor]


@pytest.fixture
def batches(family: PreTrainedModel, task: Callable[..., list[Batch]]) -> list[Batch]:
    found = task(family)
    found[1]["labels"][0] = -100  # a row the loss leaves out: batches weigh by labels
    return found


def everything(model: nn.Module) -> list[str]:
    """All blocks, and all Linears of the layers that are not a query or key."""
    blocks = attention_blocks(model)
    taken = {
        f"{name}.{part}"
        for name, block in blocks.items()
        for names in [ATTENTION[type(block).__name__]]
        for part in (names.query, names.key)
    }
    return [*blocks, *(n for n in encoder_linears(model) if n not in taken)]


def whole_loss(model: nn.Module, batches: list[Batch]) -> float:
    """The mean over all labelled rows at once, from the logits of full passes."""
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    kept = labels != -100
    return float(nn.functional.cross_entropy(logits[kept].double(), labels[kept]))


def layer_list(model: nn.Module) -> tuple[str, nn.Module]:
    name = next(iter(encoder_layers(model))).rpartition(".")[0]
    return name, model.get_submodule(name)


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()
    )


def thin(walk: Walk, name: str, rank: int) -> None:
    """Replace a Linear by what plain SVD leaves of it."""
    linear = walk.model.get_submodule(name)
    walk.model.set_submodule(name, LowRankLinear.from_linear(linear, rank))


# --- the loss --------------------------------------------------------------------


def test_the_loss_in_front_of_every_layer_is_that_of_a_full_pass(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    expected = whole_loss(family, batches)
    with frozen(family):
        walk = Walk(family, batches, everything(family))
        assert list(walk.layers) == list(encoder_layers(family))
        for number in range(len(walk.layers)):
            assert walk.number == number
            assert walk.loss() == pytest.approx(expected, rel=1e-6)
            walk.advance()
        assert mean_loss(family, batches) == pytest.approx(expected, rel=1e-6)


def test_the_loss_heeds_what_was_replaced_in_this_layer_those_below_and_above(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    *_, top = encoder_linears(family)
    dense = whole_loss(family, batches)
    with frozen(family):
        walk = Walk(family, batches, everything(family))
        thin(walk, top, 3)  # above all the way until the last layer is in front
        seen = [dense]
        for layer in walk.layers:
            for name in [n for n in encoder_linears(family) if n.startswith(layer)]:
                thin(walk, name, 2)
                seen.append(walk.loss())
                assert seen[-1] == pytest.approx(whole_loss(family, batches), rel=1e-6)
            walk.advance()
    assert len({round(loss, 9) for loss in seen}) > 6  # each replacement was felt


def test_a_low_rank_block_is_walked_through_as_any_module(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    small = compress(family, {name: 2 for name in attention_blocks(family)})
    expected = whole_loss(small, batches)
    with frozen(small):
        walk = Walk(small, batches, list(encoder_linears(family))[-1:])
        assert len(walk.layers) == 2
        for _ in walk.layers:
            assert walk.loss() == pytest.approx(expected, rel=1e-6)
            walk.advance()


def test_only_this_layer_and_those_above_run(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    ran: list[str] = []
    with frozen(family):
        walk = Walk(family, batches, everything(family))
        for name, layer in walk.layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        first, second = walk.layers

        def runs(act: Callable[[], object]) -> dict[str, int]:
            ran.clear()
            act()
            return {name: ran.count(name) for name in (first, second)}

        assert runs(walk.loss) == {first: 3, second: 3}
        assert runs(lambda: walk.moments(walk.groups()[0])) == {first: 6, second: 0}
        assert runs(walk.advance) == {first: 3, second: 0}
        assert runs(walk.loss) == {first: 0, second: 3}
        assert runs(walk.groups) == {first: 0, second: 3}
        assert runs(walk.advance) == {first: 0, second: 3}


def test_passes_through_a_layer_are_counted(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    with frozen(family):
        walk = Walk(family, batches, everything(family))
        assert walk.layer_forwards == 0
        counts = []
        for _ in range(2):
            for act in (walk.loss, walk.loss, walk.groups):
                act()
                counts.append(walk.layer_forwards)
            walk.moments(walk.groups()[1])
            counts.append(walk.layer_forwards)
            walk.advance()
            counts.append(walk.layer_forwards)
    assert counts == [2, 4, 4, 5, 6, 7, 8, 8, 9, 10]


# --- groups and moments ----------------------------------------------------------


def test_the_groups_of_a_layer_are_the_modules_with_one_input_as_they_run(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    told = list(reversed(everything(family)))  # in any order
    with frozen(family):
        walk = Walk(family, batches, told)
        for layer in walk.layers:
            groups = walk.groups()
            (block,) = [n for n in attention_blocks(family) if n.startswith(layer)]
            value = ATTENTION[type(family.get_submodule(block)).__name__].value
            assert set(groups[0]) == {block, f"{block}.{value}"}
            # Each Linear comes once, the narrow ones before the wide as they run.
            rest = [n for n in encoder_linears(family) if n.startswith(layer)][3:]
            assert groups[1:] == [[name] for name in rest]
            walk.advance()


def test_a_layer_without_a_module_of_interest_has_no_group(
    tiny_bert: PreTrainedModel, task: Callable[..., list[Batch]]
) -> None:
    names = [n for n in encoder_linears(tiny_bert) if ".layer.1." in n]
    with frozen(tiny_bert):
        walk = Walk(tiny_bert, task(tiny_bert), names)
        assert walk.groups() == []
        walk.advance()
        first, *rest = walk.groups()
    assert first == names[:3] and rest == [[name] for name in names[3:]]


def test_moments_are_those_of_calibration(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    names = everything(family)
    sources = {name: input_name(family.get_submodule(name), name) for name in names}
    expected = calibrate(family, batches, sources.values())
    seen = []
    with frozen(family):
        walk = Walk(family, batches, names)
        for _ in walk.layers:
            for group in walk.groups():
                found = walk.moments(group)
                assert list(found) == [sources[name] for name in group]
                for source, moment in found.items():
                    assert moment.count == expected[source].count
                    for one, other in [
                        (moment.matrix, expected[source].matrix),
                        (moment.total, expected[source].total),
                    ]:
                        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
                seen += group
            walk.advance()
    assert sorted(seen) == sorted(names)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert {moment.count for moment in expected.values()} == {real}


def test_moments_are_of_the_model_as_it_now_is_below(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    names = everything(family)
    dense = calibrate(family, batches)
    with frozen(family):
        walk = Walk(family, batches, names)
        for _ in walk.layers:
            for number, group in enumerate(walk.groups()):
                (moment, *_) = walk.moments(group).values()
                name = input_name(family.get_submodule(group[0]), group[0])
                expected = calibrate(family, batches, [name])[name].matrix
                torch.testing.assert_close(
                    moment.matrix, expected, rtol=1e-6, atol=1e-6
                )
                changed = number > 0 or walk.number > 0
                assert changed is not torch.allclose(
                    moment.matrix, dense[name].matrix, rtol=1e-3, atol=1e-3
                )
                thin(walk, group[-1], 2)
            walk.advance()


# --- the model is whole again ----------------------------------------------------


def test_the_model_is_whole_again_after_a_loss(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    name, layers = layer_list(family)
    expected = whole_loss(family, batches)
    with frozen(family):
        walk = Walk(family, batches, everything(family))
        for _ in range(2):
            walk.loss()
            walk.groups()
            walk.moments(walk.groups()[-1])
            assert family.get_submodule(name) is layers and len(layers) == 2
            assert hooks(family) == 0
            walk.advance()
    assert whole_loss(family, batches) == expected


@pytest.mark.parametrize("number", [0, 1])
def test_the_model_is_whole_again_if_a_pass_fails(
    family: PreTrainedModel, batches: list[Batch], number: int
) -> None:
    name, layers = layer_list(family)
    parts = list(layers)
    expected = whole_loss(family, batches)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with frozen(family):
        walk = Walk(family, batches, everything(family))
        for _ in range(number):
            walk.advance()
        group = walk.groups()[0]
        handle = family.classifier.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            walk.loss()
        handle.remove()
        handle = next(parts[number].children()).register_forward_pre_hook(fail)
        for act in (lambda: walk.moments(group), walk.groups, walk.loss):
            with pytest.raises(RuntimeError, match="on purpose"):
                act()
        handle.remove()
        assert family.get_submodule(name) is layers and list(layers) == parts
        assert hooks(family) == 0
        assert walk.loss() == pytest.approx(expected, rel=1e-6)
    assert whole_loss(family, batches) == expected


def test_a_walk_that_cannot_begin_leaves_no_hook(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    del batches[1]["attention_mask"]
    with pytest.raises(ValueError, match="batch 1 has input_ids and no attention_mask"):
        Walk(family, batches, everything(family))
    assert hooks(family) == 0


def test_batches_are_read_once(family: PreTrainedModel, batches: list[Batch]) -> None:
    def generator() -> Iterator[Batch]:
        yield from batches

    with frozen(family):
        walk = Walk(family, generator(), everything(family))
        assert walk.loss() == walk.loss() == mean_loss(family, batches)


def test_a_model_that_returns_its_hidden_states_is_walked_through_too(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    family.config.output_hidden_states = True
    before = copy.deepcopy(family)
    with frozen(family):
        walk = Walk(family, batches, everything(family))
        assert walk.loss() == pytest.approx(whole_loss(before, batches), rel=1e-6)
    with torch.no_grad():
        found, expected = family(**batches[0]), before(**batches[0])
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert torch.equal(found.logits, expected.logits)


# --- what is refused -------------------------------------------------------------


def test_no_batch_is_refused(family: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least one is needed"):
        Walk(family, [], everything(family))
    assert hooks(family) == 0


def test_with_modules_outside_the_layers_whole_passes_do_the_work(
    tiny_bert: PreTrainedModel, task: Callable[..., list[Batch]]
) -> None:
    names = ["classifier", *everything(tiny_bert), "bert.pooler.dense"]
    batches = task(tiny_bert)
    with frozen(tiny_bert):
        walk = Walk(tiny_bert, batches, names)
        assert "classifier is outside of the layers" in walk.why_whole
        groups = walk.groups()
        assert groups[-2:] == [["bert.pooler.dense"], ["classifier"]]
        expected = calibrate(tiny_bert, batches, ["classifier"])["classifier"]
        found = walk.moments(groups[-1])["classifier"]
        torch.testing.assert_close(found.matrix, expected.matrix)
        assert walk.loss() == mean_loss(tiny_bert, batches)


def test_a_name_that_only_begins_like_a_layer_is_outside(
    task: Callable[..., list[Batch]],
) -> None:
    deep = BertForSequenceClassification(
        BertConfig(
            vocab_size=100,
            hidden_size=8,
            num_hidden_layers=11,
            num_attention_heads=2,
            intermediate_size=8,
        )
    ).eval()
    name = "bert.encoder.layer.10.output.dense"  # layer 10, not layer 1
    with frozen(deep):
        walk = Walk(deep, task(deep), [name])
        for _ in range(10):
            assert walk.groups() == []
            walk.advance()
        assert walk.groups() == [[name]]


def test_a_model_without_layers_is_walked_whole() -> None:
    net = nn.ModuleDict({"a": nn.Bilinear(2, 2, 2)})
    net.forward = lambda x: net.a(x, x)
    walk = Walk(net, [{"x": torch.ones(1, 2)}], [])
    assert "has no list of layers" in walk.why_whole and list(walk.layers) == [""]


def test_batches_without_labels_have_no_loss(
    family: PreTrainedModel, batches: list[Batch]
) -> None:
    del batches[1]["labels"]
    name, layers = layer_list(family)
    with frozen(family):
        walk = Walk(family, batches, everything(family))  # moments need none
        walk.moments(walk.groups()[0])
        for act in (walk.loss, lambda: mean_loss(family, batches)):
            with pytest.raises(ValueError, match="batch 1 has no labels"):
                act()
    assert family.get_submodule(name) is layers


def test_a_model_that_returns_no_loss_is_refused_and_named() -> None:
    class Silent(nn.Module):
        def forward(self, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=labels)

    with pytest.raises(ValueError, match="Silent returns no loss for batch 0"):
        mean_loss(Silent(), [{"labels": torch.ones(2)}])


def test_each_label_counts_alike_and_those_left_out_do_not() -> None:
    class Given(nn.Module):
        def forward(self, value: float, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=torch.tensor(value))

    batches = [
        {"value": 1.0, "labels": torch.tensor([0, 1, 1])},
        {"value": 5.0, "labels": torch.tensor([0, -100])},
    ]
    assert mean_loss(Given(), batches) == (3 * 1 + 1 * 5) / 4


# --- what lies between the layers ------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + torch.tanh(self.part(x) * scale)


class Between(nn.Module):
    """Four layers, and what a walk through them alone would leave out."""

    def __init__(self, trick: str) -> None:
        super().__init__()
        self.trick, self.layers = trick, nn.ModuleList(Layer() for _ in range(4))
        if trick == "shared":
            self.layers[3].part = self.layers[0].part
        if trick == "towers":
            self.more = nn.ModuleList([Layer()])

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for number, layer in enumerate(self.layers):
            arguments = {"scale": 1.0 + number} if self.trick == "arguments" else {}
            x = layer(x, **arguments)
            if self.trick == "twice" and number == 2:
                x = layer(x)
            if self.trick == "between" and number == 1:
                x = x * 1.5
            if self.trick == "first" and layer is self.layers[0]:
                x = x + 1
        if self.trick == "counts":
            x = x * len(self.layers)
        if self.trick == "indexed":
            x = x + self.layers[2].part.bias
        if self.trick == "towers":
            x = self.more[0](x)
        return {"loss": nn.functional.cross_entropy(x, labels), "logits": x}


TRICKS = {
    "": "",
    "arguments": "layers.1 gets other arguments than layers.0",
    "twice": "not run once each, in order",
    "between": "something happens to the hidden states in front of layers.2",
    "first": "something happens to the hidden states in front of layers.1",
    "counts": "does not lead to what it returns",
    "indexed": "does not run without the layers below: IndexError",
    "shared": "is used as layers",
    "towers": "stand in 2 lists",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_walk_that_would_be_wrong_is_made_by_whole_passes(trick: str) -> None:
    model = Between(trick).eval()
    batches = [
        {"x": 2 * torch.randn(9, 8), "labels": torch.randint(8, (9,))} for _ in range(2)
    ]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    ranks = dict.fromkeys(names, 3)
    with frozen(model):
        walk = Walk(model, batches, names)
        assert TRICKS[trick] in walk.why_whole and bool(walk.why_whole) is bool(trick)
        assert hooks(model) == 0 and len(model.layers) == 4
        assert walk.loss() == pytest.approx(mean_loss(model, batches), rel=1e-6)
    found = compress(model, ranks, batches=batches, sequential=True)
    expected = model
    for name in names:  # Algorithm 1 as it is told
        moments = calibrate(expected, batches, [name])
        expected = compress(expected, {name: 3}, moments)
    for name in names:
        a, b = (m.get_submodule(name).weight for m in (found, expected))
        assert (a - b).norm() <= 1e-5 * b.norm(), name


def test_a_module_that_is_never_reached_is_an_error_in_order_too() -> None:
    model = Between("").eval()
    model.layers[1].spare = nn.Linear(8, 8)
    batch = {"x": torch.randn(9, 8), "labels": torch.zeros(9, dtype=torch.long)}
    ranks = {"layers.1.part": 2, "layers.1.spare": 2}
    with pytest.raises(ValueError, match=r"never reached .*: layers\.1\.spare; leave"):
        compress(model, ranks, batches=[batch], sequential=True)
    assert hooks(model) == 0


def test_layers_can_be_named_and_no_cache_is_filled() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 50, (2, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with frozen(model):
        walk = Walk(model, [batch], encoder_linears(model), layers="model.layers")
        expected = mean_loss(model, [batch])
        for _ in walk.layers:
            walk.moments(walk.groups()[0])
            assert walk.loss() == pytest.approx(expected, rel=1e-6)
            walk.advance()
        assert walk.why_whole == "" and config.use_cache is True
        with pytest.raises(ValueError, match=r"no module 'model\.layer'"):
            Walk(model, [batch], [], layers="model.layer")


# --- what later batches do otherwise ---------------------------------------------


class Longer(nn.Module):
    """Three layers that do with rows of more than 8 tokens what others do not tell."""

    def __init__(self, trick: str) -> None:
        super().__init__()
        self.trick, self.layers = trick, nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        long = x.shape[1] > 8
        for number, layer in enumerate(self.layers):
            scale = 2.0 if long and number and self.trick == "arguments" else 1.0
            if long and number == 1 and self.trick == "between":
                x = x[:, ::2] * 3
            x = layer(x, scale) if self.trick else layer(x)
            if long and number == 2 and self.trick == "twice":
                x = layer(x)
        return x


LATER = {
    "arguments": "layers.1 gets other arguments than layers.0, in batch",
    "between": "something happens to the hidden states in front of layers.1, in batch",
    "twice": "its layers are not run once each, in order, in batch",
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("trick", LATER)
def test_the_walk_is_proved_on_every_batch(trick: str, order: int) -> None:
    model, name = Longer(trick).eval(), "layers.2.part"
    batches = [{"x": torch.randn(4, n, 8)} for n in (6, 40)][::order]
    with frozen(model):
        assert LATER[trick] in Walk(model, batches, [name]).why_whole
    found = compress(model, {name: 3}, batches=batches, sequential=True)
    expected = compress(model, {name: 3}, calibrate(model, batches, [name]))
    a, b = (m.get_submodule(name).dense_weight for m in (found, expected))
    torch.testing.assert_close(a, b)


def test_windows_that_only_long_rows_reach_are_not_forgotten() -> None:
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        sliding_window=8,
    )
    model, name = Gemma2ForCausalLM(config).eval(), "model.layers.2.mlp.down_proj"
    rows = [torch.randint(1, 50, (4, length)) for length in (6, 40)]
    batches = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows]
    with frozen(model):
        assert "other arguments" in Walk(model, batches, [name]).why_whole
    found = compress(model, {name: 4}, batches=batches, sequential=True)
    expected = compress(model, {name: 4}, calibrate(model, batches, [name]))
    a, b = (m.get_submodule(name).dense_weight for m in (found, expected))
    torch.testing.assert_close(a, b)


class Again(nn.Module):
    """A layer that calls its parts otherwise where rows are long."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= 8:
            return self.a(x) + self.b(x)
        y = self.a(x)
        return self.b(y) + self.a(torch.relu(y))


def test_calls_that_only_a_later_batch_makes_are_counted() -> None:
    model = Longer("")
    model.layers = nn.ModuleList(Again() for _ in range(2))
    batches = [{"x": torch.randn(4, n, 8)} for n in (6, 40)]
    names = ["layers.1.a", "layers.1.b"]
    expected = {n: calibrate(model, batches, [n], mask={"": None})[n] for n in names}
    with frozen(model):
        walk = Walk(model, batches, names)
        assert walk.why_whole == "" and walk.groups() == []
        walk.advance()
        assert walk.groups() == [["layers.1.a"], ["layers.1.b"]]
        for name in names:
            found = walk.moments([name])[name]
            assert found.count == expected[name].count
            torch.testing.assert_close(found.matrix, expected[name].matrix)


class Half(nn.Module):
    """One of two parts that see the same vectors, each under a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.part(x) * attention_mask[..., None]


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(), Half()

    def forward(self, x: Tensor, attention_mask: Tensor, other: Tensor) -> Tensor:
        return self.first(x, attention_mask) + self.second(x, other)


@pytest.mark.parametrize("alike", [True, False])
def test_modules_with_one_input_of_which_other_vectors_count_are_no_group(
    alike: bool,
) -> None:
    model, names = Halves().eval(), ["first.part", "second.part"]
    mask = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
    batches = [
        {"x": torch.randn(4, 5, 8), "attention_mask": mask, "other": other}
        for other in (mask.clone(), mask if alike else ~mask)  # in a later batch only
    ]
    expected = {name: calibrate(model, batches, [name])[name] for name in names}
    with frozen(model):
        walk = Walk(model, batches, names)
        groups = walk.groups()
        assert groups == ([names] if alike else [[name] for name in names])
        found = {k: v for group in groups for k, v in walk.moments(group).items()}
    for name in names:
        assert found[name].count == expected[name].count
        torch.testing.assert_close(found[name].matrix, expected[name].matrix)
