"""What tests of the built book share; their fixtures are in site/conftest.py."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
AXE = ROOT / "tests" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
REQUIRED = os.environ.get("DRONE_REQUIRE_BROWSER") == "1"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CHAPTER = "book/chapters/01-svd-baseline.html"
# A formula is set when it comes near; this sets all of a page.
SET_FORMULAS = """async () => {
  await window.MathJax?.startup?.promise;
  await window.MathJax?.startup?.document.lazyTypesetAll();
}"""

needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED,
    reason="no Chromium on the PATH: install Debian's package chromium",
)
needs_axe = pytest.mark.skipif(
    not AXE.is_file() and not REQUIRED,
    reason="axe-core is missing: `make test` gets it with npm",
)


def build(source, output):
    """Build the book as `make book` does; returns the finished process."""
    return subprocess.run(
        [
            *(
                str(Path(sys.executable).with_name("jupyter-book")),
                "build",
                str(source),
            ),
            *("--path-output", str(output), "--warningiserror", "--keep-going"),
        ],
        capture_output=True,
        text=True,
    )


def pages(site):
    """Every page a reader can open, as paths below the site."""
    special = {"genindex.html", "search.html", "index.html"}
    found = sorted(site.rglob("*.html"))
    names = [path.relative_to(site).as_posix() for path in found]
    return [
        name
        for name in names
        if name not in special and not name.startswith(("_static/", "_modules/"))
    ]


@cache
def soup(path):
    """A parsed page; tests read it and change nothing."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
