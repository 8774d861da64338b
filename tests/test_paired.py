"""Chapter 7's pairs: kept numbers are those of the published logits and the labels."""

import json
import os

import numpy as np
import pytest

from book import paired
from drone.lab import data


def test_every_pair_is_kept() -> None:
    kept = json.loads(paired.KEPT.read_text())
    assert kept.keys() == {*paired.PAIRS, "seeds_cola"}
    assert all(low <= value <= high for value, low, high in kept.values())


@pytest.mark.skipif("DRONE_DATA" not in os.environ, reason="needs the labels of MRPC")
def test_a_kept_pair_is_that_of_logits_and_labels() -> None:
    case, labels = "mpnet-base-mrpc", data.dev_labels("mrpc")
    (seed,) = paired.seeds_of(case)
    right = {name: logits.argmax(axis=1) == labels for name, logits in seed.items()}
    by_hand = 100 * (right[paired.TAUGHT].mean() - right[paired.PLAIN].mean())
    kept = json.loads(paired.KEPT.read_text())["teaching_large"]
    assert kept[0] == pytest.approx(by_hand, abs=1e-3)
    again = paired.summary(paired.gap(case, [paired.TAUGHT], [paired.PLAIN]))
    assert again == pytest.approx(kept)


def test_of_several_rivals_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(40) % 2
    right, wrong = np.eye(2)[labels], np.eye(2)[1 - labels]
    seeds = [{"a": right, "b": wrong, "c": right}]
    monkeypatch.setattr(paired, "seeds_of", lambda _: seeds)
    monkeypatch.setattr(paired.data, "dev_labels", lambda _: labels)
    assert paired.gap("x-mrpc", ["a"], ["b"])[0] == 100
    assert paired.gap("x-mrpc", ["a"], ["b", "c"])[0] == 0
