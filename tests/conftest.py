"""Fixtures that several test files share: tiny models, a padded batch, a seed."""

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
)

# The same examples in every run; no deadline, machines differ; no folder left behind.
settings.register_profile("book", deadline=None, derandomize=True, database=None)
settings.load_profile("book")

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


@pytest.fixture
def tiny_mpnet() -> PreTrainedModel:
    return MPNetForSequenceClassification(MPNetConfig(**SIZES)).eval()


@pytest.fixture(params=["tiny_bert", "tiny_mpnet"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


@pytest.fixture
def padded_batch() -> dict[str, Tensor]:
    """Three rows of 12, 7 and 3 tokens, padded with 1 (MPNet's padding index)."""
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    ids = torch.randint(5, 100, (3, 12)) * mask + (1 - mask)
    return {"input_ids": ids, "attention_mask": mask}
