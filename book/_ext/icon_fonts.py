"""Of the theme's fonts of icons, keep the two dozen that the site shows.

The theme brings Font Awesome whole: 2,000 icons, and a rule of style for each, which
were nearly half of what a reader's first page weighed.
"""

import re
from pathlib import Path

from fontTools import subset
from sphinx.application import Sphinx

STYLE = Path("_static", "styles", "pydata-sphinx-theme.css")
FONTS = Path("_static", "vendor", "fontawesome", "webfonts")
NAME = re.compile(r"\bfa-[a-z0-9-]+")
# .fa-square-github:before,.fa-github-square:before{content:"\f092"}
ICON = re.compile(r'((?:\.fa-[a-z0-9-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}')
ANY_CODE = re.compile(r'"\\([ef][0-9a-f]{3})"')
SOURCES = re.compile(r"src:(url\([^)]*/(fa-[\w-]+)\.woff2\)[^;}]*)")


def names_shown(site: Path) -> set[str]:
    """Icons that a page names, or that a script of the site may add to one."""
    files = [*site.rglob("*.html"), *(site / "_static").rglob("*.js")]
    texts = (file.read_text(encoding="utf-8") for file in files)
    return {name for text in texts for name in NAME.findall(text)}


def thin(site: Path) -> None:
    """Make fonts and styles of the icons shown, in place of those of all icons."""
    sheet = site / STYLE
    css = sheet.read_text(encoding="utf-8")
    shown = names_shown(site)
    codes = {
        code for names, code in ICON.findall(css) if shown & set(NAME.findall(names))
    }
    css = ICON.sub(lambda rule: rule[0] if rule[2] in codes else "", css)
    # what is left beside them are icons that the theme's own rules show
    for style in (site / "_static").rglob("*.css"):
        rest = css if style == sheet else style.read_text(encoding="utf-8")
        codes.update(ANY_CODE.findall(rest))
    for font in sorted((site / FONTS).glob("*.ttf")):
        keep(font, [int(code, 16) for code in codes])
    css = SOURCES.sub(
        rf"src:url(../{FONTS.relative_to('_static').as_posix()}/\2.woff)"
        r' format("woff")',
        css,
    )
    sheet.write_text(css, encoding="utf-8")


def keep(font: Path, codes: list[int]) -> None:
    """Write a font of these signs alone, as WOFF; remove the whole ones."""
    options = subset.Options(flavor="woff", notdef_outline=True)
    whole = subset.load_font(font, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=codes)
    subsetter.subset(whole)
    subset.save_font(whole, font.with_suffix(".woff"), options)
    font.unlink()
    font.with_suffix(".woff2").unlink()


def finish(app: Sphinx, problem: Exception | None) -> None:
    if problem is None and app.builder.name == "html":
        thin(Path(app.outdir))


def setup(app: Sphinx) -> dict[str, bool]:
    # After the scripts of icons are gone from the pages, and all files are there.
    app.connect("build-finished", finish, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
