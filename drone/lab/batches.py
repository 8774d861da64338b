"""Rows of text to tokens, tokens to padded batches, batches to logits."""

import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from drone import progress
from drone.lab import data
from drone.model.calibrate import frozen


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: str, max_length: int = 128
) -> Dataset:
    """Turn text columns into `input_ids`, `attention_mask`, ... and `labels`.

    Nothing is padded here: batches are padded to their own longest row.
    """
    columns = [list(rows[column]) for column in data.TASKS[task].columns]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return Dataset.from_dict(dict(encoded) | {"labels": list(rows["label"])})


def batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    labels: bool = False,
) -> list[BatchEncoding]:
    """Pad tokenized rows into batches: what `predict` and `drone.calibrate` run on.

    Args:
        rows: from `tokenize`.
        tokenizer: pads each batch to its own longest row.
        batch_size: rows at once. Rows are sorted by length, so few pads are computed.
        labels: keep them, as `drone.search_ranks` needs, or leave them out.

    Returns:
        Batches of `input_ids`, `attention_mask`, ..., each (batch, length).

    Raises:
        ValueError: there are no rows.
    """
    if not len(rows):
        raise ValueError("no rows to make batches of; at least one is needed.")
    order = by_length(rows)
    columns = [name for name in rows.column_names if labels or name != "labels"]
    wanted = rows.select_columns(columns)
    return [
        tokenizer.pad(
            wanted.select(order[start : start + batch_size])[:], return_tensors="pt"
        )
        for start in range(0, len(rows), batch_size)
    ]


def by_length(rows: Dataset) -> list[int]:
    """Row numbers from the shortest to the longest; equals keep their order."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sorted(range(len(rows)), key=lengths.__getitem__)


def predict(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> np.ndarray:
    """Return logits (rows, outputs), float32, in the order of `rows`.

    Raises:
        ValueError: there are no rows, or some logit is not finite; the message names
            the row.
    """
    parts = []
    padded = batches(rows, tokenizer, batch_size)
    with frozen(model):
        for batch in progress.bar(padded, desc="evaluate"):
            parts.append(model(**batch.to(model.device)).logits.float().cpu())
    # back into the order of rows
    logits = torch.cat(parts).numpy()[np.argsort(by_length(rows))]
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise ValueError(
            f"row {bad[0]}: the logits are {logits[bad[0]]}; finite ones are needed."
        )
    return logits
