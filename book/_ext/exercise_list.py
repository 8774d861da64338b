"""All exercises of the book in one table: `{exercise-list}`.

Made of the chapters when the book is built, so it lists what is there.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx_exercise.nodes import exercise_subtitle

TITLE = re.compile(r"(.+) \(((?:pencil|code|research)[a-z, ]* ★{1,3})\)")
HEAD = ["number", "exercise", "kind", "answer"]


class exercise_list(nodes.General, nodes.Element):
    """Where the table is to stand; numbers are known when all pages are read."""


class ExerciseList(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return [exercise_list()]


def fill(app: Sphinx, document: nodes.document, page: str) -> None:
    for place in list(document.findall(exercise_list)):
        place.replace_self(table(app, page))


def table(app: Sphinx, page: str) -> nodes.table:
    rows = []
    for label, kept in app.env.sphinx_exercise_registry.items():
        if not kept["type"].startswith("exercise"):
            continue
        numbers = app.env.toc_fignumbers[kept["docname"]]["exercise"]
        number = numbers[kept["node"]["ids"][0]]
        title = next(kept["node"].findall(exercise_subtitle)).astext()
        told = TITLE.fullmatch(title)
        if told is None:
            raise ValueError(
                f"{label}: a title ends as in (code ★★); this is {title!r}."
            )
        name, kind = told.groups()
        uri = app.builder.get_relative_uri(page, kept["docname"])
        rows.append((number, uri, label, name, kind))
    made = nodes.table(classes=["exercise-list"])
    group = nodes.tgroup(cols=len(HEAD))
    made += group
    group += [nodes.colspec(colwidth=width) for width in (10, 50, 15, 15)]
    group += nodes.thead("", row([nodes.Text(name) for name in HEAD]))
    body = nodes.tbody()
    for number, uri, label, name, kind in sorted(rows):
        body += row(
            [
                link(".".join(map(str, number)), f"{uri}#{label}"),
                nodes.Text(name[:1].upper() + name[1:]),
                nodes.Text(kind),
                link("solution", f"{uri}#solution-{label}"),
            ]
        )
    group += body
    return made


def row(cells: list[nodes.Node]) -> nodes.row:
    made = nodes.row()
    for cell in cells:
        made += nodes.entry("", nodes.paragraph("", "", cell))
    return made


def link(text: str, uri: str) -> nodes.reference:
    return nodes.reference("", text, refuri=uri, internal=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(exercise_list)
    app.add_directive("exercise-list", ExerciseList)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
