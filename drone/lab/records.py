"""One JSON line a run: what was asked, where it ran, what came out."""

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


def save_case(path: Path, settings: Mapping[str, Any], case: Mapping[str, Any]) -> None:
    """Keep a finished case of a long run, with the settings that it depends on.

    Args:
        path: of the file to write, whole or not at all.
        settings: all that would change the case's results; values JSON knows.
        case: the results, likewise.

    Raises:
        TypeError: a value that JSON does not know, such as an array.
    """
    text = json.dumps({"settings": settings, "case": case})
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n")


def load_case(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a case kept by `save_case`, if it was made with the same settings.

    Args:
        path: of the file; it need not exist.
        settings: as `save_case` would be given them now.

    Returns:
        The case; None if there is no file, or one of other settings.

    Raises:
        ValueError: the file is not what `save_case` writes; the message names it.
    """
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        made_with, case = kept["settings"], kept["case"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a kept case ({error}); delete it to run it again."
        ) from error
    # JSON knows lists only, so settings are compared as they would be read
    return dict(case) if made_with == json.loads(json.dumps(settings)) else None


def provenance(parameters: Mapping[str, Any], seconds: float) -> pd.DataFrame:
    """Tell where the page above comes from: parameters, machine, versions, time."""
    rows = {f"parameter {name}": str(value) for name, value in parameters.items()}
    rows |= environment() | {"seconds": f"{seconds:.0f}"}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value"])
