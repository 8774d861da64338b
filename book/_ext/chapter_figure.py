"""Show on one page a figure that a cell of a published chapter made.

    ```{chapter-figure} 01-svd-baseline inputs-plot
    The caption.
    ```

and a chapter as a card with that figure as its small picture:

    ```{chapter-card} 01-svd-baseline inputs-plot
    :minutes: 40
    :needs: SVD, matrix products
    What it found, in one sentence.
    ```

The picture and its alt text are the cell's own, so they cannot drift apart from it.
"""

import base64
import io
import os
from pathlib import Path
from typing import ClassVar

import nbformat
from docutils import nodes
from docutils.parsers.rst import directives
from PIL import Image
from plain_copies import COLAB
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import OptionSpec

CARD_WIDTH = 480  # pixels: sharp at 240 on a dense screen


class ChapterFigure(SphinxDirective):
    required_arguments = 2  # the chapter's file name without its ending; a cell's id
    has_content = True

    def run(self) -> list[nodes.Node]:
        figure = nodes.figure("", self.picture())
        caption = nodes.caption()
        inline, messages = self.state.inline_text(" ".join(self.content), self.lineno)
        caption += inline
        figure += caption
        return [figure, *messages]

    def picture(self, width: int | None = None) -> nodes.image:
        """The cell's figure as a file of the site, narrower if a width is given."""
        chapter, cell_id = self.arguments
        path = Path(self.env.srcdir, "book", "chapters", f"{chapter}.ipynb")
        self.env.note_dependency(str(path))
        kind, data, alt = find(path, cell_id)
        folder = Path(self.env.doctreedir).parent / "chapter_figures"
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "image/svg+xml":  # sharp at any width
            file = folder / f"{chapter}-{cell_id}.svg"
        else:
            file = folder / f"{chapter}-{cell_id}{'-small' if width else ''}.png"
            data = small(data, width) if width else data
        file.write_bytes(data)
        page = Path(self.env.doc2path(self.env.docname)).parent
        return nodes.image(uri=os.path.relpath(file, page), alt=alt)


class ChapterCard(ChapterFigure):
    option_spec: ClassVar[OptionSpec] = {
        "minutes": directives.positive_int,
        "needs": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        chapter = self.arguments[0]
        card = nodes.container(classes=["chapter-card"])
        card += self.picture(CARD_WIDTH)
        link = addnodes.pending_xref(
            "",
            nodes.inline(),  # filled in with the chapter's title
            refdomain="std",
            reftype="doc",
            reftarget=f"/book/chapters/{chapter}",
            refdoc=self.env.docname,
            refexplicit=False,
            refwarn=True,
        )
        card += nodes.paragraph("", "", link, classes=["chapter-card-title"])
        self.state.nested_parse(self.content, self.content_offset, card)
        told = f"{self.options['minutes']} minutes · needs {self.options['needs']} · "
        colab = nodes.reference(
            "", "", nodes.Text("run it on Colab"), refuri=self.colab(), internal=False
        )
        needs = nodes.paragraph("", told, classes=["chapter-card-needs"])
        card += needs
        needs += colab
        return [card]

    def colab(self) -> str:
        """Where the button of the chapter's own page leads."""
        theme = self.config.html_theme_options
        place = theme["repository_url"].removeprefix("https://github.com/")
        site = theme["launch_buttons"]["colab_url"]
        return f"{site}/github/{place}/blob/{COLAB}/{self.arguments[0]}.ipynb"


def small(png: bytes, width: int) -> bytes:
    """A picture made narrower and put into 64 colours."""
    whole = Image.open(io.BytesIO(png)).convert("RGB")
    height = round(whole.height * width / whole.width)
    narrow = whole.resize((width, height), Image.Resampling.LANCZOS).quantize(64)
    written = io.BytesIO()
    narrow.save(written, "PNG", optimize=True)
    return written.getvalue()


def find(path: Path, cell_id: str) -> tuple[str, bytes, str]:
    """The kind of a cell's figure, SVG or PNG, its bytes, and its alt text."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []) if cell.id == cell_id else []:
            for kind in ("image/svg+xml", "image/png"):
                alt = output.get("metadata", {}).get(kind, {}).get("alt")
                if alt:
                    text = output.data[kind]  # a notebook keeps PNG in base64
                    svg = kind == "image/svg+xml"
                    return kind, text.encode() if svg else base64.b64decode(text), alt
    raise ValueError(f"{path}: no cell {cell_id!r} that shows a figure with alt text.")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("chapter-figure", ChapterFigure)
    app.add_directive("chapter-card", ChapterCard)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
