"""Show on one page a figure that a cell of a published chapter made.

    ```{chapter-figure} 01-svd-baseline inputs-plot
    The caption.
    ```

The picture and its alt text are the cell's own, so they cannot drift apart from it.
"""

import html
from base64 import b64encode
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class ChapterFigure(SphinxDirective):
    required_arguments = 2  # the chapter's file name without its ending; a cell's id
    has_content = True

    def run(self) -> list[nodes.Node]:
        chapter, cell_id = self.arguments
        path = Path(self.env.srcdir, "book", "chapters", f"{chapter}.ipynb")
        self.env.note_dependency(str(path))
        picture, alt = find(path, cell_id)
        figure = nodes.figure()
        figure += nodes.raw(
            "",
            f'<img src="{picture}" alt="{html.escape(alt)}" loading="lazy">',
            format="html",
        )
        caption = nodes.caption()
        inline, messages = self.state.inline_text(" ".join(self.content), self.lineno)
        caption += inline
        figure += caption
        return [figure, *messages]


def find(path: Path, cell_id: str) -> tuple[str, str]:
    """The picture, as the address of its data, and the alt text of a cell's figure."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []) if cell.id == cell_id else []:
            for kind in ("image/svg+xml", "image/png"):
                alt = output.get("metadata", {}).get(kind, {}).get("alt")
                if alt:
                    return address(kind, output.data[kind]), alt
    raise ValueError(f"{path}: no cell {cell_id!r} that shows a figure with alt text.")


def address(kind: str, data: str) -> str:
    """Write a picture into an address; a notebook keeps PNG in base64, SVG as text."""
    if kind == "image/svg+xml":
        data = b64encode(data.encode()).decode()
    return f"data:{kind};base64,{data}".replace("\n", "")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("chapter-figure", ChapterFigure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
