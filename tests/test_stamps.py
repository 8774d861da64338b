"""A published page is tied to its parameters, its records and its outputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from drone.lab import stamps

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*.ipynb"))


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda path: path.stem)
def test_a_published_page_is_as_it_was_stamped(page: Path) -> None:
    assert stamps.differences(ROOT, page) == []
    told = json.loads(stamps.stamp_path(ROOT, page).read_text())
    assert told["chapter"] == page.name and told["how"] and told["records"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Chapter 7 with its parameters, records, cases and stamp, to be forged."""
    for part in ("chapters/07-bert-on-glue.ipynb", "params/07.yaml", "stamps/07.json"):
        target = tmp_path / "book" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "book" / part, target)
    for folder in ("results", "cases"):
        shutil.copytree(ROOT / "book" / folder, tmp_path / "book" / folder)
    (tmp_path / "notebooks").mkdir()
    assert stamps.differences(tmp_path, page_of(tmp_path)) == []
    return tmp_path


def page_of(root: Path) -> Path:
    return root / "book" / "chapters" / "07-bert-on-glue.ipynb"


def change_page(root: Path, change: Callable[[NotebookNode], Any]) -> None:
    notebook = nbformat.read(page_of(root), 4)
    change(notebook)
    nbformat.write(notebook, page_of(root))


def injected(notebook: NotebookNode) -> NotebookNode:
    (cell,) = (c for c in notebook.cells if c.get("id") == "injected-parameters")
    return cell


def forge_output(root: Path) -> None:
    def forge(notebook: NotebookNode) -> None:
        outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
        first = next(o for o in outputs if "text/html" in o.get("data", {}))
        html = first.data["text/html"]
        first.data["text/html"] = html.replace("8", "9", 1)
        assert first.data["text/html"] != html

    change_page(root, forge)


def move_output(root: Path) -> None:
    def move(notebook: NotebookNode) -> None:
        cells = [c for c in notebook.cells if c.get("outputs")]
        cells[0].outputs, cells[1].outputs = cells[1].outputs, cells[0].outputs

    change_page(root, move)


def edit_injected(root: Path) -> None:
    def edit(notebook: NotebookNode) -> None:
        injected(notebook).source += "\nspeedup = 3.0"

    change_page(root, edit)


def drop_injected(root: Path) -> None:
    change_page(root, lambda n: n.cells.remove(injected(n)))


def edit_parameters(root: Path) -> None:
    path = root / "book" / "params" / "07.yaml"
    text = path.read_text()
    path.write_text(text.replace("draws: 1000", "draws: 999"))
    assert path.read_text() != text


def edit_records(root: Path) -> None:
    path = root / "book" / "results" / "07-bert-on-glue.jsonl"
    path.write_text(path.read_text().replace("0", "1", 1))


def a_case(root: Path) -> Path:
    return sorted((root / "book" / "cases" / "dense").glob("*mrpc*.json"))[0]


def edit_case(root: Path) -> None:
    path = a_case(root)
    path.write_text(path.read_text().replace("0", "1", 1))


def lose_case(root: Path) -> None:
    a_case(root).unlink()


def add_case(root: Path) -> None:
    (root / "book" / "cases" / "new.json").write_text("{}")


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (forge_output, "an output or an injected parameter"),
        (move_output, "an output or an injected parameter"),
        (edit_injected, "an output or an injected parameter"),
        (drop_injected, "an output or an injected parameter"),
        (edit_parameters, "other values than the page was run with"),
        (edit_records, "07-bert-on-glue.jsonl: changed"),
        (edit_case, "json: changed"),
        (lose_case, "json: gone"),
        (add_case, "new.json: new"),
    ],
)
def test_a_forgery_is_seen(
    root: Path, forge: Callable[[Path], None], said: str
) -> None:
    forge(root)
    (found,) = stamps.differences(root, page_of(root))
    assert said in found


def test_new_words_and_comments_are_no_forgery(root: Path) -> None:
    path = root / "book" / "params" / "07.yaml"
    path.write_text("# another comment\n" + path.read_text())

    def reword(notebook: NotebookNode) -> None:
        text = next(c for c in notebook.cells if c.cell_type == "markdown")
        text.source += " More."

    change_page(root, reword)
    assert stamps.differences(root, page_of(root)) == []


def test_a_page_without_a_stamp_or_with_a_damaged_one_is_an_error(root: Path) -> None:
    path = stamps.stamp_path(root, page_of(root))
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a stamp"):
        stamps.differences(root, page_of(root))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        stamps.differences(root, page_of(root))


def test_a_new_stamp_is_of_the_page_as_it_is(root: Path) -> None:
    edit_records(root)
    stamps.stamp(root, page_of(root), "by hand")
    assert stamps.differences(root, page_of(root)) == []
