"""Each chapter ends with how to cite it, from what `CITATION.cff` says of the book."""

import re
from html import escape
from pathlib import Path
from typing import Any

import yaml
from sphinx.application import Sphinx

CHAPTER = re.compile(r"book/chapters/\d\d-")


def reference(
    citation: dict[str, Any], title: str, page: str, copyright_line: str
) -> str:
    """The line, as HTML. `title` is HTML, too; the copyright begins with the year."""
    authors = " and ".join(
        author.get("name") or f"{author['given-names']} {author['family-names']}"
        for author in citation["authors"]
    )
    year = str(citation.get("date-released", copyright_line))[:4]
    if not year.isdecimal():
        raise ValueError(f"no year, neither in CITATION.cff nor in {copyright_line!r}.")
    address = ""
    if "url" in citation:
        url = escape(f"{citation['url'].rstrip('/')}/{page}.html")
        address = f' <a class="reference external" href="{url}">{url}</a>'
    book = f"<cite>{escape(citation['title'])}</cite>, version {citation['version']}"
    return (
        '<p class="cite-chapter"><strong>Cite this chapter.</strong> '
        f"{escape(authors)}: “{title}”. In: {book}, {year}.{address}</p>\n"
    )


def add(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if not CHAPTER.match(page):
        return
    text = Path(app.srcdir, "CITATION.cff").read_text(encoding="utf-8")
    context["body"] += reference(
        yaml.safe_load(text), context["title"], page, app.config.copyright
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
