"""Run a chapter and store it clean: the edition, or the source's default outputs.

    python book/publish.py edition 01   # book/params/01.yaml -> book/chapters/
    python book/publish.py default 01   # the defaults -> notebooks/, in place
    python book/publish.py prose 01     # new text for a published chapter, no run
    python book/publish.py read 01      # its readings were read beside its results
    python book/publish.py stamp 01     # tie a page to its records as they are now

Parameters are checked before a run. After one, a stamp ties the page to its parameters,
records and outputs: see drone/lab/stamps.py. What papermill and Jupyter add at random
(identifiers, clock times, progress bars) is removed, so two runs with the same inputs
differ in their timing figures alone. Readings, what we see in the published results,
are set into the published page alone: see drone/lab/readings.py.
"""

import argparse
import ast
import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat import NotebookNode

from drone.files import whole_file
from drone.lab import parameters, readings, stamps

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_METADATA = {"tags", "mystnb"}  # of a cell
PICTURES = ("image/svg+xml", "image/png")
WIDGET = "application/vnd.jupyter.widget-view+json"
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours, and moves of the cursor
# tqdm: "name:  50%|###  | 1/2 [00:01<00:01, 1.2it/s]", or "3it [00:00, 9.1it/s]"
BAR = re.compile(r"(.*: )?( *\d+%\|.*| *\d[\d.]*[a-zA-Z]* ?\[\d+:\d\d.*)")


def source(chapter: str, folder: Path = ROOT / "notebooks") -> Path:
    """Find the notebook of a chapter by its number; 1 is 01.

    Raises:
        ValueError: there is none, or more than one; the message lists all.
    """
    chapter = chapter.strip()
    if chapter.isdecimal():
        chapter = chapter.zfill(2)
    found = sorted(folder.glob(f"{chapter}-*.ipynb"))
    if len(found) != 1:
        allowed = ", ".join(p.name for p in sorted(folder.glob("*.ipynb")))
        raise ValueError(f"chapter {chapter!r}: {len(found)} notebooks; of {allowed}.")
    return found[0]


def edition_parameters(chapter: str) -> dict[str, Any]:
    """Read `book/params/<chapter>.yaml`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a mapping of names to values.
    """
    return parameters.load(ROOT / "book" / "params" / f"{chapter}.yaml")


def check_parameters(path: Path, given: dict[str, Any]) -> None:
    """Refuse parameters that a notebook does not know or cannot run with.

    Raises:
        ValueError: all that is wrong, a line each.
    """
    table = ROOT / "book" / "params" / "ranges.yaml"
    # Names and types are the notebook's own; ranges are checked where there are some.
    rules = parameters.ranges(table, path.name[:2]) if table.is_file() else {}
    parameters.check(path, given, rules)


