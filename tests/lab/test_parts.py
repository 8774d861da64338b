"""Parts are disjoint; rows keep their tokens, however they are cut and sorted."""

import numpy as np
import pytest
import torch

from drone.lab.parts import MOST_HELD, split
from tests.lab.test_loop import make_rows


@pytest.mark.parametrize("rows", [3, 10, 249, 3668, 67349])
def test_the_parts_are_disjoint_and_are_all(rows: int) -> None:
    parts = split(rows, seed=0)
    together = np.concatenate([parts.fit, parts.calibration, parts.held])
    assert sorted(together) == list(range(rows))
    assert min(len(parts.fit), len(parts.calibration), len(parts.held)) >= 1
    assert len(parts.calibration) == max(1, round(rows / 10))
    assert len(parts.held) <= MOST_HELD


def test_the_seed_decides_the_parts() -> None:
    a, b, c = split(100, 0), split(100, 0), split(100, 1)
    assert (a.fit == b.fit).all() and (a.held == b.held).all()
    assert (a.held != c.held).any()


def test_two_rows_cannot_be_three_parts() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        split(2, 0)


def test_batches_hold_every_token_of_every_row_once() -> None:
    rows = make_rows(20).select([3, 1, 8, 19, 0])
    seen = []
    for index, batch in rows.batches(2):
        assert torch.equal(batch["labels"], rows.labels[index])
        assert batch["attention_mask"][:, -1].any()  # no column of pads alone
        for row, ids, mask in zip(
            index, batch["input_ids"], batch["attention_mask"], strict=True
        ):
            whole = rows.inputs["input_ids"][row, : rows.lengths[row]]
            assert torch.equal(ids[mask.bool()], whole)
            seen.append(int(row))
    assert sorted(seen) == list(range(5))
