"""Small mends of what the theme and its extensions write; light pages among them."""

import re
import struct
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# The theme brings each icon twice: in web fonts, loaded where one is used, and in a
# script of half a megabyte (gzipped), loaded everywhere. The fonts are enough.
ICON_SCRIPT = re.compile(r"\s*<script[^>]*/fontawesome\.js[^>]*></script>")
# Sphinx, docutils and the theme each say how wide a phone is; once is enough.
VIEWPORT = re.compile(r'\s*<meta name="viewport"[^>]*>')
# A browser would break the line between a formula and the comma behind it. A long
# formula stays as it is: with its comma held it would be wider than a phone.
FORMULA = re.compile(
    r'(\(?<span class="math notranslate nohighlight">[^<]{1,60}</span>[,.;:!?)’]+)'
)
EMPTY_HEADER = re.compile(r"<th([^>]*)>\s*(?:<p></p>)?\s*</th>")
# Beside the search and the contents; without a name no landmark would hold the logo.
LOGO = re.compile(
    r'<div class="sidebar-primary-item">(?=\s*<a class="navbar-brand logo")'
)
HOME = '<div class="sidebar-primary-item" role="navigation" aria-label="Home">'
IMAGE = re.compile(r'<img ([^>]*?)src="([^"]*_images/([^"]+\.(?:png|svg)))"([^>]*)>')


def tidy(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    body = context.get("body", "")
    # sphinx-thebe adds its script twice, which is an error in the console, and it
    # would run code on a foreign server. This book does not use it.
    unused = ["thebe"]
    if 'class="math' not in body:
        unused.append("mathjax")
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if not any(name in describe(script) for name in unused)
    ]
    if page == app.config.root_doc:
        context["docstitle"] = ""  # its title is the book's: once is enough here, too
    if "body" in context:
        # docutils marks the bibliography as a list, but not its entries as list items.
        body = body.replace('<div role="list" class="citation-list">', "<div>").replace(
            ' role="doc-biblioentry"', ""
        )
        body = FORMULA.sub(r'<span class="held">\1</span>', body)
        # An empty header names nothing, so it is no header.
        body = EMPTY_HEADER.sub(r"<td\1></td>", body)
        files = {name: source for source, name in app.builder.images.items()}
        context["body"] = IMAGE.sub(
            lambda found: lazy(found, Path(app.srcdir), files), body
        )


def describe(script: Any) -> str:
    return (str(script) + str(getattr(script, "attributes", ""))).lower()


def lazy(found: re.Match[str], root: Path, files: dict[str, str]) -> str:
    """Load an image when it comes near; its size is known before, so nothing jumps."""
    before, address, name, after = found.groups()
    size = ""
    if name in files and "width=" not in before + after:
        width, height = image_size(root / files[name])
        size = f' width="{width}" height="{height}"'
    return f'<img {before}src="{address}"{after.rstrip("/ ")} loading="lazy"{size}>'


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels, or of an SVG in its own units."""
    start = path.read_bytes()[:4000]
    if path.suffix == ".png":
        width, height = struct.unpack(">II", start[16:24])
        return width, height
    box = re.search(rb'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', start)
    if box is None:
        raise ValueError(f"{path}: no viewBox; a figure of known size has one.")
    return round(float(box[1])), round(float(box[2]))


def lighten(app: Sphinx, problem: Exception | None) -> None:
    if problem is not None or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        lighter = LOGO.sub(HOME, ICON_SCRIPT.sub("", page))
        first = VIEWPORT.search(lighter)
        if first is not None:
            end = first.end()
            lighter = lighter[:end] + VIEWPORT.sub("", lighter[end:])
        if lighter != page:
            path.write_text(lighter, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", tidy, priority=900)
    app.connect("build-finished", lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
