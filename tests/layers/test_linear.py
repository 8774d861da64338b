"""`LowRankLinear` in the place of `nn.Linear`."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drone import LowRankLinear, SecondMoment, factorize
from drone.layers.linear import (
    as_linear,
    is_linear,
    linear_multiply_adds,
    parameters,
)


def storages(*tensors: Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)])
def test_at_full_rank_it_equals_the_dense_layer(
    shape: tuple[int, int], bias: bool
) -> None:
    dense = nn.Linear(*shape, bias=bias)
    thin = LowRankLinear.from_linear(dense, min(shape))
    x = torch.randn(2, 3, shape[0])
    torch.testing.assert_close(thin(x), dense(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_that_of_the_product_of_its_factors(bias: bool) -> None:
    left, right = torch.randn(7, 2), torch.randn(2, 5)
    b = torch.randn(7) if bias else None
    x = torch.randn(2, 3, 5)
    expected = torch.einsum("or,ri,bti->bto", left, right, x)
    expected = expected + b if b is not None else expected
    layer = LowRankLinear(left, right, b)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.dense_weight, left @ right)
    sizes = (layer.out_features, layer.in_features, layer.rank)
    assert sizes == (7, 5, 2)


def test_the_bias_is_added_once_and_unchanged() -> None:
    dense = nn.Linear(5, 7)
    thin = LowRankLinear.from_linear(dense, 2)
    assert torch.equal(thin(torch.zeros(5)), dense.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bias_dtype_mode_and_device_are_inherited(
    bias: bool, training: bool, dtype: torch.dtype
) -> None:
    dense = nn.Linear(5, 7, bias=bias, dtype=dtype).train(training)
    thin = LowRankLinear.from_linear(dense, 3)
    assert (thin.bias is not None) is bias
    assert thin.training is training
    assert {p.dtype for p in thin.parameters()} == {dtype}
    assert {p.device for p in thin.parameters()} == {dense.weight.device}


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_requires_grad_is_inherited_for_weight_and_bias_apart(
    weight: bool, bias: bool
) -> None:
    dense = nn.Linear(5, 7)
    dense.weight.requires_grad_(weight)
    dense.bias.requires_grad_(bias)
    thin = LowRankLinear.from_linear(dense, 3)
    found = (thin.left.requires_grad, thin.right.requires_grad, thin.bias.requires_grad)
    assert found == (weight, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_shared_with_the_dense_layer(dtype: torch.dtype) -> None:
    dense = nn.Linear(5, 7, dtype=dtype)
    thin = LowRankLinear.from_linear(dense, 5)
    assert not storages(*dense.parameters()) & storages(*thin.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_training_one_layer_leaves_others_of_the_same_factorization_alone(
    dtype: torch.dtype, rank: int
) -> None:
    dense = nn.Linear(5, 7, dtype=dtype)
    shared = factorize(dense.weight)
    first = LowRankLinear.from_linear(dense, rank, shared)
    second = LowRankLinear.from_linear(dense, rank, shared)
    before = second.dense_weight.detach().clone()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert torch.equal(second.dense_weight, before)


def test_a_given_factorization_gives_the_same_layer_bit_for_bit() -> None:
    dense = nn.Linear(5, 7)
    given = LowRankLinear.from_linear(dense, 3, factorize(dense.weight))
    for a, b in zip(
        given.parameters(),
        LowRankLinear.from_linear(dense, 3).parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_data_aware_factors_keep_the_bias_and_err_by_what_was_promised(
    dtype: torch.dtype,
) -> None:
    # A mean far from 0 and a large bias: who fits outputs with the bias adds it twice.
    dense = nn.Linear(5, 7, dtype=dtype)
    nn.init.normal_(dense.bias, mean=10)
    x = (torch.randn(40, 5) + 3).to(dtype)
    moment = SecondMoment(5)
    moment.update(x)
    found = factorize(dense.weight, moment)
    thin = LowRankLinear.from_linear(dense, 3, found)
    assert torch.equal(thin.bias, dense.bias)
    assert torch.equal(thin(torch.zeros_like(x))[0], dense.bias)
    assert thin.bias.data_ptr() != dense.bias.data_ptr()
    error = (dense.double()(x.double()) - thin.double()(x.double())).norm()
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4}[dtype]
    assert error.item() == pytest.approx(float(found.errors[3]), rel=tolerance)


def test_both_factors_and_the_bias_receive_gradients() -> None:
    thin = LowRankLinear.from_linear(nn.Linear(5, 7), 3)
    thin(torch.randn(2, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in thin.parameters())


@pytest.mark.parametrize("rank", [0, -1, 6, True, 2.0])
def test_from_linear_refuses_a_rank_that_is_not_allowed(rank: object) -> None:
    with pytest.raises(ValueError, match="1 to 5"):
        LowRankLinear.from_linear(nn.Linear(5, 7), rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 7), (7, 6), (6, 5), (3, 2)])
def test_from_linear_refuses_the_factorization_of_another_shape(
    shape: tuple[int, int],
) -> None:
    with pytest.raises(ValueError, match="7×5"):
        LowRankLinear.from_linear(nn.Linear(5, 7), 2, factorize(torch.randn(shape)))


@pytest.mark.parametrize(
    ("left", "right", "bias"),
    [
        ((7, 2), (3, 5), None),
        ((2, 7), (2, 5), None),
        ((7,), (7, 5), None),
        ((7, 2), (2,), None),
        ((1, 7, 2), (2, 5), None),
        ((7, 2), (2, 5), (5,)),
        ((7, 2), (2, 5), (7, 1)),
        ((7, 2), (2, 5), ()),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    left: tuple[int, ...], right: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    with pytest.raises(ValueError, match=r"is needed|are needed"):
        LowRankLinear(
            torch.ones(left),
            torch.ones(right),
            None if bias is None else torch.ones(bias),
        )


def test_multiply_adds_and_parameters_of_dense_and_thin() -> None:
    dense = nn.Linear(5, 7)
    thin = LowRankLinear.from_linear(dense, 2)
    assert linear_multiply_adds(dense) == 35
    assert linear_multiply_adds(thin) == 2 * 5 + 7 * 2
    assert (parameters(dense), parameters(thin)) == (35 + 7, 24 + 7)
    with pytest.raises(TypeError, match="ReLU"):
        linear_multiply_adds(nn.ReLU())


def test_parameters_counts_a_tied_tensor_once() -> None:
    layer = nn.Linear(4, 4)
    assert parameters(nn.Sequential(layer, layer)) == 20


@pytest.mark.parametrize(("rank", "saves"), [(2, True), (3, False)])
def test_saves_up_to_break_even(rank: int, saves: bool) -> None:
    # 2 · 12 = 24 < 35, 3 · 12 = 36 > 35
    assert LowRankLinear.from_linear(nn.Linear(5, 7), rank).saves is saves


def test_the_input_is_named_as_that_of_a_dense_layer() -> None:
    x = torch.randn(2, 5)
    dense = nn.Linear(5, 7)
    thin = LowRankLinear.from_linear(dense, 5)
    torch.testing.assert_close(thin(input=x), dense(input=x), rtol=0, atol=1e-5)


# --- in the place of a Linear whose weight is read ---------------------------------


def test_the_weight_is_the_product_with_gradients_and_cannot_be_set() -> None:
    thin = LowRankLinear.from_linear(nn.Linear(5, 7), 3)
    assert torch.equal(thin.weight, thin.left @ thin.right)
    thin.weight.sum().backward()
    assert thin.left.grad is not None and thin.right.grad is not None
    for value in (torch.ones(7, 5), nn.Parameter(torch.ones(7, 5)), None):
        with pytest.raises(AttributeError, match="set left and right"):
            thin.weight = value
    assert "weight" not in thin.state_dict()


def test_a_conv1d_is_a_transposed_linear_that_shares_its_tensors() -> None:
    conv = Conv1D(7, 5)
    linear, x = as_linear(conv), torch.randn(2, 3, 5)
    assert is_linear(conv) and (linear.out_features, linear.in_features) == (7, 5)
    torch.testing.assert_close(linear(x), conv(x))
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    assert linear_multiply_adds(conv) == 35
    thin = LowRankLinear.from_linear(conv, 5)
    torch.testing.assert_close(thin(x), conv(x), rtol=0, atol=1e-5)
    assert not storages(*conv.parameters()) & storages(*thin.parameters())
    with pytest.raises(TypeError, match="ReLU; Linear or Conv1D"):
        as_linear(nn.ReLU())
