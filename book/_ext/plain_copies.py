"""A copy of each chapter for Colab and for download: plain Markdown, ready to run.

Made from `notebooks/`, so with the default parameters, which need no data. An install
cell stands first, MyST directives become ordinary Markdown, solutions are folded,
outputs are left out. The copies lie in the site's folder `notebooks`; the deploy
workflow also pushes them to the branch of COLAB, where Colab can open them.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

COLAB = "colab"  # a branch
CHAPTER = re.compile(r"book/chapters/(\d\d-[\w-]+)")
INSTALL = """\
# Installs the book's library where it is missing, as on Colab; elsewhere does nothing.
import importlib.util

if importlib.util.find_spec("drone") is None:
    %pip install -q "drone[lab] @ git+{repository}" myst-nb papermill

import torch
import transformers

import drone

print("drone", drone.__version__, "| the book was made with {versions}")
print("here: torch", torch.__version__, "transformers", transformers.__version__)
"""
OPENING = re.compile(r"(`{3,}|:{3,})\{([\w:-]+)\} ?(.*)")
OPTION = re.compile(r":([\w-]+):(.*)")
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
LABELLED_FORMULA = re.compile(r"^\$\$ *\([\w-]+\)$", re.MULTILINE)
NAMES = {"figure": "Fig.", "table": "Table"}

Numbers = dict[str, str]  # a label, and how the book calls it: "Theorem 2.1"


def numbers(env: BuildEnvironment) -> Numbers:
    names = {}
    for kinds in env.toc_fignumbers.values():
        for kind, found in kinds.items():
            for label, parts in found.items():
                number = ".".join(map(str, parts))
                if kind == "displaymath":
                    names[label.removeprefix("equation-")] = f"({number})"
                else:
                    names[label] = f"{NAMES.get(kind, kind.title())} {number}"
    return names


def without_roles(text: str, known: Numbers) -> str:
    """`{numref}`fig-toy`` becomes "Fig. 2.2"; other roles leave their text."""

    def spoken(found: re.Match[str]) -> str:
        role, said = found.groups()
        if role == "math":
            return f"${said}$"
        label = re.search(r"<([^>]*)>$", said)
        if label:
            return said[: label.start()].strip()
        if role.startswith("cite"):
            author = re.match(r"([a-z]+)(\d{4})", said)
            return f"{author[1].title()} {author[2]}" if author else said
        return known.get(said, said)

    return ROLE.sub(spoken, LABELLED_FORMULA.sub("$$", text))


def without_directives(text: str, known: Numbers) -> str:
    """Boxes become quotations under a bold title."""
    lines: list[str] = []
    quoted = ""  # the fence of an open box
    rest = iter(text.split("\n"))
    for line in rest:
        opening = OPENING.fullmatch(line)
        if opening:
            fence, kind, title = opening.groups()
            label = ""
            for option in rest:  # up to the first line that is none
                named = OPTION.fullmatch(option)
                if not named:
                    break
                if named[1] == "label":
                    label = named[2].strip()
            heading = bold_title(kind, title, label, known)
            ends_at_once = option.strip() == fence
            quoted = "" if ends_at_once else fence
            if heading:
                lines += ["> " * bool(quoted) + heading, ">" * bool(quoted)]
            if quoted and option.strip():
                lines.append(f"> {option}")
        elif quoted and line.strip() == quoted:
            quoted = ""
        else:
            lines.append(f"> {line}".rstrip() if quoted else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def bold_title(kind: str, title: str, label: str, known: Numbers) -> str:
    if kind.endswith("-end"):
        return ""
    if kind == "prf:proof":
        return "**Proof.**"
    if kind == "solution-start":
        return f"**Solution to {known.get(title, title)}**"
    name = known.get(label, "")
    if kind.startswith("prf:") or kind == "exercise-start":
        return f"**{name} ({title})**" if title else f"**{name}**"
    return f"**{title or kind.title()}**"


def copy(notebook: NotebookNode, first: str, known: Numbers) -> NotebookNode:
    """A notebook that needs neither MyST nor anything installed."""
    made = nbformat.v4.new_notebook(metadata=notebook.metadata)
    cell = nbformat.v4.new_code_cell(first, id="install")
    made.cells = [cell]
    solution = ""
    for old in notebook.cells:
        text = old.source
        starts = re.search(r"\{solution-start\} (\S+)", text)
        if starts:
            solution = f"Solution to {known.get(starts[1], starts[1])}"
        if old.cell_type == "markdown":
            made.cells += plain_markdown(old, solution, known)
        else:
            made.cells.append(plain_code(old, solution))
        if "{solution-end}" in text:
            solution = ""
    return made


def plain_markdown(
    old: NotebookNode, solution: str, known: Numbers
) -> list[NotebookNode]:
    text = without_roles(without_directives(old.source, known), known)
    if solution:
        text = re.sub(r"^\*\*Solution to [^*]*\*\*\n*", "", text)
        if text:  # where code follows at once, a fold would hold nothing
            text = f"<details><summary>{solution}</summary>\n\n{text}\n\n</details>"
    return [nbformat.v4.new_markdown_cell(text, id=old.id)] if text else []


def plain_code(old: NotebookNode, solution: str) -> NotebookNode:
    cell = nbformat.v4.new_code_cell(old.source, id=old.id)
    if solution:
        cell.source = f"# @title {solution}\n{old.source}"
        cell.metadata = NotebookNode(cellView="form", jupyter={"source_hidden": True})
    return cell


def write_copies(app: Sphinx, problem: Exception | None) -> None:
    if problem is not None or app.builder.name != "html":
        return
    root, known = Path(app.srcdir), numbers(app.env)
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    made_with = re.findall(r"^(torch|transformers)==(\S+)", lock, re.MULTILINE)
    first = INSTALL.format(
        repository=app.config.html_theme_options["repository_url"],
        versions=", ".join(" ".join(pair) for pair in made_with),
    )
    folder = Path(app.outdir) / "notebooks"
    folder.mkdir(exist_ok=True)
    for page in app.env.found_docs:
        chapter = CHAPTER.fullmatch(page)
        if chapter:
            path = f"{chapter[1]}.ipynb"
            notebook = nbformat.read(root / "notebooks" / path, as_version=4)
            nbformat.write(copy(notebook, first, known), folder / path)


def launch(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Point the buttons at what runs: the source, or its copy. Not at the edition,
    whose parameters want data that a visitor has not got."""
    chapter = CHAPTER.fullmatch(page)
    if not chapter:
        return
    published, source = f"{page}.ipynb", f"notebooks/{chapter[1]}.ipynb"
    branch = app.config.html_theme_options["repository_branch"]
    for button in all_buttons(context["header_buttons"]):
        url = button.get("url", "")
        if "colab.research" in url:
            button["url"] = url.replace(
                f"/blob/{branch}/{published}", f"/blob/{COLAB}/{chapter[1]}.ipynb"
            )
        elif "mybinder.org" in url or f"/edit/{branch}/" in url:
            button["url"] = url.replace(published, source)
        elif url.endswith(f"_sources/{published}"):
            button["url"] = url.replace(f"_sources/{published}", source)


def all_buttons(buttons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    inner = [b for button in buttons for b in button.get("buttons", [])]
    return buttons + inner


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", launch, priority=900)
    app.connect("build-finished", write_copies)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
