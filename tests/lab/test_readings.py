"""Readings: set in by label, numbers by name, red when the results change."""

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from drone.lab import readings

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = sorted((ROOT / "book" / "readings").glob("[0-9][0-9].md"))
# In a passage as the names of settings, never as results.
SETTINGS = {"2", "90", "95"}


def page_of(written: Path) -> Path:
    (page,) = (ROOT / "book" / "chapters").glob(f"{written.stem}-*.ipynb")
    return page


@pytest.mark.parametrize("written", WRITTEN, ids=lambda path: path.stem)
class TestPublished:
    def test_was_read_beside_these_results(self, written: Path) -> None:
        now = readings.digest(ROOT, page_of(written))
        assert readings.load(written).read == now, "read it again: make read"

    def test_stands_in_the_page_as_it_is_written(self, written: Path) -> None:
        page = nbformat.read(page_of(written), 4)
        assert page == readings.set_in(page, readings.load(written))

    def test_has_no_number_typed(self, written: Path) -> None:
        typed = set(readings.typed(readings.load(written).text))
        assert typed <= SETTINGS

    def test_has_the_answer_and_the_summary(self, written: Path) -> None:
        assert {"answer", "summary"} <= set(readings.load(written).passages)


def test_no_source_shows_a_reading() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert not any(map(readings.is_reading, nbformat.read(path, 4).cells))


def glue(name: str, text: str) -> NotebookNode:
    kept: NotebookNode = new_output(
        "display_data",
        data={readings.GLUED: text},
        metadata={"scrapbook": {"name": name}},
    )
    return kept


@pytest.fixture
def page() -> NotebookNode:
    values = [glue("lost", "5.4321"), glue("rank", "128"), glue("task", "'mrpc'")]
    figure = {"mystnb": {"figure": {"name": "fig-room", "caption": "…"}}}
    notebook: NotebookNode = new_notebook(
        cells=[
            new_markdown_cell("# Title", id="title"),
            new_code_cell("1", id="plot", metadata=figure),
            new_code_cell("2", id="values", outputs=values),
            new_markdown_cell("## Summary", id="summary"),
        ]
    )
    return notebook


TEXT = """---
read: ab12
---
% at answer
SVD loses {value}`lost:.1f` points on {value}`task`.

% at fig-room
Wide, at rank {value}`rank:d`; see {ref}`x-1`.
% at summary
It pays.
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "01.md"
    path.write_text(TEXT)
    return path


def test_passages_follow_their_labels(page: NotebookNode, written: Path) -> None:
    found = readings.set_in(page, readings.load(written))
    nbformat.validate(found)
    assert [cell.id for cell in found.cells] == [
        "title",
        "reading-answer",
        "plot",
        "reading-fig-room",
        "values",
        "summary",
        "reading-summary",
    ]
    assert "SVD loses 5.4 points on mrpc.\n" in found.cells[1].source
    assert "at rank 128; see {ref}`x-1`." in found.cells[3].source
    assert len(page.cells) == 4  # the page given is left as it was


def test_setting_in_again_changes_nothing_and_none_takes_them_out(
    page: NotebookNode, written: Path
) -> None:
    once = readings.set_in(page, readings.load(written))
    assert readings.set_in(once, readings.load(written)) == once
    assert readings.set_in(once, None) == page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fig-room", "fig-no"), "no cell or figure 'fig-no'; there are .*fig-room"),
        (("lost", "won"), "no value 'won'; there are lost, rank, task"),
        ((":.1f", ":d"), "'lost' is 5.4321"),
        (("% at answer\n", ""), "stands before any"),
        (("at fig-room", "at answer"), "stands twice"),
    ],
)
def test_what_does_not_fit_is_refused(
    page: NotebookNode, written: Path, change: tuple[str, str], message: str
) -> None:
    written.write_text(TEXT.replace(*change))
    with pytest.raises(ValueError, match=message):
        readings.set_in(page, readings.load(written))


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="'x' is nan"):
        readings.fill("{value}`x:.1f`", {"x": float("nan")})


def test_a_file_without_its_front_matter_is_refused(written: Path) -> None:
    written.write_text("% at answer\n")
    with pytest.raises(ValueError, match=r"01\.md: begins with no"):
        readings.load(written)


def test_what_was_noticed_later_is_computed_beside_the_text(
    page: NotebookNode, written: Path
) -> None:
    written.write_text(TEXT.replace("It pays.", "It pays {value}`gain:.1f` times."))
    code = written.with_suffix(".py")
    code.write_text("def values():\n    return {'gain': 3 * 0.5}\n")
    found = readings.set_in(page, readings.load(written))
    assert "It pays 1.5 times." in found.cells[-1].source


def test_a_value_has_one_source(page: NotebookNode, written: Path) -> None:
    written.with_suffix(".py").write_text("def values():\n    return {'lost': 5}\n")
    with pytest.raises(ValueError, match="lost: glued, and computed"):
        readings.set_in(page, readings.load(written))


def test_a_row_of_a_table_is_read_as_the_page_shows_it(page: NotebookNode) -> None:
    table = pd.DataFrame(
        {"lost": [1.5, -2], "interval": ["0.1 to 3", "-4.0 to -1e-05"]},
        ["SVD", "SVD on 20%"],
    )
    output = new_output("display_data", data={"text/plain": str(table)})
    page.cells[1].outputs = [output, output]
    assert readings.shown(page, "plot", "SVD") == 2 * [1.5, 0.1, 3]
    assert readings.shown(page, "plot", "SVD on 20%") == 2 * [-2, -4, -1e-5]
    with pytest.raises(ValueError, match="'plot' shows no row 'DRONE'"):
        readings.shown(page, "plot", "DRONE")


def test_a_stamp_changes_the_front_matter_alone(written: Path) -> None:
    before = readings.load(written).text
    readings.stamp(written, "cd34")
    assert readings.load(written) == readings.Reading("cd34", before)


def test_other_records_and_other_values_ask_for_a_reader(
    page: NotebookNode, tmp_path: Path
) -> None:
    for folder in ("book/params", "book/results", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "book/params/01.yaml").write_text("results: ../book/results/01.jsonl\n")
    record = tmp_path / "book/results/01.jsonl"
    record.write_text(json.dumps({"loss": 1}))
    path = tmp_path / "01-x.ipynb"
    nbformat.write(page, path)
    found = {readings.digest(tmp_path, path)}
    record.write_text(json.dumps({"loss": 2}))
    found.add(readings.digest(tmp_path, path))
    page.cells[2].outputs[0].data[readings.GLUED] = "5.5"
    nbformat.write(page, path)
    found.add(readings.digest(tmp_path, path))
    assert len(found) == 3
    page.cells[0].source = "# Other words"  # no result: nothing to read again
    nbformat.write(page, path)
    assert readings.digest(tmp_path, path) in found


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("loses 5.4 points", ["5.4"]),
        ("at rank 128, in 2 of 9", ["128", "2", "9"]),
        ("about 1,234 tokens", ["1,234"]),
        ("{value}`a:.1f`, {ref}`x-1.2`, `k=3`, $\\sigma_1 = 2$", []),
        ("section 1.4 and Chapter 3 on SST-2 and Algorithm 2", []),
        ("```{chapter-figure} 02-x plot\nA\n```\n{value}`a:.1f` and 7", ["7"]),
        ("% at 47ec3d68\nSVD loses 3", ["3"]),
        ("[here](https://x.y/2.0)\n:width: 300", []),
    ],
)
def test_typed_numbers_are_found(text: str, typed: list[str]) -> None:
    assert readings.typed(text) == typed
