"""Decks: made of their chapters, whole, legible, without a network."""

import functools
import http.server
import io
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from built_site import needs_browser
from matplotlib.figure import Figure

from book.course import chapter, markup, panels, slides, tables

# Elements of the open slide that reach below its edge or beyond its side.
OUTSIDE = """() => {
  const box = document.querySelector('.slides').getBoundingClientRect();
  return [...Reveal.getCurrentSlide().querySelectorAll(':scope > :not(aside)')]
    .filter((e) => {
      const r = e.getBoundingClientRect();
      return r.bottom > box.bottom + 1 || r.right > box.right + 1 ||
        (e.matches('.highlight') && e.scrollWidth > e.clientWidth + 1);  // code cut
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
    words = re.sub(r"<[^>]*>", "", page)
    assert not re.search(r"\b(eq|thm|alg|ex|fig|sec)-[a-z]", words)  # a label


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"equation": "eq-gone"}, "nothing labelled 'eq-gone'"),
        ({"block": "thm-gone"}, "nothing labelled 'thm-gone'"),
        ({"figure": "gone"}, "no cell 'gone'"),
        ({"code": "gone"}, "no cell 'gone'"),
        ({"code": "theorem-hand", "first": "gone"}, "no line with 'gone'"),
        ({"output": "gone"}, "no cell 'gone'"),
        ({"table": "gone"}, "no cell 'gone'"),
        ({"table": "whiten-table", "rows": ["gone"]}, "no rows"),
        ({"table": "whiten-table", "groups": ["gone"]}, "no rows"),
        ({"table": "whiten-table", "columns": ["gone"]}, "no columns"),
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


def test_a_citation_leaves_no_gap():
    assert markup.plain_roles("on GLUE {cite}`wang2019`. At") == "on GLUE. At"


TABLE = """<table><thead>
<tr><th></th><th>score</th><th>low</th><th>lost</th></tr>
<tr><th>method</th><th></th><th></th><th></th></tr></thead>
<tbody><tr class="group"><th colspan="4">a task</th></tr></tbody>
<tbody><tr><th>one</th><td>1</td><td>2</td><td>3</td></tr>
<tr><th>two</th><td>4</td><td>5</td><td>6</td></tr></tbody></table>"""


def test_a_slide_takes_some_rows_and_columns_of_a_table():
    made = tables.chosen(TABLE, rows=("two",), columns=("score", "lost"))
    words = [[c.text for c in row.select("th,td")] for row in made.select("tr")]
    assert words == [
        ["", "score", "lost"],
        ["method", "", ""],
        ["a task"],
        ["two", "4", "6"],
    ]


def test_a_list_item_whose_equation_is_left_out_has_no_colon_at_its_end():
    items = chapter.published("05").bullets("## 5.5 Rivals at equal speed").splitlines()
    assert len(items) > 2 and not [item for item in items if item.endswith(":")]


def test_an_equation_has_the_number_it_has_in_the_chapter(tmp_path):
    assert r"\tag{2.1}" in one_slide(tmp_path, equation="eq-objective")
    page = one_slide(tmp_path, block="thm-inverse-free")
    assert r"\tag{2.2}" in page and "minimises (2.1) over" in page
    with pytest.raises(LookupError, match="no equation 'eq-gone'"):
        chapter.published("02").numbered("See {eq}`eq-gone`.")


def stacked(rows, high):
    """The SVG of a figure of so many panels, one below the other."""
    figure = Figure(figsize=(5, high), layout="constrained")
    for axes in np.atleast_1d(figure.subplots(rows, 1)):
        axes.set(title="a title", xlabel="a label")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue(), [a.get_position() for a in figure.axes]


def test_a_tall_figure_is_cut_between_its_panels():
    svg, places = stacked(4, 9)
    upper, lower = panels.halves(svg)
    tops = [
        float(re.search(r'viewBox="0 ([\d.]+) ', half)[1]) for half in (upper, lower)
    ]
    cut = 1 - tops[1] / (9 * 72)  # from the figure's lower edge, as a share
    assert tops[0] == 0
    assert places[2].y1 < cut < places[1].y0


def test_the_cut_runs_below_the_labels_of_the_panel_above():
    figure = Figure(figsize=(5, 8), dpi=72)  # as an SVG counts
    above, below = figure.subplots(2, 1, gridspec_kw={"hspace": 0.9})
    above.set_xlabel("three\nlines of\na label", fontsize=16)
    below.set_title("low", fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    cut = float(
        re.findall(r'viewBox="0 ([\d.]+) ', panels.halves(buffer.getvalue())[1])[0]
    )
    down = 8 * 72 - cut  # from the figure's lower edge, as Matplotlib counts
    label, title = (
        above.xaxis.label.get_window_extent(),
        below.title.get_window_extent(),
    )
    assert title.y1 < down < label.y0


@pytest.mark.parametrize(("rows", "high"), [(4, 5), (1, 9)])
def test_a_wide_figure_or_one_panel_stays_whole(rows, high):
    svg, _ = stacked(rows, high)
    assert panels.halves(svg) == [svg]


@pytest.mark.parametrize(("words", "size"), [("Few.", "large"), ("Many. " * 99, "")])
def test_few_words_are_set_large(tmp_path, words, size):
    page = one_slide(tmp_path, say=words)
    assert ('<section class="large">' in page) == bool(size)


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    """The decks beside MathJax, as in the site, served on this machine only."""
    from importlib.metadata import distribution

    root = tmp_path_factory.mktemp("site")
    (root / "course").mkdir()
    slides.write(root / "course")
    files = distribution("sphinx-mathjax-offline").files
    script = next(file for file in files if file.name == "tex-chtml.js")
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
def page(browser):
    opened = browser.new_page(viewport={"width": 1280, "height": 720})
    yield opened
    opened.close()


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
