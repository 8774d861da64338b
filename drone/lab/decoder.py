"""A small causal language model of words: GPT-2's form, trained here. Chapter 10."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from drone import progress
from drone.files import tensors_sha256
from drone.lab import keys
from drone.lab.cache import cached_training
from drone.lab.language import PARTS, windows
from drone.lab.ranges import check_fields
from drone.lab.trainer import Recipe, bfloat16_gains, train_in_place
from drone.model.calibrate import frozen

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Size:
    """How large a decoder is.

    Raises:
        ValueError: a value out of its range; the message names it.
        TypeError: a value of another type, such as True for a number.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    context: int = 64  # tokens it reads at once
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, counts=("layers", "hidden", "heads", "context"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; from 0 to below 1.")


def decoder(words: int, size: Size, seed: int = 0) -> GPT2LMHeadModel:
    """Return a model with random weights; the caller's random state is kept.

    Args:
        words: of the vocabulary; number 0 ends a sentence, as in `Vocabulary`.
        size: of the model; there is room for one token more than it reads in training.
        seed: of the weights.
    """
    config = GPT2Config(
        vocab_size=words,
        n_positions=size.context + 1,
        n_embd=size.hidden,
        n_layer=size.layers,
        n_head=size.heads,
        embd_pdrop=size.dropout,
        resid_pdrop=size.dropout,
        attn_pdrop=size.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it takes unasked, and with a warning
    model.eval()
    return model


def rows(ids: Tensor, context: int) -> Tensor:
    """Cut a stream into rows, (rows, context); what is left over is not used.

    Raises:
        ValueError: not one row is full.
    """
    count = len(ids) // context
    if not count:
        raise ValueError(f"{len(ids)} tokens; a row has {context}.")
    return ids[: count * context].view(count, context)


def batches(ids: Tensor, context: int, batch_size: int = 16) -> list[dict[str, Tensor]]:
    """Make batches for `drone.compress`: a decoder shifts its labels by itself.

    Returns:
        `input_ids`, the same as `labels`, and an `attention_mask` of ones, each
        (batch, context).
    """
    return [
        {"input_ids": some, "labels": some, "attention_mask": torch.ones_like(some)}
        for some in rows(ids, context).split(batch_size)
    ]


def perplexity(model: GPT2LMHeadModel, ids: Tensor, context: int) -> float:
    """Return exp of the mean of -log p: as if choosing among so many words.

    Every token counts once, given what stands before it in its window of `context`
    tokens. The first of a window has `<eos>` or the last of the window before.

    Raises:
        ValueError: fewer tokens than the parts read side by side, or a loss that is
            not finite.
    """
    total = 0.0
    with frozen(model):
        cut = list(windows(ids, PARTS, context))
        for before, labels in progress.bar(cut, desc="perplexity"):
            logits = model(before.to(model.device), use_cache=False).logits
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten().to(model.device),
                reduction="sum",
            )
            total += float(loss)
    if not math.isfinite(total):
        raise ValueError("the perplexity is not finite.")
    return math.exp(total / len(ids))


def unigram_perplexity(train: Tensor, ids: Tensor, words: int) -> float:
    """Perplexity of a model that knows how frequent each word is, and nothing else.

    Every word counts once more than it occurs, so that none is impossible.
    """
    counts = torch.bincount(train, minlength=words).double() + 1
    logs = (counts / counts.sum()).log()
    return float((-logs[ids].mean()).exp())


@dataclass(frozen=True)
class TrainedDecoder:
    """A decoder in eval mode, and where it came from."""

    model: GPT2LMHeadModel
    seconds: float  # its training took
    key: str  # SHA-256 over everything that went into it
    cached: bool


def train(
    model: GPT2LMHeadModel,
    ids: Tensor,
    context: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    cache: Path | None = None,
) -> TrainedDecoder:
    """Train a decoder by Trainer, or read it from the cache; a cut one goes on.

    Args:
        model: the start; it is left as it was.
        ids: (tokens,) of the training split.
        context: tokens of a row.
        recipe: the hyperparameters; `max_length` is not used.
        seed: of the order of the rows and dropout.
        cache: as in `drone.lab.training.fine_tune`.

    Raises:
        ValueError: no full row; a training that diverged; a damaged file in the cache.
    """
    cut = rows(ids, context)
    inputs = {
        "format": FORMAT_VERSION,
        "start": keys.of_model(model),
        "rows": tensors_sha256({"rows": cut}),
        "seed": seed,
        "recipe": asdict(recipe),
        "bfloat16": bfloat16_gains(),
    } | keys.of_machine("transformers", "accelerate")

    def run(start: GPT2LMHeadModel, checkpoints: Path) -> dict[str, Any]:
        text = cut.tolist()
        seconds = train_in_place(
            start,
            Dataset.from_dict({"input_ids": text, "labels": text}),
            recipe,
            "train a decoder",
            seed=seed,
            checkpoints=checkpoints,
            collator=default_data_collator,
        )
        return {"seconds": seconds}

    kept = cached_training(f"decoder, seed {seed}", model, inputs, run, cache)
    return TrainedDecoder(kept.model, kept.record["seconds"], kept.key, kept.cached)


class NextToken(nn.Module):
    """One token after a prompt whose keys and values are kept: a step of generating.

    Attributes:
        cache_bytes: memory of the prompt's keys and values.
    """

    def __init__(self, model: GPT2LMHeadModel, prompt: Tensor) -> None:
        """Read the prompt, (batch, tokens), once."""
        super().__init__()
        self.model = model
        with frozen(model):
            self._kept = model(prompt, use_cache=True).past_key_values
        self.cache_bytes = sum(
            layer.keys.nbytes + layer.values.nbytes for layer in self._kept.layers
        )
        self.eval()

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits after one token more, (batch, 1, words); it is not kept."""
        logits: Tensor = self.model(
            input_ids, past_key_values=self._kept, use_cache=True
        ).logits
        self._kept.crop(-input_ids.shape[1])  # negative: so many tokens from the end
        return logits
