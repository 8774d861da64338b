"""Pages of the built site, opened in Chromium and made ready for paper.

On paper nothing can be clicked: solutions stand open at the end of their chapter,
pictures and formulas are there before a page is handed on, and a link leads to a page
of the book by its place in it, whatever the name of the server.
"""

import functools
import http.server
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import yaml
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
BOOK = "https://book.invalid/"  # links within the book, until they are resolved
ON_SCREEN = (
    "book/intro",
    "book/course/quiz",
    "book/course/slides",
    "book/explore",
    "book/api",
)
READY = """async ([book, wanted]) => {
  const article = document.querySelector("article");
  // A link of the book names the page and the place, also within its own page.
  const root = location.origin + "/";
  for (const link of article.querySelectorAll("a[href]")) {
    if (link.href.startsWith(root)) link.href = book + link.href.slice(root.length);
  }
  const solutions = [...article.querySelectorAll(".solution")];
  if (solutions.length) {
    const heading = document.createElement("h2");
    heading.className = "solutions-at-end";  // the page's own script leaves them
    heading.textContent = "Solutions";
    article.append(heading, ...solutions);
  }
  article.querySelectorAll(".toggle-hidden").forEach((box) =>
    box.classList.remove("toggle-hidden"));
  // Chromium writes down where a place is only if a link on the page leads there.
  const links = document.createElement("div");
  links.hidden = true;
  for (const anchor of wanted) {
    const link = document.createElement("a");
    link.href = "#" + anchor;
    links.append(link);
  }
  document.body.append(links);
  const images = [...article.querySelectorAll("img")];
  images.forEach((image) => image.removeAttribute("loading"));
  await Promise.all(images.map((image) => image.decode()));
  await window.MathJax?.startup?.promise;
  await window.MathJax?.startup?.document.lazyTypesetAll();
  await document.fonts.ready;
}"""


def contents(root: Path = ROOT) -> dict[str, list[str]]:
    """All pages but the landing page, by the part they are in, in order."""
    read = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))

    def below(entries: list[dict[str, Any]]) -> list[str]:
        found = []
        for entry in entries:
            found += [entry["file"], *below(entry.get("sections", []))]
        return found

    return {part["caption"]: below(part["chapters"]) for part in read["parts"]}


def listed(root: Path = ROOT) -> dict[str, list[str]]:
    """Pages of the book that can stand on paper, by the part they are in, in order."""
    return {
        part: [name for name in names if not name.startswith(ON_SCREEN)]
        for part, names in contents(root).items()
    }


def anchors(site: Path, names: Sequence[str]) -> dict[str, set[str]]:
    """Places that links of these pages lead to: {page: anchors}."""
    wanted = defaultdict(set)
    for name in names:
        html = (site / f"{name}.html").read_text(encoding="utf-8")
        for href in re.findall(r'href="([^"]*#[^"]+)"', html):
            page, anchor = urldefrag(urljoin(f"{name}.html", href))
            wanted[page.removesuffix(".html")].add(anchor)
    return wanted


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server without an access log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def chromium_at(site: Path) -> Iterator[tuple[Page, str]]:
    """A page of Chromium, and the address at which it finds the site.

    Raises:
        SystemExit: there is no Chromium.
    """
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit(
            "PDF and EPUB are made by Chromium, and there is none on the PATH."
        )
    handler = functools.partial(Quiet, directory=str(site))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(300_000)
        page.add_init_script("localStorage.setItem('mode', 'light')")
        yield page, f"http://127.0.0.1:{server.server_port}/"
        browser.close()
        server.shutdown()


def open_page(page: Page, address: str, name: str, wanted: set[str]) -> None:
    """Open a page of the site, and make it ready for paper."""
    page.goto(f"{address}{name}.html", wait_until="load")
    page.evaluate(READY, [BOOK, sorted(wanted)])
