"""The book as one page, for the PDF: what Sphinx's `singlehtml` builder lacks.

sphinx-exercise names its nodes' writers for the builder `html` alone, and through them
for no other; its own writers are given to `singlehtml` here.
"""

from sphinx.application import Sphinx


def share_writers(app: Sphinx) -> None:
    if app.builder.name == "singlehtml":
        handlers = app.registry.translation_handlers
        own = handlers.get("singlehtml", {})
        handlers["singlehtml"] = {**handlers.get("html", {}), **own}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", share_writers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
