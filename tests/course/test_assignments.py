"""Assignments: nothing leaks, and marks are what they should be."""

import ast
import html
import inspect
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
import yaml

pytest.importorskip("otter", reason="otter-grader is in the extra `course`")

from book.course import assign, grade, grade_one, slides

HERE = Path(__file__).parent


def secrets(name, folder=assign.SOURCES):
    """Lines of the solutions, and names of the hidden tests, of a source."""
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    code = re.findall(
        r"^ +# BEGIN SOLUTION.*?\n(.*?)^ +# END SOLUTION", text, re.M | re.S
    )
    words = re.findall(
        r"^# BEGIN SOLUTION\n```\n\n(?!```)(.*?)^```\{raw-cell\}\n# END",
        text,
        re.M | re.S,
    )
    lines = {line for part in code + words for line in stripped(part) if len(line) > 12}
    hidden = re.findall(r"hidden: true\n.*?^def (test_\w+)", text, re.M | re.S)
    assert lines and hidden, "a source without solutions or hidden tests?"
    return lines, hidden


def asked(name, folder=assign.SOURCES):
    """Names of the functions whose whole body a student writes."""
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    return set(re.findall(r'^def (\w+).*\n +""".*"""\n +# BEGIN SOLUTION$', text, re.M))


def leaks(notebook, name, folder=assign.SOURCES):
    """What of a solution or a hidden test stands in a student's notebook.

    Solutions of *all* assignments count, for one setup cell could answer another task.
    """
    _, hidden = secrets(name, folder)
    tests = "\n".join(public_tests(notebook))
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    text = [cell.source for cell in notebook.cells] + [tests]
    given = {line for part in text for line in stripped(part)}
    found = [test for test in hidden if test in tests]
    for other in assign.names(folder):
        lines, _ = secrets(other, folder)
        # a line that two assignments' tasks both need, as `return total`, says nothing
        found += sorted(lines & given)
        if other != name:
            found += sorted(asked(other, folder) & working(code))
    return found


def working(code):
    """Names of the functions that these cells define, with more than a prompt."""
    trees = [ast.parse(part) for part in code]
    functions = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    return {
        f.name for f in functions if not isinstance(f.body[-1], ast.Expr | ast.Pass)
    }


def stripped(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def public_tests(notebook):
    """The tests that otter-grader put into the notebook's metadata, as code."""
    found = notebook.metadata["otter"]["tests"]
    assert found, "no test came with the notebook"
    return ["\n".join(t) if isinstance(t, list) else str(t) for t in found.values()]


@pytest.fixture(scope="module", params=assign.names())
def student(request):
    text = assign.student_notebook(request.param)
    return request.param, nbformat.reads(text, as_version=4)


def test_nothing_leaks_into_a_students_notebook(student):
    name, notebook = student
    assert leaks(notebook, name) == []
    text = nbformat.writes(notebook)
    for word in ("BEGIN SOLUTION", "hidden: true", "hidden=True", "Rubric"):
        assert word not in text


def test_a_download_finds_its_own_checks(tmp_path, monkeypatch):
    assign.write(tmp_path, HERE)
    (file,) = tmp_path.iterdir()
    assert file.name == assign.published("tiny")
    monkeypatch.chdir(tmp_path)
    state = {"double": lambda x: 5}
    exec(nbformat.read(file, as_version=4).cells[0].source, state)
    assert "q1" in str(state["grader"].check("q1"))


def test_a_leak_is_noticed():
    notebook = nbformat.reads(assign.student_notebook("tiny", HERE), as_version=4)
    assert leaks(notebook, "tiny", HERE) == []
    notebook.cells.append(
        nbformat.v4.new_code_cell("return 2 * x  # the secret of this assignment")
    )
    assert leaks(notebook, "tiny", HERE) == [
        "return 2 * x  # the secret of this assignment"
    ]
    notebook.metadata["otter"]["tests"]["q1"] += "\ndef test_hidden(double): ..."
    assert "test_hidden" in leaks(notebook, "tiny", HERE)


def test_a_leak_of_another_assignment_is_noticed():
    notebook = nbformat.reads(assign.student_notebook("tiny", HERE), as_version=4)
    assert leaks(notebook, "03") == []
    line = "basis, small = torch.linalg.qr(wide)  # (m, s), (s, n) with s = min(m, n)"
    assert line in secrets("02")[0]
    helper = "def factorize(weight, moment, rank):\n    return another_way(weight)"
    notebook.cells += map(nbformat.v4.new_code_cell, (line, helper))
    assert leaks(notebook, "03") == [line, "factorize"]


@pytest.mark.parametrize("number", slides.chapters())
def test_no_slide_shows_a_solution(number):
    page = html.unescape(re.sub(r"<[^>]*>", "", slides.deck(number)))
    shown = set(stripped(page))
    for name in assign.names():
        assert sorted(secrets(name)[0] & shown) == [], name


def test_a_student_is_told_what_is_wrong(student):
    name, _ = student
    text = (assign.SOURCES / f"{name}.md").read_text(encoding="utf-8")
    tests = re.findall(r"^def (test_\w+)\(.*?(?=^```)", text, re.M | re.S)
    bodies = re.findall(r"^(def test_\w+\(.*?)(?=^```)", text, re.M | re.S)
    assert len(tests) >= 6
    for body in bodies:
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Assert):
                assert node.msg is not None, ast.unparse(node)


