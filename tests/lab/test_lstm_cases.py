"""Chapter 6's rows are what the models themselves say, and clocks go by ranks."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import drone
from drone.lab import lstm_cases
from drone.lab.cases import Case, read_cases
from drone.lab.language import perplexity
from drone.lab.lstm_model import LSTMLanguageModel
from drone.lab.lstm_study import Study
from drone.lab.lstm_train import Recipe

ROOT = Path(__file__).resolve().parents[2]
WORDS = 40


def text(tokens: int, seed: int) -> torch.Tensor:
    """Words that follow each other: each is mostly the one before it, plus one."""
    draw = np.random.default_rng(seed)
    jumps = draw.random(tokens) < 0.2
    steps = np.where(jumps, draw.integers(WORDS, size=tokens), 1)
    return torch.tensor(np.cumsum(steps) % WORDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("lstm")
    texts = {"train": text(6000, 0), "valid": text(900, 1), "test": text(1100, 2)}
    recipe = Recipe(4, 10.0, 0.25, linear=True, batch_size=10)
    study = Study(texts, WORDS, "tiny", recipe, folder / "cases", folder / "weights")
    study.spectra()
    study.shares("products")
    return study, folder / "cases"


def test_growth_is_that_of_the_compressed_models(made: tuple[Study, Path]) -> None:
    study, folder = made
    (each,) = lstm_cases.trained(folder).values()
    dense = perplexity(study.model, study.texts["test"])
    assert each.perplexity == pytest.approx(dense, rel=1e-4)
    counts = drone.report(study.model)["multiply_adds"]
    assert each.multiply_adds == counts.sum()
    assert each.parameters == sum(
        p.numel() for n, p in study.model.named_parameters() if "bias" not in n
    )
    for row in each.of("products", "data-aware")[::3]:
        small = drone.compress(study.model, dict(row.ranks), study.moments)
        assert isinstance(small, LSTMLanguageModel)
        now = perplexity(small, study.texts["test"])
        # blocks are of nearly the same length, and kept as half-precision numbers
        assert row.test.value == pytest.approx(100 * (now / dense - 1), abs=0.3)
        valid = perplexity(small, study.texts["valid"])
        was = perplexity(study.model, study.texts["valid"])
        assert row.valid == pytest.approx(100 * (valid / was - 1), abs=0.05)
        left = drone.report(small)["multiply_adds"].sum() / counts.sum()
        assert row.left == pytest.approx(left)


def test_one_method_over_the_other_is_the_ratio_of_both(
    made: tuple[Study, Path],
) -> None:
    (each,) = lstm_cases.trained(made[1]).values()
    for plain, aware in zip(
        each.of("products", "SVD"), each.of("products", "data-aware"), strict=True
    ):
        over = each.over("products", aware.share)
        ratio = (1 + aware.test.value / 100) / (1 + plain.test.value / 100)
        assert over.value == pytest.approx(100 * (ratio - 1), abs=1e-6)
        assert over.low <= over.value <= over.high
    with pytest.raises(ValueError, match=r"tiny, products: no two models at .* 0\.11"):
        each.over("products", 0.11)


def test_the_interval_is_a_bootstrap_of_blocks() -> None:
    blocks = np.random.default_rng(0).normal(0.01, 0.02, 200)
    found = lstm_cases.estimate(blocks, draws=4000)
    error = blocks.std() / math.sqrt(200)
    assert found.value == pytest.approx(100 * math.expm1(blocks.mean()))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 100 * error, rel=0.1)


def test_the_rule_asks_the_validation_text_alone(made: tuple[Study, Path]) -> None:
    (each,) = lstm_cases.trained(made[1]).values()
    rows = each.of("products", "SVD")
    bar = sorted(row.valid for row in rows)[len(rows) // 2]
    least = each.smallest("products", "SVD", bar)
    assert least is not None
    assert least.left == min(row.left for row in rows if row.valid <= bar)
    nothing = min(row.valid for row in rows) - 1
    assert each.smallest("products", "SVD", nothing) is None


def test_two_recipes_of_one_size_are_refused(
    made: tuple[Study, Path], tmp_path: Path
) -> None:
    study, _ = made
    for epochs in (1, 2):
        recipe = dataclasses.replace(study.recipe, epochs=epochs)
        Study(study.texts, WORDS, "tiny", recipe, tmp_path, tmp_path / "w").trained()
    with pytest.raises(ValueError, match="a second training of tiny"):
        lstm_cases.trained(tmp_path)


def clock(ranks: dict[str, int], length: int = 1) -> Case:
    settings = {
        "encoder": "lstm-large",
        "length": length,
        "plans": {"a": {"ranks": ranks}},
    }
    result = {"speedups": {"a": [2.0, 1.9, 2.1]}}
    return Case("clocks", settings, result, 1.0, "x", "", {}, Path("x.json"))


def test_a_clock_is_found_by_its_ranks_and_by_nothing_else() -> None:
    ranks = {"stack.0.input": 8, "stack.0.recurrent": 8}
    clocks = [clock(ranks), clock({"stack.0.input": 8})]
    found = lstm_cases.clocked(clocks, "large", ranks, 1)
    assert found is not None and found.value == 2.0
    assert lstm_cases.clocked(clocks[1:], "large", ranks, 1) is None
    assert lstm_cases.clocked(clocks, "large", ranks, 35) is None
    assert lstm_cases.clocked(clocks, "small", ranks, 1) is None
    with pytest.raises(ValueError, match="2 clocks, one shape"):
        lstm_cases.clocked(2 * clocks, "large", ranks, 1)


def test_published_clocks_have_the_ranks_their_names_promise() -> None:
    """Once a plan called after all products had left the recurrent ones dense."""
    cases = ROOT / "book" / "cases" / "lstm"
    named = {
        (f"lstm-{each.size}", f"{row.name} {row.share:g}"): dict(row.ranks)
        for each in lstm_cases.trained(cases).values()
        for row in each.shares
    }
    checked = 0
    for case in read_cases(cases, "clocks"):
        for name, plan in case.settings["plans"].items():
            ranks = named.get((case.settings["encoder"], name))
            if ranks is not None:
                assert plan["ranks"] == ranks, (case.path.name, name)
                checked += 1
    assert checked >= 8, json.dumps(sorted(map(str, named)))
