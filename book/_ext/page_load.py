"""What a page waits for before it shows: one style sheet, and no script.

The theme and its extensions name a dozen style sheets and as many scripts in the head
of each page. On a phone each is a round trip in which the screen stays white.
"""

import hashlib
import posixpath
import re
from pathlib import Path

from sphinx.application import Sphinx

STYLES = "_static/styles"  # where the site's one sheet lies, beside the theme's own
SHEET = re.compile(
    r'<link(?=[^>]*rel="stylesheet")[^>]*href="([^":?]+\.css)[^"]*"[^>]*>\s*'
)
IMPORT = re.compile(r'@import\s+"([^"]+)";')
ADDRESS = re.compile(r"url\((['\"]?)(?!data:|https?:|#)([^)'\"]+)\1\)")
COMMENT = re.compile(r"/\*(?!!).*?\*/", re.DOTALL)  # a licence begins with /*!
# The theme loads the index of the search everywhere, for a search as one types that
# is off here; the page of the search names these scripts itself.
SEARCH = re.compile(
    r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js"></script>'
)
OPTIONS = re.compile(r'<script src="[^"]*documentation_options\.js[^"]*"></script>')
# A script of a file that the browser would stop at to run it.
AT_ONCE = re.compile(r"<script (?![^>]*\b(?:defer|async|type)\b)(?=[^>]*\bsrc=)")


def sheet(site: Path, path: str) -> str:
    """A style sheet as it may stand in `STYLES`: what it imports is in it, and the
    addresses of its pictures and fonts lead from there."""
    text = COMMENT.sub("", (site / path).read_text(encoding="utf-8"))

    def within(address: str) -> str:
        return posixpath.normpath(posixpath.join(posixpath.dirname(path), address))

    def moved(found: re.Match[str]) -> str:
        return f'url("{posixpath.relpath(within(found[2]), STYLES)}")'

    imported = [sheet(site, within(address)) for address in IMPORT.findall(text)]
    return "".join([*imported, ADDRESS.sub(moved, IMPORT.sub("", text))])


def join(site: Path, paths: tuple[str, ...]) -> str:
    """Write style sheets into one file, and return its path in the site."""
    css = "\n".join(sheet(site, path) for path in paths)
    # A reader's browser keeps the sheet; other words in it are another file.
    name = f"{STYLES}/book-{hashlib.sha256(css.encode()).hexdigest()[:8]}.css"
    (site / name).write_text(css, encoding="utf-8")
    return name


def one_sheet(
    site: Path, page: str, html: str, made: dict[tuple[str, ...], str]
) -> str:
    """The page with one link in place of its links to style sheets.

    What is joined once stands in `made`: nearly all pages have the same sheets."""
    first = SHEET.search(html)
    if first is None:
        return html  # the page that only leads to the first one
    folder = posixpath.dirname(page)
    paths = tuple(
        posixpath.normpath(posixpath.join(folder, link)) for link in SHEET.findall(html)
    )
    if paths not in made:
        made[paths] = join(site, paths)
    address = posixpath.relpath(made[paths], folder or ".")
    link = f'<link rel="stylesheet" href="{address}" />\n'
    return html[: first.start()] + link + SHEET.sub("", html[first.start() :])


def scripts_later(site: Path, html: str) -> str:
    """The page whose scripts run when it is read, in the same order as before."""
    options = (site / "_static/documentation_options.js").read_text(encoding="utf-8")
    # Lines in the page itself need the options: they stand in it, too.
    html = OPTIONS.sub(lambda _: f"<script>{options}</script>", SEARCH.sub("", html))
    return AT_ONCE.sub("<script defer ", html)


def lighten(app: Sphinx, problem: Exception | None) -> None:
    if problem is not None or app.builder.name != "html":
        return
    site = Path(app.outdir)
    made: dict[tuple[str, ...], str] = {}
    for path in site.rglob("*.html"):
        page = path.relative_to(site).as_posix()
        if page.startswith("_static/"):  # decks, handouts, templates of the theme
            continue
        html = one_sheet(site, page, path.read_text(encoding="utf-8"), made)
        if page != "search.html":  # it needs what is left out elsewhere
            html = scripts_later(site, html)
        path.write_text(html, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    # After the icons that no page shows are gone from the style sheets.
    app.connect("build-finished", lighten, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
