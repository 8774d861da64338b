"""Rival ways to share out ranks, against hand-worked cases and brute force."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drone import SecondMoment, factorize, factorize_attention
from drone.search import rivals
from drone.search.costs import Costs, ModuleCosts
from drone.search.rivals import (
    Ranks,
    energy,
    greedy,
    latency,
    relative_errors,
    uniform,
)

Errors = dict[str, np.ndarray]


def moment_of(inputs: torch.Tensor) -> SecondMoment:
    moment = SecondMoment(inputs.shape[1])
    moment.update(inputs)
    return moment


def options(costs: Costs, ranks: Ranks) -> tuple[int, ...]:
    """Each module's place in its list; the dense one's is the last."""
    assert set(ranks) <= set(costs.modules)
    return tuple(m.option(ranks.get(name)) for name, m in costs.modules.items())


def places(costs: Costs) -> tuple[int, ...]:
    """The places of the dense modules."""
    return tuple(len(module.ranks) for module in costs.modules.values())


# --- relative errors -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_errors_of_a_linear_are_shares_of_the_outputs_energy(
    shape: tuple[int, int],
) -> None:
    linear = nn.Linear(shape[1], shape[0]).double()
    inputs = (torch.randn(50, shape[1]) @ torch.randn(shape[1], shape[1])).double()
    known = factorize(linear.weight, moment_of(inputs))
    found = relative_errors(known, (1, 3, 5))
    outputs = linear.weight.detach() @ inputs.T
    expected = []
    for rank in (1, 3, 5):
        left, right = known.truncate(rank)
        lost = outputs - left @ (right @ inputs.T)
        expected.append(float((lost**2).sum() / (outputs**2).sum()))
    assert found.shape == (4,) and found[-1] == 0
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-6)
    assert 1 > found[0] > found[1] > found[2] > 1e-6


def test_errors_of_a_block_are_shares_of_all_logits_of_all_heads() -> None:
    heads, size, dim = 3, 4, 7
    query, key = (nn.Linear(dim, heads * size).double() for _ in range(2))
    key.weight.data[:size] *= 10  # one head's logits are larger: it counts for more
    inputs = torch.randn(40, dim).double()
    known = factorize_attention(query, key, heads, moment_of(inputs))
    found = relative_errors(known, (1, 2, 3))

    def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = (x.view(40, heads, -1).transpose(0, 1) for x in (q, k))
        return q @ k.mT

    dense = logits(query(inputs), key(inputs))
    for rank, error in zip((1, 2, 3), found, strict=False):
        w_q, b_q, w_k, b_k = known.truncate(rank)
        thin = logits(inputs @ w_q.T + b_q, inputs @ w_k.T + b_k)
        lost = ((dense - thin) ** 2).sum() / (dense**2).sum()
        assert error == pytest.approx(float(lost.detach()), rel=1e-6)
    assert found.shape == (4,) and found[-1] == 0 and found[0] < 1


def test_where_there_is_nothing_to_lose_no_rank_loses_anything() -> None:
    known = factorize(torch.zeros(4, 5), moment_of(torch.randn(9, 5)))
    assert relative_errors(known, (1, 2)).tolist() == [0, 0, 0]


def test_a_module_without_ranks_has_the_dense_ones_error_only() -> None:
    assert relative_errors(factorize(torch.randn(4, 5)), ()).tolist() == [0]


# --- what all paths have in common -----------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Costs, Errors]:
    """Up to four modules, one of them with ranks; errors fall and end at 0."""
    modules, errors = {}, {}
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    for name, count in zip("abcd", counts, strict=False):
        steps = st.lists(
            st.integers(1, 50), min_size=count + 1, max_size=count + 1
        ).map(np.cumsum)
        weights, seconds = draw(steps).tolist(), draw(steps).tolist()
        falls = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
        errors[name] = np.append(np.cumsum(falls)[::-1], 0) / 256
        ranks = tuple(range(1, count + 1))
        modules[name] = ModuleCosts(name, ranks, tuple(weights), tuple(seconds))
    return Costs(1000.0, modules), errors


@pytest.mark.parametrize("method", [uniform, energy, greedy])
@given(problem=problems())
def test_a_path_goes_from_the_smallest_model_to_the_dense_one(
    method: object, problem: tuple[Costs, Errors]
) -> None:
    costs, errors = problem
    path = method(costs, errors)
    assert options(costs, path[0]) == (0,) * len(costs.modules)
    assert path[-1] == {}
    assert {} not in path[:-1]
    for smaller, larger in pairwise(path):
        steps = zip(options(costs, smaller), options(costs, larger), strict=True)
        assert all(before <= after for before, after in steps)
        assert costs.weights(smaller) < costs.weights(larger)  # no place twice


# --- uniform ---------------------------------------------------------------------


@given(problems())
def test_uniform_gives_every_module_the_same_share_of_its_ranks(
    problem: tuple[Costs, Errors],
) -> None:
    costs, errors = problem
    path, counts = uniform(costs, errors), places(costs)
    assert len(path) == max(counts) + 1
    for step, ranks in enumerate(path):
        share = step / max(counts)
        for option, count in zip(options(costs, ranks), counts, strict=True):
            # the first of its ranks that is not below the share
            assert option >= share * count - 1e-9 and option < share * count + 1


def test_uniform_on_grids_of_one_length_goes_up_together() -> None:
    module = ModuleCosts("k", (2, 4, 9), (1, 2, 3, 4), (1.0, 1.0, 1.0, 1.0))
    other = ModuleCosts("l", (1, 3, 5), (1, 2, 3, 4), (1.0, 1.0, 1.0, 1.0))
    path = uniform(Costs(9.0, {"a": module, "b": other}), {})
    assert path == [{"a": 2, "b": 1}, {"a": 4, "b": 3}, {"a": 9, "b": 5}, {}]


# --- energy ----------------------------------------------------------------------


def two(weights_a: tuple[int, ...], weights_b: tuple[int, ...]) -> Costs:
    seconds = (1.0, 1.0, 1.0)
    return Costs(
        9.0,
        {
            "a": ModuleCosts("a", (10, 20), weights_a, seconds),
            "b": ModuleCosts("b", (1, 2), weights_b, seconds),
        },
    )


def test_energy_by_hand() -> None:
    costs = two((1, 2, 3), (1, 2, 3))
    errors = {"a": np.array([0.5, 0.2, 0.0]), "b": np.array([0.3, 0.1, 0.0])}
    assert energy(costs, errors) == [
        {"a": 10, "b": 1},  # at most 0.5 may be lost
        {"a": 20, "b": 1},  # 0.3
        {"a": 20, "b": 2},  # 0.2
        {"b": 2},  # 0.1
        {},
    ]


@given(problems())
def test_energy_takes_the_smallest_ranks_that_keep_a_share(
    problem: tuple[Costs, Errors],
) -> None:
    costs, errors = problem
    path = [options(costs, ranks) for ranks in energy(costs, errors)]
    for chosen in path:
        pairs = zip(errors.values(), chosen, strict=True)
        share = max(each[option] for each, option in pairs)
        assert chosen == tuple(
            next(i for i, error in enumerate(each) if error <= share)
            for each in errors.values()
        )
    every = {float(error) for each in errors.values() for error in each}
    assert len(path) == len(every)  # each share at which a rank changes


def test_a_rank_left_out_moves_its_own_module_only() -> None:
    def module(slow: tuple[int, ...], count: int = 6) -> ModuleCosts:
        ranks = tuple(8 * (i + 1) for i in range(count))
        times = (*(9.0 if r in slow else 1.0 + r / 100 for r in ranks), 2.0)
        return ModuleCosts("k", ranks, tuple(range(1, count + 2)), times)

    whole = {"a": module(()), "b": module((8, 16, 40, 48)), "c": module((16, 32))}
    costs = Costs(20.0, whole)
    full = uniform(costs, {})
    assert full[2] == {"a": 24, "b": 24, "c": 24}
    fast = uniform(costs.faster(), {})
    assert fast == [
        {"a": 8, "b": 24, "c": 8},
        {"a": 16, "b": 24, "c": 24},
        {"a": 24, "b": 24, "c": 24},
        {"a": 32, "b": 32, "c": 40},
        {"a": 40, "c": 40},
        {"a": 48, "c": 48},
        {},
    ]
    # As a plan keeps them, and as a file does.
    again = Costs.from_json(costs.faster().to_json())
    assert uniform(again.faster(), {}) == fast


# --- greedy ----------------------------------------------------------------------


def test_greedy_by_hand() -> None:
    costs = two((10, 20, 30), (5, 10, 20))
    errors = {"a": np.array([0.5, 0.2, 0.0]), "b": np.array([0.3, 0.1, 0.0])}
    # Per weight a falls by 0.03 and 0.02, b by 0.04 and 0.01.
    assert greedy(costs, errors) == [
        {"a": 10, "b": 1},
        {"a": 10, "b": 2},
        {"a": 20, "b": 2},
        {"b": 2},
        {},
    ]


@given(problems())
def test_greedy_takes_the_step_with_the_largest_fall_per_weight(
    problem: tuple[Costs, Errors],
) -> None:
    costs, errors = problem
    path = [options(costs, ranks) for ranks in greedy(costs, errors)]
    assert len(path) == sum(places(costs)) + 1
    for before, after in pairwise(path):
        falls = {}
        for (name, module), option in zip(costs.modules.items(), before, strict=True):
            if option < len(module.ranks):
                fall = errors[name][option] - errors[name][option + 1]
                more = module.weights[option + 1] - module.weights[option]
                falls[name] = fall / more
        moved = [i for i in range(len(before)) if before[i] != after[i]]
        assert len(moved) == 1 and after[moved[0]] == before[moved[0]] + 1
        assert falls["abcd"[moved[0]]] == max(falls.values())


# --- latency ---------------------------------------------------------------------


@st.composite
def clocked(draw: st.DrawFn) -> tuple[Costs, Errors]:
    """Three modules of three options; whole numbers, so that ties are exact.

    A rank may be slower than the dense module, and may even lower the loss."""
    modules, increases = {}, {}
    for name in "abc":
        seconds = draw(st.tuples(*[st.integers(1, 30).map(float)] * 3))
        lost = draw(st.lists(st.integers(0, 40), min_size=2, max_size=2))
        modules[name] = ModuleCosts(name, (1, 2), (1, 2, 3), seconds)
        increases[name] = np.array([*lost, 0], float)
    return Costs(100.0, modules), increases


def sums(costs: Costs, increases: Errors, chosen: tuple[int, ...]) -> np.ndarray:
    """(seconds, loss) of one option a module."""
    pairs = zip(costs.modules, chosen, strict=True)
    return sum(
        np.array([costs.modules[n].seconds[o], increases[n][o]]) for n, o in pairs
    )


@settings(max_examples=15)
@given(clocked())
def test_latency_is_as_good_as_the_best_of_all_combinations(
    problem: tuple[Costs, Errors],
) -> None:
    costs, increases = problem
    path = [options(costs, ranks) for ranks in latency(costs, increases)]
    every = [sums(costs, increases, each) for each in product(range(3), repeat=3)]
    shortest = sum(min(m.seconds) for m in costs.modules.values())
    dense = sum(m.seconds[-1] for m in costs.modules.values())
    limits = np.linspace(shortest, dense, rivals.LATENCIES)
    assert len(path) == len(limits)
    assert path[-1] == (2, 2, 2)
    for chosen, limit in zip(path, limits, strict=True):
        seconds, lost = sums(costs, increases, chosen)
        assert seconds <= limit + 1e-6
        assert lost == min(loss for time, loss in every if time <= limit + 1e-6)
    assert sums(costs, increases, path[0])[0] == shortest


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3], ids=str)
@pytest.mark.parametrize("loss", [1e-6, 1.0], ids=str)
def test_latency_does_not_depend_on_the_units(unit: float, loss: float) -> None:
    rng = np.random.default_rng(3)
    modules, increases = {}, {}
    for name in "abc":
        seconds = tuple((unit * np.sort(rng.uniform(0.1, 1, 4))).tolist())
        modules[name] = ModuleCosts(name, (1, 2, 3), (1, 2, 3, 4), seconds)
        lost = np.append(np.sort(rng.uniform(0.01, 1, 3))[::-1], 0)
        increases[name] = loss * lost
    costs = Costs(9 * unit, modules)
    path = [options(costs, ranks) for ranks in latency(costs, increases)]
    every = [sums(costs, increases, each) for each in product(range(4), repeat=3)]
    first, last = (sums(costs, increases, each)[0] for each in ((0,) * 3, (3,) * 3))
    for chosen, limit in zip(path, np.linspace(first, last, len(path)), strict=True):
        seconds, lost = sums(costs, increases, chosen)
        assert seconds <= limit * (1 + 1e-6)
        best = min(loss for time, loss in every if time <= limit * (1 + 1e-9))
        assert lost <= best + 1e-5 * loss


def test_latency_by_hand() -> None:
    modules = {
        "a": ModuleCosts("a", (1, 2), (1, 2, 3), (4.0, 2.0, 9.0)),
        "b": ModuleCosts("b", (1, 2), (1, 2, 3), (1.0, 3.0, 9.0)),
    }
    increases = {"a": np.array([1.5, 2.0, 0.0]), "b": np.array([5.0, 2.5, 0.0])}
    costs = Costs(20.0, modules)
    path = list(latency(costs, increases))
    seconds = [sums(costs, increases, options(costs, each))[0] for each in path]
    assert seconds == sorted(seconds)
    # (seconds, loss): a's first rank takes longer than its second, and loses less.
    distinct = [path[0], *(b for a, b in pairwise(path) if a != b)]
    assert distinct == [
        {"a": 2, "b": 1},  # (3, 7)
        {"a": 2, "b": 2},  # (5, 4.5)
        {"a": 1, "b": 2},  # (7, 4)
        {"a": 2},  # (11, 2); a dense with b thin is (12, 2.5)
        {"a": 1},  # (13, 1.5)
        {},  # (18, 0)
    ]


@st.composite
def fuller(draw: st.DrawFn) -> tuple[Costs, Errors]:
    """Five modules of four options, with times and losses of no pattern."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    modules, increases = {}, {}
    for name in "abcde":
        seconds = tuple(rng.uniform(0.1, 1, 4).tolist())
        modules[name] = ModuleCosts(name, (1, 2, 3), (1, 2, 3, 4), seconds)
        increases[name] = np.append(rng.uniform(0.01, 1, 3), 0)
    return Costs(9.0, modules), increases