def run(path: Path, parameters: dict[str, Any]) -> NotebookNode:
    """Execute a notebook from its own folder and return it clean.

    Raises:
        papermill.PapermillExecutionError: a cell failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / path.name
        papermill.execute_notebook(
            path, output, parameters, cwd=path.parent, kernel_name=KERNEL["name"]
        )
        return clean(nbformat.read(output, as_version=4))


def clean(notebook: NotebookNode) -> NotebookNode:
    """Strip what differs between two equal runs; give each figure its alt text.

    Raises:
        ValueError: an output shows a warning, an error or a path of this machine.
    """
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python")
    )
    count = 0
    for cell in notebook.cells:
        cell.metadata = NotebookNode(
            {k: v for k, v in cell.metadata.items() if k in KEPT_METADATA}
        )
        if _injected(cell):
            cell.id = "injected-parameters"
            cell.metadata.tags = ["injected-parameters", "hide-input"]
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            # Joined before, so that a line in two pieces is seen whole; and after.
            outputs = map(_clean_output, _join(cell.outputs))
            cell.outputs = _join(o for o in outputs if o)
            for output in cell.outputs:
                _check_output(cell.id, output)
                if output.output_type == "execute_result":
                    output.execution_count = count
                _lift_alt(cell, output)
    return notebook


def _clean_output(output: NotebookNode) -> NotebookNode | None:
    """Drop progress bars, on stderr and widgets.

    Raises:
        ValueError: stderr has anything else: a warning, a message, a traceback.
    """
    if output.get("name") == "stderr":
        text = ESCAPES.sub("", output.text)
        said = [line for line in re.split(r"[\r\n]", text) if not _is_bar(line)]
        if said:
            what = "warns" if "Warning" in text else "writes to stderr"
            raise ValueError(f"a cell {what}, mend or silence it: {' '.join(said)}")
        return None
    return None if WIDGET in output.get("data", {}) else output


def _is_bar(line: str) -> bool:
    return not line.strip() or bool(BAR.fullmatch(line))


def _join(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Join streams that stood apart only where a progress bar came between them."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else NotebookNode()
        if output.output_type == "stream" and output.name == last.get("name"):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _check_output(cell_id: str, output: NotebookNode) -> None:
    if output.output_type == "error":
        raise ValueError(f"cell {cell_id}: {output.ename}: {output.evalue}")
    data = output.get("data", {})
    shown = [data[kind] for kind in data if kind.startswith("text/")]
    text = " ".join(map(str, [output.get("text", ""), *shown]))
    path = re.search(r"/(root|home|tmp|work|Users)/[^\s<]*", text)
    if path:
        raise ValueError(f"cell {cell_id}: shows a path of this machine, {path[0]}.")


def _lift_alt(cell: NotebookNode, output: NotebookNode) -> None:
    """Copy a figure's alt text to where MyST-NB looks for it, the cell."""
    for kind in PICTURES:
        alt = output.get("metadata", {}).get(kind, {}).get("alt")
        if alt:
            cell.metadata.setdefault("mystnb", {}).setdefault("image", {})["alt"] = alt


def with_prose(published: NotebookNode, written: NotebookNode) -> NotebookNode:
    """Give a published chapter the source's text, captions and tags; its results stay.

    A default may change too, where the edition gave that parameter a value of its own.

    Raises:
        ValueError: some code differs: then the results may too, and only a run tells.
    """
    ran = [c for c in published.cells if c.cell_type == "code" and not _injected(c)]
    code = [c for c in written.cells if c.cell_type == "code"]
    given = [c.source for c in published.cells if _injected(c)]
    for old, new in itertools.zip_longest(ran, code):
        if old is None or new is None or not _same_results(old, new, given):
            raise ValueError("the code has changed since; run the edition again.")
        old.source = new.source
        old.metadata.tags = new.metadata.get("tags", [])
        # Captions and the words on a fold are the source's, the alt text the run's.
        shown = dict(old.metadata.get("mystnb", {}))
        image = {"image": shown["image"]} if "image" in shown else {}
        if shown := {**new.metadata.get("mystnb", {}), **image}:
            old.metadata.mystnb = NotebookNode(shown)
    results, injected = iter(ran), [c for c in published.cells if _injected(c)]
    cells = []
    for cell in written.cells:
        cells.append(cell if cell.cell_type == "markdown" else next(results))
        if "parameters" in cell.metadata.get("tags", []):
            cells += injected
    published.cells = cells
    return published


def _same_results(old: NotebookNode, new: NotebookNode, given: list[str]) -> bool:
    """Whether two versions of a cell do the same in a run with the parameters given."""
    if _tree(old.source) == _tree(new.source):  # they may be laid out differently
        return True
    if not all("parameters" in c.metadata.get("tags", []) for c in (old, new)):
        return False
    before, after = parameters.parse(old.source), parameters.parse(new.source)
    changed = {name for name, value in after.items() if before.get(name) != value}
    return (
        before.keys() == after.keys()
        and all(changed <= parameters.parse(text).keys() for text in given)
        and bool(given)
    )


def _tree(source: str) -> str:
    """Return the syntax tree of a cell; of what is no plain Python, the text."""
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return source


