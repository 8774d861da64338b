"""Everything takes the model's device, wherever batches, moments and plans are from."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_device import DEVICE, OtherDevice
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

import drone
from drone.devices import to_device
from drone.layers import lstm
from drone.search import costs
from drone.search.algorithm2 import METHODS
from drone.search.costs import GRID, grid_ranks, measure

CPU = torch.device("cpu")


def places(model: nn.Module) -> set[str]:
    """Types of device that a model's tensors are on."""
    return {tensor.device.type for tensor in model.state_dict().values()}


def there_and_back(device: torch.device) -> list[tuple[torch.device, torch.device]]:
    """Where something is made, and where it is used."""
    return [(device, device), (CPU, device), (device, CPU)]


# --- the pretended device ----------------------------------------------------------


def test_the_pretended_device_computes_and_refuses_what_a_gpu_refuses() -> None:
    with OtherDevice():
        x = torch.randn(4, 6)
        away = x.to(DEVICE)
        assert away.device == DEVICE and torch.equal((away @ away.T).cpu(), x @ x.T)
        assert (away + 1).device == DEVICE and torch.zeros(2, device=DEVICE).sum() == 0
        with pytest.raises(RuntimeError, match="same device"):
            away @ x.T
        with pytest.raises(RuntimeError, match="same device"):
            torch.randn(4, 6).add_(away)
        with pytest.raises(TypeError, match="numpy"):
            away.numpy()


# --- moments -----------------------------------------------------------------------


def test_sums_are_made_where_the_vectors_are_whatever_the_masks_device(
    device: torch.device,
) -> None:
    x, mask = torch.randn(2, 3, 200), torch.tensor([[1, 1, 0], [0, 1, 0]])
    rows = x[mask == 1].double()
    for place in (CPU, device):
        moment = drone.SecondMoment(200)
        moment.update(x.to(device), mask.to(place))
        moment.update(x.to(device)[0], mask.to(place)[0])
        assert {moment.device, moment.total.device} == {x.to(device).device}
        expected = rows.T @ rows + rows[:2].T @ rows[:2]
        assert torch.allclose(moment.matrix.cpu(), expected, atol=1e-10)
        assert torch.allclose(moment.total.cpu(), rows.sum(0) + rows[:2].sum(0))
        assert moment.count == 5
        assert moment.centred.device == moment.mean.device == moment.device


def test_nan_in_a_vector_that_counts_is_refused_on_every_device(
    device: torch.device,
) -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]]).to(device)
    moment = drone.SecondMoment(2)
    with pytest.raises(ValueError, match="NaN or Inf"):
        moment.update(x)
    assert moment.count == 0 and not moment.matrix.any()
    moment.update(x, torch.tensor([0, 1]))  # a pad may hold anything
    assert moment.matrix.cpu().tolist() == [[1, 2], [2, 4]]


def test_moments_of_two_devices_merge_copy_and_travel_through_a_file(
    device: torch.device, tmp_path: Path
) -> None:
    x, y = torch.randn(7, 5), torch.randn(9, 5)
    both = torch.cat([x, y]).double()
    for one, other in there_and_back(device):
        first, second = drone.SecondMoment(5), drone.SecondMoment(5)
        first.update(x.to(one))
        second.update(y.to(other))
        kept = first.copy()
        first.merge(second)
        assert first.device.type == one.type and second.count == 9
        assert torch.allclose(first.matrix.cpu(), both.T @ both)
        assert torch.allclose(first.total.cpu(), both.sum(0))
        assert kept.count == 7 and kept.device == first.device
        here = first.to("cpu")
        here.matrix.numpy()
        here.update(y.to(other))  # vectors come to where the sums are
        assert here.device == CPU and here.count == 25 and first.count == 16
        drone.save_moments({"a": first}, tmp_path / "moments.safetensors")
        back = drone.load_moments(tmp_path / "moments.safetensors")["a"]
        assert back.device == CPU and torch.equal(back.matrix, first.matrix.cpu())


