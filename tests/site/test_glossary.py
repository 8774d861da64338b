"""Words of the glossary in the chapters: linked both ways, defined where they stand."""

import re

import pytest
from built_site import AXE, PHONE, needs_axe, needs_browser, pages, soup

NAME = "book/chapters/04-attention.html"
GLOSSARY = "book/glossary.html"
WORD = "#use-term-attention-block"


def test_each_chapter_defines_the_words_it_links_and_the_glossary_leads_back(site):
    back = {
        link["href"] for link in soup(site / GLOSSARY).select(".glossary-uses a[href]")
    }
    there = set()
    for name in pages(site):
        if not name.startswith("book/chapters/"):
            continue
        page = soup(site / name)
        links = page.select("article a[href*='glossary.html#term-']")
        assert len(links) >= 8, name
        for link in links:
            term = link["href"].partition("#")[2]
            assert page.find(id=f"definition-{term}").get_text(strip=True), link
            place = link.get("id") or link.find_parent(id=True)["id"]
            if place == f"use-{term}":
                there.add(f"{name.removeprefix('book/')}#{place}")
    assert back == there


def test_a_word_with_two_meanings_is_linked_where_it_has_the_glossarys(site):
    ridge = "glossary.html#term-ridge"
    second = site / "book/chapters/02-data-aware-derivation.html"
    assert ridge not in second.read_text()
    assert ridge in (site / "book/chapters/09-hardware-timing.html").read_text()


@pytest.fixture
def chapter(address, page):
    """Chapter 4, without its formulas."""
    page.route("**/mathjax/**", lambda route: route.abort())
    page.goto(address + NAME, wait_until="load")
    return page


def shown(page):
    return page.locator(".definition:visible").all_inner_texts()


@needs_browser
class TestDefinition:
    def test_is_shown_under_the_pointer_and_stays_when_pointed_at(self, chapter):
        chapter.locator(WORD).hover()
        (words,) = shown(chapter)
        assert words.startswith("Queries, keys and values of one layer")
        chapter.locator(".definition:visible").hover()
        chapter.wait_for_timeout(400)
        assert shown(chapter) == [words]
        chapter.mouse.move(1, 1)
        chapter.wait_for_timeout(400)
        assert shown(chapter) == []

    def test_is_shown_in_the_focus_until_escape(self, chapter):
        link = chapter.locator(WORD)
        chapter.keyboard.press("Tab")  # the focus of a keyboard, not of a pointer
        link.focus()
        assert len(shown(chapter)) == 1
        described = link.get_attribute("aria-describedby")
        assert chapter.locator(f"#{described}").is_visible()
        assert link.evaluate("e => e === document.activeElement")
        chapter.keyboard.press("Escape")
        assert shown(chapter) == []

    @needs_axe
    def test_has_no_fault_of_accessibility(self, chapter):
        chapter.locator(WORD).hover()
        chapter.add_script_tag(path=AXE)
        faults = chapter.evaluate(
            "axe.run({include: [['.definition'], ['[aria-describedby]']]})"
            ".then((r) => r.violations.map((v) => v.id))"
        )
        assert faults == []

    def test_fits_a_phone_and_opens_at_the_first_tap(self, address, browser):
        context = browser.new_context(viewport=PHONE, has_touch=True)
        page = context.new_page()
        page.route("**/mathjax/**", lambda route: route.abort())
        page.goto(address + NAME, wait_until="load")
        link = page.locator(WORD)
        link.tap()
        assert page.url.endswith(NAME)
        box = page.locator(".definition:visible").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        link.tap()
        page.wait_for_url(re.compile("glossary"))
        context.close()


def test_only_pages_that_link_a_word_load_the_script(site):
    script = site / "_static" / "definitions.js"
    assert script.stat().st_size < 5000
    for name in pages(site):
        page = soup(site / name)
        assert bool(page.select("script[src*='definitions.js']")) == bool(
            page.select(".definition")
        )