def _injected(cell: NotebookNode) -> bool:
    return "injected-parameters" in cell.metadata.get("tags", [])


def reading_path(path: Path) -> Path:
    """Return where the readings of a chapter lie; not every chapter has some."""
    return ROOT / "book" / "readings" / f"{path.name[:2]}.md"


def with_readings(page: NotebookNode, path: Path) -> NotebookNode:
    """Set a chapter's readings into its page.

    Raises:
        ValueError: they name a label or a value that the page has not.
    """
    written = reading_path(path)
    return readings.set_in(page, readings.load(written) if written.is_file() else None)


def store(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all."""
    with whole_file(path) as temporary:
        nbformat.write(notebook, temporary)


def edition(path: Path) -> Path:
    """Run a chapter with its edition's parameters, publish it, stamp it.

    Raises:
        ValueError: wrong parameters; the source was changed while it ran; or its
            readings do not fit the new results: then the page is stored without them.
    """
    given = edition_parameters(path.name[:2])
    check_parameters(path, given)
    before = _content(path)
    notebook = run(path, given)
    if _content(path) != before or edition_parameters(path.name[:2]) != given:
        raise ValueError(
            f"{_set_aside(notebook, path)} has the result: {path.name} or its "
            "parameters were changed while it ran; run it again."
        )
    target = ROOT / "book" / "chapters" / path.name
    store(notebook, target)
    stamps.stamp(ROOT, target, "by the run")
    try:
        store(with_readings(notebook, path), target)
    except ValueError as error:
        raise ValueError(
            f"{target.name} is published without its readings: {error} Mend them, "
            f"then `make prose CHAPTER={path.name[:2]}`."
        ) from error
    return target


def prose(path: Path) -> Path:
    """Give a published chapter the source's text and its readings; results stay.

    Raises:
        ValueError: the code has changed, or the readings do not fit the results.
    """
    target = ROOT / "book" / "chapters" / path.name
    page = with_prose(nbformat.read(target, 4), nbformat.read(path, 4))
    store(with_readings(page, path), target)
    return target


def read(path: Path) -> Path:
    """Set a chapter's readings in and stamp them: someone has read the page again.

    Raises:
        FileNotFoundError: the chapter has no readings.
        ValueError: they do not fit its results.
    """
    target, written = ROOT / "book" / "chapters" / path.name, reading_path(path)
    page = readings.set_in(nbformat.read(target, 4), readings.load(written))
    store(page, target)
    readings.stamp(written, readings.digest(ROOT, target))
    return written


def refresh(path: Path) -> Path:
    """Run a chapter with its defaults and store the outputs in it.

    Raises:
        ValueError: it was changed while it ran; the change stays, the outputs lie in
            runs/.
    """
    before = _content(path)
    notebook = run(path, {})
    if _content(path) != before:
        raise ValueError(
            f"{path.name} was changed while it ran, and is left as it is; the outputs "
            f"of the old one are in {_set_aside(notebook, path)}. Run it again."
        )
    store(notebook, path)
    return path


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _set_aside(notebook: NotebookNode, path: Path) -> Path:
    """Keep what a run made of a source that is no more."""
    aside = ROOT / "runs" / f"{path.stem}.of-the-old-source.ipynb"
    store(notebook, aside)
    return aside.relative_to(ROOT)


def restamp(path: Path) -> Path:
    """Tie a published chapter to its records as they are now."""
    page = ROOT / "book" / "chapters" / path.name
    return stamps.stamp(ROOT, page, "from the committed state, not a run")


ACTIONS = {
    "edition": edition,
    "default": refresh,
    "prose": prose,
    "read": read,
    "stamp": restamp,
}


def main() -> None:
    """Read the command line and run one chapter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=list(ACTIONS))
    parser.add_argument("chapter", help="its number, such as 01")
    arguments = parser.parse_args()
    try:
        target = ACTIONS[arguments.what](source(arguments.chapter))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"written: {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
