"""The query-key product: against the SVD of all logits, and inside four families."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from drone import (
    AttentionFactorization,
    LowRankSelfAttention,
    SecondMoment,
    attention_blocks,
    calibrate,
    compress,
    encoder_linears,
    factorize_attention,
)
from drone.layers.attention import ATTENTION, query_and_key

DIM, HEADS, SIZE, TOKENS = 12, 2, 5, 60


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def falling_spectrum() -> Tensor:
    """Singular values from 1 to 1e-4."""
    u, v = torch.linalg.qr(normal(DIM, DIM))[0], torch.linalg.qr(normal(TOKENS, DIM))[0]
    return (u * torch.logspace(0, -4, DIM, dtype=torch.float64)) @ v.T


# X, (dim, tokens): what calibration meets, and what breaks a careless solution
INPUTS = {
    "full rank": lambda: normal(DIM, TOKENS),
    "falling spectrum": falling_spectrum,
    "rank-deficient": lambda: normal(DIM, 3) @ normal(3, TOKENS),
    "few tokens": lambda: normal(DIM, 4),
    "tiny": lambda: 1e-6 * normal(DIM, TOKENS),
    "huge": lambda: 1e6 * normal(DIM, TOKENS),
    "far from zero": lambda: normal(DIM, TOKENS) + 100 * normal(DIM, 1),
}


def projections(
    dtype: torch.dtype = torch.float32,
    biases: tuple[bool, bool] = (True, True),
) -> tuple[nn.Linear, nn.Linear]:
    query, key = (nn.Linear(DIM, HEADS * SIZE, bias=b, dtype=dtype) for b in biases)
    return query, key


def moment_of(x: Tensor) -> SecondMoment:
    moment = SecondMoment(len(x))
    moment.update(x.T)
    return moment


def queries(linear: nn.Linear, x: Tensor) -> Tensor:
    """W x + b in float64 by head: (heads, head size, tokens)."""
    out = linear.weight.detach().double() @ x
    if linear.bias is not None:
        out = out + linear.bias.detach().double()[:, None]
    return out.view(HEADS, -1, x.shape[1])


def logits(query: nn.Linear, key: nn.Linear, x: Tensor) -> Tensor:
    """qᵢ·kⱼ of all pairs of tokens, (heads, tokens, tokens)."""
    return queries(query, x).mT @ queries(key, x)


def thin(found: AttentionFactorization, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """The first rows of each head as layers, in float64: no rounding to a dtype."""
    linears = []
    for rows in (found.query, found.key):
        both = rows[:, :rank].flatten(0, 1)
        linear = nn.Linear(DIM, len(both), dtype=torch.float64)
        linear.weight.data, linear.bias.data = both[:, :-1], both[:, -1]
        linears.append(linear)
    return linears[0], linears[1]


def best_errors(logits: Tensor) -> np.ndarray:
    """Eckart-Young on the logits themselves: (heads, head size + 1)."""
    sigma = np.linalg.svd(logits.numpy(), compute_uv=False)
    return np.array(
        [[np.linalg.norm(s[rank:]) for rank in range(SIZE + 1)] for s in sigma]
    )


def measured_errors(found: AttentionFactorization, dense: Tensor, x: Tensor) -> Tensor:
    """The change of the logits at each rank, multiplied out."""
    changes = [dense] + [
        dense - logits(*thin(found, rank), x) for rank in range(1, SIZE + 1)
    ]
    return torch.stack([torch.linalg.matrix_norm(change) for change in changes], 1)


# --- the optimum -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "biases", [(True, True), (False, False), (True, False), (False, True)]
)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_rank_of_every_head_reaches_the_optimum(
    kind: str, biases: tuple[bool, bool], dtype: torch.dtype
) -> None:
    query, key = projections(dtype, biases)
    x = INPUTS[kind]()
    dense = logits(query, key, x)
    found = factorize_attention(query, key, HEADS, moment_of(x))
    measured = measured_errors(found, dense, x).numpy()
    best, norm = best_errors(dense), torch.linalg.matrix_norm(dense).numpy()[:, None]
    # Where the optimum is 0, rounding is all there is: a fraction of the logits.
    assert (measured <= best * (1 + 1e-6) + 1e-12 * norm).all()
    # What it says of itself: its root of a second moment has half of the digits.
    assert (np.abs(found.errors.numpy() - measured) <= 1e-7 * norm).all()


@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 40))
def test_errors_fall_to_zero_and_begin_at_the_norm_of_the_logits(
    seed: int, tokens: int
) -> None:
    torch.manual_seed(seed)
    query, key = projections()
    x = normal(DIM, tokens)
    errors = factorize_attention(query, key, HEADS, moment_of(x)).errors
    norms = torch.linalg.matrix_norm(logits(query, key, x))
    assert errors.shape == (HEADS, SIZE + 1) and errors.dtype == torch.float64
    torch.testing.assert_close(errors[:, 0], norms)
    assert (errors.diff(dim=1) <= 0).all() and (errors[:, -1] == 0).all()


@pytest.mark.parametrize("kind", ["full rank", "falling spectrum", "far from zero"])
def test_the_full_rank_reproduces_the_logits_of_tokens_never_seen(kind: str) -> None:
    query, key = projections()
    found = factorize_attention(query, key, HEADS, moment_of(INPUTS[kind]()))
    new = normal(DIM, 9)
    torch.testing.assert_close(
        logits(*thin(found, SIZE), new), logits(query, key, new), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
def test_without_a_moment_it_is_the_svd_of_the_product_of_the_weights(
    biases: tuple[bool, bool],
) -> None:
    query, key = projections(biases=biases)
    found = factorize_attention(query, key, HEADS)
    # x̃ = (x, 1) takes every direction once: the unit vectors are all the data.
    w_q, w_k = (
        torch.cat([layer(torch.eye(DIM)) - layer(zero), layer(zero)]).double().mT
        for zero in [torch.zeros(1, DIM)]
        for layer in (query, key)
    )
    product = w_q.view(HEADS, SIZE, -1).mT @ w_k.view(HEADS, SIZE, -1)
    u, s, v = torch.linalg.svd(product.detach())
    for rank in range(1, SIZE + 1):
        expected = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        rows = found.query[:, :rank].mT @ found.key[:, :rank]
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.errors, best_errors(product.detach()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_truncate_gives_each_heads_first_rows_in_the_weights_dtype(
    dtype: torch.dtype,
) -> None:
    found = factorize_attention(*projections(dtype), HEADS)
    assert (found.heads, found.max_rank) == (HEADS, SIZE)
    w_q, b_q, w_k, b_k = found.truncate(2)
    assert {part.dtype for part in (w_q, b_q, w_k, b_k)} == {dtype}
    for weight, bias, rows in [(w_q, b_q, found.query), (w_k, b_k, found.key)]:
        assert weight.shape == (HEADS * 2, DIM) and bias.shape == (HEADS * 2,)
        for head in range(HEADS):
            for row in range(2):
                expected = rows[head, row].to(dtype)
                assert torch.equal(weight[2 * head + row], expected[:-1])
                assert torch.equal(bias[2 * head + row], expected[-1])


@pytest.mark.parametrize("rank", [0, SIZE + 1, True, 2.0])
def test_truncate_refuses_a_rank_that_is_not_allowed(rank: object) -> None:
    with pytest.raises(ValueError, match=f"1 to {SIZE}"):
        factorize_attention(*projections(), HEADS).truncate(rank)  # type: ignore[arg-type]


# --- centred keys ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full rank", "far from zero"])
def test_centred_keys_leave_the_softmax_at_full_rank_as_it_was(kind: str) -> None:
    query, key = projections()
    x = INPUTS[kind]()
    found = factorize_attention(query, key, HEADS, moment_of(x), centre_keys=True)
    new = normal(DIM, 9)
    torch.testing.assert_close(
        logits(*thin(found, SIZE), new).softmax(-1),
        logits(query, key, new).softmax(-1),
    )


@pytest.mark.parametrize("kind", INPUTS)
def test_centred_keys_are_best_for_what_a_softmax_sees(kind: str) -> None:
    """A constant added to all logits of a query changes no softmax: rows are centred.

    Row-centred logits are themselves of the form X̃ᵀ M X̃, so that their own truncated
    SVD is the optimum, and the uncentred factors cannot do better.
    """
    query, key = projections()
    x = INPUTS[kind]()

    def centred(logits: Tensor) -> Tensor:
        return logits - logits.mean(-1, keepdim=True)

    dense = centred(logits(query, key, x))
    plain = factorize_attention(query, key, HEADS, moment_of(x))
    found = factorize_attention(query, key, HEADS, moment_of(x), centre_keys=True)
    best, norm = best_errors(dense), torch.linalg.matrix_norm(dense).numpy()
    # Before its mean was taken off a key was larger, and so was its rounding.
    size = torch.linalg.matrix_norm(logits(query, key, x)).numpy()
    slack = 1e-12 * size + 1e-8 * norm
    for rank in range(1, SIZE + 1):
        errors = [
            torch.linalg.matrix_norm(dense - centred(logits(*thin(f, rank), x))).numpy()
            for f in (found, plain)
        ]
        assert (errors[0] <= best[:, rank] * (1 + 1e-6) + slack).all()
        assert (errors[0] <= errors[1] * (1 + 1e-6) + slack).all()


def test_centred_keys_pay_where_keys_have_much_in_common() -> None:
    query, key = projections()
    x = INPUTS["far from zero"]()
    plain, centred = (
        factorize_attention(query, key, HEADS, moment_of(x), centre_keys=c)
        for c in (False, True)
    )
    assert (centred.errors[:, 0] < 0.1 * plain.errors[:, 0]).all()


# --- what is refused -------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    query, key = projections()
    empty, other = SecondMoment(DIM), moment_of(normal(DIM + 1, 20))
    for wrong, message in [
        (lambda: factorize_attention(query, nn.Linear(DIM, 4), HEADS), "equal shapes"),
        (lambda: factorize_attention(query, key, 3), "do not divide into 3 heads"),
        (lambda: factorize_attention(query, key, 0), "do not divide into 0 heads"),
        (lambda: factorize_attention(query, key, HEADS, empty), "count=0"),
        (lambda: factorize_attention(query, key, HEADS, other), f"dim {DIM}"),
        (
            lambda: factorize_attention(query, key, HEADS, centre_keys=True),
            "moment is needed",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(
    part: str, which: int, value: float
) -> None:
    both = projections()
    getattr(both[which], part).data.view(-1)[0] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        factorize_attention(*both, HEADS)


# --- in a model ------------------------------------------------------------------


def block_ranks(model: nn.Module, rank: int) -> dict[str, int]:
    return dict.fromkeys(attention_blocks(model), rank)


@pytest.fixture(
    params=[
        ("tiny_bert", "sdpa"),
        ("tiny_bert", "eager"),
        ("tiny_roberta", "sdpa"),
        ("tiny_roberta", "eager"),
        ("tiny_distilbert", "sdpa"),
        ("tiny_distilbert", "eager"),
        ("tiny_mpnet", "eager"),  # the only kernel it has
    ],
    ids="-".join,
)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each family under each attention kernel it has."""
    name, kernel = request.param
    model = request.getfixturevalue(name)
    model.set_attn_implementation(kernel)
    return model