@pytest.mark.parametrize("states", [10_000, 30])
@given(problem=fuller())
@settings(max_examples=15)
def test_with_few_states_the_loss_is_within_a_span_a_module_of_the_best(
    states: int, problem: tuple[Costs, Errors]
) -> None:
    costs, increases = problem
    every = np.array(
        [sums(costs, increases, each) for each in product(range(4), repeat=5)]
    )
    dense = sum(m.seconds[-1] for m in costs.modules.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "STATES", states)
        path = [options(costs, ranks) for ranks in latency(costs, increases)]
    limits = np.linspace(every[:, 0].min(), dense, len(path))
    spans = 5 * dense / states if states == 30 else 0.0
    for chosen, limit in zip(path, limits, strict=True):
        seconds, lost = sums(costs, increases, chosen)
        assert seconds <= limit * (1 + 1e-8)
        least = every[every[:, 0] <= limit - spans, 1].min(initial=np.inf)
        assert lost <= least + 1e-9
        if not spans:
            assert lost == pytest.approx(
                every[every[:, 0] <= limit * (1 + 1e-8), 1].min(), abs=1e-12
            )


def test_a_module_without_ranks_stays_dense_on_every_path() -> None:
    module = ModuleCosts("a", (1,), (1, 2), (1.0, 2.0))
    fixed = ModuleCosts("b", (), (7,), (3.0,))
    costs = Costs(9.0, {"a": module, "b": fixed})
    errors = {"a": np.array([0.5, 0.0]), "b": np.array([0.0])}
    for method in rivals.PATHS.values():
        path = list(method(costs, errors))
        assert path[0] == {"a": 1} and path[-1] == {}
        assert {frozenset(ranks.items()) for ranks in path} == {
            frozenset({("a", 1)}),
            frozenset(),
        }
