"""What a saved model's files say before anything of them is read into memory."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from drone.files import sha256

WEIGHTS, INDEX, CONFIG = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
)
FLOATS = {"F16", "BF16", "F32", "F64"}
# What a reader may change by hand and no number depends on.
DESCRIPTIVE = {"id2label", "label2id", "transformers_version", "_name_or_path"}


class Header(NamedTuple):
    """What a safetensors file says of one tensor.

    Attributes:
        shape: of the tensor.
        dtype: as safetensors writes it, "F32" for float32.
        file: where it is.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def numbers(self) -> bool:
        """Whether it holds floating-point numbers of a known size."""
        return self.dtype in FLOATS


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: it is damaged, or holds something else. The message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or no JSON ({error}).") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path}: holds a {kind}; an object in braces is needed.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors file of a folder, or the shards its index names.

    Raises:
        FileNotFoundError: the folder, its config.json, its weights or a shard is not
            there.
        ValueError: the index is damaged, or names a file outside the folder.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: config.json and {WEIGHTS} are needed.")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder}: config.json and {WEIGHTS} are needed.")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / INDEX}: has no weight_map of tensors to files.")
    for name in shards.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: {name!r} is no safetensors file.")
    files = [folder / name for name in sorted(set(shards.values()))]
    check_inside(folder, files)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the index names it; it is not there.")
    return files


def check_inside(folder: Path, files: Iterable[Path]) -> None:
    """Refuse weights that are not safetensors, or lie elsewhere than in the folder.

    Only names are looked at: a hub's cache keeps the files behind links.

    Raises:
        ValueError: naming the file.
    """
    for file in files:
        if file.parent != folder or file.name in ("..", "."):
            raise ValueError(f"{file}: lies outside {folder}; no weight may.")
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: only safetensors are read, never a pickle.")


def headers(files: Iterable[Path]) -> dict[str, Header]:
    """Read the name, shape and dtype of each tensor; no tensor is read.

    Raises:
        ValueError: a file is damaged, or two hold a tensor of one name.
    """
    found: dict[str, Header] = {}
    for path in files:
        for key, header in _headers_of(path):
            if key in found:
                raise ValueError(f"{path}: {key} is in {found[key].file.name} too.")
            found[key] = header
    return found


def _headers_of(path: Path) -> Iterator[tuple[str, Header]]:
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                yield key, Header(tuple(part.get_shape()), part.get_dtype(), path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not safetensors ({error}).") from error


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return {file: SHA-256} of the weights, and of config.json's other fields."""
    found = {file.name: sha256(file) for file in files}
    kept = {
        key: value
        for key, value in read_json(folder / CONFIG).items()
        if key not in {*DESCRIPTIVE, "quantization_config"}
    }
    written = json.dumps(kept, sort_keys=True).encode()
    return found | {CONFIG: hashlib.sha256(written).hexdigest()}


def check_digests(folder: Path, files: list[Path], expected: dict[str, str]) -> None:
    """Refuse files that are not the ones the digests were made of.

    Args:
        folder: with config.json.
        files: all weights that are read.
        expected: from config.json; empty: the folder has none, nothing is checked.

    Raises:
        ValueError: naming the file.
    """
    if not expected:
        return
    found = digests(folder, files)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            has = "is not there" if name not in found else "has no SHA-256"
            raise ValueError(f"{folder / name}: {has}; it is not the folder saved.")
        if found[name] != expected[name]:
            fields = " (beside labels)" if name == CONFIG else ""
            raise ValueError(
                f"{folder / name}: its SHA-256{fields} is not the one written when the "
                "model was saved: it is damaged or was changed. Get it again; if the "
                f"change is meant, take sha256 out of {CONFIG}'s quantization_config."
            )
