"""8-bit weights: what is replaced, and how far the outputs move."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as Eight

import drone


def make_model(bias=True):
    torch.manual_seed(0)
    thin = drone.LowRankLinear(
        torch.randn(24, 4), torch.randn(4, 16), torch.randn(24) if bias else None
    )
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), thin).eval()


@pytest.mark.parametrize("bias", [True, False])
def test_two_linears_in_a_row_give_the_same_outputs(bias):
    model, x = make_model(bias), torch.randn(5, 8)
    plain = drone.model.quantize.as_linears(model)
    assert not any(isinstance(m, drone.LowRankLinear) for m in plain.modules())
    assert torch.equal(plain(x), model(x))


def test_a_low_rank_layer_alone_becomes_two():
    thin = make_model()[2]
    plain = drone.model.quantize.as_linears(thin)
    assert [type(module) for module in plain] == [nn.Linear, nn.Linear]
    x = torch.randn(3, 16)
    assert torch.equal(plain(x), thin(x))


def test_the_model_is_left_as_it_was():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    drone.quantize.int8(model)
    assert isinstance(model[2], drone.LowRankLinear)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_int8_moves_the_outputs_by_a_few_percent_and_not_at_all_nowhere():
    model, x = make_model(), torch.randn(64, 8)
    eight = drone.quantize.int8(model)
    linears = [m for m in eight.modules() if hasattr(m, "scale")]
    assert len(linears) == 3  # one dense, two of the thin one
    with torch.no_grad():
        moved = float((eight(x) - model(x)).norm() / model(x).norm())
    assert 0 < moved < 0.05


@pytest.mark.parametrize("low", [1e-6, 1e-3, 1.0])
def test_how_the_product_is_shared_out_does_not_count(low):
    thin, x = make_model()[2], torch.randn(64, 16)
    eight = drone.quantize.int8(thin)(x)
    sizes = torch.logspace(torch.tensor(low).log10(), -torch.tensor(low).log10(), 4)
    other = drone.LowRankLinear(
        thin.left.detach() / sizes, thin.right.detach() * sizes[:, None], thin.bias
    )
    found = drone.quantize.int8(other.eval())(x)
    exact = thin(x)
    # a few numbers lie on the border of two steps, and a step is a 127th of the largest
    assert (found - eight).abs().max() < 2 / 127 * eight.abs().max()
    assert (found - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("shared", ["left", "right"])
def test_a_factor_that_two_layers_share_is_scaled_for_each(shared):
    torch.manual_seed(0)
    factors = {"left": torch.randn(16, 4), "right": torch.randn(4, 16)}
    one = drone.LowRankLinear(**factors)
    two = drone.LowRankLinear(**{n: torch.randn_like(f) for n, f in factors.items()})
    setattr(two, shared, getattr(one, shared))
    model, x = nn.Sequential(one, two).eval(), torch.randn(8, 16)
    even = drone.model.quantize.unit_rows(model)
    torch.testing.assert_close(even(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(torch.allclose(m.right.norm(dim=1), torch.ones(4)) for m in even)


def test_a_row_of_zeros_stays():
    thin = make_model()[2]
    with torch.no_grad():
        thin.right[1] = 0
    even = drone.model.quantize.unit_rows(thin)
    torch.testing.assert_close(even(torch.eye(16)), thin(torch.eye(16)))
    lengths = even.right.norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_the_weights_take_a_quarter_of_the_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).eval()
    eight = drone.quantize.int8(model)
    (weight,) = [m.weight() for m in eight.modules() if hasattr(m, "scale")]
    assert weight.dtype == torch.qint8
    assert weight.int_repr().element_size() * 4 == model[0].weight.element_size()


def test_a_large_row_does_not_coarsen_the_others():
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 1000
    (weight,) = [
        m.weight() for m in drone.quantize.int8(model).modules() if hasattr(m, "scale")
    ]
    lost = (weight.dequantize() - model[0].weight).abs().amax(dim=1)
    # rounding moves an entry by half a step, and a row has 127 steps each way
    step = model[0].weight.detach().abs().amax(dim=1) / 127
    assert (lost <= 0.51 * step).all()


def test_no_warning_reaches_the_caller(recwarn):
    drone.quantize.int8(make_model())
    assert not list(recwarn)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        drone.quantize.int8(make_model().train())


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="bfloat16; float32"):
        drone.quantize.int8(make_model().bfloat16())


class Twice(nn.Module):
    """One layer under two names, as tied blocks have it."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(64, 64)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_a_layer_of_two_names_is_replaced_under_both():
    small, x = drone.compress(Twice().eval(), {"a": 8}), torch.randn(3, 64)
    plain = drone.model.quantize.as_linears(small)
    assert plain.a is plain.b and not isinstance(plain.b, drone.LowRankLinear)
    assert torch.equal(plain(x), small(x))
    eight = drone.quantize.int8(small)
    kinds = [type(module).__module__ for module in (*eight.a, *eight.b)]
    assert len(kinds) == 4 and all(".quantized." in kind for kind in kinds)


