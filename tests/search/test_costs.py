"""What a module costs: ranks on a grid, numbers in matrices, seconds of the clock."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from drone import LowRankLinear, attention_blocks, break_even_rank, compress
from drone.layers.attention import ATTENTION
from drone.layers.linear import parameters
from drone.search import costs
from drone.search.costs import (
    GRID,
    Costs,
    ModuleCosts,
    grid_ranks,
    measure,
    measure_alone,
    searchable,
)
from drone.search.thin import thin_model

Batch = dict[str, Tensor]
COARSE = (0.25, 0.5, 1.0)


# --- what is searched ------------------------------------------------------------


def test_of_a_bert_blocks_values_and_the_three_other_linears_are_searched(
    tiny_bert: PreTrainedModel,
) -> None:
    assert searchable(tiny_bert) == [
        f"bert.encoder.layer.{layer}.{part}"
        for layer in range(2)
        for part in (
            "attention.self",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]


def test_blocks_and_linears_outside_queries_and_keys_are_searched_in_order(
    family: PreTrainedModel,
) -> None:
    names = searchable(family)
    modules = dict(family.named_modules())
    assert names == [name for name in modules if name in names]
    kinds = [type(modules[name]).__name__ for name in names]
    assert sum(kind in ATTENTION for kind in kinds) == 2
    assert kinds.count("Linear") == 2 * 4 and len(names) == 10
    last = {name.rpartition(".")[2] for name in names}
    assert not last & {"query", "key", "q", "k", "q_lin", "k_lin"}
    assert not any("classifier" in name or "pooler" in name for name in names)


class Plain(nn.Module):
    """Two layers without attention, as far as anyone knows."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
            for _ in range(2)
        )
        self.spare = nn.Linear(size, size)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layer:
            x = layer(x)
        return x


def test_without_a_known_block_all_linears_of_the_layers_are_searched() -> None:
    assert searchable(Plain()) == [
        "encoder.layer.0.0",
        "encoder.layer.0.2",
        "encoder.layer.1.0",
        "encoder.layer.1.2",
    ]


def test_a_model_without_a_linear_has_nothing_to_search() -> None:
    with pytest.raises(ValueError, match="no Linear"):
        searchable(nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)))


# --- ranks -----------------------------------------------------------------------

shares = st.lists(
    st.floats(0, 1, exclude_min=True, allow_subnormal=False), min_size=1, max_size=15
)


@given(st.integers(0, 2000), shares | st.just(list(GRID)))
def test_ranks_ascend_once_each_and_save(largest: int, grid: list[float]) -> None:
    ranks = grid_ranks(largest, grid)
    assert list(ranks) == sorted(set(ranks))
    assert all(1 <= rank <= largest for rank in ranks)
    assert bool(ranks) is (largest > 0)
    if largest >= 32:
        assert all(rank % 8 == 0 for rank in ranks)


@given(st.integers(1, 2000), shares)
def test_each_share_is_rounded_down_to_a_rank_and_no_rank_is_without_one(
    largest: int, grid: list[float]
) -> None:
    step = 8 if largest >= 32 else 1
    ranks, slack = grid_ranks(largest, grid), 1e-6

    def fits(rank: int, share: float) -> bool:
        exact = share * largest
        return exact - step - slack < rank <= exact + slack or (
            rank == step and exact < step
        )

    assert all(any(fits(rank, share) for rank in ranks) for share in grid)
    assert all(any(fits(rank, share) for share in grid) for rank in ranks)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (0, ()),
        (1, (1,)),
        (7, (1, 2, 3, 4, 5, 6, 7)),
        (12, tuple(range(1, 13))),
        (31, (2, 5, 7, 10, 12, 15, 18, 20, 23, 25, 28, 31)),
        (32, (8, 16, 24, 32)),
        (63, (8, 16, 24, 32, 40, 48, 56)),
        (64, (8, 16, 24, 32, 40, 48, 56, 64)),
        (191, (8, 24, 40, 56, 72, 88, 104, 120, 136, 152, 168, 184)),
        (384, tuple(range(32, 385, 32))),  # twelfths of 384 are whole: no step lost
    ],
)
def test_twelfths_by_hand(largest: int, expected: tuple[int, ...]) -> None:
    assert grid_ranks(largest, [n / 12 for n in range(1, 13)]) == expected


