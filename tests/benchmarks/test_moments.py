"""What collecting second moments adds to a forward pass: compare the medians.

MiniLM on 12 batches of 32 sentences of 40 to 60 tokens, all 36 Linear layers of the
encoder watched.
"""

import pytest
import torch

from drone import calibrate
from drone.lab import encoders


@pytest.fixture(scope="module")
def model():
    return encoders.encoder("minilm")[0]


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(12):
        lengths = torch.randint(40, 61, (32, 1), generator=generator)
        mask = (torch.arange(60) < lengths).long()
        ids = torch.randint(1000, 30_000, (32, 60), generator=generator) * mask
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def forward(model, batches):
    with torch.no_grad():
        for batch in batches:
            model(**batch)


@pytest.mark.benchmark(group="calibrate MiniLM, 12 batches of 32")
@pytest.mark.parametrize("run", [forward, calibrate], ids=["forward pass", "calibrate"])
def test_calibrate(benchmark, model, batches, run):
    benchmark.pedantic(run, args=(model, batches), rounds=3, warmup_rounds=1)
