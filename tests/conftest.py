"""Fixtures that several test files share: tiny models, a padded batch, a browser."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import settings
from other_device import DEVICE, OtherDevice
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
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


@pytest.fixture(params=["cpu", "other", "cuda"])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Where the model is: here, on a pretended device, and on a GPU if there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param != "other":
        yield torch.device(request.param)
        return
    # A pretended tensor cannot be one of inference mode.
    monkeypatch.setattr(
        torch,
        "inference_mode",
        lambda on=True: torch.no_grad() if on else nullcontext(),
    )
    with OtherDevice():
        yield DEVICE


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    torch.manual_seed(0)


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Draw weights of a trained model's size: as made, every bias is 0 and attention
    is uniform, so that a forgotten bias or a wrong softmax would not be seen."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


@pytest.fixture
def tiny_bert() -> PreTrainedModel:
    return lively(BertForSequenceClassification(BertConfig(**SIZES)))


@pytest.fixture
def tiny_mpnet() -> PreTrainedModel:
    model = MPNetForSequenceClassification(MPNetConfig(**SIZES))
    nn.init.normal_(model.mpnet.encoder.relative_attention_bias.weight)
    return lively(model)


@pytest.fixture
def tiny_roberta() -> PreTrainedModel:
    return lively(RobertaForSequenceClassification(RobertaConfig(**SIZES)))


@pytest.fixture
def tiny_distilbert() -> PreTrainedModel:
    sizes = {
        "vocab_size": SIZES["vocab_size"],
        "dim": SIZES["hidden_size"],
        "n_layers": SIZES["num_hidden_layers"],
        "n_heads": SIZES["num_attention_heads"],
        "hidden_dim": SIZES["intermediate_size"],
        "max_position_embeddings": SIZES["max_position_embeddings"],
    }
    return lively(DistilBertForSequenceClassification(DistilBertConfig(**sizes)))


@pytest.fixture(params=["tiny_bert", "tiny_mpnet"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny_bert", "tiny_roberta", "tiny_mpnet", "tiny_distilbert"])
def family(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny model of each family whose attention is known."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def padded_batch() -> dict[str, Tensor]:
    """Three rows of 12, 7 and 3 tokens, padded with 1 (MPNet's padding index)."""
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    ids = torch.randint(5, 100, (3, 12)) * mask + (1 - mask)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def task() -> Callable[..., list[dict[str, Tensor]]]:
    """Makes batches a model is right about, so that compressing it raises the loss."""
    return make_task


def make_task(model: PreTrainedModel, seed: int = 0) -> list[dict[str, Tensor]]:
    """Three padded batches of unlike sizes, labelled by the model's own predictions.

    The head is shifted and scaled in place: both labels occur, and the loss is low."""
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for rows, length in [(6, 12), (3, 7), (8, 9)]:
        lengths = torch.randint(3, length + 1, (rows, 1), generator=draw)
        mask = (torch.arange(length) < lengths).long()
        ids = torch.randint(5, 100, (rows, length), generator=draw)
        batches.append({"input_ids": ids * mask + 1 - mask, "attention_mask": mask})
    head = model.classifier
    head = head if isinstance(head, nn.Linear) else head.out_proj
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
        margin = logits[:, 1] - logits[:, 0]
        head.bias[1] -= margin.mean()
        for parameter in (head.weight, head.bias):
            parameter *= 4 / margin.std()
        for batch in batches:
            batch["labels"] = model(**batch).logits.argmax(1)
    return batches


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, one for all tests of a process: Playwright does not start twice."""
    from built_site import CHROMIUM
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "DRONE_REQUIRE_BROWSER is set, and there is no Chromium"
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()
