"""The figure one turns by hand: `{rank-figure}`, one layer of MiniLM at any rank.

    ```{rank-figure}
    The caption.
    ```

and `{break-even}`, the same arithmetic for a matrix of any size. The page carries the
records they show; `_static/rank_figure.js` draws them, where a page has one of them.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LAYERS, CLOCK = "explore-minilm", "09-hardware-timing"
SHOWN = {
    LAYERS: (
        "layer",
        "kind",
        "out",
        "in",
        "ranks",
        "lost_svd",
        "lost_drone",
        "spectrum",
    ),
    CLOCK: ("out", "in", "tokens", "rank", "microseconds", "measured", "processor"),
}
PLACE = '<div class="{0}"><p>This figure needs JavaScript.</p></div>'
DATA = '<script type="application/json" class="{0}-data">{1}</script>'


def shown(root: Path, name: str) -> list[dict[str, Any]]:
    """What a figure needs of a file of records."""
    path = root / "book" / "results" / f"{name}.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    keys = SHOWN[name]
    return [
        {key: x[key] for key in keys} for x in lines if keys[-1] in x and "out" in x
    ]


class Figure(SphinxDirective):
    has_content = True
    css, records = "rank-figure", LAYERS

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        self.env.note_dependency(str(root / "book/results" / f"{self.records}.jsonl"))
        box = nodes.container(classes=["toy"])
        kept = json.dumps(shown(root, self.records), separators=(",", ":"))
        html = PLACE.format(self.css) + DATA.format(self.css, kept)
        box += nodes.raw("", html, format="html")
        self.state.nested_parse(self.content, self.content_offset, box)
        return [box]


class Calculator(Figure):
    css, records = "break-even", CLOCK


def load_script(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if any(PLACE.format(kind.css) in context.get("body", "") for kind in KINDS):
        app.add_js_file("rank_figure.js", defer="defer")


KINDS = (Figure, Calculator)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("rank-figure", Figure)
    app.add_directive("break-even", Calculator)
    app.connect("html-page-context", load_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
