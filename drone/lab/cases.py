"""A case: one set of settings, run to its end alone, kept whole, never run twice."""

import base64
import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from drone.timing import processor

FORMAT_VERSION = 1
FIELDS = ("job", "settings", "result", "seconds", "device", "date", "versions")
READABLE = 60  # letters of a file's name that are for people
LONG = 24  # letters of a setting that tells them nothing, a digest


@dataclass(frozen=True)
class Case:
    """A finished case, as its file tells it.

    Attributes:
        job: what was done, the name of a folder.
        settings: all that decides the result.
        result: what came out.
        seconds: it took.
        device: the GPU's name, or the processor's.
        date: when it ended, UTC.
        versions: of Python and the packages that matter.
        path: of its file.
        found: whether it was read rather than run; only `run_case` can say False.
    """

    job: str
    settings: dict[str, Any]
    result: Any
    seconds: float
    device: str
    date: str
    versions: dict[str, str]
    path: Path
    found: bool = True


def case_key(job: str, settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 over the job and all settings, as 64 hex digits.

    The order of the settings does not matter; 1 and 1.0 are two settings.

    Args:
        job: letters, digits, `_` and `-`.
        settings: values that JSON knows: None, bool, int, float, str, list, dict.

    Raises:
        ValueError: a job that cannot name a folder, NaN or Inf among the settings.
        TypeError: a value JSON does not know; the message says where it stands.

    >>> case_key("dense", {"seed": 0, "task": "rte"}) == case_key(
    ...     "dense", {"task": "rte", "seed": 0})
    True
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", job):
        raise ValueError(f"the job is {job!r}; letters, digits, _ and - are allowed.")
    plain = _plain(settings, "settings")
    return _digest({"format": FORMAT_VERSION, "job": job, "settings": plain})


def case_path(folder: Path, job: str, settings: Mapping[str, Any]) -> Path:
    """Return where a case lies: `folder/job/<some settings>-<key's first 12>.json`.

    Raises:
        ValueError, TypeError: as `case_key`.
    """
    key = case_key(job, settings)
    short = {n: str(v) for n, v in settings.items() if isinstance(v, str | int | float)}
    words = [
        re.sub(r"[^A-Za-z0-9.]+", "_", short[name])
        for name in sorted(short)
        if len(short[name]) <= LONG and not isinstance(settings[name], bool)
    ]
    return folder / job / f"{'-'.join(words)[:READABLE]}-{key[:12]}.json"


def load_case(folder: Path, job: str, settings: Mapping[str, Any]) -> Any | None:
    """Return the result of a finished case, or None if it has not been run.

    Raises:
        ValueError: its file is damaged; the message names it.
        ValueError, TypeError: as `case_key`.
    """
    path = case_path(folder, job, settings)
    return read_case(path).result if path.is_file() else None


def keep_case(
    folder: Path,
    job: str,
    settings: Mapping[str, Any],
    result: Any,
    seconds: float,
) -> Case:
    """Write a finished case, whole or not at all, and never over another.

    Args:
        folder: of all jobs.
        job: as in `case_key`.
        settings: as in `case_key`.
        result: values that JSON knows; arrays go through `pack`.
        seconds: it took.

    Returns:
        The case as it is read back.

    Raises:
        FileExistsError: the case has been kept before.
        ValueError: NaN or Inf in the result (a run that diverged is no result); the
            message says where.
        TypeError: a value JSON does not know; the message says where.
    """
    path = case_path(folder, job, settings)
    content = {
        "format": FORMAT_VERSION,
        "job": job,
        "settings": _plain(settings, "settings"),
        "result": _plain(result, "result"),
        "seconds": _plain(round(seconds, 3), "seconds"),
        "device": device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    text = json.dumps(content | {"sha256": _digest(content)}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=path.parent) as name:
        whole = Path(name, path.name)
        whole.write_text(text + "\n")
        # A link, not a rename: that would replace what another process has kept
        try:
            path.hardlink_to(whole)
        except FileExistsError:
            raise FileExistsError(
                f"{path} is kept already; a finished case is never overwritten."
            ) from None
    return read_case(path)


def run_case(
    folder: Path,
    job: str,
    settings: Mapping[str, Any],
    function: Callable[[Mapping[str, Any]], Any],
) -> Case:
    """Read a finished case, or run it and keep it.

    Of two processes that want the same case one runs it, the other waits and reads. A
    process that dies gives its lock back.

    Args:
        folder: of all jobs.
        job: as in `case_key`.
        settings: as in `case_key`; what `function` is called with.
        function: settings → result.

    Returns:
        The case, as it is read from its file.

    Raises:
        ValueError, TypeError: as `load_case` and `keep_case`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as name:
    ...     for _ in range(2):
    ...         case = run_case(Path(name), "double", {"x": 2}, lambda s: 2 * s["x"])
    ...         print(case.result, case.found)
    4 False
    4 True
    """
    path = case_path(folder, job, settings)
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{case_key(job, settings)}.lock"):
        if path.is_file():
            return read_case(path)
        started = time.perf_counter()
        result = function(settings)
        seconds = time.perf_counter() - started
        case = keep_case(folder, job, settings, result, seconds)
    return Case(**(vars(case) | {"found": False}))


def read_case(path: Path) -> Case:
    """Read one file that `keep_case` wrote.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is damaged, was edited, or has another format or name than its
            settings give it; the message names it.
    """
    try:
        content = json.loads(path.read_text())
        found = content.pop("sha256")
        same = found == _digest(content)
        fields = {name: content[name] for name in FIELDS}
        name = case_path(path.parent.parent, content["job"], content["settings"]).name
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a kept case ({error!r}); delete it to run it again."
        ) from error
    if not same:
        raise ValueError(
            f"{path}: its content is not what was kept; delete it to run it again."
        )
    if content["format"] != FORMAT_VERSION or name != path.name:
        raise ValueError(
            f"{path}: a case of format {content['format']} whose settings name it "
            f"{name}; format {FORMAT_VERSION} under that name is needed."
        )
    return Case(**fields, path=path)


def read_cases(folder: Path, job: str) -> list[Case]:
    """Read all finished cases of a job, sorted by file name; there may be none.

    Raises:
        ValueError: one of them is damaged; the message names it.
    """
    return [read_case(path) for path in sorted((folder / job).glob("*.json"))]


def pack(array: Any) -> dict[str, Any]:
    """Turn numbers into what a case can keep: two bytes each, as text.

    Args:
        array: numpy array or what becomes one (a CPU tensor), any shape.

    Returns:
        `float16` (base64 of the little-endian bytes) and `shape`.

    Raises:
        ValueError: a number that is not finite, or above what float16 holds, 65,504.

    >>> unpack(pack(np.array([[0.5, -2.0]])))
    array([[ 0.5, -2. ]], dtype=float16)
    """
    given = np.asarray(array)
    with np.errstate(over="ignore"):
        small = given.astype("<f2")
    if not np.isfinite(small).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(small))[0])
        raise ValueError(
            f"the number at {place} is {given[place]}; finite ones up to 65,504 are "
            "allowed."
        )
    text = base64.b64encode(small.tobytes()).decode("ascii")
    return {"float16": text, "shape": list(small.shape)}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """Return the float16 array that `pack` has kept, bit by bit.

    Raises:
        ValueError: the bytes do not fit the shape.
        KeyError: it was not made by `pack`.
    """
    data = base64.b64decode(packed["float16"], validate=True)
    return np.frombuffer(data, "<f2").reshape(packed["shape"]).astype(np.float16)


def device_name() -> str:
    """Name the GPU, if this process has used one, or the processor."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return processor()


def versions() -> dict[str, str]:
    """Name the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "drone"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # taken from a folder on PYTHONPATH
            found[package] = "not installed"
    return found


def _digest(value: Any) -> str:
    """SHA-256 over canonical JSON: sorted names, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """Copy a value as JSON will read it back, or say where it cannot be."""
    if value is None or isinstance(value, bool | str):
        return value
    # numpy's float64 is a Python float too; its repr is not JSON's
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; a finite number is needed.")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, Mapping):
        odd = [name for name in value if not isinstance(name, str)]
        if odd:
            raise TypeError(f"{where} has the name {odd[0]!r}; a str is needed.")
        return {name: _plain(each, f"{where}.{name}") for name, each in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}; JSON does not know it.")