@pytest.mark.parametrize(("free", "stays"), [(60, True), (50, False)])
def test_a_gpu_keeps_half_of_its_memory_free(
    monkeypatch: pytest.MonkeyPatch, free: int, stays: bool
) -> None:
    """Of 100 units, each the size of the sum."""
    unit = 8 * 3 * 3
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (free * unit, 100 * unit)
    )
    with FakeTensorMode():
        moment = drone.SecondMoment(3)
        moment._settle(torch.device("cuda:0"))
    assert moment.device.type == ("cuda" if stays else "cpu")
    assert moment.total.device == moment.device


# --- factorizations ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)], ids=str)
def test_a_factorization_is_made_where_the_weight_is_and_used_anywhere(
    device: torch.device, shape: tuple[int, int]
) -> None:
    linear, x = nn.Linear(shape[1], shape[0]), torch.randn(40, shape[1])
    expected = drone.factorize(linear.weight, moment_of(x)).truncate(3)
    for made, used in there_and_back(device):
        weight = copy.deepcopy(linear).to(made).weight
        for moment in (moment_of(x), moment_of(x.to(made)), moment_of(x).matrix):
            found = drone.factorize(weight, moment)
            assert found.errors.device.type == made.type
            layer = copy.deepcopy(linear).to(used)
            thin = drone.LowRankLinear.from_linear(layer, 3, found)
            assert places(thin) == {used.type}
            product = (thin.left @ thin.right).cpu()
            assert torch.allclose(product, expected[0] @ expected[1], atol=1e-5)


def moment_of(x: Tensor) -> drone.SecondMoment:
    moment = drone.SecondMoment(x.shape[-1])
    moment.update(x)
    return moment


def test_theorem_1_comes_out_where_the_weight_is(device: torch.device) -> None:
    w, x = torch.randn(5, 4), torch.randn(4, 30)
    expected = drone.theorem1(w, x, 2)
    for made, used in there_and_back(device):
        found = drone.theorem1(w.to(made), x.to(used), 2)
        assert found.device.type == made.type
        assert torch.allclose(found.cpu(), expected, atol=1e-8)


def test_attention_takes_the_blocks_device_and_dtype(
    device: torch.device, tiny_bert: PreTrainedModel
) -> None:
    dense = tiny_bert.bert.encoder.layer[0].attention.self
    x = torch.randn(60, 32)
    for made, used in there_and_back(device):
        away = copy.deepcopy(dense).to(made)
        found = drone.factorize_attention(
            away.query, away.key, 4, moment_of(x.to(used)), centre_keys=True
        )
        assert found.query.device.type == made.type
        for dtype in (torch.float32, torch.bfloat16):
            block = copy.deepcopy(dense).to(used, dtype)
            thin = drone.LowRankSelfAttention.from_attention(block, 5, found)
            assert places(thin) == {used.type}
            assert {p.dtype for p in thin.parameters()} == {dtype}


def test_an_embedding_becomes_thin_where_it_is(device: torch.device) -> None:
    table = nn.Embedding(30, 6).to(device)
    thin = drone.LowRankEmbedding.from_embedding(table, 6, torch.arange(30.0))
    assert places(thin) == {device.type}
    ids = torch.arange(30).to(device)
    assert torch.allclose(thin(ids), table(ids), atol=1e-5)


def test_an_lstm_becomes_thin_where_it_is(device: torch.device) -> None:
    whole = nn.LSTM(5, 4, 2, batch_first=True).to(device)
    thin = drone.LowRankLSTM.from_lstm(whole, {"weight_ih_l0": 4, "weight_hh_l1": 4})
    assert places(thin) == {device.type}
    assert thin(torch.randn(2, 3, 5).to(device))[0].device.type == device.type


# --- a whole model -----------------------------------------------------------------


