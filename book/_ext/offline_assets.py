"""Put MathJax into the site, so that formulas render with no network."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

from sphinx.application import Sphinx

PACKAGE = "sphinx-mathjax-offline"
# Not tex-mml-chtml.js, which takes the MathML beside a formula for one more to be set.
SCRIPT = "tex-chtml.js"
LAZY = Path("ui", "lazy.js")
FONTS = Path("output", "chtml", "fonts")  # the other 22 MB are output formats unused


def copy_mathjax(app: Sphinx) -> None:
    files = distribution(PACKAGE).files or []
    script = next((file for file in files if file.name == SCRIPT), None)
    if script is None:
        raise RuntimeError(f"{PACKAGE} carries no {SCRIPT}; reinstall it.")
    source = Path(str(script.locate())).parent
    target = Path(app.outdir) / "_static" / "mathjax"
    (target / LAZY).parent.mkdir(parents=True, exist_ok=True)
    for file in (SCRIPT, LAZY):
        shutil.copy(source / file, target / file)
    shutil.copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
