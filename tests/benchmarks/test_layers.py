"""A thin layer beside the dense one, in one process: compare the medians.

BERT's intermediate layer (3072 × 768) on 4,096 tokens, float32. At rank 307 the two
thin products do half of the dense layer's multiply-adds.
"""

import pytest
import torch
from torch import nn

from drone import LowRankLinear

RANKS = [None, 307, 64]


@pytest.mark.benchmark(group="linear 3072 × 768, 4096 tokens")
@pytest.mark.parametrize("rank", RANKS, ids=lambda r: f"rank {r}" if r else "dense")
def test_forward(benchmark, rank):
    torch.manual_seed(0)
    layer = nn.Linear(768, 3072)
    tokens = torch.randn(4096, 768)
    if rank:
        layer = LowRankLinear.from_linear(layer, rank)
    with torch.inference_mode():
        benchmark.pedantic(layer, args=(tokens,), rounds=20, warmup_rounds=3)
