"""Where a trained model is kept, under a key of everything that went into it."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from drone.files import check_sha256

DEFAULT_CACHE = Path.home() / ".cache" / "drone" / "fine-tuned"


@contextmanager
def own_randomness() -> Iterator[None]:
    """Give the caller's random state back, so a cache hit leaves the same one."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def cache_key(inputs: Mapping[str, Any], rows: Dataset) -> str:
    """SHA-256 over all that goes into a training, the rows themselves included."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def cache_folder(cache: Path | None, key: str) -> Path:
    """Where a model of this key is kept: below `cache`, or the default folder."""
    root = cache or Path(os.environ.get("DRONE_CACHE", DEFAULT_CACHE))
    return root / key[:20]


def read_record(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Read what was kept beside a trained model, and check both.

    Raises:
        ValueError: the record or the model is damaged, or made from other inputs.
    """
    path = folder / "record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); delete {folder}."
        ) from error
    whole = isinstance(record, dict) and {"inputs", "seconds", "sha256"} <= set(record)
    if not whole:
        raise ValueError(f"{path}: a field is missing; delete {folder}.")
    if record["inputs"] != inputs:
        raise ValueError(f"{path}: made from other inputs; delete {folder}.")
    check_sha256(folder / "model.safetensors", record["sha256"])
    return record
