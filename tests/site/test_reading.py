"""What a reader of the built book sees: numbers, tables, folds, the ledger, print."""

import gzip
import json
import re

import nbformat
import numpy as np
import pytest
from built_site import (
    CHAPTER,
    DESKTOP,
    PHONE,
    ROOT,
    SET_FORMULAS,
    needs_browser,
    pages,
    soup,
)
from fontTools.ttLib import TTFont

LEDGER = "book/ledger.html"
LOOKS = {"fa-solid", "fa-regular", "fa-brands", "fa-lg"}  # of an icon, not its name
CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*.ipynb"))
SCROLLS = (
    "e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1"
)


def html(path):
    return f"book/chapters/{path.stem}.html"


@needs_browser
def test_no_formula_in_a_line_has_a_scrollbar(address, page):
    page.goto(address + CHAPTER, wait_until="load")
    page.evaluate(SET_FORMULAS)
    bars = page.eval_on_selector_all(
        "article mjx-container:not([display=true])",
        "all => all.filter(e => ['auto', 'scroll'].includes("
        "getComputedStyle(e).overflowX)).length",
    )
    assert bars == 0


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_numbers_are_those_of_the_chapter(site, path):
    own = f"{int(path.stem[:2])}."
    page = soup(site / html(path))
    captions = [tag.get_text() for tag in page.select("article .caption-number")]
    numbers = [re.search(r"\d[\d.]*", text) for text in captions]
    assert len([n for n in numbers if n]) >= 4  # figures, exercises, theorems
    assert {n[0][: len(own)] for n in numbers if n} == {own}
    equations = [tag.get_text() for tag in page.select("article .eqno")]
    assert all(text.startswith(f"({own}") for text in equations)