def test_points_add_up_to_what_the_text_promises(student):
    name, _ = student
    text = (assign.SOURCES / f"{name}.md").read_text(encoding="utf-8")
    each = re.findall(r"# BEGIN QUESTION\nname: \w+\npoints: (\d+)", text)
    (promised,) = re.findall(r"Points: (\d+)\.", text)
    assert sum(map(int, each)) == int(promised)
    shown = re.findall(r"^## \d+\..*\((\d+) points", text, re.M)
    assert shown == each


def outcomes(cells, name):
    """Run a notebook's cells here, then all its tests: {test: what it complained}."""
    state = {}
    for cell in cells:
        if "grader" not in cell:  # otter-grader's own
            exec(cell, state)
    text = (assign.SOURCES / f"{name}.md").read_text(encoding="utf-8")
    found = {}
    for body in re.findall(r"^(def test_\w+\(.*?)(?=^```)", text, re.M | re.S):
        scope = {}
        exec(body, scope)
        (test,) = (value for value in scope.values() if inspect.isfunction(value))
        try:
            test(
                **{
                    wanted: state[wanted]
                    for wanted in inspect.signature(test).parameters
                }
            )
        except Exception as error:
            found[test.__name__] = error
        else:
            found[test.__name__] = None
    return found


def solution(name):
    """The code cells of a source, solutions in and prompts out."""
    for cell in jupytext.read(assign.SOURCES / f"{name}.md", fmt="md:myst").cells:
        if cell.cell_type == "code" and "BEGIN TEST CONFIG" not in cell.source:
            prompt = r'^ *""" # BEGIN PROMPT\n.*?^ *""" # END PROMPT\n?'
            yield re.sub(prompt, "", cell.source, flags=re.M | re.S)


@pytest.fixture
def default_dtype():
    """The notebooks set one for themselves; here they run beside other tests."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
def test_a_solution_passes_every_test_and_the_untouched_notebook_none(student):
    name, notebook = student
    solved = outcomes(solution(name), name)
    assert {test: error for test, error in solved.items() if error} == {}
    untouched = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    passed = outcomes(untouched, name)
    assert [test for test, error in passed.items() if error is None] == []
    _, hidden = secrets(name)
    strange = {
        test: error
        for test, error in passed.items()
        if test not in hidden and not isinstance(error, AssertionError)
    }
    assert strange == {}  # what a check says of no work yet is a sentence


MISTAKES = yaml.safe_load(HERE.joinpath("mistakes.yaml").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param(name, wrong, id=f"{name}: {wrong['mistake']}")
        for name, all_wrong in MISTAKES.items()
        for wrong in all_wrong
    ],
)
def test_a_wrong_answer_fails_its_tests_alone_and_hears_why(name, wrong):
    found = outcomes([*solution(name), wrong["code"]], name)
    complaints = {test: str(error) for test, error in found.items() if error}
    assert complaints.keys() == wrong["fails"].keys(), complaints
    for test, words in wrong["fails"].items():
        assert words in complaints[test], complaints[test]


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    """Marks of five submissions of the tiny assignment, one loop without end.

    The untouched notebook has no marks, or `build` would raise.
    """
    home = assign.build("tiny", tmp_path_factory.mktemp("built"), HERE)
    folder = tmp_path_factory.mktemp("submissions")
    untouched = nbformat.read(home / "tiny.ipynb", as_version=4)
    submissions = {
        "right": ("return 2 * x", "return x / 2"),
        "wrong": ("return 4", "return x"),  # right for the public test alone
        "endless": ("while True: pass", "return x / 2"),
        "noisy": ("print('noise ' * 2_000_000); return 2 * x", "return x / 2"),
    }
    for name, (first, second) in submissions.items():
        notebook = nbformat.from_dict(untouched)
        for cell in notebook.cells:
            if cell.source.startswith("def double"):
                cell.source = f"def double(x):\n    {first}"
            elif cell.source.startswith("def halve"):
                cell.source = f"def halve(x):\n    {second}"
        nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / "broken.ipynb").write_text("not a notebook")
    table = home / "marks.csv"
    rows = grade.grade_folder(home / "autograder.zip", folder, cell_seconds=3)
    grade.write_table(rows, table)
    return {row["submission"].removesuffix(".ipynb"): row for row in rows}, table


def test_a_system_without_the_clock_is_told_where_to_grade(monkeypatch):
    monkeypatch.delattr(grade_one.signal, "SIGALRM")
    with pytest.raises(SystemExit, match="in the container"):
        grade_one.main("a.zip", "a.ipynb", "marks.json", "3")


def test_marks_are_as_expected(marks):
    rows, _ = marks
    found = {name: (row.get("q1"), row.get("q2")) for name, row in rows.items()}
    assert found == {
        "right": (3, 1),
        "wrong": (1, 0),
        "endless": (0, 1),  # the loop costs its own question
        "noisy": (3, 1),
        "broken": (None, None),
    }


def test_the_table_says_what_could_not_be_graded(marks):
    rows, table = marks
    assert "not graded" in rows["broken"]["note"]
    lines = table.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "submission,q1,q2,total,note"
    assert len(lines) == len(rows) + 1
    assert "right.ipynb,3.0,1.0,4.0,graded" in lines
