"""What is read from finished cases is what was put into them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drone.lab import data
from drone.lab.arms import ARMS, Arm
from drone.lab.cases import keep_case, pack, read_cases
from drone.lab.glue_read import Study, arm_name, studies

ROWS = 100


def told(labels: np.ndarray, wrong: int) -> dict[str, Any]:
    """The result of a model that has the first `wrong` rows wrong."""
    logits = np.eye(2)[labels]
    logits[:wrong] = 1 - logits[:wrong]
    right = float((logits.argmax(1) == labels).mean())
    return {"dev": {"accuracy": 100 * right}, "dev_logits": pack(logits)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two seeds of a dense model, and SVD: 5 rows worse on one, 15 on the other."""
    labels = data.dev_labels("agreement", "embedded", ROWS)
    common = {"encoder": "minilm", "task": "agreement", "dev_rows": ROWS}
    for seed, more in ((0, 5), (1, 15)):
        dense = common | {"seed": seed}
        keep_case(tmp_path, "dense", dense, told(labels, 10), 1.0)
        plan = dense | {"method": "svd-latency", "speedup": 2.0}
        shape = {"ranks": {"a": 3 + seed}, "speedup": 1.9 + 0.2 * seed}
        keep_case(tmp_path, "ranks", plan, shape, 1.0)
        for name, wrong in (("none", 10 + more), ("full", 10)):
            arm = {"arm": vars(ARMS[name])}
            keep_case(tmp_path, "retrain", plan | arm, told(labels, wrong), 1.0)
    other_speed = plan | {"speedup": 3.0, "arm": vars(ARMS["none"])}
    keep_case(tmp_path, "retrain", other_speed, told(labels, 99), 1.0)
    return tmp_path


@pytest.fixture
def study(store: Path) -> Study:
    found = studies(store, "embedded")
    assert list(found) == [("minilm", "agreement")]
    assert found["minilm", "agreement"].name == "MiniLM on agreement"
    return found["minilm", "agreement"]


def test_points_lost_are_the_mean_over_the_seeds(study: Study) -> None:
    found = study.lost(("svd-latency", "none"), draws=200)
    assert found.value == pytest.approx(10)
    # drawn seeds alone give 5, 10 or 15
    assert found.low < 5 and found.high > 15
    assert study.lost(("svd-latency", "full"), draws=50).value == 0


def test_two_ways_are_paired_by_seed_and_row(study: Study) -> None:
    key = ("svd-latency", "none")
    over = study.over(key, ("svd-latency", "full"), draws=50)
    assert over.value == pytest.approx(study.lost(key, draws=50).value)
    assert study.over(key, key, draws=50).high == 0
    del study.arms[key][0], study.arms["svd-latency", "full"][1]
    with pytest.raises(ValueError, match="no seed in common"):
        study.over(key, ("svd-latency", "full"))


def test_what_counts_as_learnt(study: Study) -> None:
    share = max(np.bincount(study.labels)) / ROWS
    assert study.floor == pytest.approx(100 * share)
    assert study.error == pytest.approx(100 * (share * (1 - share) / ROWS) ** 0.5)
    assert study.score == pytest.approx(90) and study.learnt
    worst = study.dense[1].result["dev"]
    worst["accuracy"] = study.floor + 2.9 * study.error
    assert not study.learnt  # one seed that knows nothing is enough


def test_a_correlation_has_no_commonest_label(study: Study) -> None:
    study.task = "cola"
    assert (study.metric, study.floor) == ("matthews", 0)
    drawn = np.random.default_rng(0).normal(size=(2000, 2, ROWS))
    luck = [np.corrcoef(*pair)[0, 1] for pair in drawn]
    assert study.error == pytest.approx(100 * np.std(luck), rel=0.05)