def test_the_exercises_of_a_chapter_are_counted_from_one(site):
    page = soup(site / html(CHAPTERS[4]))
    titles = [t.get_text() for t in page.select(".exercise > .admonition-title")]
    assert [re.match(r"Exercise (\S+) ", t)[1] for t in titles] == [
        f"5.{n}" for n in range(1, len(titles) + 1)
    ]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_word_stands_twice_before_a_number(site, path):
    text = soup(site / html(path)).select_one("article").get_text()
    assert not re.search(r"(?i)\b(exercise|theorem|algorithm|fig\.) \1\b", text)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_bookkeeping_is_folded_and_each_fold_says_what_it_holds(site, path):
    page = soup(site / html(path))
    assert "cache hit" not in page.get_text()
    assert "# fmt: skip" not in page.get_text()
    for cell in page.select("article div.cell"):
        code = cell.select_one(".cell_input pre")
        if code and re.search(r"^ *glue\(", code.get_text(), re.MULTILINE):
            assert code.find_parent("details"), code.get_text()[:80]
    prompts = {t.get_text(" ", strip=True) for t in page.select("details > summary")}
    assert len(prompts) >= 3  # "Show … Hide …", by what is inside
    assert not any("code cell" in prompt for prompt in prompts)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_each_code_cell_has_the_anchor_of_its_own_source(site, path):
    page = soup(site / html(path))
    anchored = 0
    for cell in nbformat.read(path, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "remove-cell" not in tags:
            shown = page.find(id=f"cell-{cell.id}").select_one(".cell_input pre")
            first = cell.source.split("\n")[0].split("  # fmt:")[0].rstrip()
            assert shown.get_text().startswith(first)
            anchored += 1
    assert anchored > 20


def test_no_table_of_results_has_an_empty_header(site):
    for path in CHAPTERS:
        page = soup(site / html(path))
        assert page.select("table.dataframe")
        assert not [th for th in page.select("th") if not th.get_text(strip=True)]


@needs_browser
def test_numbers_in_tables_end_below_each_other(address, page):
    page.goto(address + html(CHAPTERS[8]), wait_until="load")
    looks = page.eval_on_selector_all(
        "article :is(table.dataframe, table.results) tbody td:not(:first-child)",
        "all => all.map(e => { const s = getComputedStyle(e);"
        " return s.textAlign + ' ' + s.fontVariantNumeric })",
    )
    assert set(looks) == {"right tabular-nums"}


# The least contrast of the words of tables with the ground behind them. axe finds none
# of it, for the shadows at a table's edges are a picture. A canvas reads any colour.
LEAST_CONTRAST = """() => {
  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  const seen = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ground = (e) => {
    const colour = seen(getComputedStyle(e).backgroundColor);
    return colour[3] === 255 ? colour : ground(e.parentElement);
  };
  document.querySelectorAll("details").forEach((fold) => (fold.open = true));
  const words = document.querySelectorAll(
    "article table :is(caption, th, td), article details.results-all > summary");
  return Math.min(...[...words].map((e) => {
    const both = [light(seen(getComputedStyle(e).color)), light(ground(e))];
    return Math.max(...both) / Math.min(...both);
  }));
}"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tables_are_legible_in_both_schemes(site, address, page, scheme):
    page.add_init_script(f"localStorage.setItem('mode', '{scheme}')")
    page.route("**/mathjax/**", lambda route: route.abort())  # tables do without
    for path in (p for p in CHAPTERS if soup(site / html(p)).select("table.results")):
        page.goto(address + html(path), wait_until="load")
        assert page.evaluate(LEAST_CONTRAST) > 4.5, path.stem


@needs_browser
def test_the_first_column_stays_while_a_wide_table_scrolls(address, page):
    page.set_viewport_size(PHONE)
    page.goto(address + html(CHAPTERS[8]), wait_until="load")
    moved = page.evaluate(
        """() => {
          const box = [...document.querySelectorAll("div.text_html")].find(
            (e) => e.offsetParent && e.scrollWidth > e.clientWidth + 60);
          const cell = box.querySelector("tbody tr > :first-child");
          const before = cell.getBoundingClientRect().left;
          box.scrollLeft = 60;
          return [box.scrollLeft, cell.getBoundingClientRect().left - before,
                  getComputedStyle(box).backgroundImage.includes("gradient")];
        }"""
    )
    assert moved[0] == 60
    assert abs(moved[1]) < 25  # it slides to the edge, and stays there
    assert moved[2], "no shadow says that there is more"


@needs_browser
@pytest.mark.parametrize("width", [320, 640, 1280])
def test_every_verdict_of_the_ledger_is_seen_whole(address, page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(address + LEDGER, wait_until="load")
    claims = page.locator(".claim")
    assert claims.count() >= 14
    for claim in claims.all():
        for part in [claim, claim.locator(".chip"), *claim.locator("dd").all()]:
            box = part.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        # a column of words, not of letters
        assert min(dd.bounding_box()["width"] for dd in claim.locator("dd").all()) > 200
    assert not page.evaluate(
        "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    )


def test_a_claim_leads_to_the_cell_that_judges_it(site):
    page = soup(site / LEDGER)
    first = page.select_one(".claim")
    assert first["id"] == "headline"
    for claim in page.select(".claim"):
        link = claim.select("a")[-1]["href"]
        target, _, anchor = link.partition("#")
        cell = soup(site / "book" / target).find(id=anchor)
        assert cell is not None, link
        assert cell.select("pre, table, img"), link


def test_the_ledger_has_no_typed_result(site):
    source = (ROOT / "book" / "ledger.md").read_text(encoding="utf-8")
    results = re.findall(r"^:ours: (.*)$", source, re.MULTILINE)
    assert results
    for ours in results:
        typed = re.sub(r"\{(glue:text|case)\}`[^`]*`", "", ours)
        typed = re.sub(
            r"1e-6|90 % of the energy|within 10 %|from 10 %|Algorithm 2|SST-2",
            "",
            typed,
        )
        assert not re.search(r"\d", typed), ours


@needs_browser
def test_print_has_no_empty_box_and_cuts_no_table(address, page):
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 690, "height": 980})  # A4 less its margins
    page.goto(address + html(CHAPTERS[6]), wait_until="load")
    empty = page.eval_on_selector_all(
        "article div.cell, article details",
        "all => all.filter(e => e.checkVisibility({visibilityProperty: true})"
        " && e.offsetHeight > 0 && !e.innerText.trim() && !e.querySelector('img'))"
        ".length",
    )
    assert empty == 0
    cut = page.eval_on_selector_all(
        "article table",
        "all => all.filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " || e.closest('div').scrollWidth > e.closest('div').clientWidth + 1).length",
    )
    assert cut == 0


def test_a_shared_link_names_the_book_and_shows_a_picture(site):
    for name in pages(site):
        head = soup(site / name).head
        said = {m["property"]: m["content"] for m in head.select("meta[property]")}
        assert said["og:site_name"] == "The DRONE Book"
        assert len(said["og:description"]) > 40
        picture = said["og:image"].removeprefix(
            "https://drone-book.github.io/drone-book/"
        )
        assert (site / picture).is_file()
        assert said["og:image:alt"]


def test_a_page_says_once_what_it_is_and_how_wide(site):
    assert soup(site / "book" / "intro.html").title.string == "The DRONE Book"
    for name in pages(site):
        assert len(soup(site / name).select("meta[name=viewport]")) == 1


def test_tasks_have_the_names_that_readers_know(site):
    """Not those of a parameter; the API and the chapters show code, which has them."""
    raw = re.compile(r"\b(mrpc|sst2|stsb|cola|qqp|mnli|qnli|rte)\b")
    for name in pages(site):
        if not name.startswith(("book/chapters/", "book/api")):
            for text in soup(site / name).select_one("article").find_all(string=raw):
                assert text.find_parent(["code", "pre", "script"]), f"{name}: {text}"
    ledger = soup(site / LEDGER).get_text()
    assert "MRPC, SST-2" in ledger


def test_only_pages_with_formulas_load_mathjax(site):
    loads = {
        name: "mathjax/tex-chtml" in (site / name).read_text(encoding="utf-8")
        for name in pages(site)
    }
    assert loads[CHAPTER]
    assert not loads["book/intro.html"]
    for name, loaded in loads.items():
        assert loaded == bool(soup(site / name).select("article .math")), name


def test_icons_come_once_and_images_when_they_are_near(site):
    for name in pages(site):
        page = soup(site / name)
        assert not page.select("script[src*=fontawesome]")
        for image in page.select("article img[src*='_images/']"):
            assert image["loading"] == "lazy"
            assert int(image["width"]) > 0
            assert int(image["height"]) > 0


def test_the_fonts_of_icons_have_all_that_is_shown_and_little_else(site):
    fonts = list((site / "_static").rglob("fa-*.woff*"))
    assert len(fonts) == 3
    assert sum(font.stat().st_size for font in fonts) < 20_000
    drawn = {code for font in fonts for code in TTFont(font).getBestCmap()}
    styles = "".join(p.read_text() for p in (site / "_static").rglob("*.css"))
    asked = {int(c, 16) for c in re.findall(r'"\\([ef][0-9a-f]{3})"', styles)}
    assert asked <= drawn
    named = {
        name
        for page in pages(site)
        for icon in soup(site / page).select("[class*='fa-']")
        for name in icon["class"]
        if name.startswith("fa-") and name not in LOOKS
    }
    assert len(named) > 10
    assert [n for n in named if not re.search(rf"\.{n}:before", styles)] == []


@needs_browser
def test_icons_are_seen(address, page):
    page.goto(address + CHAPTER, wait_until="load")
    assert page.evaluate(
        "document.fonts.check('900 16px \"Font Awesome 6 Free\"') && "
        "getComputedStyle(document.querySelector('.fa-rocket'), '::before').content"
        ".length > 2"
    )


@needs_browser
def test_the_keyboard_is_seen(address, page):
    for name in ["book/intro.html", CHAPTER]:
        for width in (DESKTOP, PHONE):
            page.set_viewport_size(width)
            page.goto(address + name, wait_until="load")
            for _ in range(25):
                page.keyboard.press("Tab")
                outline = page.evaluate(
                    "document.activeElement === document.body ? 'solid' :"
                    " getComputedStyle(document.activeElement).outlineStyle"
                )
                assert outline == "solid", page.evaluate(
                    "document.activeElement.outerHTML.slice(0, 200)"
                )


class TestCopies:
    """The chapters for Colab and download."""

    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_is_valid_and_has_all_code_of_the_source(self, site, path):
        copy = nbformat.read(site / "notebooks" / path.name, as_version=4)
        nbformat.validate(copy)
        source = nbformat.read(ROOT / "notebooks" / path.name, as_version=4)
        code = [c.source for c in source.cells if c.cell_type == "code"]
        first, *copied = [c.source for c in copy.cells if c.cell_type == "code"]
        assert "pip install" in first
        assert [re.sub(r"^# @title .*\n", "", c) for c in copied] == code

    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_has_plain_markdown_and_folded_answers(self, site, path):
        copy = nbformat.read(site / "notebooks" / path.name, as_version=4)
        text = "\n".join(c.source for c in copy.cells if c.cell_type == "markdown")
        assert not re.search(r"\{[a-z:-]+\}`|^:\w+:|^```\{|^:::", text, re.MULTILINE)
        assert "Exercise " in text
        assert text.count("<details>") == text.count("</details>") >= 1
        answers = re.findall(
            r"<details><summary>.*?</summary>(.*?)</details>", text, re.DOTALL
        )
        assert all(answer.strip() for answer in answers)
        folded = [
            c for c in copy.cells if c.metadata.get("jupyter", {}).get("source_hidden")
        ]
        assert len(folded) >= 3
        assert all(c.source.startswith("# @title Solution to Exercise") for c in folded)

    def test_the_install_cell_leaves_an_installed_library_alone(self, site):
        copy = nbformat.read(site / "notebooks" / CHAPTERS[0].name, as_version=4)
        first = copy.cells[0].source
        assert first.index("find_spec") < first.index("%pip")
        plain = first.replace("%pip", "raise AssertionError  #")
        exec(plain, {})

    def test_the_deploy_job_pushes_what_the_button_opens(self, site):
        page = soup(site / CHAPTER)
        (colab,) = {a["href"] for a in page.select("a[href*='colab.research']")}
        branch, name = re.search(r"/blob/([^/]+)/(.*)$", colab).groups()
        assert (site / "notebooks" / name).is_file()
        workflow = (ROOT / ".github" / "workflows" / "book.yml").read_text()
        assert f"HEAD:{branch}" in workflow
        assert "_build/html/notebooks" in workflow

    def test_the_other_buttons_lead_to_the_source(self, site):
        for path in CHAPTERS:
            page = soup(site / html(path))
            links = [a["href"] for a in page.select("a[href]")]
            source = f"notebooks/{path.name}"
            assert any("mybinder" in x and x.endswith(source) for x in links)
            assert any(x.endswith(f"/edit/main/{source}") for x in links)
            assert f"../../{source}" in links
            assert not any("_sources" in x for x in links)
            assert json.loads((ROOT / source).read_text())["cells"]


class TestLanding:
    def test_a_card_opens_its_chapter_on_colab_as_the_chapters_own_button_does(
        self, site
    ):
        cards = soup(site / "book/intro.html").select(".chapter-card")
        assert len(cards) == len(CHAPTERS)
        for card, path in zip(cards, CHAPTERS, strict=True):
            (link,) = card.select("a[href*='colab.research']")
            page = soup(site / html(path))
            button = page.select_one(
                ".article-header-buttons a[href*='colab.research']"
            )
            assert link["href"] == button["href"]

    def test_says_what_it_is_and_where_to_go(self, site):
        page = soup(site / "book" / "intro.html")
        buttons = {
            a.get_text(strip=True): a["href"] for a in page.select("a.landing-button")
        }
        assert buttons == {
            "Read chapter 1": "chapters/01-svd-baseline.html",
            "Compress your model": "compress.html",
            "See the verdicts": "ledger.html",
        }
        (following,) = page.select("a.right-next")
        assert following["href"] == "chapters/01-svd-baseline.html"

    def test_each_verdict_is_the_ledgers_and_leads_there(self, site):
        listed = [
            (li.select_one(".chip").get_text(), li.select_one("a")["href"])
            for li in soup(site / "book" / "intro.html").select(".verdict-strip li")
        ]
        ledger = [
            (claim.select_one(".chip").get_text(), f"ledger.html#{claim['id']}")
            for claim in soup(site / LEDGER).select(".claim")
        ]
        assert listed == ledger

    def test_each_chapter_has_a_card_that_agrees_with_the_teaching_page(self, site):
        teach = {}
        for tr in soup(site / "book" / "teach.html").select("table tbody tr"):
            cells = [td.get_text(strip=True) for td in tr.select("td")]
            if not cells[0].isdecimal():
                continue  # another table
            teach[int(cells[0])] = f"{cells[2].split()[0]} minutes · needs {cells[5]}"
        cards = soup(site / "book" / "intro.html").select(".chapter-card")
        assert len(cards) == len(CHAPTERS) == len(teach)
        for number, card in enumerate(cards, start=1):
            link = card.select_one(".chapter-card-title a")
            assert link["href"].startswith(f"chapters/{number:02}-")
            assert len(card.select_one("img")["alt"]) > 30
            told = card.select_one(".chapter-card-needs").get_text()
            assert told == f"{teach[number]} · run it on Colab"

    def test_the_version_is_that_of_the_citation(self, site):
        citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
        version = re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1]
        text = soup(site / "book" / "intro.html").get_text()
        assert f"Version {version}." in text
        assert f"version = {{{version}}}" in text


@needs_browser
@pytest.mark.parametrize(
    ("name", "most"), [("book/intro.html", 350_000), (CHAPTER, 900_000)]
)
def test_a_first_visit_is_light(address, page, name, most):
    sizes = []
    page.on("response", lambda r: sizes.append(len(gzip.compress(r.body()))))
    page.goto(address + name, wait_until="networkidle")
    assert sum(sizes) < most


def errors_by_numpy(angle, strength):
    """The toy's three relative errors, from singular values alone."""
    turn = np.deg2rad(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    inputs = rotation @ np.diag([strength, 1.0])  # (2, 2): a root of the moment
    weight = np.diag([1.5, 1.0])  # (out, in)

    def kept(matrix, side):
        left, _, right = np.linalg.svd(matrix)
        first = left[:, :1] if side == "left" else right[:1].T
        return first @ first.T

    thin = {
        "svd": weight @ kept(weight, "right"),
        "input": weight @ kept(inputs, "left"),
        "drone": kept(weight @ inputs, "left") @ weight,
    }
    whole = np.linalg.norm(weight @ inputs)
    return {n: np.linalg.norm((weight - w) @ inputs) / whole for n, w in thin.items()}


@needs_browser
class TestToy:
    @pytest.fixture
    def toy(self, address, page):
        page.goto(address + "book/intro.html", wait_until="load")
        page.wait_for_selector(".toy-number")
        return page

    def test_its_numbers_are_those_of_numpy(self, toy):
        for angle in (0, 1, 30, 45, 60, 89, 90):
            for strength in (1.1, 1.5, 2, 4, 8):
                ours = toy.evaluate(f"toyErrors({angle}, {strength})")
                ours.pop("listens")
                expected = errors_by_numpy(angle, strength)
                assert ours == pytest.approx(expected, abs=1e-9), (angle, strength)

    def test_the_keyboard_moves_it_and_the_table_follows(self, toy):
        before = toy.locator(".toy-number").all_inner_texts()
        toy.locator(".toy input").first.focus()
        for _ in range(10):
            toy.keyboard.press("ArrowRight")
        assert toy.locator(".toy output").first.inner_text() == "70"
        shown = toy.locator(".toy-number").all_inner_texts()
        assert shown != before
        expected = errors_by_numpy(70, 4).values()
        assert shown == [f"{100 * error:.1f} %" for error in expected]

    def test_a_finger_moves_it(self, toy):
        toy.locator(".toy input").first.click(position={"x": 5, "y": 10})
        assert int(toy.locator(".toy output").first.inner_text()) < 20

    def test_its_parts_have_names(self, toy):
        names = [s.aria_snapshot() for s in toy.locator(".toy label").all()]
        assert "Angle" in names[0]
        assert "Strength" in names[1]
        assert len(toy.locator(".toy svg").get_attribute("aria-label")) > 30


def test_only_pages_with_the_toy_load_its_script(site):
    for name in pages(site):
        page = soup(site / name)
        assert bool(page.select("script[src*='toy.js']")) == bool(
            page.select(".drone-toy")
        )


def test_every_exercise_is_listed_and_its_answer_is_there(site):
    rows = soup(site / "book" / "exercises.html").select("table tbody tr")
    listed = {row.select_one("a").get_text() for row in rows}
    titles = {
        re.match(r"Exercise (\S+)", title.get_text())[1]
        for path in CHAPTERS
        for title in soup(site / html(path)).select(".exercise > .admonition-title")
    }
    assert listed == titles
    for row in rows:
        for link in row.select("a"):
            target, _, anchor = link["href"].partition("#")
            assert soup(site / "book" / target).find(id=anchor)
    kinds = [row.select("td")[2].get_text(strip=True) for row in rows]
    assert {kind.partition(" ")[0].strip(",") for kind in kinds} == {
        "pencil",
        "code",
        "research",
    }
    assert all(1 <= kind.count("★") <= 3 for kind in kinds)


@needs_browser
def test_no_column_of_a_table_is_squeezed_to_letters(address, page):
    page.set_viewport_size(PHONE)
    page.goto(address + "book/compress.html", wait_until="load")
    widths = page.eval_on_selector_all(
        "article th", "all => all.map(e => e.getBoundingClientRect().width)"
    )
    assert widths
    assert min(widths) > 50  # the shortest word of a heading needs as much
