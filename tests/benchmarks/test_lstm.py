"""An LSTM layer, dense and thin, beside PyTorch's own: compare the medians.

Hidden 650, a batch of 20 texts of 35 words. At rank 260 a thin product does half of the
dense one's multiply-adds, and at rank 64 an eighth.
"""

import pytest
import torch
from torch import nn

from drone import LowRankLinear, LSTMLayer
from drone.lab.training import bfloat16_gains
from drone.layers.lstm import _kernel

HIDDEN, BATCH, STEPS = 650, 20, 35
WAYS = {
    "dense": {},
    "input 260": {"input": 260},
    "recurrent 260": {"recurrent": 260},
    "both 260": {"input": 260, "recurrent": 260},
    "both 64": {"input": 64, "recurrent": 64},
}


def made(way: str) -> LSTMLayer:
    """A layer with some of its parts thin."""
    layer = LSTMLayer(HIDDEN, HIDDEN)
    for part, rank in WAYS[way].items():
        thin = LowRankLinear.from_linear(getattr(layer, part), rank)
        setattr(layer, part, thin)
    return layer


@pytest.mark.benchmark(group=f"LSTM layer {HIDDEN}, batch {BATCH} × {STEPS} steps")
@pytest.mark.parametrize("way", ["nn.LSTM", *WAYS])
def test_forward(benchmark, way):
    torch.manual_seed(0)
    x = torch.randn(BATCH, STEPS, HIDDEN)
    if way == "nn.LSTM":
        layer = nn.LSTM(HIDDEN, HIDDEN, batch_first=True).eval()
    else:
        layer = made(way).eval()
    with torch.inference_mode():
        benchmark.pedantic(layer, args=(x,), rounds=20, warmup_rounds=3)


@pytest.mark.benchmark(group=f"LSTM layer {HIDDEN}, a step of training")
@pytest.mark.parametrize("way", ["PyTorch's kernel", *WAYS])
def test_training(benchmark, way):
    """Forward and backward, in bfloat16 where that is the faster one."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, STEPS, HIDDEN)
    zeros = torch.zeros(BATCH, HIDDEN)
    layer = made(way if way in WAYS else "dense")

    def step():
        with torch.autocast("cpu", torch.bfloat16, bfloat16_gains()):
            if way in WAYS:
                output, _ = layer(x)
            else:
                state = (zeros, zeros)
                output, _ = _kernel(x, state, layer.input, layer.recurrent)
        output.float().sum().backward()

    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
