"""An LSTM layer, dense and thin, beside PyTorch's own: compare the medians.

Hidden 650, a batch of 20 texts of 35 words, float32, forward only. At rank 260 a thin
product does half of the dense one's multiply-adds, and at rank 64 an eighth.
"""

import pytest
import torch
from torch import nn

from drone import LowRankLinear, LSTMLayer

HIDDEN, BATCH, STEPS = 650, 20, 35
WAYS = {
    "dense": {},
    "input 260": {"input": 260},
    "recurrent 260": {"recurrent": 260},
    "both 260": {"input": 260, "recurrent": 260},
    "both 64": {"input": 64, "recurrent": 64},
}


@pytest.mark.benchmark(group=f"LSTM layer {HIDDEN}, batch {BATCH} × {STEPS} steps")
@pytest.mark.parametrize("way", ["nn.LSTM", *WAYS])
def test_forward(benchmark, way):
    torch.manual_seed(0)
    x = torch.randn(BATCH, STEPS, HIDDEN)
    if way == "nn.LSTM":
        layer = nn.LSTM(HIDDEN, HIDDEN, batch_first=True).eval()
    else:
        layer = LSTMLayer(HIDDEN, HIDDEN).eval()
        for part, rank in WAYS[way].items():
            thin = LowRankLinear.from_linear(getattr(layer, part), rank)
            setattr(layer, part, thin)
    with torch.inference_mode():
        benchmark.pedantic(layer, args=(x,), rounds=20, warmup_rounds=3)