def as_dense(model: PreTrainedModel, small: nn.Module) -> PreTrainedModel:
    """The dense model, its own code, with the thin projections filled up with zeros.

    A row of zeros adds nothing to q·k, so that both must compute the same.
    """
    model = copy.deepcopy(model)
    for name, block in attention_blocks(model).items():
        new = small.get_submodule(name)
        names = ATTENTION[type(block).__name__]
        for part in (names.query, names.key):
            for target, source in zip(
                getattr(block, part).parameters(),
                getattr(new, part).parameters(),
                strict=True,
            ):
                wide = target.data.view(4, 8, -1)  # heads, head size
                wide.zero_()[:, : new.rank] = source.data.view(4, new.rank, -1)
    return model


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_low_rank_block_computes_what_the_familys_own_code_does(
    dense: PreTrainedModel, padded_batch: dict[str, Tensor], rank: int
) -> None:
    small = compress(
        dense, block_ranks(dense, rank), calibrate(dense, [dict(padded_batch)])
    )
    original = as_dense(dense, small)
    with torch.inference_mode():
        found, expected = small(**padded_batch), original(**padded_batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    for block in (small.get_submodule(name) for name in attention_blocks(dense)):
        assert isinstance(block, LowRankSelfAttention)
        assert (block.rank, block.heads, block.head_size) == (rank, 4, 8)


@pytest.mark.parametrize("with_moments", [False, True])
def test_at_full_rank_the_logits_of_a_padded_batch_are_the_dense_models(
    dense: PreTrainedModel, padded_batch: dict[str, Tensor], with_moments: bool
) -> None:
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.randint(5, 100, (4, 2, 20))
    ]
    moments = calibrate(dense, batches) if with_moments else None
    small = compress(dense, block_ranks(dense, 8), moments)
    with torch.inference_mode():
        found, expected = small(**padded_batch).logits, dense(**padded_batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_row_gives_the_same_with_pads_and_without(
    dense: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    small = compress(dense, block_ranks(dense, 3))
    with torch.inference_mode():
        together = small(**padded_batch).logits
        for row, length in enumerate([12, 7, 3]):
            alone = {k: v[row : row + 1, :length] for k, v in padded_batch.items()}
            torch.testing.assert_close(together[row : row + 1], small(**alone).logits)


def test_no_mask_is_a_mask_of_ones(dense: PreTrainedModel) -> None:
    small = compress(dense, block_ranks(dense, 3))
    ids = torch.randint(5, 100, (2, 9))
    with torch.inference_mode():
        expected = small(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(small(input_ids=ids).logits, expected)


def test_mpnets_position_bias_is_kept(
    tiny_mpnet: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    small = compress(tiny_mpnet, block_ranks(tiny_mpnet, 3))
    with torch.inference_mode():
        before = small(**padded_batch).logits
        small.mpnet.encoder.relative_attention_bias.weight.mul_(2)
        assert not torch.allclose(small(**padded_batch).logits, before, atol=1e-3)


def test_attention_weights_of_all_layers_are_recorded(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    family.set_attn_implementation("eager")
    small = compress(family, block_ranks(family, 3))
    original = as_dense(family, small)
    with torch.inference_mode():
        found, expected = (
            model(**padded_batch, output_attentions=True).attentions
            for model in (small, original)
        )
    assert len(found) == 2
    torch.testing.assert_close(found, expected)


def test_the_kernel_may_be_chosen_after_compression(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    small = compress(family, block_ranks(family, 3))
    with torch.inference_mode():
        expected = small(**padded_batch).logits
        small.set_attn_implementation("eager")
        found = small(**padded_batch, output_attentions=True)
    assert len(found.attentions) == 2
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)


def test_training_drops_out_as_the_original_and_gradients_are_its_own(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    family.set_attn_implementation("eager")  # SDPA draws its dropout in another order
    small = compress(family, block_ranks(family, 3)).train()
    original = as_dense(family, small).train()
    outputs = []
    for model in (small, original):
        torch.manual_seed(1)
        outputs.append(model(**padded_batch).logits)
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    torch.manual_seed(2)
    assert not torch.allclose(small(**padded_batch).logits, outputs[0], atol=1e-3)
    wide = dict(original.named_parameters())
    for name, parameter in small.named_parameters():
        expected = wide[name].grad
        if parameter.shape != wide[name].shape:  # the thin rows of each head
            expected = expected.view(4, 8, -1)[:, :3].reshape(parameter.shape)
        # the gradient of the keys' bias is 0: a softmax does not see it
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("probability", [0.0, 0.9])
def test_attention_dropout_is_that_of_the_block_under_both_kernels(
    dense: PreTrainedModel, padded_batch: dict[str, Tensor], probability: float
) -> None:
    small = compress(dense, block_ranks(dense, 3)).train()
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in attention_blocks(dense):
        small.get_submodule(name).dropout.p = probability
    runs = [small(**padded_batch).logits for _ in range(2)]
    assert torch.equal(*runs) is (probability == 0)


def test_the_blocks_other_parts_compress_before_it_and_after_it(
    family: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    moments = calibrate(family, [dict(padded_batch)])
    blocks = block_ranks(family, 3)
    inside = {
        name: 7
        for name in encoder_linears(family)
        for block in blocks
        if name.startswith(f"{block}.")
        and family.get_submodule(name) not in query_and_key(family.get_submodule(block))
    }
    assert len(inside) in (2, 4)  # values, and outputs where they are in the block
    found = [
        compress(family, blocks | inside, moments),
        compress(family, inside | blocks, moments),
        compress(compress(family, inside, moments), blocks, moments),
        compress(compress(family, blocks, moments), inside, moments),
    ]
    first = found[0].state_dict()
    for other in found[1:]:
        state = other.state_dict()
        assert list(state) == list(first)
        assert all(torch.equal(state[key], first[key]) for key in first)
        assert torch.equal(
            other(**padded_batch).logits, found[0](**padded_batch).logits
        )


def test_it_is_also_of_its_familys_class_and_says_its_sizes(
    family: PreTrainedModel,
) -> None:
    (name, dense), *_ = attention_blocks(family).items()
    new = compress(family, {name: 3}).get_submodule(name)
    assert isinstance(new, type(dense))
    assert "heads=4, rank=3, head_size=8" in repr(new)
    assert new.in_features == 32


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_mode_dtype_and_requires_grad_are_inherited(
    family: PreTrainedModel, trains: bool, mode: bool
) -> None:
    model = family.to(torch.bfloat16).requires_grad_(trains).train(mode)
    small = compress(model, block_ranks(model, 3))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert {p.requires_grad for p in small.parameters()} == {trains}
    assert {module.training for module in small.modules()} == {mode}


# --- blocks that are refused -----------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("which", [0, 1], ids=["query", "key"])
def test_each_parameter_trains_if_its_own_dense_one_does(
    family: PreTrainedModel, part: str, which: int
) -> None:
    """One that trains biases alone, or has a frozen key, goes on so."""
    (block, *_) = attention_blocks(family)
    pair = query_and_key(family.get_submodule(block))
    for other in pair:
        other.requires_grad_(False)
    getattr(pair[which], part).requires_grad_(True)
    thin = query_and_key_of(compress(family, {block: 3}).get_submodule(block))
    found = [
        (i, n) for i in (0, 1) for n, p in thin[i].named_parameters() if p.requires_grad
    ]
    assert found == [(which, part)]


def query_and_key_of(small: nn.Module) -> list[nn.Module]:
    return [getattr(small, name) for name in small.projections]


def test_a_decoder_is_refused_and_its_block_named() -> None:
    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
        )
    )
    name = "bert.encoder.layer.0.attention.self"
    with pytest.raises(ValueError, match=f"{name}: this BertSelfAttention is a decode"):
        compress(model, {name: 2})


@pytest.mark.parametrize("argument", ["past_key_values", "encoder_hidden_states"])
def test_a_call_as_a_decoders_block_is_refused(
    family: PreTrainedModel, argument: str
) -> None:
    name = next(iter(attention_blocks(family)))
    block = compress(family, {name: 2}).get_submodule(name)
    x = torch.randn(1, 3, 32)
    block(x, **{argument: None})
    with pytest.raises(ValueError, match=f"{argument} was given"):
        block(x, **{argument: object()})


def test_an_unknown_block_is_refused_and_the_known_ones_named() -> None:
    block = nn.MultiheadAttention(8, 2)
    query = nn.Linear(8, 4)
    for wrong in (
        lambda: LowRankSelfAttention(block, query, query),
        lambda: query_and_key(block),
    ):
        with pytest.raises(ValueError, match="MultiheadAttention; one of BertSelf"):
            wrong()


def test_projections_that_do_not_fit_the_heads_are_refused(
    tiny_bert: PreTrainedModel,
) -> None:
    block = next(iter(attention_blocks(tiny_bert).values()))
    for rows in [(6, 6), (8, 4)]:
        with pytest.raises(ValueError, match="same multiple of 4"):
            LowRankSelfAttention(block, *(nn.Linear(32, r) for r in rows))


def test_the_factorization_of_another_block_is_refused(
    tiny_bert: PreTrainedModel,
) -> None:
    block = next(iter(attention_blocks(tiny_bert).values()))
    other = factorize_attention(*projections(), HEADS)
    with pytest.raises(ValueError, match=r"2 heads of 5 with 12 inputs.* 32×32"):
        LowRankSelfAttention.from_attention(block, 2, other)
