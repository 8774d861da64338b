"""Assignments, from one source each: for students, for the teacher, for the grader.

    python -m book.course.assign runs/course        # all of them
    python -m book.course.assign runs/course 02     # one

A source is Markdown that opens as a notebook (jupytext); its raw cells tell
otter-grader what is a question, a solution, a test. otter-grader runs the solutions
against every test and fails if one of them does not get full marks; the untouched
notebook must get none.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import jupytext
import nbformat
from otter.assign import main as otter_assign

from book.course import grade

SOURCES = Path(__file__).parent / "assignments"


def names(folder: Path = SOURCES) -> list[str]:
    """What the assignments are called: their chapters' two digits."""
    return sorted(path.stem for path in folder.glob("*.md"))


def published(name: str) -> str:
    """The file that the site offers of an assignment."""
    return f"assignment-{name}.ipynb"


def write(target: Path, folder: Path = SOURCES) -> None:
    """Every student's notebook into one folder, as the site offers them."""
    for name in names(folder):
        file = target / published(name)
        file.write_text(student_notebook(name, folder, file.name), encoding="utf-8")


def student_notebook(name: str, folder: Path = SOURCES, called: str = "") -> str:
    """The student's notebook as text, made without running the solutions.

    otter-grader reads the checks from the file that the first cell names, so that must
    be what the notebook is `called`; NN.ipynb if nothing is said.
    """
    with tempfile.TemporaryDirectory() as temporary:
        made = _made(folder / f"{name}.md", Path(temporary), run=False)
        notebook = nbformat.read(made / "student" / f"{name}.ipynb", as_version=4)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random else, and a build would differ each time
    first, own = notebook.cells[0], f'otter.Notebook("{name}.ipynb")'
    if own not in first.source:
        raise ValueError(f"{name}: its first cell has no {own}; otter-grader changed?")
    first.source = first.source.replace(
        own, f'otter.Notebook("{called or name + ".ipynb"}")'
    )
    text: str = nbformat.writes(notebook)
    return text + "\n"


def build(name: str, target: Path, folder: Path = SOURCES) -> Path:
    """An assignment's folder: NN.ipynb, NN-solution.ipynb, autograder.zip."""
    home = target.resolve() / name
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        made = _made(folder / f"{name}.md", Path(temporary), run=True)
        (zipped,) = (made / "autograder").glob("*.zip")
        shutil.copy(zipped, home / "autograder.zip")
        shutil.copy(
            made / "autograder" / f"{name}.ipynb", home / f"{name}-solution.ipynb"
        )
    student = home / f"{name}.ipynb"
    student.write_text(student_notebook(name, folder), encoding="utf-8")
    untouched = grade.grade(home / "autograder.zip", student, grade.CELL_SECONDS)
    if untouched["note"] != "graded" or untouched["total"]:
        raise ValueError(f"Assignment {name}, handed in untouched: {untouched}.")
    return home


def _made(source: Path, temporary: Path, run: bool) -> Path:
    """What otter-grader makes of a source, in a temporary folder."""
    if not source.is_file():
        raise FileNotFoundError(f"No assignment {source}; there are {names()}.")
    notebook = jupytext.read(source, fmt="md:myst")
    master = temporary / f"{source.stem}.ipynb"
    nbformat.write(notebook, master)
    otter_assign(str(master), str(temporary / "made"), no_run_tests=not run)
    return temporary / "made"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("names", nargs="*", default=names())
    arguments = parser.parse_args()
    for name in arguments.names:
        print(build(name, arguments.target))
