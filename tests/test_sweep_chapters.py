"""`make sweep`: a chapter over a grid, each run checked before the first one starts."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from drone.lab.job import done, place, run_once

BOOK = Path(__file__).parents[1] / "book"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BOOK))  # it imports publish.py beside it
    return importlib.import_module("sweep")


def test_a_grid_gives_a_job_a_combination(sweep: ModuleType) -> None:
    jobs = sweep.chapter_jobs("1", {"ranks": [[8], [16]], "seeds": [[0], [1]]})
    assert len({job.key() for job in jobs}) == 4
    assert jobs[0].name == "01-ranks=_8_,seeds=_0_"
    assert "ranks:\n- 8\n" in jobs[0].files["parameters.yaml"]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"rank": [8]}, "rank"),  # chapter 1 has `ranks`
        ({"epochs": [0]}, "epochs"),
        ({"results": ["a", "b"]}, "each run of a sweep keeps its record"),
        ({"epochs": 1}, "a list of values"),
    ],
)
def test_what_a_chapter_cannot_run_is_refused_before_any_run(
    sweep: ModuleType, grid: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        sweep.chapter_jobs("01", grid)


def test_a_run_leaves_one_notebook_and_one_record(
    sweep: ModuleType, tmp_path: Path
) -> None:
    cells = [
        nbformat.v4.new_code_cell("rank: int = 1\nresults: str = ''"),
        nbformat.v4.new_code_cell(
            "open(results, 'w').write(str(rank))\nassert rank != 3"
        ),
    ]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = sweep.KERNEL
    path = tmp_path / "01-tiny.ipynb"
    nbformat.write(notebook, path)
    folders = [
        place(sweep.chapter_job(path, {"rank": rank}, f"rank={rank}"), tmp_path)
        for rank in (2, 3)
    ]
    assert [run_once(folder) for folder in folders] == [0, 1]
    assert [done(folder) for folder in folders] == [True, False]
    assert [(f / "record.jsonl").read_text() for f in folders] == ["2", "3"]
    assert json.loads((folders[0] / "run.ipynb").read_text())["cells"]
    assert "AssertionError" in (folders[1] / "log.txt").read_text()
