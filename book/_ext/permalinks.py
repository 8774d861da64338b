"""Exercises, solutions, theorems and tables of results get a link to themselves.

As Sphinx's own beside a heading, it is there under the pointer; a table, which has no
name of its own, is named after its cell.
"""

import re
from collections import Counter
from typing import Any

from sphinx.application import Sphinx

# A proof without a number has no name of its own: all of them are called `proof`.
BOX = re.compile(
    r'<div class="(exercise|solution|proof \w+)\b[^"]*" id="([^"]+)">\s*'
    r'<p class="admonition-title">(?:(?!</p>).)*',
    re.DOTALL,
)
CELL_OR_TABLE = re.compile(
    r'id="cell-([^"]+)"|<table class="results">(\s*<caption>(?:(?!</caption>).)*)',
    re.DOTALL,
)
LINK = '<a class="headerlink" href="#{}" title="Link to this {}">#</a>'


def link_boxes(body: str) -> str:
    def linked(found: re.Match[str]) -> str:
        kind, name = found[1].split()[-1], found[2]
        return found[0] + LINK.format(name, kind)

    return BOX.sub(linked, body)


def link_tables(body: str) -> str:
    cell = ""
    tables: Counter[str] = Counter()

    def linked(found: re.Match[str]) -> str:
        nonlocal cell
        if found[1]:
            cell = found[1]
            return found[0]
        tables[cell] += 1
        more = f"-{tables[cell]}" if tables[cell] > 1 else ""
        name = f"table-{cell}{more}"
        return f'<table class="results" id="{name}">{found[2]}' + LINK.format(
            name, "table"
        )

    return CELL_OR_TABLE.sub(linked, body)


def add(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if "body" in context:
        context["body"] = link_tables(link_boxes(context["body"]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
