"""By keyboard, without motion, on a narrow screen, on paper."""

import pytest
from built_site import CHAPTER, DESKTOP, PHONE, ROOT, SET_FORMULAS, needs_browser

CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*.ipynb"))
MOST_STOPS = 180  # links, folds, buttons that copy; the most, 166, are in chapter 9
# What the Tab key stops at.
STOPS = """() => [...document.querySelectorAll(
    "a[href], button, input, select, textarea, summary, [tabindex]")]
  .filter((e) => e.tabIndex >= 0 && !e.disabled
    && e.checkVisibility({visibilityProperty: true}))
  .map((e) => e.tagName.toLowerCase())"""


@needs_browser
@pytest.mark.parametrize("number", [1, 2, 6, 9, 10])
def test_the_tab_key_stops_at_no_formula(address, page, number):
    """With a menu each formula was a stop: some chapters had 300."""
    name = CHAPTERS[number - 1].stem
    page.goto(f"{address}book/chapters/{name}.html", wait_until="load")
    page.evaluate(SET_FORMULAS)
    assert page.locator("mjx-container").count() > 20
    stops = page.evaluate(STOPS)
    assert stops.count("mjx-container") == 0
    assert len(stops) < MOST_STOPS


MOVES = """() => [...document.querySelectorAll("*")].flatMap((e) =>
  ["", "::before", "::after"].filter((part) => {
    const style = getComputedStyle(e, part || null);
    return style.animationName !== "none" || style.scrollBehavior === "smooth"
      || style.transitionDuration.split(", ").some((time) => parseFloat(time) > 0);
  }).map((part) => e.tagName + part))"""


@needs_browser
@pytest.mark.parametrize("name", ["book/intro.html", "book/ledger.html", CHAPTER])
def test_nothing_moves_for_a_reader_who_asks_for_that(address, page, name):
    page.goto(address + name, wait_until="load")
    assert page.evaluate(MOVES)  # there is something to stop
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(MOVES) == []


@needs_browser
@pytest.mark.parametrize("width", [360, PHONE["width"]])
def test_the_table_of_exercises_fits_a_phone(address, page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(address + "book/exercises.html", wait_until="load")
    rows = page.locator("table.exercise-list tr")
    assert rows.count() > 30
    wide, room, cut, broken = page.evaluate("""() => {
      const box = document.querySelector(".pst-scrollable-table-container");
      const words = (cell) => {
        const range = document.createRange();
        range.selectNodeContents(cell.querySelector("p"));
        return range;
      };
      const cells = [...box.querySelectorAll("th, td")];
      const right = (shape) => shape.getBoundingClientRect().right;
      return [box.scrollWidth, box.clientWidth,
        cells.filter((cell) => right(words(cell)) > right(cell) + 1),
        [...box.querySelectorAll("th")].filter(  // of one word, so of one line
          (head) => words(head).getBoundingClientRect().height > 30),
      ].map((found) => found.map?.((cell) => cell.textContent) ?? found);
    }""")
    assert wide <= room
    assert cut == broken == []


ORDER = """() => [...document.querySelectorAll(
    "article :is(.exercise, .solution, h2.solutions-at-end)")]
  .map((e) => e.id || e.tagName)"""


@needs_browser
def test_a_printed_chapter_has_its_solutions_at_the_end(address, page):
    page.set_viewport_size(DESKTOP)
    page.goto(address + CHAPTER, wait_until="load")
    before = page.evaluate(ORDER)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    printed = page.evaluate(ORDER)
    heading = printed.index("H2")
    assert not any(name.startswith("solution-") for name in printed[:heading])
    solutions = printed[heading + 1 :]
    assert len(solutions) >= 3
    assert solutions == [name for name in before if name.startswith("solution-")]
    assert page.locator("article .solution pre").first.is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(ORDER) == before
