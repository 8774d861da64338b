"""A stamp ties a published page to its parameters, its records and its outputs.

The publisher writes it after a run. Whoever edits an output, the injected parameters,
a record or the file of parameters afterwards makes the stamp, and so a test, fail.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drone.files import sha256, whole_file
from drone.lab import keys, parameters

RECORDS = {".json", ".jsonl"}


def page_digest(page: Path) -> str:
    """SHA-256 over what a run made: the injected parameters and every output, in order.

    Text, code and captions are left out: they may be mended without a run, and another
    test compares them with the source.
    """
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    made = []
    for cell in cells:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            made.append(["injected", "".join(cell["source"])])
        if cell["cell_type"] == "code":
            made.append(["outputs", cell["outputs"]])
    return keys.digest(made)


def record_files(root: Path, given: Mapping[str, Any]) -> list[Path]:
    """Find the records a run with these parameters writes or reads in the repository.

    Args:
        root: of the repository; chapters run in `root/notebooks`.
        given: the edition's parameters. Each that is a path of `book/results` or
            `book/cases` counts: a file, or a folder with its JSON and that of the
            folders right under it, as a store of cases has them, a folder a job.

    Returns:
        Files that exist, sorted.
    """
    kept = [root / "book" / name for name in ("results", "cases")]
    found: set[Path] = set()
    for value in given.values():
        if not isinstance(value, str) or not value:
            continue
        path = (root / "notebooks" / value).resolve()
        if not any(path.is_relative_to(folder.resolve()) for folder in kept):
            continue
        inside = [*path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
        found |= {
            file
            for file in inside
            if file.is_file() and file.suffix in RECORDS and "traces" not in file.parts
        }
    return sorted(found)


def state(root: Path, page: Path) -> dict[str, Any]:
    """Tell the digests of a page, its parameters and its records as they are now.

    Raises:
        FileNotFoundError, ValueError: the page or its parameters cannot be read.
    """
    given = parameters.load(root / "book" / "params" / f"{page.name[:2]}.yaml")
    return {
        "page": page_digest(page),
        "parameters": keys.digest(given),  # the values: a comment changes no result
        "records": {
            str(path.relative_to(root.resolve())): sha256(path)
            for path in record_files(root, given)
        },
    }


def stamp_path(root: Path, page: Path) -> Path:
    """Return where a page's stamp lies."""
    return root / "book" / "stamps" / f"{page.name[:2]}.json"


def stamp(root: Path, page: Path, how: str) -> Path:
    """Write a page's stamp, whole or not at all.

    Args:
        root: of the repository.
        page: the published chapter.
        how: it came to be: by a run, or from what was committed.
    """
    told = {
        "chapter": page.name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "how": how,
    } | state(root, page)
    path = stamp_path(root, page)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(told, indent=1) + "\n")
    return path


def differences(root: Path, page: Path) -> list[str]:
    """Tell what has changed since a page was stamped; nothing if nothing has.

    Raises:
        FileNotFoundError: the page has no stamp.
        ValueError: the stamp cannot be read.
    """
    path = stamp_path(root, page)
    try:
        stamped = json.loads(path.read_text())
        then = {name: stamped[name] for name in ("page", "parameters", "records")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a stamp ({error!r}).") from error
    now = state(root, page)
    said = {
        "page": f"{page.name}: an output or an injected parameter was edited",
        "parameters": f"{page.name[:2]}.yaml: other values than the page was run with",
    }
    wrong = [said[name] for name in said if then[name] != now[name]]
    for file in sorted(then["records"].keys() | now["records"].keys()):
        old, new = then["records"].get(file), now["records"].get(file)
        if old != new:
            word = "gone" if new is None else "new" if old is None else "changed"
            wrong.append(f"{file}: {word} since the page was made")
    return wrong