def test_a_clock_belongs_to_the_plans_of_its_shapes(study: Study, store: Path) -> None:
    assert study.speedup("svd-latency") == pytest.approx(2.0)
    for rank in (4, 5):  # seed 1's, and nobody's
        plans = {"svd-latency": {"ranks": {"a": rank}}, "other": {}}
        result = {"speedups": {"svd-latency": [rank, 1, 9]}}
        keep_case(store, "clocks", {"plans": plans}, result, 1.0)
    found = study.clocked(read_cases(store, "clocks"))
    assert {name: each.value for name, each in found.items()} == {"svd-latency": 4}


def test_plans_of_several_seeds_have_their_mean_speed(
    study: Study, store: Path
) -> None:
    shapes = [{"ranks": {"a": rank}} for rank in (3, 4)]  # of seeds 0 and 1
    plans = {f"whatever {i}": shape for i, shape in enumerate(shapes)}
    seconds = [
        {"dense": 8.0, "whatever 0": 4.0, "whatever 1": 1.0},  # 2x and 8x: 4x
        {"dense": 9.0, "whatever 0": 9.0, "whatever 1": 1.0},  # 1x and 9x: 3x
    ]
    clock = keep_case(store, "clocks", {"plans": plans}, {"seconds": seconds}, 1.0)
    found = study.clocked([clock])["svd-latency"]
    assert found.value == pytest.approx(12**0.5)
    # Student's interval of two logarithms: 12.706 times half their distance
    assert np.log(found.high / found.value) == pytest.approx(
        12.706 * np.log(4 / 3) / 2, rel=1e-4
    )
    with pytest.raises(ValueError, match="timed by another"):
        study.clocked([clock, clock])


def test_layers_alone_make_no_clock_a_studys(study: Study, store: Path) -> None:
    study.plans["first-layers"] = study.plans["svd-latency"]
    (case,) = [c for s, c in study.plans.pop("svd-latency").items() if s == 0]
    study.plans = {
        "svd-latency": {0: case},
        "first-layers": {0: replace(case, result={"layers": [0], "speedup": 2.0})},
    }
    for length, plans in (
        (24, {"short": {"layers": [0]}, "other": {"ranks": {"a": 9}}}),
        (54, {"long": {"layers": [0]}, "mine": {"ranks": {"a": 3}}}),
    ):
        told = {name: [length / 10, 1, 9] for name in plans}
        settings = {"plans": plans, "length": length}
        keep_case(store, "clocks", settings, {"speedups": told}, 1.0)
    found = study.clocked(read_cases(store, "clocks"))
    assert found["first-layers"].value == found["svd-latency"].value == 5.4


def test_of_two_cases_of_one_seed_none_wins_unseen(store: Path) -> None:
    case = read_cases(store, "dense")[0]
    keep_case(store, "dense", case.settings | {"rows": 7}, case.result, 1.0)
    with pytest.raises(ValueError, match="one seed twice"):
        studies(store, "embedded")


def test_rates_chosen_by_the_loss_are_no_mean_with_those_by_the_score(
    store: Path,
) -> None:
    key = "svd-latency", "full"
    assert studies(store, "embedded")["minilm", "agreement"].chosen_by(key) == (
        "held loss"
    )
    old = [c for c in read_cases(store, "retrain") if c.settings["arm"]["share"]]
    for case in old:
        settings = case.settings | {"chosen_by": "held score"}
        case.path.unlink()
        keep_case(store, "retrain", settings, case.result, 1.0)
    assert studies(store, "embedded")["minilm", "agreement"].chosen_by(key) == (
        "held score"
    )
    keep_case(store, "retrain", old[0].settings | {"seed": 9}, old[0].result, 1.0)
    with pytest.raises(ValueError, match="keep one kind"):
        studies(store, "embedded")


@pytest.mark.parametrize("name", [*ARMS, "0.01x3", "1x1"])
def test_a_retraining_has_the_name_it_is_asked_by(name: str) -> None:
    assert arm_name(vars(Arm.named(name))) == name
