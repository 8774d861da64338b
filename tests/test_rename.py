"""Published chapters take new names without a run, and nothing but names."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

BOOK = Path(__file__).resolve().parent.parent / "book"
NAMES = {"drone.old.load": "drone.new.load", "drone.old": "drone.new"}


@pytest.fixture(scope="module")
def rename() -> ModuleType:
    sys.path.insert(0, str(BOOK))  # it imports its neighbour, publish.py
    try:
        spec = importlib.util.spec_from_file_location("rename", BOOK / "rename.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BOOK))
    return module


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("drone.old.load(1)", "drone.new.load(1)"),
        (
            "x = [drone.old.load, drone.old.load]",
            "x = [drone.new.load, drone.new.load]",
        ),
        ("f('é', drone.old.load)", "f('é', drone.new.load)"),  # columns count bytes
        ("'drone.old.load'  # drone.old.load", "'drone.old.load'  # drone.old.load"),
        ("mydrone.old.load", "mydrone.old.load"),
        ("drone.older.load", "drone.older.load"),
        ("drone.old.load.x", "drone.new.load.x"),
    ],
)
def test_names_are_replaced_and_nothing_else(
    rename: ModuleType, old: str, new: str
) -> None:
    assert rename.renamed(old, {"drone.old.load": "drone.new.load"}) == new


def test_layout_may_differ_and_a_number_may_not(rename: ModuleType) -> None:
    names = {"drone.old.load": "drone.new.load"}
    assert rename.same_program("drone.old.load(1, 2)", "drone.new.load(\n1,\n2)", names)
    assert not rename.same_program("drone.old.load(1)", "drone.new.load(2)", names)
    assert not rename.same_program("drone.old.save(1)", "drone.new.save(1)", names)


def chapter(*code: str, text: str = "words") -> NotebookNode:
    cells = [new_code_cell(each, metadata={"tags": []}) for each in code]
    return new_notebook(cells=[new_markdown_cell(text), *cells])


def test_a_published_chapter_keeps_its_results(rename: ModuleType) -> None:
    names = {"drone.old.load": "drone.new.load"}
    published, written = chapter("drone.old.load(1)"), chapter("drone.new.load(1)")
    published.cells[1].outputs = ["kept"]
    found = rename.take_names(published, written, names)
    assert found.cells[1].source == "drone.new.load(1)"
    assert found.cells[1].outputs == ["kept"]


@pytest.mark.parametrize("code", [("drone.new.load(2)",), ("drone.new.load(1)", "2")])
def test_any_other_change_needs_an_edition(
    rename: ModuleType, code: tuple[str, ...]
) -> None:
    published, written = chapter("drone.old.load(1)"), chapter(*code)
    with pytest.raises(ValueError, match=r"code cell 1|2 in the source"):
        rename.take_names(published, written, {"drone.old.load": "drone.new.load"})


def test_text_is_renamed_too(rename: ModuleType) -> None:
    notebook = chapter("1", text="see {py:func}`drone.old.load`, not drone.old.loads")
    rename.rename_source(notebook, {"drone.old.load": "drone.new.load"})
    expected = "see {py:func}`drone.new.load`, not drone.old.loads"
    assert notebook.cells[0].source == expected


@pytest.mark.parametrize("text", ["[1]", "a: b", "drone.a: 3", "drone.a: drone b"])
def test_a_table_of_another_form_is_refused(
    rename: ModuleType, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "names.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"names\.yaml: lines of"):
        rename.table(path)


def test_the_books_table_names_what_exists(rename: ModuleType) -> None:
    for new in rename.table().values():
        module, _, name = new.rpartition(".")
        assert hasattr(importlib.import_module(module), name), new
