"""What a page loads, in which order; and that it works as before when it has."""

import re
from pathlib import Path

import pytest
from built_site import (
    CHAPTER,
    DESKTOP,
    PHONE,
    SET_FORMULAS,
    needs_browser,
    pages,
    soup,
)

FORMULAS = "book/chapters/02-data-aware-derivation.html"
SEARCH = {"searchtools.js", "language_data.js", "searchindex.js"}
# Every rule of style sheets, as the browser reads them; addresses are tested apart.
RULES = """texts => texts.flatMap(text => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(text);
  return [...sheet.cssRules].map(rule => rule.cssText.replace(/url\\([^)]*\\)/g, ""));
})"""


def names_of(tags):
    return [Path(re.sub(r"\?.*", "", tag["src"])).name for tag in tags]


def the_sheet(site):
    (sheet,) = (site / "_static" / "styles").glob("book-*.css")
    return sheet


def test_a_page_waits_for_one_style_sheet_and_for_no_script(site):
    for name in [*pages(site), "genindex.html"]:
        page = soup(site / name)
        (link,) = page.select("link[rel=stylesheet]")
        assert (site / name).parent.joinpath(link["href"]).resolve() == the_sheet(site)
        at_once = page.select("script[src]:not([defer], [async])")
        assert at_once == [], name
        assert not SEARCH & set(names_of(page.select("script[src]"))), name


def test_the_page_of_the_search_has_its_scripts(site):
    named = names_of(soup(site / "search.html").select("script[src]"))
    assert set(named) > SEARCH


def test_the_sheet_finds_its_pictures_and_fonts(site):
    css = the_sheet(site).read_text(encoding="utf-8")
    found = set(re.findall(r"url\([\"']?(?!data:|#)([^)\"']+)", css))
    assert any("fontawesome" in address for address in found)
    assert [a for a in found if not (the_sheet(site).parent / a).is_file()] == []


@needs_browser
def test_the_sheet_has_every_rule_of_the_sheets_it_is_made_of(site, page):
    static = site / "_static"
    parts = {*static.glob("*.css"), *static.glob("styles/*.css")} - {the_sheet(site)}
    last = static / "custom.css"  # it has the last word
    texts = [path.read_text(encoding="utf-8") for path in parts]
    texts = [re.sub(r'@import "[^"]+";', "", text) for text in texts]
    expected = page.evaluate(RULES, texts)
    joined = page.evaluate(RULES, [the_sheet(site).read_text(encoding="utf-8")])
    assert len(expected) > 3000
    assert sorted(joined) == sorted(expected)
    own = page.evaluate(RULES, [last.read_text(encoding="utf-8")])
    assert joined[-len(own) :] == own


@needs_browser
def test_what_scripts_bring_to_a_page_is_there(address, page):
    """Switch of colours, buttons that copy, menus, the search's window."""
    page.goto(address + CHAPTER, wait_until="load")
    seen = [page.evaluate("document.documentElement.dataset.theme")]
    switch = page.locator("button.theme-switch-button:visible").first
    for _ in range(2):
        switch.click()
        seen.append(page.evaluate("document.documentElement.dataset.theme"))
    assert {"light", "dark"} <= set(seen)
    code = page.locator("div.highlight:visible").first
    code.hover()
    assert code.locator("button.copybtn").count() == 1
    rocket = page.locator(".dropdown-launch-buttons")
    colab = rocket.locator("a[href*=colab]")
    assert not colab.is_visible()
    rocket.locator("button").click()
    colab.wait_for(state="visible", timeout=5_000)
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    words = page.locator("dialog[open] input[name=q]")
    words.fill("Eckart")
    words.press("Enter")
    page.wait_for_selector("#search-results li", timeout=15_000)
    assert "search.html" in page.url


SET = "document.querySelectorAll('article mjx-container > mjx-math').length"
ALL = "document.querySelectorAll('article mjx-container').length"


@needs_browser
def test_a_formula_is_set_when_it_comes_near_or_is_printed(address, page):
    page.set_viewport_size(PHONE)
    page.goto(address + FORMULAS, wait_until="load")
    page.wait_for_function(f"{SET} > 0", timeout=15_000)
    total = page.evaluate(ALL)
    assert total > 150
    assert page.evaluate(SET) < total / 2
    last = page.locator("article mjx-container").filter(visible=True).last
    last.evaluate("e => e.scrollIntoView()")
    last.locator("mjx-math").wait_for(timeout=5_000)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(f"{SET} === {total}", timeout=15_000)


@needs_browser
def test_a_link_into_a_chapter_leads_to_its_place(address, page):
    """Formulas above it that are set later would push it away."""
    page.set_viewport_size(PHONE)
    page.goto(address + FORMULAS + "#exercises", wait_until="load")
    page.wait_for_function(f"{SET} > 0", timeout=15_000)
    page.wait_for_timeout(300)
    top = page.evaluate(
        "document.querySelector('#exercises').getBoundingClientRect().y"
    )
    assert 0 <= top < 200


@needs_browser
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize(
    ("name", "script", "figure", "drawn"),
    [
        ("book/intro.html", "toy.js", ".drone-toy", ".drone-toy .toy-line"),
        ("book/explore.html", "rank_figure.js", ".rank-figure", ".rank-plot polyline"),
    ],
)
def test_a_figure_that_a_script_draws_has_its_room_before(
    address, page, size, name, script, figure, drawn
):
    """Else what is below it jumps away under a reader's eyes."""
    page.set_viewport_size(size)
    page.goto(address + name, wait_until="load")
    page.wait_for_selector(drawn, state="attached")
    height = page.locator(figure).first.bounding_box()["height"]
    page.route(f"**/{script}*", lambda route: route.abort())
    page.goto(address + name, wait_until="load")
    kept = page.locator(figure).first.bounding_box()["height"]
    assert 0.95 * height < kept <= height


@needs_browser
def test_a_comma_stays_with_its_formula(address, page):
    """Where they met at a line's end, the comma began the next line."""
    page.set_viewport_size(PHONE)
    page.goto(address + FORMULAS, wait_until="load")
    page.evaluate(SET_FORMULAS)
    apart = page.evaluate("""() => [...document.querySelectorAll(".held")].map(held => {
      const range = document.createRange();
      range.selectNodeContents(held.lastChild);
      const comma = range.getBoundingClientRect();
      const formula = held.querySelector("mjx-container").getBoundingClientRect();
      return comma.top > formula.bottom;
    })""")
    assert len(apart) > 50
    assert not any(apart)
