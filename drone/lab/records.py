"""One JSON line a run: what was asked, where it ran, what came out."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from drone.files import whole_file
from drone.timing import accelerator, processor


def environment() -> dict[str, str]:
    """Date (UTC), processor, GPU if any, threads, system, the versions that matter."""
    gpu = accelerator()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": processor(),
        **({} if gpu is None else {"gpu": gpu}),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    } | {
        package: version(package)
        for package in ("torch", "transformers", "datasets", "numpy", "drone")
    }


def save(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, each with the environment; whole or not at all."""
    where = environment()
    with whole_file(path) as temporary:
        temporary.write_text(
            "".join(json.dumps({**where, **record}) + "\n" for record in records)
        )


def load(path: Path) -> pd.DataFrame:
    """Read records back, one row a run.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a JSON object; the message names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {row!r}; an object is needed.")
        rows.append(row)
    return pd.DataFrame(rows)


def save_case(path: Path, settings: Mapping[str, Any], case: Mapping[str, Any]) -> Path:
    """Keep a finished case of a long run, with the settings that it depends on.

    A case of other settings is never written over: if `path` has one, the new case
    lies beside it, its name ending in a digest of its settings. `load_case` finds it.

    Args:
        path: of the file to write, whole or not at all.
        settings: all that would change the case's results; values JSON knows.
        case: the results, likewise.

    Returns:
        The file that was written.

    Raises:
        TypeError: a value that JSON does not know, such as an array.
    """
    text = json.dumps({"settings": settings, "case": case})
    if path.exists() and not _is_of(path, settings):
        path = _beside(path, settings)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n")
    return path


def load_case(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a case kept by `save_case`, if it was made with the same settings.

    Args:
        path: of the file; it need not exist.
        settings: as `save_case` would be given them now.

    Returns:
        The case; None if there is no file, or only ones of other settings.

    Raises:
        ValueError: the file is not what `save_case` writes; the message names it.
    """
    for file in (path, _beside(path, settings)):
        if file.is_file():
            made_with, case = _read_case(file)
            if made_with == _as_read(settings):
                return case
    return None


def _read_case(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        kept = json.loads(path.read_text())
        return kept["settings"], dict(kept["case"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a kept case ({error}); delete it to run it again."
        ) from error


def _is_of(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a file has a case of these settings; a damaged one has not."""
    try:
        return bool(_read_case(path)[0] == _as_read(settings))
    except ValueError:
        return False


def _as_read(settings: Mapping[str, Any]) -> Any:
    """JSON knows lists only, so settings are compared as they would be read."""
    return json.loads(json.dumps(settings))


def _beside(path: Path, settings: Mapping[str, Any]) -> Path:
    text = json.dumps(_as_read(settings), sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def provenance(parameters: Mapping[str, Any], seconds: float) -> pd.DataFrame:
    """Tell where the page above comes from: parameters, machine, versions, time."""
    rows = {f"parameter {name}": str(value) for name, value in parameters.items()}
    rows |= environment() | {"seconds": f"{seconds:.0f}"}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value"])
