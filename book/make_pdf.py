"""Print the whole book into one PDF, by Chromium.

    python book/make_pdf.py   # writes _build/pdf/drone-book.pdf

Sphinx puts all pages into one (its builder `singlehtml`); Chromium prints that with the
style for paper in `_static/custom.css`. Solutions are printed open.
"""

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "_build" / "pdf"
OPEN_ALL = """() => {
  document.querySelectorAll(".toggle-hidden").forEach((box) =>
    box.classList.remove("toggle-hidden"));
  document.querySelectorAll("img[loading]").forEach((image) =>
    image.removeAttribute("loading"));
  return Promise.all([...document.images].map((image) => image.decode()));
}"""


def build() -> Path:
    """The book as one page; returns its folder.

    Raises:
        subprocess.CalledProcessError: Sphinx warned or failed.
    """
    book = str(Path(sys.executable).with_name("jupyter-book"))
    command = [book, "build", str(ROOT), "--path-output", str(OUTPUT)]
    subprocess.run([*command, "--builder", "singlehtml"], check=True)
    folder = OUTPUT / "_build" / "singlehtml"
    # The page lies in book/, but its links to pictures and scripts start one above.
    shutil.copy(folder / "book" / "intro.html", folder / "index.html")
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server without an access log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def print_page(folder: Path, pdf: Path) -> None:
    """Open the one page in Chromium, unfold it, print it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit(
            "the PDF is printed by Chromium, and there is none on the PATH."
        )
    handler = functools.partial(Quiet, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page: Page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.wait_for_function("window.MathJax?.startup?.promise")
        page.evaluate("MathJax.startup.promise.then(() => true)")
        page.evaluate(OPEN_ALL)
        page.pdf(path=pdf, prefer_css_page_size=True, outline=True, tagged=True)
        browser.close()
        server.shutdown()


def main() -> None:
    """Build the one page and print it."""
    pdf = OUTPUT / "drone-book.pdf"
    print_page(build(), pdf)
    print(f"written: {pdf.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
