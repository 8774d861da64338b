"""Show on one page a figure that a cell of a published chapter made.

    ```{chapter-figure} 01-svd-baseline inputs-plot
    The caption.
    ```

The picture and its alt text are the cell's own, so they cannot drift apart from it.
"""

import html
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
        image, alt = find(path, cell_id)
        figure = nodes.figure()
        figure += nodes.raw(
            "",
            f'<img src="data:image/png;base64,{image}" alt="{html.escape(alt)}" '
            'loading="lazy">',
            format="html",
        )
        caption = nodes.caption()
        inline, messages = self.state.inline_text(" ".join(self.content), self.lineno)
        caption += inline
        figure += caption
        return [figure, *messages]


def find(path: Path, cell_id: str) -> tuple[str, str]:
    """The PNG (base64) and the alt text of a cell's figure."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []) if cell.id == cell_id else []:
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                return output.data["image/png"].replace("\n", ""), alt
    raise ValueError(f"{path}: no cell {cell_id!r} that shows a figure with alt text.")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("chapter-figure", ChapterFigure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
