"""The minutes that a chapter tells are those that its words and lines take."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from drone.lab import minutes

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_tells_its_minutes(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    (told,) = minutes.TOLD.findall(text)
    assert " ".join(told.split()) == str(minutes.count(notebook))
    assert minutes.count(notebook).minutes <= 45


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_open_cell_is_longer_than_25_lines(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        folded = minutes.FOLDED & set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and not folded:
            assert len(cell.source.splitlines()) <= 25, cell.id


def test_what_is_folded_or_an_exercise_does_not_count() -> None:
    notebook = new_notebook(
        cells=[
            new_markdown_cell("one two $x = 1 + 1$\n\n$$\na b c\n$$ (eq-x)\nthree"),
            new_code_cell("a = 1\n\nb = 2"),
            new_code_cell("c = 3", metadata={"tags": ["hide-input"]}),
            new_markdown_cell("```{prf:proof}\nno\n```"),
            new_markdown_cell("## Exercises\nmany more words"),
            new_code_cell("d = 4"),
        ]
    )
    assert minutes.count(notebook) == minutes.Reading(words=8, lines=2, proofs=1)


def test_minutes_follow_the_rates() -> None:
    assert minutes.Reading(1600, 80, 2).minutes == 40  # 20 + 10 + 10
    assert str(minutes.Reading(1600, 80, 1)) == (
        "About 35 minutes: 1,600 words, 80 lines of code, 1 proof."
    )
