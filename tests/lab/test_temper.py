"""One temperature takes overconfidence away and changes no decision."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from drone.lab.temper import last_linear, temperature, tempered


@pytest.mark.parametrize("sure", [2.0, 5.0, 9.0])
def test_the_temperature_is_that_of_the_odds(sure: float) -> None:
    logits = torch.tensor([[sure, 0.0]] * 8)
    labels = torch.tensor([0] * 6 + [1] * 2)  # right three times of four
    assert temperature(logits, labels) == pytest.approx(sure / math.log(3), rel=0.03)


def test_a_model_is_no_surer_than_it_is_right(
    tiny_mpnet: PreTrainedModel, task: Callable[..., list[dict[str, Tensor]]]
) -> None:
    batches = task(tiny_mpnet)
    for batch in batches:  # its labels are its own: turn some, it is overconfident
        batch["labels"][::3] = 1 - batch["labels"][::3]
    small, divisor = tempered(tiny_mpnet, batches)
    assert divisor > 1
    labels = torch.cat([batch["labels"] for batch in batches])
    with torch.no_grad():
        was = torch.cat([tiny_mpnet(**batch).logits for batch in batches])
        now = torch.cat([small(**batch).logits for batch in batches])
    assert torch.allclose(now, was / divisor, atol=1e-5)
    losses = [float(F.cross_entropy(now * factor, labels)) for factor in (0.9, 1, 1.1)]
    assert losses[1] == min(losses)
    assert last_linear(tiny_mpnet) is tiny_mpnet.classifier.out_proj


def test_a_regression_is_left_alone(tiny_bert: PreTrainedModel) -> None:
    tiny_bert.config.num_labels = 1
    small, divisor = tempered(tiny_bert, [])
    assert divisor == 1.0 and small is not tiny_bert
