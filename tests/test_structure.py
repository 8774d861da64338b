"""The frame of the book: what imports what, and what a chapter must carry."""

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml

import drone
from drone.lab import readings

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*.ipynb"))
# The house, from the ground up: a room imports from itself and from the rooms below.
ROOMS = ["ground", "math", "layers", "model", "search", "cli", "lab"]
GROUND = {"timing", "files", "progress", "devices", "callers"}
MODULES = sorted((ROOT / "drone").glob("**/*.py"))


def name(path):
    return path.name


def room(module):
    """The room of a dotted module name such as `drone.math.moments`."""
    parts = module.split(".")
    return "ground" if len(parts) < 2 or parts[1] in GROUND else parts[1]


def imports(path):
    """Dotted names of what a file imports from drone, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drone"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("drone.")}
    return found


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_room_imports_only_from_those_below(path):
    if path.name == "__init__.py":
        return
    own = room(dotted(path))
    below = set(ROOMS[: ROOMS.index(own) + 1])
    assert {room(module) for module in imports(path)} <= below


def test_import_drone_loads_nothing_of_the_lab():
    heavy = ("datasets", "sklearn", "matplotlib", "IPython", "pandas", "onnx")
    heavy += ("onnxruntime", "onnxscript")
    code = (
        "import sys, drone; print(sorted(m for m in sys.modules if m == 'drone.lab' "
        f"or m.startswith('drone.lab.') or m.split('.')[0] in {heavy!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_file_is_of_a_size_one_reads_at_once(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 450, f"{lines} lines: split it along a seam"


def test_public_names_are_there():
    for public in drone.__all__:
        assert getattr(drone, public) is not None
    for module in drone.lab.__all__:
        assert getattr(drone.lab, module).__name__ == f"drone.lab.{module}"


@cache
def notebook(path):
    """A notebook as it is on disk; each is looked at by many tests."""
    return nbformat.read(path, as_version=4)


def cells(path, injected=False):
    """(type, source) of each cell, without the readings and what papermill injects."""
    return [
        (cell.cell_type, cell.source)
        for cell in notebook(path).cells
        if not readings.is_reading(cell)
        and (injected or "injected-parameters" not in cell.metadata.get("tags", []))
    ]


def stale(source, published):
    """Why a published chapter is not what its source would give; empty if it is."""
    return [
        f"cell {number}: published {new[1][:60]!r}, source {old[1][:60]!r}"
        for number, (old, new) in enumerate(
            zip(cells(source), cells(published), strict=False)
        )
        if old != new
    ] + (
        ["another number of cells"]
        if len(cells(source)) != len(cells(published))
        else []
    )


def test_every_notebook_is_published_and_listed():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    assert [p.name for p in NOTEBOOKS] == [p.name for p in CHAPTERS]
    for path in NOTEBOOKS:
        assert f"book/chapters/{path.stem}" in toc
        assert (ROOT / "book" / "params" / f"{path.stem[:2]}.yaml").is_file()


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_published_chapter_has_the_cells_of_its_source(path):
    assert stale(ROOT / "notebooks" / path.name, path) == []


def test_a_stale_chapter_is_noticed(tmp_path):
    changed = nbformat.read(NOTEBOOKS[0], as_version=4)
    changed.cells[0].source += " changed"
    nbformat.write(changed, tmp_path / "changed.ipynb")
    assert len(stale(NOTEBOOKS[0], tmp_path / "changed.ipynb")) == 1


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_an_edition_was_run_with_its_parameters(path):
    parameters = yaml.safe_load(
        (ROOT / "book" / "params" / f"{path.stem[:2]}.yaml").read_text()
    )
    (injected,) = [
        cell.source
        for cell in notebook(path).cells
        if "injected-parameters" in cell.metadata.get("tags", [])
    ]
    values = {}
    exec(injected, values)  # assignments written by papermill
    assert {key: values[key] for key in parameters} == parameters


@pytest.mark.parametrize("path", NOTEBOOKS + CHAPTERS, ids=lambda p: str(p)[-40:])
class TestNotebook:
    def test_was_run_from_top_to_bottom(self, path):
        code = [c for c in notebook(path).cells if c.cell_type == "code"]
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1))

    def test_each_figure_has_an_alt_text_and_a_caption(self, path):
        for cell in notebook(path).cells:
            for output in cell.get("outputs", []):
                for kind in {"image/svg+xml", "image/png"} & set(
                    output.get("data", {})
                ):
                    alt = output.metadata.get(kind, {}).get("alt", "")
                    assert len(alt) >= 30, cell.id
                    shown = cell.metadata.get("mystnb", {})
                    assert shown.get("image", {}).get("alt") == alt, cell.id
                    assert len(shown["figure"]["caption"]) >= 30, cell.id

    def test_folds_long_cells_that_draw(self, path):
        for cell in notebook(path).cells:
            draws = cell.cell_type == "code" and "figures.show(" in cell.source
            if draws and len(cell.source.splitlines()) > 12:
                folded = {"hide-input", "remove-cell"}
                assert folded & set(cell.metadata.get("tags", [])), cell.id

    def test_shows_no_error_and_no_path_of_a_machine(self, path):
        for cell in notebook(path).cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error", cell.id
                text = str(output.get("text", "")) + str(output.get("data", ""))
                assert not re.search(r"/(root|home|tmp|work|Users)/\w", text), cell.id

    def test_compares_most_of_its_outputs(self, path):
        code = [c for c in notebook(path).cells if c.cell_type == "code"]
        ignored = [
            c for c in code if "nbval-ignore-output" in c.metadata.get("tags", [])
        ]
        assert len(ignored) < 2 / 3 * len(code)

    def test_has_three_to_six_exercises_each_with_a_folded_solution(self, path):
        text = "\n".join(source for kind, source in cells(path) if kind == "markdown")
        labels = re.findall(r"\{exercise-start\}.*\n:label: (\S+)", text)
        solved = re.findall(r"\{solution-start\} (\S+)\n:class: dropdown", text)
        assert 3 <= len(labels) <= 6
        assert labels == solved

    def test_defines_nothing_the_library_has(self, path):
        defined = set()
        for kind, source in cells(path, injected=True):
            if kind == "code":
                defined |= functions(ast.walk(ast.parse(source)))
        assert not defined & library()


@cache
def library():
    """What the modules of the library define."""
    found = set()
    for module in MODULES:
        found |= functions(ast.parse(module.read_text(encoding="utf-8")).body)
    return found


def functions(nodes):
    """Name and parameters of each function or class: a copy has both in common."""
    return {
        (node.name, ast.unparse(node.args) if isinstance(node, ast.FunctionDef) else "")
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_the_logo_is_what_its_code_draws():
    spec = importlib.util.spec_from_file_location(
        "make_logo", ROOT / "book" / "make_logo.py"
    )
    make_logo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_logo)
    static = ROOT / "book" / "_static"
    assert (static / "favicon.svg").read_text(encoding="utf-8") == make_logo.favicon()
    logo = make_logo.logo("#222222")
    assert (static / "logo.svg").read_text(encoding="utf-8") == logo
