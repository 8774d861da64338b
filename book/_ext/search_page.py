"""The search page says formulas in letters, not in TeX; see search_formulas.js."""

from typing import Any

from sphinx.application import Sphinx


def add_script(app: Sphinx, page: str, *_: Any) -> None:
    if page == "search":
        # after Sphinx's own, whose function it wraps
        app.add_js_file("search_formulas.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
