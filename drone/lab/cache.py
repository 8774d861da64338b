"""A training runs once: its result is kept under a key of everything it depends on.

Key → lock → folder → train → record → load. What can be relied on:

* A result is there whole or not at all; a hit is what the training gave, to the bit.
* Of two processes that want one key, one trains; the other waits, then reads.
* A training that was cut off, at any moment, goes on from its newest whole checkpoint.
* A training that diverged is an error, and nothing of it is kept as finished.
"""

import copy
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_model, save_model
from torch import nn

from drone.files import check_sha256, sha256, user_folder, whole_file, whole_folder
from drone.lab import keys

MANIFEST = "whole.json"  # of a checkpoint: written last, so its presence says: whole
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Kept(Generic[Model]):
    """A trained model in eval mode, and what was recorded beside it.

    Attributes:
        model: a copy of the one the training began with, its weights trained.
        record: `inputs`, `sha256`, and what the training told.
        key: SHA-256 over all inputs.
        cached: whether it was read rather than trained.
    """

    model: Model
    record: dict[str, Any]
    key: str
    cached: bool


def cached_training(
    title: str,
    model: Model,
    inputs: Mapping[str, Any],
    train: Callable[[Model, Path], Mapping[str, Any]],
    cache: Path | None = None,
) -> Kept[Model]:
    """Train a copy of a model, or read what an equal training gave.

    Args:
        title: names the training when it is found, or waited for.
        model: the start; it is left as it was.
        inputs: everything the result depends on, in values JSON knows; see
            `drone.lab.keys`.
        train: trains the model it is given in place, may keep checkpoints in the folder
            it is given (`seal`, `newest_whole`), and tells what to record.
        cache: a folder; None: `$DRONE_CACHE`, else `~/.cache/drone/fine-tuned`.

    Returns:
        The trained copy in eval mode. The caller's random state is as it was.

    Raises:
        ValueError: a weight is not finite after the training; the result kept under
            this key is damaged; inputs JSON does not know; and what `train` raises.
    """
    told = json.loads(json.dumps(dict(inputs), allow_nan=False))
    key = cache_key(told)
    folder = cache_folder(cache, key)
    cached = folder.is_dir()
    if not cached:
        with _locked(folder, title):
            # Another process may have finished it while this one waited.
            cached = folder.is_dir()
            if not cached:
                _train_and_keep(folder, model, told, train)
    if cached:
        print(f"cache hit: {title}, key {key[:12]}")
        _tidy(folder, title)
    record = read_record(folder, told)
    trained = copy.deepcopy(model)
    load_model(trained, folder / "model.safetensors")
    trained.eval()
    return Kept(trained, record, key, cached)


def _train_and_keep(
    folder: Path,
    model: Model,
    inputs: Mapping[str, Any],
    train: Callable[[Model, Path], Mapping[str, Any]],
) -> None:
    """Train and write `folder` whole; checkpoints wait beside it until then."""
    checkpoints = _checkpoints(folder)
    checkpoints.mkdir(parents=True, exist_ok=True)
    trained = copy.deepcopy(model)
    with own_randomness():
        told = train(trained, checkpoints)
    refuse_diverged(trained)
    with whole_folder(folder) as temporary:
        weights = temporary / "model.safetensors"
        save_model(trained, str(weights))
        record = {"inputs": inputs, **told, "sha256": sha256(weights)}
        (temporary / "record.json").write_text(json.dumps(record, indent=2))
    shutil.rmtree(checkpoints)


def _checkpoints(folder: Path) -> Path:
    return folder.with_name(folder.name + ".checkpoints")


def _tidy(folder: Path, title: str) -> None:
    """Remove checkpoints that a kill left beside a finished result."""
    if _checkpoints(folder).is_dir():
        with _locked(folder, title):
            shutil.rmtree(_checkpoints(folder), ignore_errors=True)


@contextmanager
def _locked(folder: Path, title: str) -> Iterator[None]:
    """Hold the lock of one key. A process that dies, however it dies, lets it go."""
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: another process is at {title}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_diverged(model: nn.Module) -> None:
    """Refuse a model with a weight that is not finite.

    Raises:
        ValueError: there is one; the message names the parameter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.detach().isfinite().all():
            raise ValueError(
                f"{name} is not finite: the training has diverged, and its model is "
                "not kept. A smaller learning_rate may help."
            )


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


def cache_key(inputs: Mapping[str, Any]) -> str:
    """SHA-256 over all that goes into a training."""
    return keys.digest(inputs)


def cache_folder(cache: Path | None, key: str) -> Path:
    """Where a model of this key is kept: below `cache`, or the default folder."""
    root = cache or user_folder("DRONE_CACHE", ".cache/drone/fine-tuned")
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
    try:
        check_sha256(folder / "model.safetensors", record["sha256"])
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: the weights are gone; delete it.") from error
    return record


# --- checkpoints -------------------------------------------------------------------


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is whole: keep the SHA-256 of each of its files, last."""
    found = {
        str(path.relative_to(checkpoint)): sha256(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    with whole_file(checkpoint / MANIFEST) as temporary:
        temporary.write_text(json.dumps(found, indent=2))


def newest_whole(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose files are all there and as they were sealed.

    Newer ones, and whatever else a kill or a full disk left there, are removed: the
    caller holds the key's lock, so nobody is writing them.

    Args:
        checkpoints: a folder of folders whose names end in `-<number>`.

    Returns:
        A folder, or None: the training begins anew.
    """
    newest: Path | None = None
    for folder in sorted(checkpoints.iterdir(), key=_number, reverse=True):
        if _is_whole(folder):
            newest = newest or folder
        elif folder.is_dir():
            shutil.rmtree(folder)
            print(f"not used: {folder.name}, which was cut off")
        else:
            folder.unlink()
    return newest


def _number(folder: Path) -> int:
    found = re.search(r"-(\d+)$", folder.name)
    return int(found[1]) if found else -1


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint has just the files it was sealed with, unchanged."""
    if _number(folder) < 0 or not (folder / MANIFEST).is_file():
        return False
    try:
        sealed = json.loads((folder / MANIFEST).read_text())
        files = {
            str(path.relative_to(folder)): sha256(path)
            for path in folder.rglob("*")
            if path.is_file() and path != folder / MANIFEST
        }
    except (OSError, ValueError):  # damaged: an answer, not a fault
        return False
    return bool(sealed == files and files)