def test_a_model_that_asks_a_layer_for_its_weight_still_runs():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    t5 = hf.T5EncoderModel(hf.T5Config(vocab_size=50, **sizes)).eval()
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    torchs = nn.TransformerEncoder(layer, 2).eval()
    ids, x = torch.arange(5, 11)[None], torch.randn(2, 5, 64)
    wo = "encoder.block.0.layer.1.DenseReluDense.wo"
    for model, names, given, close in [
        (t5, [wo], ids, drone.quantize.int8),
        (torchs, ["layers.0.linear1", "layers.1.linear2"], x, None),
    ]:
        small = drone.compress(model, dict.fromkeys(names, 8))
        with torch.inference_mode():
            right = getattr(small(given), "last_hidden_state", None)
            right = small(given) if right is None else right
            plain = drone.model.quantize.as_linears(small)(given)
            plain = getattr(plain, "last_hidden_state", plain)
            torch.testing.assert_close(plain, right)
            if close is not None:
                eight = close(small)(given).last_hidden_state
                assert 0 < (eight - right).norm() < 0.1 * right.norm()


def test_the_two_linears_still_tell_their_weight_and_bias():
    thin = make_model()[2]
    plain = drone.model.quantize.as_linears(thin)
    assert torch.equal(plain.weight, thin.weight)
    assert torch.equal(plain.bias, thin.bias)
    eight = drone.quantize.int8(make_model())[2]
    assert (eight.weight - thin.weight).norm() < 0.02 * thin.weight.norm()
    assert torch.equal(eight.bias, thin.bias)


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "layer", "pair"])
def test_pytorchs_own_transformer_runs_its_8_bit_layers(
    kind, gradients, thin, monkeypatch
):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x, pads = torch.randn(3, 7, 16), torch.arange(7) >= torch.tensor([[7], [5], [2]])
    model, given = layer, {"src_key_padding_mask": pads}
    if kind == "encoder":  # packs rows with pads on its fused path
        model = nn.TransformerEncoder(layer, 2)
    elif kind == "pair":
        model = nn.Transformer(16, 2, 2, 1, 32, batch_first=True)
        given = {"tgt": x, **given, "memory_key_padding_mask": pads}
    model = model.eval()
    if thin:
        names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
        model = drone.compress(model, dict.fromkeys(names, 8))
    eight, ran = drone.quantize.int8(model), []
    linears = [m for m in eight.modules() if hasattr(m, "scale")]
    # no hooks: they alone would keep it off its fused path
    forward = Eight.forward
    monkeypatch.setattr(Eight, "forward", lambda *a: ran.append(1) or forward(*a))
    with torch.set_grad_enabled(gradients):
        found, expected = eight(x, **given), model(x, **given)
        # what the model returns for a pad depends on the path it takes
        moved = float((found - expected)[~pads].norm() / expected[~pads].norm())
    assert len(ran) == len(linears) > 0 and 0 < moved < 0.05