def test_the_usual_grid_is_tenths() -> None:
    assert grid_ranks(10) == tuple(range(1, 11))
    assert grid_ranks(400) == tuple(range(40, 401, 40))
    assert grid_ranks(47) == (8, 16, 24, 32, 40)


@pytest.mark.parametrize(
    "grid", [(), (0.0,), (0.5, -0.1), (1.01,), (0.5, float("nan"))], ids=str
)
def test_a_grid_of_other_than_shares_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"shares in \(0, 1\]"):
        grid_ranks(12, grid)


def test_the_largest_rank_is_break_even_or_one_below_the_head_size(
    family: PreTrainedModel,
) -> None:
    for block in attention_blocks(family).values():
        assert costs.largest_rank(block) == 7  # heads of 8
    for out, into in [(32, 32), (64, 32), (5, 1), (1, 1)]:
        largest = costs.largest_rank(nn.Linear(into, out))
        assert largest == break_even_rank(out, into)
        assert largest * (out + into) < out * into <= (largest + 1) * (out + into)


def test_another_module_has_no_largest_rank() -> None:
    with pytest.raises(ValueError, match="a ReLU; one of BertSelfAttention"):
        costs.largest_rank(nn.ReLU())


# --- measured --------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Callable[[], Any]]]:
    """Instead of the clock: a call takes as many seconds as its module has numbers.

    Its mean is another; and the modules are called, in inference mode."""
    seen = []

    def count(
        calls: Mapping[str, Callable[[], Any]], repeats: int, **_: Any
    ) -> dict[str, np.ndarray]:
        assert torch.is_inference_mode_enabled()
        seen.append(calls)
        for call in calls.values():
            call()
        return {
            name: np.array([float(numbers(call))] * (repeats - 1) + [1e9])
            for name, call in calls.items()
        }

    def numbers(call: Any) -> int:
        return parameters(call.func)

    monkeypatch.setattr(costs, "time_calls", count)
    return seen


def test_weights_are_the_numbers_in_the_matrices(
    family: PreTrainedModel, padded_batch: Batch, clock: list[Mapping[str, Any]]
) -> None:
    found = measure(family, padded_batch, grid=COARSE, repeats=2)
    assert list(found.modules) == searchable(family)
    for name, module in found.modules.items():
        dense = family.get_submodule(name)
        largest = costs.largest_rank(dense)
        assert module.ranks == grid_ranks(largest, COARSE)
        for rank, weights in zip([*module.ranks, None], module.weights, strict=True):
            small = family if rank is None else compress(family, {name: rank})
            new = small.get_submodule(name)
            if isinstance(dense, nn.Linear):
                parts = [new]
            else:
                names = ATTENTION[type(dense).__name__]
                parts = [getattr(new, names.query), getattr(new, names.key)]
            matrices = [p for part in parts for p in part.parameters() if p.ndim == 2]
            assert weights == sum(p.numel() for p in matrices)
        assert list(module.weights) == sorted(set(module.weights))  # all save


def test_modules_of_one_kind_cost_the_same_and_others_are_of_another(
    family: PreTrainedModel, padded_batch: Batch, clock: list[Mapping[str, Any]]
) -> None:
    found = measure(family, padded_batch, grid=COARSE, repeats=2).modules
    shapes = {}
    for name, module in found.items():
        dense = family.get_submodule(name)
        linear = isinstance(dense, nn.Linear)
        shape = tuple(dense.weight.shape) if linear else type(dense)
        shapes.setdefault(module.kind, set()).add(shape)
        assert module == next(m for m in found.values() if m.kind == module.kind)
        assert len(module.seconds) == len(module.weights) == len(module.ranks) + 1
        assert all(seconds > 0 for seconds in module.seconds)
    # the block, 32×32, 64×32 and 32×64; both layers alike
    assert len(shapes) == 4 and all(len(each) == 1 for each in shapes.values())


def test_each_rank_gets_the_median_of_its_own_time(
    family: PreTrainedModel, padded_batch: Batch, clock: list[Mapping[str, Any]]
) -> None:
    found = measure(family, padded_batch, grid=COARSE, repeats=5)
    assert found.whole == parameters(family)
    for name, module in found.modules.items():
        dense = family.get_submodule(name)
        assert module.seconds[-1] == parameters(dense)
        for rank, seconds in zip(module.ranks, module.seconds, strict=False):
            small = compress(family, {name: rank})
            assert seconds == parameters(small.get_submodule(name))
    # One of each kind is timed at its three ranks and dense, and then the whole.
    calls, pair = clock
    assert len(calls) == 4 * 4 and list(pair) == ["whole", "thin"]