def shuttle(batch: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """The same batch here and there."""
    return [batch, {key: value.to(device) for key, value in batch.items()}]


def test_calibrated_compressed_and_reported_on_its_device(
    device: torch.device, tiny_model: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    model = copy.deepcopy(tiny_model).to(device)
    names = costs.searchable(model)
    sources = [drone.model.walk.input_name(model.get_submodule(n), n) for n in names]
    here = drone.calibrate(tiny_model, [padded_batch], sources)
    ranks = dict.fromkeys(names, 5)
    expected = drone.compress(tiny_model, ranks, here)
    for batch in shuttle(padded_batch, device):
        there = drone.calibrate(model, [batch], sources)
        for name, moment in there.items():
            assert moment.device.type == device.type
            assert torch.allclose(moment.matrix.cpu(), here[name].matrix, atol=1e-3)
        for moments in (here, there):
            small = drone.compress(model, ranks, moments)
            assert places(small) == {device.type}
            same(small, expected, padded_batch)
            assert list(drone.report(small)["rank"].dropna())
        found = drone.factorize_modules(model, names, there)
        back = drone.compress(tiny_model, ranks, factorizations=found)
        assert places(back) == {"cpu"}
        same(back, expected, padded_batch)
        sequential = drone.compress(model, ranks, batches=[batch], sequential=True)
        assert places(sequential) == {device.type}


def same(one: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> None:
    """Two models give the same logits, wherever they are."""
    with torch.no_grad():
        first, second = (m(**to_device(batch, m)).logits.cpu() for m in (one, other))
    assert torch.allclose(first, second, atol=1e-3)


def test_costs_are_measured_on_the_models_device(
    device: torch.device, tiny_model: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    model = tiny_model.to(device)
    before = torch.random.get_rng_state()
    for batch in shuttle(padded_batch, device):
        found = measure(model, batch, grid=(0.5, 1.0))
        assert all(s > 0 for c in found.modules.values() for s in c.seconds)
    if device != DEVICE:  # where `nn.Linear(device="meta")` draws numbers
        assert torch.equal(torch.random.get_rng_state(), before)  # the caller's own


@pytest.mark.parametrize("method", METHODS)
def test_every_search_runs_and_its_plan_goes_to_another_device(
    device: torch.device, tiny_bert: PreTrainedModel, task: Any, method: str
) -> None:
    batches = task(tiny_bert)
    model = copy.deepcopy(tiny_bert).to(device)
    times = quick(measure(tiny_bert, batches[0], grid=(0.5, 1.0), repeats=2))
    plan = drone.search_ranks(model, batches, 0.5, times=times, method=method)
    assert plan.ranks
    there, here = plan.apply(model), plan.apply(tiny_bert)
    assert places(there) == {device.type} and places(here) == {"cpu"}
    same(there, here, {k: v for k, v in batches[0].items() if k != "labels"})
    assert {p.dtype for p in there.parameters()} == {torch.float32}
    # Rounded weights are other weights; what was searched is applied, then rounded.
    with pytest.raises(ValueError, match="not those that were searched"):
        plan.apply(copy.deepcopy(tiny_bert).bfloat16())


def quick(found: costs.Costs) -> costs.Costs:
    """The same costs with a clock by hand: every rank saves."""
    return costs.Costs(
        10.0,
        {
            name: costs.ModuleCosts(
                c.kind, c.ranks, c.weights, tuple(range(1, len(c.weights) + 1))
            )
            for name, c in found.modules.items()
        },
    )


def test_a_search_measures_its_own_times_there(
    device: torch.device, tiny_bert: PreTrainedModel, task: Any
) -> None:
    batches = task(tiny_bert)
    plan = drone.search_ranks(tiny_bert.to(device), batches, 0.5, grid=(0.5,))
    assert plan.loss <= plan.dense_loss * 1.5


def test_clocks_profiles_and_counts_bring_the_batch_to_the_model(
    device: torch.device, tiny_model: PreTrainedModel, padded_batch: dict[str, Tensor]
) -> None:
    here = copy.deepcopy(tiny_model)
    there = tiny_model.to(device)
    counted = drone.multiply_adds(here, padded_batch)
    for batch in shuttle(padded_batch, device):
        report = drone.compare_latency({"a": there, "b": here}, batch, repeats=2)
        assert (report.seconds["a"] > 0).all() and (report.seconds["b"] > 0).all()
        assert drone.profile_modules(there, batch, repeats=2)["share"].sum() > 0
        if device != DEVICE:  # the counter looks below what is pretended
            assert drone.multiply_adds(there, batch) == counted


# --- what differs on a GPU ---------------------------------------------------------


def test_eight_bits_are_for_the_processor_and_the_error_says_so() -> None:
    class OnGpu(nn.Linear):
        def parameters(self, recurse: bool = True) -> Iterator[Any]:
            weight = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
            return iter([weight])

    with pytest.raises(ValueError, match=r"on cuda; .* processor only: move the"):
        drone.quantize.int8(OnGpu(4, 3).eval())


def test_heads_on_a_gpu_have_ranks_of_multiples_of_8(
    tiny_bert: PreTrainedModel,
) -> None:
    assert grid_ranks(31, aligned=True) == (8, 16, 24)
    assert grid_ranks(7, aligned=True) == ()
    assert grid_ranks(63, aligned=True) == grid_ranks(63)
    block = tiny_bert.bert.encoder.layer[0].attention.self
    assert costs._ranks(block, GRID) == tuple(range(1, 8))
    with FakeTensorMode():
        block.query, block.key = on_gpu(32, 128), on_gpu(32, 128)
        assert costs._ranks(block, GRID) == (8, 16, 24)
        assert costs._ranks(on_gpu(32, 32), GRID) == grid_ranks(15)


def on_gpu(into: int, out: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer without numbers; inside a FakeTensorMode."""
    linear = nn.Linear(into, out, device="meta", bias=False)
    linear.weight = nn.Parameter(torch.empty(out, into, device="cuda", dtype=dtype))
    return linear


@pytest.mark.parametrize(
    ("dtype", "rank", "leaves"),
    [
        (torch.float16, 20, True),
        (torch.bfloat16, 12, True),
        (torch.float16, 24, False),
        (torch.float32, 20, False),
        (torch.float32, 21, True),
    ],
    ids=str,
)
def test_the_report_says_when_a_rank_leaves_the_fused_kernel(
    tiny_bert: PreTrainedModel, dtype: torch.dtype, rank: int, leaves: bool
) -> None:
    dense = tiny_bert.bert.encoder.layer[0].attention.self

    q, k = (nn.Linear(32, 4 * rank, dtype=dtype) for _ in range(2))
    here = drone.LowRankSelfAttention.replacing(dense, q, k)
    assert not here.leaves_fused_kernel  # on a CPU
    with FakeTensorMode():
        q, k = (on_gpu(32, 4 * rank, dtype) for _ in range(2))
        away = drone.LowRankSelfAttention.replacing(dense, q, k)
        assert away.leaves_fused_kernel is leaves
        note = drone.report(nn.ModuleDict({"self": away}))["note"].iloc[0]
    assert ("slow here" in note) is leaves


@pytest.mark.parametrize(
    ("kind", "dtype", "instructions", "has"),
    [
        ("cuda", torch.float16, True, True),
        ("cuda", torch.bfloat16, True, False),  # it would take float16
        ("cpu", torch.bfloat16, True, True),
        ("cpu", torch.bfloat16, False, False),
        ("cpu", torch.float16, True, False),
    ],
)
def test_the_lstm_kernel_is_uncast_where_it_has_not_the_autocast_dtype(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    instructions: bool,
    has: bool,
) -> None:
    monkeypatch.setattr(lstm, "multiplies_bfloat16", lambda _: instructions)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: dtype)
    assert lstm._kernel_has_autocast_dtype(torch.device(kind)) is has


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_under_autocast_the_lstm_kernel_gives_no_dtype_that_was_not_asked_for(
    half: torch.dtype,
) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    layer = drone.LSTMLayer(12, 8).to(kind)
    x = torch.randn(2, 20, 12, device=kind)
    expected, _ = layer(x)
    for learns in (False, True):
        with torch.autocast(kind, half), torch.set_grad_enabled(learns):
            output, state = layer(x)
        assert {t.dtype for t in (output, *state)} <= {half, torch.float32}
        assert torch.allclose(output.float(), expected, atol=0.02)
    output.float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_weights_lie_in_one_piece_in_order_and_gradients_go_through() -> None:
    weights = [
        torch.randn(8, 3, requires_grad=True),
        torch.randn(8, requires_grad=True),
    ]
    parts = lstm._in_one_piece(weights)
    start = parts[0].data_ptr()
    assert [part.data_ptr() - start for part in parts] == [0, 4 * 24]
    assert all(torch.equal(p, w) for p, w in zip(parts, weights, strict=True))
    sum((number + 1) * part.sum() for number, part in enumerate(parts)).backward()
    assert [w.grad.unique().tolist() for w in weights] == [[1], [2]]


# --- half precision and scales -----------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cast_is_right_or_refused_never_infinite(
    dtype: torch.dtype, scale: float
) -> None:
    linear = nn.Linear(24, 16, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.mul_(scale)
    x = torch.randn(100, 24)
    found = drone.factorize(linear.weight, moment_of(x))
    # What rounding the weight itself loses, in this dtype.
    lost = (linear.weight.to(dtype).double() - linear.weight).norm()
    layer = linear.to(dtype) if lost.isfinite() else linear.float().to(dtype)
    whole = found.left @ found.right
    if scale == 1e6 and dtype == torch.float16:
        with pytest.raises(ValueError, match="float16 cannot hold"):
            drone.LowRankLinear.from_linear(layer, 16, found)
        return
    thin = drone.LowRankLinear.from_linear(layer, 16, found)
    product = thin.left.double() @ thin.right.double()
    assert (product - whole).norm() <= 3 * lost + 1e-3 * lost


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attentions_cast_is_right_or_refused_never_infinite(
    dtype: torch.dtype, scale: float
) -> None:
    query, key = (nn.Linear(24, 16, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for part in itertools.chain(query.parameters(), key.parameters()):
            part.mul_(scale)
    found = drone.factorize_attention(query, key, 2, moment_of(torch.randn(100, 24)))
    like = torch.empty(0, dtype=dtype)
    if scale == 1e6 and dtype == torch.float16:
        with pytest.raises(ValueError, match="float16 cannot hold"):
            found.truncate(8, like)
        return
    parts = found.truncate(8, like)
    assert all(part.isfinite().all() and part.dtype == dtype for part in parts)
    exact = found.truncate(8)
    for one, other in zip(parts, exact, strict=True):
        assert (one.double() - other).norm() <= 1e-2 * other.norm() or scale == 1e-6


def test_a_plan_that_does_not_fit_the_models_dtype_is_refused(
    tiny_bert: PreTrainedModel, task: Any
) -> None:
    name = "bert.encoder.layer.0.output.dense"
    with torch.no_grad():
        tiny_bert.get_submodule(name).weight.mul_(1e6)
    small = drone.compress(tiny_bert, {name: 5}).get_submodule(name)
    with pytest.raises(ValueError, match=r"right has a number that torch\.float16"):
        drone.layers.linear.moved(small, torch.empty(0, dtype=torch.float16))


# --- calls of a module in a pass ---------------------------------------------------


class Calls(nn.Module):
    """One layer on 4×12 tokens, twice, and then on a short row."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.once = nn.Linear(8, 8), nn.Linear(8, 8)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.once(x)
        self.shared(x)
        self.shared(x)
        return self.shared(x[:1, :5])


def test_a_module_costs_all_its_calls_in_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def count(calls: Any, repeats: int, **_: Any) -> dict[str, Any]:
        def tokens(call: Any) -> float:
            return float(call.args[0].numel() // 8 if call.args else 1)

        return {name: [tokens(call)] * repeats for name, call in calls.items()}

    monkeypatch.setattr(costs, "time_calls", count)
    x = torch.randn(4, 12, 8)
    found = measure(Calls(), {"x": x}, ["shared", "once"], repeats=2).modules
    assert set(found["once"].seconds) == {48.0}
    assert set(found["shared"].seconds) == {48.0 + 48 + 5}
    assert found["shared"].kind != found["once"].kind
