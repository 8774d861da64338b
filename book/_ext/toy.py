"""The interactive figure of chapter 2: `{toy}`, with its caption below.

    ```{toy}
    The caption.
    ```

It is drawn by `_static/toy.js`, which only pages that show it load.
"""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PLACE = '<div class="drone-toy"><p>This figure needs JavaScript.</p></div>'


class Toy(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["toy"])
        box += nodes.raw("", PLACE, format="html")
        self.state.nested_parse(self.content, self.content_offset, box)
        return [box]


def load_script(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if PLACE in context.get("body", ""):
        app.add_js_file("toy.js", defer="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("toy", Toy)
    app.connect("html-page-context", load_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
