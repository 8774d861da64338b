"""The publisher: equal runs give equal bytes, and no page shows what it must not."""

import copy
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import papermill
import pytest
from nbformat import NotebookNode
from nbformat.v4 import (
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
)

from drone.lab import readings, stamps

PUBLISH = Path(__file__).resolve().parent.parent / "book" / "publish.py"
ALT = "A single pixel, the smallest figure that there is."
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", PUBLISH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(*outputs: NotebookNode, **fields: Any) -> NotebookNode:
    return new_code_cell("1", outputs=list(outputs), id="cell", **fields)


def stream(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def result(data: dict[str, Any], **fields: Any) -> NotebookNode:
    return new_output("execute_result", data=data, **fields)


def cleaned(publish: ModuleType, *cells: NotebookNode) -> NotebookNode:
    found = publish.clean(new_notebook(cells=list(cells)))
    nbformat.validate(found)
    return found


# --- clean -----------------------------------------------------------------------


def test_metadata_of_the_notebook_is_the_kernel_alone(publish: ModuleType) -> None:
    notebook = new_notebook(
        metadata={
            "papermill": {"duration": 1.5},
            "widgets": {"application/vnd.jupyter.widget-state+json": {}},
            "kernelspec": {"name": "mine", "display_name": "My own"},
            "language_info": {"name": "python", "version": "3.11.7"},
        }
    )
    assert publish.clean(notebook).metadata == {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }


def test_metadata_of_a_cell_is_its_tags_and_what_the_book_reads(
    publish: ModuleType,
) -> None:
    kept = {"tags": ["hide-input"], "mystnb": {"figure": {"name": "f"}}}
    noise = {"papermill": {"duration": 1}, "execution": {"iopub": "2020"}}
    cells = [code(metadata=kept | noise), new_markdown_cell("a", metadata=noise)]
    found = cleaned(publish, *cells)
    assert [cell.metadata for cell in found.cells] == [kept, {}]


def test_the_injected_cell_has_a_fixed_identifier(publish: ModuleType) -> None:
    for random in ("6b1f", "9c2e"):
        cell = new_code_cell("n = 2", metadata={"tags": ["injected-parameters"]})
        cell.id = random
        (found,) = cleaned(publish, cell).cells
        assert found.id == "injected-parameters"
        assert found.metadata.tags == ["injected-parameters", "hide-input"]


def test_progress_bars_and_widgets_are_dropped_and_results_kept(
    publish: ModuleType,
) -> None:
    widget = {
        "application/vnd.jupyter.widget-view+json": {"model_id": "8f"},
        "text/plain": "  0%|          | 0/3",
    }
    bar = stream(" 50%|#####     | 1/2", "stderr")
    kept = result({"text/plain": "4"})
    cell = code(bar, new_output("display_data", data=widget), stream("a\n"), kept)
    (found,) = cleaned(publish, cell).cells
    assert [output.output_type for output in found.outputs] == [
        "stream",
        "execute_result",
    ]
    assert found.outputs[0].text == "a\n"


def test_output_that_a_progress_bar_happened_to_split_is_joined(
    publish: ModuleType,
) -> None:
    bar = stream(" 50%|", "stderr")
    split = cleaned(publish, code(stream("a\n"), bar, stream("b\n")))
    whole = cleaned(publish, code(stream("a\nb\n"), bar))
    assert split.cells[0].outputs == whole.cells[0].outputs


def test_executions_are_numbered_from_one(publish: ModuleType) -> None:
    cells = [
        new_code_cell(
            "1",
            id=f"cell-{n}",
            execution_count=n,
            outputs=[result({"text/plain": "4"}, execution_count=n)],
        )
        for n in (7, None, 12)
    ]
    cells.insert(1, new_markdown_cell("between"))
    found = [c for c in cleaned(publish, *cells).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in found] == [1, 2, 3]
    assert [cell.outputs[0].execution_count for cell in found] == [1, 2, 3]


def test_the_text_of_a_drawn_figure_is_lifted_too(publish: ModuleType) -> None:
    figure = new_output(
        "display_data",
        data={"image/svg+xml": "<svg/>"},
        metadata={"image/svg+xml": {"alt": ALT}},
    )
    (found,) = cleaned(publish, code(figure)).cells
    assert found.metadata.mystnb == {"image": {"alt": ALT}}


def test_a_figures_text_is_lifted_to_its_cell_beside_what_is_there(
    publish: ModuleType,
) -> None:
    figure = new_output(
        "display_data",
        data={"image/png": PNG},
        metadata={"image/png": {"alt": ALT, "width": 480}},
    )
    cell = code(figure, metadata={"mystnb": {"figure": {"name": "pixel"}}})
    (found,) = cleaned(publish, cell).cells
    assert found.metadata.mystnb == {"figure": {"name": "pixel"}, "image": {"alt": ALT}}
    assert found.outputs[0].metadata["image/png"]["width"] == 480


def test_cleaning_twice_changes_nothing_more(publish: ModuleType) -> None:
    cell = code(stream("a\n"), result({"text/plain": "4"}), execution_count=9)
    once = cleaned(publish, cell)
    assert publish.clean(copy.deepcopy(once)) == once


def test_an_error_is_refused_and_named(publish: ModuleType) -> None:
    error = new_output("error", ename="KeyError", evalue="'rank'", traceback=[])
    with pytest.raises(ValueError, match="cell cell: KeyError: 'rank'"):
        cleaned(publish, code(error))


@pytest.mark.parametrize("top", ["root", "home", "tmp", "work", "Users"])
def test_a_path_of_this_machine_is_refused(publish: ModuleType, top: str) -> None:
    path = f"/{top}/ann/model"
    for output in [
        stream(f"loaded from {path}\n"),
        result({"text/plain": f"PosixPath('{path}')"}),
        new_output("display_data", data={"text/plain": path}),
    ]:
        with pytest.raises(ValueError, match=f"path of this machine, {path}"):
            cleaned(publish, code(output))


def test_a_path_in_html_alone_is_refused(publish: ModuleType) -> None:
    data = {"text/plain": "<HTML object>", "text/html": "<b>/home/ann/model</b>"}
    with pytest.raises(ValueError, match="path of this machine"):
        cleaned(publish, code(result(data)))


def test_what_only_looks_like_a_path_is_kept(publish: ModuleType) -> None:
    text = "and/or, 1/2, notebooks/01-svd.ipynb, homework/tmp\n"
    assert cleaned(publish, code(stream(text))).cells[0].outputs[0].text == text


# --- source and parameters -------------------------------------------------------


def test_a_chapter_is_found_by_its_number(publish: ModuleType, tmp_path: Path) -> None:
    for name in ("01-svd.ipynb", "02-data.ipynb", "02-twice.ipynb", "011-x.ipynb"):
        (tmp_path / name).touch()
    assert publish.source("01", tmp_path) == tmp_path / "01-svd.ipynb"
    assert publish.source("1", tmp_path) == publish.source(" 01 ", tmp_path)
    for wrong, count in [("03", 0), ("02", 2), ("", 0)]:
        with pytest.raises(ValueError, match=f"'{wrong}': {count} notebooks") as error:
            publish.source(wrong, tmp_path)
        assert "01-svd.ipynb, 011-x.ipynb, 02-data.ipynb" in str(error.value)


def test_edition_parameters_are_a_mapping(
    publish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    folder = tmp_path / "book" / "params"
    folder.mkdir(parents=True)
    (folder / "01.yaml").write_text("task: mrpc\nrank: 8\n")
    (folder / "02.yaml").write_text("- mrpc\n")
    assert publish.edition_parameters("01") == {"task": "mrpc", "rank": 8}
    with pytest.raises(ValueError, match="names and their values"):
        publish.edition_parameters("02")
    with pytest.raises(FileNotFoundError):
        publish.edition_parameters("03")


# --- stderr ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "bar",
    [
        "\r  0%|     | 0/3 [00:00<?, ?it/s]\r100%|##| 3/3 [00:00<00:00, 9.12it/s]",
        "evaluate:  50%|#####     | 1/2 [00:01<00:01,  1.20it/s]\n",
        "\repoch 1 of 3:   7%|7| 3/40 [00:09<01:51, 3.01s/it, perplexity=812]",
        "Generating: 3it [00:00, 91.2it/s]",
        "\x1b[32mMap\x1b[0m: 100%|##| 10/10 [00:00<00:00]\x1b[A\r\n",
    ],
)
def test_bars_on_stderr_are_dropped(publish: ModuleType, bar: str) -> None:
    (found,) = cleaned(publish, code(stream(bar, "stderr"), stream("a\n"))).cells
    assert [output.text for output in found.outputs] == ["a\n"]


@pytest.mark.parametrize(
    "text",
    [
        "Some weights were newly initialized\n",
        "Traceback (most recent call last):\n",
        "50% of the rows were dropped\n",
        "\r 50%|##| 1/2 [00:01<00:01]\nkilled\n",
        "loss: 3",
    ],
)
def test_anything_else_on_stderr_is_refused(publish: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="a cell writes to stderr"):
        cleaned(publish, code(stream(text, "stderr")))


def test_a_bar_in_two_pieces_is_one(publish: ModuleType) -> None:
    pieces = [stream("\r 50%|##   | 1/2 [00:", "stderr"), stream("01<00:01]", "stderr")]
    assert cleaned(publish, code(*pieces)).cells[0].outputs == []


# --- a run -----------------------------------------------------------------------

SOURCE = f"""
from pathlib import Path
from IPython.display import display
from tqdm.auto import tqdm

for _ in tqdm(range(3)):
    pass
print(n, Path("beside.txt").read_text())
display({{"image/png": "{PNG}", "text/plain": "<Figure>"}}, raw=True,
        metadata={{"image/png": {{"alt": "{ALT}"}}}})
"""


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    """A notebook with a parameter, a bar and a figure; it reads a file beside it."""
    cells = [
        new_code_cell("n = 1", id="given", metadata={"tags": ["parameters"]}),
        new_code_cell(SOURCE, id="work"),
        new_code_cell("n * 2", id="last"),
    ]
    (tmp_path / "beside.txt").write_text("beside")
    path = tmp_path / "01-tiny.ipynb"
    kernel = {"name": "python3", "display_name": "Mine", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_two_runs_store_the_same_bytes(
    publish: ModuleType, chapter: Path, tmp_path: Path
) -> None:
    before = chapter.read_bytes()
    stored = []
    for name in ("one", "two"):
        target = tmp_path / name / "01-tiny.ipynb"
        publish.store(publish.run(chapter, {"n": 5}), target)
        stored.append(target.read_bytes())
        assert list(target.parent.iterdir()) == [target]
    assert stored[0] == stored[1]
    assert chapter.read_bytes() == before
    found = nbformat.reads(stored[0].decode(), as_version=4)
    nbformat.validate(found)
    given, injected, work, last = found.cells
    assert (given.id, work.id, last.id) == ("given", "work", "last")
    assert injected.id == "injected-parameters" and "n = 5" in injected.source
    assert [output.output_type for output in work.outputs] == ["stream", "display_data"]
    assert work.outputs[0].text == "5 beside\n"
    assert work.metadata.mystnb.image.alt == ALT
    assert last.outputs[0].data["text/plain"] == "10"
    assert [cell.execution_count for cell in found.cells] == [1, 2, 3, 4]


def test_a_cell_that_fails_stops_the_run(publish: ModuleType, chapter: Path) -> None:
    (chapter.parent / "beside.txt").unlink()
    with pytest.raises(papermill.PapermillExecutionError, match="FileNotFoundError"):
        publish.run(chapter, {})


# --- new words for a published chapter ---------------------------------------------


def worded(text: str, source: str = "1", caption: str = "An old caption.") -> Any:
    """A notebook with a parameters cell, a figure's cell and a line of text."""
    figure = {"mystnb": {"figure": {"caption": caption}}}
    return new_notebook(
        cells=[
            new_markdown_cell(text),
            new_code_cell("a = 1", metadata={"tags": ["parameters"]}),
            new_code_cell(source, metadata=figure),
        ]
    )


def test_prose_gives_new_text_and_keeps_results(publish: ModuleType) -> None:
    published = worded("old")
    published.cells[2].outputs = [stream("a result")]
    injected = new_code_cell("a = 2", metadata={"tags": ["injected-parameters"]})
    published.cells.insert(2, injected)
    found = publish.with_prose(published, worded("new", caption="A new caption."))
    assert [c.source for c in found.cells] == ["new", "a = 1", "a = 2", "1"]
    assert found.cells[3].outputs[0].text == "a result"
    assert found.cells[3].metadata.mystnb.figure.caption == "A new caption."


def test_prose_gives_a_fold_its_new_words_and_keeps_the_alt_text(
    publish: ModuleType,
) -> None:
    published, written = worded("old"), worded("new")
    published.cells[2].metadata.mystnb["image"] = {"alt": ALT}
    written.cells[2].metadata.mystnb["code_prompt_show"] = "Plot"
    shown = publish.with_prose(published, written).cells[2].metadata.mystnb
    assert shown.image.alt == ALT and shown.code_prompt_show == "Plot"


def test_prose_takes_code_that_is_laid_out_differently(publish: ModuleType) -> None:
    found = publish.with_prose(
        worded("old", source='print(f"{1} a" "b")'),
        worded("new", source='print(\n    f"{1} "\n    "ab"\n)  # as before'),
    )
    assert found.cells[2].source.endswith("# as before")
    with pytest.raises(ValueError, match="run the edition again"):
        publish.with_prose(worded("old", source="%time 1"), worded("new", source="1"))


def test_prose_refuses_changed_code(publish: ModuleType) -> None:
    with pytest.raises(ValueError, match="run the edition again"):
        publish.with_prose(worded("old"), worded("new", source="2"))


@pytest.mark.parametrize(
    ("default", "given", "refused"),
    [
        ("a = 3", "a = 2", False),  # the run had a value of its own
        ("a = 3", "b = 2", True),  # the run took the default
        ("a = 3", None, True),
        ("a = 1\nb = 2", "a = 2", True),  # another parameter
        ("b = 1", "a = 2\nb = 2", True),
    ],
)
def test_a_default_may_change_where_the_run_did_not_use_it(
    publish: ModuleType, default: str, given: str | None, refused: bool
) -> None:
    published, written = worded("old"), worded("new")
    written.cells[1].source = default
    if given:
        injected = new_code_cell(given, metadata={"tags": ["injected-parameters"]})
        published.cells.insert(2, injected)
    if refused:
        with pytest.raises(ValueError, match="run the edition again"):
            publish.with_prose(published, written)
    else:
        found = publish.with_prose(published, written)
        assert [c.source for c in found.cells] == ["new", default, given, "1"]


# --- what we see in the results ----------------------------------------------------


def test_readings_stand_in_the_page_and_not_in_its_source(
    publish: ModuleType, small: Path
) -> None:
    (small / "book/params/01.yaml").write_text("seeds: [1]\n")
    written = small / "book/readings/01.md"
    written.parent.mkdir()
    written.write_text("---\nread: \n---\n% at answer\nIt pays.\n")
    source = small / "notebooks/01-tiny.ipynb"
    before = source.read_bytes()
    page = publish.edition(source)
    ids = [cell.id for cell in nbformat.read(page, 4).cells]
    assert ids[1] == "reading-answer" and source.read_bytes() == before
    assert stamps.differences(small, page) == []  # set in after the stamp
    written.write_text("---\nread: \n---\n% at answer\nIt does not.\n")
    publish.prose(source)
    cells = nbformat.read(page, 4).cells
    assert [cell.id for cell in cells] == ids and "It does not." in cells[1].source
    publish.read(source)
    assert readings.load(written).read == readings.digest(small, page)


def test_readings_that_do_not_fit_lose_no_run(publish: ModuleType, small: Path) -> None:
    (small / "book/params/01.yaml").write_text("seeds: [1]\n")
    written = small / "book/readings/01.md"
    written.parent.mkdir()
    written.write_text("---\nread: \n---\n% at nowhere\nIt pays.\n")
    source = small / "notebooks/01-tiny.ipynb"
    with pytest.raises(ValueError, match=r"without its readings: no cell.*make prose"):
        publish.edition(source)
    page = small / "book/chapters/01-tiny.ipynb"
    assert stamps.differences(small, page) == []


# --- a whole repository, of one chapter --------------------------------------------

KERNEL = {"name": "python3", "display_name": "x", "language": "python"}


@pytest.fixture
def small(publish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A book of one chapter that never runs: what runs is a stand-in."""
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    for folder in ("book/params", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    text = "seeds: list = [0]\nrate: float = 5e-5\ncompiled: bool = False"
    cells = [new_code_cell(text, metadata={"tags": ["parameters"]}), new_code_cell("1")]
    notebook = new_notebook(metadata={"kernelspec": KERNEL}, cells=cells)
    nbformat.write(notebook, tmp_path / "notebooks" / "01-tiny.ipynb")

    def run(path: Path, given: dict[str, Any]) -> NotebookNode:
        return publish.clean(nbformat.read(path, 4))

    monkeypatch.setattr(publish, "run", run)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    ["seed: [0, 1, 2]", "rate: 5e-5", "compiled: 'false'", "seeds: [1]\nseeds: [2]"],
)
def test_an_edition_with_wrong_parameters_does_not_begin(
    publish: ModuleType, small: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (small / "book/params/01.yaml").write_text(text + "\n")
    monkeypatch.setattr(publish, "run", lambda *_: pytest.fail("begun"))
    with pytest.raises(ValueError, match=r"cannot run|given twice"):
        publish.edition(small / "notebooks/01-tiny.ipynb")
    assert not (small / "book/chapters").exists()


def test_an_edition_is_stamped(publish: ModuleType, small: Path) -> None:
    (small / "book/params/01.yaml").write_text("seeds: [1]\n")
    page = publish.edition(small / "notebooks/01-tiny.ipynb")
    assert stamps.differences(small, page) == []
    (small / "book/params/01.yaml").write_text("seeds: [2]\n")
    assert len(stamps.differences(small, page)) == 1


@pytest.mark.parametrize("what", ["refresh", "edition"])
def test_an_edit_saved_during_a_run_stays_and_the_result_lies_aside(
    publish: ModuleType, small: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = small / "notebooks/01-tiny.ipynb"
    (small / "book/params/01.yaml").write_text("seeds: [1]\n")
    plain = publish.run

    def run(given: Path, parameters: dict[str, Any]) -> NotebookNode:
        result = plain(given, parameters)
        path.write_text("an hour of new work")
        return result

    monkeypatch.setattr(publish, "run", run)
    with pytest.raises(ValueError, match="changed while it ran") as error:
        getattr(publish, what)(path)
    assert path.read_text() == "an hour of new work"
    (aside,) = (small / "runs").glob("*.ipynb")
    assert aside.name in str(error.value) and nbformat.read(aside, 4).cells
    assert not (small / "book/chapters").exists()


def test_a_source_that_nobody_touched_gets_its_outputs(
    publish: ModuleType, small: Path
) -> None:
    path = small / "notebooks/01-tiny.ipynb"
    assert publish.refresh(path) == path
    assert nbformat.read(path, 4).cells[1].execution_count == 2


# --- make ------------------------------------------------------------------------


def make(*words: str, **environment: str) -> str:
    """What make would do; nothing runs, and a make above it (`make test`) is unseen."""
    above = {"MAKELEVEL", "MAKEFLAGS", "MFLAGS"}
    around = {name: value for name, value in os.environ.items() if name not in above}
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.installed", *words],
        cwd=PUBLISH.parent.parent,
        env=around | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_blanks_in_paths_do_not_break_make() -> None:
    said = make("run", "CHAPTER=1", "PARAMS=my params/a b.yaml")
    assert 'book/run.py "1" "my params/a b.yaml"' in said
    assert 'book/run.py "01" \n' in make("run", "CHAPTER= 01 ", "PARAMS= ")
    folder = {"DRONE_DATA": "../my data", "DRONE_MODELS": "~/m o", "DRONE_CACHE": " "}
    rule = "--eval=show:; @echo '[$(DRONE_DATA)] [$(DRONE_MODELS)] [$(DRONE_CACHE)]'"
    for given in (folder, {}):
        words = [] if given else [f"{name}={value}" for name, value in folder.items()]
        said = make(rule, "show", *words, **given)
        above = PUBLISH.parent.parent.parent
        assert f"[{above}/my data] [{Path.home()}/m o] [" in said
        assert said.split("[")[-1].split("]")[0].strip() == ""  # not this folder
