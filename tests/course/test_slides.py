"""Decks: made of their chapters, whole, legible, without a network."""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml

from book.course import chapter, slides

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
REQUIRED = os.environ.get("DRONE_REQUIRE_BROWSER") == "1"
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED,
    reason="no Chromium on the PATH: install Debian's package chromium",
)
# Elements of the open slide that reach below its edge or beyond its side.
OUTSIDE = """() => {
  const box = document.querySelector('.slides').getBoundingClientRect();
  return [...Reveal.getCurrentSlide().querySelectorAll(':scope > :not(aside)')]
    .filter((e) => {
      const r = e.getBoundingClientRect();
      return r.bottom > box.bottom + 1 || r.right > box.right + 1;
    })
    .map((e) => `${e.tagName} ${e.textContent.slice(0, 60)}: bottom and right at ` +
      `${Math.round(e.getBoundingClientRect().bottom)}, ` +
      `${Math.round(e.getBoundingClientRect().right)}`);
}"""


@pytest.fixture(params=slides.chapters())
def number(request):
    return request.param


def one_slide(tmp_path, **part):
    slide = {"title": "A slide", "parts": [part], "notes": "Say it."}
    (tmp_path / "02.yaml").write_text(yaml.safe_dump({"slides": [slide]}))
    return slides.deck("02", tmp_path)


def test_a_deck_is_made_from_the_chapter(number):
    page = slides.deck(number)
    source = yaml.safe_load((slides.FOLDER / f"{number}.yaml").read_text())
    assert 8 <= len(source["slides"]) <= 20
    assert page.count("<section") == len(source["slides"]) + 1
    assert page.count('<aside class="notes">') == len(source["slides"])
    for slide in source["slides"]:
        assert len(slide["notes"].split()) >= 8, slide["title"]
    for image in re.findall(r"<img [^>]*>", page):
        assert len(re.search(r'alt="([^"]*)"', image)[1]) >= 30


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"equation": "eq-gone"}, "nothing labelled 'eq-gone'"),
        ({"block": "thm-gone"}, "nothing labelled 'thm-gone'"),
        ({"figure": "gone"}, "no cell 'gone'"),
        ({"code": "gone"}, "no cell 'gone'"),
        ({"code": "theorem-hand", "first": "gone"}, "no line with 'gone'"),
        ({"output": "gone"}, "no cell 'gone'"),
        ({"paragraph": "**Gone.**"}, "no paragraph starts with"),
        ({"bullets": "## Gone"}, "no list below"),
        ({"reading": "gone"}, "no cell 'reading-gone'"),
        ({"picture": "x"}, "exactly one of"),
    ],
)
def test_what_the_chapter_no_longer_has_is_an_error(tmp_path, part, complaint):
    with pytest.raises(ValueError, match=complaint):
        one_slide(tmp_path, **part)


def test_code_that_cannot_be_read_from_afar_is_refused(tmp_path):
    long = next(
        cell.id
        for cell in chapter.published("02").cells
        if cell.cell_type == "code" and len(cell.source.splitlines()) > 20
    )
    with pytest.raises(ValueError, match="choose some with first and last"):
        one_slide(tmp_path, code=long)


def test_what_a_slide_shows_is_the_chapters_own(tmp_path):
    page = one_slide(tmp_path, equation="eq-objective")
    assert chapter.published("02").equation("eq-objective")[:20] in page


def test_what_was_seen_comes_without_its_figure(tmp_path):
    page = one_slide(tmp_path, reading="answer")
    words = chapter.published("02").reading("answer").split()
    assert words[-1].strip("*.,") in page
    assert "```" not in page and ":class:" not in page and "admonition" not in page


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    """The decks beside MathJax, as in the site, served on this machine only."""
    from importlib.metadata import distribution

    root = tmp_path_factory.mktemp("site")
    (root / "course").mkdir()
    slides.write(root / "course")
    files = distribution("sphinx-mathjax-offline").files
    script = next(file for file in files if file.name == "tex-mml-chtml.js")
    home = Path(str(script.locate())).parent
    (root / "mathjax").mkdir()
    shutil.copy(home / script.name, root / "mathjax")
    fonts = Path("output", "chtml", "fonts")
    shutil.copytree(home / fonts, root / "mathjax" / fonts)
    quiet = type(
        "Quiet",
        (http.server.SimpleHTTPRequestHandler,),
        {"log_message": lambda *_: None},
    )
    handler = functools.partial(quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/course/"
        server.shutdown()


@pytest.fixture(scope="module")
def page():
    assert CHROMIUM, "DRONE_REQUIRE_BROWSER is set, and there is no Chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser.new_page(viewport={"width": 1280, "height": 720})
        browser.close()


@needs_browser
def test_every_slide_fits_its_screen_and_asks_no_network(decks, page, number):
    problems = []
    page.on("console", lambda m: m.type == "error" and problems.append(m.text))
    page.on(
        "request",
        lambda r: (
            r.url.startswith((decks[:20], "data:", "blob:")) or problems.append(r.url)
        ),
    )
    page.goto(f"{decks}slides-{number}.html", wait_until="networkidle")
    page.wait_for_selector("mjx-container", state="attached", timeout=15_000)
    page.evaluate("MathJax.startup.promise.then(() => Reveal.layout())")
    assert page.locator("mjx-merror").count() == 0
    for at in range(page.evaluate("Reveal.getTotalSlides()")):
        assert page.evaluate("Reveal.getIndices().h") == at
        page.evaluate("Reveal.layout()")  # a figure gets its size now, not a bit later
        problems += [f"slide {at + 1}: {e}" for e in page.evaluate(OUTSIDE)]
        page.keyboard.press("ArrowRight")
    assert problems == []
