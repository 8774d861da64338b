"""Grade a folder of submissions into one table.

    python -m book.course.grade runs/course/02/autograder.zip submissions marks.csv

Each notebook is graded in a process of its own. A cell that does not end is
interrupted, so it costs the tests that need it and no others. Submissions are
code of other people: grade where nothing is to be had (see the container file).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

CELL_SECONDS = 20
# A product that hangs inside of torch cannot be interrupted: then the whole ends.
WHOLE_SECONDS = 600

Row = dict[str, str | float]


def grade_folder(
    autograder: Path, submissions: Path, cell_seconds: int = CELL_SECONDS
) -> list[Row]:
    """A row for each notebook of the folder, in the order of their names."""
    notebooks = sorted(submissions.glob("*.ipynb"))
    if not notebooks:
        raise FileNotFoundError(f"{submissions} holds no notebook (*.ipynb).")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        jobs = [pool.submit(grade, autograder, n, cell_seconds) for n in notebooks]
        return [job.result() for job in jobs]


def grade(autograder: Path, notebook: Path, cell_seconds: int) -> Row:
    """Points for each question of one submission, their sum and a note."""
    with tempfile.TemporaryDirectory() as temporary:
        marks = Path(temporary, "marks.json")
        command = ["-m", "book.course.grade_one", autograder, notebook, marks]
        process = subprocess.Popen(
            [sys.executable, *map(str, command), str(cell_seconds)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        try:
            _, complaint = process.communicate(timeout=WHOLE_SECONDS)
        except subprocess.TimeoutExpired:
            _end(process)
            return _row(notebook, {}, f"stopped after {WHOLE_SECONDS} s")
        if not marks.is_file():
            last = complaint.strip().splitlines()[-1:] or ["no reason given"]
            return _row(notebook, {}, f"not graded: {last[0]}")
        return _row(notebook, json.loads(marks.read_text()), "graded")


def write_table(rows: list[Row], path: Path) -> None:
    """The rows as CSV; a question nobody could grade stays empty."""
    questions = {key for row in rows for key in row} - {"submission", "total", "note"}
    fields = ["submission", *sorted(questions), "total", "note"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def _row(notebook: Path, points: dict[str, float], note: str) -> Row:
    total = round(sum(points.values()), 4)
    return {"submission": notebook.name, **points, "total": total, "note": note}


def _end(process: "subprocess.Popen[str]") -> None:
    """End a grader and its kernel, which is not in the same process group."""
    children = psutil.Process(process.pid).children(recursive=True)
    for one in [*children, psutil.Process(process.pid)]:
        one.kill()
    process.communicate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("autograder", type=Path)
    parser.add_argument("submissions", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--cell-seconds", type=int, default=CELL_SECONDS)
    given = parser.parse_args()
    graded = grade_folder(
        given.autograder.resolve(), given.submissions.resolve(), given.cell_seconds
    )
    write_table(graded, given.table)
    print(f"{len(graded)} submissions graded: {given.table}")
