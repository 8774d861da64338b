"""Parameters of a run: a wrong name, type or value stops it before anything runs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from drone.lab import data, encoders, parameters

ROOT = Path(__file__).resolve().parents[2]
RANGES = ROOT / "book" / "params" / "ranges.yaml"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = sorted(
    path
    for path in (ROOT / "book" / "params").rglob("*.yaml")
    if path.name[:2].isdecimal()
)


def notebook(chapter: str) -> Path:
    (path,) = (path for path in NOTEBOOKS if path.name.startswith(chapter))
    return path


def check(chapter: str, given: dict[str, Any]) -> None:
    parameters.check(notebook(chapter), given, parameters.ranges(RANGES, chapter))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_defaults_are_allowed(path: Path) -> None:
    known = parameters.declared(path)
    assert "results" in known
    check(path.name[:2], {name: each.default for name, each in known.items()})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_books_own_parameters_are_allowed(path: Path) -> None:
    check(path.stem[:2], parameters.load(path))


def test_every_parameter_has_a_range_but_texts_that_are_paths() -> None:
    for path in NOTEBOOKS:
        rules = parameters.ranges(RANGES, path.name[:2])
        free = set(parameters.declared(path)) - set(rules)
        paths = {"results", "store", "traces", "again", "cases", "second", "served"}
        assert free <= {*paths, "compiled"}


def test_choices_are_those_of_the_library() -> None:
    rules = parameters.ranges(RANGES, "01")
    assert set(rules["task"]["of"]) == set(data.TASKS)
    assert set(rules["encoder"]["of"]) == set(encoders.ENCODERS)
    assert rules["data_source"]["of"] == list(data.SOURCES)
    corpus = parameters.ranges(RANGES, "06")["corpus"]["of"]
    assert set(corpus) == set(data.LANGUAGE_CORPORA)


@pytest.mark.parametrize(
    ("chapter", "given", "said"),
    [
        ("01", {"seed": [0, 1, 2]}, "no parameter seed; is seeds meant?"),
        ("01", {"zzz": 1}, "no parameter zzz; there are task, data_source"),
        ("01", {"learning_rate": "5e-5"}, "'5e-5', a str; float is needed; YAML reads"),
        ("01", {"learning_rate": 0.0}, "learning_rate is 0.0; above 0 is needed"),
        ("01", {"learning_rate": float("inf")}, "a finite number is needed"),
        ("01", {"epochs": 0}, "epochs is 0; at least 1 is needed"),
        ("01", {"epochs": 1.0}, "epochs is 1.0, a float; int is needed"),
        ("01", {"epochs": True}, "epochs is True, a bool; int is needed"),
        ("01", {"epochs": None}, "epochs is None, a NoneType"),
        ("01", {"dev_rows": -5}, "dev_rows is -5; at least 0"),
        ("01", {"seeds": 0}, "seeds is 0, a int; list is needed"),
        ("01", {"seeds": []}, "must not be empty"),
        ("01", {"seeds": [0, "1"]}, r"seeds\[1\] is '1'"),
        ("01", {"band": [0.1]}, "2 items are needed"),
        ("01", {"task": "mrcp"}, "one of agreement, "),
        ("01", {"data_source": "web"}, "one of embedded, local, hub"),
        ("09", {"compiled": "false"}, "write true or false without quotes"),
        ("09", {"profile_at": [[8, 0]]}, r"profile_at\[0\]\[1\] is 0; at least 1"),
        (
            "03",
            {"tasks": {"mrpc": {"epoch": 3}}},
            "mrpc has no setting epoch; there are rows",
        ),
        ("03", {"tasks": {"mrpc": 3}}, "a dict of settings is needed"),
        ("05", {"speeds": [2.0, 1.0]}, r"speeds\[1\] is 1.0; above 1"),
        ("06", {"live": {"epochs": 0}}, "live.epochs is 0"),
        ("06", {"live": {"rate": 1.0}}, "live has no setting rate"),
        ("06", {"layer_sizes": [0]}, r"layer_sizes\[0\] is 0"),
        ("07", {"live": {"row": 9}}, r"live has no setting row; is rows"),
        ("08", {"teacher": {"sst2": {"epochs": 0}}}, "teacher.sst2.epochs is 0"),
        ("08", {"teacher": {"sst3": {}}}, "no setting sst3; is sst2 meant?"),
    ],
)
def test_what_a_chapter_cannot_run_with_is_refused(
    chapter: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check(chapter, given)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="01-svd-baseline") as error:
        check("01", {"seed": 1, "epochs": 0, "batch_size": "8"})
    assert len(str(error.value).splitlines()) == 4


def test_a_whole_number_is_a_float_too() -> None:
    check("07", {"speedup": 3, "rate": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- mrpc\n", "names and their values"),
        ("", "names and their values"),
        ("1: 2\n", "names and their values"),
        ("epochs: 1\nranks: [1]\nepochs: 3\n", "epochs is given twice"),
        ("jobs: [{rows: 1, rows: 2}]\n", "rows is given twice"),
        ("a: [1\n", "params.yaml"),
        ("a: !!python/object/apply:os.getcwd []\n", "params.yaml"),
    ],
)
def test_a_file_that_is_no_mapping_of_names_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        parameters.load(path)


@pytest.mark.parametrize(
    "source",
    ["n = f(1)", "n: int", "for n in [1]: pass", "a = b = 1", "n: set = {1}"],
)
def test_a_parameters_cell_that_cannot_be_read_is_refused(
    tmp_path: Path, source: str
) -> None:
    path = tmp_path / "x.ipynb"
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), path)
    with pytest.raises(ValueError, match=r"parameters, line 1"):
        parameters.declared(path)
    nbformat.write(new_notebook(cells=[]), path)
    with pytest.raises(ValueError, match="0 parameters cells"):
        parameters.declared(path)
