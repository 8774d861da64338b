"""Paired differences over seeds and rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import matthews_corrcoef

from drone.lab.differences import majority, paired, within
from drone.lab.metrics import METRICS
from drone.lab.tables import Estimate


def logits(said):
    """Logits of a model that says these classes, (..., 2)."""
    return np.eye(2)[said]


def test_the_majority_class_scores_its_share():
    assert majority("mrpc", np.array([0, 1, 1, 1, 0])) == pytest.approx(60)


def test_equal_models_differ_by_nothing_surely():
    said = np.random.default_rng(0).integers(2, size=(3, 50))
    found = paired("mrpc", np.ones(50, int), logits(said), logits(said))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_interval_over_rows_is_the_binomial_one():
    rows = 400
    labels = np.ones(rows, int)
    before = labels.copy()
    before[: rows // 5] = 0  # wrong on a fifth, where the other is right
    found = paired(
        "mrpc", labels, logits(before)[None], logits(labels)[None], draws=2000
    )
    assert found.value == pytest.approx(20)
    spread = 1.96 * 100 * (0.2 * 0.8 / rows) ** 0.5
    assert found.low == pytest.approx(20 - spread, abs=0.6)
    assert found.high == pytest.approx(20 + spread, abs=0.6)


def test_seeds_that_disagree_widen_the_interval():
    labels = np.ones(100, int)
    all_right, all_wrong = logits(labels), logits(1 - labels)
    before = np.stack([all_wrong, all_right])
    after = np.stack([all_right, all_wrong])
    found = paired("mrpc", labels, before, after)
    assert (found.value, found.low, found.high) == (0, -100, 100)


def test_shapes_must_fit():
    one = logits(np.ones((1, 4), int))
    with pytest.raises(ValueError, match=r"twice \(seeds, rows, outputs\)"):
        paired("mrpc", np.ones(5, int), one, one)


def test_another_metric_than_accuracy_is_that_of_its_rows():
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=60)
    before, after = rng.normal(size=(2, 2, 60, 2))
    found = paired("cola", labels, before, after, draws=20)
    expected = [
        METRICS["cola"]["matthews"](b, labels) - METRICS["cola"]["matthews"](a, labels)
        for a, b in zip(before, after, strict=True)
    ]
    assert found.value == pytest.approx(100 * np.mean(expected))
    assert found.low < found.value < found.high


def test_accuracy_is_that_of_the_metric():
    rng = np.random.default_rng(2)
    labels = rng.integers(2, size=60)
    before, after = rng.normal(size=(2, 2, 60, 2))
    found = paired("mrpc", labels, before, after, draws=20)
    accuracy = METRICS["mrpc"]["accuracy"]
    expected = [
        accuracy(b, labels) - accuracy(a, labels)
        for a, b in zip(before, after, strict=True)
    ]
    assert found.value == pytest.approx(100 * np.mean(expected))


@given(st.integers(0, 2**32 - 1), st.integers(2, 60))
def test_matthews_is_scikit_learns(seed, rows):
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(2, size=rows), rng.normal(size=(rows, 2))
    logits[:, 1] += rng.normal() * 2  # at times one class alone is told
    found = METRICS["cola"]["matthews"](logits, labels)
    assert found == pytest.approx(matthews_corrcoef(labels, logits.argmax(1)))


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-2.0, 1.4, "yes"),
        (0.5, 2.9, "yes"),  # a loss of just the bar can be confirmed
        (0.5, 3.0, "not decided"),
        (1.5, 3.5, "not decided"),
        (1.6, 2.9, "no"),  # surely above the bar, by however little
        (4.0, 9.0, "no"),
        (float("nan"), float("nan"), "not decided"),
    ],
)
def test_a_bar_needs_a_margin_to_be_met(low, high, word):
    assert within(Estimate((low + high) / 2, low, high), 1.5, 1.5) == word


def test_without_a_margin_the_whole_interval_is_below_the_bar():
    assert within(Estimate(1.0, 0.5, 1.4), 1.5, 0.0) == "yes"
    assert within(Estimate(1.0, 0.5, 1.6), 1.5, 0.0) == "not decided"
    with pytest.raises(ValueError, match="margin is -1"):
        within(Estimate(1.0, 0.5, 1.6), 1.5, -1)
