"""Readings: what we see in the published results, written by hand, set into the page.

A chapter's text must hold for every run, so it cannot say what was found. The file
`book/readings/NN.md` may: each of its passages is tied to a label of the chapter, and
the publisher sets it into the published page, never into the source. Its front matter
carries the SHA-256 of the results it was written about; when they change, a test is red
until someone has read the page again (`make read CHAPTER=NN`).

    ---
    read: <SHA-256>
    ---
    % at answer
    SVD loses {value}`svd_points:.1f` points.
    % at fig-room
    The gap is wide at every rank.

A label is `answer` (below the title), `summary`, the name of a figure or table, or the
identifier of a cell. A number is a name that the chapter glued, and how to write it;
or one that `values()` in `book/readings/NN.py` computes from the chapter's records, for
what a reader noticed after the run.
"""

import copy
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from drone.files import sha256, whole_file
from drone.lab import keys, parameters, stamps

TAG = "reading"  # of the cells that the publisher sets in
FRONT = re.compile(r"---\nread: ([0-9a-f]*)\n---\n")
AT = re.compile(r"^% at (\S+)\n", re.MULTILINE)
VALUE = re.compile(r"\{value\}`(\w+)(?::([^`]*))?`")
GLUED = "application/papermill.record/text/plain"
TITLES = {"answer": "The answer in 30 seconds", "summary": "What we found"}
# What holds digits that are no result: roles and code, formulas, comments, references.
NO_RESULT = re.compile(
    r"^% at .*$|^`{3,}.*$|\{[\w:-]+\}`[^`]*`|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|^:.*$|"
    r"\b(?:[Ss]ection|[Cc]hapters?|Theorem|Algorithm|[Ee]xercise) [\d.]+",
    re.MULTILINE,
)
SHOWN = re.compile(r"(?<!\S)-?\d+(?:\.\d+)?(?:e-?\d+)?(?!\S)")
NUMBER = re.compile(r"(?<![\w-])\d[\d.,]*\d|(?<![\w-])\d")


@dataclass(frozen=True)
class Reading:
    """A file of readings.

    Attributes:
        read: the SHA-256 it was stamped with.
        text: all its passages.
        noticed: name → number or text, computed from the records for these passages.
    """

    read: str
    text: str
    noticed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passages(self) -> dict[str, str]:
        """Label → passage, in the order of the file.

        Raises:
            ValueError: text before the first label, or a label given twice.
        """
        before, *rest = AT.split(self.text)
        labels = rest[::2]
        if before.strip():
            raise ValueError(f"{before.strip()[:40]!r} stands before any '% at LABEL'.")
        if len(set(labels)) != len(labels):
            raise ValueError(f"a label stands twice among {', '.join(labels)}.")
        return {
            label: text.strip() for label, text in zip(labels, rest[1::2], strict=True)
        }


def load(path: Path) -> Reading:
    """Read a file of readings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not begin with the front matter.
    """
    text = path.read_text(encoding="utf-8")
    front = FRONT.match(text)
    if front is None:
        raise ValueError(f"{path.name}: begins with no '---', 'read: …', '---'.")
    code = path.with_suffix(".py")
    noticed = _run(code) if code.is_file() else {}
    return Reading(front[1], text[front.end() :], noticed)


def _run(code: Path) -> dict[str, Any]:
    """Call `values()` of a file of the book that no package holds."""
    spec = importlib.util.spec_from_file_location(f"readings_{code.stem}", code)
    assert spec is not None  # a Python file has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.values()
    return found


