"""The one verb: what a number becomes, and what is refused in words."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import drone
from drone import break_even_rank, calibrate, compress, encoder_linears, search_ranks
from drone.search.verb import _one_share


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    made = []
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 100, (6, 9), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        labels = torch.arange(6) % 2
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def numbers(model: nn.Module, names: list[str]) -> int:
    """Matrix entries of the named modules, counted from their parameters."""
    parts = [model.get_submodule(name) for name in names]
    return sum(p.numel() for m in parts for p in m.parameters() if p.ndim == 2)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**batch).logits


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9, 1.0])
def test_a_share_keeps_at_most_that_of_the_layers_matrices(
    family: PreTrainedModel, batches: list[dict[str, Tensor]], share: float
) -> None:
    names = list(encoder_linears(family))
    small = compress(family, share, batches=batches)
    kept = numbers(small, names) / numbers(family, names)
    assert share - 0.08 < kept <= share
    assert small.compressed.kept == pytest.approx(kept)
    assert small.compressed.candidates == len(names)
    fractions = [
        rank / break_even_rank(*family.get_submodule(name).weight.shape)
        for name, rank in small.compressed.ranks.items()
    ]
    assert max(fractions) - min(fractions) < 0.1  # ranks are whole numbers
    # The ranks, and the inputs: as by hand.
    moments = calibrate(family, batches, names)
    by_hand = compress(family, small.compressed.ranks, moments)
    assert torch.equal(logits(small, batches[0]), logits(by_hand, batches[0]))
    assert f"asked for a share of {share:g}: " in str(small.compressed)


def test_of_real_sizes_ranks_are_multiples_of_8_and_the_share_is_met_closely() -> None:
    linears = {"q": (384, 384), "up": (1536, 384), "down": (384, 1536), "tiny": (4, 4)}
    modules = {n: nn.Linear(i, o, device="meta") for n, (o, i) in linears.items()}
    dense = sum(out * into for out, into in linears.values())
    found = []
    for share in np.linspace(0.05, 1, 20):
        ranks = _one_share(modules, float(share))
        assert all(r % 8 == 0 for n, r in ranks.items() if n != "tiny")
        left = sum(r * sum(linears[n]) for n, r in ranks.items()) / dense
        assert share - 0.03 < left <= share
        found.append(left)
    assert all(a < b for a, b in pairwise(found))
    with pytest.raises(ValueError, match=r"a share of 0.001 .*smallest ranks .* left"):
        _one_share(modules, 0.001)


def test_one_rank_for_all_that_gain_from_it(
    tiny_bert: PreTrainedModel, batches: list[dict[str, Tensor]]
) -> None:
    small = compress(tiny_bert, 12, batches=batches)
    ranks = {n: m.rank for n, m in small.named_modules() if hasattr(m, "rank")}
    # 32×32 saves up to 15, 32×64 up to 21.
    names = encoder_linears(tiny_bert)
    assert ranks == small.compressed.ranks == dict.fromkeys(names, 12)
    larger = compress(tiny_bert, np.int64(20), batches=batches).compressed.ranks
    assert set(larger) == {n for n in names if "attention" not in n}
    assert all(rank == 20 for rank in larger.values())
    with pytest.raises(ValueError, match=r"rank 22 saves nothing .* the largest .* 21"):
        compress(tiny_bert, 22, batches=batches)


def test_without_batches_or_moments_it_is_plain_svd_and_moments_will_do_as_well(
    tiny_bert: PreTrainedModel, batches: list[dict[str, Tensor]]
) -> None:
    moments = calibrate(tiny_bert, batches)
    aware, same = (
        compress(tiny_bert, 8, batches=batches),
        compress(tiny_bert, 8, moments),
    )
    plain = compress(tiny_bert, 8)
    in_order = compress(tiny_bert, 8, batches=batches, sequential=True)
    batch = batches[0]
    assert torch.equal(logits(aware, batch), logits(same, batch))
    by_hand = compress(tiny_bert, aware.compressed.ranks)
    assert torch.equal(logits(plain, batch), logits(by_hand, batch))
    ordered = compress(
        tiny_bert, aware.compressed.ranks, batches=batches, sequential=True
    )
    assert torch.equal(logits(in_order, batch), logits(ordered, batch))
    assert not torch.equal(logits(aware, batch), logits(plain, batch))
    assert not torch.equal(logits(aware, batch), logits(in_order, batch))


@pytest.mark.parametrize(
    "wish", [{"speedup": 1.2}, {"loss_increase": 0.2}, {"ranks": 0.5}], ids=str
)
def test_a_search_is_search_ranks_and_its_plan(
    tiny_bert: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    wish: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def search(*args: object, **kwargs: object) -> drone.RankPlan:
        asked.append(kwargs)
        times = drone.costs.Costs(1.0, made)
        return search_ranks(*args, times=times, **kwargs)

    made = {}
    for name in drone.costs.searchable(tiny_bert):
        module = tiny_bert.get_submodule(name)
        ranks = drone.costs.grid_ranks(drone.costs.largest_rank(module))
        weights = tuple(drone.costs._weights(module, r) for r in (*ranks, None))
        seconds = tuple(w / 40_000 for w in weights)
        made[name] = drone.costs.ModuleCosts(str(weights), ranks, weights, seconds)
    monkeypatch.setattr(drone.search.verb, "search_ranks", search)
    small = compress(tiny_bert, batches=batches, method="greedy", **wish)
    plan = small.compressed.plan
    assert plan.method == asked[0]["method"] == "greedy" and not plan.modules
    assert small.compressed.ranks == plan.ranks
    assert small.compressed.kept == plan.weights_share
    name = "keep" if "ranks" in wish else next(iter(wish))
    assert getattr(plan.goal, name) == next(iter(wish.values()))
    again = search_ranks(
        tiny_bert,
        batches,
        **{name: next(iter(wish.values()))},
        method="greedy",
        times=drone.costs.Costs(1.0, made),
    )
    assert again.ranks == plan.ranks


def test_the_filter_leaves_modules_out(
    tiny_bert: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of modules this small the clock may find no rank faster than the dense one.
    monkeypatch.setattr(drone.costs.Costs, "faster", lambda self: self)

    def late(name: str, module: nn.Module) -> bool:
        assert module is tiny_bert.get_submodule(name)
        return "layer.1." in name

    small = compress(tiny_bert, 0.5, batches=batches, filter=late)
    names = [n for n in encoder_linears(tiny_bert) if "layer.1." in n]
    assert list(small.compressed.ranks) == names
    assert numbers(small, names) <= numbers(tiny_bert, names) / 2
    small = compress(
        tiny_bert, loss_increase=5.0, batches=batches, filter=late, method="uniform"
    )
    assert small.compressed.ranks and all(
        "layer.1." in n for n in small.compressed.ranks
    )
    with pytest.raises(ValueError, match=r"filter leaves none of the 12 modules"):
        compress(tiny_bert, 0.5, batches=batches, filter=lambda name, module: False)


def test_the_model_is_left_as_it_was_and_the_copy_is_its_own(
    tiny_bert: PreTrainedModel, batches: list[dict[str, Tensor]]
) -> None:
    tiny_bert.train()
    before = copy.deepcopy(tiny_bert.state_dict())
    small = compress(tiny_bert, 0.5, batches=batches)
    assert small.training and not hasattr(tiny_bert, "compressed")
    after = tiny_bert.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert copy.deepcopy(small).compressed == small.compressed
    assert "compressed" not in small.state_dict()


def test_given_ranks_are_todays_compress(
    tiny_bert: PreTrainedModel, batches: list[dict[str, Tensor]]
) -> None:
    name = next(iter(drone.attention_blocks(tiny_bert)))
    ranks = {name: 3, "bert.encoder.layer.1.output.dense": 9}
    moments = calibrate(tiny_bert, batches)
    known = drone.factorize_modules(tiny_bert, ranks, moments)
    one = compress(tiny_bert, ranks, moments)
    two = compress(tiny_bert, ranks, factorizations=known)
    old = drone.model.compress.compress(tiny_bert, ranks, moments)
    for small in (one, two):
        assert torch.equal(logits(small, batches[0]), logits(old, batches[0]))
        assert small.compressed.ranks == ranks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give one of ranks, speedup and loss_increase; 0 were given"),
        ({"ranks": 0.5, "speedup": 2.0}, ValueError, "2 were given"),
        ({"ranks": 1}, ValueError, "1 could be a rank or the whole; write {name: 1}"),
        ({"ranks": 0}, ValueError, "a rank of 0; at least 2"),
        ({"ranks": -3}, ValueError, "a rank of -3"),
        ({"ranks": True}, TypeError, "ranks are a bool"),
        ({"ranks": "0.5"}, TypeError, r"ranks are a str \(0.5\)"),
        (
            {"ranks": 64.0},
            ValueError,
            r"a share of 64.0; in \(0, 1\] is needed. A rank",
        ),
        ({"ranks": 0.0}, ValueError, "a share of 0.0"),
        ({"ranks": float("nan")}, ValueError, "a share of nan"),
        (
            {"ranks": [{"input_ids": 1}]},
            TypeError,
            "ranks are a list.*by name: batches=",
        ),
        ({"ranks": "moments"}, TypeError, "ranks are moments; moments come"),
        ({"ranks": 8, "moments": "batches"}, TypeError, "moments are a list.*batches="),
        (
            {"ranks": 8, "batches": "moments"},
            TypeError,
            "batches are moments; those go",
        ),
        ({"ranks": 8, "batches": "rows.csv"}, TypeError, "batches are a str; an iter"),
        ({"ranks": 8, "filter": "attention"}, TypeError, "filter is a str; a function"),
        ({"speedup": 2.0}, ValueError, "a search needs batches with labels"),
        ({"ranks": 8, "method": "greedy"}, ValueError, "for one rank leave method out"),
        (
            {"speedup": 2.0, "batches": [], "sequential": True},
            ValueError,
            "a search collects its own moments",
        ),
        ({"ranks": {"a": 2}, "method": "greedy"}, ValueError, "has chosen already"),
        (
            {"ranks": 8, "moments": "moments", "batches": []},
            ValueError,
            "one of them will do",
        ),
    ],
    ids=str,
)
def test_what_is_mixed_up_is_refused_in_words(
    tiny_bert: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    arguments: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    stand_ins = {"batches": batches}
    if "moments" in arguments.values():
        stand_ins["moments"] = calibrate(tiny_bert, batches)
    given = {
        key: stand_ins.get(value, value) if isinstance(value, str) else value
        for key, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        compress(tiny_bert, **given)
