"""How a published notebook is shown: bookkeeping folded, every fold named.

The notebook on disk stays as it was run; only what Sphinx reads is changed.
"""

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

# What a folded cell does, by the first pattern that its code has.
FOLDS = [
    (r"^# Parameters$", "this edition's parameters"),
    (r"^import drone$", "the set-up and the versions"),
    (r"figures\.show\(", "the plot's code"),
    (r"^glue\(|^ +glue\(", "how these numbers are kept"),
    (r"Markdown\(", "how this sentence is computed"),
    (r"DataFrame|\.style|tables\.", "the table's code"),
    (r"^(def|class) ", "the definitions"),
]
REST = "the code"
KEEPS_BOOKS = re.compile(r"^ *glue\(", re.MULTILINE)
ONLY_SAYS = re.compile(r"^(\w+ = .*\n)*Markdown\(", re.MULTILINE)
CACHE_LINE = re.compile(r"^cache hit: .*\n?", re.MULTILINE)
# A reference brings its word: "exercise {ref}`…`" would give "exercise Exercise 3.1".
WORD_OF_A_REFERENCE = re.compile(
    r"(?i)\b(exercise|theorem) (?=\{(prf:)?ref\}`(ex|thm)-)"
)
# Without a label a solution's anchor is its place in the book.
SOLUTION = re.compile(r"(\{solution-start\} (ex-\S+)\n)")
FORMATTER_MARK = re.compile(r" *# fmt: (skip|off|on)$", re.MULTILINE)


def view(app: Sphinx, page: str, source: list[str]) -> None:
    if not app.env.doc2path(page).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            fold(cell)
            tidy_outputs(cell)
        else:
            text = "".join(cell["source"])
            text = WORD_OF_A_REFERENCE.sub("", text)
            cell["source"] = SOLUTION.sub(r"\1:label: solution-\2\n", text)
    source[0] = json.dumps(notebook)


def fold(cell: dict[str, Any]) -> None:
    code = "".join(cell["source"])
    tags = cell["metadata"].setdefault("tags", [])
    if not tags_hide(tags) and (KEEPS_BOOKS.search(code) or ONLY_SAYS.match(code)):
        tags.append("hide-input")
    if is_setup(code) and "hide-input" in tags:
        tags[tags.index("hide-input")] = "hide-cell"  # the versions fold with it
    shown = cell["metadata"].setdefault("mystnb", {})
    what = fold_name(code)
    shown["code_prompt_show"] = f"Show {what}"
    shown["code_prompt_hide"] = f"Hide {what}"
    cell["source"] = FORMATTER_MARK.sub("", code)


def tags_hide(tags: list[str]) -> bool:
    return any(tag.startswith(("hide-", "remove-")) for tag in tags)


def is_setup(code: str) -> bool:
    return bool(re.search(r"^import drone$", code, re.MULTILINE))


def fold_name(code: str) -> str:
    named = (name for pattern, name in FOLDS if re.search(pattern, code, re.MULTILINE))
    return next(named, REST)


def tidy_outputs(cell: dict[str, Any]) -> None:
    kept = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            output["text"] = CACHE_LINE.sub("", "".join(output["text"]))
            if not output["text"]:
                continue
        html = output.get("data", {}).get("text/html")
        if html:
            # An empty header names nothing, so it is no header.
            plain = "".join(html).replace("<th></th>", "<td></td>")
            output["data"]["text/html"] = plain
        kept.append(output)
    cell["outputs"] = kept


def name_cells(app: Sphinx, document: nodes.document) -> None:
    """Give each code cell an anchor of its own, so that other pages can point to it."""
    if not app.env.doc2path(app.env.docname).endswith(".ipynb"):
        return
    path = Path(app.env.doc2path(app.env.docname))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for node in document.findall(nodes.container):
        if node.get("nb_element") == "cell_code":
            node["ids"].append("cell-" + cells[node["cell_index"]]["id"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", view)
    app.connect("doctree-read", name_cells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
