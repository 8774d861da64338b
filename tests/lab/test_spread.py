"""Moments from a Dask cluster against one process that reads all rows."""

import pytest
import torch
from distributed import Client
from torch import nn

import drone
from drone.lab.spread import calibrate_on


def test_it_is_what_one_process_finds_on_all_rows() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [10.0**n * torch.randn(5 + n, 6) for n in range(4)]
    alone = drone.calibrate(model, batches, ["0", "2"])
    # in this process, so that the test takes no time to start others
    with Client(processes=False, n_workers=2, dashboard_address=None) as client:
        spread = calibrate_on(client, model, [batches[:1], batches[1:]], ["0", "2"])
        with pytest.raises(ValueError, match="no part"):
            calibrate_on(client, model, [])
    assert list(spread) == list(alone)
    for name, expected in alone.items():
        scale = expected.matrix.abs().max()
        assert (spread[name].matrix - expected.matrix).abs().max() <= 1e-12 * scale
        assert torch.allclose(spread[name].mean, expected.mean, rtol=1e-12)
        assert spread[name].count == expected.count == 26
