"""Labelled text from a CSV file: read, checked, split, and made into batches."""

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HELD_SHARE, HELD_MOST, LEAST = 1 / 3, 1000, 24


@dataclass(frozen=True)
class Row:
    """One row: its text (or pair of texts), its label as written, its line."""

    texts: tuple[str, ...]
    label: str
    line: int


def read_rows(path: Path, texts: Sequence[str], label: str) -> list[Row]:
    """Read a CSV file with a header; rows that stand there twice are taken once.

    Args:
        path: UTF-8, comma-separated.
        texts: names of one or two columns.
        label: name of the column of labels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, has no such column, or a row lacks a text or a
            label, or has more cells than the header. The message names file and row.
    """
    rows: dict[tuple[tuple[str, ...], str], Row] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            for name in (*texts, label):
                if name not in columns:
                    raise ValueError(
                        f"{path}: no column {name!r}; there are {', '.join(columns)}."
                    )
            for number, cells in enumerate(reader, 2):
                where = f"{path}, row {number}"
                if None in cells:
                    raise ValueError(
                        f"{where}: more cells than the header's {len(columns)}; a text "
                        "with a comma stands in quotes."
                    )
                for name in (*texts, label):
                    if not (cells[name] or "").strip():
                        raise ValueError(f"{where}: {name!r} is empty.")
                row = Row(
                    tuple(cells[name] for name in texts), cells[label].strip(), number
                )
                rows.setdefault((row.texts, row.label), row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}).") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file ({error}).") from error
    if len(rows) < LEAST:
        raise ValueError(
            f"{path}: {len(rows)} different rows; at least {LEAST} are needed, some "
            "hundred are better."
        )
    return list(rows.values())


def split(rows: Sequence[Row], most: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draw the rows a search sees, at most so many, and those held back from it.

    A text that stands there with two labels is on one side only.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.texts, []).append(row)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    drawn = [row for group in order for row in group]
    number = min(int(len(drawn) * HELD_SHARE), HELD_MOST)
    while drawn[number - 1].texts == drawn[number].texts:
        number += 1
    return drawn[number:][:most], drawn[:number]


def label_ids(
    rows: Sequence[Row], label2id: Mapping[str, int], path: Path
) -> dict[str, float]:
    """Map labels as written to what the model's head has.

    By the config's names; else as numbers of classes; else, where the names are the
    head's size in number, in alphabetical order. A head of one output takes numbers.

    Raises:
        ValueError: none of the three fits. The message names file and row.
    """
    names = sorted({row.label for row in rows})
    if len(label2id) == 1:
        return {name: _number(rows, name, path) for name in names}
    if set(names) <= set(label2id):
        return {name: label2id[name] for name in names}
    if all(n.isdecimal() and int(n) < len(label2id) for n in names):
        return {name: int(name) for name in names}
    if len(names) == len(label2id) and not any(n in label2id for n in names):
        return {name: number for number, name in enumerate(names)}
    odd = next(row for row in rows if row.label not in label2id)
    raise ValueError(
        f"{path}, row {odd.line}: the label {odd.label!r} is none of the model's "
        f"{', '.join(list(label2id)[:9])}; {len(names)} different labels are there."
    )


def _number(rows: Sequence[Row], name: str, path: Path) -> float:
    try:
        value = float(name)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        line = next(row.line for row in rows if row.label == name)
        raise ValueError(
            f"{path}, row {line}: the label {name!r} is no number, and the model's "
            "head has one output."
        )
    return value


def make_batches(
    rows: Sequence[Row],
    tokenizer: Any,
    ids: Mapping[str, float],
    size: int,
    longest: int,
) -> list[dict[str, Tensor]]:
    """Make padded batches of rows, shorter texts first, so that few pads are needed.

    Args:
        rows: to take.
        tokenizer: of the model.
        ids: from `label_ids`.
        size: rows a batch.
        longest: tokens a row; the rest is cut off.

    Returns:
        `input_ids`, `attention_mask` (rows, length), `labels` (rows,) and what else the
        tokenizer gives.
    """
    order = sorted(rows, key=lambda row: (sum(map(len, row.texts)), row.line))
    whole = all(isinstance(number, int) for number in ids.values())
    batches = []
    for start in range(0, len(order), size):
        some = order[start : start + size]
        columns = [
            list(column) for column in zip(*(r.texts for r in some), strict=True)
        ]
        batch = dict(
            tokenizer(
                *columns,
                truncation=True,
                max_length=longest,
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )
        kind = torch.long if whole else torch.float
        batch["labels"] = torch.tensor([ids[row.label] for row in some], dtype=kind)
        batches.append(batch)
    return batches