def stamp(path: Path, digest: str) -> None:
    """Write down that someone has read again: the digest, into the front matter."""
    reading = load(path)
    with whole_file(path) as temporary:
        temporary.write_text(
            f"---\nread: {digest}\n---\n{reading.text}", encoding="utf-8"
        )


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Set the values into a text.

    Raises:
        ValueError: a name that has no value, a value that is no finite number, or one
            that cannot be written in the way asked for.
    """

    def written(role: re.Match[str]) -> str:
        name, form = role[1], role[2] or ""
        if name not in values:
            raise ValueError(f"no value {name!r}; there are {', '.join(values)}.")
        value = values[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the value {name!r} is {value}.")
        try:
            return format(value, form)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r} is {value!r}: {error}.") from error

    return VALUE.sub(written, text)


def typed(text: str) -> list[str]:
    """Find the numbers that were typed into a text instead of taken from the results.

    >>> typed("At {value}`rank:d`, as section 1.4 says, SVD loses 5.4 points.")
    ['5.4']
    """
    return NUMBER.findall(NO_RESULT.sub("", text))


def glued(notebook: NotebookNode) -> dict[str, Any]:
    """Collect what a page's cells glued: name → number, text or truth value."""
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            kept = output.get("metadata", {}).get("scrapbook", {}).get("name")
            if kept is not None and GLUED in output.get("data", {}):
                found[kept] = _number(output.data[GLUED])
    return found


def shown(notebook: NotebookNode, cell_id: str, row: str) -> list[float]:
    """Read the numbers in a row of a table that a page shows.

    A row that pandas has broken into several lines, or that several tables of the cell
    have, gives all its numbers in turn.

    Raises:
        ValueError: the cell shows no table with such a row.
    """
    outputs = [o for c in notebook.cells if c.id == cell_id for o in c.outputs]
    lines = "\n".join(o.get("data", {}).get("text/plain", "") for o in outputs)
    found = [
        float(number)
        for line in map(str.strip, lines.splitlines())
        if line.startswith(f"{row}  ")
        for number in SHOWN.findall(line.removeprefix(row))
    ]
    if not found:
        raise ValueError(f"cell {cell_id!r} shows no row {row!r} of numbers.")
    return found


def _number(text: str) -> Any:
    """Read a glued value; numbers come as numbers, so that a passage can round them."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'")


def digest(root: Path, page: Path) -> str:
    """SHA-256 over what a page's reading speaks about: records, and every value.

    Args:
        root: of the repository.
        page: the published chapter.
    """
    given = parameters.load(root / "book" / "params" / f"{page.name[:2]}.yaml")
    records = {
        str(path.relative_to(root.resolve())): sha256(path)
        for path in stamps.record_files(root, given)
    }
    written = root / "book" / "readings" / f"{page.name[:2]}.md"
    noticed = load(written).noticed if written.is_file() else {}
    # another processor may add up in another order, and differ in the last digits
    told = {n: v if isinstance(v, str) else f"{v:.6g}" for n, v in noticed.items()}
    return keys.digest([records, glued(nbformat.read(page, 4)) | told])


def set_in(notebook: NotebookNode, reading: Reading | None) -> NotebookNode:
    """Return a page with its passages set in anew; without a reading, with none.

    Raises:
        ValueError: a label that the page has not, a value that neither it nor the
            reading has, or one that both have.
    """
    page = copy.deepcopy(notebook)
    page.cells = [cell for cell in page.cells if not is_reading(cell)]
    values = glued(page)
    noticed = reading.noticed if reading else {}
    if twice := values.keys() & noticed.keys():
        raise ValueError(f"{', '.join(sorted(twice))}: glued, and computed once more.")
    values |= noticed
    for label, text in reading.passages.items() if reading else ():
        place = _place(page, label)
        title = TITLES.get(label, "What we see")
        kind = "answer" if label == "answer" else TAG
        source = f"````{{admonition}} {title}\n:class: {kind}\n\n{fill(text, values)}\n"
        cell = new_markdown_cell(f"{source}````", metadata={"tags": [TAG]})
        cell.id = f"reading-{label}"
        page.cells.insert(place + 1, cell)
    return page


def is_reading(cell: NotebookNode) -> bool:
    """Whether the publisher set this cell in."""
    return TAG in cell.metadata.get("tags", [])


def _place(page: NotebookNode, label: str) -> int:
    """Find the cell that a passage follows; the answer follows the title."""
    if label == "answer":
        return 0
    names: dict[str, int] = {}
    for number, cell in enumerate(page.cells):
        names.setdefault(cell.id, number)
        figure = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        if figure:
            names[figure] = number
    if label not in names:
        raise ValueError(f"no cell or figure {label!r}; there are {', '.join(names)}.")
    return names[label]