def test_what_modules_save_is_what_they_save_together(
    family: PreTrainedModel,
    padded_batch: Batch,
    clock: list[Mapping[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = measure(family, padded_batch, grid=COARSE, repeats=5)
    by_numbers = costs.time_calls

    def less_alone(calls: Mapping[str, Any], *rest: Any, **more: Any) -> Any:
        times = by_numbers(calls, *rest, **more)
        share = 1 if "whole" in calls else 0.8
        return {name: share * seconds for name, seconds in times.items()}

    monkeypatch.setattr(costs, "time_calls", less_alone)
    found = measure(family, padded_batch, grid=COARSE, repeats=5)
    by_itself = measure_alone(family, padded_batch, grid=COARSE, repeats=5)
    assert found.whole == alone.whole
    for name, module in found.modules.items():
        assert module.seconds == pytest.approx(alone.modules[name].seconds)
        assert by_itself[name].seconds == pytest.approx(
            [0.8 * seconds for seconds in module.seconds]
        )
    quickest = found.smallest(by_seconds=True)
    assert found.speedup(quickest) == pytest.approx(alone.speedup(quickest))
    assert set(quickest.values()) == {m.ranks[0] for m in found.modules.values()}


def pretend(seconds: Callable[[str], float]) -> Callable[..., dict[str, np.ndarray]]:
    """A clock that looks at the call's name only."""

    def time_calls(
        calls: Mapping[str, Any], repeats: int, **_: Any
    ) -> dict[str, np.ndarray]:
        return {name: np.full(repeats, seconds(name)) for name in calls}

    return time_calls


def test_a_rank_that_is_slower_alone_has_no_say_in_the_factor(
    family: PreTrainedModel, padded_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"whole": 30.0, "thin": 26.0}

    def seconds(name: str) -> float:
        if name in times:
            return times[name]
        kind, option, _ = name.split("/")
        if kind.startswith("Linear"):  # ten times as slow where it is thin
            return 1.0 if option == "3" else 10.0
        return 3.0 if option == "3" else 2.0  # a block saves one second

    monkeypatch.setattr(costs, "time_calls", pretend(seconds))
    found = measure(family, padded_batch, grid=COARSE, repeats=2).faster()
    quickest = found.smallest(by_seconds=True)
    assert len(quickest) == 2  # two blocks, one second each: 4 seconds together
    assert found.latency(quickest) == pytest.approx(26.0)


@pytest.mark.parametrize(("thin", "word"), [(19.0, ""), (20.0, "not together")])
def test_where_little_or_nothing_is_saved_the_times_stay_as_they_are(
    family: PreTrainedModel,
    padded_batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
    thin: float,
    word: str,
) -> None:
    gain = 0.01 if not word else 1.0  # of each module

    def seconds(name: str) -> float:
        if name in ("whole", "thin"):
            return 20.0 if name == "whole" else thin
        return 2.0 if name.split("/")[1] == "3" else 2.0 - gain

    monkeypatch.setattr(costs, "time_calls", pretend(seconds))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = measure(family, padded_batch, grid=COARSE, repeats=2)
    assert [w for w in said if "not together" in str(w.message)] == said
    assert bool(said) == bool(word)
    seen = {s for module in found.modules.values() for s in module.seconds}
    assert found.whole == 20.0 and seen == {2.0, 2.0 - gain}


@pytest.mark.parametrize("slower", [1.0, 4.0, 30.0])
def test_a_clock_that_something_else_disturbed_is_refused(
    monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    made: dict[str, float] = {}

    def time_calls(calls: Mapping[str, Any], repeats: int, **_: Any) -> Any:
        for name, call in calls.items():
            made[name] = 1e-6 * parameters(call.func)
            if isinstance(call.func, nn.Linear):  # who else ran, ran beside dense ones
                made[name] *= slower
        return {name: np.full(repeats, made[name]) for name in calls}

    monkeypatch.setattr(costs, "time_calls", time_calls)
    given = Plain(40), {"x": torch.ones(1, 40)}
    alone = measure_alone(*given, repeats=2)  # the least of many tables may count
    if slower < 5:  # caches do as much
        assert measure(*given, repeats=2).modules.keys() == alone.keys()
        return
    with pytest.raises(ValueError, match="again on a quiet machine") as refused:
        measure(*given, repeats=2)
    for word in ("encoder.layer.0.0", "rank 19 ", "1.56 ms", "49.2 ms", "95 %"):
        assert word in str(refused.value)


def test_dearer_than_its_share_is_no_disturbance() -> None:
    tiny = ModuleCosts("a", (1, 2), (10, 20, 100), (2e-6, 9e-6, 1e-6))
    costs.refuse_disturbed({"tiny": tiny, "none": ModuleCosts("b", (), (7,), (1.0,))})


def test_of_calls_that_cost_no_more_than_calling_nothing_is_refused() -> None:
    short, longer = (
        ModuleCosts("a", (1,), (10, 100), (thin, 60 * thin)) for thin in (9e-5, 1.1e-4)
    )
    costs.refuse_disturbed({"short": short})
    with pytest.raises(ValueError, match="longer: at rank 1"):
        costs.refuse_disturbed({"short": short, "longer": longer})


def test_a_query_inside_a_thin_block_is_timed_and_not_counted_twice(
    tiny_bert: PreTrainedModel, padded_batch: Batch, clock: list[Mapping[str, Any]]
) -> None:
    block = "bert.encoder.layer.0.attention.self"
    names = [block, f"{block}.query", f"{block}.value"]
    found = measure(tiny_bert, padded_batch, names, grid=COARSE, repeats=5)
    small, put = thin_model(tiny_bert, {name: 2 for name in names})
    assert put == [block, f"{block}.value"]
    # what stays dense is not copied
    other = "bert.encoder.layer.1.output.dense"
    shared = (m.get_submodule(other).weight for m in (small, tiny_bert))
    assert len({id(weight) for weight in shared}) == 1
    for name, module in found.modules.items():  # the clock counts numbers: factor 1
        assert module.seconds[-1] == parameters(tiny_bert.get_submodule(name))


def test_linears_with_and_without_bias_or_on_other_lengths_are_of_other_kinds(
    clock: list[Mapping[str, Any]],
) -> None:
    class Odd(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.spare(super().forward(x)[:1])

    model = Odd()
    model.encoder.layer[0][0] = nn.Linear(4, 4, bias=False).eval()
    names = [*searchable(model), "spare"]
    found = measure(model, {"x": torch.randn(3, 4)}, names, repeats=2).modules
    kinds = [module.kind for module in found.values()]
    assert kinds[1] == kinds[2] == kinds[3] and len(set(kinds)) == 3
    assert {module.weights for module in found.values()} == {(8, 16)}


def test_one_module_under_two_names_is_thin_once_and_keeps_its_hooks(
    clock: list[Mapping[str, Any]],
) -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    heard = []
    shared.register_forward_hook(lambda *_: heard.append(1))
    small, put = thin_model(model, {"0": 2, "2": 2})
    assert put == ["0"] and small[0] is small[2]
    assert isinstance(small[0], LowRankLinear) and isinstance(model[0], nn.Linear)
    small(torch.ones(1, 8))
    assert len(heard) == 2
    found = measure(model, {"input": torch.ones(1, 8)}, ["0", "2"], repeats=2)
    assert list(found.modules) == ["0", "2"]


def test_only_the_named_modules_are_measured_in_the_order_named(
    tiny_bert: PreTrainedModel, padded_batch: Batch, clock: list[Mapping[str, Any]]
) -> None:
    names = list(reversed(searchable(tiny_bert)))[::3]
    found = measure(tiny_bert, padded_batch, names, grid=(1.0,), repeats=2)
    assert list(found.modules) == names
    assert found.modules[names[0]].ranks == (21,)


def test_measuring_leaves_the_model_as_it_was(
    family: PreTrainedModel, padded_batch: Batch, clock: list[Mapping[str, Any]]
) -> None:
    before = {name: value.clone() for name, value in family.state_dict().items()}
    measure(family, padded_batch, grid=COARSE, repeats=2)
    after = family.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for module in family.modules():
        assert not module.training
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not isinstance(module, LowRankLinear)
    labels = torch.zeros(3, dtype=torch.long)
    family(**padded_batch, labels=labels).loss.backward()  # and can still be trained


def test_a_model_with_a_part_in_training_mode_is_refused(
    tiny_bert: PreTrainedModel, padded_batch: Batch
) -> None:
    tiny_bert.bert.pooler.train()
    with pytest.raises(ValueError, match=r"training mode; call its eval\(\)"):
        measure(tiny_bert, padded_batch, repeats=2)


def test_names_that_cannot_be_measured_are_refused(
    tiny_bert: PreTrainedModel, padded_batch: Batch
) -> None:
    for name, message in [
        ("bert.nowhere", "no module 'bert.nowhere'"),
        ("bert.encoder.layer.0.output.LayerNorm", "a LayerNorm; one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(tiny_bert, padded_batch, [name], repeats=2)
    with pytest.raises(ValueError, match="shares in"):
        measure(tiny_bert, padded_batch, grid=(2.0,), repeats=2)
    assert not any(m._forward_pre_hooks for m in tiny_bert.modules())


def test_a_module_that_is_never_reached_is_named_and_no_hook_is_left() -> None:
    model = Plain()
    with pytest.raises(ValueError, match=r"never reached by this batch: spare\."):
        measure(model, {"x": torch.ones(1, 4)}, [*searchable(model), "spare"])
    with pytest.raises(TypeError):
        measure(model, {"y": torch.ones(1, 4)}, searchable(model))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_costs_are_read_back_from_json_equal(
    tiny_bert: PreTrainedModel, padded_batch: Batch, clock: list[Mapping[str, Any]]
) -> None:
    found = measure(tiny_bert, padded_batch, grid=COARSE, repeats=2)
    text = found.to_json()
    assert isinstance(json.loads(text), dict)
    again = Costs.from_json(text)
    assert again == found and list(again.modules) == list(found.modules)
    assert again.to_json() == text
    assert hash(again.modules["bert.encoder.layer.0.attention.self"])  # tuples again


# --- arithmetic ------------------------------------------------------------------

MADE = Costs(
    whole=10.0,
    modules={
        "a": ModuleCosts("wide", (2, 4), (20, 40, 100), (0.5, 1.0, 3.0)),
        "b": ModuleCosts("narrow", (1, 2, 3), (5, 10, 15, 30), (2.5, 1.0, 2.0, 2.0)),
        "c": ModuleCosts("none", (), (7,), (0.25,)),
    },
)


def test_costs_of_ranks_by_hand() -> None:
    assert MADE.weights({}) == 137
    assert MADE.weights({"a": 2, "b": 3}) == 20 + 15 + 7
    assert MADE.latency({}) == 10.0 and MADE.speedup({}) == 1.0
    assert MADE.latency({"a": 2}) == 10 - 2.5
    assert MADE.latency({"a": 4, "b": 2}) == 10 - 2 - 1
    assert MADE.latency({"b": 1}) == 10.5  # measured slower: it counts as such
    assert MADE.speedup({"a": 4, "b": 2}) == pytest.approx(10 / 7)


def test_an_option_is_a_ranks_place_and_the_last_is_dense() -> None:
    module = MADE.modules["b"]
    assert [module.option(rank) for rank in (1, 2, 3, None)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="not in tuple"):
        module.option(4)


def test_ranks_that_are_no_faster_are_left_out_with_their_costs() -> None:
    fast = MADE.faster()
    assert fast.modules["a"] == MADE.modules["a"]
    whole = MADE.modules["b"].ranks  # the grid that was measured is kept
    assert fast.modules["b"] == ModuleCosts("narrow", (2,), (10, 30), (1.0, 2.0), whole)
    assert fast.modules["c"] == MADE.modules["c"]
    assert fast.whole == MADE.whole and list(fast.modules) == list(MADE.modules)
    assert fast.faster() == fast
    assert fast.latency({"a": 2, "b": 2}) == MADE.latency({"a": 2, "b": 2})
    assert fast.weights({"b": 2}) == MADE.weights({"b": 2})
    slow = replace(MADE.modules["a"], seconds=(4.0, 3.5, 3.0)).faster()
    assert slow == ModuleCosts("wide", (), (100,), (3.0,), MADE.modules["a"].ranks)


def test_the_smallest_ranks_are_those_that_cost_least() -> None:
    # measured times need not grow with the rank
    one = ModuleCosts("a", (2, 4, 6), (20, 40, 60, 80), (3.0, 1.0, 2.0, 4.0))
    none = ModuleCosts("b", (), (5,), (1.0,))
    costs = Costs(9.0, {"one": one, "none": none})
    assert costs.smallest(by_seconds=True) == {"one": 4}
    assert costs.smallest(by_seconds=False) == {"one": 2}
