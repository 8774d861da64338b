"""LSTMs with thin products: beside PyTorch's own, and beside the equations by hand."""

import copy
import itertools
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from drone import (
    AboveBreakEvenWarning,
    LowRankEmbedding,
    LowRankLinear,
    LowRankLSTM,
    LSTMConfig,
    LSTMLanguageModel,
    LSTMLayer,
    SecondMoment,
    calibrate,
    compress,
    encoder_linears,
    load,
    multiply_adds,
    report,
    save,
    search_ranks,
)
from drone.layers import lstm
from drone.layers.lstm import KERNEL_FROM, STEPS_FROM, State
from drone.model.calibrate import frozen, watch_inputs
from drone.model.storage import low_rank_modules
from drone.model.walk import Walk, mean_loss
from drone.search import costs, rivals
from drone.search.algorithm2 import METHODS
from drone.search.costs import (
    Costs,
    ModuleCosts,
    grid_ranks,
    largest_rank,
    searchable,
)

Batch = dict[str, Tensor]
# What of a layer is thin, and numbers of steps with and without PyTorch's kernel.
KINDS = [(), ("input",), ("recurrent",), ("input", "recurrent")]
LENGTHS = [KERNEL_FROM // 2, KERNEL_FROM + 4]
SIZES = {"vocab_size": 12, "hidden_size": 8, "num_layers": 2, "dropout": 0.3}
LINEARS = [f"stack.{n}.{part}" for n in range(2) for part in ("input", "recurrent")]
LINEARS += ["stack.2.decoder"]

sizes = st.integers(1, 6)
lengths = st.integers(1, 2 * KERNEL_FROM)
seeds = st.integers(0, 10_000)


def dense(module: nn.Module) -> Tensor:
    """A weight, multiplied out if it is thin."""
    return module.dense_weight if isinstance(module, LowRankLinear) else module.weight


def thinned(layer: LSTMLayer, **ranks: int) -> LSTMLayer:
    """A copy of a layer with some of its parts thin."""
    new = copy.deepcopy(layer)
    for part, rank in ranks.items():
        setattr(new, part, LowRankLinear.from_linear(getattr(layer, part), rank))
    return new


def as_lstm(layer: LSTMLayer) -> nn.LSTM:
    """PyTorch's LSTM with the same weights, multiplied out where they are thin."""
    weights = dense(layer.input), dense(layer.recurrent)
    lstm = nn.LSTM(weights[0].shape[1], layer.hidden, batch_first=True)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(weights[0])
        lstm.weight_hh_l0.copy_(weights[1])
        lstm.bias_ih_l0.copy_(0.25 * layer.input.bias)
        lstm.bias_hh_l0.copy_(0.75 * layer.input.bias)
    return lstm


def pytorchs(lstm: nn.LSTM, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """`nn.LSTM` with the state shaped as `LSTMLayer` has it."""
    stacked = None if state is None else (state[0][None], state[1][None])
    output, (h, c) = lstm(x, stacked)
    return output, (h[0], c[0])


def made_state(batch: int, hidden: int) -> State:
    h, c = torch.randn(2, batch, hidden)
    return h, c


def assert_same(
    found: tuple[Tensor, State], expected: tuple[Tensor, State], atol: float = 1e-5
) -> None:
    for one, other in zip(
        (found[0], *found[1]), (expected[0], *expected[1]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def mixed(output: Tensor, state: State) -> Tensor:
    """One number, in which everything that comes out has a weight of its own."""
    everything = torch.cat([each.flatten() for each in (output, *state)])
    return everything @ torch.arange(1.0, len(everything) + 1).sin()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def layer_by_hand(
    layer: LSTMLayer, x: np.ndarray, state: State | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The equations in NumPy, step by step: all h, the h before each, the last c."""
    w_ih, w_hh, bias = (
        t.detach().double().numpy()
        for t in (dense(layer.input), dense(layer.recurrent), layer.input.bias)
    )
    h = c = np.zeros((len(x), layer.hidden))
    if state is not None:
        h, c = (each.detach().double().numpy() for each in state)
    after, before = [], []
    for at in range(x.shape[1]):
        before.append(h)
        i, f, g, o = np.split(x[:, at] @ w_ih.T + bias + h @ w_hh.T, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        after.append(h)
    return np.stack(after, axis=1), np.stack(before, axis=1), c


# --- a layer beside nn.LSTM ------------------------------------------------------


@given(sizes, sizes, st.integers(1, 4), lengths, st.booleans(), seeds)
def test_a_dense_layer_is_pytorchs_lstm(
    into: int, hidden: int, batch: int, steps: int, with_state: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = LSTMLayer(into, hidden)
    x = torch.randn(batch, steps, into)
    state = made_state(batch, hidden) if with_state else None
    found = layer(x, state)
    assert found[0].shape == (batch, steps, hidden)
    assert_same(found, pytorchs(as_lstm(layer), x, state))


@given(sizes, sizes, lengths, st.sampled_from(KINDS), st.booleans(), seeds)
def test_a_thin_layer_is_the_lstm_of_its_products(
    into: int,
    hidden: int,
    steps: int,
    thin: tuple[str, ...],
    with_state: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = LSTMLayer(into, hidden)
    largest = {"input": min(into, 4 * hidden), "recurrent": hidden}
    layer = thinned(layer, **{part: 1 + seed % largest[part] for part in thin})
    x = torch.randn(3, steps, into)
    state = made_state(3, hidden) if with_state else None
    assert_same(layer(x, state), pytorchs(as_lstm(layer), x, state))


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("thin", KINDS[1:])
def test_at_full_rank_a_thin_layer_is_the_dense_one(
    thin: tuple[str, ...], steps: int
) -> None:
    layer = LSTMLayer(5, 4)
    x, state = torch.randn(3, steps, 5), made_state(3, 4)
    new = thinned(layer, **{p: min(getattr(layer, p).weight.shape) for p in thin})
    assert_same(new(x, state), layer(x, state))


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("thin", KINDS)
def test_a_layer_follows_the_equations(thin: tuple[str, ...], steps: int) -> None:
    layer = thinned(LSTMLayer(5, 4), **dict.fromkeys(thin, 2))
    x, state = torch.randn(3, steps, 5), made_state(3, 4)
    for given_state in (None, state):
        output, (h, c) = layer(x, given_state)
        hs, _, last_c = layer_by_hand(layer, x.double().numpy(), given_state)
        for one, other in [(output, hs), (h, hs[:, -1]), (c, last_c)]:
            np.testing.assert_allclose(one.detach(), other, rtol=0, atol=1e-5)


@given(st.sampled_from(KINDS), st.data(), seeds)
def test_two_calls_with_the_state_between_them_are_one(
    thin: tuple[str, ...], data: st.DataObject, seed: int
) -> None:
    torch.manual_seed(seed)
    steps = data.draw(st.integers(2, 2 * KERNEL_FROM + 4))
    cut = data.draw(st.integers(1, steps - 1))
    layer = thinned(LSTMLayer(5, 4), **dict.fromkeys(thin, 3))
    x, state = torch.randn(2, steps, 5), made_state(2, 4)
    first, between = layer(x[:, :cut], state)
    second, last = layer(x[:, cut:], between)
    assert_same((torch.cat([first, second], dim=1), last), layer(x, state))


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("thin", KINDS)
def test_gradients_are_those_of_pytorchs_lstm(
    thin: tuple[str, ...], steps: int
) -> None:
    layer = thinned(LSTMLayer(5, 4), **dict.fromkeys(thin, 2))
    lstm = as_lstm(layer)
    x = torch.randn(3, steps, 5, requires_grad=True)
    state = tuple(torch.randn(2, 3, 4, requires_grad=True).unbind())
    inputs = [x, *state, layer.input.bias]
    theirs = [x, *state, lstm.bias_ih_l0, lstm.weight_ih_l0, lstm.weight_hh_l0]
    *expected, of_input, of_recurrent = torch.autograd.grad(
        mixed(*pytorchs(lstm, x, state)), theirs
    )
    for part, of_weight in [("input", of_input), ("recurrent", of_recurrent)]:
        module = getattr(layer, part)
        if part in thin:  # of W = L R: G Rᵀ and Lᵀ G
            inputs += [module.left, module.right]
            expected += [of_weight @ module.right.T, module.left.T @ of_weight]
        else:
            inputs.append(module.weight)
            expected.append(of_weight)
    found = torch.autograd.grad(mixed(*layer(x, state)), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert other.any()


@pytest.mark.parametrize("thin", KINDS)
def test_a_step_of_training_in_bfloat16_is_near_the_one_in_float32(
    thin: tuple[str, ...],
) -> None:
    """Large enough that the dense layer leaves PyTorch's kernel, too."""
    torch.manual_seed(0)
    layer = thinned(LSTMLayer(32, STEPS_FROM), **dict.fromkeys(thin, 16))
    x = torch.randn(4, 2 * KERNEL_FROM, 32, requires_grad=True)
    inputs = [x, *layer.parameters()]
    results = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, half):
            output, state = layer(x)
        found = torch.autograd.grad(mixed(output.float(), state), inputs)
        results.append([output, *state, *found])
    assert results[1][2].dtype == torch.float32  # c adds up many steps
    for one, other in zip(*results, strict=True):
        rest = (one - other).norm() / one.norm()
        assert 0 < rest < 0.02  # bfloat16 has 8 bits: 0.4 % a number


def test_a_gradient_of_a_gradient_is_refused_not_wrong() -> None:
    layer = thinned(LSTMLayer(3, 4), recurrent=2)
    output, _ = layer(torch.randn(2, 5, 3))
    found = torch.autograd.grad(
        output.square().sum(), layer.recurrent.left, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found[0].sum().backward()


def test_large_layers_leave_the_kernel_in_bfloat16_training_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []
    kernel = lstm._kernel
    monkeypatch.setattr(lstm, "_kernel", lambda *args: used.append(1) or kernel(*args))
    ways = {}
    for hidden in (8, STEPS_FROM):
        layer = LSTMLayer(3, hidden)
        for half, learns in itertools.product([False, True], repeat=2):
            used.clear()
            with (
                torch.autocast("cpu", torch.bfloat16, half),
                torch.set_grad_enabled(learns),
            ):
                layer(torch.randn(2, KERNEL_FROM, 3))
            ways[hidden, half, learns] = bool(used)
    assert [way for way, in_kernel in ways.items() if not in_kernel] == [
        (STEPS_FROM, True, True)
    ]


def test_weights_are_drawn_as_pytorch_draws_them() -> None:
    layer = LSTMLayer(30, 25)
    for parameter in layer.parameters():
        assert parameter.abs().max() <= 25**-0.5
        assert parameter.std().item() == pytest.approx(25**-0.5 / 3**0.5, rel=0.2)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "input.weight": (100, 30),
        "input.bias": (100,),
        "recurrent.weight": (100, 25),
    }


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("thin", KINDS)
def test_dropout_is_of_what_enters_and_in_training_only(
    thin: tuple[str, ...], steps: int
) -> None:
    layer = thinned(LSTMLayer(5, 4, dropout=0.5), **dict.fromkeys(thin, 2))
    x = torch.randn(3, steps, 5)
    torch.manual_seed(1)
    found = layer.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5, training=True)
    assert_same(found, layer.eval()(dropped), atol=1e-6)
    assert not torch.allclose(found[0], layer(x)[0], atol=1e-3)


# --- what hooks see --------------------------------------------------------------


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("thin", KINDS)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("names", KINDS[1:])
def test_hooks_see_x_and_the_h_before_and_change_nothing(
    names: tuple[str, ...], with_state: bool, thin: tuple[str, ...], steps: int
) -> None:
    layer = thinned(LSTMLayer(5, 4), **dict.fromkeys(thin, 2))
    x, state = torch.randn(3, steps, 5), made_state(3, 4) if with_state else None
    seen: dict[str, list[Tensor]] = {}
    with (
        torch.no_grad(),
        watch_inputs(layer, names, lambda n, t: seen.setdefault(n, []).append(t)),
    ):
        watched = layer(x, state)
    assert_same(watched, layer(x, state), atol=1e-6)
    assert set(seen) == set(names) and all(len(each) == 1 for each in seen.values())
    if "input" in names:
        assert torch.equal(seen["input"][0], x)
    if "recurrent" in names:
        (h_before,) = seen["recurrent"]
        first = torch.zeros(3, 4) if state is None else state[0]
        assert torch.equal(h_before[:, 0], first)
        assert torch.equal(h_before[:, 1:], watched[0][:, :-1])
        _, expected, _ = layer_by_hand(layer, x.double().numpy(), state)
        np.testing.assert_allclose(h_before, expected, rtol=0, atol=1e-5)


# --- in place of an nn.LSTM ------------------------------------------------------


def weight_names(layers: int) -> list[str]:
    return [f"weight_{kind}_l{n}" for n in range(layers) for kind in ("ih", "hh")]


def full_ranks(lstm: nn.LSTM) -> dict[str, int]:
    names = weight_names(lstm.num_layers)
    return {name: min(getattr(lstm, name).shape) for name in names}


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("thin", [True, False])
def test_it_drops_in_for_pytorchs_lstm(
    layers: int, batch_first: bool, bias: bool, thin: bool, steps: int
) -> None:
    lstm = nn.LSTM(5, 4, layers, bias=bias, batch_first=batch_first)
    before = copy.deepcopy(lstm.state_dict())
    new = LowRankLSTM.from_lstm(lstm, full_ranks(lstm) if thin else {})
    x = torch.randn((3, steps, 5) if batch_first else (steps, 3, 5))
    for state in (None, tuple(torch.randn(2, layers, 3, 4).unbind())):
        found, expected = new(x, state), lstm(x, state)
        assert found[1][0].shape == found[1][1].shape == (layers, 3, 4)
        assert_same(found, expected)
    # Thin are exactly those with a rank, and nothing is shared with the dense one.
    parts = [m for n, m in new.named_modules() if n.endswith(("input", "recurrent"))]
    assert len(parts) == 2 * layers
    assert all(isinstance(part, LowRankLinear) is thin for part in parts)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 1
    assert all(torch.equal(lstm.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize("name", weight_names(2))
def test_only_the_weights_with_a_rank_become_thin(name: str) -> None:
    lstm = nn.LSTM(5, 4, 2)
    new = LowRankLSTM.from_lstm(lstm, {name: 2})
    u, s, v = np.linalg.svd(getattr(lstm, name).detach().double().numpy())
    with torch.no_grad():
        getattr(lstm, name).copy_(torch.from_numpy(u[:, :2] * s[:2] @ v[:2]))
    x = torch.randn(7, 3, 5)
    assert_same(new(x), lstm(x))
    (thin,) = [m for m in new.modules() if isinstance(m, LowRankLinear)]
    assert thin.rank == 2


def test_it_learns_in_place_of_pytorchs_lstm() -> None:
    lstm = nn.LSTM(5, 4, 2)
    new = LowRankLSTM.from_lstm(lstm, full_ranks(lstm) | {"weight_hh_l1": 2})
    mixed(*new(torch.randn(7, 3, 5))).backward()
    assert all(p.grad is not None and p.grad.any() for p in new.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_lies_between_the_layers(training: bool) -> None:
    lstm = nn.LSTM(5, 4, 2, dropout=0.5).train(training)
    new = LowRankLSTM.from_lstm(lstm, {"weight_hh_l0": 2})
    assert all(module.training is training for module in new.modules())
    assert [layer.dropout.p for layer in new.layers] == [0.0, 0.5]
    x = torch.randn(6, 50, 5)
    (_, (first, _)), (_, (second, _)) = new(x), new(x)
    assert torch.equal(first[0], second[0])  # no dropout of what enters the whole
    assert torch.equal(first[1], second[1]) is not training


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("steps", LENGTHS)
def test_the_dtype_is_inherited(dtype: torch.dtype, atol: float, steps: int) -> None:
    lstm = nn.LSTM(5, 4, 2, dtype=dtype)
    x = torch.randn(steps, 3, 5, dtype=dtype)
    for ranks in ({}, full_ranks(lstm)):
        new = LowRankLSTM.from_lstm(lstm, ranks)
        assert {p.dtype for p in new.parameters()} == {dtype}
        with torch.no_grad():
            found, expected = new(x), lstm(x)
        assert {t.dtype for t in (found[0], *found[1])} == {dtype}
        assert_same(found, expected, atol)


def moment_of(rows: np.ndarray) -> SecondMoment:
    moment = SecondMoment(rows.shape[-1])
    moment.update(torch.from_numpy(rows))
    return moment


def test_with_moments_every_rank_attains_the_least_error_on_the_inputs() -> None:
    lstm = nn.LSTM(5, 4, 2, batch_first=True, dtype=torch.float64)
    first, second = LowRankLSTM.from_lstm(lstm, {}).layers
    x = torch.randn(6, 9, 5, dtype=torch.float64) * torch.logspace(1, -2, 5)
    h, h_before, _ = layer_by_hand(first, x.numpy())
    _, h_before_above, _ = layer_by_hand(second, h)
    inputs = {
        "weight_ih_l0": x.numpy(),
        "weight_hh_l0": h_before,
        "weight_ih_l1": h,
        "weight_hh_l1": h_before_above,
    }
    moments = {name: moment_of(rows) for name, rows in inputs.items()}
    for name, rows in inputs.items():
        weight = getattr(lstm, name).detach().numpy()
        columns = rows.reshape(-1, rows.shape[-1]).T  # X, (in, N)
        sigma = np.linalg.svd(weight @ columns, compute_uv=False)
        gained = []
        for rank in range(1, min(weight.shape) + 1):
            aware, plain = (
                np.linalg.norm((weight - thin_weight(lstm, name, rank, m)) @ columns)
                for m in (moments, None)
            )
            best = np.linalg.norm(sigma[rank:])  # Eckart-Young
            assert aware == pytest.approx(best, rel=1e-6, abs=1e-6 * sigma[0])
            gained.append(plain / max(best, 1e-6 * sigma[0]))
        assert max(gained) > 1.005  # plain SVD does not attain it


def thin_weight(
    lstm: nn.LSTM, name: str, rank: int, moments: Mapping[str, SecondMoment] | None
) -> np.ndarray:
    new = LowRankLSTM.from_lstm(lstm, {name: rank}, moments)
    (thin,) = [m for m in new.modules() if isinstance(m, LowRankLinear)]
    return thin.dense_weight.detach().numpy()


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"proj_size": 2}])
def test_an_lstm_of_another_kind_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one direction and without proj_size"):
        LowRankLSTM.from_lstm(nn.LSTM(5, 4, **options), {})


@pytest.mark.parametrize(
    ("ranks", "moments", "message"),
    [
        ({"weight_hh_l1": 2}, None, "no weight 'weight_hh_l1'; there are weight_ih_l0"),
        ({"bias_ih_l0": 2}, None, "no weight 'bias_ih_l0'"),
        ({"weight_ih_l0": 0}, None, r"weight_ih_l0: .* 0; allowed are integers 1 to 5"),
        ({"weight_hh_l0": 5}, None, r"weight_hh_l0: .* 5; allowed are integers 1 to 4"),
        (
            {"weight_ih_l0": 2, "weight_hh_l0": 2},
            {"weight_ih_l0": 5},
            "weight_hh_l0: there is no moment",
        ),
        (
            {"weight_hh_l0": 2},
            {"weight_hh_l0": 5},
            r"weight_hh_l0: .*\(5, 5\); \(4, 4\) is needed",
        ),
    ],
)
def test_ranks_and_moments_that_do_not_fit_are_refused_and_the_weight_named(
    ranks: dict[str, int], moments: dict[str, int] | None, message: str
) -> None:
    made = None
    if moments is not None:
        made = {n: moment_of(np.ones((3, dim))) for n, dim in moments.items()}
    with pytest.raises(ValueError, match=message):
        LowRankLSTM.from_lstm(nn.LSTM(5, 4), ranks, made)


@pytest.mark.parametrize("shape", [(6, 5), (5,), (2, 6, 3, 5)])
def test_an_input_without_three_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    new = LowRankLSTM.from_lstm(nn.LSTM(5, 4), {})
    with pytest.raises(ValueError, match="three dimensions"):
        new(torch.ones(shape))


# --- a language model ------------------------------------------------------------


def lively(**changes: Any) -> LSTMLanguageModel:
    """Weights of a trained model's size: it has opinions, and thinning costs."""
    model = LSTMLanguageModel(LSTMConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        model.stack[-1].decoder.weight *= 4
    return model


@pytest.fixture
def model() -> LSTMLanguageModel:
    return lively()


@pytest.fixture
def batches(model: LSTMLanguageModel) -> list[Batch]:
    """Batches of unlike sizes, labelled by the model itself: its loss is low."""
    found = []
    for rows, steps in [(3, 7), (2, KERNEL_FROM + 2), (4, 6)]:
        ids = torch.randint(12, (rows, steps))
        with torch.no_grad():
            labels = model(ids).logits.argmax(-1)
        labels[0, 1] = -100  # left out of the loss
        mask = torch.ones_like(ids)
        found.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return found


def by_hand(
    model: LSTMLanguageModel, ids: Tensor
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and what enters each Linear, from the equations in float64."""
    x = model.embedding.weight.detach().double().numpy()[ids.numpy()]
    *layers, readout = model.stack
    inputs = {}
    for number, layer in enumerate(layers):
        h, before, _ = layer_by_hand(layer, x)
        inputs[f"stack.{number}.input"], inputs[f"stack.{number}.recurrent"] = x, before
        x = h
    inputs[f"stack.{len(layers)}.decoder"] = x
    weight, bias = (p.detach().double().numpy() for p in readout.decoder.parameters())
    return x @ weight.T + bias, inputs


def whole_loss(model: LSTMLanguageModel, batches: list[Batch]) -> float:
    """The mean over all labels at once, from the logits of full passes."""
    with torch.no_grad():
        logits = [model(batch["input_ids"]).logits.flatten(0, 1) for batch in batches]
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    kept = labels != -100
    return float(F.cross_entropy(torch.cat(logits)[kept].double(), labels[kept]))


def logits(model: LSTMLanguageModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize(
    "changes", [{}, {"num_layers": 1, "tie_word_embeddings": True}]
)
def test_logits_and_loss_are_those_of_the_equations(
    changes: dict[str, Any], steps: int
) -> None:
    model = lively(**changes)
    ids, labels = torch.randint(12, (2, 3, steps))
    labels[0, 1] = labels[2, 3] = -100
    output = model(ids, labels)
    expected, _ = by_hand(model, ids)
    np.testing.assert_allclose(output.logits.detach(), expected, rtol=0, atol=1e-4)
    odds = np.exp(expected)
    chances = odds / odds.sum(-1, keepdims=True)
    losses = [
        -np.log(chances[row, at, label])
        for row, line in enumerate(labels.tolist())
        for at, label in enumerate(line)
        if label != -100
    ]
    assert len(losses) == 3 * steps - 2
    assert output.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert model(ids).loss is None


@pytest.mark.parametrize("ranks", [{}, {"stack.0.recurrent": 3, "stack.1.input": 2}])
def test_states_carried_over_two_calls_give_what_one_gives(
    model: LSTMLanguageModel, ranks: dict[str, int]
) -> None:
    model = compress(model, ranks)
    ids = torch.randint(12, (3, 2 * KERNEL_FROM + 5))
    with torch.no_grad():
        whole = model(ids)
        first = model(ids[:, :9])
        second = model(ids[:, 9:], states=first.states)
        lost = model(ids[:, 9:])
    assert len(whole.states) == 2
    both = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(both, whole.logits, rtol=0, atol=1e-4)
    for one, other in zip(second.states, whole.states, strict=True):
        for found, expected in zip(one, other, strict=True):
            assert found.shape == (3, 8)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(lost.logits, second.logits, atol=1e-2)


def test_dropout_is_off_in_eval_mode_and_on_in_training(
    model: LSTMLanguageModel,
) -> None:
    ids = torch.randint(12, (2, 6))
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_linears_are_named_as_they_run(layers: int) -> None:
    model = LSTMLanguageModel(LSTMConfig(**(SIZES | {"num_layers": layers})))
    expected = [f"stack.{n}.{p}" for n in range(layers) for p in ("input", "recurrent")]
    expected.append(f"stack.{layers}.decoder")
    assert list(encoder_linears(model)) == searchable(model) == expected


def test_calibration_sums_what_enters_each_linear(
    model: LSTMLanguageModel, batches: list[Batch]
) -> None:
    found = calibrate(model, batches)
    assert list(found) == LINEARS
    parts = [by_hand(model, batch["input_ids"])[1] for batch in batches]
    for name, moment in found.items():
        rows = np.concatenate([part[name].reshape(-1, 8) for part in parts])
        assert moment.count == len(rows) == sum(b["labels"].numel() for b in batches)
        for one, other in [(moment.matrix, rows.T @ rows), (moment.total, rows.sum(0))]:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sequential", [True, False])
def test_calibration_sees_the_same_through_thin_layers_below(
    model: LSTMLanguageModel, batches: list[Batch], sequential: bool
) -> None:
    ranks = {"stack.0.input": 3, "stack.0.recurrent": 2}
    how = {"batches": batches, "sequential": True} if sequential else {}
    small = compress(model, ranks, **how)
    names = LINEARS[2:]
    found = calibrate(small, batches, names)
    parts = [by_hand(small, batch["input_ids"])[1] for batch in batches]
    for name in names:
        rows = np.concatenate([part[name].reshape(-1, 8) for part in parts])
        np.testing.assert_allclose(
            found[name].matrix, rows.T @ rows, rtol=1e-4, atol=1e-4
        )


# --- compression, walk and search ------------------------------------------------


@pytest.mark.parametrize("steps", LENGTHS)
def test_at_full_rank_the_logits_stay(model: LSTMLanguageModel, steps: int) -> None:
    ids = torch.randint(12, (3, steps))
    with pytest.warns(AboveBreakEvenWarning, match="5 of 5"):
        small = compress(model, dict.fromkeys(LINEARS, 8))
    assert set(low_rank_modules(small)) == set(LINEARS)
    torch.testing.assert_close(
        logits(small, ids), logits(model, ids), rtol=0, atol=1e-4
    )


RANKS = {
    "stack.0.input": 3,
    "stack.0.recurrent": 2,
    "stack.1.input": 2,
    "stack.1.recurrent": 3,
    "stack.2.decoder": 3,
}


def test_in_order_each_module_gets_the_inputs_from_the_thin_ones_below(
    model: LSTMLanguageModel, batches: list[Batch]
) -> None:
    found = compress(model, RANKS, batches=batches, sequential=True)
    slow = model
    for name, rank in RANKS.items():  # one after another, all calibrated anew
        slow = compress(slow, {name: rank}, calibrate(slow, batches, [name]))
    at_once = compress(model, RANKS, calibrate(model, batches, LINEARS))
    differ = []
    for batch in batches:
        ids = batch["input_ids"]
        torch.testing.assert_close(
            logits(found, ids), logits(slow, ids), rtol=0, atol=1e-3
        )
        differ.append((logits(found, ids) - logits(at_once, ids)).abs().max())
    assert max(differ) > 1e-2
    assert {n: m.rank for n, m in low_rank_modules(found).items()} == RANKS


@pytest.mark.parametrize("ranks", [{}, RANKS])
def test_a_walk_has_the_loss_of_a_full_pass_in_front_of_every_layer(
    model: LSTMLanguageModel, batches: list[Batch], ranks: dict[str, int]
) -> None:
    model = compress(model, ranks)
    expected = whole_loss(model, batches)
    moments = calibrate(model, batches, LINEARS)
    seen = []
    with frozen(model):
        assert mean_loss(model, batches) == pytest.approx(expected, rel=1e-6)
        walk = Walk(model, batches, LINEARS)
        assert list(walk.layers) == ["stack.0", "stack.1", "stack.2"]
        for _ in walk.layers:
            assert walk.loss() == pytest.approx(expected, rel=1e-6)
            for group in walk.groups():
                (name,) = group  # each has an input of its own
                found = walk.moments(group)[name]
                assert found.count == moments[name].count
                torch.testing.assert_close(
                    found.matrix, moments[name].matrix, rtol=1e-5, atol=1e-5
                )
                seen.append(name)
            walk.advance()
    assert seen == LINEARS


@pytest.fixture
def few_integer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "LATENCIES", 12)


def made_times(model: LSTMLanguageModel) -> Costs:
    """Times no clock has measured: a second a thousand numbers."""
    modules = {}
    for name in searchable(model):
        shape = model.get_submodule(name).weight.shape
        ranks = grid_ranks(largest_rank(model.get_submodule(name)), (0.25, 0.5, 1.0))
        weights = (*(rank * sum(shape) for rank in ranks), shape.numel())
        seconds = tuple(weight / 1000 for weight in weights)
        kind = f"{name.rpartition('.')[2]} {tuple(shape)}"
        modules[name] = ModuleCosts(kind, ranks, weights, seconds)
    whole = 0.1 + sum(module.seconds[-1] for module in modules.values())
    return Costs(whole, modules)


@pytest.mark.usefixtures("few_integer_programs")
@pytest.mark.parametrize("budget", [0.05, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_a_search_keeps_the_loss_within_its_budget(
    model: LSTMLanguageModel, batches: list[Batch], method: str, budget: float
) -> None:
    times, dense_loss = made_times(model), whole_loss(model, batches)
    smallest = {name: module.ranks[0] for name, module in times.modules.items()}
    cheapest = compress(model, smallest, calibrate(model, batches))
    assert whole_loss(cheapest, batches) > dense_loss * (1 + budget)  # not for nothing
    plan = search_ranks(model, batches, budget, times=times, method=method)
    small = plan.apply(model)
    found = whole_loss(small, batches)
    assert found <= dense_loss * (1 + budget) * (1 + 1e-6)
    assert found == pytest.approx(plan.loss, rel=1e-5)
    assert dense_loss == pytest.approx(plan.dense_loss, rel=1e-5)
    assert {n: m.rank for n, m in low_rank_modules(small).items()} == plan.ranks


@pytest.mark.usefixtures("few_integer_programs")
@pytest.mark.parametrize("target", ["parameters", "multiply_adds", "latency"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_search_keeps_to_its_share(
    model: LSTMLanguageModel, batches: list[Batch], method: str, target: str
) -> None:
    times = made_times(model)
    plan = search_ranks(model, batches, 0.6, times=times, method=method, target=target)
    small = plan.apply(model)
    table = report(small)
    weights = table["multiply_adds"].sum()
    dense_weights = table["multiply_adds_dense"].sum()
    if target == "latency":  # here a second is a thousand numbers, besides 0.1
        assert 0.1 + weights / 1000 <= 0.6 * (0.1 + dense_weights / 1000) + 1e-9
    else:
        assert weights <= 0.6 * dense_weights
    assert {n: m.rank for n, m in low_rank_modules(small).items()} == plan.ranks != {}


def test_a_search_measures_its_own_times(
    model: LSTMLanguageModel, batches: list[Batch]
) -> None:
    plan = search_ranks(model, batches, 0.5, grid=(0.5, 1.0))
    assert list(plan.costs.modules) == LINEARS
    found = whole_loss(plan.apply(model), batches)
    assert found <= whole_loss(model, batches) * 1.5 * (1 + 1e-6)


def test_the_product_with_h_is_timed_a_step_at_a_time(
    model: LSTMLanguageModel, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[str, set[tuple[int, ...]]] = {}

    def count(
        calls: Mapping[str, Any], repeats: int, **_: Any
    ) -> dict[str, np.ndarray]:
        for name, call in calls.items():
            call()
            if call.args:
                shapes.setdefault(name, set()).add(tuple(call.args[0].shape))
        return {name: np.ones(repeats) for name in calls}

    monkeypatch.setattr(costs, "time_calls", count)
    found = costs.measure(model, batches[0], repeats=3).modules  # 3 rows of 7 words
    for name, module in found.items():
        made, shape = (7, (3, 8)) if name.endswith("recurrent") else (1, (3, 7, 8))
        assert set(module.seconds) == {made}
        for option in range(len(module.seconds)):
            assert shapes[f"{module.kind}/{option}/0"] == {shape}
    assert found["stack.0.recurrent"].kind == found["stack.1.recurrent"].kind
    assert found["stack.0.input"].kind != found["stack.0.recurrent"].kind


def test_the_report_lists_every_linear_with_its_multiply_adds(
    model: LSTMLanguageModel,
) -> None:
    square = {name: 32 * 8 for name in LINEARS[:-1]} | {"stack.2.decoder": 12 * 8}
    table = report(model)
    assert list(table.index) == LINEARS and table["rank"].isna().all()
    assert dict(table["multiply_adds"]) == square
    small = report(compress(model, RANKS))
    assert list(small.index) == LINEARS
    assert dict(small["rank"]) == RANKS
    assert dict(small["multiply_adds_dense"]) == square
    outs = {name: 12 if name.endswith("decoder") else 32 for name in LINEARS}
    assert dict(small["multiply_adds"]) == {
        name: rank * (outs[name] + 8) for name, rank in RANKS.items()
    }
    # The bias of W_hh is in W_ih's.
    assert small.loc["stack.0.input", "parameters"] == 3 * 40 + 32
    assert small.loc["stack.0.recurrent", "parameters"] == 2 * 40


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("ranks", [{}, {"stack.0.input": 3, "stack.1.recurrent": 2}])
def test_a_pass_makes_the_multiply_adds_of_the_report(
    model: LSTMLanguageModel, ranks: dict[str, int], steps: int
) -> None:
    small = compress(model, ranks)
    found = multiply_adds(small, {"input_ids": torch.randint(12, (3, steps))})
    assert found == 3 * steps * report(small)["multiply_adds"].sum()


# --- on disk ---------------------------------------------------------------------


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    """The same classes, weights and, bit for bit, logits; in eval mode."""
    assert type(found) is type(expected)
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]
    assert not any(module.training for module in found.modules())
    for steps in LENGTHS:
        ids = torch.randint(12, (3, steps))
        assert torch.equal(logits(found, ids), logits(expected, ids))


def is_tied(model: LSTMLanguageModel) -> bool:
    return model.stack[-1].decoder.weight is model.embedding.weight


def with_thin_embedding(model: LSTMLanguageModel) -> LSTMLanguageModel:
    small = copy.deepcopy(model)
    small.embedding = LowRankEmbedding.from_embedding(
        model.embedding, 3, torch.arange(12)
    )
    return small


READ = [load, LSTMLanguageModel.from_pretrained, AutoModelForCausalLM.from_pretrained]


@pytest.mark.parametrize("read", READ, ids=["load", "class", "auto"])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: compress(model, RANKS),
        lambda model: compress(model, {"stack.1.recurrent": 2}),
        with_thin_embedding,
        lambda model: with_thin_embedding(compress(model, RANKS)),
    ],
    ids=["all thin", "one thin", "thin embedding", "all and embedding"],
)
def test_a_compressed_model_comes_back_bit_equal(
    model: LSTMLanguageModel, tmp_path: Path, make: Any, read: Any
) -> None:
    small = make(model)
    save(small, tmp_path / "model")
    found = read(tmp_path / "model")
    assert_equal(found, small)
    # And again: nothing is lost on the way.
    save(found, tmp_path / "again")
    assert_equal(load(tmp_path / "again"), small)


@pytest.mark.parametrize("read", READ[1:], ids=["class", "auto"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_comes_back_from_plain_save_pretrained(
    tmp_path: Path, tied: bool, read: Any
) -> None:
    model = lively(tie_word_embeddings=tied, num_layers=1)
    model.save_pretrained(tmp_path / "model")
    found = read(tmp_path / "model")
    assert_equal(found, model)
    assert is_tied(found) is is_tied(model) is tied
    for key, value in (SIZES | {"num_layers": 1}).items():
        assert getattr(found.config, key) == value


def test_tied_weights_are_one_tensor_whatever_is_done_with_the_rest(
    tmp_path: Path,
) -> None:
    model = lively(tie_word_embeddings=True)
    assert is_tied(model)
    count = sum(p.numel() for p in model.parameters())
    assert count == 12 * 8 + 2 * (2 * 32 * 8 + 32) + 12
    small = compress(model, {"stack.0.recurrent": 2, "stack.1.input": 3})
    save(small, tmp_path / "model")
    for each in (copy.deepcopy(model), small, load(tmp_path / "model")):
        assert is_tied(each)
    assert_equal(load(tmp_path / "model"), small)


@pytest.mark.parametrize("read", READ, ids=["load", "class", "auto"])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: compress(model, {"stack.0.recurrent": 2, "stack.2.decoder": 3}),
        with_thin_embedding,
        lambda model: with_thin_embedding(compress(model, {"stack.2.decoder": 3})),
    ],
    ids=["thin decoder", "thin embedding", "both thin"],
)
def test_a_tied_model_of_which_one_side_became_thin_comes_back(
    tmp_path: Path, make: Any, read: Any
) -> None:
    model = lively(tie_word_embeddings=True)
    before = model.embedding.weight.detach().clone()
    small = make(model)
    for dense_side in (small.embedding, small.stack[-1].decoder):
        if isinstance(dense_side, nn.Embedding | nn.Linear):
            assert torch.equal(dense_side.weight, before)
    save(small, tmp_path / "model")
    assert_equal(read(tmp_path / "model"), small)


def test_an_untied_model_shares_nothing(model: LSTMLanguageModel) -> None:
    assert not is_tied(model)
    with torch.no_grad():
        model.stack[-1].decoder.weight.zero_()
    assert model.embedding.weight.any()


def change_config(folder: Path, changes: dict[str, int]) -> None:
    """Change a saved config, in the form of folders that carry no digests."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    ours = config["quantization_config"]
    config["quantization_config"] = {
        "quant_method": ours["quant_method"],
        "ranks": ours["ranks"],
        "format_version": 1,
    }
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 6}, r"stack\.0\.\S+\.right has shape \(2, 8\); \(2, 6\) is"),
        ({"num_layers": 3}, r"missing keys: .*stack\.2\.input\.weight"),
        ({"vocab_size": 13}, r"embedding\.weight has shape \(12, 8\); \(13, 8\) is"),
        ({"num_layers": 1}, r"missing keys: stack\.1\.decoder"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_weights_of_another_model_are_refused_by_name(
    model: LSTMLanguageModel, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    folder = tmp_path / "model"
    save(compress(model, {"stack.0.recurrent": 2, "stack.1.input": 3}), folder)
    change_config(folder, changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_dense_table_in_place_of_a_thin_one_is_refused_by_name(
    model: LSTMLanguageModel, tmp_path: Path
) -> None:
    for name, make in {
        "dense": partial(compress, ranks={"stack.0.recurrent": 2}),
        "thin": with_thin_embedding,
    }.items():
        save(make(model), tmp_path / name)
    weights = (tmp_path / "dense" / "model.safetensors").read_bytes()
    (tmp_path / "thin" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="its SHA-256 is not the one"):
        load(tmp_path / "thin")
    change_config(tmp_path / "thin", {})
    with pytest.raises(ValueError, match="embedding has a rank in config"):
        load(tmp_path / "thin")
