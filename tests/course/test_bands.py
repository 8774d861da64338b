"""Bands: where a new seed's score lies, and which records they come from."""

import json

import numpy as np
import pytest

from book.course import bands


def test_a_new_seed_lies_inside_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        *seen, new = rng.normal(80, 2, size=4)
        low, high = bands.next_seed(seen)
        inside += low <= new <= high
    assert 0.935 < inside / 2000 < 0.965  # three standard errors


def test_one_seed_gives_no_band():
    with pytest.raises(ValueError, match="1 seed"):
        bands.next_seed([80.0])


def test_scores_are_those_of_the_records(tmp_path):
    rows = [
        {"method": "svd", "rank": k, "seed": s, "score": 0.5 + s / 100 + k / 1000}
        for s in (0, 1)
        for k in (8, 16)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(text)
    band = bands.Band("a", "x", {"method": "svd", "rank": 8}, "score", 100)
    assert bands.scores(band, tmp_path) == pytest.approx([50.8, 51.8])
    lost = bands.Band("a", "x", {"method": "svd", "rank": 8}, "score", 100, "seed")
    assert bands.scores(lost, tmp_path) == pytest.approx([-50.8, 48.2])
    gone = bands.Band("a", "x", {"method": "drone"}, "score")
    with pytest.raises(LookupError, match="no record"):
        bands.scores(gone, tmp_path)


def test_a_level_is_what_was_lost_beside_the_dense_model_of_each_seed(tmp_path):
    rows = [
        level.where | {"seed": seed, "dense": 80.0, "score": 79 - seed - at}
        for at, level in enumerate(bands.LEVELS)
        for seed in (0, 1, 2)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "05-algorithm-2.jsonl").write_text(text)
    shown = bands.levels(tmp_path).splitlines()
    assert shown[2] == "| plain SVD at 2×, one share | 1.0, 2.0, 3.0 | 2.0 |"
    assert shown[-1] == "| DRONE at 2×, its own search | 4.0, 5.0, 6.0 | 5.0 |"
    for level in bands.LEVELS:  # the published records: no mean of fewer seeds
        assert len(bands.scores(level)) >= 3


def test_every_band_of_the_page_has_records():
    lines = bands.table().splitlines()
    assert len(lines) == 2 + len(bands.BANDS)
