"""Small mends of what the theme and its extensions write."""

from typing import Any

from sphinx.application import Sphinx


def tidy(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    # sphinx-thebe adds its script twice, which is an error in the console, and it
    # would run code on a foreign server. This book does not use it.
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in (str(script) + str(getattr(script, "attributes", "")).lower())
    ]
    # docutils marks the bibliography as a list, but not its entries as list items.
    if "body" in context:
        context["body"] = (
            context["body"]
            .replace('<div role="list" class="citation-list">', "<div>")
            .replace(' role="doc-biblioentry"', "")
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", tidy, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
